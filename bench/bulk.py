"""Millions of events in seconds, and more of the same later: what lies in an outbox before a measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

import psycopg
import sqlalchemy as sa

from bench.load import CHANNELS, PAYLOAD
from outbox_relay.migrations import migrate

SESSIONS: Final = 2


@dataclass(frozen=True, slots=True)
class Stretch:
    """Events in a row: round robin over aggregates `name-0`, `name-1`, …, from the `first` one (0: version 1) on.

    They go to the channels `namespace:name-0` … `name-99`, the aggregates in turn.
    """

    name: str
    events: int
    aggregates: int
    first: int = 0
    state: Literal["pending", "parked", "delivered"] = "pending"
    namespace: str = "plain"

    def channels(self) -> list[str]:
        """All channels that its events go to."""
        return [f"{self.namespace}:{self.name}-{n}" for n in range(min(CHANNELS, self.aggregates))]


_ROWS: Final = f"""
SELECT 'order' AS aggregate_type, %(name)s || '-' || n %% %(aggregates)s AS aggregate_id,
       1 + n / %(aggregates)s AS version,
       ARRAY[%(namespace)s || ':' || %(name)s || '-' || n %% %(aggregates)s %% {CHANNELS}] AS channels,
       {PAYLOAD}::json AS payload, %(state)s::outbox_state AS state,
       CASE WHEN %(state)s = 'delivered' THEN clock_timestamp() END AS settled_at
"""
_COLUMNS: Final = "aggregate_type, aggregate_id, version, channels, payload, state, settled_at"

_APPEND: Final = f"""
INSERT INTO outbox ({_COLUMNS})
{_ROWS} FROM generate_series(%(first)s::bigint, %(first)s::bigint + %(events)s::bigint - 1) AS n ORDER BY n
"""

# Ids are given, so that sessions side by side keep id order version order.
_FILL: Final = f"""
INSERT INTO outbox (id, {_COLUMNS}) OVERRIDING SYSTEM VALUE
SELECT %(first_id)s + n, s.*
FROM generate_series(%(part_first)s::bigint, %(part_last)s::bigint) AS n CROSS JOIN LATERAL ({_ROWS}) AS s
"""

_CONSTRAINTS: Final = """
SELECT format('ALTER TABLE outbox DROP CONSTRAINT %I', conname),
       format('ALTER TABLE outbox ADD CONSTRAINT %I %s', conname, pg_get_constraintdef(oid))
FROM pg_constraint WHERE conrelid = 'outbox'::regclass AND contype IN ('p', 'u')
"""

_INDEXES: Final = """
SELECT format('DROP INDEX %s', indexrelid::regclass), pg_get_indexdef(indexrelid) FROM pg_index
WHERE indrelid = 'outbox'::regclass AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
"""


def make_tables(url: str) -> None:
    """Migrate an empty database."""
    migrate(sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool))


def append(connection: psycopg.Connection, stretch: Stretch) -> None:
    """Insert a stretch as a writer would, in one statement."""
    connection.execute(_APPEND, _parameters(stretch))


def fill(url: str, stretches: Sequence[Stretch]) -> None:
    """Migrate an empty database and fill it, each stretch before the next in id order. Ten million rows take a minute.

    Its indexes are made anew afterwards, as compact as they can be: what a relay finds on a good day.
    """
    make_tables(url)
    with psycopg.connect(url, autocommit=True) as connection, _without_indexes(connection):
        first_id = 1
        for stretch in stretches:
            _fill(url, stretch, first_id)
            first_id += stretch.events
        connection.execute("SELECT setval(pg_get_serial_sequence('outbox', 'id'), %s, false)", (first_id,))


def _fill(url: str, stretch: Stretch, first_id: int) -> None:
    edges = [stretch.first + stretch.events * part // SESSIONS for part in range(SESSIONS + 1)]

    def insert(part: int) -> None:
        with psycopg.connect(url) as connection:
            bounds = {"first_id": first_id - stretch.first, "part_first": edges[part], "part_last": edges[part + 1] - 1}
            connection.execute(_FILL, {**_parameters(stretch), **bounds})

    with ThreadPoolExecutor(SESSIONS) as pool:
        list(pool.map(insert, range(SESSIONS)))


@contextmanager
def _without_indexes(connection: psycopg.Connection) -> Iterator[None]:
    keys = connection.execute(_CONSTRAINTS).fetchall()
    indexes = connection.execute(_INDEXES).fetchall()
    for drop, _ in keys + indexes:
        connection.execute(drop)
    yield
    connection.execute("SET maintenance_work_mem = '1GB'")
    for _, create in keys + indexes:
        connection.execute(create)


def _parameters(stretch: Stretch) -> dict[str, object]:
    return {
        "name": stretch.name,
        "events": stretch.events,
        "aggregates": stretch.aggregates,
        "first": stretch.first,
        "state": stretch.state,
        "namespace": stretch.namespace,
    }
