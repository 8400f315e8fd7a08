"""A TCP proxy, to stand between a relay and a server: watch what goes through, hold it, slow it down, or cut it off."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
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
        self._flowing = threading.Event()
        self._flowing.set()
        self._cut_after: bytes | None = None
        self._drip = 0
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
        self._flowing.set()
        for thread in list(self._threads):
            thread.join(PATIENCE)

    def cut(self) -> None:
        """End every connection, and every new one until `mend`."""
        with self._lock:
            self._open = False
            for connection in self._sockets:
                _end(connection)

    def mend(self) -> None:
        with self._lock:
            self._open = True
            self._drip = 0
        self._flowing.set()

    def stall(self) -> None:
        """Keep every connection open and pass nothing on until `mend`."""
        self._flowing.clear()

    def drip(self, chunk: int) -> None:
        """Pass on `chunk` bytes at a time, a hundred times a second, until `mend`."""
        self._drip = chunk

    def cut_after(self, text: bytes) -> None:
        """Pass the next message of a client that holds `text` on, and cut everything before it is answered."""
        self._cut_after = text

    @property
    def armed(self) -> bool:
        """Whether what `cut_after` waits for has not come yet."""
        return self._cut_after is not None

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
            self._spawn(self._connect, client, server)

    def _connect(self, client: socket.socket, server: socket.socket) -> None:
        back = threading.Thread(target=self._pump, args=(server, client, self._watch_server), daemon=True)
        back.start()
        self._pump(client, server, self._watch_client)
        back.join()
        with self._lock:
            self._sockets -= {client, server}
            self._threads.remove(threading.current_thread())
        client.close()
        server.close()

    def _watch_client(self, _total: int, data: bytes) -> bool:
        """Whether the client hears nothing more after this."""
        with self._lock:
            if self._cut_after is None or self._cut_after not in data:
                return False
            self._cut_after = None
            return True

    def _watch_server(self, total: int, _data: bytes) -> bool:
        self._on_received(total)
        return False

    def _pump(self, source: socket.socket, sink: socket.socket, watch: Callable[[int, bytes], bool]) -> None:
        total = 0
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                total += len(data)
                if watch(total, data):
                    _end(source)
                self._pass_on(data, sink)
            sink.shutdown(socket.SHUT_WR)
            return
        # One end broke: so does the other, which lets the pump of the other direction end too.
        _end(source)
        _end(sink)

    def _pass_on(self, data: bytes, sink: socket.socket) -> None:
        self._flowing.wait()
        while data and (chunk := self._drip):
            sink.sendall(data[:chunk])
            data = data[chunk:]
            time.sleep(0.01)
        sink.sendall(data)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
