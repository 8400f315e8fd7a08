"""A gateway between the relay and Centrifugo that does what networks do: it holds requests, and repeats old ones."""

from __future__ import annotations

import json
import threading
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

TIMEOUT: Final = 30.0


class Gateway:
    """Serves 127.0.0.1 from the start of the `with` block to its end; `url` is the API's base for the relay.

    While `open` is not set, requests wait, also those that the relay has given up. While `repeat` is set, each of them
    reaches Centrifugo once more, that many seconds after it was answered: under no idempotency key, or Centrifugo would
    drop the copy. `held` and `repeated` count requests.
    """

    def __init__(self, upstream: str) -> None:
        self.open = threading.Event()
        self.open.set()
        self.repeat = 0.0
        self.held = 0
        self.repeated = 0
        self._copies: list[threading.Thread] = []
        self._upstream = urlsplit(upstream)
        self._closing = threading.Event()
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                gateway.held += not gateway.open.is_set()
                gateway.open.wait()
                repeat = gateway.repeat  # before others see what comes of the request, and change it
                headers = {"X-API-Key": self.headers["X-API-Key"] or "", "Content-Type": "application/json"}
                try:
                    status, answer = gateway._forward(self.path, body, headers)
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                except (OSError, HTTPException):
                    self.close_connection = True  # Centrifugo has gone, or the relay has
                    return
                if repeat and self.path.endswith("/batch"):
                    gateway._copy_later(self.path, body, headers, repeat)

            def log_message(self, *_args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}{self._upstream.path}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="gateway", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self.open.set()
        self._server.shutdown()
        self._server.server_close()

    def wait_repeated(self) -> None:
        """Return once every copy that is due has been sent."""
        while self._copies:
            self._copies.pop().join()

    def _forward(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        connection = HTTPConnection(self._upstream.hostname or "", self._upstream.port, timeout=TIMEOUT)
        try:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _copy_later(self, path: str, body: bytes, headers: dict[str, str], seconds: float) -> None:
        copy = threading.Thread(target=self._copy, args=(path, body, headers, seconds), daemon=True)
        self._copies.append(copy)
        copy.start()

    def _copy(self, path: str, body: bytes, headers: dict[str, str], seconds: float) -> None:
        batch = json.loads(body)
        for command in batch["commands"]:
            for request in command.values():
                request.pop("idempotency_key", None)
        if self._closing.wait(seconds):
            return
        try:
            self._forward(path, json.dumps(batch).encode(), headers)
            self.repeated += 1
        except (OSError, HTTPException):
            return  # Centrifugo is being killed: the copy is lost with it
