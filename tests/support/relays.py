"""Relays to test: threads of this process, and processes of their own that can be killed and frozen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from outbox_relay.runner import Ended, Relay
from tests.support.waiting import PATIENCE, wait_until


def drain(relay: Relay, seconds: float = PATIENCE) -> Ended:
    """Run a relay until nothing is left that it could send now; fail if that takes longer than `seconds`."""
    alarm = threading.Timer(seconds, relay.stop)
    alarm.start()
    try:
        ended = relay.run(until_empty=True)
    finally:
        alarm.cancel()
        alarm.join()
    if ended not in {Ended.EMPTY, Ended.ONLY_HELD}:
        raise AssertionError(f"the relay did not drain the outbox within {seconds:g} s: {ended}")
    return ended


class RelayProcess:
    """`python -m outbox_relay run`, or another `command`. Output goes to a file: a full pipe cannot block it."""

    def __init__(self, folder: Path, settings: Mapping[str, object], command: Sequence[str] | None = None) -> None:
        own = {f"OUTBOX_RELAY_{name.upper()}": str(value) for name, value in settings.items()}
        self.output_path = folder / f"relay-{os.urandom(4).hex()}.log"
        with self.output_path.open("wb") as output:
            self._process = subprocess.Popen(
                command or [sys.executable, "-m", "outbox_relay", "run"],
                env=_foreign_environment() | own,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    @property
    def log(self) -> list[dict[str, Any]]:
        """The JSON lines of the log written so far."""
        return [json.loads(line) for line in self.output.splitlines() if line.startswith("{") and line.endswith("}")]

    def said(self, event: str) -> int:
        """How often the log has a line of this event."""
        return sum(line.get("event") == event for line in self.log)

    def wait_for(self, event: str, seconds: float = PATIENCE) -> None:
        wait_until(lambda: self.said(event), f"the relay logs {event!r}, in {self.output_path}", seconds)

    def alive(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def freeze(self) -> None:
        """SIGSTOP; returns once it stands still."""
        self.signal(signal.SIGSTOP)
        wait_until(self.is_stopped, "the relay is stopped")

    def is_stopped(self) -> bool:
        """Whether it stands still after a SIGSTOP, its own or ours."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def terminate(self) -> int:
        """SIGTERM, and the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit status, -N for signal N; fails if it still runs after `seconds`."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the relay still runs after {seconds:g} s:\n{self.output}") from None

    def kill(self) -> None:
        """SIGKILL; returns once it is dead."""
        self._process.kill()
        self._process.wait()

    def peak_memory(self) -> int:
        """The most memory that was ever resident, in bytes."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the relay has ended")


def _foreign_environment() -> dict[str, str]:
    """Our own environment without what would configure a relay."""
    return {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_RELAY_")}
