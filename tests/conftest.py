"""Fixtures shared by all tests: real servers, one set per xdist worker; a fresh database and channel per test.

Nothing here skips: without a real PostgreSQL or Centrifugo the tests fail.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pytest
import sqlalchemy as sa
from playwright.sync_api import Browser
from psycopg import sql

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import Centrifugo, find_or_build
from outbox_relay.embedded.postgres import Postgres
from outbox_relay.migrations import migrate
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from outbox_relay.runner import Ended, Relay
from outbox_relay.store import Store
from tests.support.browser import chromium
from tests.support.gateway import Gateway
from tests.support.relays import RelayProcess, drain
from tests.support.shop import Shop
from tests.support.subscriber import Subscriber


class Connect(Protocol):
    """Open an autocommit connection to the test's database; it is closed with the test."""

    def __call__(self, **settings: Any) -> psycopg.Connection[Any]: ...


class MakeRelay(Protocol):
    """A relay from the test's database to Centrifugo, not started. The defaults are the test's own servers."""

    def __call__(
        self,
        options: Options | None = None,
        *,
        database_url: str | None = None,
        schema: str = "public",
        api_url: str | None = None,
        api_key: str | None = None,
        request_timeout: float = 3.0,
        batch_time: float = 1.0,
        parallel: bool | None = None,
        server: Centrifugo | None = None,
    ) -> Relay: ...


class RunRelay(Protocol):
    """Make a relay (the arguments are `make_relay`'s) and run it until there is nothing left to send."""

    def __call__(self, options: Options | None = None, **settings: Any) -> Ended: ...


class StartRelay(Protocol):
    """Start `python -m outbox_relay run`, or `command`, as a process that is killed with the test.

    `settings` are named as in `outbox_relay.config.Settings`. Returns once the relay says that it has started,
    or at once without `wait`.
    """

    def __call__(
        self,
        settings: Mapping[str, object] | None = None,
        *,
        server: Centrifugo | None = None,
        command: Sequence[str] | None = None,
        wait: bool = True,
    ) -> RelayProcess: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="all interleavings and all fuzzing, where a part is enough every day"
    )


def pytest_configure() -> None:
    """Keep temporary files in memory where that has room: each test has a database, and each of those is 300 files.

    On ext4 a fifth of the suite's work was the search for inodes that were not freed a moment ago. `TMPDIR` is kept.
    """
    memory = Path("/dev/shm")
    if "TMPDIR" in os.environ or not os.access(memory, os.W_OK | os.X_OK):
        return
    system = os.statvfs(memory)
    # Containers have it small, and closed to programs.
    if system.f_bavail * system.f_frsize >= 4 << 30 and not system.f_flag & os.ST_NOEXEC:
        os.environ["TMPDIR"] = str(memory)
        tempfile.tempdir = None


# PostgreSQL


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """A PostgreSQL server where we may create databases: `OUTBOX_RELAY_TEST_DATABASE_URL`, else our own."""
    if chosen := os.environ.get("OUTBOX_RELAY_TEST_DATABASE_URL"):
        yield chosen
    else:
        with Postgres(settings={"max_connections": "200", "max_prepared_transactions": "10"}) as postgres:
            yield postgres.url()


def in_database(server_url: str, name: str, **query: str) -> str:
    """The URL of another database on the same server."""
    url = sa.make_url(server_url).set(database=name).update_query_dict(query)
    return url.render_as_string(hide_password=False)


def sqlalchemy_engine(url: str) -> sa.Engine:
    return sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool)


@contextlib.contextmanager
def database(server_url: str, template: str | None = None) -> Iterator[str]:
    """Create a database under a name of its own, yield the name, drop it."""
    name = f"outbox_relay_test_{uuid.uuid4().hex}"
    identifiers = {"name": sql.Identifier(name), "template": sql.Identifier(template or "template1")}
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {name} TEMPLATE {template}").format(**identifiers))
        try:
            yield name
        finally:
            connection.execute(sql.SQL("DROP DATABASE {name} WITH (FORCE)").format(**identifiers))


@pytest.fixture(scope="session")
def migrated_template(server_url: str) -> Iterator[str]:
    """The name of a database at the newest schema, to be copied and never connected to."""
    with database(server_url) as name:
        migrate(sqlalchemy_engine(in_database(server_url, name)))
        yield name


@pytest.fixture
def empty_database_url(server_url: str) -> Iterator[str]:
    """A fresh database without our tables."""
    with database(server_url) as name:
        yield in_database(server_url, name)


@pytest.fixture
def database_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """A fresh database with our tables in `public`."""
    with database(server_url, migrated_template) as name:
        yield in_database(server_url, name)


@pytest.fixture
def engine(database_url: str) -> sa.Engine:
    return sqlalchemy_engine(database_url)


@pytest.fixture
def connect(database_url: str) -> Iterator[Connect]:
    with contextlib.ExitStack() as stack:

        def open_connection(**settings: Any) -> psycopg.Connection[Any]:
            connection = psycopg.connect(database_url, **{"autocommit": True, **settings})
            stack.callback(connection.close)
            return connection

        yield open_connection


# Centrifugo


@pytest.fixture(scope="session")
def centrifugo_binary() -> Path:
    return find_or_build()


@pytest.fixture(scope="session")
def centrifugo(centrifugo_binary: Path) -> Iterator[Centrifugo]:
    """A server for tests that do it no harm; namespaces `hist` (history, recovery) and `plain`."""
    with Centrifugo(centrifugo_binary) as server:
        yield server


@pytest.fixture
def start_centrifugo(centrifugo_binary: Path) -> Iterator[Callable[..., Centrifugo]]:
    """Start a server of the test's own, to be killed or configured (`config` as in `Centrifugo`).

    `instead_of` is stopped first, and the new one gets its ports and key.
    """
    with contextlib.ExitStack() as stack:

        def start(config: Mapping[str, Any] | None = None, *, instead_of: Centrifugo | None = None) -> Centrifugo:
            server = Centrifugo(centrifugo_binary, config=config, ports=instead_of.ports if instead_of else None)
            if instead_of is not None:
                server.api_key = instead_of.api_key
                instead_of.stop()
            return stack.enter_context(server)

        yield start


@pytest.fixture
def gateway(centrifugo: Centrifugo) -> Iterator[Gateway]:
    """A window in front of the shared server; a test may make it fail."""
    with Gateway(centrifugo.api_url) as window:
        yield window


@pytest.fixture
def channel() -> str:
    """A channel with history that no other test uses."""
    return f"hist:{uuid.uuid4().hex}"


@pytest.fixture
def subscribe(centrifugo: Centrifugo) -> Iterator[Callable[..., Subscriber]]:
    """Subscribe to channels of the shared server, or of `server`; closed with the test."""
    with contextlib.ExitStack() as stack:

        def start(*channels: str, server: Centrifugo = centrifugo) -> Subscriber:
            return stack.enter_context(Subscriber(server.ws_url, channels))

        yield start


@pytest.fixture
def browser() -> Iterator[Browser]:
    """A real Chromium; the test is skipped where there is none, and fails where `CI` is `true`.

    Of each test alone: while it is open, Playwright's event loop runs in this thread, and `asyncio.run` would refuse.
    """
    with chromium() as browser:
        yield browser


@pytest.fixture
def shop(database_url: str, channel: str) -> Shop:
    """An application with orders, in the test's database and channel."""
    return Shop(database_url, channel)


# Relays


@pytest.fixture
def relay_options() -> Options:
    """Short waits, so that a test sees in a second what production sees in minutes."""
    return Options(
        pause_min=0.02,
        pause_max=0.2,
        policy=Policy(max_attempts=3, min_age=0.0, backoff_base=0.05, backoff_max=0.2),
    )


@pytest.fixture
def make_relay(database_url: str, centrifugo: Centrifugo, relay_options: Options) -> MakeRelay:
    own_database_url = database_url

    def make(
        options: Options | None = None,
        *,
        database_url: str | None = None,
        schema: str = "public",
        api_url: str | None = None,
        api_key: str | None = None,
        request_timeout: float = 3.0,
        batch_time: float = 1.0,
        parallel: bool | None = None,
        server: Centrifugo | None = None,
    ) -> Relay:
        target = server or centrifugo
        chosen = options or relay_options
        return Relay(
            lambda: Store(
                database_url or own_database_url,
                schema=schema,
                request_timeout=request_timeout,
                batch_time=batch_time,
            ),
            lambda: Publisher(
                api_url or target.api_url,
                api_key or target.api_key,
                timeout=request_timeout,
                parallel=parallel,
                wires=chosen.wires,
            ),
            chosen,
        )

    return make


@pytest.fixture
def run_relay(make_relay: MakeRelay) -> RunRelay:
    def run(options: Options | None = None, **settings: Any) -> Ended:
        return drain(make_relay(options, **settings))

    return run


@pytest.fixture
def start_relay(database_url: str, centrifugo: Centrifugo, tmp_path: Path) -> Iterator[StartRelay]:
    with contextlib.ExitStack() as stack:

        def start(
            settings: Mapping[str, object] | None = None,
            *,
            server: Centrifugo | None = None,
            command: Sequence[str] | None = None,
            wait: bool = True,
        ) -> RelayProcess:
            target = server or centrifugo
            defaults = {
                "database_url": database_url,
                "centrifugo_url": target.api_url,
                "centrifugo_api_key": target.api_key,
                "workers": 1,
                "log_format": "json",
            }
            process = stack.enter_context(RelayProcess(tmp_path, defaults | dict(settings or {}), command))
            if wait:
                process.wait_for("relay started")
            return process

        yield start
