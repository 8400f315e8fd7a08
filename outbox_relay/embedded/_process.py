"""Processes that die with ours, free ports, and the error of this package."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PORT_TRIES = 5


class EmbeddedError(RuntimeError):
    """A real server could not be found, built or started. The message says why and what to do."""


class Process:
    """A running server that ends when this process ends, however it ends: `kill -9` included.

    `log` receives its standard output and error, appended. `user` is the (uid, gid) to run it as. Once this
    process has gone without stopping it, it gets `orphan_signal`, and the folder `remove` is deleted.
    It lives in a session of its own: Ctrl-C reaches only this process, which then stops its servers in order.
    Any thread may start it, and may end before it does.

    Raises EmbeddedError if the program cannot be executed.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        cwd: Path,
        env: Mapping[str, str],
        user: tuple[int, int] | None = None,
        orphan_signal: signal.Signals = signal.SIGKILL,
        remove: Path | None = None,
    ) -> None:
        program = [str(part) for part in command]
        spec = {
            "command": program,
            "user": user,
            "orphan_signal": orphan_signal,
            "remove": None if remove is None else str(remove),
        }
        supervisor = Path(__file__).with_name("_supervisor.py")
        self._log = log
        with log.open("ab") as output:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(supervisor), json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=cwd,
                env=env,
                start_new_session=True,
            )
        pid = self._supervisor.stdout.readline() if self._supervisor.stdout else b""
        if not pid:
            self.wait(None)
            raise EmbeddedError(f"could not execute {program[0]}\n{tail(log)}")
        self.pid = int(pid)

    def alive(self) -> bool:
        """Whether the server still runs; a stopped (paused) one does."""
        return self._supervisor.poll() is None

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the server itself. Does nothing once it has ended."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, seconds: float | None) -> int | None:
        """The server's exit status (128 + N for signal N), or None if it still runs after `seconds`."""
        try:
            status = self._supervisor.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        for pipe in (self._supervisor.stdin, self._supervisor.stdout):
            if pipe is not None:
                pipe.close()
        return status

    def stop(self, number: signal.Signals, seconds: float) -> None:
        """Ask it to end with a signal, kill it after `seconds`; returns once it has ended."""
        self.send_signal(number)
        if self.wait(seconds) is None:
            self.send_signal(signal.SIGKILL)
            self.wait(None)

    def wait_until(self, ready: Callable[[], bool], seconds: float, name: str) -> None:
        """Poll `ready` until it is true.

        Raises EmbeddedError, with the end of the log, if the server ends or is not ready after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.alive():
                raise EmbeddedError(f"{name} ended with status {self.wait(None)}\n{tail(self._log)}")
            if time.monotonic() > deadline:
                raise EmbeddedError(f"{name} was not ready after {seconds:g} s\n{tail(self._log)}")
            time.sleep(0.01)


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log file; an empty string where there is none."""
    try:
        text = log.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now.

    It lies below the kernel's range for outgoing connections. A port of that range can be lost between a
    crash and a restart: to any client, even to one that dials the dead port and so is connected to itself.
    """
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def on_free_ports(count: int, launch: Callable[[list[int]], None]) -> list[int]:
    """Call `launch` with free ports, with others if one is lost meanwhile; returns those it kept."""
    for tries_left in reversed(range(PORT_TRIES)):
        ports = [free_port() for _ in range(count)]
        try:
            launch(ports)
        except EmbeddedError as error:
            if not tries_left or "in use" not in str(error):
                raise
        else:
            break
    return ports
