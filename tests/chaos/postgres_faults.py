"""PostgreSQL crashed, full, busy, locked, and its sessions ended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Final

import psycopg

from outbox_relay.database import APPLICATION_NAME
from tests.chaos.fault import Fault
from tests.chaos.world import DISK, World
from tests.support.waiting import wait_until

RESTARTED: Final = 3.0
"""Seconds after which all must be as before, once it is back."""
_END_RELAYS: Final = f"""
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = '{APPLICATION_NAME}'
"""
"""It waits until they are gone: a busy session hears of its end later."""


@contextmanager
def crashed(world: World, chance: Random) -> Iterator[None]:
    """An immediate stop, and a start that recovers from the log."""
    world.postgres.stop("immediate")
    yield
    world.ensure_database()


@contextmanager
def restarted(world: World, chance: Random) -> Iterator[None]:
    world.postgres.restart("fast")
    world.ensure_database()
    yield


@contextmanager
def sessions_ended(world: World, chance: Random) -> Iterator[None]:
    """pg_terminate_backend for every session of a relay, again and again."""
    with world.session(_END_RELAYS) as connection, _repeated(lambda: connection.execute(_END_RELAYS), every=0.2):
        yield


@contextmanager
def connections_exhausted(world: World, chance: Random) -> Iterator[None]:
    """Every slot is taken by somebody else, and the relays' own sessions are ended."""
    with world.session() as connection, ExitStack() as stack:

        def take_all() -> None:
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    stack.callback(psycopg.connect(world.database_url).close)

        take_all()
        with contextlib.suppress(psycopg.OperationalError):
            connection.execute(_END_RELAYS)
        with _repeated(take_all, every=0.02):
            yield


@contextmanager
def disk_full(world: World, chance: Random) -> Iterator[None]:
    """The cluster's file system has not a block left. PostgreSQL may stop itself when its log finds no room."""
    try:
        wait_until(world.fill_disk, "the disk is full")
        yield
    finally:
        world.resize_disk(DISK)
        world.ensure_database()


@contextmanager
def locked_by_ddl(world: World, chance: Random) -> Iterator[None]:
    """DDL waits for everybody, everybody waits for the DDL, and the relays' lock_timeout strikes."""
    alter = "ALTER TABLE outbox ALTER COLUMN error SET STORAGE EXTENDED"
    with world.session("BEGIN", "SET LOCAL lock_timeout = '3s'", alter):
        yield


@contextmanager
def long_transaction(world: World, chance: Random) -> Iterator[None]:
    """An application has written an event and thinks for long, before it takes everything back."""
    insert = (
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) "
        "VALUES ('thing', 'long-0', 1, '{hist:long}', '{}')"
    )
    with world.session("BEGIN", insert) as connection:
        yield
        connection.rollback()


@contextmanager
def snapshot_held(world: World, chance: Random) -> Iterator[None]:
    """Nothing that is deleted or changed meanwhile can be cleaned away."""
    with world.session("BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT count(*) FROM thing"):
        yield


@contextmanager
def _repeated(action: Callable[[], object], every: float) -> Iterator[None]:
    """Do it in the background again and again while the block runs; an error of it is raised at the end."""
    stopping = threading.Event()
    errors: list[BaseException] = []

    def repeat() -> None:
        try:
            while not stopping.wait(every):
                action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
    if errors:
        raise errors[0]


FAULTS: Final = (
    Fault("PostgreSQL crashed", crashed, (0.2, 1.5), within=RESTARTED, alone_with="PostgreSQL"),
    Fault("PostgreSQL restarted", restarted, within=RESTARTED, alone_with="PostgreSQL"),
    Fault("sessions ended by pg_terminate_backend", sessions_ended, (0.3, 2.0)),
    Fault("max_connections exhausted", connections_exhausted, (0.5, 2.0)),
    Fault("disk full", disk_full, (0.5, 2.0), alone_with="PostgreSQL", needs="disk"),
    Fault("outbox locked by DDL", locked_by_ddl, (0.5, 2.5)),
    Fault("long transaction", long_transaction, (2.0, 6.0), beside=True, quiet=True),
    Fault("snapshot held", snapshot_held, (5.0, 15.0), beside=True, quiet=True),
)
