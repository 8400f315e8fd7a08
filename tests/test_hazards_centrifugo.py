"""Hazards of Centrifugo and of what stands before it, by their numbers in the list of hazards.

Hazards 28 to 30, 32, 33 and 41 are rows of docs/outcomes.md, see test_outcomes.py; 45 is in test_poison.py.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import psycopg
import pytest

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from outbox_relay.runner import Ended
from tests.conftest import Connect, MakeRelay, RunRelay
from tests.support.gateway import Exchange, Fault, Gateway
from tests.support.oracle import violations
from tests.support.stepping import Stepper
from tests.support.subscriber import Subscriber
from tests.support.waiting import PATIENCE, wait_until
from tests.support.writing import fact, states, write

NOT_BY_ITSELF = Options(policy=Policy(backoff_base=3600.0, backoff_max=3600.0))
"""No hold is due before the test says so."""

Subscribe = Callable[..., Subscriber]


@pytest.mark.parametrize("forgets", [False, True], ids=["Centrifugo remembers the key", "Centrifugo was restarted"])
def test_hazard_12_a_request_outlives_the_relays_patience(
    forgets: bool,
    connect: Connect,
    make_relay: MakeRelay,
    start_centrifugo: Callable[..., Centrifugo],
    subscribe: Subscribe,
    channel: str,
) -> None:
    """A proxy holds the first request back and forwards it when the event and its successor are long delivered.

    Its repetition had the same key, so Centrifugo swallows the late one. If it has forgotten the key meanwhile, the
    old version arrives late, as the promise says, and the tag tells every subscriber that it is old.
    """
    server = start_centrifugo()
    connection = connect()
    first, release, forwarded = threading.Lock(), threading.Event(), threading.Event()

    def hold_back(exchange: Exchange) -> None:
        if first.acquire(blocking=False):
            exchange.wait_for_client_to_leave()
            assert release.wait(PATIENCE)
            exchange.forward()
            forwarded.set()
        else:
            exchange.answer(*exchange.forward())

    with Gateway(server.api_url, hold_back) as gateway:
        subscriber = subscribe(channel, server=server)
        committed = [write(connection, "1", version, channel) for version in (1, 2)]
        with make_relay(server=server, api_url=gateway.url, request_timeout=0.3):
            wait_until(lambda: states(connection) == {"delivered": 2}, "both are delivered")
            assert [command.version for command in gateway.commands] == [1, 1, 2]
            assert len({command.key for command in gateway.commands}) == 2
            if forgets:
                server.restart()
                subscriber = subscribe(channel, server=server)
            release.set()
            assert forwarded.wait(PATIENCE)
            committed.append(write(connection, "1", 3, channel))
            wait_until(lambda: states(connection) == {"delivered": 3}, "the next one is delivered")
    if forgets:
        assert [publication.version for publication in subscriber.wait_for(2)] == [1, 3]
    else:
        assert violations(committed, map(fact, subscriber.wait_for(3))) == []


NO, YES = b'{"error":{"code":107,"message":"bad request"}}', b'{"result":{}}'
ACCEPTED = b'{"publish":{}}'


def partly(*channels: bytes) -> bytes:
    """The reply to an event of several channels, one answer each."""
    return b'{"broadcast":{"responses":[%b]}}' % b",".join(channels)


def in_turn(*requests: Sequence[bytes]) -> Fault:
    """A stand-in, because a real Centrifugo does not change its mind about a channel on demand: replies by request."""
    left = iter(requests)
    return lambda exchange: exchange.answer(200, b'{"replies":[%b]}' % b",".join(next(left)))


def test_hazard_28_a_channel_of_the_events_own_is_no_evidence(
    connect: Connect, database_url: str, gateway: Gateway, centrifugo: Centrifugo
) -> None:
    """Refused by two channels of a namespace, then by one of them: nobody else was accepted, so nobody is to blame."""
    write(connect(), "1", 1, ["hist:1", "hist:2"])
    gateway.fault = in_turn([partly(NO, NO)], [partly(NO, YES)])
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), NOT_BY_ITSELF) as steps:
        steps.step()
        steps.make_due()
        steps.step()
        assert steps.states("1") == ["parked"]
        assert [hold.attempts for hold in steps.holds] == [0]


def test_hazard_28_a_channel_that_accepted_earlier_is_no_evidence(
    connect: Connect, database_url: str, gateway: Gateway, centrifugo: Centrifugo
) -> None:
    """The second time the neighbour is sent to the other namespace only, so nothing is known of this one."""
    connection = connect()
    write(connection, "refused", 1, "hist:1")
    write(connection, "neighbour", 1, ["hist:2", "plain:2"])
    gateway.fault = in_turn([NO, partly(YES, NO)], [NO, ACCEPTED])
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), NOT_BY_ITSELF) as steps:
        steps.step()
        steps.make_due()
        steps.step()
        assert steps.states("neighbour") == ["delivered"]
        assert steps.states("refused") == ["parked"]
        assert [hold.attempts for hold in steps.holds] == [0]


def test_hazard_31_replies_lost_because_requests_take_too_long(
    connect: Connect, make_relay: MakeRelay, gateway: Gateway, subscribe: Subscribe, channel: str
) -> None:
    """Centrifugo's write time-out: after 10 s it has executed everything, and the reply is lost.

    A stand-in that loses the replies to more than 50 events, because that wait is hard-coded. Requests become
    smaller until they are answered; what is repeated has the same key, so it arrives once.
    """
    subscriber = subscribe(channel)
    connection = connect()
    committed = [write(connection, str(number), version, channel) for version in (1, 2) for number in range(200)]

    def lose_long_replies(exchange: Exchange) -> None:
        status, reply = exchange.forward()
        if len(exchange.commands) > 50:
            exchange.hang_up()
        else:
            exchange.answer(status, reply)

    gateway.fault = lose_long_replies
    with make_relay(Options(workers=1, lanes=256, pause_min=0.01, pause_max=0.02), api_url=gateway.url):
        wait_until(lambda: states(connection) == {"delivered": 400}, "all are delivered")
    assert violations(committed, map(fact, subscriber.wait_for(400))) == []
    assert len(gateway.requests) <= 60
    assert connection.execute("SELECT count(*) FROM outbox_hold").fetchall() == [(0,)]


def test_hazard_34_a_proxy_limits_the_size_of_requests(
    connect: Connect, make_relay: MakeRelay, gateway: Gateway, subscribe: Subscribe, channel: str
) -> None:
    """413 above 64 kB, as nginx answers by default above 1 MB: Centrifugo itself has no limit. Events that fit are
    delivered, in smaller requests; the one that does not is held alone."""
    subscriber = subscribe(channel)
    connection = connect()
    small, large = '"%s"' % ("x" * 10_000), '"%s"' % ("x" * 100_000)
    committed = [write(connection, str(number), 1, channel, small) for number in range(40)]
    write(connection, "large", 1, channel, large)

    def limit(exchange: Exchange) -> None:
        if len(exchange.body) > 64 * 1024:
            exchange.answer(413)
        else:
            exchange.answer(*exchange.forward())

    gateway.fault = limit
    with make_relay(api_url=gateway.url):
        wait_until(lambda: states(connection) == {"delivered": 40, "parked": 1}, "all that fit are delivered")
    assert violations(committed, map(fact, subscriber.wait_for(40))) == []


def test_hazard_37_orders_with_versions_of_their_own_share_a_channel(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """Centrifugo's own `version` would gate the channel, and answer success: the second order would be silenced."""
    subscriber = subscribe(channel)
    connection = connect()
    committed = [
        write(connection, name, version, channel)
        for name, version in (("old", 1_000_000), ("new", 1), ("old", 1_000_001), ("new", 2))
    ]
    assert run_relay() is Ended.EMPTY
    assert violations(committed, map(fact, subscriber.wait_for(4))) == []


def test_hazard_39_a_repeated_event_id_swallows_nothing(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """Versions that start anew after a failover, and an event_id that the writer uses twice: three truths, and the
    key of each is its row's own."""
    subscriber = subscribe(channel)
    connection = connect()
    for version, payload in ((1, "1"), (1, "2"), (2, "3")):
        write(connection, "1", version, channel, payload)
    connection.execute("UPDATE outbox SET event_id = '00000000-0000-4000-8000-000000000000'")
    assert run_relay() is Ended.EMPTY
    assert [publication.data for publication in subscriber.wait_for(3)] == [b"1", b"2", b"3"]


def test_hazard_40_channels_that_nobody_could_subscribe_to(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """Centrifugo accepts publications to names that are too long for a subscription. The writer is told instead; the
    longest name that is written can be subscribed to."""
    longest = channel.ljust(255, "x")
    subscriber = subscribe(longest)
    connection = connect()
    committed = [write(connection, "1", 1, longest)]
    for wrong in (f"{longest}x", "hist:" + "ö" * 126, ""):
        with pytest.raises(psycopg.errors.CheckViolation):
            write(connection, "1", 2, wrong)
    assert run_relay() is Ended.EMPTY
    assert violations(committed, map(fact, subscriber.wait_for(1))) == []
    write(connection, "2", 1, "unknown:1")
    assert run_relay() is Ended.ONLY_HELD
    assert Counter(states(connection)) == {"delivered": 1, "parked": 1}
