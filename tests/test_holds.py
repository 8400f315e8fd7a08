"""Events that are refused alone: who waits, who does not, what counts as an attempt, and when one is given up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from outbox_relay import outcome
from outbox_relay.embedded.centrifugo import DEFAULT_CONFIG, Centrifugo
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from outbox_relay.runner import Ended
from outbox_relay.store import Store
from tests.conftest import Connect, MakeRelay, RunRelay, StartRelay
from tests.support.gateway import Command, Exchange, Gateway, refuse
from tests.support.oracle import violations
from tests.support.subscriber import Subscriber
from tests.support.waiting import wait_until
from tests.support.writing import Connection, Traffic, delivered, fact, neighbours, states, write

Subscribe = Callable[..., Subscriber]


class Held(NamedTuple):
    aggregate_id: str
    head_version: int
    tries: int
    attempts: int


def holds(connection: Connection) -> list[Held]:
    rows = connection.execute(
        "SELECT h.aggregate_id::text, o.version, tries, attempts FROM outbox_hold h JOIN outbox o ON o.id = head_id"
    ).fetchall()
    return [Held(*row) for row in rows]


def ends(connection: Connection, aggregate_id: str) -> list[tuple[int, str]]:
    """What became of an order's events, by version."""
    return connection.execute(
        "SELECT version, state::text FROM outbox WHERE aggregate_id = %s ORDER BY id", (aggregate_id,)
    ).fetchall()


def of(*names: str) -> Callable[[Command], bool]:
    return lambda command: command.aggregate[1] in names


def with_namespace(*more: Mapping[str, object]) -> dict[str, object]:
    channel = DEFAULT_CONFIG["channel"]
    return {"channel": channel | {"namespaces": [*channel["namespaces"], *more]}}


def test_an_unknown_namespace_holds_its_aggregate_until_it_is_defined(
    connect: Connect,
    make_relay: MakeRelay,
    run_relay: RunRelay,
    subscribe: Subscribe,
    start_centrifugo: Callable[..., Centrifugo],
    channel: str,
) -> None:
    """Centrifugo's own 102. The order waits with all its later events, its neighbours in the lane do not; nothing
    counts as an attempt, because nothing of that namespace was accepted. Centrifugo is restarted with the
    namespace defined: everything goes out in order, and a channel that had accepted is not bothered again."""
    server = start_centrifugo()
    connection = connect()
    held, free = neighbours(connection, 2)
    with Gateway(server.api_url) as gateway:
        write(connection, held, 1, [channel, "later:1"])
        assert run_relay(api_url=gateway.url, server=server) is Ended.ONLY_HELD
        for version in (2, 3):
            write(connection, held, version, "later:1")
            write(connection, free, version, channel)
        assert run_relay(api_url=gateway.url, server=server) is Ended.ONLY_HELD
        assert states(connection) == {"parked": 3, "delivered": 2}
        with make_relay(api_url=gateway.url, server=server):
            wait_until(lambda: holds(connection)[0].tries >= 4, "the head is tried again and again")
        assert holds(connection) == [Held(held, 1, holds(connection)[0].tries, attempts=0)]
        assert {command.version for command in gateway.commands if command.aggregate[1] == held} == {1}

        defined = {"name": "later"} | {
            k: v for k, v in DEFAULT_CONFIG["channel"]["namespaces"][0].items() if k != "name"
        }
        server = start_centrifugo(with_namespace(defined), instead_of=server)
        subscriber = subscribe("later:1", server=server)
        before = len(gateway.commands)
        with make_relay(api_url=gateway.url, server=server):
            received = subscriber.wait_for(3)
            wait_until(lambda: states(connection) == {"delivered": 5}, "all are delivered")
        assert [publication.version for publication in received] == [1, 2, 3]
        assert [command.channels for command in gateway.commands[before:]] == [("later:1",)] * 3
        assert holds(connection) == []


def test_a_map_namespace_refuses_publications_for_good(
    connect: Connect,
    make_relay: MakeRelay,
    start_centrifugo: Callable[..., Centrifugo],
    channel: str,
) -> None:
    """Centrifugo's own 107. The whole namespace is misconfigured, so no event of it is to blame or dies."""
    mapped = {"name": "mapped", "subscription_type": "map", "map": {"mode": "recoverable", "key_ttl": "60s"}}
    server = start_centrifugo(with_namespace(mapped))
    connection = connect()
    write(connection, "1", 1, "mapped:1")
    write(connection, "2", 1, "mapped:1")
    traffic = Traffic(connection, "3", channel)
    with make_relay(server=server):
        traffic.until(lambda: [held.tries > 5 for held in holds(connection)] == [True, True], "both are tried again")
    assert {held.attempts for held in holds(connection)} == {0}
    assert states(connection)["parked"] == 2


def test_no_attempt_counts_before_another_aggregate_was_accepted(
    connect: Connect, make_relay: MakeRelay, gateway: Gateway, channel: str
) -> None:
    """A refusal is the event's own fault only if others of its namespace were accepted after it. Then it dies of
    a 107 at once, and its successor goes on. (A stand-in refuses: see `refuse`.)"""
    connection = connect()
    write(connection, "bad", 1, channel)
    gateway.fault = refuse(
        107, lambda command: (command.aggregate[1], command.version, command.kind) == ("bad", 1, "change")
    )
    with make_relay(api_url=gateway.url):
        wait_until(lambda: holds(connection) and holds(connection)[0].tries >= 4, "the head is tried again and again")
        assert holds(connection)[0].attempts == 0
        write(connection, "bad", 2, channel)
        write(connection, "good", 1, channel)
        wait_until(lambda: states(connection) == {"dead": 1, "delivered": 2}, "the head is dead, the others arrived")
    assert ends(connection, "bad") == [(1, "dead"), (2, "delivered")]
    error = connection.execute("SELECT error FROM outbox WHERE state = 'dead'").fetchone()
    assert error is not None
    assert "107" in error[0]


@pytest.mark.parametrize(
    ("code", "policy", "end"),
    [
        (102, Policy(max_attempts=3, min_age=0.0, backoff_base=0.01, backoff_max=0.02), "dead"),
        (102, Policy(max_attempts=3, min_age=3600.0, backoff_base=0.01, backoff_max=0.02), "parked"),
        (100, Policy(max_attempts=3, min_age=0.0, backoff_base=0.01, backoff_max=0.02), "parked"),
        (107, Policy(max_attempts=1000, min_age=3600.0, backoff_base=0.01, backoff_max=0.02), "dead"),
    ],
    ids=["dead after its attempts", "not before its age", "never by an internal error", "at once by a bad request"],
)
def test_when_an_event_is_given_up(
    connect: Connect,
    make_relay: MakeRelay,
    subscribe: Subscribe,
    gateway: Gateway,
    channel: str,
    relay_options: Options,
    code: int,
    policy: Policy,
    end: str,
) -> None:
    """One event is refused while a neighbour's are accepted all the time. The neighbour never waits; the order
    goes on with its next event once the refused one has ended, and not before."""
    subscriber = subscribe(channel)
    connection = connect()
    bad, good = neighbours(connection, 2)
    traffic = Traffic(connection, good, channel)
    write(connection, bad, 1, channel)
    first = ("order", bad, 1, "change")
    successor = write(connection, bad, 2, channel)
    gateway.fault = refuse(code, lambda command: (*command.aggregate, command.version, command.kind) == first)
    with make_relay(replace(relay_options, policy=policy), api_url=gateway.url):
        if end == "dead":
            traffic.until(lambda: ends(connection, bad) == [(1, "dead"), (2, "delivered")], "the order goes on")
        else:
            traffic.until(lambda: [held.tries for held in holds(connection)] > [6], "the head is tried again and again")
            assert ends(connection, bad) == [(1, "parked"), (2, "parked")]
        wait_until(lambda: delivered(connection, good) == len(traffic.written), "the neighbour's events are delivered")
    tries = [command for command in gateway.commands if (*command.aggregate, command.version, command.kind) == first]
    assert len(tries) > (policy.max_attempts if code == 102 else 1)
    committed = [*traffic.written, *([successor] if end == "dead" else [])]
    publications = subscriber.wait_for(len(committed) + (end == "dead"))
    of_bad = [(heard.version, heard.tags["ob_kind"]) for heard in publications if heard.aggregate[1] == bad]
    assert of_bad == ([(1, "gap"), (2, "change")] if end == "dead" else [])
    received = [fact(publication) for publication in publications if publication.tags["ob_kind"] != "gap"]
    assert [heard for heard in received if heard.aggregate[1] == bad] == committed[len(traffic.written) :]
    assert violations(traffic.written, [heard for heard in received if heard.aggregate[1] == good]) == []


def test_parked_events_go_out_in_order_when_the_cause_is_mended(
    connect: Connect, make_relay: MakeRelay, subscribe: Subscribe, gateway: Gateway, channel: str
) -> None:
    """Fifty events behind a hold, more written while they drain: none is overtaken, none is sent twice."""
    subscriber = subscribe(channel)
    connection = connect()
    name, other = neighbours(connection, 2)
    gateway.fault = refuse(102, of(name))
    committed = [write(connection, name, 1, channel)]
    with make_relay(api_url=gateway.url):
        wait_until(lambda: holds(connection), "the order is held")
        committed += [write(connection, name, version, channel) for version in range(2, 51)]
        committed.append(write(connection, other, 1, channel))
        wait_until(lambda: states(connection) == {"parked": 50, "delivered": 1}, "all of it is parked")
        gateway.fault = None
        committed += [write(connection, name, version, channel) for version in range(51, 71)]
        wait_until(lambda: states(connection) == {"delivered": 71}, "all are delivered")
    assert holds(connection) == []
    assert violations(committed, map(fact, subscriber.wait_for(71))) == []
    accepted = [command for command in gateway.commands if command.version > 1]
    assert len(accepted) == 69


def test_one_event_that_breaks_its_whole_request_is_found(
    connect: Connect, make_relay: MakeRelay, subscribe: Subscribe, gateway: Gateway, channel: str
) -> None:
    """A stand-in answers 400 whenever that event is in the request, as Centrifugo does for what it cannot decode.
    All others arrive, in few requests; the guilty one is given up and its successor goes on."""
    subscriber = subscribe(channel)
    connection = connect()
    committed = [write(connection, str(number), 1, channel) for number in range(200)]
    traffic = Traffic(connection, "other", channel)
    guilty = committed.pop(77)
    committed.append(write(connection, "77", 2, channel))

    def choke(exchange: Exchange) -> None:
        if any(command.aggregate == guilty.aggregate and command.version == 1 for command in exchange.commands):
            exchange.answer(400, b"Bad Request\n")
        else:
            exchange.answer(*exchange.forward())

    gateway.fault = choke
    with make_relay(api_url=gateway.url):
        traffic.until(lambda: states(connection).get("dead") == 1, "the guilty one is found")
        committed += traffic.written
        wait_until(lambda: states(connection) == {"delivered": len(committed), "dead": 1}, "the others arrived")
    assert ends(connection, "77") == [(1, "dead"), (2, "delivered")]
    received = [fact(publication) for publication in subscriber.wait_for(len(committed))]
    assert violations(committed, received) == []
    assert len([request for request in gateway.requests if len(request) > 1]) < 60


def test_until_empty_says_what_is_left(
    connect: Connect, run_relay: RunRelay, start_relay: StartRelay, channel: str
) -> None:
    """Nothing pending is EMPTY, exit status 0; only held or parked events left is ONLY_HELD, exit status 3."""
    connection = connect()
    command = [sys.executable, "-m", "outbox_relay", "run", "--until-empty"]
    assert run_relay() is Ended.EMPTY
    write(connection, "1", 1, channel)
    assert start_relay(command=command, wait=False).wait() == 0
    write(connection, "1", 2, "unknown:1")
    write(connection, "1", 3, channel)
    assert start_relay(command=command, wait=False).wait() == 3
    assert run_relay() is Ended.ONLY_HELD
    assert ends(connection, "1") == [(1, "delivered"), (2, "parked"), (3, "parked")]


def test_a_relay_that_ends_when_empty_leaves_no_due_hold_behind(connect: Connect, database_url: str) -> None:
    """What is parked behind it could be sent now, also while another worker has just that in its hands."""
    connection = connect()
    write(connection, "1", 1, "plain:1")
    connection.execute("UPDATE outbox SET state = 'parked'")
    connection.execute(
        "INSERT INTO outbox_hold (aggregate_type, aggregate_id, head_id, due_at, tries, attempts, "
        "first_refused_at, refused_at) "
        "SELECT aggregate_type, aggregate_id, id, now(), 0, 0, now(), now() FROM outbox"
    )
    with closing(Store(database_url)) as store:
        assert store.left() == (True, True)
        connection.execute("UPDATE outbox_hold SET due_at = now() + interval '1 hour'")
        assert store.left() == (False, True)


def test_a_hold_of_nothing_ends(connect: Connect, run_relay: RunRelay) -> None:
    """Somebody has deleted what waited: the aggregate is free again."""
    connection = connect()
    connection.execute(
        "INSERT INTO outbox_hold (aggregate_type, aggregate_id, head_id, due_at, tries, attempts, "
        "first_refused_at, refused_at) VALUES ('order', '1', 1, now(), 1, 0, now(), now())"
    )
    assert run_relay() is Ended.EMPTY
    assert connection.execute("SELECT count(*) FROM outbox_hold").fetchall() == [(0,)]


def test_what_a_hold_keeps_of_its_head(connect: Connect, database_url: str) -> None:
    """Since when it is refused, while the head is the same one; all else is that of the last refusal."""
    connection = connect()
    write(connection, "1", 1, "plain:a")

    def refused(held: outcome.Held) -> tuple[Any, ...]:
        with closing(Store(database_url)) as store, store.batch():
            lanes = store.claim(after=0, lanes=1).lanes
            batch = store.read(lanes, events=10, per_lane=10, max_bytes=10_000)
            store.settle([], [outcome.Settlement(batch.events[0], held, ())], batch.holds)
        row: tuple[Any, ...] = connection.execute(
            "SELECT first_refused_at, refused_at, tries, attempts, alone, error FROM outbox_hold"
        ).fetchall()[0]
        return row

    first, at_first, *counts = refused(outcome.Held(1, 0, 0.0, "busy"))
    assert first <= at_first  # the clock is read for each
    assert counts == [1, 0, False, "busy"]
    since, at, *counts = refused(outcome.Held(2, 1, 0.0, "bad", alone=True))
    assert since == first
    assert at > at_first
    assert counts == [2, 1, True, "bad"]


@pytest.mark.parametrize("error", ["bad", None])
def test_what_the_hold_of_a_dead_event_says(connect: Connect, database_url: str, error: str | None) -> None:
    """That nobody tries it: it waits for a person, and counts nothing."""
    connection = connect()
    write(connection, "1", 1, "plain:a")
    with closing(Store(database_url)) as store, store.batch():
        batch = store.read(store.claim(after=0, lanes=1).lanes, events=10, per_lane=10, max_bytes=10_000)
        given_up = outcome.GivenUp("dead", error, wait=True)
        store.settle([], [outcome.Settlement(batch.events[0], given_up, ())], batch.holds)
    assert connection.execute("SELECT due_at = 'infinity', tries, attempts, error FROM outbox_hold").fetchall() == [
        (True, 0, 0, error or "its head is dead")
    ]
