"""The epoch: on every publication, the same for whoever asks, another one whenever versions may have gone back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from outbox_relay import Outbox, cli, epoch
from outbox_relay.embedded.postgres import Postgres
from outbox_relay.migrations import migrate
from outbox_relay.operator import Operator
from outbox_relay.runner import Ended
from tests.conftest import Connect, MakeRelay, RunRelay, database, in_database, sqlalchemy_engine
from tests.support.gateway import Exchange, Gateway
from tests.support.relays import drain
from tests.support.subscriber import Subscriber
from tests.support.waiting import PATIENCE, in_background, wait_until
from tests.support.writing import backend_waits, write

Subscribe = Callable[..., Subscriber]


def epoch_of(connection: psycopg.Connection[Any]) -> str:
    row = connection.execute("SELECT outbox_epoch()").fetchone()
    assert row is not None
    said: str = row[0]
    return said


def epoch_at(url: str) -> str:
    with psycopg.connect(url) as connection:
        return epoch_of(connection)


def test_everybody_says_the_same(
    engine: sa.Engine, database_url: str, connect: Connect, subscribe: Subscribe, channel: str, run_relay: RunRelay
) -> None:
    """The relay on its publications, the application in its state, the operator."""
    subscriber = subscribe(channel)
    write(connect(), "1", 1, channel)
    assert run_relay() is Ended.EMPTY
    [publication] = subscriber.wait_for(1)

    async def in_a_loop() -> str | None:
        target = sa.make_url(database_url).set(drivername="postgresql+asyncpg")
        async with AsyncSession(create_async_engine(target, poolclass=sa.NullPool)) as session:
            said: str | None = await session.scalar(epoch())
            return said

    with Session(engine) as session:
        said = {session.scalar(epoch()), session.scalar(Outbox("public").epoch())}
    said |= {asyncio.run(in_a_loop()), epoch_of(connect()), Operator(database_url).epoch().epoch}
    assert said == {publication.tags["ob_epoch"]}
    assert len(publication.tags["ob_epoch"]) == 16


def test_a_strange_schema_has_an_epoch_too(empty_database_url: str) -> None:
    """The name is quoted, whatever is in it."""
    schema = 'Über "app"; $$ :x'
    migrate(sqlalchemy_engine(empty_database_url), schema=schema)
    with sqlalchemy_engine(empty_database_url).connect() as connection:
        assert connection.scalar(Outbox(schema).epoch()) == Operator(empty_database_url, schema=schema).epoch().epoch


def test_a_bump_is_on_the_next_publication(
    database_url: str, connect: Connect, subscribe: Subscribe, channel: str, make_relay: MakeRelay
) -> None:
    """A relay that runs all the while reads the epoch with each batch."""
    subscriber = subscribe(channel)
    with make_relay():
        write(connect(), "1", 1, channel)
        before = subscriber.wait_for(1)[0].tags["ob_epoch"]
        ended = CliRunner().invoke(cli.app, ["epoch", "bump", "--database-url", database_url, "--json"])
        assert ended.exit_code == 0, ended.output
        write(connect(), "1", 2, channel)
        after = subscriber.wait_for(2)[1].tags["ob_epoch"]
    assert after == json.loads(ended.output)["epoch"] != before
    shown = CliRunner().invoke(cli.app, ["epoch", "show", "--database-url", database_url])
    assert shown.output.startswith(f"{after} (bumped at 2")


def test_a_bump_waits_for_the_batch_under_way(
    database_url: str, connect: Connect, subscribe: Subscribe, channel: str, make_relay: MakeRelay, gateway: Gateway
) -> None:
    """When it returns, whatever was read under the old epoch has been sent."""
    observer = connect()
    arrived, go_on = threading.Event(), threading.Event()

    def hold_back(exchange: Exchange) -> None:
        arrived.set()
        go_on.wait(PATIENCE)
        exchange.answer(*exchange.forward())

    subscriber = subscribe(channel)
    write(connect(), "1", 1, channel)
    before = epoch_of(observer)
    gateway.fault = hold_back
    relay = make_relay(api_url=gateway.url)
    with in_background(lambda: drain(relay)) as delivered:
        assert arrived.wait(PATIENCE)
        with in_background(Operator(database_url).bump_epoch) as bumped:
            try:
                wait_until(lambda: backend_waits(observer, "Lock"), "the bump waits for the relay's lane")
                assert epoch_of(observer) == before
            finally:
                go_on.set()
            assert bumped().epoch == epoch_of(observer) != before
        assert delivered() is Ended.EMPTY
    assert [publication.tags["ob_epoch"] for publication in subscriber.wait_for(1)] == [before]


def test_a_clock_that_was_set_back_repeats_no_epoch(database_url: str, connect: Connect) -> None:
    """A bump always goes forward."""
    connect().execute("UPDATE outbox_epoch SET bumped_at = '2222-01-01'")
    operator = Operator(database_url)
    assert len({operator.epoch().epoch, operator.bump_epoch().epoch, operator.bump_epoch().epoch}) == 3


def test_a_copy_of_the_database_has_another_epoch(database_url: str, server_url: str) -> None:
    """As after a restore beside the old database, with the very rows of the old one."""
    original = epoch_at(database_url)
    with database(server_url, sa.make_url(database_url).database) as name:
        assert epoch_at(in_database(server_url, name)) != original


def test_restored_tables_have_another_epoch(connect: Connect) -> None:
    """As after `pg_restore --clean`, which makes the tables anew in the same database."""
    connection = connect()
    original = epoch_of(connection)
    connection.execute(
        "CREATE TABLE restored (LIKE outbox_epoch); INSERT INTO restored TABLE outbox_epoch;"
        "DROP TABLE outbox_epoch; ALTER TABLE restored RENAME TO outbox_epoch"
    )
    assert epoch_of(connection) != original


def test_a_managed_service_that_hides_what_it_is(
    database_url: str, connect: Connect, subscribe: Subscribe, channel: str, run_relay: RunRelay
) -> None:
    """Where nobody may read the system identifier and the timeline, the bump alone changes the epoch."""
    connection = connect()
    whole = epoch_of(connection)
    owner = f"hidden_{connection.info.dbname}"
    connection.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(owner)))
    try:
        connection.execute(
            sql.SQL(
                "REVOKE EXECUTE ON FUNCTION pg_control_system(), pg_current_wal_lsn(), pg_control_checkpoint(), "
                "pg_control_recovery() FROM PUBLIC; GRANT CREATE ON SCHEMA public TO {0};"
                "ALTER FUNCTION outbox_epoch() OWNER TO {0}; ALTER TABLE outbox_epoch OWNER TO {0}"
            ).format(sql.Identifier(owner))
        )
        without = epoch_of(connection)
        write(connection, "1", 1, channel)
        with subscribe(channel) as subscriber:
            assert run_relay() is Ended.EMPTY
            assert subscriber.wait_for(1)[0].tags["ob_epoch"] == without
        assert len({whole, without, Operator(database_url).bump_epoch().epoch}) == 3
    finally:
        connection.execute(
            sql.SQL("REASSIGN OWNED BY {0} TO CURRENT_USER; DROP OWNED BY {0}; DROP ROLE {0}").format(
                sql.Identifier(owner)
            )
        )


@pytest.fixture
def clusters() -> Iterator[tuple[Postgres, Postgres]]:
    """Two clusters that are the same but for their system identifiers."""
    with Postgres() as first, Postgres() as second:
        for server in (first, second):
            migrate(sqlalchemy_engine(server.url()))
            with psycopg.connect(server.url()) as connection:
                connection.execute("UPDATE outbox_epoch SET bumped_at = '2026-01-01'")
        yield first, second


def test_another_cluster_and_a_promotion_have_another_epoch(clusters: tuple[Postgres, Postgres]) -> None:
    """A dump into a new cluster, and a failover: a standby says the epoch of its primary, and, promoted, another one
    at once, which it keeps."""
    first, second = clusters
    with closing(psycopg.connect(first.url())) as one, closing(psycopg.connect(second.url())) as two:
        rest = "SELECT d.oid, e.tableoid, bumped_at FROM pg_database AS d, outbox_epoch AS e WHERE datname = 'postgres'"
        assert one.execute(rest).fetchall() == two.execute(rest).fetchall()
        assert epoch_of(one) != epoch_of(two)
    original = epoch_at(first.url())
    first.stop()
    (first.data_dir / "standby.signal").touch()
    first.start()
    with psycopg.connect(first.url(), autocommit=True) as connection:
        assert epoch_of(connection) == original
        # A standby is promoted before its first checkpoint, which may take minutes.
        row = connection.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'").fetchone()
        assert row is not None
        os.kill(row[0], signal.SIGSTOP)
        try:
            connection.execute("SELECT pg_promote()")
            promoted = epoch_of(connection)
        finally:
            os.kill(row[0], signal.SIGCONT)
        assert promoted != original
        connection.execute("CHECKPOINT")
        assert epoch_of(connection) == promoted
    first.restart()
    assert epoch_at(first.url()) == promoted
