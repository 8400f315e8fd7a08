"""An idle relay hears of a commit at once, misses none, and spares writers the NOTIFY while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import psycopg
import pytest

from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.options import Options
from outbox_relay.store import Claim, Store
from outbox_relay.wake_up import WakeUp
from tests.conftest import Connect, MakeRelay, StartRelay
from tests.support.subscriber import Subscriber
from tests.support.waiting import PATIENCE, wait_until
from tests.support.writing import write


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    with closing(Store(database_url)) as store:
        yield store


def asleep(store: Store) -> bool:
    """Whether it sleeps: now, or already."""
    assert store.wake_up is not None
    return store.wake_up.sleep(0.0) is not None


def notified(connection: psycopg.Connection[object]) -> int:
    """How many notifications have come since the last question."""
    connection.execute("SELECT 1")
    return len(list(connection.notifies(timeout=0.2)))


def test_a_commit_ends_the_sleep(store: Store, connect: Connect) -> None:
    assert store.wake_up is not None
    assert asleep(store)
    write(connect(), "1", 1, "plain:a")
    assert store.wake_up.sleep(PATIENCE)
    assert store.anything_to_do()


def test_nobody_falls_asleep_before_a_commit_that_sends_no_notification(store: Store, connect: Connect) -> None:
    """The writer came first and found nobody asleep. Until it has ended, the relay goes on looking."""
    writer = connect(autocommit=False)
    write(writer, "1", 1, "plain:a")
    assert not asleep(store)
    writer.commit()
    wait_until(lambda: asleep(store), "it may try again")
    assert store.anything_to_do()


def test_a_rollback_leaves_nothing_behind(store: Store, connect: Connect) -> None:
    writer = connect(autocommit=False)
    write(writer, "1", 1, "plain:a")
    writer.rollback()
    assert asleep(store)
    assert not store.anything_to_do()


def test_writers_notify_only_while_a_relay_sleeps(store: Store, connect: Connect) -> None:
    assert store.wake_up is not None
    listener, writer = connect(), connect()
    listener.execute("LISTEN outbox_relay")
    write(writer, "1", 1, "plain:a")
    assert notified(listener) == 0
    assert asleep(store)
    write(writer, "1", 2, "plain:a")
    assert notified(listener) == 1
    with store.batch():
        store.claim(after=0, lanes=1)
    write(writer, "1", 3, "plain:a")
    assert notified(listener) == 0


def test_one_relay_sleeps_and_the_next_one_follows_it(store: Store, database_url: str) -> None:
    """Whoever sleeps in the place of a relay that died is told as that one was."""
    with closing(Store(database_url)) as other:
        assert asleep(other)
        assert not asleep(store)
    wait_until(lambda: asleep(store), "the lock of the session that has ended is free")


def test_notifications_that_nobody_waits_for_are_not_kept(store: Store, connect: Connect, database_url: str) -> None:
    """Anybody may send any number. One who sleeps afterwards is not woken once for each of them."""
    assert store.wake_up is not None
    with closing(Store(database_url)) as other:
        assert asleep(other)
        assert not asleep(store)  # but it listens by now
        connect().execute("SELECT pg_notify('outbox_relay', repeat('x', 7000) || n) FROM generate_series(1, 100) AS n")
        assert not store.anything_to_do()
    wait_until(lambda: asleep(store), "the lock of the session that has ended is free")
    assert sum(store.wake_up.sleep(0.0) is True for _ in range(10)) <= 1


def test_a_lost_connection_ends_the_sleep(store: Store, connect: Connect) -> None:
    assert store.wake_up is not None
    assert asleep(store)
    connect().execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'outbox-relay'")
    with pytest.raises(DatabaseUnavailableError):
        wait_until(lambda: store.wake_up and store.wake_up.sleep(PATIENCE) is None, "the end is noticed")


def test_writers_can_be_told_never_to_notify(store: Store, connect: Connect) -> None:
    """A transaction that is to be prepared for two-phase commit may not notify."""
    listener, writer = connect(), connect(autocommit=False)
    listener.execute("LISTEN outbox_relay")
    assert asleep(store)
    writer.execute("SET LOCAL outbox_relay.wake_up = off")
    write(writer, "1", 1, "plain:a")
    writer.commit()
    assert notified(listener) == 0
    assert store.anything_to_do()


def test_without_the_setting_there_is_only_polling(database_url: str) -> None:
    with closing(Store(database_url, wake_up=False)) as store:
        assert store.wake_up is None


def test_nobody_falls_asleep_while_others_have_the_lanes(
    connect: Connect, make_relay: MakeRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is pending would wake it at once, again and again."""
    slept: list[float] = []
    claims: list[int] = []
    claim = Store.claim

    def counted(store: Store, after: int, lanes: int) -> Claim:
        claims.append(after)
        return claim(store, after, lanes)

    monkeypatch.setattr(WakeUp, "sleep", lambda _, seconds: slept.append(seconds))
    monkeypatch.setattr(Store, "claim", counted)
    write(connect(), "1", 1, "plain:a")
    other = connect(autocommit=False)
    other.execute("SELECT FROM outbox_lane FOR UPDATE")
    with make_relay(Options(workers=1)):
        wait_until(lambda: len(claims) > 5, "it looks for a lane now and then")
    assert not slept


def test_a_sleeping_relay_is_told(
    start_relay: StartRelay, connect: Connect, subscribe: Callable[..., Subscriber], channel: str
) -> None:
    """Each time it has fallen asleep again: the commit sends a NOTIFY, and what it announces is delivered."""
    subscriber, connection, listener = subscribe(channel), connect(), connect()
    listener.execute("LISTEN outbox_relay")
    start_relay()
    for version in (1, 2, 3):
        wait_until(lambda: sleeps(connection), "the relay sleeps")
        write(connection, "1", version, channel)
        assert notified(listener) == 1
        subscriber.wait_for(version)


def sleeps(connection: psycopg.Connection[tuple[int]]) -> bool:
    """Whether some relay of this database holds the lock of a sleeper."""
    query = (
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return connection.execute(query).fetchall() == [(1,)]
