"""Retention: what has ended long ago is deleted, what has not ended never is, and the cost stays flat."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any, LiteralString

import pytest
from psycopg import sql

from outbox_relay import store as store_room
from outbox_relay import upkeep
from outbox_relay.operator import Operator
from outbox_relay.options import Options
from outbox_relay.store import Store
from tests.conftest import Connect, MakeRelay, StartRelay
from tests.support.subscriber import Subscriber
from tests.support.waiting import in_background, wait_until
from tests.support.writing import Connection, backend_waits, states, write

ENDED = ("delivered", "superseded", "expired", "dead", "discarded")
SHORT_LIVED = ("delivered", "superseded")

Prune = Callable[[float, float], None]


@pytest.fixture(params=["relay", "operator"])
def prune(request: pytest.FixtureRequest, database_url: str) -> Prune:
    """Delete what has ended longer ago than (keep, keep_dead) seconds, as a relay or as an operator does."""

    def by_relay(keep: float, keep_dead: float) -> None:
        with closing(Store(database_url)) as store:
            last: int | None = 0
            while last is not None:
                last = store.prune(last, keep=keep, keep_dead=keep_dead).last_id

    def by_operator(keep: float, keep_dead: float) -> None:
        Operator(database_url).prune(keep=keep, keep_dead=keep_dead)

    return by_relay if request.param == "relay" else by_operator


def add(connection: Connection, state: str, hours: float = 0, *, aggregate: str = "1") -> int:
    """Insert an event that was written, and ended if it has, so many hours ago."""
    row = connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload, state, created_at, settled_at) "
        "SELECT 'order', %(aggregate)s, 1, '{plain:a}', '{}', %(state)s::outbox_state, t, "
        "       CASE WHEN %(state)s = ANY(%(ended)s) THEN t END "
        "FROM (SELECT now() - %(hours)s * interval '1 hour') AS x(t) RETURNING id",
        {"aggregate": aggregate, "state": state, "hours": hours, "ended": list(ENDED)},
    ).fetchone()
    assert row is not None
    id_: int = row[0]
    return id_


def left(connection: Connection) -> list[int]:
    return [row[0] for row in connection.execute("SELECT id FROM outbox ORDER BY id")]


def test_each_state_is_kept_for_its_own_time(connect: Connect, prune: Prune) -> None:
    """Here keep is 2 hours and keep_dead 4; the rows are 1, 3 and 5 hours old."""
    connection = connect()
    ids = {(state, hours): add(connection, state, hours) for hours in (5, 3, 1) for state in ENDED}
    prune(2 * 3600, 4 * 3600)
    kept = [id_ for (state, hours), id_ in ids.items() if hours < (2 if state in SHORT_LIVED else 4)]
    assert left(connection) == sorted(kept)


def test_what_has_not_ended_is_never_deleted(connect: Connect, prune: Prune) -> None:
    """However old, and where nothing at all is to be kept; also what was delivered once and is to be replayed."""
    connection = connect()
    waiting = [add(connection, state, 24 * 365) for state in ("pending", "parked")]
    replayed = add(connection, "delivered", 24 * 365)
    connection.execute("UPDATE outbox SET state = 'pending', replay = 1 WHERE id = %s", (replayed,))
    for state in ENDED:
        add(connection, state, 24 * 365)
    prune(0, 0)
    assert left(connection) == [*waiting, replayed]


@pytest.mark.parametrize(("verb", "state"), [("requeue", "dead"), ("replay", "delivered")])
@pytest.mark.parametrize("first", ["prune", "verb"])
def test_an_event_is_either_deleted_or_goes_out_again(
    connect: Connect, database_url: str, prune: Prune, verb: str, state: str, first: str
) -> None:
    """Pruning and a verb meet at one row that has long ended: both wait for it, in either order.

    Whoever comes second finds the row changed or gone: the event is never deleted after the verb said that it
    goes out again, and the verb never says so of one that was deleted.
    """
    connection, lock = connect(), connect(autocommit=False)
    event = add(connection, state, 24)
    lock.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", (event,))
    operator = Operator(database_url)

    def change() -> int:
        changed = operator.requeue([event], late=True) if verb == "requeue" else operator.replay([event])
        assert changed.events + len(changed.refused) == 1
        return changed.events

    def delete() -> None:
        prune(3600, 3600)

    starts: list[Callable[[], Any]] = [delete, change] if first == "prune" else [change, delete]
    with in_background(starts[0]) as one:
        wait_until(lambda: len(backend_waits(connection, "Lock")) == 1, "the first waits for the row")
        with in_background(starts[1]) as other:
            wait_until(lambda: len(backend_waits(connection, "Lock")) == 2, "the second waits, too")
            lock.rollback()
            results = one(), other()
    went_out = results[0 if first == "verb" else 1]
    assert states(connection) == ({"pending": 1} if went_out else {})
    assert went_out == (first == "verb")


@pytest.mark.parametrize("commits", ["verb", "nothing"])
@pytest.mark.parametrize(("verb", "state"), [("requeue", "dead"), ("replay", "delivered")])
def test_a_change_that_is_not_committed_yet_decides(
    connect: Connect, prune: Prune, verb: str, state: str, commits: str
) -> None:
    """Pruning waits for a row that somebody makes pending, and then tests its condition on what the row has become."""
    connection, changing = connect(), connect(autocommit=False)
    event = add(connection, state, 24)
    changing.execute("UPDATE outbox SET state = 'pending', settled_at = NULL WHERE id = %s", (event,))
    with in_background(lambda: prune(3600, 3600)) as pruned:
        wait_until(lambda: backend_waits(connection, "Lock"), "the pruning waits for the row")
        changing.commit() if commits == "verb" else changing.rollback()
        pruned()
    assert states(connection) == ({"pending": 1} if commits == "verb" else {})


def test_a_dead_event_that_an_order_waits_for_is_kept(connect: Connect, database_url: str, prune: Prune) -> None:
    """Without it nobody could say what is to become of the events behind it."""
    connection = connect()
    dead, gone = add(connection, "dead", 24), add(connection, "dead", 24, aggregate="2")
    parked = add(connection, "parked")
    connection.execute(
        "INSERT INTO outbox_hold (aggregate_type, aggregate_id, head_id, due_at, tries, attempts, "
        "                         first_refused_at, refused_at) "
        "SELECT aggregate_type, aggregate_id, id, 'infinity', 0, 0, now(), now() FROM outbox WHERE id = %s",
        (dead,),
    )
    for _ in range(12):
        add(connection, "delivered", 23)
    operator = Operator(database_url)
    assert operator.prune(keep=7 * 86_400, keep_dead=3600, dry_run=True) == 1
    prune(7 * 86_400, 3600)
    assert left(connection)[:2] == [dead, parked]
    assert gone not in left(connection)
    assert operator.discard([dead]).events == 1
    assert states(connection) == {"delivered": 12, "discarded": 1, "parked": 1}


# The relay's own part


@pytest.mark.parametrize("workers", [1, 2])
def test_a_relay_prunes_while_it_delivers(
    connect: Connect,
    make_relay: MakeRelay,
    relay_options: Options,
    subscribe: Callable[..., Subscriber],
    channel: str,
    workers: int,
) -> None:
    connection, subscriber = connect(), subscribe(channel)
    old = [add(connection, state, 24 * 8) for state in ENDED]
    for state in ENDED:
        add(connection, state, 24 * 6)
    with make_relay(replace(relay_options, workers=workers)):
        write(connection, "2", 1, channel)
        subscriber.wait_for(1)
        wait_until(lambda: not set(old[:2]) & set(left(connection)), "what was delivered 8 days ago is deleted")
    assert states(connection) == {"delivered": 2, "superseded": 1, "expired": 2, "dead": 2, "discarded": 2}


def test_where_nothing_is_kept_delivered_events_are_deleted_at_once(
    connect: Connect, start_relay: StartRelay, subscribe: Callable[..., Subscriber], channel: str
) -> None:
    """By the settle itself, not by a later pruning: no row is ever seen as delivered."""
    connection, subscriber = connect(), subscribe(channel)
    connection.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''never delivered''; END'"
    )
    connection.execute(
        "CREATE TRIGGER never AFTER UPDATE ON outbox FOR EACH ROW WHEN (NEW.state = 'delivered') "
        "EXECUTE FUNCTION refuse()"
    )
    relay = start_relay({"keep": 0})
    for version in (1, 2, 3):
        write(connection, "1", version, channel)
    assert [publication.version for publication in subscriber.wait_for(3)] == [1, 2, 3]
    wait_until(lambda: left(connection) == [], "the rows are gone")
    assert relay.terminate() == 0


# A shortened month


DAYS = 30
EVENTS_A_DAY = 1_500
KEPT_DAYS = 7


def buffers(store: Store, query: LiteralString, **parameters: Any) -> int:
    """Pages that one of the store's statements touches."""
    explain = sql.SQL("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) ") + sql.SQL(query).format(**store._names)
    row = store._connection.execute(explain, parameters).fetchone()
    assert row is not None
    plan = (row[0] if isinstance(row[0], list) else json.loads(row[0]))[0]["Plan"]
    hit: int = plan["Shared Hit Blocks"]
    read: int = plan["Shared Read Blocks"]
    return hit + read


def age(store: Store, id_: int) -> float:
    """Seconds from when an event and all before it were settled until this transaction began, which is what pruning
    goes by."""
    [(seconds,)] = store.execute(
        "SELECT extract(epoch FROM now() - max(settled_at))::float8 FROM {outbox} WHERE id <= %(id)s", id=id_
    ).fetchall()
    return float(seconds)


def test_size_and_cost_stay_flat_over_a_month(connect: Connect, database_url: str) -> None:
    """Every day new events are delivered, those of 8 days ago are pruned, and VACUUM runs once.

    The clock is not moved: `keep` is always as long as the last 7 days have taken. Once the first rows go, the
    table, its indexes, the pages of a claim and those of a pruning stay as large as they were.
    """
    connection = connect()
    connection.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")
    last_ids: list[int] = []
    sizes: list[int] = []
    claims: list[int] = []
    prunes: list[int] = []
    with closing(Store(database_url)) as store:
        for day in range(DAYS):
            connection.execute(
                "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) "
                "SELECT 'order', n %% 200, 1 + %s, '{plain:a}', json_build_object('a', repeat('x', 200)) "
                "FROM generate_series(1, %s) n",
                (day, EVENTS_A_DAY),
            )
            with store.batch():
                hint = store._hint.parameters
                claims.append(buffers(store, store_room._CLAIM, after=0, limit=256, holds=256, **hint))
                claim = store.claim(after=0, lanes=256)
                lanes = [lane.lane for lane in claim.lanes]
                reading = {"lanes": lanes, "quota": EVENTS_A_DAY, "max_bytes": 10_000_000, **hint}
                claims[-1] += buffers(store, store_room._READ_PENDING, **reading)
                batch = store.read(claim.lanes, events=EVENTS_A_DAY, per_lane=EVENTS_A_DAY, max_bytes=10_000_000)
                assert len(batch.events) == EVENTS_A_DAY
                store.settle([event.id for event in batch.events], [], {})
            last_ids.append(batch.events[-1].id)
            if day >= KEPT_DAYS:
                with store.batch():
                    keep = age(store, last_ids[day - KEPT_DAYS]) - 0.001  # its last event, too
                    first = {
                        "after": 0,
                        "limit": upkeep.PRUNE_CHUNK,
                        "keep": keep,
                        "keep_dead": keep,
                        "schema": "public",
                    }
                    prunes.append(buffers(store, upkeep._PRUNE, **first))
                assert states(connection) == {"delivered": EVENTS_A_DAY * KEPT_DAYS}
            connection.execute("VACUUM outbox")
            row = connection.execute("SELECT pg_total_relation_size('outbox')").fetchone()
            assert row is not None
            sizes.append(row[0])
    since = KEPT_DAYS + 1  # until then there is nothing to prune, and the table grows
    assert max(sizes[since:]) <= 1.05 * sizes[since], sizes
    assert max(claims[since:]) <= 1.05 * claims[since], claims
    assert max(prunes) <= 1.05 * prunes[0], prunes
    assert max(claims) <= 5 * EVENTS_A_DAY
