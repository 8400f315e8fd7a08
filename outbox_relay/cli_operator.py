"""The operator's verbs on the command line: `events`, `dead`, `prune`, `drift`, `epoch` and `config`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import orjson
import typer
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
from outbox_relay.config import ConfigError, NamespaceSettings, Settings, TypeSettings
from outbox_relay.log import printable

if TYPE_CHECKING:
    from outbox_relay.operator import Changed, Epoch, EventDetails, EventRow, Filter, Operator

events_app = typer.Typer(help="Look at events, and send delivered ones again.", no_args_is_help=True)
dead_app = typer.Typer(help="See and mend what was given up, or is refused again and again.", no_args_is_help=True)
epoch_app = typer.Typer(help="See and change what tells subscribers that versions went back.", no_args_is_help=True)
config_app = typer.Typer(help="Write a file of settings, and see where each setting comes from.", no_args_is_help=True)

Type = Annotated[str | None, typer.Option("--type", help="Aggregate type.")]
Aggregate = Annotated[str | None, typer.Option("--aggregate", help="Aggregate id, within --type if that is given.")]
Channel = Annotated[str | None, typer.Option("--channel", help="One of the event's channels.")]
OlderThan = Annotated[str | None, typer.Option("--older-than", help="Written longer ago: 90s, 15m, 2h, 7d.")]
NewerThan = Annotated[str | None, typer.Option("--newer-than", help="Written since: 90s, 15m, 2h, 7d.")]
AfterId = Annotated[int, typer.Option("--after-id", min=0, help="Only ids above this: the last one of a page.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Events of a page.")]
Ids = Annotated[list[int] | None, typer.Argument(help="Ids of events; instead of them, filters choose.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how many, and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask before changing several events.")]
All = Annotated[bool, typer.Option("--all", help="All there are, where no id or filter is given.")]

_AGE: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")
_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def register(app: typer.Typer) -> None:
    """Add the operator's verbs to the command line."""
    app.add_typer(events_app, name="events")
    app.add_typer(dead_app, name="dead")
    app.command()(prune)
    app.command()(drift)
    app.add_typer(epoch_app, name="epoch")
    app.add_typer(config_app, name="config")


# events


@events_app.command("list")
def events_list(  # noqa: PLR0917 - Typer's options are keywords
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    type_: Type = None,
    aggregate: Aggregate = None,
    channel: Channel = None,
    state: Annotated[
        str | None,
        typer.Option(help="pending, parked, delivered, superseded, expired, dead or discarded."),
    ] = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    after_id: AfterId = 0,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """List events in the order of their ids, a page at a time."""
    chosen = _filter(type_, aggregate, channel, older_than, newer_than, state=state)
    with _operator(config, database_url, schema) as operator:
        events = operator.events(chosen, after_id=after_id, limit=limit)
        _print_page(events, limit, as_json, _EVENT_COLUMNS)


@events_app.command("show")
def events_show(
    id_: Annotated[int, typer.Argument(metavar="ID", help="Id of an event.")],
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    as_json: AsJson = False,
) -> None:
    """Show everything about one event: its payload, and the hold of its aggregate."""
    with _operator(config, database_url, schema) as operator:
        _print_details(operator.event(id_), as_json)


@events_app.command("replay")
def events_replay(  # noqa: PLR0917 - Typer's options are keywords
    ids: Ids = None,
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    type_: Type = None,
    aggregate: Aggregate = None,
    channel: Channel = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    every: All = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Send delivered events again, in id order.

    Subscribers hear old versions after newer ones, so they must compare versions: those that do not will show
    what is no longer true. Each event gets a new idempotency key, because Centrifugo swallows the old one.
    """
    chosen = _chosen(ids, _filter(type_, aggregate, channel, older_than, newer_than), every=every)
    with _operator(config, database_url, schema) as operator:
        _act("replay", chosen, operator.replay, dry_run=dry_run, yes=yes, as_json=as_json)


# dead


@dead_app.command("list")
def dead_list(  # noqa: PLR0917 - Typer's options are keywords
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    type_: Type = None,
    aggregate: Aggregate = None,
    channel: Channel = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    after_id: AfterId = 0,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """List the dead events, and those that hold their aggregate: how often they were refused, and the next try."""
    chosen = _filter(type_, aggregate, channel, older_than, newer_than)
    with _operator(config, database_url, schema) as operator:
        events = operator.dead(chosen, after_id=after_id, limit=limit)
        _print_page(events, limit, as_json, _DEAD_COLUMNS)


@dead_app.command("show")
def dead_show(
    id_: Annotated[int, typer.Argument(metavar="ID", help="Id of an event.")],
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    as_json: AsJson = False,
) -> None:
    """Show everything about one event, as `events show` does."""
    events_show(id_, config, database_url, schema, as_json)


@dead_app.command("requeue")
def dead_requeue(  # noqa: PLR0917 - Typer's options are keywords
    ids: Ids = None,
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    type_: Type = None,
    aggregate: Aggregate = None,
    channel: Channel = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    every: All = False,
    late: Annotated[
        bool, typer.Option("--late", help="Also events of which a later one has gone out, or may have.")
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Send dead events again.

    Where later events of the aggregate wait, a dead one goes out before them. Where one has gone out, --late is
    needed: subscribers then hear an old version after a newer one, and must compare versions.
    """
    chosen = _chosen(ids, _filter(type_, aggregate, channel, older_than, newer_than), every=every)
    with _operator(config, database_url, schema) as operator:
        _act(
            "requeue",
            chosen,
            lambda chosen, dry_run: operator.requeue(chosen, late=late, dry_run=dry_run),
            dry_run=dry_run,
            yes=yes,
            as_json=as_json,
        )


@dead_app.command("discard")
def dead_discard(  # noqa: PLR0917 - Typer's options are keywords
    ids: Ids = None,
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    type_: Type = None,
    aggregate: Aggregate = None,
    channel: Channel = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    every: All = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Give events up for good: dead ones, and by its id also one that holds its aggregate.

    What waited behind it goes out now. Subscribers never hear of a discarded event. One that holds its aggregate
    keeps its place until a relay has told its channels of the gap; discard it again to end it at once, untold.
    """
    chosen = _chosen(ids, _filter(type_, aggregate, channel, older_than, newer_than), every=every)
    with _operator(config, database_url, schema) as operator:
        _act("discard", chosen, operator.discard, dry_run=dry_run, yes=yes, as_json=as_json)


# prune


def prune(  # noqa: PLR0917 - Typer's options are keywords
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    keep: Annotated[
        str | None, typer.Option(help="Age that delivered events reach: 90s, 15m, 2h, 7d. \\[default: the setting]")
    ] = None,
    keep_dead: Annotated[
        str | None, typer.Option(help="The same for dead, expired and discarded ones. \\[default: the setting]")
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete events that ended long ago, as relays do by themselves. What has not ended is never deleted."""
    periods = {"keep": _seconds("--keep", keep), "keep_dead": _seconds("--keep-dead", keep_dead)}
    with _operator(config, database_url, schema) as operator:
        _confirm("prune", None, lambda: operator.prune(**periods, dry_run=True), dry_run=dry_run, yes=yes)
        events = operator.prune(**periods, dry_run=dry_run)
    if as_json:
        print_json({"verb": "prune", "dry_run": dry_run, "events": events})
    else:
        typer.echo(_done("prune", events, dry_run=dry_run))


# drift


def drift(  # noqa: PLR0917 - Typer's options are keywords
    table: Annotated[str, typer.Argument(help="The table with the objects: name or schema.name.")],
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    type_: Annotated[str | None, typer.Option("--type", help="Aggregate type. \\[default: the table's name]")] = None,
    id_: Annotated[
        list[str] | None, typer.Option("--id", help="Column of the id; several are joined by a colon. \\[default: id]")
    ] = None,
    version: Annotated[str, typer.Option("--version", help="Column of the version.")] = "version",
    changed_at: Annotated[
        str | None,
        typer.Option("--changed-at", help="Column of the last change's time, to judge objects without events."),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Age up to which delivered events are there. \\[default: the setting]")
    ] = None,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """Find objects whose last event does not say what they are: changed or deleted past the events.

    Compares versions, in one snapshot, for as far back as events are kept. Needs SELECT on the table. Exit code 1 if
    any object has drifted.
    """
    with settings_or_exit(config, database_url=database_url, schema=schema) as settings:
        configuration.need(settings, "database_url")
        from outbox_relay.database import DatabaseUnavailableError
        from outbox_relay.drift import Source, find
        from outbox_relay.operator import OperatorError

        seconds = _seconds("--keep", keep)
        source = Source(
            table=table,
            aggregate_type=type_ or table,
            id_columns=id_ or ["id"],
            version_column=version,
            changed_at=changed_at,
        )
        url = settings.database_url.get_secret_value() if settings.database_url else ""
        try:
            report = find(
                url,
                source,
                keep=settings.keep if seconds is None else seconds,
                schema=settings.schema,
                limit=limit,
            )
        except OperatorError as error:
            fail(str(error), settings)
        except DatabaseUnavailableError as error:
            fail(f"the database says: {error}", settings)
    if as_json:
        drifts = [found._asdict() | {"why": found.why} for found in report.drifts]
        print_json({"drifts": drifts, "unjudged": report.unjudged})
    else:
        rows = [
            (found.aggregate_id, _text(found.object_version), _text(found.event_version), found.why)
            for found in report.drifts
        ]
        if rows:
            _print_table(("aggregate", "object", "last event", "why"), rows)
        else:
            typer.echo("no object has drifted")
        if report.unjudged:
            typer.echo(
                f"objects without an event: {report.unjudged}; --changed-at says which should have one", err=True
            )
    if report.drifts:
        raise typer.Exit(EXIT_PROBLEM)


# epoch


@epoch_app.command("show")
def epoch_show(
    config: ConfigFile = None, database_url: DatabaseUrl = None, schema: Schema = None, as_json: AsJson = False
) -> None:
    """Show the epoch that is on every publication, and when it was last bumped."""
    with _operator(config, database_url, schema) as operator:
        _print_epoch(operator.epoch(), as_json)


@epoch_app.command("bump")
def epoch_bump(
    config: ConfigFile = None, database_url: DatabaseUrl = None, schema: Schema = None, as_json: AsJson = False
) -> None:
    """Begin another epoch, after versions may have gone back: every subscriber loads its objects again.

    Needed where the database cannot know: after a restore of the data alone into the same tables; on a managed
    service that hides the system identifier and the timeline, also after a failover that lost commits. It waits
    for the batches under way, so that afterwards nothing is sent under the old epoch.
    """
    with _operator(config, database_url, schema) as operator:
        _print_epoch(operator.bump_epoch(), as_json)


def _print_epoch(epoch: Epoch, as_json: bool) -> None:
    if as_json:
        print_json(asdict(epoch))
    else:
        typer.echo(f"{epoch.epoch} (bumped at {_time(epoch.bumped_at)})")


# config


@config_app.command("init")
def config_init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path(configuration.CONFIG_FILE),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if there is one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a file with every setting, its default and its unit, all commented out. Only its owner may read it."""
    if force:
        path.unlink(missing_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        fail(f"{path} is there already: say --force to overwrite it, or name another file")
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(_template())
    if as_json:
        print_json({"path": str(path)})
    else:
        typer.echo(f"wrote {path}: uncomment what you change")


@config_app.command("show")
def config_show(
    config: ConfigFile = None,
    database_url: DatabaseUrl = None,
    schema: Schema = None,
    as_json: AsJson = False,
) -> None:
    """Show every setting and where its value comes from: a flag, the environment, the file or the default."""
    try:
        settings, sources = configuration.load_with_sources(
            {"database_url": database_url, "schema": schema}, file=config
        )
    except ConfigError as error:
        fail(str(error), code=EXIT_USAGE)
    values = _shown(settings)
    if as_json:
        print_json({name: {"value": value, "source": sources[name]} for name, value in values.items()})
    else:
        rows = [(name, "-" if value is None else _toml(value), sources[name]) for name, value in values.items()]
        _print_table(("setting", "value", "source"), rows)


# Shared by the verbs


@contextmanager
def _operator(config: Path | None, database_url: str | None, schema: str | None) -> Iterator[Operator]:
    """The operator's functions on the configured outbox, with what they refuse turned into one line and exit code 1."""
    with settings_or_exit(config, database_url=database_url, schema=schema) as settings:
        configuration.need(settings, "database_url")
        from outbox_relay.database import DatabaseUnavailableError
        from outbox_relay.operator import Operator, OperatorError

        url = settings.database_url.get_secret_value() if settings.database_url else ""
        try:
            yield Operator(url, schema=settings.schema, keep=settings.keep, keep_dead=settings.keep_dead)
        except OperatorError as error:
            fail(str(error), settings)
        except DatabaseUnavailableError as error:
            fail(f"the database says: {error}", settings)


def _filter(
    type_: str | None,
    aggregate: str | None,
    channel: str | None,
    older_than: str | None,
    newer_than: str | None,
    *,
    state: str | None = None,
) -> Filter:
    from outbox_relay.operator import Filter
    from outbox_relay.outbox import STATES

    if state is not None and state not in STATES:
        raise typer.BadParameter(f"choose one of {', '.join(STATES)}", param_hint="--state")
    return Filter(
        aggregate_type=type_,
        aggregate_id=aggregate,
        channel=channel,
        state=state,
        created_before=_ago("--older-than", older_than),
        created_after=_ago("--newer-than", newer_than),
    )


def _chosen(ids: Sequence[int] | None, chosen: Filter, *, every: bool) -> Filter | Sequence[int]:
    """What a changing verb is about. It must be said: nothing given is more often a slip than a wish for all."""
    filtered = any(value is not None for value in asdict(chosen).values())
    if bool(ids) + filtered + every != 1:
        raise typer.BadParameter("give ids of events, or filters such as --type and --newer-than, or --all")
    return ids or chosen


def _seconds(option: str, age: str | None) -> float | None:
    if age is None:
        return None
    match = _AGE.fullmatch(age)
    if match is None:
        raise typer.BadParameter(f"{age!r} is no age: give one like 90s, 15m, 2h or 7d", param_hint=option)
    return float(match[1]) * _UNITS[match[2]]


def _ago(option: str, age: str | None) -> datetime | None:
    seconds = _seconds(option, age)
    try:
        return None if seconds is None else datetime.now(UTC) - timedelta(seconds=seconds)
    except OverflowError:
        raise typer.BadParameter(f"{age!r} is before all time", param_hint=option) from None


_PAST: Final = {"requeue": "requeued", "discard": "discarded", "replay": "replayed", "prune": "deleted"}


def _act(
    verb: str,
    chosen: Filter | Sequence[int],
    change: Callable[..., Changed],
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Count, ask, change, and say what was done; exit with 1 if any event was refused."""
    _confirm(verb, chosen, lambda: change(chosen, dry_run=True).events, dry_run=dry_run, yes=yes)
    changed = change(chosen, dry_run=dry_run)
    if as_json:
        refused = [refusal._asdict() for refusal in changed.refused]
        print_json({"verb": verb, "dry_run": dry_run, "events": changed.events, "refused": refused})
    else:
        typer.echo(_done(verb, changed.events, dry_run=dry_run))
        for refusal in changed.refused:
            typer.echo(f"event {refusal.id} stays as it is: {refusal.reason}", err=True)
    if changed.refused:
        raise typer.Exit(EXIT_PROBLEM)


def _confirm(
    verb: str, chosen: Filter | Sequence[int] | None, count: Callable[[], int], *, dry_run: bool, yes: bool
) -> None:
    """Before several events are changed: how many they are, and whether that is meant."""
    if dry_run or yes or (isinstance(chosen, Sequence) and len(set(chosen)) == 1):
        return
    events = count()
    if events <= 1:
        return
    if not sys.stdin.isatty():
        fail(
            f"{events} events would be {_PAST[verb]}, and there is no terminal to ask: say --yes, or --dry-run to see",
            code=EXIT_USAGE,
        )
    if not typer.confirm(f"{verb} {events} events?", err=True):
        typer.echo("nothing was changed", err=True)
        raise typer.Exit(EXIT_PROBLEM)


def _done(verb: str, events: int, *, dry_run: bool) -> str:
    count = "1 event" if events == 1 else f"{events} events"
    return f"{count} would be {_PAST[verb]}" if dry_run else f"{count} {_PAST[verb]}"


# Tables and JSON

Column = tuple[str, Callable[["EventRow"], str]]

_COMMON: Final[tuple[Column, ...]] = (
    ("id", lambda event: str(event.id)),
    ("type", lambda event: event.aggregate_type),
    ("aggregate", lambda event: event.aggregate_id),
    ("version", lambda event: str(event.version)),
    ("kind", lambda event: event.kind),
    ("channels", lambda event: " ".join(event.channels)),
    ("state", lambda event: event.state),
)
_ERROR: Final[Column] = ("error", lambda event: event.error or "-")
_EVENT_COLUMNS: Final = (*_COMMON, ("created", lambda event: _time(event.created_at)), _ERROR)
_DEAD_COLUMNS: Final = (
    *_COMMON,
    ("tries", lambda event: "-" if event.tries is None else str(event.tries)),
    ("attempts", lambda event: "-" if event.attempts is None else str(event.attempts)),
    ("next try", lambda event: "-" if event.tries is None else _due(event.due_at)),
    _ERROR,
)


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}Z"


def _due(at: datetime | None) -> str:
    return "a person decides" if at is None else _time(at)


def _print_page(events: Sequence[EventRow], limit: int, as_json: bool, columns: Sequence[Column]) -> None:
    following = events[-1].id if len(events) == limit else None
    if as_json:
        print_json({"events": [asdict(event) for event in events], "next_after_id": following})
        return
    _print_table([name for name, _ in columns], [[cell(event) for _, cell in columns] for event in events])
    if following is not None:
        typer.echo(f"more with --after-id {following}", err=True)


def _print_details(event: EventDetails, as_json: bool) -> None:
    details = asdict(event)
    if as_json:
        for name in ("payload", "tags"):
            if details[name] is not None:
                # As it is stored: a number beyond 2**53 would not survive being parsed.
                details[name] = orjson.Fragment(details[name])
        print_json(details)
        return
    hold = details.pop("hold")
    for name in ("tries", "attempts", "due_at"):
        del details[name]
    rows = [(name, _text(value)) for name, value in details.items()]
    if event.hold is None:
        rows.append(("hold", "none"))
    else:
        rows += [(f"hold {name}", _text(value)) for name, value in hold.items() if name != "due_at"]
        rows.append(("hold next try", _due(event.hold.due_at)))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        typer.echo(f"{name:{width}}  {printable(text)}")


def _text(value: object) -> str:
    match value:
        case None:
            return "-"
        case datetime():
            return _time(value)
        case list():
            return " ".join(value)
    return str(value)


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns for a terminal's width; one line per row where there is no terminal."""
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 10_000).print(table)


# The file of settings

_HEADER: Final = """\
# Settings of outbox-relay. A line that is commented out shows the default, or an example where there is none.
#
# A flag wins over the environment (OUTBOX_RELAY_WORKERS and so on), which wins over this file.
# The database URL and the API key may also be in files of their own, which OUTBOX_RELAY_DATABASE_URL_FILE and
# OUTBOX_RELAY_CENTRIFUGO_API_KEY_FILE name.
"""
_EXAMPLES: Final[Mapping[str, object]] = {
    "database_url": "postgresql://relay:password@127.0.0.1:5432/shop",
    "centrifugo_url": "http://127.0.0.1:8000/api",
    "centrifugo_api_key": "the key",
    "centrifugo_api_key_file": "/run/secrets/centrifugo",
    "centrifugo_ca_file": "/etc/ssl/own-authority.pem",
    "metrics_port": 9109,
}


def _template() -> str:
    """A TOML file in which every setting is commented out."""
    lines = [_HEADER]
    settings = Settings()
    docs = configuration.docs(Settings)
    for name in (setting.name for setting in fields(Settings) if setting.name not in {"types", "namespaces"}):
        value = getattr(settings, name)
        lines += [f"# {docs[name]}", f"# {name} = {_toml(_EXAMPLES[name] if value is None else value)}", ""]
    lines += [f"# {docs['types']}", "# [types.order]"]
    own = TypeSettings()
    for name, doc in configuration.docs(TypeSettings).items():
        value = getattr(own, name)
        lines += [f"# {doc}", f"# {name} = {_toml(getattr(settings, name) if value is None else value)}"]
    lines += ["", f"# {docs['namespaces']}", "# [namespaces.feed]"]
    wire = NamespaceSettings()
    for name, doc in configuration.docs(NamespaceSettings).items():
        lines += [f"# {doc}", f"# {name} = {_toml(getattr(wire, name))}"]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    """A value as TOML, whose strings, numbers and booleans are JSON's; a large number as it is written by hand."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)


def _shown(settings: Settings) -> Mapping[str, Any]:
    """The settings without anything secret."""
    shown = {setting.name: getattr(settings, setting.name) for setting in fields(Settings)}
    shown["namespaces"] = {name: asdict(own) for name, own in settings.namespaces.items()}
    shown["types"] = {
        name: {key: value for key, value in asdict(own).items() if value is not None}
        for name, own in settings.types.items()
    }
    for name in configuration.SECRETS:
        if isinstance(shown[name], SecretStr):
            shown[name] = "***"
    if settings.database_url:
        shown["database_url"] = _without_password(settings.database_url.get_secret_value())
    return shown


def _without_password(url: str) -> str:
    """Only what is known to be harmless is shown: a password may be in many places of a URL."""
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    scheme, separator, rest = url.partition("://")
    try:
        parts = conninfo_to_dict(f"{scheme.partition('+')[0]}://{rest}" if separator else url)
    except psycopg.ProgrammingError:
        return "***"
    harmless = " ".join(f"{name}={parts[name]}" for name in ("host", "port", "user", "dbname") if name in parts)
    return f"{harmless} ***".strip()
