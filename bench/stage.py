"""The real servers of a measurement, with the settings that every side gets, and CPU time by process."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psycopg
from psycopg import sql

from outbox_relay.embedded.centrifugo import DEFAULT_CONFIG, Centrifugo
from outbox_relay.embedded.postgres import Postgres

Engine = Literal["memory", "redis"]

POSTGRES_SETTINGS: Mapping[str, str] = {
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "max_connections": "200",
    "track_io_timing": "off",
}
"""fsync, full_page_writes and synchronous_commit stay on, as they come. Checkpoints and memory are as on a server that
was set up for work, for all sides alike."""

NAMESPACES: tuple[Mapping[str, Any], ...] = (
    {
        "name": "hist",
        "history_size": 100,
        "history_ttl": "600s",
        "allow_subscribe_for_client": True,
        "allow_subscribe_for_anonymous": True,
    },
    {"name": "plain", "allow_subscribe_for_client": True, "allow_subscribe_for_anonymous": True},
)


def postgres(**settings: str) -> Postgres:
    """A PostgreSQL that has not been started, fsync on."""
    return Postgres(fsync=True, settings={**POSTGRES_SETTINGS, **settings})


def centrifugo(
    binary: Path, *, redis_url: str | None = None, consumers: list[Mapping[str, Any]] | None = None, **more: Any
) -> Centrifugo:
    """A Centrifugo that has not been started: memory engine, or Redis where `redis_url` is given.

    A subscriber's queue may grow to 512 MiB, so that no side is stopped by the witness, which is not pinged either: it
    would have to look for pings in what it keeps unread. `more` are top-level keys.
    """
    client = {
        **DEFAULT_CONFIG["client"],
        "queue_max_size": 512 * 1024 * 1024,
        "channel_limit": 20_000,
        "ping_interval": "24h",
    }
    config: dict[str, Any] = {"client": client, "channel": {"namespaces": list(NAMESPACES)}, **more}
    if redis_url is not None:
        config["engine"] = {"type": "redis", "redis": {"address": redis_url}}
    if consumers:
        config["consumers"] = list(consumers)
    return Centrifugo(binary, config=config)


@contextmanager
def database(server: Postgres, template: str) -> Iterator[str]:
    """A copy of a template database, as its URL; dropped afterwards. The template must have no sessions."""
    name = f"bench_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
        # The copy is on disk, and this checkpoint is not one of the run.
        connection.execute("CHECKPOINT")
        try:
            yield server.url(name)
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def template(server: Postgres, name: str, fill: Callable[[str], None]) -> str:
    """Make a database to be copied: `fill` gets its URL. It is vacuumed, so that no run pays for it."""
    url = server.create_database(name)
    fill(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE, FREEZE)")
    return name


_TICKS = os.sysconf("SC_CLK_TCK")


def cpu(*roots: int) -> float:
    """CPU seconds, user and system, of these processes and all below them, those included that were waited for."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(folder.name)] = int(fields[1])
            ticks[int(folder.name)] = sum(map(int, fields[11:15]))
    total = 0
    for pid, spent in ticks.items():
        ancestor = pid
        while ancestor not in roots and ancestor in parents:
            ancestor = parents[ancestor]
        if ancestor in roots:
            total += spent
    return total / _TICKS


def resident(pid: int) -> int:
    """Resident memory of one process, in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident(pid: int) -> int:
    """The most memory of one process that was ever resident, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
