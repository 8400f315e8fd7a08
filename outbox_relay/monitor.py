"""A small HTTP server beside a relay: `/metrics` for Prometheus, `/live` and `/ready` for whoever restarts and routes.

It has no authentication, so it listens where it is told and nowhere else, and what it says holds nothing of an
event and no address.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import orjson
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from outbox_relay.health import Health
from outbox_relay.log import get_logger

log = get_logger()

CLIENT_TIMEOUT: Final = 5.0
CLIENTS: Final = 100
"""Connections at a time; one more is closed unheard. Each costs a thread."""


class Answer(NamedTuple):
    status: HTTPStatus
    content_type: str
    body: bytes


Page = Callable[[str], Answer]
"""Takes the request's Accept header."""


class Monitor:
    """Listens on `host` and `port` (0: a free one) once it is made, answers inside the `with` block.

    Raises OSError if it cannot listen there.
    """

    def __init__(self, host: str, port: int, metrics: CollectorRegistry, health: Callable[[], Health]) -> None:
        pages: dict[str, Page] = {
            "/metrics": lambda accept: _metrics(metrics, accept),
            "/live": lambda _: _live(health()),
            "/ready": lambda _: _ready(health()),
        }
        self._server = _Server(host, port, pages)
        self._thread = threading.Thread(target=self._server.serve_forever, name="outbox-relay-monitor", daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port = self._server.socket.getsockname()[:2]
        return host, port

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _metrics(metrics: CollectorRegistry, accept: str) -> Answer:
    encode, content_type = choose_encoder(accept)
    return Answer(HTTPStatus.OK, content_type, encode(metrics))


def _live(health: Health) -> Answer:
    return _verdict("live", None if health.live else "frozen", health.frozen)


def _ready(health: Health) -> Answer:
    concerned = {"frozen": health.frozen, "database": health.without_database}
    return _verdict("ready", health.obstacle, concerned.get(health.obstacle or "", []))


def _verdict(name: str, obstacle: str | None, workers: list[int]) -> Answer:
    """200 and `{"ready": true}`; or 503 with the reason, and the numbers of the workers that it is about."""
    said: dict[str, Any] = {name: obstacle is None}
    if obstacle is not None:
        said["reason"] = obstacle
    if workers:
        said["workers"] = workers
    status = HTTPStatus.OK if obstacle is None else HTTPStatus.SERVICE_UNAVAILABLE
    return Answer(status, "application/json", orjson.dumps(said))


class _Server(ThreadingTCPServer):
    # Not HTTPServer: it asks the DNS for its own name.
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    # With the 5 of socketserver, clients that come together wait for seconds in TCP's retries.
    request_queue_size = CLIENTS

    def __init__(self, host: str, port: int, pages: Mapping[str, Page]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._room = threading.BoundedSemaphore(CLIENTS)
        super().__init__((host, port), partial(_Handler, pages))

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - socketserver's signature
        """Log what went wrong, but for a client that went away."""
        if not isinstance(sys.exception(), OSError):
            log.exception("metrics: a page failed")


class _Handler(BaseHTTPRequestHandler):
    server_version = "outbox-relay"
    sys_version = ""
    timeout = CLIENT_TIMEOUT

    def __init__(self, pages: Mapping[str, Page], *request: Any) -> None:
        self._pages = pages
        super().__init__(*request)

    def do_GET(self) -> None:
        page = self._pages.get(self.path.partition("?")[0])
        if page is None:
            answer = Answer(HTTPStatus.NOT_FOUND, "text/plain", b"there are /metrics, /live and /ready\n")
        else:
            answer = page(self.headers.get("Accept", ""))
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Probes come every few seconds: not worth a line."""
