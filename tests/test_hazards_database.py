"""Hazards of the database under the relay, by their numbers in the project's list of hazards."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from typing import Any, LiteralString

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import sql

from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.embedded.postgres import Postgres
from outbox_relay.migrations import migrate
from outbox_relay.options import Options
from outbox_relay.outbox import Outbox
from outbox_relay.runner import Ended
from outbox_relay.store import Store
from tests.conftest import Connect, MakeRelay, RunRelay, sqlalchemy_engine
from tests.support.gateway import Exchange, Gateway
from tests.support.oracle import Fact, violations
from tests.support.proxy import TcpProxy
from tests.support.subscriber import Subscriber
from tests.support.waiting import PATIENCE, in_background, wait_until
from tests.support.writing import Connection, backend_waits, fact, states, write

Subscribe = Callable[..., Subscriber]

ISOLATION_LEVELS = ["repeatable read", "serializable"]


def nobody_is_held(connection: Connection) -> bool:
    return connection.execute("SELECT FROM outbox_hold").fetchone() is None


@pytest.mark.parametrize("isolation", ISOLATION_LEVELS)
def test_hazard_7_a_role_with_another_default_isolation(
    connect: Connect, database_url: str, isolation: str, channel: str
) -> None:
    """The relay says READ COMMITTED itself. Under a role's REPEATABLE READ its snapshot would be as old as its
    first statement: settled events would look pending, new ones would not be there."""
    connection = connect()
    set_default_isolation(connection, isolation)
    write(connection, "1", 1, channel)
    with closing(Store(database_url)) as store, store.batch():
        lanes = store.claim(after=0, lanes=256).lanes
        connection.execute("UPDATE outbox SET state = 'delivered'")
        write(connection, "1", 2, channel)
        batch = store.read(lanes, events=100, per_lane=100, max_bytes=1_000_000)
        assert [event.version for event in batch.events] == [2]


@pytest.mark.parametrize("isolation", ISOLATION_LEVELS)
def test_hazard_7_relays_and_writers_of_such_a_role_together(
    connect: Connect, make_relay: MakeRelay, subscribe: Subscribe, gateway: Gateway, channel: str, isolation: str
) -> None:
    """Two relays of two workers each: every event is requested once, in order, and no bookkeeping fails."""
    connection = connect()
    set_default_isolation(connection, isolation)
    subscriber = subscribe(channel)
    writer = connect()
    committed: list[Fact] = []
    with make_relay(api_url=gateway.url), make_relay(api_url=gateway.url):
        for version in range(1, 31):
            committed += [write(writer, str(number), version, channel) for number in range(5)]
        wait_until(lambda: states(connection) == {"delivered": 150}, "all are delivered")
    assert len(gateway.commands) == 150
    assert violations(committed, map(fact, subscriber.wait_for(150))) == []


def set_default_isolation(connection: Connection, isolation: str) -> None:
    """As `ALTER ROLE` does, for this database alone: roles are shared with the tests beside this one."""
    statement = "ALTER ROLE CURRENT_USER IN DATABASE {} SET default_transaction_isolation = {}"
    connection.execute(sql.SQL(statement).format(sql.Identifier(connection.info.dbname), isolation))


def test_hazard_7_a_lock_timeout_while_settling_repeats_only_the_settling(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, gateway: Gateway, channel: str
) -> None:
    """Somebody locks the row while Centrifugo answers. The relay waits, gives up after its lock_timeout, and
    tries the same statements again: the event is published once and no attempt is counted."""
    subscriber = subscribe(channel)
    connection, operator = connect(), connect(autocommit=False)
    committed = [write(connection, "1", 1, channel)]

    def lock_then_publish(exchange: Exchange) -> None:
        operator.execute("SELECT FROM outbox FOR UPDATE")
        exchange.answer(*exchange.forward())

    gateway.fault = lock_then_publish
    with in_background(lambda: run_relay(api_url=gateway.url)) as ended:
        wait_until(lambda: backend_waits(connection, "Lock"), "the relay waits for the row")
        [first] = backend_waits(connection, "Lock")
        wait_until(lambda: backend_waits(connection, "Lock") not in ([], [first]), "it waits for a second time")
        operator.rollback()
        assert ended() is Ended.EMPTY
    assert len(gateway.commands) == 1
    assert nobody_is_held(connection)
    assert violations(committed, map(fact, subscriber.wait_for(1))) == []


def test_hazard_7_a_deadlock_while_settling_repeats_only_the_settling(
    connect: Connect,
    run_relay: RunRelay,
    subscribe: Subscribe,
    gateway: Gateway,
    channel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The relay is the victim of a deadlock (40P01) over the rows it settles, one lock after the other:
    it holds 1 and waits for 2; somebody waits for 1 and holds 3; then 2 is free and the relay asks for 3."""
    subscriber = subscribe(channel)
    connection = connect()
    # On a slow machine the relay's lock_timeout would come first, and is another test's matter.
    original = Store.__init__

    def patient(store: Store, *args: Any, **settings: Any) -> None:
        original(store, *args, **settings)
        store._connection.execute("SET lock_timeout = 30000")

    monkeypatch.setattr(Store, "__init__", patient)
    # A relay that repeats at once may lock 1 before somebody has woken up who waits for it: the same deadlock anew,
    # until its tries are used up.
    gave_way = threading.Event()
    roll_back_to = Store.roll_back_to

    def give_way(store: Store, savepoint: LiteralString) -> None:
        roll_back_to(store, savepoint)
        if savepoint == "settle":
            assert gave_way.wait(PATIENCE)

    monkeypatch.setattr(Store, "roll_back_to", give_way)
    # Who waits last looks for the deadlock, and the relay looks early.
    set_deadlock_timeout = sql.SQL("ALTER DATABASE {} SET deadlock_timeout = '20ms'")
    connection.execute(set_deadlock_timeout.format(sql.Identifier(connection.info.dbname)))
    committed = [write(connection, str(number), 1, channel) for number in (1, 2, 3)]
    second, third = connect(autocommit=False), connect(autocommit=False)
    third.execute("SET deadlock_timeout = '60s'")
    third.commit()

    def lock_then_publish(exchange: Exchange) -> None:
        second.execute("SELECT FROM outbox WHERE id = 2 FOR UPDATE")
        third.execute("SELECT FROM outbox WHERE id = 3 FOR UPDATE")
        exchange.answer(*exchange.forward())

    def want_the_first() -> None:
        third.execute("SELECT FROM outbox WHERE id = 1 FOR UPDATE")
        third.rollback()
        gave_way.set()

    gateway.fault = lock_then_publish
    # One worker: two would share the three events.
    with in_background(lambda: run_relay(Options(workers=1), api_url=gateway.url)) as ended:
        wait_until(lambda: len(backend_waits(connection, "Lock")) == 1, "the relay waits for 2")
        with in_background(want_the_first) as done:
            wait_until(lambda: len(backend_waits(connection, "Lock")) == 2, "somebody waits for 1")
            second.rollback()
            done()
        assert ended() is Ended.EMPTY
    wait_until(lambda: deadlocks(connection) == 1, "PostgreSQL has counted the deadlock")
    assert len(gateway.commands) == 3
    assert nobody_is_held(connection)
    assert violations(committed, map(fact, subscriber.wait_for(3))) == []


def deadlocks(connection: Connection) -> int:
    row = connection.execute(
        "SELECT pg_stat_get_db_deadlocks(oid) FROM pg_database WHERE datname = current_database()"
    ).fetchone()
    assert row is not None
    count: int = row[0]
    return count


def test_hazard_7_bookkeeping_that_keeps_failing_counts_no_attempt(
    connect: Connect, make_relay: MakeRelay, subscribe: Subscribe, gateway: Gateway, channel: str
) -> None:
    """The row stays locked for longer than the relay tries: it publishes again later, under the same key, and
    holds nothing against the event."""
    subscriber = subscribe(channel)
    connection, operator = connect(), connect(autocommit=False)
    committed = [write(connection, "1", 1, channel)]
    locked = threading.Event()

    def lock_then_publish(exchange: Exchange) -> None:
        if not locked.is_set():
            operator.execute("SELECT FROM outbox FOR UPDATE")
            locked.set()
        exchange.answer(*exchange.forward())

    gateway.fault = lock_then_publish
    with make_relay(api_url=gateway.url):
        assert locked.wait(5)
        relay = {pid for pid, _ in relay_sessions(connection)}
        wait_until(lambda: relay - {pid for pid, _ in relay_sessions(connection)}, "the relay starts afresh")
        operator.rollback()
        wait_until(lambda: states(connection) == {"delivered": 1}, "the event is delivered")
    assert len(gateway.commands) == 2
    assert len({command.key for command in gateway.commands}) == 1
    assert nobody_is_held(connection)
    assert violations(committed, map(fact, subscriber.wait_for(1))) == []


def relay_sessions(connection: Connection) -> list[tuple[int, str]]:
    return connection.execute(
        "SELECT pid, state FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'outbox-relay'"
    ).fetchall()


def test_hazard_11_the_database_ends_a_session_that_is_silent(connect: Connect, database_url: str) -> None:
    """Once a batch and its last request must be over, and not before. The relay then sends nothing more."""
    connection = connect()
    with closing(Store(database_url, request_timeout=0.2, batch_time=0.1)) as store:
        assert store.session_timeout > 0.2 + 0.1
        batch = store.batch()
        batch.__enter__()
        pid, limit, since = store.execute(
            "SELECT pg_backend_pid(), current_setting('idle_in_transaction_session_timeout')::interval, "
            "clock_timestamp()"
        ).fetchall()[0]
        wait_until(
            lambda: connection.execute("SELECT FROM pg_stat_activity WHERE pid = %s", (pid,)).rowcount == 0,
            "the session is ended",
        )
        [(now,)] = connection.execute("SELECT clock_timestamp()").fetchall()
        assert now - since >= limit == timedelta(seconds=store.session_timeout)
        assert store.request_deadline() is None
        with pytest.raises(DatabaseUnavailableError):
            batch.__exit__(None, None, None)


def test_hazard_13_sessions_that_are_ended_again_and_again(
    connect: Connect, make_relay: MakeRelay, subscribe: Subscribe, channel: str
) -> None:
    """pg_terminate_backend on every session of the relay while it works, ten times: it comes back each time."""
    subscriber = subscribe(channel)
    connection = connect()
    committed: list[Fact] = []
    with make_relay():
        for version in range(1, 11):
            committed += [write(connection, str(number), version, channel) for number in range(20)]
            wait_until(lambda: relay_sessions(connection), "the relay is connected")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'outbox-relay'"
            )
        wait_until(lambda: states(connection) == {"delivered": 200}, "all are delivered")
    assert nobody_is_held(connection)
    assert violations(committed, map(fact, subscriber.wait_for(200))) == []


def test_hazard_13_a_database_that_crashes_under_the_relay(
    make_relay: MakeRelay, subscribe: Subscribe, channel: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An immediate stop, twice: what was committed is delivered, and the outage of the database is said once each
    time and worker."""
    caplog.set_level("INFO", "outbox_relay")

    def said(what: str) -> int:
        return caplog.messages.count(f"database {what}")

    subscriber = subscribe(channel)
    committed: list[Fact] = []
    with Postgres() as postgres:
        migrate(sqlalchemy_engine(postgres.url()))
        with make_relay(database_url=postgres.url()):
            for crash in range(3):
                with psycopg.connect(postgres.url(), autocommit=True) as connection:
                    committed += [
                        write(connection, str(number), 2 * crash + step, channel)
                        for step in (1, 2)
                        for number in range(50)
                    ]
                    if crash == 2:
                        wait_until(lambda: states(connection) == {"delivered": 300}, "all are delivered")
                        assert nobody_is_held(connection)
                        wait_until(lambda: said("is back") == said("lost, connecting again"), "all workers are back")
                if crash < 2:
                    postgres.restart("immediate")
    assert violations(committed, map(fact, subscriber.wait_for(300))) == []
    assert 2 <= said("lost, connecting again") <= 4


def test_hazard_13_a_network_that_is_cut(
    connect: Connect, database_url: str, make_relay: MakeRelay, subscribe: Subscribe, channel: str
) -> None:
    """Neither the open connections nor new ones get through for a while; then the relay goes on by itself."""
    url = sa.make_url(database_url)
    subscriber = subscribe(channel)
    connection = connect()
    with TcpProxy(url.host or "", url.port or 5432) as proxy:
        by_proxy = url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        with make_relay(database_url=by_proxy):
            committed = [write(connection, "1", 1, channel)]
            subscriber.wait_for(1)
            proxy.cut()
            wait_until(lambda: not relay_sessions(connection), "the database has noticed")
            committed.append(write(connection, "1", 2, channel))
            proxy.mend()
            assert violations(committed, map(fact, subscriber.wait_for(2))) == []


@pytest.mark.parametrize(
    "schema",
    [
        'x"; DROP TABLE witness; --',
        "it's",
        "with space",
        "ÄÖÜ ☃",
        "%s %(ids)s {outbox}",
        "a.b",
        "\\",
        ":name",
        "select",
        "x" * 63,
    ],
)
def test_hazard_48_hostile_schema_names(
    empty_database_url: str, run_relay: RunRelay, subscribe: Subscribe, channel: str, schema: str
) -> None:
    """Migrated, written to, relayed and downgraded under a name that would break SQL made by formatting."""
    subscriber = subscribe(channel)
    engine = sqlalchemy_engine(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE public.witness ()")
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        migrate(engine, schema=schema)
        committed = [write(connection, "1", 1, channel, schema=schema)]
        with engine.begin() as transaction:
            transaction.execute(Outbox(schema).enqueue("order", "1", version=2, channels=channel, payload={}))
        assert run_relay(database_url=empty_database_url, schema=schema) is Ended.EMPTY
        received = [fact(publication) for publication in subscriber.wait_for(2)]
        assert violations([*committed, received[1]], received) == []
        migrate(engine, "base", schema=schema, down=True)
        connection.execute("SELECT FROM public.witness")
        left = connection.execute(
            "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE relname = 'outbox'"
        ).fetchone()
        assert left == (0,)


def test_a_session_that_cannot_be_prepared_is_closed(connect: Connect, database_url: str) -> None:
    """Whoever keeps the error, and with it the half-made session, does not keep a connection."""
    admin = connect()
    name = f"powerless-{uuid.uuid4().hex}"
    role = sql.Identifier(name)
    admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    try:
        admin.execute("REVOKE EXECUTE ON FUNCTION pg_backend_pid() FROM PUBLIC")
        url = sa.make_url(database_url).set(username=name).render_as_string(hide_password=False)
        with pytest.raises(DatabaseUnavailableError, match="permission denied for function pg_backend_pid") as kept:
            Store(url)
        query = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
        wait_until(lambda: admin.execute(query, [name]).fetchone() == (0,), "the connection is closed")
        assert kept.tb is not None
    finally:
        admin.execute(sql.SQL("DROP ROLE {}").format(role))
