"""An application's database: its own rows, and beside them the tables of every side that can be written to by SQL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import psycopg

from bench import load, stage
from bench.bulk import make_tables

# An application's table that is updated a lot has room for that.
_DDL: Final = """
CREATE TABLE business (
    id bigint PRIMARY KEY,
    version bigint NOT NULL DEFAULT 0,
    status text NOT NULL DEFAULT 'placed',
    updated_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 80)
"""

NOTIFICATIONS: Final = "centrifugo_partition"
"""Where writers tell Centrifugo's consumer which partition has something new."""

STREAM_TABLES: Final = ("cf_stream", "cf_stream_meta", "cf_stream_idempotency")
"""What `cf_stream_publish` writes to."""


def make(url: str, rows: int, centrifugo: Path) -> None:
    """Make business rows with ids from 0, our tables, Centrifugo's outbox and the tables of its stream broker."""
    make_tables(url)
    with psycopg.connect(url) as connection:
        connection.execute(_DDL)
        connection.execute("INSERT INTO business (id) SELECT generate_series(0, %s - 1)", (rows,))
        connection.execute(load.CENTRIFUGO_DDL)
        connection.execute(load.CENTRIFUGO_INDEX)
    # It makes its tables when it starts.
    with stage.centrifugo(centrifugo, broker=stream_broker(url)):
        pass


def stream_broker(url: str) -> Mapping[str, Any]:
    """Centrifugo's `broker`: its PostgreSQL stream broker, which listens for NOTIFY. Everything else is as shipped."""
    return {"enabled": True, "type": "postgres", "postgres": {"dsn": url, "use_notify": True}}
