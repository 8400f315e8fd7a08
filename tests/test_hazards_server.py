"""Hazards of the server that the outbox is in, and of clocks and connections, by their numbers in docs/hazards.md."""

from __future__ import annotations

import itertools
import os
import pwd
import resource
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.embedded.postgres import Postgres, find_binaries
from outbox_relay.event import ACCEPTED, Event, Outage, boottime
from outbox_relay.migrations import migrate
from outbox_relay.options import Options
from outbox_relay.runner import Ended
from outbox_relay.store import Store
from tests.conftest import Connect, MakeRelay, RunRelay, database, in_database, sqlalchemy_engine
from tests.support.gateway import Exchange, Fault, Gateway, refuse
from tests.support.oracle import violations
from tests.support.subscriber import Subscriber
from tests.support.waiting import wait_until
from tests.support.writing import Connection, fact, states, write

Subscribe = Callable[..., Subscriber]


def test_hazard_4_open_transactions_elsewhere_hold_nobody_up(
    make_relay: MakeRelay, subscribe: Subscribe, channel: str
) -> None:
    """A transaction that writes in another database of the server, and a prepared one that everybody has forgotten:
    both hold back the oldest transaction id, on which no order is built here. What was prepared arrives when it is
    committed."""
    subscriber = subscribe(channel)
    with Postgres(settings={"max_prepared_transactions": "1"}) as postgres, database(postgres.url()) as other:
        migrate(sqlalchemy_engine(postgres.url()))
        with (
            psycopg.connect(in_database(postgres.url(), other)) as elsewhere,
            psycopg.connect(postgres.url(), autocommit=True) as connection,
        ):
            elsewhere.execute("CREATE TABLE busy ()")
            connection.execute("BEGIN")
            connection.execute("SET LOCAL outbox_relay.wake_up = off")
            prepared = write(connection, "prepared", 1, channel)
            connection.execute("PREPARE TRANSACTION 'forgotten'")
            with make_relay(database_url=postgres.url()):
                committed = [write(connection, str(number), 1, channel) for number in range(50)]
                subscriber.wait_for(50)
                wait_until(lambda: states(connection) == {"delivered": 50}, "all are delivered")
                connection.execute("COMMIT PREPARED 'forgotten'")
                received = subscriber.wait_for(51)
    assert violations([*committed, prepared], map(fact, received)) == []


# Hazards 15 and 17: another server takes over


@pytest.fixture
def primary() -> Iterator[Postgres]:
    with Postgres() as postgres:
        migrate(sqlalchemy_engine(postgres.url()))
        yield postgres


@pytest.fixture
def standby(primary: Postgres) -> Iterator[Postgres]:
    """A copy of the primary as it was then, read-only. It follows nobody: asynchronous replication at its worst."""
    folder = Path(tempfile.mkdtemp(prefix="outbox-relay-standby-"))
    folder.chmod(0o755)
    data = folder / "data"
    program, source = str(find_binaries() / "pg_basebackup"), f"--dbname={primary.url()}"
    command = [program, "--checkpoint=fast", "--wal-method=stream", source, f"--pgdata={data}"]
    subprocess.run(command, check=True, capture_output=True)
    (data / "standby.signal").touch()
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        for path in (data, *data.rglob("*")):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
    try:
        with Postgres(data) as postgres:
            yield postgres
    finally:
        shutil.rmtree(folder)


def promote(postgres: Postgres) -> None:
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        assert connection.execute("SELECT pg_promote()").fetchone() == (True,)


def demote(postgres: Postgres) -> None:
    postgres.stop("immediate")
    (postgres.data_dir / "standby.signal").touch()
    postgres.start()


def either(one: Postgres, other: Postgres) -> str:
    """A URL that names both servers."""
    return f"postgresql://postgres@127.0.0.1:{one.port},127.0.0.1:{other.port}/postgres"


def test_hazard_15_what_a_failover_undid_does_not_swallow_what_takes_its_place(
    primary: Postgres, standby: Postgres, make_relay: MakeRelay, subscribe: Subscribe, channel: str
) -> None:
    """Version 1 was published and is gone with the old primary; the new one gives the same version to other content.
    It is published too, because the idempotency key is the row's, not the version's; and its epoch is another one, so
    that subscribers do not compare the versions."""
    subscriber = subscribe(channel)
    with make_relay(database_url=either(primary, standby)):
        with psycopg.connect(primary.url(), autocommit=True) as connection:
            write(connection, "1", 1, channel, '"undone"')
            subscriber.wait_for(1)
        primary.stop("immediate")
        promote(standby)
        with psycopg.connect(standby.url(), autocommit=True) as connection:
            assert states(connection) == {}
            write(connection, "1", 1, channel, '"true"')
            wait_until(lambda: states(connection) == {"delivered": 1}, "it is delivered")
    undone, true = subscriber.wait_for(2)
    assert [(heard.version, heard.data) for heard in (undone, true)] == [(1, b'"undone"'), (1, b'"true"')]
    assert undone.tags["ob_epoch"] != true.tags["ob_epoch"]


def test_hazard_17_a_primary_that_was_demoted_is_left(
    primary: Postgres, standby: Postgres, make_relay: MakeRelay, subscribe: Subscribe, channel: str
) -> None:
    """The old primary comes back at its address, answers, and has an event pending that the new one has never seen.
    The relay takes neither that event nor that server, though it comes first in its URL."""
    subscriber = subscribe(channel)
    with psycopg.connect(primary.url(), autocommit=True) as connection:
        write(connection, "undone", 1, channel)
    demote(primary)
    promote(standby)
    with (
        make_relay(database_url=either(primary, standby)),
        psycopg.connect(standby.url(), autocommit=True) as connection,
    ):
        committed = [write(connection, "true", 1, channel)]
        wait_until(lambda: states(connection) == {"delivered": 1}, "it is delivered")
    with psycopg.connect(primary.url()) as connection:
        assert states(connection) == {"pending": 1}
    assert violations(committed, map(fact, subscriber.wait_for(1))) == []


def test_hazard_17_a_session_on_a_standby_publishes_nothing(primary: Postgres) -> None:
    """Whatever led it there: each transaction says READ WRITE, and a standby answers that with an error."""
    with psycopg.connect(primary.url(), autocommit=True) as connection:
        write(connection, "1", 1, "plain:a")
    demote(primary)
    with closing(Store(f"{primary.url()}?target_session_attrs=any")) as store:
        assert store.anything_to_do()
        with pytest.raises(DatabaseUnavailableError, match="read-write mode during recovery"), store.batch():
            store.claim(after=0, lanes=256)


def test_hazard_17_a_standby_does_not_know_below_which_id_nothing_is_to_come(primary: Postgres) -> None:
    """Who writes on the primary holds no lock there, and the session is still the same once it is promoted."""
    with psycopg.connect(primary.url(), autocommit=True) as connection:
        for version in (1, 2):
            write(connection, "1", version, "plain:a")
        connection.execute("UPDATE outbox SET state = 'delivered' WHERE version = 1")
    demote(primary)
    with closing(Store(f"{primary.url()}?target_session_attrs=any")) as store:
        for _ in range(3):
            assert store.anything_to_do()
            assert store._hint.parameters["start"] == 1
        promote(primary)
        wait_until(lambda: store.anything_to_do() and store._hint.parameters["start"] == 2, "it is known")


# Hazards 18, 21, 22, 23, 27


def test_hazard_18_a_commit_that_notifies_nobody_is_found(
    connect: Connect, make_relay: MakeRelay, relay_options: Options, subscribe: Subscribe, channel: str
) -> None:
    """The notifications may be lost in any way; here the writer sends none. A sleeping worker looks all the same."""
    subscriber, connection = subscribe(channel), connect()
    connection.execute("SET outbox_relay.wake_up = off")
    with make_relay(replace(relay_options, workers=1)):
        for version in range(1, 4):
            wait_until(lambda: sleeps(connection), "the relay sleeps")
            write(connection, "1", version, channel)
            subscriber.wait_for(version)


def sleeps(connection: Connection) -> bool:
    query = (
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return connection.execute(query).fetchone() == (1,)


def test_hazard_18_a_peer_that_is_gone_is_noticed(database_url: str) -> None:
    """What the kernel was told about the relay's connection: probe it when it is idle, give it up after 10 s without an
    acknowledgement. That the kernel then does so is the kernel's own affair; its answer to a dead peer cannot be had
    on a loopback interface without a packet filter."""
    with closing(Store(database_url)) as store, socket.socket(fileno=os.dup(store._connection.fileno())) as wire:
        assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5
        assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 2
        assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
        assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000


def test_hazard_21_no_connection_is_to_be_had(
    connect: Connect, database_url: str, make_relay: MakeRelay, subscribe: Subscribe, channel: str
) -> None:
    """53300 for every worker, then for all but one, then for none: the relay waits, does what it can, and never has
    more sessions than workers."""
    subscriber, connection = subscribe(channel), connect()
    role = f"relay_{uuid.uuid4().hex}"
    connection.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 0")
    connection.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
    connection.execute(f"GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO {role}")
    options = Options(workers=3, pause_min=0.02, pause_max=0.1)
    by_role = sa.make_url(database_url).set(username=role).render_as_string(hide_password=False)
    try:
        with make_relay(options, database_url=by_role) as relay:
            wait_until(lambda: relay.health().has_database == (False,) * 3, "no worker has a session")
            committed = [write(connection, "1", 1, channel)]
            connection.execute(f"ALTER ROLE {role} CONNECTION LIMIT 1")
            subscriber.wait_for(1)
            assert sessions(connection, role) == 1
            connection.execute(f"ALTER ROLE {role} CONNECTION LIMIT 3")
            wait_until(lambda: relay.health().has_database == (True,) * 3, "all workers have a session")
            committed.append(write(connection, "1", 2, channel))
            subscriber.wait_for(2)
            assert sessions(connection, role) == 3
        wait_until(lambda: sessions(connection, role) == 0, "no session is left")
    finally:
        connection.execute(f"DROP OWNED BY {role}")
        connection.execute(f"DROP ROLE {role}")
    assert violations(committed, map(fact, subscriber.received)) == []


def test_hazard_21_an_application_with_many_open_files(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """A relay inside of it gets descriptors above 1,023, of which select() knows nothing."""
    subscriber, connection = subscribe(channel), connect()
    committed = [write(connection, "1", version, channel) for version in (1, 2)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1_100)]
    try:
        assert run_relay() is Ended.EMPTY
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert violations(committed, map(fact, subscriber.wait_for(2))) == []


def sessions(connection: Connection, role: str) -> int:
    row = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = %s", (role,)).fetchone()
    assert row is not None
    count: int = row[0]
    return count


def test_hazard_22_requests_given_up_leave_nothing_behind(
    gateway: Gateway, centrifugo: Centrifugo, channel: str
) -> None:
    """Sixty requests that are given up before the answer, in its middle, or with what is left of it unread: the one
    connection that the client may have is free again each time."""
    faults: list[Fault] = [
        Exchange.wait_for_client_to_leave,
        in_the_middle,
        Exchange.reset,
        Exchange.hang_up,
        lambda exchange: exchange.answer(500, b"x" * 10_000_000),
        lambda exchange: exchange.answer(200, b"x" * 10_000_000),
    ]
    events = [event(channel)]
    with closing(Publisher(gateway.url, centrifugo.api_key, timeout=5.0)) as publisher:
        assert publisher.publish(events) == [ACCEPTED]
        before = len(os.listdir("/proc/self/fd"))
        for fault in faults * 10:
            gateway.fault = fault
            assert isinstance(publisher.publish(events, boottime() + 0.05), Outage)
        gateway.fault = None
        assert publisher.publish(events) == [ACCEPTED]
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "no descriptor more than before")


def in_the_middle(exchange: Exchange) -> None:
    exchange.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    exchange.wait_for_client_to_leave()


def event(channel: str) -> Event:
    return Event(1, str(uuid.uuid4()), "order", "1", 1, 1, "change", [channel], "{}", None, None, 0.0)


def test_hazard_23_nothing_is_written_to_what_a_relay_locks(
    connect: Connect, run_relay: RunRelay, relay_options: Options
) -> None:
    """While a snapshot is held open no dead row can be removed. 200 batches under it leave none in the lanes, which
    each claim reads, and so claims get no dearer by it."""
    connection, holder = connect(), connect(autocommit=False)
    holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    holder.execute("SELECT 1")
    size = lane_bytes(connection)
    for version in range(1, 1001):
        write(connection, "1", version, "plain:a")
    assert run_relay(replace(relay_options, workers=1, events_per_lane=5, lanes=1, batch_events=5)) is Ended.EMPTY
    assert states(connection) == {"delivered": 1000}
    assert lane_bytes(connection) == size
    # The one small write of a new session, which proves that it can write.
    wait_until(lambda: lane_updates(connection), "PostgreSQL has counted the relay's updates")
    assert lane_updates(connection) == 1


def lane_bytes(connection: Connection) -> int:
    row = connection.execute("SELECT pg_relation_size('outbox_lane')").fetchone()
    assert row is not None
    size: int = row[0]
    return size


def lane_updates(connection: Connection) -> int:
    row = connection.execute("SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'outbox_lane'").fetchone()
    assert row is not None
    count: int = row[0]
    return count


def test_hazard_27_a_wall_clock_that_jumps_is_not_looked_at(
    connect: Connect, make_relay: MakeRelay, gateway: Gateway, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay's own wall clock jumps by an hour, to and fro, each time that it is read. An event is refused twice
    and then accepted; deadlines run since boot, and the waits of held aggregates in the database."""
    jump = itertools.cycle([3600.0, -3600.0])
    wall, real = time.time, time.clock_gettime
    monkeypatch.setattr(time, "time", lambda: wall() + next(jump))
    monkeypatch.setattr(
        time, "clock_gettime", lambda clock: real(clock) + (next(jump) if clock == time.CLOCK_REALTIME else 0.0)
    )
    connection = connect()
    write(connection, "1", 1, channel)
    refusals = itertools.count()
    refusal = refuse(108, lambda _: True)
    gateway.fault = lambda exchange: refusal(exchange) if next(refusals) < 2 else exchange.answer(*exchange.forward())
    with make_relay(api_url=gateway.url):
        wait_until(lambda: states(connection) == {"delivered": 1}, "the event is delivered")
    assert len(gateway.commands) == 3
