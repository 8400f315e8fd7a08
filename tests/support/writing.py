"""Events written as any language writes them: a plain INSERT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg import sql

from tests.support.oracle import Fact
from tests.support.subscriber import Publication
from tests.support.waiting import wait_until

Connection = psycopg.Connection[Any]

LANE = "((hashtextextended(aggregate_type || '/' || aggregate_id, 0) & 255)::smallint)"
"""The lane of an event, in SQL: the fixed hash of its aggregate."""


def write(
    connection: Connection,
    aggregate_id: str,
    version: int,
    channels: str | Sequence[str],
    payload: str | bytes = "{}",
    *,
    schema: str = "public",
) -> Fact:
    """Insert one event of an `order` in the connection's transaction."""
    channels = [channels] if isinstance(channels, str) else list(channels)
    payload = payload if isinstance(payload, str) else payload.decode()
    statement = sql.SQL(
        "INSERT INTO {} (aggregate_type, aggregate_id, version, channels, payload) "
        "VALUES ('order', %s, %s, %s, %s) RETURNING event_id::text"
    ).format(sql.Identifier(schema.replace("%", "%%"), "outbox"))  # psycopg looks for placeholders in names, too
    row = connection.execute(statement, (aggregate_id, version, channels, payload)).fetchone()
    assert row is not None
    return Fact(("order", aggregate_id), version, row[0])


class Traffic:
    """An order that keeps changing beside the one that a test is about."""

    def __init__(self, connection: Connection, aggregate_id: str, channel: str) -> None:
        self._connection = connection
        self._aggregate_id = aggregate_id
        self._channel = channel
        self.written: list[Fact] = []

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Write the next version once the last one is delivered, until `condition` is true."""
        wait_until(lambda: condition() or self._go_on(), what)

    def _go_on(self) -> bool:
        if delivered(self._connection, self._aggregate_id) == len(self.written):
            self.written.append(write(self._connection, self._aggregate_id, len(self.written) + 1, self._channel))
        return False


def delivered(connection: Connection, aggregate_id: str) -> int:
    """How many events of an order are delivered."""
    statement = "SELECT count(*) FROM outbox WHERE aggregate_id = %s AND state = 'delivered'"
    row = connection.execute(statement, (aggregate_id,)).fetchone()
    assert row is not None
    count: int = row[0]
    return count


def fact(publication: Publication) -> Fact:
    return Fact(publication.aggregate, publication.version, publication.tags["ob_event"])


def states(connection: Connection) -> dict[str, int]:
    """How many events are in each state."""
    return dict(connection.execute("SELECT state::text, count(*) FROM outbox GROUP BY state").fetchall())


def neighbours(connection: Connection, count: int) -> list[str]:
    """Names of `count` orders that share a lane: what one of them does to the lane, the others feel."""
    rows = connection.execute(
        """
        SELECT (array_agg(name ORDER BY name))[:%(count)s]
        FROM (
            SELECT n::text AS name, hashtextextended('order/' || n, 0) & 255 AS lane FROM generate_series(1, 5000) n
        ) AS x
        GROUP BY lane HAVING count(*) >= %(count)s LIMIT 1
        """,
        {"count": count},
    ).fetchone()
    assert rows is not None
    names: list[str] = rows[0]
    return names


def backend_waits(connection: Connection, kind: str) -> list[tuple[int, str]]:
    """The sessions of this database that wait for something of `kind`, with the start of their statement."""
    return connection.execute(
        "SELECT pid, query_start::text FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = %s",
        (kind,),
    ).fetchall()
