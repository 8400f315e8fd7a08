"""Hazard 20: a real pgbouncer in transaction mode between everybody and the database.

It has three server sessions for all clients of a test, and none is anybody's for longer than a transaction.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import psycopg
import pytest

from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.operator import Operator
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from outbox_relay.store import Store
from tests.conftest import Connect, MakeRelay, StartRelay
from tests.support.gateway import Gateway, refuse
from tests.support.oracle import Fact, violations
from tests.support.pgbouncer import PgBouncer
from tests.support.subscriber import Subscriber
from tests.support.waiting import wait_until
from tests.support.writing import Connection, fact, states, write

Subscribe = Callable[..., Subscriber]

SESSIONS = 3


@pytest.fixture
def pgbouncer(server_url: str) -> Iterator[PgBouncer]:
    with PgBouncer(server_url, SESSIONS) as running:
        yield running


@pytest.fixture
def pooled_url(pgbouncer: PgBouncer, database_url: str) -> str:
    return pgbouncer.url(database_url)


def server_sessions(connection: Connection) -> list[int]:
    """The process ids of the sessions that pgbouncer has: all but our own."""
    rows = connection.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend' "
        "AND pid <> pg_backend_pid()"
    )
    return [pid for (pid,) in rows]


def test_hazard_20_a_pooler_is_noticed(database_url: str, pooled_url: str) -> None:
    """What would stay behind in somebody else's session is done only where there is no pooler."""
    with closing(Store(database_url)) as store:
        assert store.direct
        assert store.wake_up
        assert store._connection.prepare_threshold == 0
    with closing(Store(pooled_url)) as store:
        assert not store.direct
        assert store.wake_up is None
        assert store._connection.prepare_threshold is None


def test_hazard_20_relays_and_writers_share_three_sessions(
    connect: Connect, make_relay: MakeRelay, subscribe: Subscribe, gateway: Gateway, pooled_url: str, channel: str
) -> None:
    """Two relays of two workers each, and writers, all of them through pgbouncer, whose sessions an application has
    spoilt with settings of its own. Everything is requested once and in order, and nothing of the relay's is left in
    the sessions."""
    subscriber, connection = subscribe(channel), connect()
    spoil(pooled_url)
    committed: list[Fact] = []
    with (
        make_relay(database_url=pooled_url, api_url=gateway.url),
        make_relay(database_url=pooled_url, api_url=gateway.url),
        psycopg.connect(pooled_url, autocommit=True, prepare_threshold=None) as writer,
    ):
        for version in range(1, 31):
            for number in range(10):
                with writer.transaction():
                    # It may get a spoilt session too, and waits for the table to be extended, for instance.
                    writer.execute("SET LOCAL lock_timeout = 0")
                    committed.append(write(writer, str(number), version, channel))
        wait_until(lambda: states(connection) == {"delivered": 300}, "all are delivered")
        assert len(server_sessions(connection)) == SESSIONS
    assert len(gateway.commands) == 300
    assert violations(committed, map(fact, subscriber.wait_for(300))) == []
    for statements, listening, locks, begun in each_session(pooled_url):
        assert (statements, listening, locks) == (0, 0, 0)
        assert begun == "serializable", "the application's own setting is still there"


@contextlib.contextmanager
def all_sessions(pooled_url: str) -> Iterator[list[psycopg.Connection[tuple[object, ...]]]]:
    """As many clients as there are sessions, each in a transaction and so in a session of its own."""
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(closing(psycopg.connect(pooled_url, prepare_threshold=None))) for _ in range(SESSIONS)
        ]
        for client in clients:
            client.execute("SELECT 1")
        yield clients


def spoil(pooled_url: str) -> None:
    """What is set without LOCAL stays in the session that served the transaction."""
    with all_sessions(pooled_url) as clients:
        for client in clients:
            client.execute("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            client.execute("SET enable_indexscan = off")
            client.execute("SET lock_timeout = 1")
            client.commit()


def each_session(pooled_url: str) -> list[tuple[object, ...]]:
    with all_sessions(pooled_url) as clients:
        return [
            client.execute(
                "SELECT (SELECT count(*) FROM pg_prepared_statements), (SELECT count(*) FROM pg_listening_channels()), "
                "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()), "
                "current_setting('default_transaction_isolation')"
            ).fetchall()[0]
            for client in clients
        ]


def test_hazard_20_a_session_that_ends_is_noticed_before_the_next_request(connect: Connect, pooled_url: str) -> None:
    """pgbouncer passes on the end of the session that held the lanes."""
    connection = connect()
    write(connection, "1", 1, "plain:a")
    with closing(Store(pooled_url)) as store:
        batch = store.batch()
        batch.__enter__()
        assert store.claim(after=0, lanes=256).lanes
        assert store.request_deadline() is not None
        [pid] = holders(connection)
        connection.execute("SELECT pg_terminate_backend(%s)", (pid,))
        wait_until(lambda: store.request_deadline() is None, "nothing more is sent")
        with pytest.raises(DatabaseUnavailableError):
            batch.__exit__(None, None, None)


def holders(connection: Connection) -> list[int]:
    """Who has locked rows of the lanes."""
    rows = connection.execute(
        "SELECT DISTINCT pid FROM pg_locks WHERE relation = 'outbox_lane'::regclass AND mode = 'RowShareLock'"
    )
    return [pid for (pid,) in rows]


def test_hazard_20_sessions_are_ended_and_pgbouncer_is_killed(
    connect: Connect, make_relay: MakeRelay, subscribe: Subscribe, pgbouncer: PgBouncer, pooled_url: str, channel: str
) -> None:
    """While relays are at work: the server's sessions end ten times, pgbouncer three times."""
    subscriber, connection = subscribe(channel), connect()
    committed: list[Fact] = []
    with make_relay(database_url=pooled_url), make_relay(database_url=pooled_url):
        for version in range(1, 11):
            committed += [write(connection, str(number), version, channel) for number in range(20)]
            wait_until(lambda: server_sessions(connection), "a relay is at work")
            connection.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s) pid", (server_sessions(connection),))
            if version % 3 == 0:
                pgbouncer.kill()
                pgbouncer.start()
        wait_until(lambda: states(connection) == {"delivered": 200}, "all are delivered")
    assert violations(committed, map(fact, subscriber.wait_for(200))) == []


def test_hazard_20_a_killed_relay_leaves_its_lanes(
    connect: Connect, start_relay: StartRelay, subscribe: Subscribe, gateway: Gateway, pooled_url: str, channel: str
) -> None:
    """It was waiting for an answer, in a transaction. pgbouncer ends that, and another relay goes on."""
    subscriber, connection = subscribe(channel), connect()
    heard = threading.Event()

    def first_time(exchange: object) -> None:
        heard.set()
        gateway.fault = None

    gateway.fault = first_time
    settings = {"database_url": pooled_url, "centrifugo_url": gateway.url}
    committed = [write(connection, "1", 1, channel)]
    first = start_relay(settings)
    assert heard.wait(20)
    first.kill()
    start_relay(settings)
    committed.append(write(connection, "1", 2, channel))
    wait_until(lambda: states(connection) == {"delivered": 2}, "both are delivered")
    assert violations(committed, map(fact, subscriber.wait_for(2))) == []


def test_hazard_20_operators_come_through_it_too(
    connect: Connect, make_relay: MakeRelay, subscribe: Subscribe, gateway: Gateway, pooled_url: str, channel: str
) -> None:
    """An event is held, discarded, and a delivered one replayed."""
    subscriber, connection = subscribe(channel), connect()
    operator = Operator(pooled_url)
    committed = write(connection, "1", 1, channel)
    gateway.fault = refuse(108, lambda command: command.aggregate[1] == "2")
    [held] = connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) "
        "VALUES ('order', '2', 1, %s, '{}') RETURNING id",
        ([channel],),
    ).fetchall()
    options = Options(policy=Policy(backoff_base=3600.0, backoff_max=3600.0))
    with make_relay(options, database_url=pooled_url, api_url=gateway.url):
        wait_until(lambda: states(connection) == {"delivered": 1, "parked": 1}, "one is delivered, one is held")
        assert operator.replay([1]).events == 1
        assert list(map(fact, subscriber.wait_for(2))) == [committed, committed]
        gateway.fault = None
        assert operator.discard([held[0]]).events == 1
        wait_until(lambda: states(connection) == {"delivered": 1, "discarded": 1}, "the held one is discarded")
