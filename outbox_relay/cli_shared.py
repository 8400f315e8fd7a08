"""What the verbs of the command line share: options, settings, refusals, JSON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import orjson
import typer
from rich.console import Console
from rich.markup import escape

from outbox_relay import config as configuration
from outbox_relay import log
from outbox_relay.config import ConfigError, Settings

EXIT_PROBLEM: Final = 1
EXIT_USAGE: Final = 2

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file with settings. \\[default: ./outbox-relay.toml if there is one]"),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database-url", help="PostgreSQL URL. One with a password is better kept in the environment."),
]
Schema = Annotated[str | None, typer.Option("--schema", help="Schema that holds the outbox. \\[default: public]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs.")]


@contextmanager
def settings_or_exit(config: Path | None, **flags: Any) -> Iterator[Settings]:
    """The settings, with a wrong one turned into one line and exit code 2."""
    try:
        yield configuration.load(flags, file=config)
    except ConfigError as error:
        fail(str(error), code=EXIT_USAGE)


def fail(message: str, settings: Settings | None = None, *, code: int = EXIT_PROBLEM) -> NoReturn:
    """Say what is wrong in one line on standard error, secrets masked, and exit."""
    text = log.printable(log.Redactor(settings.secrets() if settings else ()).text(message))
    Console(stderr=True).print(f"[red]error:[/] {escape(text)}", soft_wrap=True, highlight=False)
    raise typer.Exit(code) from None


def print_json(value: Any) -> None:
    typer.echo(log.json_text(orjson.dumps(value, option=orjson.OPT_INDENT_2)))
