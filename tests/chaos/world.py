"""What the faults strike: real servers, relays in processes of their own, and a proxy on each of their ways."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Final, Literal, Self

import psycopg
import sqlalchemy as sa

from outbox_relay.embedded.centrifugo import DEFAULT_CONFIG, Centrifugo, find_or_build
from outbox_relay.embedded.postgres import Postgres
from outbox_relay.migrations import migrate
from tests.chaos import writers
from tests.chaos.window import Window
from tests.support import failpoints
from tests.support.pgbouncer import PgBouncer
from tests.support.proxy import TcpProxy
from tests.support.redis import Redis
from tests.support.relays import RelayProcess
from tests.support.waiting import wait_until

Engine = Literal["redis", "memory"]

FAKETIME: Final = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
"""Debian's libfaketime, which steps the clock of one process."""

DISK: Final = "4g"
POSTGRES: Final[Mapping[str, str]] = {
    "max_connections": "60",
    "shared_buffers": "256MB",
    "max_wal_size": "512MB",
    "log_min_messages": "fatal",
}
POOL: Final = 20
"""Sessions that pgbouncer has with the server, at most."""
RELAYS: Final[tuple[Mapping[str, object], ...]] = (
    {"workers": 2},
    {"workers": 1, "parallel": True, "wake_up": False},
    {"workers": 3, "parallel": False, "request_events": 100},
)
"""Different settings stand in for different versions, of which there is only one so far."""
SETTINGS: Final[Mapping[str, object]] = {
    "log_format": "json",
    # Poison ends within a run; time-outs are the defaults.
    "max_attempts": 3,
    "min_age": 0,
    "backoff_base": 0.2,
    "backoff_max": 1,
}


PULSE: Final = 60.0
"""Events per second that are written while all is healed."""
RELAY: Final = (sys.executable, "-m", "tests.support.failpoints", "run")
"""How a relay is started that can be struck at a point of its path."""


def namespace(name: str, size: int) -> dict[str, Any]:
    return {**DEFAULT_CONFIG["channel"]["namespaces"][0], "name": name, "history_size": size}


NAMESPACES: Final[tuple[Mapping[str, Any], ...]] = (
    namespace("hist", 20_000),
    namespace("big", 50),
    namespace("bundle", 20_000),
    namespace("one", 5_000),
    {
        "name": "map",
        "subscription_type": "map",
        "map": {
            "mode": "recoverable",
            "key_ttl": "4h",
            "stream_size": 200_000,
            "stream_ttl": "4h",
            "meta_ttl": "8h",
        },
    },
)
RELAY_FILE: Final = f"""
[types.{writers.CONFLATED}]
conflate = true

[namespaces.bundle]
bundle_events = 20

[namespaces.map]
channels = "map"

[namespaces.one]
channels = "exclusive"
"""


@dataclass(slots=True)
class People:
    """Ids of the events that somebody had his hands on: sent again, after their successors perhaps (`asked`) or surely
    in their place (`retried`); given up, and given up again before their gaps were told (`untold`)."""

    asked: set[int] = field(default_factory=set)
    retried: set[int] = field(default_factory=set)
    given_up: set[int] = field(default_factory=set)
    untold: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Slot:
    """A relay's place: its proxies and its settings outlive the process."""

    name: str
    settings: Mapping[str, object]
    database: TcpProxy
    failpoint: Path
    clock: Path
    """How far its time of day is from ours, as libfaketime reads it."""
    process: RelayProcess
    taken: bool = False


_OLD: Final = """
SELECT FROM outbox WHERE state IN ('pending', 'parked') AND created_at < clock_timestamp() - interval '0.3 s'
AND split_part(aggregate_id, '-', 1) = ANY(%(groups)s) LIMIT 1
"""


class World:
    """Everything, running from the start of the `with` block.

    `engine` is Centrifugo's. `rate` is how many events per second the writers aim at. `command` starts a relay. With a
    `pooler`, the relays' way to the database leads through pgbouncer. `shaped`: there are types and namespaces with
    settings of their own, and applications that use them.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        seed: str,
        rate: float,
        command: Sequence[str] = RELAY,
        *,
        pooler: bool = False,
        shaped: bool = False,
    ) -> None:
        self.pooler = pooler
        self._shaped = shaped
        self.folder = folder
        self.engine = engine
        self._seed = seed
        self._rate = rate
        self._command = command
        self._stack = ExitStack()
        self._guard = threading.Lock()
        self.held: dict[int, float] = {}
        """By thread: when it got hold of its first victim, seconds since 1970."""
        self.has: set[str] = {"faketime"} if FAKETIME is not None else set()
        """What this machine can do, as `Fault.needs` names it."""
        self.people = People()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self) -> None:
        enter = self._stack.enter_context
        _sweep_faketime()
        self._stack.callback(_sweep_faketime)
        data = self._disk()
        self.postgres = enter(Postgres(data, settings=POSTGRES))
        self.database_url = self.postgres.create_database("chaos")
        migrate(
            sa.create_engine(sa.make_url(self.database_url).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool)
        )
        writers.set_up(self.database_url)
        self._relays_port = enter(PgBouncer(self.postgres.url(), POOL)).port if self.pooler else self.postgres.port
        self.redis = enter(Redis()) if self.engine == "redis" else None
        self.centrifugo = enter(Centrifugo(find_or_build(), config=self.config()))
        self.window = enter(Window(self.centrifugo.api_url, self.folder / "proxy.jsonl"))
        self._stack.callback(self.window.close_log)
        self.witness = self._program("tests.chaos.witness", self.centrifugo.ws_url, str(self.folder / "witness.jsonl"))
        assert self.witness.stdout is not None
        assert self.witness.stdout.readline() == b"subscribed\n"
        (self.folder / "relay.toml").write_text(RELAY_FILE if self._shaped else "")
        self.slots = [self._slot(f"relay-{n}", settings) for n, settings in enumerate(RELAYS)]
        for slot in self.slots:
            slot.process.wait_for("relay started")

    def start_writers(self) -> None:
        self._start_writers("", self._rate)

    def start_pulse(self) -> None:
        """Let a little be written that nobody refuses: `stop_writers` ends it."""
        self._start_writers(" pulse", PULSE)

    def _start_writers(self, kind: str, rate: float) -> None:
        applications = f"{'shaped' if self._shaped else 'plain'}{kind}"
        arguments = (self.database_url, str(self.folder), self._seed, str(rate), applications)
        self.writers = self._program("tests.chaos.writers", *arguments)

    def stop_writers(self) -> None:
        end(self.writers)

    def config(self, **more: Any) -> dict[str, Any]:
        """Centrifugo's configuration: it recovers whatever a subscriber missed in a run."""
        client = {
            **DEFAULT_CONFIG["client"],
            "queue_max_size": 256 * 1024 * 1024,
            "recovery_max_publication_limit": 100_000,
        }
        config: dict[str, Any] = {"client": client, "channel": {"namespaces": list(NAMESPACES)}, **more}
        if self.redis is not None:
            redis = {"type": "redis", "redis": {"address": self.redis.url, "io_timeout": "1s"}}
            # The engine's own is not for maps.
            config |= {"engine": redis, "map_broker": redis}
        return config

    def restart_centrifugo(
        self, *, key: str | None = None, namespaces: tuple[Mapping[str, Any], ...] = NAMESPACES
    ) -> None:
        """Start it anew on its ports, with another API key or other namespaces."""
        self.centrifugo.stop()
        self.centrifugo._config = {**self.config(), "channel": {"namespaces": list(namespaces)}}
        before, self.centrifugo.api_key = self.centrifugo.api_key, key or self.centrifugo.api_key
        try:
            self.centrifugo.start()
        finally:
            self.centrifugo.api_key = before

    # The relays

    @contextmanager
    def victim(self, chance: Random) -> Iterator[Slot]:
        """A running relay that no other fault is at work on. It runs again, or anew, when the block ends."""
        free: list[Slot] = []

        def found() -> bool:
            with self._guard:
                free[:] = [slot for slot in self.slots if not slot.taken]
                if free:
                    free[:] = [chance.choice(free)]
                    free[0].taken = True
            return bool(free)

        wait_until(found, "a relay that no fault is at work on")
        [slot] = free
        try:
            self._wait_until_started(slot)
            self.held.setdefault(threading.get_ident(), time.time())
            yield slot
        finally:
            slot.failpoint.unlink(missing_ok=True)
            if not slot.process.alive():
                self.replace(slot)
            slot.taken = False

    def _wait_until_started(self, slot: Slot) -> None:
        """Once more anew, if it has come to nothing at all: libfaketime may wait for ever for what a dead one had."""
        try:
            slot.process.wait_for("relay started")
        except AssertionError:
            if FAKETIME is None or slot.process.output:
                raise
            self.replace(slot)
            slot.process.wait_for("relay started")

    def replace(self, slot: Slot) -> None:
        """Start a relay in the place of one that has ended, and return at once."""
        _sweep_faketime()
        with slot.process:
            slot.process = self._relay(slot.settings, slot.clock)

    def _slot(self, name: str, settings: Mapping[str, object]) -> Slot:
        database = self._stack.enter_context(TcpProxy("127.0.0.1", self._relays_port))
        failpoint = self.folder / f"{name}.failpoint"
        clock = self.folder / f"{name}.clock"
        clock.write_text("+0")
        own = {
            **SETTINGS,
            **settings,
            "database_url": sa.make_url(self.database_url).set(port=database.port).render_as_string(),
            "centrifugo_url": self.window.url_for(name),
            "centrifugo_api_key": self.centrifugo.api_key,
            "failpoint": failpoint,
            "config": self.folder / "relay.toml",
        }
        return Slot(name, own, database, failpoint, clock, self._relay(own, clock))

    def _relay(self, settings: Mapping[str, object], clock: Path) -> RelayProcess:
        command = list(self._command)
        if FAKETIME is not None:
            # The kernel's steps leave the monotonic clocks alone.
            faked = (f"LD_PRELOAD={FAKETIME}", f"FAKETIME_TIMESTAMP_FILE={clock}", "FAKETIME_CACHE_DURATION=1")
            command = ["env", *faked, "FAKETIME_DONT_FAKE_MONOTONIC=1", *command]
        process = RelayProcess(self.folder, settings, command)
        self._stack.callback(process.kill)
        return process

    @property
    def sessions(self) -> int:
        """How many sessions the relays may have with the database, at most."""
        return POOL if self.pooler else sum(int(str(slot.settings["workers"])) for slot in self.slots)

    def arm(self, slot: Slot, point: str, number: signal.Signals) -> None:
        failpoints.arm(slot.failpoint, point, number)

    # The database, past all proxies

    @contextmanager
    def database(self) -> Iterator[psycopg.Connection[Any]]:
        """A session that waits until the database lets it in."""
        connections: list[psycopg.Connection[Any]] = []

        def connected() -> bool:
            with contextlib.suppress(psycopg.OperationalError):
                connections.append(psycopg.connect(self.database_url, autocommit=True, connect_timeout=3))
            return bool(connections)

        wait_until(connected, "a session with the database")
        with connections[0] as connection:
            yield connection

    def wait_until_calm(self, seconds: float) -> None:
        """Until nothing waits that was written some time ago and that nobody refuses; at most so many seconds.

        The writers go easy on the relays meanwhile.
        """
        groups = sorted(writers.PLAIN | writers.CHANGING)
        gentle = self.folder / writers.GENTLE
        gentle.touch()
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                with self.database() as connection:
                    if connection.execute(_OLD, {"groups": groups}).fetchone() is None:
                        return
                time.sleep(0.05)
        finally:
            gentle.unlink()

    @contextmanager
    def session(self, *begin: str) -> Iterator[psycopg.Connection[Any]]:
        """A session that begins with these statements, for a fault that is not the only one.

        Where others end it, or keep a lock from it, it begins again; once the block runs, its end is no error.
        """
        connections: list[psycopg.Connection[Any]] = []
        with contextlib.suppress(psycopg.OperationalError), ExitStack() as stack:

            def begun() -> bool:
                with contextlib.suppress(psycopg.OperationalError), ExitStack() as attempt:
                    connection = attempt.enter_context(self.database())
                    for statement in begin:
                        connection.execute(statement)
                    stack.push(attempt.pop_all())
                    connections.append(connection)
                return bool(connections)

            wait_until(begun, f"a session that begins with {begin}")
            yield connections[0]

    def ensure_database(self) -> None:
        """Start PostgreSQL if it is not running, and wait until it answers."""
        if self.postgres._process is None or not self.postgres._process.alive():
            self.postgres.start()
        with self.database():
            pass

    # The programs beside

    def _program(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        program = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE)
        self._stack.callback(end, program)
        return program

    def _disk(self) -> Path | None:
        """A file system that can be made full, for the cluster; None where we may not mount one."""
        mount = self.folder / "disk"
        mount.mkdir()
        self.folder.chmod(0o755)  # PostgreSQL runs as somebody else
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0755", "outbox-relay-chaos", mount],
            capture_output=True,
            check=False,
        )
        if mounted.returncode:
            return None
        self._stack.callback(lambda: subprocess.run(["umount", "--lazy", mount], check=True))
        self.has.add("disk")
        return mount / "data"

    def fill_disk(self) -> bool:
        """Take the free space away from the cluster's disk; false where it has grown at this moment."""
        disk = os.statvfs(self.folder / "disk")
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize // 1024
        try:
            self.resize_disk(f"{used + 64}k")
        except subprocess.CalledProcessError:
            return False
        return True

    def resize_disk(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder / "disk"], check=True, capture_output=True)


def _sweep_faketime() -> None:
    """Delete what libfaketime left behind in dead processes: another one of the same id would wait for it for ever."""
    for path in Path("/dev/shm").glob("*faketime_*"):
        if not Path(f"/proc/{path.name.rpartition('_')[2]}").exists():
            path.unlink(missing_ok=True)


def end(program: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL if that is not enough."""
    if program.poll() is None:
        program.send_signal(signal.SIGTERM)
        try:
            program.wait(20)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
    if program.stdout is not None:
        program.stdout.close()
