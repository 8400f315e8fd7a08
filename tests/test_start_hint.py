"""A claim starts where the pending events do, and never above one that may still come."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from typing import Any, LiteralString
from uuid import uuid4

import psycopg
import pytest

from outbox_relay import start_hint
from outbox_relay.event import boottime
from outbox_relay.operator import Operator
from outbox_relay.store import Store
from tests.conftest import Connect
from tests.support.waiting import in_background, wait_until
from tests.support.writing import backend_waits


@pytest.fixture(autouse=True)
def renewed_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_hint, "RENEW_EVERY", 0.0)


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    with closing(Store(database_url)) as store:
        yield store


def write(connection: psycopg.Connection[tuple[int]], aggregate_id: str) -> int:
    """Insert an event and return its id."""
    row = connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) "
        "VALUES ('order', %s, 1, '{plain:a}', '{}') RETURNING id",
        (aggregate_id,),
    ).fetchone()
    assert row is not None
    return row[0]


def deliver(store: Store) -> list[int]:
    """Claim all lanes, settle what is there as delivered, and return its ids."""
    with store.batch():
        lanes = store.claim(after=0, lanes=256).lanes
        batch = store.read(lanes, events=10_000, per_lane=100, max_bytes=10_000_000)
        ids = [event.id for event in batch.events]
        store.settle(ids, [], batch.holds)
    return ids


def start(store: Store) -> int:
    """Where the next claim starts."""
    return int(store._hint.parameters["start"])


def look_twice(store: Store) -> None:
    """Enough where nobody writes: once to see who does, once to see that they have ended."""
    store.anything_to_do()
    store.anything_to_do()


def raise_to(store: Store, id_: int) -> None:
    look_twice(store)
    assert start(store) == id_
    with store.batch():
        assert store.execute(f"SELECT {start_hint.START}", **store._hint.parameters).fetchall() == [(id_,)]


def test_it_rises_with_what_was_read(store: Store, connect: Connect) -> None:
    writer = connect()
    written = [write(writer, str(n)) for n in range(5)]
    assert deliver(store) == written
    raise_to(store, written[-1] + 1)
    assert not store.anything_to_do()
    later = write(writer, "1")
    assert store.anything_to_do()
    assert deliver(store) == [later]


def test_it_rises_while_somebody_always_writes(store: Store, connect: Connect) -> None:
    """Those are waited for who wrote at some moment, not those who came later."""
    writer, other = connect(autocommit=False), connect(autocommit=False)
    written = write(writer, "1")
    for _ in range(3):
        write(other, "2")
        writer.commit()
        assert deliver(store) == [written]
        store.anything_to_do()
        read, written = written, write(writer, "1")
        other.rollback()
        store.anything_to_do()
        assert start(store) > read


@pytest.mark.parametrize("prepared", [False, True], ids=["open", "prepared"])
def test_it_waits_for_a_lower_id_that_may_still_come(store: Store, connect: Connect, prepared: bool) -> None:
    """Its writer drew the id and has not committed, or has prepared to: no session has that transaction then."""
    late, writer, name = connect(autocommit=False), connect(), uuid4().hex
    low = write(late, "late")
    high = write(writer, "1")
    assert deliver(store) == [high]
    assert not store.anything_to_do()
    if prepared:
        late.execute(f"PREPARE TRANSACTION '{name}'")
    for _ in range(3):
        assert not store.anything_to_do()
        assert start(store) <= low
    if prepared:
        late.commit()
        late.autocommit = True
        late.execute(f"COMMIT PREPARED '{name}'")
    else:
        late.commit()
    assert store.anything_to_do()
    assert start(store) <= low
    assert deliver(store) == [low]
    raise_to(store, high + 1)


def test_it_waits_for_a_writer_that_has_only_drawn_its_id(store: Store, connect: Connect) -> None:
    """Stopped between the id and the row, it has no transaction id yet: nothing but its lock shows it."""
    late, gate, writer = connect(autocommit=False), connect(autocommit=False), connect()
    gate.execute("SELECT pg_advisory_xact_lock(42)")
    writer.execute(
        "CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$ "
        "BEGIN PERFORM pg_advisory_xact_lock_shared(42); RETURN NEW; END $$"
    )
    writer.execute(
        "CREATE TRIGGER a_gate BEFORE INSERT ON outbox FOR EACH ROW WHEN (NEW.aggregate_id = 'late') "
        "EXECUTE FUNCTION wait_at_gate()"
    )
    with in_background(lambda: write(late, "late")) as inserted:
        try:
            wait_until(lambda: backend_waits(writer, "Lock"), "the late writer waits in its trigger")
            high = write(writer, "1")
            assert deliver(store) == [high]
            for _ in range(3):
                assert not store.anything_to_do()
                assert start(store) < high
        finally:
            gate.rollback()
        low = inserted()
    assert low < high
    late.commit()
    assert deliver(store) == [low]


def test_it_stops_below_what_is_pending_elsewhere(store: Store, connect: Connect, database_url: str) -> None:
    """What another relay has claimed and not settled may be pending again: the lowest of it, of all lanes."""
    writer = connect()
    low, *between = [write(writer, name) for name in "aac"]
    high = write(writer, "b")
    with closing(Store(database_url)) as other, other.batch():
        for id_ in (low, between[-1]):
            assert len(other.claim(after=lane_of(writer, id_) - 1, lanes=1).lanes) == 1
        assert deliver(store) == [high]
        store.anything_to_do()
        store.anything_to_do()
        assert start(store) <= low
    assert deliver(store) == [low, *between]


def test_it_waits_for_nobody_else(store: Store, connect: Connect) -> None:
    """Neither for who reads the outbox, nor for who writes other tables; both stay open."""
    writer, reader, elsewhere = connect(), connect(autocommit=False), connect(autocommit=False)
    writer.execute("CREATE TABLE elsewhere (n int)")
    elsewhere.execute("INSERT INTO elsewhere VALUES (1)")
    written = write(writer, "1")
    reader.execute("SELECT count(*) FROM outbox")
    assert deliver(store) == [written]
    raise_to(store, written + 1)


def test_who_has_read_nothing_knows_nothing(store: Store, connect: Connect) -> None:
    """The first id is not drawn yet."""
    for _ in range(3):
        assert not store.anything_to_do()
    first = write(connect(), "1")
    assert start(store) <= first
    assert deliver(store) == [first]


def test_it_is_renewed_less_and_less_often(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds since the first time, where it ends with once in 32."""
    now, asked = 1_000.0, set[float]()
    monkeypatch.setattr(start_hint, "RENEW_EVERY", 32.0)
    monkeypatch.setattr(start_hint, "DUE_ANEW", math.inf)
    monkeypatch.setattr(start_hint, "boottime", lambda: now)
    with closing(Store(database_url)) as store:
        ask = store._hint._ask

        def noted(query: LiteralString, **parameters: Any) -> tuple[Any, ...]:
            asked.add(now - 1_000)
            return ask(query, **parameters)

        monkeypatch.setattr(store._hint, "_ask", noted)
        while now < 1_100:
            store._hint.drawn(start(store))  # there is always something new
            store.anything_to_do()
            now += 1
    assert sorted(asked) == [0, 2, 6, 14, 30, 62, 94]


def test_an_event_that_is_put_back_is_found(store: Store, connect: Connect, database_url: str) -> None:
    """By whomever: the operator's verb, or an UPDATE by hand, that may commit while the hint rises."""
    writer, hand = connect(), connect(autocommit=False)
    first, second = write(writer, "1"), write(writer, "2")
    assert deliver(store) == [first, second]
    raise_to(store, second + 1)
    Operator(database_url).replay([first])
    assert store.anything_to_do()
    assert deliver(store) == [first]
    hand.execute("UPDATE outbox SET state = 'pending', settled_at = NULL WHERE id = %s", (second,))
    for n in range(3):
        third = write(writer, str(n))
        assert deliver(store) == [third]
    hand.commit()
    assert store.anything_to_do()
    assert deliver(store) == [second]
    store.anything_to_do()
    raise_to(store, third + 1)


def test_a_rollback_of_putting_back_costs_nothing_but_time(store: Store, connect: Connect) -> None:
    writer, hand = connect(), connect(autocommit=False)
    first = write(writer, "1")
    assert deliver(store) == [first]
    raise_to(store, first + 1)
    hand.execute("UPDATE outbox SET state = 'pending', settled_at = NULL WHERE id = %s", (first,))
    hand.rollback()
    assert not store.anything_to_do()
    second = write(writer, "2")
    assert deliver(store) == [second]
    raise_to(store, second + 1)


def lane_of(connection: psycopg.Connection[tuple[int]], id_: int) -> int:
    row = connection.execute(
        "SELECT (hashtextextended(aggregate_type || '/' || aggregate_id, 0) & 255)::int FROM outbox WHERE id = %s",
        (id_,),
    ).fetchone()
    assert row is not None
    return row[0]


def test_it_rises_over_what_another_relay_has_delivered(store: Store, connect: Connect, database_url: str) -> None:
    """A relay that is idle looks again and again, and walks over nothing."""
    writer = connect()
    with closing(Store(database_url)) as other:
        delivered = [write(writer, str(n)) for n in range(5)]
        assert deliver(other) == delivered
    raise_to(store, delivered[-1] + 1)


def test_there_is_none_where_nothing_was_written_yet(store: Store, connect: Connect) -> None:
    """A sequence that was never asked already says 1."""
    look_twice(store)
    assert start(store) == 1
    first = write(connect(), "1")
    assert deliver(store) == [first]


def test_there_is_none_while_sessions_reserve_ids(store: Store, connect: Connect) -> None:
    """Such a session holds no lock, and its lower ids come later than the higher ones of others."""
    connect().execute("ALTER SEQUENCE outbox_id_seq CACHE 2")
    reserving, writer = connect(), connect()
    write(reserving, "1")
    high = write(writer, "2")
    assert deliver(store)[-1] == high
    look_twice(store)
    assert start(store) == 1
    low = write(reserving, "3")
    assert low < high
    assert deliver(store) == [low]


def test_it_is_void_once_sessions_reserve_ids(store: Store, connect: Connect) -> None:
    writer = connect()
    written = write(writer, "1")
    assert deliver(store) == [written]
    raise_to(store, written + 1)
    writer.execute("ALTER SEQUENCE outbox_id_seq CACHE 10")
    write(connect(), "2")
    look_twice(store)
    assert start(store) == 1


def hold(connection: psycopg.Connection[tuple[int]], name: str, ago: str) -> None:
    connection.execute(
        "INSERT INTO outbox_hold "
        "(aggregate_type, aggregate_id, lane, due_at, head_id, tries, attempts, first_refused_at, refused_at) "
        "VALUES ('order', %s, 7, clock_timestamp() - %s::interval, 1, 1, 0, now(), now()) "
        "ON CONFLICT (aggregate_type, aggregate_id) DO UPDATE SET due_at = excluded.due_at",
        (name, ago),
    )


class TestDueHolds:
    """Those that were due before the longest due one are not looked for again and again."""

    def test_every_one_is_found_while_a_longer_due_one_is_left(self, store: Store, connect: Connect) -> None:
        """A hold that nobody has tried yet, of a lane that others have, say, stays where the search begins."""
        writer = connect()
        hold(writer, "longest", "1 hour")
        assert store.anything_to_do()
        hold(writer, "longest", "-1 hour")
        hold(writer, "other", "59 minutes")
        assert store.anything_to_do()
        with store.batch():
            assert store.claim(after=0, lanes=256).lanes == [(7, True)]

    def test_one_that_is_due_from_now_on_is_found_at_once(self, store: Store, connect: Connect) -> None:
        """Also where its writer took a while to commit."""
        writer = connect(autocommit=False)
        hold(writer, "1", "0")
        assert not store.anything_to_do()
        writer.commit()
        assert store.anything_to_do()

    def test_one_that_was_due_long_before_is_found_later(
        self, store: Store, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where a clock was put back, or a hand has written it: it is looked for anew."""
        now = boottime()
        monkeypatch.setattr(start_hint, "boottime", lambda: now)
        assert not store.anything_to_do()
        hold(connect(), "1", "1 hour")
        assert not store.anything_to_do()
        now += start_hint.DUE_ANEW
        assert not store.anything_to_do()
        now += 0.1
        assert store.anything_to_do()

    def test_a_session_that_a_pooler_may_change_looks_for_all(
        self, database_url: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Store, "_prepare", lambda _self: False)
        with closing(Store(database_url)) as store:
            with store.batch():
                assert store.claim(after=0, lanes=256).lanes == []
            hold(connect(), "1", "1 hour")
            assert store.anything_to_do()
