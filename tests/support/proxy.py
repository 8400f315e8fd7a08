"""A TCP proxy, to stand between a relay and a server: watch what goes through, or cut it off."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tests.support.waiting import PATIENCE

_CHUNK = 64 * 1024


class TcpProxy:
    """Listens on `port` and passes bytes both ways. `on_received` hears how many bytes a client was sent so far."""

    def __init__(self, host: str, port: int, on_received: Callable[[int], None] = lambda _total: None) -> None:
        self._target = host, port
        self._on_received = on_received
        self._open = True
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._spawn(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE)
        for connection in self._sockets:
            connection.close()

    def cut(self) -> None:
        """End every connection, and every new one until `mend`."""
        with self._lock:
            self._open = False
            for connection in self._sockets:
                _end(connection)

    def mend(self) -> None:
        with self._lock:
            self._open = True

    def _spawn(self, target: Callable[..., None], *arguments: socket.socket | Callable[[int], None]) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if not self._open:
                    _end(client)
                    client.close()
                    continue
                try:
                    server = socket.create_connection(self._target, PATIENCE)
                except OSError:
                    client.close()
                    continue
                server.settimeout(None)
                self._sockets |= {client, server}
            self._spawn(self._pump, client, server, lambda _total: None)
            self._spawn(self._pump, server, client, self._on_received)

    def _pump(self, source: socket.socket, sink: socket.socket, passed: Callable[[int], None]) -> None:
        total = 0
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                total += len(data)
                passed(total)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
            return
        # One end broke: so does the other, which lets the pump of the other direction end too.
        _end(source)
        _end(sink)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
