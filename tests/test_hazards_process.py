"""Hazards of relay processes: killed, frozen and asked to stop, by their numbers in the project's list of hazards."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from outbox_relay.runner import Ended
from tests.conftest import Connect, MakeRelay, RunRelay, StartRelay
from tests.support.failpoints import arm
from tests.support.gateway import Exchange, Gateway
from tests.support.oracle import violations
from tests.support.proxy import TcpProxy
from tests.support.relays import RelayProcess
from tests.support.subscriber import Subscriber
from tests.support.waiting import wait_until
from tests.support.writing import fact, states, write

Subscribe = Callable[..., Subscriber]

REQUEST_TIMEOUT, BATCH_TIME = 0.4, 0.1
"""The database ends a silent session of such a relay after 1.5 s."""
QUICK = {"request_timeout": REQUEST_TIMEOUT, "batch_time": BATCH_TIME}


def test_hazard_10_kill_after_publishing_repeats_under_the_same_key(
    connect: Connect,
    start_relay: StartRelay,
    run_relay: RunRelay,
    subscribe: Subscribe,
    gateway: Gateway,
    channel: str,
) -> None:
    """SIGKILL when Centrifugo has published and the relay has not heard of it: everything is sent again, under
    the same idempotency keys, which spare the subscriber the repetition."""
    subscriber = subscribe(channel)
    connection = connect()
    committed = [write(connection, str(number), version, channel) for version in (1, 2) for number in range(5)]

    def publish_and_kill(exchange: Exchange) -> None:
        exchange.forward()
        relay.kill()

    gateway.fault = publish_and_kill
    relay = start_relay({"centrifugo_url": gateway.url}, wait=False)
    assert relay.wait() == -signal.SIGKILL
    gateway.fault = None
    [first] = gateway.requests
    assert states(connection) == {"pending": 10}
    assert run_relay(api_url=gateway.url) is Ended.EMPTY

    assert len(first) == 5
    assert sorted(command.key for command in gateway.commands) == sorted(
        [command.key for command in first] + list({command.key for command in gateway.commands})
    )
    assert len({command.key for command in gateway.commands}) == 10
    assert violations(committed, map(fact, subscriber.wait_for(10))) == []


def test_hazard_10_another_relay_takes_over_at_once(
    connect: Connect,
    start_relay: StartRelay,
    make_relay: MakeRelay,
    subscribe: Subscribe,
    gateway: Gateway,
    channel: str,
) -> None:
    """The lock dies with the killed relay's connection: nothing waits for a lease to expire."""
    subscriber = subscribe(channel)
    connection = connect()
    write(connection, "1", 1, channel)
    gateway.fault = Exchange.wait_for_client_to_leave
    doomed = start_relay({"centrifugo_url": gateway.url}, wait=False)
    gateway.wait_for_requests(1)
    with make_relay():
        doomed.kill()
        subscriber.wait_for(1, seconds=1.0)


@pytest.mark.parametrize(
    "point", ["before it looks at its lock", "before it sends", "before it settles", "before it commits"]
)
def test_hazard_11_a_relay_frozen_past_its_lock_sends_nothing(
    point: str,
    tmp_path: Path,
    connect: Connect,
    start_relay: StartRelay,
    make_relay: MakeRelay,
    subscribe: Subscribe,
    gateway: Gateway,
    channel: str,
) -> None:
    """SIGSTOP at a point of the path, until the database has given the lanes to another relay, then SIGCONT.

    Frozen before it sends, it sends nothing; frozen after, it settles nothing. Either way it comes back.
    """
    subscriber = subscribe(channel)
    connection = connect()
    committed = [write(connection, "1", version, channel) for version in (1, 2)]
    failpoint = tmp_path / "failpoint"
    arm(failpoint, point, signal.SIGSTOP)
    command = [sys.executable, "-m", "tests.support.failpoints", "run"]
    settings = {"centrifugo_url": gateway.url, "failpoint": failpoint, **QUICK}
    frozen = start_relay(settings, command=command, wait=False)
    wait_until(frozen.is_stopped, "the relay has stopped itself")
    before = gateway.requests
    with make_relay():
        wait_until(lambda: states(connection) == {"delivered": 2}, "the other relay delivers")
        committed.append(write(connection, "1", 3, channel))
        wait_until(lambda: states(connection) == {"delivered": 3}, "the other relay delivers what came later")
        frozen.thaw()
        frozen.wait_for("database lost, connecting again")
        frozen.wait_for("database is back")
    assert frozen.terminate() == 0
    assert gateway.requests == before
    assert (before == []) == (point in {"before it looks at its lock", "before it sends"})
    assert states(connection) == {"delivered": 3}
    assert violations(committed, map(fact, subscriber.wait_for(3))) == []


def test_hazard_11_a_relay_frozen_while_it_receives_rows_is_relieved(
    connect: Connect,
    database_url: str,
    start_relay: StartRelay,
    make_relay: MakeRelay,
    gateway: Gateway,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PostgreSQL applies no time-out to a session that cannot get rid of its rows. Another relay ends it."""
    url = sa.make_url(database_url)
    connection = connect()
    connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) "
        "SELECT 'order', n, 1, %s, to_json(repeat('x', 1000000)) FROM generate_series(1, 40) n",
        (["plain:nobody listens"],),
    )
    relays: list[RelayProcess] = []

    once = threading.Lock()

    def freeze(received: int) -> None:
        if received > 1_000_000 and once.acquire(blocking=False):
            relays[0].freeze()

    with TcpProxy(url.host or "", url.port or 5432, freeze) as proxy:
        by_proxy = url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        relays.append(
            start_relay(
                {"database_url": by_proxy, "centrifugo_url": gateway.url, "batch_bytes": 100_000_000, **QUICK},
                wait=False,
            )
        )
        wait_until(relays[0].is_stopped, "the relay is frozen while it receives rows")
        with make_relay(request_timeout=REQUEST_TIMEOUT, batch_time=BATCH_TIME):
            wait_until(lambda: states(connection) == {"delivered": 40}, "the other relay delivers")
        assert "ended sessions of relays that no longer read" in caplog.messages
        relays[0].thaw()
        relays[0].wait_for("database lost, connecting again")
        relays[0].wait_for("database is back")
    assert gateway.requests == []


def test_hazard_47_sigterm_in_mid_publish_loses_and_repeats_nothing(
    connect: Connect,
    start_relay: StartRelay,
    run_relay: RunRelay,
    subscribe: Subscribe,
    gateway: Gateway,
    channel: str,
) -> None:
    """A storm of SIGTERM, each while a request is under way: the relay hears the reply out, settles, exits 0.

    Every event is requested exactly once over all the relays, so each of them has settled what it had sent.
    """
    subscriber = subscribe(channel)
    connection = connect()
    committed = [write(connection, str(number), version, channel) for version in range(1, 41) for number in range(5)]
    relays: list[RelayProcess] = []
    asked: list[RelayProcess] = []

    def terminate_then_publish(exchange: Exchange) -> None:
        if relays[-1] not in asked:
            asked.append(relays[-1])
            relays[-1].signal(signal.SIGTERM)
        exchange.answer(*exchange.forward())

    gateway.fault = terminate_then_publish
    for number in range(1, 4):
        relays.append(start_relay({"centrifugo_url": gateway.url, "workers": 2}, wait=False))
        assert relays[-1].wait() == 0, relays[-1].output
        assert states(connection)["delivered"] == len(gateway.commands) >= 5 * number
    gateway.fault = None
    assert run_relay(api_url=gateway.url) is Ended.EMPTY
    keys = [command.key for command in gateway.commands]
    assert len(keys) == len(set(keys)) == 200
    assert violations(committed, map(fact, subscriber.wait_for(200))) == []


def test_hazard_47_a_second_sigterm_stops_hard_and_loses_nothing(
    connect: Connect,
    start_relay: StartRelay,
    run_relay: RunRelay,
    subscribe: Subscribe,
    gateway: Gateway,
    channel: str,
) -> None:
    """Whoever cannot wait for the request in flight sends the signal twice."""
    subscriber = subscribe(channel)
    committed = [write(connect(), "1", 1, channel)]
    gateway.fault = Exchange.wait_for_client_to_leave
    relay = start_relay({"centrifugo_url": gateway.url})
    gateway.wait_for_requests(1)

    def ended_by_another_signal() -> bool:
        relay.signal(signal.SIGTERM)
        return not relay.alive()

    wait_until(ended_by_another_signal, "the relay ends before its request does", seconds=2.0)
    assert relay.wait() == 130
    assert run_relay() is Ended.EMPTY
    assert violations(committed, map(fact, subscriber.wait_for(1))) == []


DEAF = """
import signal, threading
from outbox_relay.cli import _run_until_signal
from outbox_relay.runner import Ended

class Relay:
    def __init__(self):
        self.asked = threading.Event()

    def run(self, *, until_empty):
        threading.Event().wait(0.5)  # nothing tells when the main thread has begun to wait
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        return Ended.STOPPED if self.asked.wait(20) else Ended.HUNG

    def stop(self):
        self.asked.set()

print(_run_until_signal(Relay(), until_empty=False).name)
"""


def test_hazard_47_a_signal_is_heard_that_did_not_wake_the_main_thread() -> None:
    """One that another thread takes, as here, or that comes just before the main thread begins to wait. The relay is
    a stand-in, because nothing else sends the signal at that very moment."""
    ended = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "STOPPED\n"
