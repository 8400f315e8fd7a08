"""Poison: events that make every request fail that carries them, among many that do not. Hazards 30 and 34.

A stand-in for a proxy that dislikes some payloads; what it likes goes on to a real Centrifugo.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import pytest

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from tests.conftest import Connect
from tests.support.gateway import Exchange, Fault, Gateway
from tests.support.oracle import Fact, violations
from tests.support.stepping import Stepper
from tests.support.subscriber import Subscriber
from tests.support.tables import table
from tests.support.writing import Connection, fact, states, write

Subscribe = Callable[..., Subscriber]

MARKER = b'"poison"'
MANY = 1_000
PATIENT = Policy(backoff_base=3600.0, backoff_max=3600.0)
"""No hold is due before the test says so."""
SETTINGS = {
    "by default": Options(policy=PATIENT),
    "all in one request": Options(policy=PATIENT, lanes=256, batch_events=2 * MANY, batch_time=60.0),
}

KINDS: dict[str, Fault] = {
    "403": lambda exchange: exchange.answer(403),
    "413": lambda exchange: exchange.answer(413),
    "a reset": Exchange.reset,
    "a hang": Exchange.wait_for_client_to_leave,
}


def poison(gateway: Gateway, kind: str) -> None:
    """Do the worst of a kind to every request with a poisoned payload, from now on."""

    def dislike(exchange: Exchange) -> None:
        if MARKER in exchange.body:
            KINDS[kind](exchange)
        else:
            exchange.answer(*exchange.forward())

    gateway.fault = dislike


def write_all(connection: Connection, channel: str, guilty: Collection[int]) -> None:
    """Two events of each of 1,000 orders; the first one of the chosen orders is poisoned."""
    for version in (1, 2):
        connection.execute(
            "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) "
            "SELECT 'order', n, %s, %s, CASE WHEN n = ANY(%s) THEN %s ELSE '{}' END::json "
            "FROM generate_series(0, %s) n ORDER BY n",
            (version, [channel], list(guilty) if version == 1 else [], MARKER.decode(), MANY - 1),
        )


def bound(guilty: int) -> int:
    """How many requests the documentation grants."""
    [row] = [row for row in table("outcomes.md", "How the guilty are found") if row["Guilty of 1,000"] == str(guilty)]
    return int(row["Requests, at most"].replace(",", ""))


def committed(connection: Connection) -> list[Fact]:
    rows = connection.execute(
        "SELECT aggregate_id::text, version, event_id::text FROM outbox WHERE state = 'delivered'"
    )
    return [Fact(("order", name), version, key) for name, version, key in rows]


@pytest.mark.parametrize(
    ("guilty", "kind", "setting"),
    [
        *((1, kind, setting) for kind in KINDS for setting in SETTINGS),
        (500, "403", "by default"),
        (500, "a reset", "by default"),
    ],
)
def test_the_guilty_are_found_and_nobody_else_is_stopped(
    guilty: int,
    kind: str,
    setting: str,
    connect: Connect,
    database_url: str,
    gateway: Gateway,
    centrifugo: Centrifugo,
    subscribe: Subscribe,
    channel: str,
) -> None:
    """1,000 orders with two events each: those of the innocent arrive in order, the guilty ones are held alone with
    their successors, without an attempt, and all that takes few requests."""
    subscriber = subscribe(channel)
    connection = connect()
    chosen = range(777, 778) if guilty == 1 else range(0, MANY, MANY // guilty)
    write_all(connection, channel, chosen)
    poison(gateway, kind)
    publisher = Publisher(gateway.url, centrifugo.api_key, timeout=0.5 if kind == "a hang" else 3.0)
    with Stepper(database_url, publisher, SETTINGS[setting]) as steps:
        steps.drain(batches=2 * MANY)
        assert {int(hold.aggregate_id) for hold in steps.holds} == set(chosen)
        assert {hold.attempts for hold in steps.holds} == {0}
    assert states(connection) == {"parked": 2 * guilty, "delivered": 2 * (MANY - guilty)}
    assert len(gateway.requests) <= bound(guilty)
    assert violations(committed(connection), map(fact, subscriber.wait_for(2 * (MANY - guilty)))) == []


def test_where_all_are_guilty_nobody_is_blamed(
    connect: Connect,
    database_url: str,
    gateway: Gateway,
    centrifugo: Centrifugo,
    subscribe: Subscribe,
    channel: str,
) -> None:
    """Nothing is accepted, so it cannot be told from an outage: one request per batch, and no trace of it."""
    subscriber = subscribe(channel)
    connection = connect()
    write_all(connection, channel, range(MANY))
    poison(gateway, "403")
    connection.execute("DELETE FROM outbox WHERE version = 2")
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key)) as steps:
        for _ in range(30):
            steps.step()
        assert (steps.pauses, steps.holds) == (True, [])
        assert states(connection) == {"pending": MANY}
        assert len(gateway.requests) == 30
        gateway.fault = None
        steps.drain()
    assert states(connection) == {"delivered": MANY}
    assert violations(committed(connection), map(fact, subscriber.wait_for(MANY))) == []


@pytest.mark.parametrize("wait_after_dead", [False, True], ids=["its order goes on", "its order waits for a person"])
@pytest.mark.parametrize(
    ("attempts", "seconds", "dead"), [(10, 900.0, True), (9, 900.0, False), (10, 899.0, False), (30, 0.0, False)]
)
def test_hazard_45_dead_needs_attempts_and_time(
    attempts: int,
    seconds: float,
    dead: bool,
    wait_after_dead: bool,
    connect: Connect,
    database_url: str,
    gateway: Gateway,
    centrifugo: Centrifugo,
    channel: str,
) -> None:
    """By default 10 attempts and 900 s. Then the order goes on with its next event, or waits for a person; until
    then nothing of it is sent but the guilty event, alone."""
    connection = connect()
    for version in (1, 2):
        write(connection, "guilty", version, channel, MARKER if version == 1 else b"{}")
    for number in range(10):
        write(connection, str(number), 1, channel)
    poison(gateway, "403")
    policy = replace(PATIENT, wait_after_dead=wait_after_dead)
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), Options(policy=policy)) as steps:
        steps.drain()
        found = len(gateway.requests)
        for attempt in range(attempts):
            if attempt == attempts - 1:
                steps.age(seconds)
            write(connection, "0", 2 + attempt, channel)
            steps.make_due()
            steps.step()
        alone = [request for request in gateway.requests[found:] if request[0].aggregate[1] == "guilty"]
        assert [len(request) for request in alone] == [1] * attempts
        steps.drain()
        first = "dead" if dead else "parked"
        assert steps.states("guilty") == [first, "delivered" if dead and not wait_after_dead else "parked"]
        assert bool(steps.holds) == (not dead or wait_after_dead)
        assert set(steps.states("0")) == {"delivered"}


def test_a_few_innocent_events_are_not_stopped_by_a_few_guilty_ones(
    connect: Connect, database_url: str, gateway: Gateway, centrifugo: Centrifugo, channel: str
) -> None:
    """A quiet outbox: each half of the first request has a guilty event in it, so nothing is ever accepted."""
    connection = connect()
    for name in ("innocent", "guilty", "guilty too"):
        write(connection, name, 1, channel, MARKER if "guilty" in name else b"{}")
    poison(gateway, "403")
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key)) as steps:
        for _ in range(40):
            steps.step()
        assert steps.states("innocent") == ["delivered"]
