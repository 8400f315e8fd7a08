"""Hazards of order and visibility, by their numbers in the project's list of hazards."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from contextlib import closing

import psycopg
import pytest

from outbox_relay.event import Event
from outbox_relay.options import Options
from outbox_relay.runner import Ended
from outbox_relay.store import Store
from tests.conftest import Connect, RunRelay
from tests.support.oracle import Fact, violations
from tests.support.subscriber import Subscriber
from tests.support.waiting import in_background, wait_until
from tests.support.writing import Connection, backend_waits, fact, neighbours, states, write

Subscribe = Callable[..., Subscriber]


def facts(subscriber: Subscriber, count: int) -> list[Fact]:
    """The first `count` publications, of a stream without a hole."""
    received = subscriber.wait_for(count)
    assert subscriber.lost is None
    return [fact(publication) for publication in received]


def read(store: Store) -> list[Event]:
    """Claim every lane that can be had and read it, within the batch that is open."""
    lanes = store.claim(after=0, lanes=256).lanes
    return store.read(lanes, events=1_000, per_lane=1_000, max_bytes=1_000_000).events


@pytest.mark.parametrize("commits", list(itertools.permutations(range(3))), ids=str)
def test_hazard_1_commit_order_differs_from_id_order(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str, commits: tuple[int, ...]
) -> None:
    """Three transactions write in turn, two events of an order of their own each, and commit in every order.

    The relay drains after each commit, so a position in the ids would leave the late ones behind.
    """
    subscriber = subscribe(channel)
    writers = [connect(autocommit=False) for _ in range(3)]
    names = neighbours(connect(), 3)
    written: list[list[Fact]] = [[], [], []]
    for number, version in ((0, 1), (1, 1), (2, 1), (2, 2), (1, 2), (0, 2)):
        written[number].append(write(writers[number], names[number], version, channel))
    committed: list[Fact] = []
    for number in commits:
        writers[number].commit()
        committed += written[number]
        assert run_relay() is Ended.EMPTY
        assert violations(committed, facts(subscriber, len(committed))) == []


def test_hazard_1_concurrent_changes_of_one_object_arrive_in_version_order(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """The writer's contract: the version is taken under the object's row lock, the event is inserted after it.

    The second writer waits for the first one's commit, so its id is the higher one although it began earlier.
    """
    admin = connect()
    admin.execute("CREATE TABLE orders (id text PRIMARY KEY, version bigint)")
    admin.execute("INSERT INTO orders VALUES ('1', 0)")
    early, late = connect(autocommit=False), connect(autocommit=False)
    early.execute("SELECT 1")
    first = write(late, "1", take_version(late), channel)

    def change() -> Fact:
        event = write(early, "1", take_version(early), channel)
        early.commit()
        return event

    with in_background(change) as second:
        wait_until(lambda: backend_waits(admin, "Lock"), "the second writer waits for the row")
        late.commit()
        committed = [first, second()]
    assert run_relay() is Ended.EMPTY
    assert facts(subscribe(channel), 2) == committed
    assert [event.version for event in committed] == [1, 2]


def take_version(connection: Connection) -> int:
    row = connection.execute("UPDATE orders SET version = version + 1 RETURNING version").fetchone()
    assert row is not None
    version: int = row[0]
    return version


def test_hazard_2_a_locked_head_is_not_skipped_for_its_successor(
    connect: Connect, database_url: str, channel: str
) -> None:
    """While one relay holds an order's first event, no other relay gets at the second one; SKIP LOCKED on the
    events themselves would hand it out."""
    [name, other] = neighbours(connect(), 2)
    head = write(connect(), name, 1, channel)
    with closing(Store(database_url)) as first, closing(Store(database_url)) as second:
        with first.batch():
            assert [event.version for event in read(first)] == [1]
            write(connect(), name, 2, channel)
            write(connect(), other, 1, channel)
            with second.batch():
                assert second.claim(after=0, lanes=256).lanes == []
        with second.batch():
            assert [event.aggregate for event in read(second)] == [head.aggregate, head.aggregate, ("order", other)]


def test_hazard_2_events_locked_by_somebody_else_are_not_overtaken(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """An operator's SELECT … FOR UPDATE on the head of an order: the relay waits for it or sends it, in order."""
    subscriber = subscribe(channel)
    connection = connect()
    committed = [write(connection, "1", version, channel) for version in (1, 2, 3)]
    operator = connect(autocommit=False)
    operator.execute("SELECT FROM outbox WHERE version = 1 FOR UPDATE")
    with in_background(run_relay) as ended:
        wait_until(lambda: backend_waits(connection, "Lock"), "the relay waits for the operator's lock")
        operator.rollback()
        assert ended() is Ended.EMPTY
    assert violations(committed, facts(subscriber, 3)) == []


def test_hazard_2_the_lock_is_taken_before_the_rows_are_read(connect: Connect, database_url: str, channel: str) -> None:
    """What was committed between the claim and the read is seen by the read: two statements, two snapshots.

    One statement that locks and reads sees the events as they were before it waited, so it sends them again.
    """
    write(connect(), "1", 1, channel)
    with closing(Store(database_url)) as store, store.batch():
        lanes = store.claim(after=0, lanes=256).lanes
        connect().execute("UPDATE outbox SET state = 'delivered'")
        write(connect(), "1", 2, channel)
        batch = store.read(lanes, events=100, per_lane=100, max_bytes=1_000_000)
        assert [event.version for event in batch.events] == [2]


def test_hazard_3_a_claim_collides_neither_with_writers_nor_with_foreign_keys(
    connect: Connect, database_url: str, channel: str
) -> None:
    """FOR NO KEY UPDATE: a KEY SHARE lock, such as a foreign key to a lane takes, does not hide the lane from
    the claim, and is granted while the lane is claimed. A writer into a claimed lane does not wait either."""
    write(connect(), "1", 1, channel)
    referrer = connect(autocommit=False)
    referrer.execute("SELECT FROM outbox_lane FOR KEY SHARE")
    with closing(Store(database_url)) as store, store.batch():
        assert [event.version for event in read(store)] == [1]
        writer = connect(options="-c lock_timeout=100ms")
        write(writer, "1", 2, channel)
        writer.execute("SELECT FROM outbox_lane FOR KEY SHARE")


def test_hazard_5_a_long_transaction_is_not_passed_by(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """An application transaction stays open while hundreds of newer events of its lane are delivered; its
    event, with the lowest id of all, arrives once it commits, beside a newer one of another order."""
    subscriber = subscribe(channel)
    connection = connect()
    slow, busy = neighbours(connection, 2)
    writer = connect(autocommit=False)
    late = [write(writer, slow, 1, channel)]
    committed = [write(connection, busy, version, channel) for version in range(1, 301)]
    assert run_relay(Options(workers=2)) is Ended.EMPTY
    assert violations(committed, facts(subscriber, 300)) == []
    late.append(write(writer, slow, 2, channel))
    writer.commit()
    late.append(write(connection, busy, 301, channel))
    assert run_relay() is Ended.EMPTY
    assert violations(committed + late, facts(subscriber, 303)) == []


def test_hazard_6_nothing_of_a_rollback_arrives(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """A third of the transactions roll back, a third roll back to a savepoint: only what was committed comes."""
    subscriber = subscribe(channel)
    writer = connect(autocommit=False)
    committed: list[Fact] = []
    versions: dict[str, int] = {}
    chance = random.Random(6)
    for _ in range(150):
        name = str(chance.randrange(10))
        version = versions.get(name, 0) + 1
        match chance.randrange(3):
            case 0:
                write(writer, name, version, channel, '"rolled back"')
                writer.rollback()
                continue
            case 1:
                writer.execute("SAVEPOINT s")
                write(writer, name, version, channel, '"rolled back"')
                writer.execute("ROLLBACK TO s")
        committed.append(write(writer, name, version, channel))
        writer.commit()
        versions[name] = version
    assert run_relay() is Ended.EMPTY
    assert violations(committed, facts(subscriber, len(committed))) == []
    assert {publication.data for publication in subscriber.received} == {b"{}"}


def test_hazard_9_gaps_and_the_end_of_bigint(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """Missing ids are not waited for, and ids stay what they are up to 2**63 - 1. After that the writer hears it."""
    subscriber = subscribe(channel)
    connection = connect()
    committed = [write(connection, "1", 1, channel)]
    for restart in (1_000_000, 2**31 - 1, 2**53, 2**63 - 3):
        connection.execute(f"ALTER TABLE outbox ALTER id RESTART WITH {restart}")
        committed += [write(connection, "1", committed[-1].version + step, channel) for step in (1, 2)]
        connection.execute("SELECT nextval(pg_get_serial_sequence('outbox', 'id'))")
        assert run_relay() is Ended.EMPTY
    with pytest.raises(psycopg.errors.SequenceGeneratorLimitExceeded):
        write(connection, "1", 100, channel)
    assert facts(subscriber, 9) == committed
    assert states(connection) == {"delivered": 9}
