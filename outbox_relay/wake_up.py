"""How an idle relay hears of a commit at once, and writers pay a NOTIFY only for a relay that sleeps.

A sleeping relay holds an advisory lock. The outbox's trigger asks for the same lock, shared: who finds it taken sends a
NOTIFY; who gets it keeps it until the commit, and no relay falls asleep meanwhile. So either the relay looks once
more after the commit, or it is told. One relay of a database sleeps like that; the others look now and then.
"""

from __future__ import annotations

from typing import Any, Final

import psycopg

from outbox_relay.database import DatabaseUnavailableError, one_line
from outbox_relay.outcome import boottime

TRY_AGAIN: Final = 0.5
"""Seconds until a session that could not fall asleep tries again: an idle one should not ask all the time."""

_KEY = "pg_catalog.hashtextextended('outbox_relay', %(table)s::pg_catalog.regclass::pg_catalog.oid::bigint)"
_FALL_ASLEEP = f"SELECT pg_catalog.pg_try_advisory_lock({_KEY})"
_GET_UP = f"SELECT pg_catalog.pg_advisory_unlock({_KEY})"


class WakeUp:
    """One session's sleep. `table` is the outbox's quoted name. Needs a session of its own: no pooler in between.

    Every method raises `DatabaseUnavailableError`; what the session held is free then.
    """

    def __init__(self, connection: psycopg.Connection[Any], table: str) -> None:
        self._connection = connection
        self._table = table
        self._listens = False
        self._asleep = False
        self._try_at = 0.0

    def sleep(self, seconds: float) -> bool | None:
        """Sleep for `seconds`, or until an event is committed, and return whether one was.

        Falling asleep is False at once: whoever committed until then sends no NOTIFY, so look once more. None where
        it cannot be done now, because a writer has not committed yet or another relay sleeps: nobody has waited, and
        for half a second nobody asks again.
        """
        if not self._asleep and boottime() < self._try_at:
            return None
        try:
            if not self._listens:
                self._connection.execute("LISTEN outbox_relay", prepare=False)
                self._listens = True
            if not self._asleep:
                row = self._connection.execute(_FALL_ASLEEP, {"table": self._table}).fetchone()
                self._asleep = row == (True,)
                self._try_at = 0.0 if self._asleep else boottime() + TRY_AGAIN
                return False if self._asleep else None
            return any(True for _ in self._connection.notifies(timeout=seconds, stop_after=1))
        except psycopg.Error as error:
            raise DatabaseUnavailableError(one_line(error)) from error

    def get_up(self) -> None:
        """Stop sleeping, so that writers are spared the NOTIFY while there is work."""
        if self._asleep:
            try:
                self._connection.execute(_GET_UP, {"table": self._table})
            except psycopg.Error as error:
                raise DatabaseUnavailableError(one_line(error)) from error
            self._asleep = False
