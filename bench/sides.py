"""Who is measured: this relay and its rivals, each as the processes that a user would run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from bench.harness import WrongRunError
from outbox_relay.config import Settings
from outbox_relay.embedded._process import Process
from outbox_relay.embedded.centrifugo import Centrifugo
from tests.support.redis import Redis

START_SECONDS = 20
STOP_SECONDS = 20


class OurRelay:
    """`outbox-relay run`, `processes` times, from the start of the `with` block to its end.

    `settings` are named as in `outbox_relay.config.Settings`; everything else is as shipped. Those of types and of
    namespaces are mappings, by name. `api_url` may be a proxy's in front of `server`.
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
        self._folder = tempfile.TemporaryDirectory(prefix="outbox-relay-bench-")
        file = Path(self._folder.name) / "outbox-relay.toml"
        file.write_text(_tables({name: value for name, value in own.items() if isinstance(value, Mapping)}))
        own = {"config": file} | {name: value for name, value in own.items() if not isinstance(value, Mapping)}
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
            self._folder.cleanup()
        if error is None and any(status not in {0, -signal.SIGKILL} for status in statuses):
            raise WrongRunError(f"a relay ended with {statuses}")

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Its processes do nothing inside the `with` block, and go on after it."""
        for process in self.processes:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in self.processes:
                process.send_signal(signal.SIGCONT)

    def start_another(self) -> subprocess.Popen[bytes]:
        """One process more, for instance in the place of one that was killed."""
        process = self._start()
        self.processes.append(process)
        return process

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "outbox_relay", "run"], env=self._environment, stdin=subprocess.DEVNULL
        )


def _tables(settings: Mapping[str, Mapping[str, Mapping[str, object]]]) -> str:
    """Settings by kind, name and setting, as TOML."""
    return "".join(
        f"[{kind}.{name}]\n" + "".join(f"{setting} = {json.dumps(value)}\n" for setting, value in own.items())
        for kind, by_name in settings.items()
        for name, own in by_name.items()
    )


def relay_settings(given: Mapping[str, object] | None = None) -> Mapping[str, object]:
    """What decides how fast our relay is: as shipped, or as given."""
    telling = ("workers", "parallel", "lanes", "batch_events", "request_events", "keep", "wake_up")
    shipped = {setting.name: setting.default for setting in fields(Settings) if setting.name in telling}
    return {**shipped, **(given or {})}


@dataclass(frozen=True, slots=True)
class Consumer:
    """Centrifugo's own PostgreSQL consumer, from start to end of the Centrifugo that has it in its configuration."""

    partitions: int = 1
    rows: int = 100
    """Selected at once, of one partition."""
    index: bool = False
    """Whether its table has one on (partition, id)."""
    sessions: int | None = None
    """In its pool; without a number as shipped, 4 on a small machine, however many partitions wait for one."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What it is given, in its own words."""
        return {
            "num_partitions": self.partitions,
            "partition_select_limit": self.rows,
            "index on (partition, id)": self.index,
            "pool_max_conns": self.sessions or "as shipped",
        }

    def config(self, database_url: str, **more: object) -> Mapping[str, object]:
        """An element of Centrifugo's `consumers`. `more` are other keys of its `postgresql`."""
        return {
            "name": "outbox",
            "enabled": True,
            "type": "postgresql",
            "postgresql": {
                "dsn": f"{database_url}?pool_max_conns={self.sessions}" if self.sessions else database_url,
                "outbox_table_name": "centrifugo_outbox",
                "num_partitions": self.partitions,
                "partition_select_limit": self.rows,
                **more,
            },
        }


CONSUMERS: Final[Mapping[str, Consumer]] = {
    "centrifugo-default": Consumer(),
    "centrifugo-8": Consumer(partitions=8, rows=1_000, index=True, sessions=9),
    "centrifugo-64": Consumer(partitions=64, rows=1_000, index=True, sessions=65),
}


class Benthos:
    """Benthos from a Redis list to Centrifugo's API, from the start of the `with` block to its end.

    `queue` is a Redis of its own. Of `in_flight` requests at once, more than one lose the order.
    """

    _KEY: Final = "outbox"
    _FILLING: Final = "filling"

    def __init__(self, binary: Path, queue: Redis, server: Centrifugo, *, in_flight: int) -> None:
        self._binary = binary
        self._queue = queue
        self._folder = tempfile.TemporaryDirectory(prefix="outbox-relay-benthos-")
        self._config = {
            "http": {"enabled": False},
            "logger": {"level": "INFO"},
            "metrics": {"none": {}},
            "input": {"redis_list": {"url": queue.url, "key": self._KEY}},
            "output": {
                "http_client": {
                    "url": f"{server.api_url}/publish",
                    "verb": "POST",
                    "headers": {"Content-Type": "application/json", "X-API-Key": server.api_key},
                    "max_in_flight": in_flight,
                }
            },
        }
        self._process: Process | None = None

    def __enter__(self) -> Self:
        folder = Path(self._folder.name)
        config, log = folder / "config.json", folder / "log"
        config.touch(mode=0o600)
        config.write_text(json.dumps(self._config))
        self._process = Process((self._binary, "-c", config), log=log, cwd=folder, env=os.environ, remove=folder)

        def connected() -> bool:
            said = log.read_text()
            return "Input type redis_list is now active" in said and "Output type http_client is now active" in said

        self._process.wait_until(connected, START_SECONDS, "Benthos")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            # Asked to stop, it would wait for the end of its BLPOP.
            self._process.stop(signal.SIGKILL, STOP_SECONDS)
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("Benthos was never started")
        return self._process.pid

    def prepare(self, requests: Sequence[str]) -> None:
        """Fill its list out of its sight, with bodies of `/api/publish`."""
        words = [b"RPUSH", self._FILLING.encode(), *(request.encode() for request in requests)]
        command = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
        with socket.create_connection(("127.0.0.1", self._queue.port), START_SECONDS) as connection:
            connection.sendall(command)
            answer = connection.makefile("rb").readline()
        if answer != b":%d\r\n" % len(requests):
            raise WrongRunError(f"Redis took {answer!r} of {len(requests)} requests")

    def release(self) -> None:
        """Let it see what was prepared."""
        self._queue.ask(f"RENAME {self._FILLING} {self._KEY}")
