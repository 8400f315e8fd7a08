"""An HTTP server in front of Centrifugo's API that hears every request, and on demand does what no healthy one does.

Without a `fault` it is a window: requests go through to the real Centrifugo and its replies come back unchanged.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from tests.support.waiting import PATIENCE, wait_until


class Command(NamedTuple):
    """One publication of one request, as the relay asked for it. A bundle has no aggregate; its version is 0.

    `events` are what it carries, more than one in a bundle: each event's id, and whether it is the event's gap.
    """

    channels: tuple[str, ...]
    key: str
    aggregate: tuple[str, str]
    version: int
    kind: str
    events: tuple[tuple[str, bool], ...]


class Exchange:
    """One request under way. A fault reads `commands`, and answers or does not."""

    def __init__(self, gateway: Gateway, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self._gateway = gateway
        self._handler = handler
        self.path = handler.path
        self.headers = handler.headers
        self.number = 0
        self.body = body
        self.commands = [_command(command) for command in json.loads(body)["commands"]]

    def forward(self) -> tuple[int, bytes]:
        """What the real Centrifugo answers."""
        upstream = urlsplit(self._gateway.upstream)
        connection = HTTPConnection(upstream.hostname or "", upstream.port, timeout=PATIENCE)
        try:
            headers = {"X-API-Key": self.headers["X-API-Key"], "Content-Type": "application/json"}
            connection.request("POST", f"/api{self.path.rpartition('/api')[2]}", self.body, headers)
            response = connection.getresponse()
            status, body = response.status, response.read()
        finally:
            connection.close()
        self._gateway.executed(self, status, body)
        return status, body

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        if not self._client_has_left():
            self._gateway.answering(self, status)
        self._handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self._handler.send_header(name, value)
        self._handler.end_headers()
        self._handler.wfile.write(body)

    def write(self, data: bytes) -> None:
        """Bytes as they are, in place of an answer or of a part of one."""
        self._handler.wfile.write(data)

    def reset(self) -> None:
        """Break the connection off with a RST, unanswered."""
        self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.hang_up()

    def hang_up(self) -> None:
        """Close the connection."""
        self._handler.close_connection = True
        self._handler.connection.close()

    def _client_has_left(self) -> bool:
        """Whether the relay has closed the connection: then an answer comes to nobody."""
        connection = self._handler.connection
        try:
            return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def wait_for_client_to_leave(self) -> None:
        """Say nothing until the relay has given up."""
        self._handler.connection.settimeout(PATIENCE)
        self._handler.connection.recv(1)
        self._handler.close_connection = True


Fault = Callable[[Exchange], None]


class Gateway:
    """`url` is for the relay; `upstream` the real Centrifugo's API. `fault`, while set, answers in its place."""

    def __init__(self, upstream: str, fault: Fault | None = None) -> None:
        self.upstream = upstream
        self.fault = fault
        self.heard_at: list[float] = []
        self._requests: list[list[Command]] = []
        self._lock = threading.Lock()
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                gateway._take(Exchange(gateway, self, body))

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class named it
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a relay that was killed or has given up hangs up in the middle

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def requests(self) -> list[list[Command]]:
        """Every request heard so far that carried events, in order of arrival."""
        with self._lock:
            return list(self._requests)

    @property
    def commands(self) -> list[Command]:
        return [command for request in self.requests for command in request]

    def wait_for_requests(self, count: int, seconds: float = PATIENCE) -> None:
        wait_until(lambda: len(self.requests) >= count, f"{count} requests at the gateway", seconds)

    def heard(self, exchange: Exchange) -> None:
        """A request has arrived. Called by several threads, as are `executed` and `answering`."""
        with self._lock:
            self._requests.append(exchange.commands)
            self.heard_at.append(time.monotonic())

    def executed(self, exchange: Exchange, status: int, body: bytes) -> None:
        """Centrifugo has answered a request."""

    def answering(self, exchange: Exchange, status: int) -> None:
        """The relay is about to be answered, and has not given up."""

    def _take(self, exchange: Exchange) -> None:
        self.heard(exchange)
        fault = self.fault
        if fault is None:
            exchange.answer(*exchange.forward())
        else:
            fault(exchange)


def _command(command: dict[str, Any]) -> Command:
    [request] = command.values()
    tags = request["tags"]
    carried = [entry["tags"] for entry in request["data"]["ob"]] if "ob_bundle" in tags else [tags]
    return Command(
        tuple(request.get("channels") or [request["channel"]]),
        request["idempotency_key"],
        (tags.get("ob_type", ""), tags.get("ob_id", "")),
        int(tags.get("ob_version", 0)),
        tags.get("ob_kind", "bundle"),
        tuple((own.get("ob_event", ""), own.get("ob_kind") == "gap") for own in carried),
    )


def refuse(code: int, chosen: Callable[[Command], bool]) -> Fault:
    """Refuse the chosen events alone with Centrifugo's error `code`; the real one answers for the others.

    A real Centrifugo with its memory engine refuses whole namespaces, never one event among its like.
    """

    def fault(exchange: Exchange) -> None:
        request = json.loads(exchange.body)
        passed = [
            raw for raw, command in zip(request["commands"], exchange.commands, strict=True) if not chosen(command)
        ]
        exchange.body = json.dumps(request | {"commands": passed}).encode()
        status, body = exchange.forward()
        answers = iter(json.loads(body).get("replies", []))
        error = {"error": {"code": code, "message": "refused by the stand-in"}}
        replies = [error if chosen(command) else next(answers) for command in exchange.commands]
        exchange.answer(status, json.dumps({"replies": replies}).encode())

    return fault


def drip(exchange: Exchange) -> None:
    """An answer whose bytes arrive one by one, each within any time-out of a single read."""
    exchange.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(100_000):
        exchange.write(b" ")
        time.sleep(0.02)
