"""Outages of the Redis behind Centrifugo: Centrifugo itself is up, answers 200, and its `/health` is green.

The policy here is harsh, one attempt and no time: whoever were blamed would be dead at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import pytest

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import DEFAULT_CONFIG, Centrifugo
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from tests.conftest import Connect, MakeRelay
from tests.support.gateway import Gateway
from tests.support.redis import Redis
from tests.support.waiting import in_background, wait_until
from tests.support.writing import Connection, states, write

StartRedis = Callable[[], Redis]
StartCentrifugo = Callable[..., Centrifugo]

HARSH = Options(
    workers=1,
    pause_min=0.02,
    pause_max=0.2,
    policy=Policy(max_attempts=1, min_age=0.0, backoff_base=0.05, backoff_max=0.1),
)


@pytest.fixture
def start_redis() -> Iterator[StartRedis]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Redis())


def on(*shards: Redis, io_timeout: str = "4s") -> Mapping[str, Any]:
    """The configuration of a Centrifugo that spreads its channels over these; 4 s is its own default."""
    redis = {"address": [shard.url for shard in shards], "io_timeout": io_timeout}
    return {"engine": {"type": "redis", "redis": redis}, "channel": DEFAULT_CONFIG["channel"]}


def blame(connection: Connection) -> tuple[int, int]:
    """Attempts counted, and events dead: neither may ever be more than 0 here."""
    row = connection.execute(
        "SELECT (SELECT coalesce(sum(attempts), 0) FROM outbox_hold), "
        "(SELECT count(*) FROM outbox WHERE state = 'dead')"
    ).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])


def tries(connection: Connection) -> int:
    """The fewest refusals in a row of any held order."""
    row = connection.execute("SELECT coalesce(min(tries), 0) FROM outbox_hold").fetchone()
    assert row is not None
    return int(row[0])


def overtaken(gateway: Gateway) -> list[tuple[str, str]]:
    """Orders of which something was sent after a later version."""
    sent: dict[tuple[str, str], list[int]] = defaultdict(list)
    for command in gateway.commands:
        sent[command.aggregate].append(command.version)
    return [aggregate for aggregate, versions in sent.items() if versions != sorted(versions)]


def test_redis_killed_in_mid_batch(
    connect: Connect, make_relay: MakeRelay, start_centrifugo: StartCentrifugo, start_redis: StartRedis, channel: str
) -> None:
    """Hazard 29. Of one request of 500 events Redis has executed some when it dies: the reply accepts those and
    refuses the others with 100. After that nothing is accepted, and when Redis is back everything is."""
    redis = start_redis()
    server = start_centrifugo(on(redis))
    connection = connect()
    for version in (1, 2):
        connection.execute(
            "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) "
            "SELECT 'order', n, %s, %s, to_json(repeat('x', 100)) FROM generate_series(1, 500) n",
            (version, [channel]),
        )

    def kill() -> None:
        wait_until(lambda: redis.ask(f"EXISTS centrifugo.stream.{channel}") == ":1", "Redis executes the batch")
        redis.kill()

    with Gateway(server.api_url) as gateway, in_background(kill) as killed:
        # One worker and no trials of `parallel`: one request of 500, one event after the other.
        options = replace(HARSH, lanes=256, workers=1)
        with make_relay(options, api_url=gateway.url, parallel=False, server=server):
            killed()
            wait_until(lambda: tries(connection) >= 2, "all that were refused are tried again")
            assert states(connection).get("delivered", 0) > 0
            assert blame(connection) == (0, 0)
            redis.start()
            wait_until(lambda: states(connection) == {"delivered": 1000}, "all are delivered")
        assert blame(connection) == (0, 0)
        assert overtaken(gateway) == []


def test_redis_frozen(
    connect: Connect,
    make_relay: MakeRelay,
    start_centrifugo: StartCentrifugo,
    start_redis: StartRedis,
    channel: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An empty batch is still answered at once, a publication is not. What hung is executed after the thaw, and
    its repetition under the same key swallowed."""
    redis = start_redis()
    server = start_centrifugo(on(redis))
    connection = connect()
    for version in (1, 2):
        for number in range(5):
            write(connection, str(number), version, channel)
    redis.freeze()
    with closing(Publisher(server.api_url, server.api_key, timeout=0.5)) as publisher:
        assert publisher.probe() is None
    with (
        Gateway(server.api_url) as gateway,
        make_relay(HARSH, api_url=gateway.url, server=server, request_timeout=0.3),
    ):
        gateway.wait_for_requests(4)
        assert states(connection) == {"pending": 10}
        assert caplog.messages.count("outage: nothing is published, no event is blamed") == 1
        redis.thaw()
        wait_until(lambda: states(connection) == {"delivered": 10}, "all are delivered")
        assert blame(connection) == (0, 0)
        assert overtaken(gateway) == []
    assert redis.ask(f"XLEN centrifugo.stream.{channel}") == ":10"


@pytest.mark.parametrize(
    "how",
    [
        "killed",
        "frozen, known to Centrifugo first",
        "frozen, known to the relay first",
    ],
)
def test_one_shard_of_two_is_down(
    how: str,
    connect: Connect,
    make_relay: MakeRelay,
    start_centrifugo: StartCentrifugo,
    start_redis: StartRedis,
    channel: str,
) -> None:
    """The orders whose channels live on that shard wait, all others go on as if nothing had happened."""
    healthy, broken = start_redis(), start_redis()
    # Which of them gives up first: Centrifugo waiting for Redis, or the relay waiting for Centrifugo.
    io_timeout, request_timeout = ("100ms", 1.0) if "Centrifugo" in how else ("4s", 0.3)
    server = start_centrifugo(on(healthy, broken, io_timeout=io_timeout))
    connection = connect()
    orders = [str(number) for number in range(12)]

    def change(version: int) -> None:
        for order in orders:
            write(connection, order, version, f"{channel}-{order}")

    def settled() -> dict[str, list[str]]:
        rows = connection.execute("SELECT aggregate_id, state::text FROM outbox ORDER BY id")
        found: dict[str, list[str]] = defaultdict(list)
        for order, state in rows:
            found[order].append(state)
        return found

    change(1)
    with (
        Gateway(server.api_url) as gateway,
        make_relay(HARSH, api_url=gateway.url, server=server, request_timeout=request_timeout),
    ):
        wait_until(lambda: states(connection) == {"delivered": 12}, "both shards work")
        waiting = [order for order in orders if broken.ask(f"EXISTS centrifugo.stream.{channel}-{order}") == ":1"]
        assert 0 < len(waiting) < len(orders)
        broken.kill() if how == "killed" else broken.freeze()
        for version in range(2, 8):
            change(version)
            wait_until(
                lambda version=version: all(  # type: ignore[misc]
                    settled()[order] == ["delivered"] * version for order in orders if order not in waiting
                ),
                "the others go on",
            )
            assert blame(connection) == (0, 0)
        wait_until(lambda: tries(connection) >= 2, "the waiting ones are tried again")
        assert all(set(settled()[order][1:]) <= {"parked", "pending"} for order in waiting)
        broken.start() if how == "killed" else broken.thaw()
        wait_until(lambda: states(connection) == {"delivered": 84}, "all are delivered")
        assert blame(connection) == (0, 0)
        assert overtaken(gateway) == []


def test_redis_restarted_again_and_again(
    connect: Connect, make_relay: MakeRelay, start_centrifugo: StartCentrifugo, start_redis: StartRedis, channel: str
) -> None:
    """Five restarts under a relay that has work all the time: nothing is lost, blamed or overtaken."""
    redis = start_redis()
    server = start_centrifugo(on(redis))
    connection = connect()
    written = 0
    with Gateway(server.api_url) as gateway, make_relay(HARSH, api_url=gateway.url, server=server):
        for version in range(1, 6):
            for number in range(100):
                write(connection, str(number), version, channel)
            written += 100
            redis.kill()
            redis.start()
            wait_until(lambda: states(connection).get("delivered", 0) > written - 100, "the relay goes on")  # noqa: B023
        wait_until(lambda: states(connection) == {"delivered": 500}, "all are delivered")
        assert blame(connection) == (0, 0)
        assert overtaken(gateway) == []
