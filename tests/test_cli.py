"""The command line with real servers: what each verb does, says, and exits with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psycopg
import pytest
import sqlalchemy as sa

from outbox_relay import migrations
from outbox_relay.cli import app
from outbox_relay.embedded.centrifugo import Centrifugo
from tests.conftest import Connect, StartRelay
from tests.support.redis import Redis
from tests.support.subscriber import Subscriber
from tests.support.waiting import wait_until
from tests.support.writing import fact, states, write

CANARY = "c4nary"
NOWHERE = "http://127.0.0.1:1"
NO_DATABASE = f"postgresql://user:{CANARY}@127.0.0.1:1/none"

Subscribe = Callable[..., Subscriber]


class Result(NamedTuple):
    """How a verb ended."""

    exit_code: int
    stdout: str
    stderr: str


class Cli(Protocol):
    """Run a verb in this process, as `outbox-relay ARGUMENTS` with only these variables: OUTBOX_RELAY_…"""

    def __call__(self, *arguments: str, **environ: str) -> Result: ...


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("OUTBOX_RELAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, **environ: str) -> Result:
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(f"OUTBOX_RELAY_{name.upper()}", value)
            with pytest.raises(SystemExit) as ended:
                app(arguments)
        result = Result(int(ended.value.code or 0), *capsys.readouterr())
        assert CANARY not in result.stdout + result.stderr
        return result

    return run


def said(result: Result, code: int) -> str:
    """The one line on standard error of a verb that ends with `code`."""
    assert result.exit_code == code, result.stdout + result.stderr
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# Help

VERBS = {
    "run": ["--until-empty", "--workers", "SIGTERM", "second signal", "OUTBOX_RELAY_"],
    "migrate": ["--sql", "--to", "--down", "--current", "--schema", "2 seconds"],
    "check": ["--json", "--centrifugo-url", "Exit code 0"],
    "status": ["--json", "10,000"],
    "demo": ["--seconds", "outbox-relay[demo]"],
}


def test_help_names_the_verbs_and_where_settings_come_from(cli: Cli) -> None:
    """All that a beginner needs to find the rest."""
    text = cli("--help").stdout
    for word in (*VERBS, "OUTBOX_RELAY_DATABASE_URL", "OUTBOX_RELAY_CENTRIFUGO_API_KEY", "_FILE", "outbox-relay.toml"):
        assert word in text


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_is_enough_to_use_it(cli: Cli, verb: str) -> None:
    """Its options, what it does beyond them, and defaults that Rich has not taken for markup."""
    result = cli(verb, "--help")
    assert result.exit_code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stdout).split())
    for word in VERBS[verb]:
        assert word in text
    if verb != "demo":
        assert "[default: ./outbox-relay.toml if there is one]" in text
        assert "[default: public]" in text


def test_the_version(cli: Cli) -> None:
    """A number, and nothing else."""
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", cli("--version").stdout)


# migrate


def revision(url: str) -> str | None:
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        return migrations.current(connection)


def test_migrate_up_and_down(cli: Cli, empty_database_url: str) -> None:
    """Each step says where the database is now, and what would be the newest."""
    head = migrations.head()

    def migrate(*arguments: str) -> str:
        result = cli("migrate", *arguments, database_url=empty_database_url)
        assert (result.exit_code, result.stderr) == (0, "")
        return str(result.stdout)

    assert migrate("--current") == f"none (newest: {head})\n"
    assert revision(empty_database_url) is None
    assert migrate() == f"{head} (newest: {head})\n"
    assert migrate() == f"{head} (newest: {head})\n"
    assert migrate("--current") == f"{head} (newest: {head})\n"
    assert migrate("--down", "--to", "base") == f"none (newest: {head})\n"
    assert migrate("--to", "0001") == f"0001 (newest: {head})\n"
    assert revision(empty_database_url) == "0001"


def test_migrate_in_a_schema(cli: Cli, empty_database_url: str) -> None:
    """The schema is made where it is missing."""
    assert cli("migrate", "--schema", "our events", database_url=empty_database_url).exit_code == 0
    with psycopg.connect(empty_database_url) as connection:
        assert connection.execute('SELECT count(*) FROM "our events".outbox_lane').fetchone() == (256,)


def test_migrate_sql_needs_no_database(cli: Cli, empty_database_url: str) -> None:
    """It prints, and changes nothing; what it prints is complete."""
    up = cli("migrate", "--sql")
    assert up.exit_code == 0
    assert cli("migrate", "--sql", database_url=empty_database_url).stdout == up.stdout
    assert revision(empty_database_url) is None
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute(up.stdout.encode())
        assert revision(empty_database_url) == migrations.head()
        connection.execute(cli("migrate", "--sql", "--down", "--to", "base").stdout.encode())
    assert revision(empty_database_url) is None


def test_migrate_down_is_refused_while_events_wait(cli: Cli, connect: Connect, database_url: str) -> None:
    """One line that says what to do."""
    write(connect(), "1", 1, "plain:a")
    line = said(cli("migrate", "--down", "--to", "base", database_url=database_url), 1)
    assert "run --until-empty" in line


@pytest.mark.parametrize("how", [["--to", "nonsense"], ["--to", "nonsense", "--sql"], ["--down"], ["--down", "--sql"]])
def test_migrate_to_nowhere(cli: Cli, database_url: str, how: list[str]) -> None:
    """A revision that does not exist, or a way down without an end, is a mistake in the command."""
    result = cli("migrate", *how, database_url=database_url)
    said(result, 2)
    assert result.stdout == ""
    assert revision(database_url) == migrations.head()


# check


def problems(result: Result) -> list[dict[str, Any]]:
    """What `check --json` found wrong."""
    report = json.loads(result.stdout)
    wrong = [finding for finding in report["findings"] if not finding["ok"]]
    assert report["ok"] is (not wrong)
    assert result.exit_code == (1 if wrong else 0)
    assert all(finding["advice"] for finding in wrong)
    return wrong


@pytest.fixture
def good(database_url: str, centrifugo: Centrifugo) -> dict[str, str]:
    """The environment of a relay that works."""
    return {
        "database_url": database_url,
        "centrifugo_url": centrifugo.api_url,
        "centrifugo_api_key": centrifugo.api_key,
    }


def test_check_where_all_is_well(cli: Cli, good: dict[str, str]) -> None:
    """Exit code 0, and a line for everything that was looked at."""
    result = cli("check", **good)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "problem" not in result.stdout
    for what in ("PostgreSQL", "encoding UTF8", "outbox: all grants", "256 lanes", "schema version", "Centrifugo"):
        assert what in result.stdout
    assert problems(cli("check", "--json", **good)) == []


@pytest.mark.parametrize(
    ("change", "what", "advice"),
    [
        ({"centrifugo_api_key": CANARY}, "401: the API key is wrong", "OUTBOX_RELAY_CENTRIFUGO_API_KEY"),
        ({"centrifugo_url": NOWHERE}, "Connection refused", "OUTBOX_RELAY_CENTRIFUGO_URL"),
        ({"database_url": NO_DATABASE}, "Connection refused", "OUTBOX_RELAY_DATABASE_URL"),
        ({"database_url": f"postgresql://u:{CANARY}@[bad"}, "cannot be read", "OUTBOX_RELAY_DATABASE_URL"),
        ({"schema": "elsewhere"}, "schema 'elsewhere' has no outbox", "outbox-relay migrate"),
    ],
    ids=["key", "centrifugo", "database", "url", "schema"],
)
def test_check_finds_what_is_unreachable(
    cli: Cli, good: dict[str, str], change: dict[str, str], what: str, advice: str
) -> None:
    """Exit code 1, the problem and what to do, for people and for programs; whatever else is well is still said."""
    [finding] = problems(cli("check", "--json", **good | change))
    assert what in finding["what"]
    assert advice in finding["advice"]
    result = cli("check", **good | change)
    assert result.exit_code == 1
    assert f"problem {finding['what']}" in result.stdout
    assert finding["advice"] in result.stdout
    assert "ok " in result.stdout


@pytest.mark.parametrize(
    ("damage", "what", "advice"),
    [
        ("DROP TABLE outbox_hold", "has no outbox_hold", "outbox-relay migrate"),
        ("DELETE FROM outbox_lane WHERE lane = 7", "255 lanes", "insert the missing ones"),
        ("UPDATE outbox_relay_version SET version_num = '0000'", "schema version 0000", "outbox-relay migrate"),
    ],
)
def test_check_finds_what_is_missing(
    cli: Cli, good: dict[str, str], connect: Connect, damage: str, what: str, advice: str
) -> None:
    """A schema that is not as the migrations left it."""
    connect().execute(damage.encode())
    [finding] = problems(cli("check", "--json", **good))
    assert what in finding["what"]
    assert advice in finding["advice"]


@pytest.mark.parametrize("setting", ["on", "local", "off"])
def test_check_says_whether_commits_wait_for_the_disk(cli: Cli, good: dict[str, str], setting: str) -> None:
    """Where they do not a relay still works, and there is something to say."""
    options = {"options": f"-csynchronous_commit={setting}"}
    url = sa.make_url(good["database_url"]).update_query_dict(options).render_as_string(hide_password=False)
    result = cli("check", **good | {"database_url": url})
    assert result.exit_code == 0
    assert ("synchronous_commit is off" in result.stdout) is (setting == "off")
    assert ("SET synchronous_commit = on" in result.stdout) is (setting == "off")


@pytest.mark.parametrize(
    ("table", "privilege"),
    [("outbox", "UPDATE"), ("outbox", "DELETE"), ("outbox_lane", "SELECT"), ("outbox_hold", "INSERT")],
)
def test_check_finds_missing_grants(
    cli: Cli, good: dict[str, str], connect: Connect, database_url: str, table: str, privilege: str
) -> None:
    """Named with the statement that mends it."""
    connection = connect()
    role = sa.make_url(database_url).database  # unique on the server, as roles must be
    connection.execute(f'CREATE ROLE "{role}"'.encode())
    try:
        connection.execute(f'GRANT ALL ON ALL TABLES IN SCHEMA public TO "{role}"'.encode())
        connection.execute(f'REVOKE {privilege} ON {table} FROM "{role}"'.encode())
        as_role = sa.make_url(database_url).update_query_dict({"options": f"-crole={role}"})
        url = as_role.render_as_string(hide_password=False)
        [finding] = problems(cli("check", "--json", **good | {"database_url": url}))
        columns = (
            " (state, ending, accepted, settled_at, error, replay)"
            if (table, privilege) == ("outbox", "UPDATE")
            else ""
        )
        assert finding["what"] == f"{table}: no {privilege}{columns}"
        assert finding["advice"].startswith(f"GRANT {privilege}{columns} ON ")
    finally:
        connection.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"'.encode())


def test_check_where_the_application_migrates(cli: Cli, good: dict[str, str], connect: Connect) -> None:
    """Without our version table there is nothing to compare, and nothing wrong."""
    connect().execute("DROP TABLE outbox_relay_version")
    result = cli("check", **good)
    assert result.exit_code == 0
    assert "the application's own migrations" in result.stdout


def test_check_asks_centrifugo_for_its_maps(
    cli: Cli, good: dict[str, str], start_centrifugo: Callable[..., Centrifugo], tmp_path: Path
) -> None:
    """A namespace that is to be a map must be one at Centrifugo, and take versions there. Its broker keeps nothing."""
    with Redis() as redis:
        server = start_centrifugo(
            {
                "map_broker": {"enabled": True, "type": "redis", "redis": {"address": redis.url}},
                "channel": {
                    "namespaces": [
                        {"name": "kept", "subscription_type": "map", "map": {"mode": "persistent"}},
                        {"name": "map", "subscription_type": "map", "map": {"mode": "recoverable", "key_ttl": "60s"}},
                        {"name": "brief", "subscription_type": "map", "map": {"mode": "ephemeral", "key_ttl": "60s"}},
                        {"name": "hist"},
                    ]
                },
            }
        )
        asked = good | {"centrifugo_url": server.api_url, "centrifugo_api_key": server.api_key}

        def maps(*names: str) -> None:
            tables = (f'[namespaces.{name}]\nchannels = "map"\n' for name in names)
            (tmp_path / "outbox-relay.toml").write_text("".join(tables), encoding="utf-8")

        maps("map", "kept")
        before = redis.ask("DBSIZE")
        result = cli("check", **asked)
        assert result.exit_code == 0, result.stdout
        assert "ok      namespace 'map' is a map that takes versions" in result.stdout
        assert "ok      namespace 'kept' is a map that takes versions" in result.stdout
        for name, what, advice in [
            ("hist", "is no map", 'subscription_type "map" and map.mode "recoverable" or "persistent"'),
            ("brief", "is an ephemeral map, which takes no versions", 'map.mode "recoverable" or "persistent"'),
            ("nowhere", "is unknown to Centrifugo", "define it in Centrifugo's configuration"),
        ]:
            maps(name, "map")
            [finding] = problems(cli("check", "--json", **asked))
            assert finding["what"].startswith(f"namespace '{name}' {what}")
            assert advice in finding["advice"]
            assert cli("check", **asked).exit_code == 1
        assert redis.ask("DBSIZE") == before
        maps("map")
        redis.kill()
        [finding] = problems(cli("check", "--json", **asked))
        assert "whether it is a map is unknown: Centrifugo answers map_stats with 100" in finding["what"]
        assert "map_broker" in finding["advice"]


def test_check_asks_for_no_maps_where_centrifugo_does_not_answer(
    cli: Cli, good: dict[str, str], tmp_path: Path
) -> None:
    """One line says so, not one for each namespace."""
    (tmp_path / "outbox-relay.toml").write_text('[namespaces.m]\nchannels = "map"\n', encoding="utf-8")
    [finding] = problems(cli("check", "--json", **good | {"centrifugo_url": NOWHERE}))
    assert "Connection refused" in finding["what"]


def test_check_on_a_standby(cli: Cli, good: dict[str, str], database_url: str) -> None:
    """A database that takes no writes is not one that a relay can work on."""
    options = sa.make_url(database_url).update_query_dict({"options": "-cdefault_transaction_read_only=on"})
    [finding] = problems(
        cli("check", "--json", **good | {"database_url": options.render_as_string(hide_password=False)})
    )
    assert "the relay needs the primary" in finding["advice"]


# status


def test_status(cli: Cli, database_url: str, connect: Connect) -> None:
    """Counts by state and the age of the oldest pending event, for programs and for people."""
    connection = connect()
    for n, state in enumerate(["pending", "pending", "parked", "dead", "delivered"]):
        write(connection, str(n), 1, "plain:a")
        connection.execute("UPDATE outbox SET state = %s WHERE aggregate_id = %s", (state, str(n)))
    connection.execute("UPDATE outbox SET created_at = now() - interval '100 seconds'")
    report = json.loads(cli("status", "--json", database_url=database_url).stdout)
    assert 100 <= report["oldest_pending_seconds"] < 200
    counts = {name: report[name] for name in ("pending", "parked", "holds", "dead", "count_limit")}
    assert counts == {"pending": 2, "parked": 1, "holds": 0, "dead": 1, "count_limit": 10_000}
    text = cli("status", database_url=database_url).stdout
    assert re.search(r"pending +2\b", text)
    assert re.search(r"oldest pending +1\d\d\.\d s", text)


def test_status_of_nothing(cli: Cli, database_url: str) -> None:
    """No event, no age."""
    report = json.loads(cli("status", "--json", database_url=database_url).stdout)
    assert report["oldest_pending_seconds"] is None
    assert report["pending"] == 0


# run


def run_until_empty(start_relay: StartRelay) -> tuple[int, str]:
    """The real program; its exit code and its output."""
    process = start_relay(command=[sys.executable, "-m", "outbox_relay", "run", "--until-empty"], wait=False)
    return process.wait(), process.output


def test_run_until_empty(start_relay: StartRelay, connect: Connect, subscribe: Subscribe, channel: str) -> None:
    """Exit code 0 once everything is delivered."""
    subscriber = subscribe(channel)
    committed = [write(connect(), "1", version, channel) for version in (1, 2, 3)]
    code, _ = run_until_empty(start_relay)
    assert code == 0
    assert [fact(publication) for publication in subscriber.wait_for(3)] == committed
    assert states(connect()) == {"delivered": 3}


def test_run_until_empty_leaves_what_is_refused(start_relay: StartRelay, connect: Connect, channel: str) -> None:
    """Exit code 3 where only held and parked events are left: for cron to tell."""
    for version in (1, 2):
        write(connect(), "bad", version, "nowhere:a")
    write(connect(), "good", 1, channel)
    code, output = run_until_empty(start_relay)
    assert code == 3
    assert states(connect()) == {"delivered": 1, "parked": 2}
    assert "unknown channel" in output


# Settings


def test_settings_of_every_source_reach_the_verb(
    cli: Cli, empty_database_url: str, tmp_path: Path, connect: Connect
) -> None:
    """Flag over environment over file; the file is named, or lies in the working folder; secrets may be in files."""
    (tmp_path / "url").write_text(f"{empty_database_url}\n", encoding="utf-8")
    (tmp_path / "outbox-relay.toml").write_text('schema = "folder"\n', encoding="utf-8")
    (tmp_path / "named.toml").write_text('schema = "named"\n', encoding="utf-8")
    url = {"database_url_file": str(tmp_path / "url")}
    for arguments, environ, schema in (
        ((), {}, "folder"),
        (("--config", "named.toml"), {}, "named"),
        (("--config", "named.toml"), {"schema": "environment"}, "environment"),
        (("--config", "named.toml", "--schema", "flag"), {"schema": "environment"}, "flag"),
    ):
        assert cli("migrate", *arguments, **url, **environ).exit_code == 0
        with psycopg.connect(empty_database_url) as connection:
            query = "SELECT nspname FROM pg_namespace JOIN pg_class c ON relnamespace = pg_namespace.oid "
            made = {name for (name,) in connection.execute(query + "WHERE relname = 'outbox'").fetchall()}
        assert schema in made


MISTAKES: dict[str, tuple[Sequence[str], dict[str, str], str]] = {
    "nothing set": (["run"], {}, "database_url is missing: set OUTBOX_RELAY_DATABASE_URL"),
    "no address": (["run"], {"database_url": NO_DATABASE}, "centrifugo_url is missing"),
    "no key": (["check"], {"database_url": NO_DATABASE, "centrifugo_url": NOWHERE}, "centrifugo_api_key is missing"),
    "migrate without a database": (["migrate"], {}, "database_url is missing"),
    "status without a database": (["status"], {}, "database_url is missing"),
    "a setting out of bounds": (["run", "--workers", "0"], {}, "workers (OUTBOX_RELAY_WORKERS): "),
    "a setting of a wrong type": (["status"], {"lanes": "all"}, "lanes (OUTBOX_RELAY_LANES): "),
    "a wrong choice": (["run", "--log-format", "xml"], {}, "log_format (OUTBOX_RELAY_LOG_FORMAT): "),
    "an address that is none": (
        ["run"],
        {"database_url": NO_DATABASE, "centrifugo_url": "centrifugo:8000", "centrifugo_api_key": CANARY},
        "centrifugo_url: not an http:// or https:// URL",
    ),
    "the same in check": (
        ["check"],
        {"database_url": NO_DATABASE, "centrifugo_url": "centrifugo:8000", "centrifugo_api_key": CANARY},
        "centrifugo_url: not an http:// or https:// URL",
    ),
    "a key that no header can hold": (
        ["check"],
        {"database_url": NO_DATABASE, "centrifugo_url": NOWHERE, "centrifugo_api_key": f"{CANARY}\nx"},
        "centrifugo_api_key",
    ),
    "a key outside ASCII": (
        ["check"],
        {"database_url": NO_DATABASE, "centrifugo_url": NOWHERE, "centrifugo_api_key": f"{CANARY}é"},
        "centrifugo_api_key",
    ),
    "a missing file": (["run", "--config", "no.toml"], {}, "no.toml cannot be read: No such file"),
    "a missing secret": (["run"], {"centrifugo_api_key_file": "no"}, "OUTBOX_RELAY_CENTRIFUGO_API_KEY_FILE names"),
}


@pytest.mark.parametrize(("arguments", "environ", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_wrong_setting_is_one_line(cli: Cli, arguments: Sequence[str], environ: dict[str, str], says: str) -> None:
    """Exit code 2, which setting and why, no traceback and no secret."""
    assert says in said(cli(*arguments, **environ), 2)


def test_an_unknown_key_in_the_file_is_one_line(cli: Cli, tmp_path: Path) -> None:
    """A misspelt setting is not silently ignored."""
    (tmp_path / "outbox-relay.toml").write_text("worker = 3\n", encoding="utf-8")
    assert "there is no setting 'worker'" in said(cli("status"), 2)


def test_a_mistake_in_the_real_program() -> None:
    """As the shell sees it: nothing on standard output, one line on standard error, no traceback."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_RELAY_")}
    command = [sys.executable, "-m", "outbox_relay", "run", "--workers", "0"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(r"error: workers .*\n", ended.stderr)


@pytest.mark.parametrize("verb", ["status", "migrate"])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        (NO_DATABASE, "Connection refused"),
        (f"postgresql://u:{CANARY}@[bad", "cannot be read"),
        (f"host=127.0.0.1 port=1 password = '{CANARY} with spaces' nonsense", "cannot be read"),
    ],
    ids=["unreachable", "url", "keywords"],
)
def test_trouble_with_the_database_is_one_line(cli: Cli, verb: str, url: str, says: str) -> None:
    """Exit code 1, what the database says, and never the password."""
    assert says in said(cli(verb, database_url=url), 1)


def test_a_database_without_tables_is_one_line(cli: Cli, empty_database_url: str) -> None:
    """Exit code 1, and what is missing."""
    assert "does not exist" in said(cli("status", database_url=empty_database_url), 1)


def test_secrets_stay_out_of_the_log(start_relay: StartRelay, connect: Connect, channel: str) -> None:
    """Relays in trouble say what is wrong, at the chattiest level and in both forms, and no secret."""
    write(connect(), "1", 1, channel)
    refused = start_relay({"centrifugo_api_key": CANARY, "log_level": "debug", "workers": 2}, wait=False)
    lost = start_relay({"database_url": NO_DATABASE, "log_level": "debug"}, wait=False)
    on_a_console = start_relay({"database_url": NO_DATABASE, "log_format": "console"}, wait=False)
    refused.wait_for("outage: nothing is published, no event is blamed")
    lost.wait_for("database lost, connecting again")
    wait_until(lambda: "database lost" in on_a_console.output, "the relay says so")
    for relay in (refused, lost, on_a_console):
        assert relay.terminate() == 0
        assert CANARY not in relay.output
        assert "Traceback" not in relay.output
