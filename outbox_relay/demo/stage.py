"""The servers and relays of the demo, and the harm that is done to them."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol, Self

import sqlalchemy as sa

from outbox_relay.demo.shop import WRITERS, Base
from outbox_relay.embedded._process import Process, tail
from outbox_relay.embedded.centrifugo import Centrifugo, find_or_build
from outbox_relay.embedded.postgres import Postgres
from outbox_relay.migrations import migrate

CYCLE: Final = 20.0
START_SECONDS: Final = 30
STOP_SECONDS: Final = 15


class Relay:
    """One `outbox-relay run`, to be killed and started again. It dies with this process."""

    def __init__(self, name: str, environment: dict[str, str], folder: Path) -> None:
        self.name = name
        self._environment = environment
        self._folder = folder
        self._log = folder / f"{name}.log"
        self._process: Process | None = None
        self._said_before = 0

    @property
    def pid(self) -> int | None:
        """The process id, or None where it does not run."""
        process = self._process  # read once: the view asks from another thread
        return process.pid if process is not None and process.alive() else None

    @property
    def failure(self) -> str | None:
        """The last line of its log if it ended without being asked to."""
        if self._process is None or self._process.alive():
            return None
        return f"{self.name} ended by itself: {tail(self._log, 1)}"

    def start(self) -> None:
        self._said_before = self._log.stat().st_size if self._log.exists() else 0
        self._process = Process(
            [sys.executable, "-m", "outbox_relay", "run"],
            log=self._log,
            cwd=self._folder,
            env=self._environment,
            remove=self._folder,
        )

    def wait_started(self) -> None:
        """Return once it works. Raises EmbeddedError, with the end of its log."""
        if self._process is not None:
            self._process.wait_until(self._says_started, START_SECONDS, self.name)

    def _says_started(self) -> bool:
        return b"relay started" in self._log.read_bytes()[self._said_before :]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal it and return once it has ended."""
        if self._process is not None:
            self._process.stop(number, STOP_SECONDS)
            self._process = None


class Front(Protocol):
    """What stands between the relays and Centrifugo."""

    @property
    def url(self) -> str: ...


class Stage:
    """PostgreSQL, Centrifugo and two relays, from the start of the `with` block to its end.

    `tell` hears of everything that is done to them. `front` makes what the relays talk to in place of Centrifugo's
    API, whose address it gets; `settings` are the relays' own, by name, `config` Centrifugo's, by top-level key. Raises
    EmbeddedError if one of them cannot be started.
    """

    engine: sa.Engine
    database_url: str
    centrifugo: Centrifugo
    relays: tuple[Relay, Relay]

    def __init__(
        self,
        tell: Callable[[str], None],
        *,
        front: Callable[[str], AbstractContextManager[Front]] | None = None,
        settings: Mapping[str, object] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._front = front
        self._config = config
        self._settings = settings or {}
        self.centrifugo_runs = False
        self.relay_kills = 0
        self.centrifugo_kills = 0
        self._tell = tell
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            binary = find_or_build(self._tell)
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="outbox-relay-demo-")))
            postgres = cleanup.enter_context(Postgres())
            self._tell(f"PostgreSQL: process {postgres.pid}, port {postgres.port}")
            self.database_url = postgres.url()
            self.engine = sa.create_engine(
                sa.make_url(self.database_url).set(drivername="postgresql+psycopg"), pool_size=WRITERS + 2
            )
            cleanup.callback(self.engine.dispose)
            migrate(self.engine)
            Base.metadata.create_all(self.engine)
            self.centrifugo = cleanup.enter_context(Centrifugo(binary, config=self._config))
            self.centrifugo_runs = True
            self._tell(f"Centrifugo: process {self.centrifugo.pid}, port {self.centrifugo.ports[0]}")
            api_url = self.centrifugo.api_url
            if self._front is not None:
                api_url = cleanup.enter_context(self._front(api_url)).url
            environment = _environment(self.database_url, api_url, self.centrifugo.api_key, self._settings)
            self.relays = (Relay("relay A", environment, folder), Relay("relay B", environment, folder))
            cleanup.callback(self._stop_relays)
            for relay in self.relays:
                relay.start()
            for relay in self.relays:
                relay.wait_started()
                self._tell(f"{relay.name}: process {relay.pid}")
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _stop_relays(self) -> None:
        for relay in self.relays:
            relay.stop()

    def kill_relay(self, number: int) -> None:
        relay = self.relays[number]
        self._tell(f"{relay.name}: SIGKILL to process {relay.pid}")
        relay.stop(signal.SIGKILL)
        self.relay_kills += 1

    def start_relay(self, number: int) -> None:
        relay = self.relays[number]
        relay.start()
        self._tell(f"{relay.name}: started again, process {relay.pid}")

    def kill_centrifugo(self) -> None:
        self._tell(f"Centrifugo: SIGKILL to process {self.centrifugo.pid}, its memory is gone")
        self.centrifugo_runs = False
        self.centrifugo.kill()
        self.centrifugo_kills += 1

    def start_centrifugo(self) -> None:
        self.centrifugo.start()
        self.centrifugo_runs = True
        self._tell(f"Centrifugo: started again, process {self.centrifugo.pid}")

    def restore(self) -> None:
        """Start whatever does not run because it was killed on purpose."""
        for number, relay in enumerate(self.relays):
            if relay.pid is None and relay.failure is None:
                self.start_relay(number)
        if not self.centrifugo_runs:
            self.start_centrifugo()


class Harm(NamedTuple):
    """Something done to the stage, `at` seconds from the start."""

    at: float
    do: Callable[[Stage], None]


def harm(seconds: float | None) -> Iterator[Harm]:
    """All that is done in a run of `seconds`, in order: at least once everything, and again every 20 s."""
    cycle = CYCLE if seconds is None else seconds / max(1, round(seconds / CYCLE))
    for number in itertools.count():
        begin, victim = number * cycle, number % 2
        if seconds is not None and begin + cycle / 2 > seconds:
            return
        yield Harm(begin + 0.20 * cycle, partial(Stage.kill_relay, number=victim))
        yield Harm(begin + 0.40 * cycle, partial(Stage.start_relay, number=victim))
        yield Harm(begin + 0.55 * cycle, Stage.kill_centrifugo)
        yield Harm(begin + 0.65 * cycle, Stage.start_centrifugo)


def _environment(database_url: str, api_url: str, api_key: str, settings: Mapping[str, object]) -> dict[str, str]:
    """What a relay needs, without what would configure it otherwise."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_RELAY_")}
    own = {
        "database_url": database_url,
        "centrifugo_url": api_url,
        "centrifugo_api_key": api_key,
        "log_format": "json",
        "workers": 1,
        **settings,
    }
    return inherited | {f"OUTBOX_RELAY_{name.upper()}": str(value) for name, value in own.items()}
