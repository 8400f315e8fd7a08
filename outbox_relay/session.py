"""One worker's session with the database: transactions that nothing of the server's or the role's own can change."""

from __future__ import annotations

import re
import select
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, LiteralString, NamedTuple

import psycopg
from psycopg import sql

from outbox_relay.database import LANE, DatabaseUnavailableError, connect, one_line
from outbox_relay.event import boottime
from outbox_relay.wake_up import WakeUp

_NAMES: Final = (
    "outbox",
    "outbox_lane",
    "outbox_hold",
    "outbox_epoch",
    "outbox_generation",
    "outbox_id_seq",
    "outbox_state",
)


class Session:
    """A connection to the outbox in `schema`.

    `request_timeout` is the deadline of a request to Centrifugo and `batch_time` the longest time in which a
    batch starts requests, both in seconds: the database ends a session that is silent for longer. Where `wake_up`
    is wanted and possible there is one. Raises `DatabaseUnavailableError`.
    """

    def __init__(
        self,
        database_url: str,
        *,
        schema: str = "public",
        request_timeout: float = 3.0,
        batch_time: float = 1.0,
        wake_up: bool = True,
    ) -> None:
        self._connection = connect(database_url)
        self.table = sql.Identifier(schema, "outbox").as_string()
        self.schema = schema
        self.request_timeout = request_timeout
        self.session_timeout = request_timeout + batch_time + 1.0
        self._asked_at = boottime()
        self._begin = "BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE"
        try:
            self.direct = self._prepare()
        except psycopg.Error as error:
            self.close()
            raise DatabaseUnavailableError(one_line(error)) from error
        self.wake_up = WakeUp(self._connection, self.table) if self.direct and wake_up else None
        # Whatever the schema is called, it is no placeholder.
        self._names: Mapping[str, Any] = {
            name: sql.SQL(sql.Identifier(schema, name).as_string().replace("%", "%%")) for name in _NAMES
        } | {"lane": sql.SQL(LANE)}
        self._sql: dict[str, bytes] = {}
        self._waiting: list[LiteralString] = []
        self._prepared: dict[LiteralString, _Prepared] = {}
        self._ever_prepared = 0

    def close(self) -> None:
        self._connection.close()

    def _prepare(self) -> bool:
        """Make the session's settings its own, and return whether it is one: behind a pooler it may be several.

        A role's own defaults must not decide what a batch sees or how long it waits. Where a pooler may give every
        transaction another session each begins with them, and no statement is prepared. A pooler answers with a process
        id of its own.
        """
        milliseconds = round(self.session_timeout * 1000)
        settings = {
            "idle_in_transaction_session_timeout": milliseconds,
            "statement_timeout": milliseconds,
            "lock_timeout": 1000,
            "search_path": "pg_catalog",
            "plan_cache_mode": "force_generic_plan",
        } | dict.fromkeys(("enable_seqscan", "enable_hashjoin", "enable_mergejoin", "enable_bitmapscan", "jit"), "off")
        row = self._connection.execute("SELECT pg_catalog.pg_backend_pid()").fetchone()
        direct = row == (self._connection.info.backend_pid,)
        if direct:
            self._connection.execute("; ".join(f"SET {name} = {value}" for name, value in settings.items()))
            self._connection.prepare_threshold = 0
        else:
            self._begin += "".join(f"; SET LOCAL {name} = {value}" for name, value in settings.items())
        return direct

    @contextmanager
    def batch(self) -> Iterator[None]:
        """One transaction. Committed at the end, if it was not before, rolled back when anything is raised.

        Raises `DatabaseUnavailableError` for whatever the database or the connection has against it.
        """
        try:
            self.send_with_next(self._begin + self.wake_up.get_up() if self.wake_up else self._begin)
            try:
                yield
            except BaseException:
                self._prepared.clear()
                if not self._connection.closed:
                    self._connection.rollback()
                raise
            finally:
                self._waiting.clear()
            self._asked_at = boottime()
            self._connection.commit()
        except psycopg.Error as error:
            raise DatabaseUnavailableError(one_line(error)) from error

    def request_deadline(self) -> float | None:
        """When a request that starts now must have ended, on `boottime()`. None: the lanes may be lost before that.

        The clock counts from before the last answered statement was sent, and goes on while the process is
        stopped. A session that was ended has left its last words on the socket.
        """
        deadline = boottime() + self.request_timeout
        if deadline >= self._asked_at + self.session_timeout:
            return None
        poll = select.poll()  # select itself knows no descriptor above 1,023
        poll.register(self._connection, select.POLLIN)
        return None if poll.poll(0) else deadline

    def ask(self, query: LiteralString, **parameters: Any) -> tuple[Any, ...]:
        with self.batch():
            rows: list[tuple[Any, ...]] = self.execute(query, **parameters).fetchall()
        return rows[0]

    def execute(self, query: LiteralString, **parameters: Any) -> psycopg.Cursor[Any]:
        if self._waiting:
            self.execute_raw("")
        text = self._sql.get(query)
        if text is None:
            text = self._sql[query] = sql.SQL(query).format(**self._names).as_bytes(self._connection)
        asked_at = boottime()
        cursor = self._connection.execute(text, parameters, binary=True)
        self._asked_at = asked_at
        return cursor

    def execute_raw(self, query: LiteralString) -> psycopg.Cursor[Any]:
        """Statements as they are, after those that wait; the last one's result."""
        text = "; ".join([*self._waiting, query])
        self._waiting.clear()
        asked_at = boottime()
        cursor = self._connection.execute(text, prepare=False)
        self._asked_at = asked_at
        while cursor.nextset():
            pass
        return cursor

    def send_with_next(self, query: LiteralString) -> None:
        """Let a statement without parameters or result wait, and travel with the next one."""
        self._waiting.append(query)

    def execute_with_waiting(
        self, query: LiteralString, numbers: Mapping[str, float | str], *, last: bool = False
    ) -> psycopg.Cursor[Any]:
        """As `execute`, in one message with the statements that wait, and with the COMMIT after the batch's `last` one.

        The database runs them one by one, each with a snapshot of its own, and none after one that fails. The types of
        the `numbers`, or arrays of them as `bigints` writes them, must follow from the statement, which has a result
        only where it is not the last. Behind a pooler, where nothing can be prepared, all travel by themselves.
        """
        if not self.direct or not self._waiting:
            return self.execute(query, **numbers)
        prepared = self._prepared.get(query) or self._prepare_by_name(query, numbers)
        arguments = ", ".join([f"'{numbers[name]}'" for name in prepared.parameters])
        commit = "; COMMIT" if last else ""
        return self.execute_raw(f"EXECUTE {prepared.name}({arguments}){commit}")

    def _prepare_by_name(self, query: LiteralString, numbers: Mapping[str, float | str]) -> _Prepared:
        self._ever_prepared += 1
        prepared = _Prepared(f"outbox_relay_{self._ever_prepared}", tuple(numbers))
        placeholders = {name: sql.SQL(f"${n}") for n, name in enumerate(numbers, 1)}
        fields = sql.SQL(re.sub(r"%\((\w+)\)s", r"{\1}", query))
        text = fields.format(**self._names, **placeholders).as_string().replace("%%", "%")
        self._connection.execute(f"PREPARE {prepared.name} AS {text}".encode(), prepare=False)
        self._prepared[query] = prepared
        return prepared

    def roll_back_to(self, savepoint: LiteralString) -> None:
        self.execute_raw(f"ROLLBACK TO SAVEPOINT {savepoint}")
        self._prepared.clear()  # psycopg deallocates all that is prepared, ours with its own


class _Prepared(NamedTuple):
    name: str
    parameters: tuple[str, ...]
