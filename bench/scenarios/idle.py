"""Idle: what a relay costs while it has nothing to do, or can do nothing; and its memory with large payloads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg

from bench import stage
from bench.bulk import Stretch, fill, make_tables
from bench.harness import Mode, Row, Sample, Scenario
from bench.sides import OurRelay
from bench.witness import Witness
from outbox_relay.embedded.centrifugo import Centrifugo, find_or_build
from outbox_relay.embedded.postgres import Postgres

BACKLOG: Final = {"full": 10_000_000, "short": 1_000_000, "quick": 200_000}
AGGREGATES: Final = 10_000
SETTLE_SECONDS: Final = 5.0
"""Until looks and pauses have grown to their longest."""
WATCH_SECONDS: Final = 5.0

LARGE: Final = 200
LARGE_BYTES: Final = 1024 * 1024
_LARGE: Final = """
INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload)
SELECT 'order', n, 1, ARRAY['plain:large-' || n], to_json(repeat('x', %s - 2)) FROM generate_series(0, %s - 1) AS n
"""

# All statements, also those that begin and end a transaction.
_STATEMENTS: Final = """
SELECT coalesce(sum(s.calls), 0)::bigint FROM pg_stat_statements AS s JOIN pg_database AS d ON d.oid = s.dbid
WHERE d.datname = %s
"""


class Idle:
    name = "idle"
    title = "Idle, and memory"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        server = stack.enter_context(stage.postgres(shared_preload_libraries="pg_stat_statements"))
        with psycopg.connect(server.url()) as connection:
            connection.execute("CREATE EXTENSION pg_stat_statements")
        binary = find_or_build()
        yield [_large(server, binary)]
        yield _idle(server, stack, binary, BACKLOG[mode.name])


def _large(server: Postgres, binary: Path) -> Row:
    """The most memory that is ever resident while events as large as they may be are drained."""

    def fill_with_large(url: str) -> None:
        make_tables(url)
        with psycopg.connect(url) as connection:
            connection.execute(_LARGE, (LARGE_BYTES, LARGE))

    template = stage.template(server, "large", fill_with_large)
    channels = [f"plain:large-{n}" for n in range(LARGE)]

    def measure() -> Sample:
        with (
            stage.database(server, template) as url,
            stage.centrifugo(binary) as centrifugo,
            Witness(centrifugo.ws_url, channels, LARGE) as witness,
            OurRelay(url, centrifugo) as relay,
        ):
            seen = witness.wait()
            peak = stage.peak_resident(*relay.pids)
        return Sample(peak / 1e6, {"MB per second": seen.rate * LARGE_BYTES / 1e6})

    settings = {"payload bytes": LARGE_BYTES, "events": LARGE, "relay": "as shipped"}
    return Row("idle/large/us", "peak RSS while payloads of 1 MiB are drained", "MB", measure, settings)


@dataclass(frozen=True, slots=True)
class _Watch:
    """One idle relay, and the database that it alone uses."""

    server: Postgres
    database: str
    pid: int

    def __call__(self) -> Sample:
        with psycopg.connect(self.server.url(), autocommit=True) as connection:
            started, cpu, statements = time.monotonic(), _cpu(self.pid), _statements(connection, self.database)
            time.sleep(WATCH_SECONDS)
            statements = _statements(connection, self.database) - statements
            cpu = _cpu(self.pid) - cpu
            seconds = time.monotonic() - started
        figures = {"queries per second": statements / seconds, "RSS, MB": stage.resident(self.pid) / 1e6}
        return Sample(100 * cpu / seconds, figures)


def _idle(server: Postgres, stack: ExitStack, binary: Path, backlog: int) -> list[Row]:
    """Relays that run from now on and are watched in turn. Centrifugo is gone for the one that has work."""
    there = stack.enter_context(stage.centrifugo(binary))
    gone = stack.enter_context(stage.centrifugo(binary))
    gone.stop()

    def row(key: str, title: str, pending: int, centrifugo: Centrifugo, **settings: object) -> Row:
        stretch = Stretch("waiting", pending, AGGREGATES)
        database = stage.template(server, key, lambda url: fill(url, [stretch]))
        relay = stack.enter_context(OurRelay(server.url(database), centrifugo, settings))
        watch = _Watch(server, database, *relay.pids)
        return Row(key, title, "% of a core", watch, {"pending": pending, "relay": settings or "as shipped"})

    rows = [
        row("idle/outage/us", f"{backlog:,} pending, Centrifugo gone", backlog, gone, log_level="error"),
        row("idle/empty/us", "0 pending", 0, there),
        row("idle/empty/us-poll", "0 pending, without wake-up", 0, there, wake_up=False),
    ]
    time.sleep(SETTLE_SECONDS)
    return rows


def _statements(connection: psycopg.Connection, database: str) -> int:
    [(count,)] = connection.execute(_STATEMENTS, (database,)).fetchall()
    return int(count)


def _cpu(pid: int) -> float:
    """CPU seconds of a process's threads. An idle relay takes a clock tick (`stage.cpu`) in several seconds."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


SCENARIO: Scenario = Idle()
