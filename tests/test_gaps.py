"""What subscribers hear of an event that is not sent: its gap, in its place in the order, or nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import DEFAULT_CONFIG, Centrifugo
from outbox_relay.event import GAP_ALONE
from outbox_relay.operator import Operator
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from tests.conftest import Connect, RunRelay
from tests.support.gateway import Command, Gateway, refuse
from tests.support.stepping import Stepper
from tests.support.subscriber import Subscriber
from tests.support.writing import Connection

Subscribe = Callable[..., Subscriber]

PATIENT = Policy(backoff_base=3600.0, backoff_max=3600.0)
"""No hold is due before the test says so."""


class Heard(NamedTuple):
    version: int
    kind: str
    data: bytes


def add(
    connection: Connection,
    version: int,
    channels: str | Sequence[str],
    *,
    name: str = "1",
    expires: str | None = None,
    age: str = "0",
    payload: str = '{"n":1}',
    tags: str | None = None,
) -> int:
    """Write an event that expires so long from now, and was written so long ago. Returns its id."""
    row = connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload, tags, expires_at, created_at) "
        "VALUES ('order', %s, %s, %s, %s, %s, now() + %s::interval, now() - %s::interval) RETURNING id",
        (name, version, [channels] if isinstance(channels, str) else list(channels), payload, tags, expires, age),
    ).fetchone()
    assert row is not None
    id_: int = row[0]
    return id_


def rows(connection: Connection, name: str = "1") -> list[tuple[str, str | None, list[str] | None]]:
    """State, ending and accepted of an order's events, in order."""
    return connection.execute(
        "SELECT state::text, ending::text, accepted FROM outbox WHERE aggregate_id = %s ORDER BY id", (name,)
    ).fetchall()


def heard(subscriber: Subscriber, count: int, name: str = "1") -> list[Heard]:
    received = subscriber.wait_for(count)
    return [Heard(p.version, p.tags["ob_kind"], p.data) for p in received if p.tags["ob_id"] == name]


def is_gap(command: Command) -> bool:
    return command.kind == "gap"


def test_an_expired_event_is_told_of_in_its_place(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """Its data never leaves the database; the tags say which event it was, for those who filter by tags too."""
    connection, subscriber = connect(), subscribe(channel)
    add(connection, 1, channel)
    expired = add(connection, 2, channel, expires="-1 second", tags='{"region":"eu"}')
    add(connection, 3, channel, expires="1 hour")
    run_relay()
    assert heard(subscriber, 3) == [(1, "change", b'{"n":1}'), (2, "gap", b"{}"), (3, "change", b'{"n":1}')]
    [gap] = [publication for publication in subscriber.received if publication.tags["ob_kind"] == "gap"]
    [(event_id,)] = connection.execute("SELECT event_id::text FROM outbox WHERE id = %s", (expired,))
    gap.tags.pop("ob_epoch")
    assert gap.tags == {
        "ob": "1",
        "ob_type": "order",
        "ob_id": "1",
        "ob_version": "2",
        "ob_event": event_id,
        "ob_kind": "gap",
        "region": "eu",
    }
    assert [state for state, _, _ in rows(connection)] == ["delivered", "expired", "delivered"]


def test_what_is_too_old_for_its_type_is_not_sent(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """And where the type has no gaps, nothing is said of it."""
    connection, subscriber = connect(), subscribe(channel)
    add(connection, 1, channel, age="2 hours")
    add(connection, 2, channel, age="10 minutes")
    run_relay(Options(policies={"order": Policy(max_age=3600.0, gap=False)}))
    assert heard(subscriber, 1) == [(2, "change", b'{"n":1}')]
    assert rows(connection) == [("expired", None, None), ("delivered", None, None)]


def test_a_replay_does_not_expire(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str, database_url: str
) -> None:
    """A person has asked for it. A gap would only make every subscriber load what it has."""
    connection, subscriber = connect(), subscribe(channel)
    event = add(connection, 1, channel)
    run_relay()
    connection.execute("UPDATE outbox SET expires_at = now() - interval '1 day'")
    assert Operator(database_url).replay([event]).events == 1
    run_relay()
    assert heard(subscriber, 2) == [(1, "change", b'{"n":1}')] * 2
    assert rows(connection) == [("delivered", None, None)]


def test_only_channels_that_lack_the_event_are_told(
    connect: Connect,
    database_url: str,
    start_centrifugo: Callable[..., Centrifugo],
    subscribe: Subscribe,
    channel: str,
) -> None:
    """One of two channels has accepted it before a person discarded it; the other takes nothing but objects. The
    successor waits for the gap, and then goes on."""
    hist = DEFAULT_CONFIG["channel"]["namespaces"][0]
    objects = hist | {"name": "objects", "publication_data_format": "json_object"}
    server = start_centrifugo({"channel": {"namespaces": [hist, objects]}})
    connection, subscriber = connect(), subscribe(channel, "objects:1", server=server)
    event = add(connection, 1, [channel, "objects:1"], payload="1")
    with (
        Gateway(server.api_url) as gateway,
        Stepper(database_url, Publisher(gateway.url, server.api_key), Options(policy=PATIENT)) as steps,
    ):
        steps.step()
        assert rows(connection) == [("parked", None, [channel])]
        add(connection, 2, [channel, "objects:1"])
        steps.step()
        assert Operator(database_url).discard([event]).events == 1
        steps.drain()
        assert [command.channels for command in gateway.commands if is_gap(command)] == [("objects:1",)]
    received = [(p.channel, p.version, p.tags["ob_kind"]) for p in subscriber.wait_for(4)]
    assert [(version, kind) for heard_in, version, kind in received if heard_in == channel] == [
        (1, "change"),
        (2, "change"),
    ]
    assert [(version, kind) for heard_in, version, kind in received if heard_in == "objects:1"] == [
        (1, "gap"),
        (2, "change"),
    ]
    assert [(state, ending) for state, ending, _ in rows(connection)] == [("discarded", None), ("delivered", None)]


def test_who_took_the_gap_alone_is_sent_the_event_when_it_is_requeued(
    connect: Connect, database_url: str, start_centrifugo: Callable[..., Centrifugo]
) -> None:
    """Two channels refuse an event, and one of them is not there when they are told. Who took the gap before the other
    did has not got the event."""
    hist = DEFAULT_CONFIG["channel"]["namespaces"][0]
    one, two = (hist | {"name": name, "publication_data_format": "json_object"} for name in ("one", "two"))
    whole, half = (start_centrifugo({"channel": {"namespaces": found}}) for found in ([one, two], [one]))
    connection = connect()
    policy = Policy(backoff_base=3600.0, backoff_max=3600.0, max_attempts=1, min_age=0.0)
    event = add(connection, 1, ["one:1", "two:1"], name="bad", payload="1")
    with Stepper(database_url, Publisher(whole.api_url, whole.api_key), Options(policy=policy)) as steps:
        steps.step()
        add(connection, 1, ["one:2", "two:2"], name="other")
        steps.step()
        steps.make_due()
        steps.step()
        assert rows(connection, "bad") == [("parked", "dead", None)]
    with Stepper(database_url, Publisher(half.api_url, half.api_key), Options(policy=policy)) as steps:
        steps.step()
        assert rows(connection, "bad") == [("parked", "dead", [GAP_ALONE, "one:1"])]
    with (
        Gateway(whole.api_url) as gateway,
        Stepper(database_url, Publisher(gateway.url, whole.api_key), Options(policy=policy)) as steps,
    ):
        steps.make_due()
        steps.step()
        assert [state for state, _, _ in rows(connection, "bad")] == ["dead"]
        assert Operator(database_url).requeue([event]).events == 1
        steps.step()
        told, again = gateway.commands
        assert (is_gap(told), told.channels) == (True, ("two:1",))
        assert (is_gap(again), again.channels) == (False, ("one:1", "two:1"))


def test_a_gap_that_is_refused_is_tried_again_and_then_recorded_as_untold(
    connect: Connect, database_url: str, centrifugo: Centrifugo, gateway: Gateway, channel: str
) -> None:
    """The first refusal never counts; one with evidence is enough, and the order goes on. Meanwhile the row says that
    the event has expired, so that nobody sends it after its gap."""
    connection = connect()
    gateway.fault = refuse(102, is_gap)
    add(connection, 1, channel, expires="0")
    add(connection, 2, channel)
    others = itertools.count(1)
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), Options(policy=PATIENT)) as steps:
        steps.step()
        assert rows(connection) == [("parked", "expired", None), ("pending", None, None)]
        steps.make_due()
        steps.step()
        assert rows(connection)[0] == ("parked", "expired", None)
        add(connection, next(others), channel, name="other")
        steps.step()
        steps.make_due()
        steps.drain()
        assert steps.holds == []
    assert [state for state, _, _ in rows(connection)] == ["expired", "delivered"]
    [(error,)] = connection.execute("SELECT error FROM outbox WHERE state = 'expired'")
    assert error == (f"the gap is untold: Centrifugo refused channel {channel!r} with 102: refused by the stand-in")
    keys = [command.key for command in gateway.commands if is_gap(command)]
    assert len(keys) == 3
    assert len(set(keys)) == 1


@pytest.mark.parametrize("waits", [False, True])
def test_a_dead_event_is_told_of_before_its_successors_are_sent(
    connect: Connect,
    database_url: str,
    centrifugo: Centrifugo,
    subscribe: Subscribe,
    gateway: Gateway,
    channel: str,
    waits: bool,
) -> None:
    """A process that dies between the two leaves the mark in the row. Where the aggregate waits for a person, that
    wait begins when the gap is told."""
    connection, subscriber = connect(), subscribe(channel)
    gateway.fault = refuse(107, lambda command: (command.version, command.kind) == (1, "change"))
    policy = Policy(backoff_base=3600.0, backoff_max=3600.0, wait_after_dead=waits)
    add(connection, 1, channel, name="bad")
    add(connection, 2, channel, name="bad")
    key = centrifugo.api_key
    with Stepper(database_url, Publisher(gateway.url, key), Options(policy=policy)) as steps:
        steps.step()
        add(connection, 3, channel, name="other")
        steps.step()
        steps.make_due()
        steps.step()
    assert rows(connection, "bad") == [("parked", "dead", None), ("parked", None, None)]
    assert subscriber.wait_for(1)[0].tags["ob_id"] == "other"
    with Stepper(database_url, Publisher(gateway.url, key), Options(policy=policy)) as steps:
        steps.drain()
        assert len(steps.holds) == waits
    received = [(version, kind) for version, kind, _ in heard(subscriber, 2 if waits else 3, "bad")]
    assert received == ([(1, "gap")] if waits else [(1, "gap"), (2, "change")])
    assert [state for state, _, _ in rows(connection, "bad")] == ["dead", "parked" if waits else "delivered"]
    [(error,)] = connection.execute("SELECT error FROM outbox WHERE state = 'dead'")
    assert "with 107" in error
    assert "untold" not in error
