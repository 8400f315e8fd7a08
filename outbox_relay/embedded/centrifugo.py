"""A real Centrifugo server: found, or built once from its pinned Go module, and started on free ports."""

import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from outbox_relay.embedded._go import GoProgram, to_stderr
from outbox_relay.embedded._process import EmbeddedError, Process, on_free_ports

VERSION = "6.9.1"
OLDEST = (6, 8)
MODULE = "github.com/centrifugal/centrifugo/v6"

START_SECONDS = 30
STOP_SECONDS = 10

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


def find_or_build(progress: Callable[[str], None] = to_stderr) -> Path:
    """The path of a Centrifugo binary, built if there is none; `progress` hears a line now and then.

    Looked for in `CENTRIFUGO_BIN`, on PATH (6.8 or newer), in the cache folder. A build takes about two minutes
    and 2 GB that are freed afterwards. Raises EmbeddedError.
    """
    return _PROGRAM.find_or_build(progress)


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


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _too_old(binary: str) -> str | None:
    """A binary of another major or too old a version. One built by `go install` says 0.0.0 and is believed."""
    said = subprocess.run((binary, "version"), capture_output=True, text=True, check=False).stdout
    found = re.search(r"v?(\d+)\.(\d+)\.\d+", said)
    version = (int(found[1]), int(found[2])) if found else None
    if version is None or OLDEST <= version < (7, 0) or version == (0, 0):
        return None
    return f"Centrifugo {version[0]}.{version[1]}, not {OLDEST[0]}.{OLDEST[1]} or newer"


_PROGRAM = GoProgram(
    name="Centrifugo",
    version=VERSION,
    module=Path(__file__).with_name("centrifugo_build"),
    package=MODULE,
    ldflags=f"-X {MODULE}/internal/build.Version={VERSION}",
    takes="about 2 minutes",
    other_way="Set CENTRIFUGO_BIN to a Centrifugo 6.8 or newer, or put one on PATH (https://centrifugal.dev)",
    too_old=_too_old,
)
