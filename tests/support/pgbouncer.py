"""A real pgbouncer in transaction mode: each transaction gets whatever server session is free."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
import sqlalchemy as sa

from outbox_relay.embedded._process import Process, on_free_ports
from tests.support.programs import debian_program

SECONDS = 10


class PgBouncer:
    """In front of the server at `server_url`, for all its databases; at most `sessions` server sessions for each."""

    def __init__(self, server_url: str, sessions: int) -> None:
        self._program = debian_program("pgbouncer", "pgbouncer")
        self._server = sa.make_url(server_url)
        self._sessions = sessions
        self._folder = tempfile.TemporaryDirectory(prefix="outbox-relay-pgbouncer-", dir="/tmp")
        self._process: Process | None = None
        self._user: tuple[int, int] | None = None
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._user = (nobody.pw_uid, nobody.pw_gid)
            os.chown(self._folder.name, *self._user)
        [self.port] = on_free_ports(1, lambda ports: self._launch(*ports))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._folder.cleanup()

    def url(self, database_url: str) -> str:
        """The URL of one of the server's databases, by way of this pgbouncer."""
        url = sa.make_url(database_url).set(host="127.0.0.1", port=self.port)
        return url.render_as_string(hide_password=False)

    def start(self) -> None:
        self._launch(self.port)

    def kill(self) -> None:
        """SIGKILL; returns once it is dead."""
        if self._process is not None:
            self._process.stop(signal.SIGKILL, SECONDS)
            self._process = None

    def _launch(self, port: int) -> None:
        folder = Path(self._folder.name)
        settings = folder / "pgbouncer.ini"
        settings.write_text(
            "[databases]\n"
            f"* = host={self._server.host} port={self._server.port} user={self._server.username}\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            "auth_type = any\n"
            f"pool_mode = transaction\ndefault_pool_size = {self._sessions}\n"
            # It would wait 15 s until it tries a server again that was down.
            "server_login_retry = 1\n"
        )
        process = Process(
            (self._program, settings), log=folder / "log", cwd=folder, env=os.environ, user=self._user, remove=folder
        )

        def ready() -> bool:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(host="127.0.0.1", port=port, dbname="pgbouncer", autocommit=True).close()
                return True
            return False

        self.port = port
        try:
            process.wait_until(ready, SECONDS, "pgbouncer")
        except BaseException:
            process.stop(signal.SIGKILL, SECONDS)
            raise
        self._process = process
