"""What travels together to the database, and what is left of it when something fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest
from psycopg import sql
from psycopg.pq import TransactionStatus

from outbox_relay.migrations import migrate
from outbox_relay.store import Store
from tests.conftest import Connect, sqlalchemy_engine
from tests.support.writing import states, write

ANYTHING = "%(after)s {outbox} 50% $1 '\" ; \\"


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    with closing(Store(database_url, wake_up=False)) as store:
        yield store


def status(store: Store) -> TransactionStatus:
    return store._connection.info.transaction_status


def deliver(store: Store) -> list[int]:
    """Settle what a claim brings as delivered, without publishing it."""
    with store.batch():
        lanes = store.claim(after=0, lanes=8).lanes
        ids = [event.id for event in store.read(lanes, events=10, per_lane=10, max_bytes=1000).events]
        if ids:
            store.settle(ids, [], {})
    return ids


def fail(store: Store) -> None:
    with store.batch():
        store.claim(after=0, lanes=1)
        raise ZeroDivisionError


def test_a_batch_that_asks_nothing_sends_nothing(store: Store) -> None:
    with store.batch():
        assert status(store) == TransactionStatus.IDLE
    with pytest.raises(ZeroDivisionError), store.batch():
        raise ZeroDivisionError
    assert store.execute("SELECT 1").fetchone() == (1,)
    assert status(store) == TransactionStatus.IDLE


def test_the_last_statement_commits(store: Store, connect: Connect) -> None:
    """Where all were delivered. Where more is to be written the batch commits at its end."""
    connection = connect()
    write(connection, "1", 1, "plain:a")
    write(connection, "2", 1, "plain:a")
    for last in (True, False):
        with store.batch():
            claim = store.claim(after=0, lanes=1)
            [event] = store.read(claim.lanes, events=1, per_lane=1, max_bytes=1000).events
            store.send_with_next("SAVEPOINT settle")
            store.execute_with_waiting(store._delivered, {"ids": f"{{{event.id}}}"}, last=last)
            assert (status(store) == TransactionStatus.IDLE) == last
            assert states(connection) == {"delivered": 1, "pending": 1}
    assert states(connection) == {"delivered": 2}


def test_what_is_prepared_outlives_a_rollback(store: Store, connect: Connect) -> None:
    """psycopg deallocates all prepared statements of a session when something is rolled back."""
    connection = connect()
    for number in range(3):
        write(connection, str(number), 1, "plain:a")
        with store.batch():
            assert store.claim(after=0, lanes=1).lanes
            store.rehearse([1])
        assert len(deliver(store)) == 1
        with pytest.raises(ZeroDivisionError):
            fail(store)
        assert status(store) == TransactionStatus.IDLE
    assert states(connection) == {"delivered": 3}


def test_a_schema_may_be_called_anything(empty_database_url: str) -> None:
    migrate(sqlalchemy_engine(empty_database_url), schema=ANYTHING)
    insert = sql.SQL(
        "INSERT INTO {} (aggregate_type, aggregate_id, version, channels, payload) VALUES ('a', '1', 1, '{{a}}', '1')"
    ).format(sql.Identifier(ANYTHING, "outbox"))
    with closing(Store(empty_database_url, schema=ANYTHING)) as store:
        with psycopg.connect(empty_database_url) as connection:
            connection.execute(insert)
        assert len(deliver(store)) == 1
        assert deliver(store) == []
