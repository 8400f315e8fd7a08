"""A longer way to a server: a TCP proxy that holds every byte for a fixed time, in each direction.

`python -m bench.delay` is a process of its own. Latency is all it adds: bandwidth is unlimited, nothing is lost, order
is kept. A connection is made at once, so that only what travels on it is late, as on one that is kept alive.
"""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, NamedTuple, Self
from urllib.parse import urlsplit

_READ_BYTES: Final = 1 << 18
_START_SECONDS: Final = 10.0


class DelayProxy:
    """A proxy in front of `url`, from the start of the `with` block to its end; `self.url` leads through it.

    `round_trip` is in seconds: half of it is spent on the way there, half on the way back.
    """

    def __init__(self, url: str, round_trip: float) -> None:
        target = urlsplit(url)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.delay", str(target.hostname), str(target.port), str(round_trip / 2)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], _START_SECONDS)
        port = self._process.stdout.readline().decode().strip() if readable else ""
        if not port:
            self._end()
            raise RuntimeError("the delay proxy did not start")
        self.pid = self._process.pid
        self.url = target._replace(netloc=f"127.0.0.1:{port}").geturl()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@dataclass(eq=False, slots=True)
class _End:
    """One end of a connection, the client's or the server's."""

    socket: socket.socket
    peer: _End | None = None
    stuck: deque[memoryview] = field(default_factory=deque)
    """What is due and does not fit into the socket yet."""
    ended: bool = False
    """Nothing more comes from it."""

    @property
    def closed(self) -> bool:
        return self.socket.fileno() < 0


class _Late(NamedTuple):
    due: float
    end: _End
    data: bytes
    """Empty when the peer has closed."""


class _Proxy:
    """All connections, in one thread. A connection that either end closes is closed, as is usual with HTTP."""

    def __init__(self, target: tuple[str, int], delay: float) -> None:
        self._target = target
        self._delay = delay
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(sys.stdin, select.EPOLLIN)
        self._ends: dict[int, _End] = {}
        # All bytes wait equally long, so what came first is due first.
        self._late: deque[_Late] = deque()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def run(self) -> None:
        """Carry bytes until standard input ends: whoever started this has gone then."""
        while True:
            left = max(0.0, self._late[0].due - time.monotonic()) if self._late else None
            # The timeout of epoll itself is in whole milliseconds, that of select in microseconds.
            select.select([self._epoll], [], [], left)
            for number, events in self._epoll.poll(0):
                if number == sys.stdin.fileno():
                    return
                if number == self._listener.fileno():
                    self._accept()
                elif end := self._ends.get(number):
                    if events & select.EPOLLOUT:
                        self._write(end)
                    if events & ~select.EPOLLOUT:
                        self._read(end)
            now = time.monotonic()
            while self._late and self._late[0].due <= now:
                _, end, data = self._late.popleft()
                self._deliver(end, data)

    def _accept(self) -> None:
        client = _End(self._listener.accept()[0])
        try:
            server = _End(socket.create_connection(self._target), client)
        except OSError:
            client.socket.close()
            return
        client.peer = server
        for end in (client, server):
            end.socket.setblocking(False)
            end.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._ends[end.socket.fileno()] = end
            self._epoll.register(end.socket, select.EPOLLIN)

    def _read(self, end: _End) -> None:
        try:
            data = end.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            end.ended = True
            self._epoll.unregister(end.socket)
        assert end.peer is not None
        self._late.append(_Late(time.monotonic() + self._delay, end.peer, data))

    def _deliver(self, end: _End, data: bytes) -> None:
        end.stuck.append(memoryview(data))
        if len(end.stuck) == 1 and not end.closed:
            self._write(end)

    def _write(self, end: _End) -> None:
        """Write what is due, as far as the socket takes it, and ask to be told when it takes more."""
        try:
            while end.stuck:
                data = end.stuck[0]
                if not data:
                    self._close(end)
                    return
                sent = end.socket.send(data)
                if sent < len(data):
                    end.stuck[0] = data[sent:]
                else:
                    end.stuck.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._close(end)
            return
        if not end.ended:
            self._epoll.modify(end.socket, select.EPOLLIN | (select.EPOLLOUT if end.stuck else 0))

    def _close(self, end: _End) -> None:
        for each in (end, end.peer):
            assert each is not None
            del self._ends[each.socket.fileno()]
            each.socket.close()


def _main() -> None:
    host, port, delay = sys.argv[1:]
    proxy = _Proxy((host, int(port)), float(delay))
    sys.stdout.write(f"{proxy.port}\n")
    sys.stdout.flush()
    proxy.run()


if __name__ == "__main__":
    _main()
