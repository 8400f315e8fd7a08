"""The operator's verbs on the command line: output, JSON, exit codes, refusals, and that a dry run changes nothing."""

from __future__ import annotations

import json
import os
import pty
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from outbox_relay import config
from outbox_relay.cli import app
from tests.conftest import Connect, RunRelay
from tests.support.writing import Connection, states

OK, PROBLEM, USAGE = 0, 1, 2


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def table(self) -> list[list[str]]:
        """The cells of a table, its head left out; two blanks end a cell."""
        return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in self.out.splitlines()[1:]]


Cli = Callable[..., Ended]


@pytest.fixture
def cli(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line without a terminal, in an empty folder; `environment` beside the database's URL."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("OUTBOX_RELAY_")]:
        monkeypatch.delenv(name)

    def run(*arguments: object, **environment: str) -> Ended:
        environment = {"OUTBOX_RELAY_DATABASE_URL": database_url} | environment
        result = CliRunner().invoke(app, [*map(str, arguments)], env=environment, catch_exceptions=False)
        return Ended(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def connection(connect: Connect) -> Connection:
    return connect()


@pytest.fixture
def terminal(database_url: str) -> Iterator[Callable[..., Ended]]:
    """Run the command line with a terminal as its standard input, where somebody types `answer`."""
    ours, theirs = pty.openpty()

    def run(answer: str, *arguments: str) -> Ended:
        os.write(ours, f"{answer}\n".encode())
        ended = subprocess.run(
            [sys.executable, "-m", "outbox_relay", *arguments, "--database-url", database_url],
            stdin=theirs,
            capture_output=True,
            text=True,
            check=False,
        )
        return Ended(ended.returncode, ended.stdout.strip(), ended.stderr)

    try:
        yield run
    finally:
        os.close(ours)
        os.close(theirs)


def add(connection: Connection, state: str, aggregate: str = "1", *, days: int = 0) -> int:
    row = connection.execute(
        "INSERT INTO outbox "
        "  (aggregate_type, aggregate_id, version, channels, payload, state, created_at, settled_at, error) "
        "SELECT 'order', %(aggregate)s, 1, '{plain:a,plain:b}', '{\"n\": 12345678901234567890.10}', "
        "       %(state)s::outbox_state, t, CASE WHEN %(state)s NOT IN ('pending', 'parked') THEN t END, "
        "       CASE WHEN %(state)s = 'dead' THEN 'refused' END "
        "FROM (SELECT now() - %(days)s * interval '1 day') AS x(t) RETURNING id",
        {"aggregate": aggregate, "state": state, "days": days},
    ).fetchone()
    assert row is not None
    id_: int = row[0]
    return id_


def hold(connection: Connection, head: int, due: str = "2031-01-01") -> None:
    connection.execute(
        "INSERT INTO outbox_hold (aggregate_type, aggregate_id, head_id, due_at, tries, attempts, "
        "                         first_refused_at, refused_at, error) "
        "SELECT aggregate_type, aggregate_id, id, %s, 5, 2, now(), now(), 'refused' FROM outbox WHERE id = %s",
        (due, head),
    )


# Looking


def test_events_are_listed(cli: Cli, connection: Connection) -> None:
    first, second = add(connection, "dead"), add(connection, "pending", "a b")
    ended = cli("events", "list")
    assert (ended.code, ended.err) == (OK, "")
    assert ended.out.split()[:9] == [
        "id",
        "type",
        "aggregate",
        "version",
        "kind",
        "channels",
        "state",
        "created",
        "error",
    ]
    assert [row[:7] for row in ended.table] == [
        [str(first), "order", "1", "1", "change", "plain:a plain:b", "dead"],
        [str(second), "order", "a b", "1", "change", "plain:a plain:b", "pending"],
    ]
    assert [row[-1] for row in ended.table] == ["refused", "-"]


def test_events_are_listed_as_json_in_pages(cli: Cli, connection: Connection) -> None:
    ids = [add(connection, "delivered") for _ in range(3)]
    page = cli("events", "list", "--json", "--limit", 2).json
    assert ([event["id"] for event in page["events"]], page["next_after_id"]) == (ids[:2], ids[1])
    assert page["events"][0].keys() == {
        "id", "aggregate_type", "aggregate_id", "version", "kind", "channels", "state", "created_at", "settled_at",
        "error", "tries", "attempts", "due_at",
    }  # fmt: skip
    page = cli("events", "list", "--json", "--limit", 2, "--after-id", ids[1]).json
    assert ([event["id"] for event in page["events"]], page["next_after_id"]) == (ids[2:], None)
    assert f"more with --after-id {ids[1]}" in cli("events", "list", "--limit", 2).err


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["--type", "user"], []),
        (["--type", "order", "--aggregate", "2"], ["2"]),
        (["--channel", "plain:b"], ["1", "2", "3"]),
        (["--channel", "plain:c"], []),
        (["--state", "dead"], ["1"]),
        (["--older-than", "36h"], ["2", "3"]),
        (["--newer-than", "90s"], ["1"]),
        (["--older-than", "1.5d", "--newer-than", "14400m"], ["2"]),
    ],
    ids=" ".join,
)
def test_filters_choose(cli: Cli, connection: Connection, filters: list[str], expected: list[str]) -> None:
    for state, aggregate, days in (("dead", "1", 0), ("delivered", "2", 5), ("pending", "3", 20)):
        add(connection, state, aggregate, days=days)
    listed = cli("events", "list", "--json", *filters).json
    assert [event["aggregate_id"] for event in listed["events"]] == expected


def test_an_event_is_shown(cli: Cli, connection: Connection) -> None:
    head, behind = add(connection, "parked"), add(connection, "parked")
    hold(connection, head)
    shown = dict(line.split(maxsplit=1) for line in cli("events", "show", behind).out.splitlines())
    assert shown["payload"] == '{"n": 12345678901234567890.10}'
    assert shown["state"] == "parked"
    ended = cli("dead", "show", behind, "--json")
    assert (ended.code, ended.json["hold"]["head_id"], ended.json["hold"]["parked"]) == (OK, head, 2)
    assert '"payload": {"n": 12345678901234567890.10}' in ended.out
    assert ["hold next try", "2031-01-01 00:00:00Z"] in cli("events", "show", head).table


def test_what_needs_a_person_is_listed(cli: Cli, connection: Connection) -> None:
    dead, head, waited_for = (
        add(connection, state, state + n) for n, state in (("", "dead"), ("", "parked"), ("2", "dead"))
    )
    hold(connection, head)
    hold(connection, waited_for, "infinity")
    assert [(row[0], row[-4:]) for row in cli("dead", "list").table] == [
        (str(dead), ["-", "-", "-", "refused"]),
        (str(head), ["5", "2", "2031-01-01 00:00:00Z", "-"]),
        (str(waited_for), ["5", "2", "a person decides", "refused"]),
    ]
    [event] = cli("dead", "list", "--json", "--aggregate", "parked").json["events"]
    assert (event["id"], event["tries"], event["attempts"], event["due_at"]) == (
        head,
        5,
        2,
        "2031-01-01T00:00:00+00:00",
    )


# Changing


class Verb(NamedTuple):
    """A verb that changes events from one state to another, and how it says so."""

    words: tuple[str, str]
    before: str
    after: str
    said: str


every_verb = pytest.mark.parametrize(
    "verb",
    [
        Verb(("dead", "requeue"), "dead", "pending", "requeued"),
        Verb(("dead", "discard"), "dead", "discarded", "discarded"),
        Verb(("events", "replay"), "delivered", "pending", "replayed"),
    ],
    ids=lambda verb: verb.words[1],
)


@every_verb
def test_one_event_is_changed_without_a_question(cli: Cli, connection: Connection, verb: Verb) -> None:
    event, _ = add(connection, verb.before), add(connection, verb.before, "2")
    assert cli(*verb.words, event, "--dry-run") == Ended(OK, f"1 event would be {verb.said}\n", "")
    assert states(connection) == {verb.before: 2}
    assert cli(*verb.words, event) == Ended(OK, f"1 event {verb.said}\n", "")
    assert states(connection) == {verb.before: 1, verb.after: 1}
    ended = cli(*verb.words, "--aggregate", 2, "--json")
    assert (ended.code, ended.json) == (OK, {"verb": verb.words[1], "dry_run": False, "events": 1, "refused": []})
    assert states(connection) == {verb.after: 2}


@every_verb
def test_several_events_need_a_yes(cli: Cli, connection: Connection, verb: Verb) -> None:
    for aggregate in ("1", "2", "3"):
        add(connection, verb.before, aggregate)
    ended = cli(*verb.words, "--type", "order")
    assert (ended.code, ended.out) == (USAGE, "")
    assert ended.err == (
        f"error: 3 events would be {verb.said}, and there is no terminal to ask: say --yes, or --dry-run to see\n"
    )
    assert cli(*verb.words, "--type", "order", "--dry-run") == Ended(OK, f"3 events would be {verb.said}\n", "")
    assert states(connection) == {verb.before: 3}
    assert cli(*verb.words, "--all", "--yes") == Ended(OK, f"3 events {verb.said}\n", "")
    assert states(connection) == {verb.after: 3}


def test_somebody_at_a_terminal_is_asked(terminal: Callable[..., Ended], connection: Connection) -> None:
    for aggregate in ("1", "2"):
        add(connection, "dead", aggregate)
    ended = terminal("n", "dead", "requeue", "--all")
    assert (ended.code, ended.out) == (PROBLEM, "")
    assert "requeue 2 events? [y/N]" in ended.err
    assert "nothing was changed" in ended.err
    assert states(connection) == {"dead": 2}
    ended = terminal("y", "dead", "requeue", "--all")
    assert (ended.code, ended.out) == (OK, "2 events requeued")
    assert states(connection) == {"pending": 2}


@every_verb
def test_it_must_be_said_which_events(cli: Cli, connection: Connection, verb: Verb) -> None:
    event = add(connection, verb.before)
    for arguments in ([], [event, "--all"], [event, "--type", "order"], ["--all", "--type", "order"]):
        ended = cli(*verb.words, *arguments)
        assert (ended.code, ended.out) == (USAGE, "")
        assert "give ids of events, or filters such as --type and" in " ".join(ended.err.replace("│", " ").split())
    assert states(connection) == {verb.before: 1}


@every_verb
def test_events_that_are_refused_are_named(cli: Cli, connection: Connection, verb: Verb) -> None:
    good, expired = add(connection, verb.before), add(connection, "expired", "2")
    ended = cli(*verb.words, good, expired, "--yes")
    assert (ended.code, ended.out) == (PROBLEM, f"1 event {verb.said}\n")
    assert ended.err.startswith(f"event {expired} stays as it is: it is expired")
    ended = cli(*verb.words, 999, "--json")
    assert (ended.code, ended.json["events"]) == (PROBLEM, 0)
    assert ended.json["refused"] == [
        {"id": 999, "reason": "there is no such event: it was never committed, or deleted after its time"}
    ]
    assert verb.after in states(connection)


def test_a_late_requeue_must_be_asked_for(cli: Cli, connection: Connection) -> None:
    dead, successor = add(connection, "dead"), add(connection, "delivered")
    ended = cli("dead", "requeue", dead)
    assert (ended.code, ended.out) == (PROBLEM, "0 events requeued\n")
    assert ended.err == (
        f"event {dead} stays as it is: a later event of its aggregate, {successor}, has gone out already. "
        "If subscribers compare versions, requeue it with --late\n"
    )
    assert cli("dead", "requeue", dead, "--late") == Ended(OK, "1 event requeued\n", "")


def test_there_is_nothing_to_replay_where_nothing_is_kept(cli: Cli) -> None:
    ended = cli("events", "replay", "--all", OUTBOX_RELAY_KEEP="0")
    assert (ended.code, ended.out) == (PROBLEM, "")
    assert ended.err == (
        "error: keep is 0, so events are deleted when they are delivered: there is nothing to replay\n"
    )


def test_a_held_head_is_given_up_and_its_successors_go_out(
    cli: Cli, connection: Connection, run_relay: RunRelay
) -> None:
    head, _behind = add(connection, "parked"), add(connection, "parked")
    hold(connection, head)
    assert cli("dead", "discard", head).code == OK
    run_relay()
    assert states(connection) == {"discarded": 1, "delivered": 1}


def test_prune_deletes_what_ended_long_ago(cli: Cli, connection: Connection) -> None:
    for state in ("delivered", "dead", "pending"):
        for days in (1, 30, 300):
            add(connection, state, days=days)
    assert cli("prune", "--dry-run").out == "3 events would be deleted\n"
    assert cli("prune").err == (
        "error: 3 events would be deleted, and there is no terminal to ask: say --yes, or --dry-run to see\n"
    )
    assert cli("prune", "--keep", "40d", "--keep-dead", "400d").out == "1 event deleted\n"
    ended = cli("prune", "--yes", "--json")
    assert (ended.code, ended.json) == (OK, {"verb": "prune", "dry_run": False, "events": 2})
    assert cli("prune", "--keep", "0", "--keep-dead", "0", "--yes").out == "3 events deleted\n"
    assert states(connection) == {"pending": 3}


# Refusals that all verbs share


@pytest.mark.parametrize(
    "verb",
    [
        ["events", "list"],
        ["events", "show", "1"],
        ["events", "replay", "1"],
        ["dead", "list"],
        ["dead", "show", "1"],
        ["dead", "requeue", "1"],
        ["dead", "discard", "1"],
        ["prune"],
    ],
    ids=" ".join,
)
def test_every_verb_says_in_one_line_what_is_missing(cli: Cli, verb: list[str]) -> None:
    ended = cli(*verb, OUTBOX_RELAY_DATABASE_URL="")
    assert (ended.code, ended.out) == (USAGE, "")
    assert ended.err.startswith("error: database_url is missing: set OUTBOX_RELAY_DATABASE_URL")
    ended = cli(*verb, "--schema", "elsewhere")
    assert (ended.code, ended.out) == (PROBLEM, "")
    assert ended.err == (
        "error: there is no outbox in schema 'elsewhere': name its schema, or run outbox-relay migrate\n"
    )
    ended = cli(*verb, OUTBOX_RELAY_DATABASE_URL="postgresql://u:s3cret@127.0.0.1:1/nothing")
    assert (ended.code, ended.out) == (PROBLEM, "")
    assert ended.err.startswith("error: the database says: ")
    assert ended.err.count("\n") == 1
    assert "s3cret" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["events", "list", "--state", "lost"], "choose one of pending, parked, delivered"),
        (["events", "list", "--older-than", "soon"], "'soon' is no age: give one like 90s, 15m, 2h or 7d"),
        (["events", "list", "--older-than", "9999999d"], "is before all time"),
        (["prune", "--keep", "-1d"], "is no age"),
        (["events", "show", "nine"], "Invalid value for 'ID'"),
        (["events", "show"], "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_understood_is_refused(cli: Cli, arguments: list[str], text: str) -> None:
    ended = cli(*arguments)
    assert (ended.code, ended.out) == (USAGE, "")
    assert text in " ".join(ended.err.replace("│", " ").split())


def test_an_unknown_event_is_a_problem(cli: Cli) -> None:
    assert cli("events", "show", 9) == Ended(
        PROBLEM, "", "error: there is no event 9: it was never committed, or deleted after its time\n"
    )


# Settings


def test_the_file_that_init_writes_has_every_setting_and_loads(cli: Cli, tmp_path: Path) -> None:
    assert cli("config", "init") == Ended(OK, "wrote outbox-relay.toml: uncomment what you change\n", "")
    path = tmp_path / "outbox-relay.toml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert tomllib.loads(path.read_text()) == {}
    assert config.load({}, environ={}, file=path) == config.Settings()
    uncommented = "".join(
        f"{line.removeprefix('# ')}\n"
        for line in path.read_text().splitlines()
        if " = " in line or line in {"# [types.order]", "# [namespaces.feed]"}
    )
    values = tomllib.loads(uncommented)
    path.write_text(uncommented.replace("centrifugo_api_key_file", "# the key itself is given"))
    assert values.keys() == config.docs(config.Settings).keys()
    assert values["types"]["order"].keys() == config.docs(config.TypeSettings).keys()
    assert values["namespaces"]["feed"].keys() == config.docs(config.NamespaceSettings).keys()
    settings, defaults = config.load({}, environ={}, file=path), config.Settings()
    for name in values.keys() - {"types", "namespaces", "centrifugo_api_key_file"}:
        assert getattr(settings, name) == getattr(defaults, name) or getattr(defaults, name) is None
    for name, text in config.docs(config.Settings).items():
        assert text, name


def test_init_overwrites_nothing_unless_it_is_told_to(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("workers = 3\n")
    path.chmod(0o644)
    assert cli("config", "init", path) == Ended(
        PROBLEM, "", f"error: {path} is there already: say --force to overwrite it, or name another file\n"
    )
    assert path.read_text() == "workers = 3\n"
    assert cli("config", "init", path, "--force", "--json").json == {"path": str(path)}
    assert "workers = 2" in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ended = cli("config", "init", tmp_path / "nowhere" / "own.toml")
    assert (ended.code, ended.err.count("cannot be written: No such file or directory")) == (PROBLEM, 1)


def test_show_says_where_each_value_comes_from(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "outbox-relay.toml").write_text(
        'workers = 3\nschema = "a"\nkeep = 0\n[types.order]\nafter_dead = "wait"\n'
        "[namespaces.feed]\nbundle_events = 9\n"
    )
    key = tmp_path / "key"
    key.write_text("k3y-of-centrifugo\n")
    environment = {"OUTBOX_RELAY_KEEP": "60", "OUTBOX_RELAY_CENTRIFUGO_API_KEY_FILE": str(key)}
    ended = cli("config", "show", "--schema", "b", "--json", **environment)
    shown = {name: (each["value"], each["source"]) for name, each in ended.json.items()}
    assert shown.keys() == config.docs(config.Settings).keys()
    assert shown["workers"] == (3, "file outbox-relay.toml")
    assert shown["schema"] == ("b", "flag")
    assert shown["keep"] == (60, "environment OUTBOX_RELAY_KEEP")
    assert shown["lanes"] == (64, "default")
    assert shown["types"] == ({"order": {"after_dead": "wait", "conflate": False}}, "file outbox-relay.toml")
    assert shown["namespaces"] == ({"feed": {"channels": "stream", "bundle_events": 9}}, "file outbox-relay.toml")
    assert shown["centrifugo_api_key"] == ("***", "environment OUTBOX_RELAY_CENTRIFUGO_API_KEY_FILE")
    rows = {row[0]: row[1:] for row in cli("config", "show", **environment).table}
    assert rows["keep"] == ["60", "environment OUTBOX_RELAY_KEEP"]
    assert rows["centrifugo_url"] == ["-", "default"]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://app:s3cret@db:5433/shop",
        "postgresql+psycopg://app:s3cret@db:5433/shop",
        "postgresql://db:5433/shop?user=app&password=s3cret",
        "host=db port=5433 user=app dbname=shop password = 's3cret'",
        "host=db port=5433 user=app dbname=shop password='no s3cret",
    ],
)
def test_secrets_are_never_shown(cli: Cli, url: str) -> None:
    for form in ([], ["--json"]):
        ended = cli("config", "show", *form, OUTBOX_RELAY_DATABASE_URL=url, OUTBOX_RELAY_CENTRIFUGO_API_KEY="s3cret")
        assert ended.code == OK
        assert "s3cret" not in ended.out + ended.err
        assert "'no" in url or "host=db port=5433 user=app dbname=shop ***" in ended.out


def test_settings_that_are_wrong_are_usage(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "outbox-relay.toml").write_text("worker = 3\n")
    assert cli("config", "show") == Ended(
        USAGE, "", "error: there is no setting 'worker': outbox-relay config show lists them\n"
    )
