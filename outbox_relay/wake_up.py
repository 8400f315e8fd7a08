"""How an idle relay hears of a commit at once, and writers pay a NOTIFY only for a relay that sleeps.

A sleeping relay holds an advisory lock. The outbox's trigger asks for the same lock, shared: who finds it taken sends a
NOTIFY; who gets it keeps it until the commit, and no relay falls asleep meanwhile. So either the relay looks once
more after the commit, or it is told. One relay of a database sleeps like that; the others look now and then.
"""

from __future__ import annotations

import select
from typing import Any, Final

import psycopg
from psycopg import sql

from outbox_relay.database import DatabaseUnavailableError, one_line
from outbox_relay.event import boottime

TRY_AGAIN: Final = 0.5
"""Seconds until a session asks again whether the relay that sleeps in its place still does."""


class WakeUp:
    """One session's sleep. `table` is the outbox's quoted name. Needs a session of its own: no pooler in between."""

    def __init__(self, connection: psycopg.Connection[Any], table: str) -> None:
        self._connection = connection
        key = f"pg_catalog.hashtextextended('outbox_relay', {sql.quote(table)}::pg_catalog.regclass::oid::bigint)"
        # Writers share the lock until their commit, which is soon; another sleeper keeps it to himself.
        alone, shared = "pg_catalog.pg_try_advisory_lock", "pg_catalog.pg_try_advisory_xact_lock_shared"
        self._fall_asleep = f"SELECT {alone}({key}), {shared}({key})".encode()
        self._unlock = f"; SELECT pg_catalog.pg_advisory_unlock({key})"
        self._listens = False
        self._told = False
        self._asleep = False
        self._try_at = 0.0

    def sleep(self, seconds: float) -> bool | None:
        """Sleep for `seconds`, or until an event is committed, and return whether one was.

        Falling asleep is False at once: whoever committed until then sends no NOTIFY, so look once more. None where
        it cannot be done now, because a writer has not committed yet or another relay sleeps: nobody has waited.
        Raises `DatabaseUnavailableError`; the lock is free then.
        """
        if not self._asleep and boottime() < self._try_at:
            return None
        try:
            if not self._listens:
                # Not `notifies()`, which keeps all that come while nobody sleeps: anybody may send any number.
                self._connection.add_notify_handler(self._note)
                self._connection.execute("LISTEN outbox_relay", prepare=False)
                self._listens = True
            if self._asleep:
                return self._wait(seconds)
            self._told = False
            self._asleep, only_writers = self._connection.execute(self._fall_asleep).fetchall()[0]
            self._try_at = 0.0 if self._asleep or only_writers else boottime() + TRY_AGAIN
        except psycopg.Error as error:
            raise DatabaseUnavailableError(one_line(error)) from error
        return False if self._asleep else None

    def _note(self, _: object) -> None:
        self._told = True

    def _wait(self, seconds: float) -> bool:
        """Whether a notification has come since the last time, or comes within `seconds`."""
        link = self._connection.pgconn
        if not self._told:
            poll = select.poll()  # select itself knows no descriptor above 1,023
            poll.register(link.socket, select.POLLIN)
            poll.poll(seconds * 1000)
            link.consume_input()
            while link.notifies():
                self._told = True
        told, self._told = self._told, False
        return told

    def get_up(self) -> str:
        """What ends the sleep, to be added to a statement: while there is work, writers are spared the NOTIFY."""
        getting_up = self._unlock if self._asleep else ""
        self._asleep = False
        return getting_up
