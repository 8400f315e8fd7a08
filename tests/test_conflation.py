"""Conflation: of an object's waiting snapshots only the newest is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.database import APPLICATION_NAME, DatabaseUnavailableError
from outbox_relay.embedded.centrifugo import DEFAULT_CONFIG, Centrifugo
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from outbox_relay.runner import Relay
from outbox_relay.store import Store
from tests.conftest import Connect
from tests.support.gateway import Exchange, Gateway, refuse
from tests.support.relays import drain
from tests.support.stepping import Stepper
from tests.support.subscriber import Subscriber
from tests.support.writing import Connection, states

Subscribe = Callable[..., Subscriber]

PATIENT = Policy(backoff_base=3600.0, backoff_max=3600.0)
OPTIONS = Options(policy=PATIENT, policies={"order": replace(PATIENT, conflate=True)})


def add(connection: Connection, name: str, version: int, channels: Sequence[str], kind: str = "snapshot") -> None:
    connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, kind, channels, payload) "
        "VALUES ('order', %s, %s, %s::text::outbox_kind, %s, '{}')",
        (name, version, kind, list(channels)),
    )


def rows(connection: Connection, name: str = "1") -> list[tuple[int, str, list[str] | None]]:
    return connection.execute(
        "SELECT version, state::text, accepted FROM outbox WHERE aggregate_id = %s ORDER BY id", (name,)
    ).fetchall()


def received(subscriber: Subscriber, count: int, channel: str) -> list[tuple[int, str]]:
    publications = subscriber.wait_for(count)
    return [(p.version, p.tags["ob_kind"]) for p in publications if p.channel == channel]


@pytest.mark.parametrize("keep", [True, False], ids=["rows are kept", "rows are deleted"])
def test_a_backlog_of_snapshots_is_one_publication_for_each_object(
    connect: Connect, database_url: str, centrifugo: Centrifugo, subscribe: Subscribe, channel: str, keep: bool
) -> None:
    """A hundred of each of five objects; a change after the last snapshot is sent as well."""
    connection, subscriber = connect(), subscribe(channel)
    with connection.transaction():
        for version in range(1, 101):
            for name in range(5):
                add(connection, str(name), version, [channel])
        add(connection, "0", 101, [channel], "change")
    drain(
        Relay(
            lambda: Store(database_url, keep_delivered=keep),
            lambda: Publisher(centrifugo.api_url, centrifugo.api_key),
            replace(OPTIONS, workers=1),
        )
    )
    publications = subscriber.wait_for(6)
    assert sorted((p.aggregate[1], p.version) for p in publications) == [
        ("0", 100),
        ("0", 101),
        *((str(name), 100) for name in range(1, 5)),
    ]
    assert states(connection) == ({"superseded": 495, "delivered": 6} if keep else {})


def test_after_a_crash_an_older_snapshot_may_come_after_the_newer_one(
    connect: Connect, database_url: str, centrifugo: Centrifugo, subscribe: Subscribe, channel: str
) -> None:
    """The exception that docs/architecture.md states. A relay dies when 3 was accepted in place of 1 and 2, and before
    that is written. Where the next one's batch ends before 3, the newest of what it does hold goes out, once; and the
    newer one is not repeated, because its key is known."""
    connection, subscriber = connect(), subscribe(channel)
    for version in (1, 2, 3):
        add(connection, "1", version, [channel])

    def crash(exchange: Exchange) -> None:
        answer = exchange.forward()
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = %s",
            (APPLICATION_NAME,),
        )
        exchange.answer(*answer)

    with Gateway(centrifugo.api_url, crash) as gateway:
        with (
            Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), OPTIONS) as steps,
            pytest.raises(DatabaseUnavailableError),
        ):
            steps.step()
        assert [state for _, state, _ in rows(connection)] == ["pending"] * 3
        gateway.fault = None
        # One event at a time: the first one, whatever its size.
        small = replace(OPTIONS, batch_bytes=1)
        with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), small) as steps:
            steps.step()
        with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), OPTIONS) as steps:
            steps.drain()
        assert [command.version for command in gateway.commands] == [3, 1, 3]
    assert received(subscriber, 2, channel) == [(3, "snapshot"), (1, "snapshot")]
    assert [state for _, state, _ in rows(connection)] == ["delivered", "superseded", "delivered"]


def test_what_waits_behind_a_hold_is_superseded_too(
    connect: Connect, database_url: str, start_centrifugo: Callable[..., Centrifugo], subscribe: Subscribe, channel: str
) -> None:
    """A namespace is not defined yet: the newest of the first batch is refused and held, and later ones are parked.
    When it is, all of them but the last are superseded."""
    server = start_centrifugo()
    connection = connect()
    with Gateway(server.api_url) as gateway:
        with Stepper(database_url, Publisher(gateway.url, server.api_key), OPTIONS) as steps:
            for version in (1, 2, 3):
                add(connection, "1", version, ["later:1"])
            steps.step()
            for version in (4, 5):
                add(connection, "1", version, ["later:1"])
            steps.step()
            steps.make_due()
            steps.step()
        assert [command.version for command in gateway.commands] == [3, 5]
        hist = DEFAULT_CONFIG["channel"]["namespaces"][0]
        server = start_centrifugo({"channel": {"namespaces": [hist, hist | {"name": "later"}]}}, instead_of=server)
        subscriber = subscribe("later:1", server=server)
        with Stepper(database_url, Publisher(gateway.url, server.api_key), OPTIONS) as steps:
            steps.make_due()
            steps.drain()
    assert received(subscriber, 1, "later:1") == [(5, "snapshot")]
    assert [(version, state) for version, state, _ in rows(connection)] == [
        *((version, "superseded") for version in (1, 2, 3, 4)),
        (5, "delivered"),
    ]


def test_an_older_event_is_never_sent_where_the_newer_one_was_accepted(
    connect: Connect, database_url: str, centrifugo: Centrifugo, subscribe: Subscribe, gateway: Gateway, channel: str
) -> None:
    """The newest is accepted by one of its channels and refused by an undefined namespace. What concerned the first one
    alone is superseded; the others remember, also where the next relay does not conflate."""
    connection, subscriber = connect(), subscribe(channel)
    both = [channel, "unknown:1"]
    add(connection, "1", 1, [channel])
    add(connection, "1", 2, both, "change")
    add(connection, "1", 3, ["unknown:1"])
    add(connection, "1", 4, both, "tombstone")
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), OPTIONS) as steps:
        steps.step()
        assert rows(connection) == [
            (1, "superseded", None),
            (2, "parked", [channel]),
            (3, "parked", None),
            (4, "parked", [channel]),
        ]
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), Options(policy=PATIENT)) as steps:
        steps.make_due()
        steps.step()
    assert [(command.version, command.channels) for command in gateway.commands] == [
        (4, (channel, "unknown:1")),
        (2, ("unknown:1",)),
    ]
    assert received(subscriber, 1, channel) == [(4, "tombstone")]


def test_what_is_held_comes_after_what_it_was_to_stand_for(
    connect: Connect, database_url: str, centrifugo: Centrifugo, subscribe: Subscribe, gateway: Gateway, channel: str
) -> None:
    """The newest is refused, and its wait is over before anybody has looked at its aggregate again. The older one, that
    it stood for, is not left behind to be sent after it."""
    connection, subscriber = connect(), subscribe(channel)
    for version in (1, 2):
        add(connection, "1", version, [channel])
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), OPTIONS) as steps:
        gateway.fault = refuse(102, lambda command: True)
        steps.step()
        assert rows(connection) == [(1, "parked", None), (2, "parked", None)]
        gateway.fault = None
        steps.make_due()
        steps.drain()
    assert received(subscriber, 1, channel) == [(2, "snapshot")]
    assert [command.version for command in gateway.commands] == [2, 2]
    assert rows(connection) == [(1, "superseded", None), (2, "delivered", None)]
