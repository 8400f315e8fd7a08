"""A small application: orders in a database, each change with its event; and the state that its pages load."""

from __future__ import annotations

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

import psycopg
from psycopg.types.json import Json

CONTENT_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".mjs": "text/javascript"}


class Order(NamedTuple):
    version: int
    status: str


class Shop:
    """`save` and `delete` change an order and write its event, a snapshot or a tombstone, in one transaction."""

    def __init__(self, database_url: str, channel: str) -> None:
        self.database_url = database_url
        self.channel = channel
        self.epoch: str | None = None
        with self._connect() as connection:
            connection.execute(
                "CREATE TABLE orders (id text PRIMARY KEY, version bigint NOT NULL, status text NOT NULL)"
            )
            connection.execute("CREATE TABLE graves (id text PRIMARY KEY, version bigint NOT NULL)")

    def save(self, id_: str, status: str) -> int:
        """Place an order or move one on; one that was deleted goes on above its tombstone."""
        with self._connect() as connection:
            row = connection.execute(
                "INSERT INTO orders"
                " SELECT %(id)s, coalesce(max(version), 0) + 1, %(status)s FROM graves WHERE id = %(id)s"
                " ON CONFLICT (id) DO UPDATE SET version = orders.version + 1, status = %(status)s RETURNING version",
                {"id": id_, "status": status},
            ).fetchone()
            assert row is not None
            self._write(connection, id_, row[0], "snapshot", {"id": id_, "version": row[0], "status": status})
            version: int = row[0]
            return version

    def delete(self, id_: str) -> None:
        with self._connect() as connection:
            row = connection.execute(
                "WITH gone AS (DELETE FROM orders WHERE id = %s RETURNING id, version + 1 AS version)"
                " INSERT INTO graves SELECT * FROM gone ON CONFLICT (id) DO UPDATE SET version = excluded.version"
                " RETURNING version",
                (id_,),
            ).fetchone()
            assert row is not None, f"no order {id_}"
            self._write(connection, id_, row[0], "tombstone", {})

    def rows(self, ids: list[str] | None = None) -> dict[str, Order]:
        """The orders, or those of them, as the database has them."""
        with self._connect() as connection:
            rows = connection.execute(
                "SELECT id, version, status FROM orders WHERE %(ids)s::text[] IS NULL OR id = ANY(%(ids)s)",
                {"ids": ids},
            )
            return {id_: Order(version, status) for id_, version, status in rows}

    def state(self, ids: list[str] | None = None) -> dict[str, Any]:
        """What a page loads."""
        objects = [{"id": id_, **order._asdict()} for id_, order in self.rows(ids).items()]
        return {"epoch": self.epoch, "objects": objects}

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.database_url)

    def _write(self, connection: psycopg.Connection[Any], id_: str, version: int, kind: str, payload: Any) -> None:
        connection.execute(
            "INSERT INTO outbox (aggregate_type, aggregate_id, version, kind, channels, payload)"
            " VALUES ('order', %s, %s, %s, %s, %s)",
            (id_, version, kind, [self.channel], Json(payload)),
        )


class Website:
    """Serves `/orders?ids=1,2` (no ids: all) and files, on 127.0.0.1. While `failing` the state is not to be had."""

    def __init__(self, shop: Shop, files: dict[str, bytes | Path] | None = None) -> None:
        self.failing = False
        self.requests: list[list[str] | None] = []
        website = self
        served = files or {}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                address = urlsplit(self.path)
                if address.path == "/orders":
                    ids = parse_qs(address.query).get("ids", [""])[0]
                    keys = ids.split(",") if ids else None
                    website.requests.append(keys)
                    if website.failing:
                        self.send_error(HTTPStatus.SERVICE_UNAVAILABLE)
                    else:
                        self._send(json.dumps(shop.state(keys)).encode(), "application/json")
                elif (file := served.get(address.path)) is not None:
                    body = file if isinstance(file, bytes) else file.read_bytes()
                    self._send(body, CONTENT_TYPES[Path(address.path).suffix or ".html"])
                else:
                    self.send_error(HTTPStatus.NOT_FOUND)

            def _send(self, body: bytes, content_type: str) -> None:
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="website", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
