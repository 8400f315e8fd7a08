"""Who is measured: this relay and its rivals, each as the processes that a user would run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from bench.harness import WrongRunError
from outbox_relay.embedded.centrifugo import Centrifugo

STOP_SECONDS = 20


class OurRelay:
    """`outbox-relay run`, `processes` times, from the start of the `with` block to its end.

    `settings` are named as in `outbox_relay.config.Settings`; everything else is as shipped. `api_url` may be a
    proxy's in front of `server`.
    """

    def __init__(
        self,
        database_url: str,
        server: Centrifugo,
        settings: Mapping[str, object] | None = None,
        *,
        processes: int = 1,
        api_url: str | None = None,
    ) -> None:
        own = {
            "database_url": database_url,
            "centrifugo_url": api_url or server.api_url,
            "centrifugo_api_key": server.api_key,
            "log_level": "warning",
            **(settings or {}),
        }
        foreign = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_RELAY_")}
        self._environment = foreign | {f"OUTBOX_RELAY_{name.upper()}": str(value) for name, value in own.items()}
        self._count = processes
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.processes = [self._start() for _ in range(self._count)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        try:
            statuses = [process.wait(STOP_SECONDS) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        if error is None and any(status not in {0, -signal.SIGKILL} for status in statuses):
            raise WrongRunError(f"a relay ended with {statuses}")

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "outbox_relay", "run"], env=self._environment, stdin=subprocess.DEVNULL
        )
