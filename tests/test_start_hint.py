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
from outbox_relay.database import DatabaseUnavailableError
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


def test_it_is_renewed_less_and_less_often(
    connect: Connect, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In seconds since the first time, where it ends with once in 32."""
    now, asked = 1_000.0, set[float]()
    writer = connect()
    monkeypatch.setattr(start_hint, "RENEW_EVERY", 32.0)
    monkeypatch.setattr(start_hint, "DUE_ANEW", math.inf)
    monkeypatch.setattr(start_hint, "boottime", lambda: now)
    with closing(Store(database_url)) as store:
        ask = store._hint._ask

        def noted(query: LiteralString, **parameters: Any) -> tuple[Any, ...]:
            asked.add(now - 1_000)
            return ask(query, **parameters)

        monkeypatch.setattr(store._hint, "_ask", noted)
        writer.execute("SELECT nextval('outbox_id_seq')")
        store.anything_to_do()
        while now < 1_100:
            writer.execute("SELECT nextval('outbox_id_seq')")  # there is always something new
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


@pytest.mark.parametrize(
    "undo",
    ["TRUNCATE outbox RESTART IDENTITY", "DELETE FROM outbox; ALTER SEQUENCE outbox_id_seq RESTART"],
    ids=["truncated", "deleted"],
)
def test_ids_that_come_again_are_found(store: Store, connect: Connect, undo: str) -> None:
    """Also where as many of them have come again, before anybody looks, as there were."""
    writer = connect()
    before = [write(writer, "a") for _ in range(3)]
    assert deliver(store) == before
    raise_to(store, before[-1] + 1)
    for number in range(2):
        writer.execute(undo)
        again = [write(writer, "a") for _ in range(3 + number)]
        assert again[:3] == before
        assert store.anything_to_do()
        assert deliver(store) == again
        look_twice(store)


def test_an_id_that_was_not_drawn_says_nothing_about_lower_ones(store: Store, connect: Connect) -> None:
    """A hand may write any. The lower ones are still to come."""
    writer = connect()
    first = write(writer, "a")
    writer.execute(
        "INSERT INTO outbox (id, aggregate_type, aggregate_id, version, channels, payload) OVERRIDING SYSTEM VALUE "
        "VALUES (1000, 'order', 'a', 2, '{plain:a}', '{}')"
    )
    assert deliver(store) == [first, 1000]
    with store.batch():
        assert store.claim(after=0, lanes=256).lanes == []
    second = write(writer, "a")
    assert deliver(store) == [second]


def start_in(store: Store, lane: int) -> int:
    """Where the next claim starts in a lane."""
    parameters = {"lane": lane, **store._hint.parameters}
    statement = f"SELECT {start_hint.start_in('%(lane)s::int')}"
    with store.batch():
        [(id_,)] = store.execute(statement, **parameters).fetchall()
    return int(id_)


def look_no_more(store: Store) -> None:
    """What is decided stays as it is now."""
    look_twice(store)
    store._hint._known.pause = math.inf


def deliver_of(store: Store, chosen: set[int]) -> None:
    """Claim all lanes, and settle those of the events as delivered."""
    with store.batch():
        batch = store.read(store.claim(after=0, lanes=256).lanes, events=10_000, per_lane=100, max_bytes=10_000_000)
        store.settle([event.id for event in batch.events if event.id in chosen], [], batch.holds)


def undone(store: Store) -> None:
    """Settle what there is, and fail."""
    batch = store.read(store.claim(after=0, lanes=256).lanes, events=10, per_lane=10, max_bytes=10_000)
    assert batch.events
    assert batch.holds
    store.settle([event.id for event in batch.events], [], batch.holds)
    store.execute("SELECT 1 / 0")


class TestOneLane:
    """Where nobody looks anew, a lane starts at the first event that was read and not delivered."""

    def test_it_starts_above_what_was_delivered(self, store: Store, connect: Connect) -> None:
        writer = connect()
        first, second, other = [write(writer, name) for name in "aab"]
        lane, last = lane_of(writer, first), write(writer, "a")
        look_no_more(store)
        deliver_of(store, {first, second})
        assert start_in(store, lane) == last
        assert start_in(store, lane_of(writer, other)) == other
        assert start(store) == other
        assert deliver(store) == [other, last]
        assert start_in(store, lane) == last + 1
        assert start_in(store, lane_of(writer, other)) == last + 1

    @pytest.mark.parametrize("bound", ["events", "bytes"])
    def test_it_passes_nothing_that_was_not_read(self, store: Store, connect: Connect, bound: str) -> None:
        """Because its lane, or all of them, have more."""
        writer = connect()
        first, second, third = [write(writer, name) for name in "aba"]
        look_no_more(store)
        events, max_bytes = (1, 1_000) if bound == "events" else (10, 1)
        with store.batch():
            lanes = store.claim(after=0, lanes=256).lanes
            batch = store.read(lanes, events=events, per_lane=events, max_bytes=max_bytes)
            ids = [event.id for event in batch.events]
            store.settle(ids, [], {})
        assert ids == ([first, second] if bound == "events" else [first])
        assert start_in(store, lane_of(writer, third)) == first + 1
        assert start_in(store, lane_of(writer, second)) == (second + 1 if bound == "events" else first + 1)
        assert deliver(store) == [second, third][len(ids) - 1 :]

    def test_it_stays_at_what_was_read_and_not_delivered(self, store: Store, connect: Connect) -> None:
        """Nor does it pass an event because a later one was."""
        writer = connect()
        first, unsent, last = [write(writer, "a") for _ in range(3)]
        look_no_more(store)
        deliver_of(store, {first, last})
        assert start_in(store, lane_of(writer, first)) == unsent
        assert deliver(store) == [unsent]

    def test_nor_does_it_pass_one_that_came_without_its_payload(self, store: Store, connect: Connect) -> None:
        """It waits behind a hold, and was parked. Somebody may make it pending again in the same moment."""
        writer = connect()
        held, last = write(writer, "a"), write(writer, "a")
        hold(writer, "a", "-1 hour")
        look_no_more(store)
        deliver_of(store, {held, last})
        assert start_in(store, lane_of(writer, held)) == held

    def test_it_stays_where_it_is_without_a_commit(self, store: Store, connect: Connect) -> None:
        writer = connect()
        first = write(writer, "a")
        hold(writer, "b", "1 hour")  # whose end is a statement of its own: the commit is another one
        look_no_more(store)
        with pytest.raises(DatabaseUnavailableError), store.batch():
            undone(store)
        assert start_in(store, lane_of(writer, first)) <= first
        assert deliver(store) == [first]

    def test_it_waits_for_a_lower_id_that_may_still_come(self, store: Store, connect: Connect) -> None:
        """Of the same lane, and there before the higher one is settled, but not when that was read."""
        late, writer = connect(autocommit=False), connect()
        write(writer, "a")
        look_twice(store)
        deliver(store)
        low, high = write(late, "a"), write(writer, "a")
        look_no_more(store)
        with store.batch():
            batch = store.read(store.claim(after=0, lanes=256).lanes, events=10, per_lane=10, max_bytes=10_000)
            late.commit()
            store.settle([event.id for event in batch.events], [], {})
        assert [event.id for event in batch.events] == [high]
        assert 0 < start_in(store, lane_of(writer, high)) <= low
        assert deliver(store) == [low]

    def test_what_is_put_back_voids_it(self, store: Store, connect: Connect) -> None:
        writer = connect()
        first, last = write(writer, "a"), write(writer, "a")
        look_no_more(store)
        assert deliver(store) == [first, last]
        lane = lane_of(writer, first)
        assert start_in(store, lane) == last + 1
        writer.execute("UPDATE outbox SET state = 'pending', settled_at = NULL WHERE id = %s", (first,))
        assert start_in(store, lane) == 0
        assert deliver(store) == [first]

    def test_one_that_moves_here_from_another_lane_voids_it(self, store: Store, connect: Connect) -> None:
        writer = connect()
        moved, last = write(writer, "b"), write(writer, "a")
        look_no_more(store)
        deliver_of(store, {last})
        lane = lane_of(writer, last)
        assert start_in(store, lane) == last + 1
        writer.execute("UPDATE outbox SET aggregate_id = 'a' WHERE id = %s", (moved,))
        assert start_in(store, lane) == 0
        assert deliver(store) == [moved]

    @pytest.mark.parametrize("lanes", [256, 1])
    def test_it_is_looked_anew_after_many_events(
        self, store: Store, connect: Connect, monkeypatch: pytest.MonkeyPatch, lanes: int
    ) -> None:
        """After fewer where a claim got fewer lanes than it wanted; and again after as many more."""
        monkeypatch.setattr(start_hint, "SOME", 3 if lanes > 1 else 100)
        monkeypatch.setattr(start_hint, "MANY", 3 if lanes == 1 else 100)
        writer = connect()
        write(writer, "a")
        look_no_more(store)
        monkeypatch.setattr(start_hint, "RENEW_EVERY", math.inf)
        asked: list[str] = []
        monkeypatch.setattr(store._hint, "_look", lambda *_: asked.append("anew"))
        for looks in [0, 0, 0, 1, 1, 1, 2]:
            with store.batch():
                claim = store.claim(after=0, lanes=lanes)
                assert len(asked) == looks
                [event] = store.read(claim.lanes, events=1, per_lane=1, max_bytes=1_000).events
                store.settle([event.id], [], {})
            write(writer, "a")


@pytest.fixture
def stores(database_url: str) -> Iterator[list[Store]]:
    """Of one relay, whose sessions both have joined."""
    share = start_hint.SharedHint()
    with closing(Store(database_url, share=share)) as one, closing(Store(database_url, share=share)) as other:
        yield [one, other]


class TestShared:
    """The sessions of one relay know what each of them has found out, since the last of them came."""

    def test_one_knows_what_the_other_has_delivered(self, stores: list[Store], connect: Connect) -> None:
        one, other = stores
        writer = connect()
        written = [write(writer, name) for name in "aab"]
        for store in [one, other]:
            look_twice(store)
        look_no_more(one)
        assert deliver(one) == written
        other._hint.renew()
        assert start_in(other, lane_of(writer, written[0])) == written[-1] + 1
        later = write(writer, "a")
        assert deliver(other) == [later]

    def test_a_session_that_comes_begins_anew_for_all(
        self, stores: list[Store], connect: Connect, database_url: str
    ) -> None:
        """What a session notes that has not heard of it is nobody's."""
        one, other = stores
        writer = connect()
        written = [write(writer, name) for name in "aab"]
        look_no_more(one)
        with one.batch():
            batch = one.read(one.claim(after=0, lanes=256).lanes, events=10, per_lane=10, max_bytes=10_000)
            look_no_more(other)  # comes only now
            one.settle([event.id for event in batch.events], [], {})
        assert start_in(one, lane_of(writer, written[0])) == written[-1] + 1
        for store in stores:
            store._hint.renew()
            assert start_in(store, lane_of(writer, written[0])) <= written[0]

    def test_sessions_with_different_servers_share_nothing(self, stores: list[Store], connect: Connect) -> None:
        one, other = stores
        writer = connect()
        written = write(writer, "a")
        for store in stores:
            look_twice(store)
        one._hint._shared.join("another server")
        assert deliver(one) == [written]
        look_twice(one)
        assert start(other) == start(one) == written + 1
        assert one._hint._shared._latest.starts == (1, "{}")

    @pytest.mark.parametrize("looks", [False, True], ids=["reads", "looks"])
    def test_what_another_session_learns_meanwhile_says_nothing_about_writers_asked_for_before(
        self, stores: list[Store], connect: Connect, monkeypatch: pytest.MonkeyPatch, looks: bool
    ) -> None:
        """That ids are drawn, lower ones of them by who came later; and who is to be waited for."""
        one, other = stores
        writer, early, late = connect(), connect(autocommit=False), connect(autocommit=False)
        write(writer, "a")
        for store in [*stores, *stores]:
            store.anything_to_do()
        deliver(other)
        ask, low = one._hint._ask, 0

        def asked(query: LiteralString, **parameters: Any) -> tuple[Any, ...]:
            nonlocal low
            row = ask(query, **parameters)
            if query == start_hint._WRITERS and not low:
                low = write(late, "late")
                write(writer, "b")
                deliver(other)
                if looks:
                    early.rollback()
                    other.anything_to_do()
            return row

        write(writer, "c")
        if looks:
            write(early, "early")
            look_twice(one)
        monkeypatch.setattr(one._hint, "_ask", asked)
        deliver(one)
        look_twice(one)
        assert 0 < start(one) <= low
        late.commit()
        assert deliver(one) == [low]

    def test_what_a_session_has_read_before_it_came_is_its_own_until_it_is_known_to_live(
        self, stores: list[Store], connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The server may have crashed since, and forgotten that those ids were drawn."""
        one, other = stores
        writer = connect()
        low = write(writer, "a")
        look_twice(other)
        one._hint._known.pause = math.inf
        high = write(writer, "a")
        deliver(one)
        assert one._hint._known.drawn == high
        one._hint._known.pause = 0.0

        def asked(query: LiteralString, **parameters: Any) -> tuple[Any, ...]:
            if query == start_hint._SERVER:
                return ask(query, **parameters)
            raise psycopg.OperationalError

        ask = one._hint._ask
        monkeypatch.setattr(one._hint, "_ask", asked)
        with pytest.raises(psycopg.OperationalError):
            one._hint.renew()
        monkeypatch.setattr(other._hint, "_look", lambda _known, _drawn: None)
        other._hint.renew()
        assert other._hint._known is one._hint._known
        assert other._hint._known.drawn <= low


def hold(connection: psycopg.Connection[tuple[int]], name: str, ago: str) -> None:
    connection.execute(
        "INSERT INTO outbox_hold "
        "(aggregate_type, aggregate_id, due_at, head_id, tries, attempts, first_refused_at, refused_at) "
        "VALUES ('order', %s, clock_timestamp() - %s::interval, 1, 1, 0, now(), now()) "
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
            [(_, has_due_hold)] = store.claim(after=0, lanes=256).lanes
            assert has_due_hold

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
