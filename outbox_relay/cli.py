"""The command line: reads the settings, builds the parts, runs one verb. Exit codes are part of the contract."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from io import StringIO
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from outbox_relay import cli_operator, log
from outbox_relay import config as configuration
from outbox_relay.cli_shared import (
    EXIT_PROBLEM,
    EXIT_USAGE,
    AsJson,
    ConfigFile,
    DatabaseUrl,
    Schema,
    fail,
    print_json,
    settings_or_exit,
)
from outbox_relay.config import Settings

if TYPE_CHECKING:
    from outbox_relay.doctor import Finding
    from outbox_relay.runner import Ended, Relay

EXIT_ONLY_HELD: Final = 3
EXIT_HARD_STOP: Final = 130
SIGNAL_PATIENCE: Final = 0.2
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
COLLECTED: Final = 50_000

app = typer.Typer(
    help="Delivers the events of a transactional outbox in PostgreSQL to Centrifugo, in order per aggregate.\n\n"
    "Settings come from flags, then the environment (OUTBOX_RELAY_DATABASE_URL, OUTBOX_RELAY_CENTRIFUGO_URL, "
    "OUTBOX_RELAY_CENTRIFUGO_API_KEY, …; each of these three also as …_FILE), then outbox-relay.toml.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

CentrifugoUrl = Annotated[
    str | None, typer.Option("--centrifugo-url", help="Centrifugo's server API, such as http://127.0.0.1:8000/api.")
]


def main() -> None:
    """Entry point of `outbox-relay`."""
    app()


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(version("outbox-relay"))
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
def run(  # noqa: PLR0917 - Typer's options are keywords
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    centrifugo_url: CentrifugoUrl = None,
    schema: Schema = None,
    workers: Annotated[int | None, typer.Option(help="Threads, each with a database session. \\[default: 2]")] = None,
    until_empty: Annotated[
        bool,
        typer.Option(
            "--until-empty",
            help="Exit when nothing is pending: with 0, or with 3 if refused events are left waiting.",
        ),
    ] = False,
    log_format: Annotated[str | None, typer.Option(help="console or json. \\[default: console]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error. \\[default: info]")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve /metrics, /live and /ready on this port. \\[default: none is opened]")
    ] = None,
    metrics_host: Annotated[
        str | None, typer.Option(help="Address to serve them on, to whoever asks. \\[default: 127.0.0.1]")
    ] = None,
) -> None:
    """Deliver events until stopped.

    Run as many of these as you like, on as many hosts: they share the work and never reorder an aggregate.
    SIGTERM and SIGINT finish the request in flight, record what is known and exit with 0; a second signal stops
    at once and loses nothing either. Settings without a flag (OUTBOX_RELAY_POLL_MAX, …) are in the documentation.
    """
    with settings_or_exit(
        config,
        database_url=database_url,
        centrifugo_url=centrifugo_url,
        schema=schema,
        workers=workers,
        log_format=log_format,
        log_level=log_level,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
    ) as settings:
        configuration.need(settings, "database_url", "centrifugo_url", "centrifugo_api_key")
        from outbox_relay.build import build_publisher, monitored_relay
        from outbox_relay.runner import Ended

        build_publisher(settings).close()
        _give_big_blocks_back()
        _spare_the_collector()
        log.configure(settings.log_format, settings.log_level, settings.secrets())
        with monitored_relay(settings) as relay:
            ended = _run_until_signal(relay, until_empty=until_empty)
        match ended:
            case Ended.ONLY_HELD:
                raise typer.Exit(EXIT_ONLY_HELD)
            case Ended.HUNG | Ended.FAILED:
                sys.stderr.flush()
                os._exit(EXIT_PROBLEM)
            case Ended.STOPPED | Ended.EMPTY:
                return


@app.command()
def migrate(  # noqa: PLR0917 - Typer's options are keywords
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    to: Annotated[str, typer.Option("--to", help="Revision to reach: head, base, 0001, +1, -1.")] = "head",
    sql: Annotated[bool, typer.Option("--sql", help="Print the SQL for review and change nothing.")] = False,
    down: Annotated[
        bool, typer.Option("--down", help="Downgrade to --to. Refused while events are undelivered.")
    ] = False,
    current: Annotated[bool, typer.Option("--current", help="Print the database's revision and the newest.")] = False,
) -> None:
    """Create or upgrade the outbox's tables, under a version table of their own.

    Locks are taken within 2 seconds or given up and tried again, so writers are never frozen for long.
    """
    with settings_or_exit(config, database_url=database_url, schema=schema) as settings:
        import sqlalchemy as sa
        from alembic.util import CommandError

        from outbox_relay import migrations

        if down and to == "head":
            fail("--down needs --to: the revision to go back to, or base", code=EXIT_USAGE)
        if sql:
            text = StringIO()
            try:
                migrations.offline_sql(to, text, schema=settings.schema, down=down)
            except CommandError as error:
                fail(f"--to: {error}", code=EXIT_USAGE)
            typer.echo(text.getvalue(), nl=False)
            return
        configuration.need(settings, "database_url")
        with _engine(settings) as engine:
            try:
                if not current:
                    migrations.migrate(engine, to, schema=settings.schema, down=down, on_wait=_say_waiting)
                with engine.connect() as connection:
                    revision = migrations.current(connection, settings.schema)
            except CommandError as error:
                fail(f"--to: {error}", code=EXIT_USAGE)
            except migrations.MigrationError as error:
                fail(str(error), settings)
            except sa.exc.SQLAlchemyError as error:
                fail(f"the migration failed, nothing was changed: {_first_line(error)}", settings)
        typer.echo(f"{revision or 'none'} (newest: {migrations.head()})")


@app.command()
def check(
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    centrifugo_url: CentrifugoUrl = None,
    schema: Schema = None,
    as_json: AsJson = False,
) -> None:
    """Examine database and Centrifugo, and say what is wrong and what to do. Exit code 0 if all is well, else 1."""
    with settings_or_exit(config, database_url=database_url, centrifugo_url=centrifugo_url, schema=schema) as settings:
        configuration.need(settings, "database_url", "centrifugo_url", "centrifugo_api_key")
        from outbox_relay.doctor import examine

        redact = log.Redactor(settings.secrets()).text
        findings = [finding.redacted(redact) for finding in examine(settings)]
        ok = all(finding.ok for finding in findings)
        if as_json:
            print_json({"ok": ok, "findings": [finding.as_dict() for finding in findings]})
        else:
            _print_findings(findings)
        if not ok:
            raise typer.Exit(EXIT_PROBLEM)


@app.command()
def status(
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    as_json: AsJson = False,
) -> None:
    """Show how many events wait, since when, and how many are dead. Counts stop at 10,000."""
    with settings_or_exit(config, database_url=database_url, schema=schema) as settings:
        configuration.need(settings, "database_url")
        from outbox_relay.build import build_store
        from outbox_relay.database import DatabaseUnavailableError
        from outbox_relay.upkeep import COUNT_LIMIT

        try:
            with closing(build_store(settings)) as store:
                backlog = store.backlog()._asdict()
        except DatabaseUnavailableError as error:
            fail(f"the database says: {error} (outbox-relay check says what is wrong)", settings)
        if as_json:
            print_json(backlog | {"count_limit": COUNT_LIMIT})
            return
        table = Table("events", "", show_header=False, box=None)
        for name in ("pending", "parked", "holds", "dead"):
            count = backlog[name]
            table.add_row(name, f"{count}" if count < COUNT_LIMIT else f"{COUNT_LIMIT} or more")
        oldest = backlog["oldest_pending_seconds"]
        table.add_row("oldest pending", "-" if oldest is None else f"{oldest:.1f} s")
        Console().print(table)


@app.command()
def demo(
    seconds: Annotated[
        float | None, typer.Option(min=1, help="How long it runs. \\[default: until Ctrl-C, 20 without a terminal]")
    ] = None,
) -> None:
    """Run the whole thing on real servers of its own: PostgreSQL, Centrifugo, writers, two relays, a subscriber.

    Kills a relay and Centrifugo on the way and ends with an honest verdict. Needs the extra: outbox-relay\\[demo].
    """
    try:
        from outbox_relay.demo import main as run_demo
    except ImportError as error:
        fail(f"{error}: pip install 'outbox-relay[demo]'")
    raise typer.Exit(run_demo(seconds=seconds))


cli_operator.register(app)


def _give_big_blocks_back() -> None:
    """Let the memory of a large payload return to the system, where glibc would keep it for the next one.

    Once such a block was freed, glibc takes later ones from heaps that shrink seldom, one heap a thread. A fixed
    threshold keeps to mapping them, each by itself (`man mallopt`, M_MMAP_THRESHOLD). What a batch of small payloads
    needs is below it, and is kept between batches: mapped anew, a request is as much work as writing it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1024 * 1024)
        mallopt(M_TRIM_THRESHOLD, 2 * 1024 * 1024)


def _spare_the_collector() -> None:
    """Keep Python's collector from walking over all that was imported, and over the events, while they are delivered.

    They are in no cycles (tests/test_collector.py), so counting references frees them. Measured: a tenth to a fifth of
    the relay's own time, and a twelfth for the events. `COLLECTED` is more than the batches of all workers hold; cycles
    come with new sessions.
    """
    gc.collect()
    gc.freeze()
    if not statements_leave_cycles():
        gc.set_threshold(COLLECTED)


def statements_leave_cycles() -> bool:
    """Whether psycopg keeps each statement's result in a cycle, as it did before 3.3.7 (tried: 3.2.6 to 3.3.9)."""
    return [int(digits) for digits in re.findall(r"\d+", version("psycopg"))[:3]] < [3, 3, 7]


def _run_until_signal(relay: Relay, *, until_empty: bool) -> Ended:
    """Run the relay in threads of its own, while the main thread waits for its end or for a signal.

    A handler interrupts the main thread anywhere and may take no lock that this one may hold, as `Event.set` does.
    Putting into a SimpleQueue is the exception that the standard library makes for it.
    """
    notes: SimpleQueue[Ended | None] = SimpleQueue()
    asked = False

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            # Nothing to clean up: what was claimed is free again as soon as the connections are gone.
            os._exit(EXIT_HARD_STOP)
        asked = True
        notes.put(None)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    threading.Thread(target=lambda: notes.put(relay.run(until_empty=until_empty)), daemon=True).start()
    while True:
        try:
            # Not for ever: Python runs a handler between two bytecodes, so one whose signal came just before the
            # wait began would run when the wait is over.
            note = notes.get(timeout=SIGNAL_PATIENCE)
        except Empty:
            continue
        if note is not None:
            return note
        relay.stop()


@contextmanager
def _engine(settings: Settings) -> Iterator[Any]:
    import sqlalchemy as sa

    from outbox_relay.database import DatabaseUnavailableError, connect

    assert settings.database_url is not None  # noqa: S101 - `need` has looked
    url = settings.database_url.get_secret_value()
    try:
        connect(url).close()
    except DatabaseUnavailableError as error:
        fail(f"the database says: {error}", settings)
    engine = sa.create_engine(
        "postgresql+psycopg://", creator=lambda: connect(url, autocommit=False), poolclass=sa.NullPool
    )
    try:
        yield engine
    finally:
        engine.dispose()


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    return str(cause).strip().partition("\n")[0]


def _say_waiting(attempt: int) -> None:
    typer.echo(f"waiting for a lock on the outbox, try {attempt}", err=True)


def _print_findings(findings: list[Finding]) -> None:
    console = Console(highlight=False)
    for finding in findings:
        mark = "[green]ok[/]     " if finding.ok else "[red]problem[/]"
        console.print(f"{mark} {escape(log.printable(finding.what))}", soft_wrap=True)
        if finding.advice:
            console.print(f"        {escape(log.printable(finding.advice))}", soft_wrap=True)
