"""Whoever may write events can say in them what it likes: as data, and nothing of it is obeyed on its way."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from contextlib import closing
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql
from typer.testing import CliRunner

from outbox_relay import Outbox
from outbox_relay.cli import app
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.migrations import migrate
from outbox_relay.runner import Ended
from outbox_relay.store import Store
from tests.conftest import Connect, RunRelay, StartRelay, sqlalchemy_engine
from tests.support.gateway import Gateway, refuse
from tests.support.subscriber import Subscriber
from tests.support.writing import write

Subscribe = Callable[..., Subscriber]

TEXTS = {
    "JSON that ends a string and a command": '"}}]},{"publish":{"channel":"hist:other","data":1}}',
    "a backslash at the end": "a\\",
    "SQL": "'; DROP TABLE outbox; --",
    "placeholders": "%(id)s %s {outbox} $1 :name",
    "lines of HTTP": "a\r\nX-API-Key: other\r\n\r\nPOST / HTTP/1.1",
    "a line of a log": "a\n2026-01-01T00:00:00Z [error    ] forged",
    "what a terminal obeys": "\x1b[2J\x1b]0;owned\x07\x08\x7f\x9b31m",
    "what turns the writing": "a\u202eb\u2066c",
    "line ends of JavaScript": "a\u2028b\u2029c",
    "beyond the basic plane": "𝄞👩‍👩‍👧",
    "markup": "[red]a[/]<script>alert(1)</script>",
    "an array": '{a,"b"}',
}
SHADOWED: dict[LiteralString, LiteralString] = {
    "octet_length(text)": "int",
    "cardinality(anyarray)": "int",
    "array_position(text[], text)": "int",
    "jsonb_path_exists(jsonb, text)": "bool",
    "hashtextextended(text, int)": "bigint",
    "hashtextextended(text, bigint)": "bigint",
    "pg_try_advisory_xact_lock_shared(bigint)": "bool",
    "clock_timestamp()": "timestamptz",
    "statement_timestamp()": "timestamptz",
    "date_part(text, timestamptz)": "float8",
    "pg_backend_pid()": "int",
    "to_regclass(text)": "regclass",
    "has_table_privilege(text, text)": "bool",
    "same(outbox_state, outbox_state)": "bool",
}
"""What the outbox's own SQL calls, and in which type it expects the answer."""


@pytest.fixture
def trap(connect: Connect, database_url: str) -> Callable[[], list[str]]:
    """Functions and an operator in the schemas `public` and `evil`, which note who called them.

    Those in `evil` stand before PostgreSQL's own for every new session; those in `public` need not, where their types
    fit better.
    """
    admin = connect()
    admin.execute("CREATE SCHEMA evil; CREATE SEQUENCE evil.called; GRANT ALL ON SCHEMA evil TO PUBLIC")
    admin.execute("GRANT ALL ON SEQUENCE evil.called TO PUBLIC")
    for schema in (sql.SQL("public"), sql.SQL("evil")):
        for signature, result in SHADOWED.items():
            body = sql.SQL("BEGIN PERFORM pg_catalog.nextval('evil.called'); RETURN NULL; END")
            admin.execute(
                sql.SQL("CREATE FUNCTION {}.{} RETURNS {} LANGUAGE plpgsql AS {}").format(
                    schema, sql.SQL(signature), sql.SQL(result), body.as_string(admin)
                )
            )
        admin.execute(
            sql.SQL(
                "CREATE OPERATOR {0}.= (LEFTARG = outbox_state, RIGHTARG = outbox_state, FUNCTION = {0}.same)"
            ).format(schema)
        )
    name = sql.Identifier(admin.info.dbname)
    admin.execute(sql.SQL("ALTER DATABASE {} SET search_path = evil, public, pg_catalog").format(name))
    return lambda: [str(row) for row in admin.execute("SELECT last_value FROM evil.called WHERE is_called")]


def test_every_function_has_a_search_path_of_its_own(connect: Connect) -> None:
    """PostgreSQL's own names first: else it runs whatever the caller's path finds, as the caller."""
    functions = connect().execute("SELECT proname, proconfig FROM pg_proc WHERE pronamespace = 'public'::regnamespace")
    found = dict(functions.fetchall())
    assert {name: path for name, path in found.items() if path != ["search_path=pg_catalog, pg_temp"]} == {}
    assert "outbox_written" in found


def test_a_writer_cannot_replace_what_examines_its_events(connect: Connect, trap: Callable[[], list[str]]) -> None:
    """Nor can anybody else with a schema on the writer's path have something run as the writer."""
    connection = connect()
    write(connection, "1", 1, "plain:a")
    for aggregate_id, version, channels in (("", 1, ["a"]), ("1", 0, ["a"]), ("1", 1, [""]), ("1", 1, [])):
        with pytest.raises(psycopg.errors.CheckViolation):
            write(connection, aggregate_id, version, channels)
    assert trap() == []


def test_nobody_runs_anything_as_the_relay_or_the_operator(
    connect: Connect,
    run_relay: RunRelay,
    database_url: str,
    centrifugo: Centrifugo,
    gateway: Gateway,
    channel: str,
    trap: Callable[[], list[str]],
) -> None:
    """Delivered, refused, held, listed, counted, examined, pruned: only PostgreSQL's own functions take part."""
    connection = connect()
    gateway.fault = refuse(107, lambda command: command.aggregate == ("order", "bad"))
    for aggregate_id in ("good", "bad"):
        write(connection, aggregate_id, 1, channel)
    assert run_relay(api_url=gateway.url) is Ended.ONLY_HELD
    with closing(Store(database_url)) as store:
        store.anything_to_do()
        store.direct = False  # as behind a pooler
        store.anything_to_do()
    environment = {
        "OUTBOX_RELAY_DATABASE_URL": database_url,
        "OUTBOX_RELAY_CENTRIFUGO_URL": centrifugo.api_url,
        "OUTBOX_RELAY_CENTRIFUGO_API_KEY": centrifugo.api_key,
    }
    connection.execute("CREATE TABLE public.app (id text, version bigint); INSERT INTO app VALUES ('1', 1)")
    lists = ("events list", "events show 1", "dead list", "drift app --type none", "epoch show")
    for verb in ("check", "status", *lists, "dead discard 2", "epoch bump", "prune --yes"):
        result = CliRunner().invoke(app, verb.split(), env=environment)
        assert result.exit_code == 0, f"{verb}: {result.output}"
    assert trap() == []


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_arrive_as_they_were_written(
    text: str, connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """In every field that is a writer's to choose, and nothing else arrives."""
    subscriber = subscribe(channel)
    connection = connect()
    event_id = uuid.uuid4()
    connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload, tags, event_id) "
        "VALUES (%s, %s, 1, %s, %s, %s, %s)",
        (text, text, [channel], json.dumps(text), json.dumps({text: text}), event_id),
    )
    write(connection, "last", 1, channel)
    assert run_relay() is Ended.EMPTY
    [received] = [publication for publication in subscriber.wait_for(2) if publication.tags["ob_id"] != "last"]
    assert json.loads(received.data) == text
    assert {name: tag for name, tag in received.tags.items() if name != "ob_epoch"} == {
        "ob": "1",
        "ob_type": text,
        "ob_id": text,
        "ob_version": "1",
        "ob_event": str(event_id),
        "ob_kind": "change",
        text: text,
    }


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_channel_is_one_string(text: str, connect: Connect, run_relay: RunRelay, gateway: Gateway) -> None:
    """Also beside another channel. That nobody could subscribe to most of these is Centrifugo's to say."""
    heard: list[Any] = []

    answers = {"publish": {"publish": {}}, "broadcast": {"broadcast": {"responses": [{}, {}]}}}

    def hear(exchange: Any) -> None:
        # Two workers may send the two events in a request each.
        commands = json.loads(exchange.body)["commands"]
        heard.extend(commands)
        replies = [answers[name] for command in commands for name in command]
        exchange.answer(200, json.dumps({"replies": replies}).encode())

    gateway.fault = hear
    connection = connect()
    write(connection, "1", 1, text)
    write(connection, "2", 1, [text, "plain:a"])
    run_relay(api_url=gateway.url)
    one, two = sorted(heard, key=lambda command: "broadcast" in command)
    assert one["publish"]["channel"] == text
    assert two["broadcast"]["channels"] == [text, "plain:a"]


@pytest.mark.parametrize("schema", ['a"b', "a'; DROP TABLE outbox; --", "%(id)s {outbox} %s", "Ünï $$ ;\n\n:x"])
def test_a_schema_of_any_name(
    schema: str, empty_database_url: str, run_relay: RunRelay, centrifugo: Centrifugo, channel: str
) -> None:
    """Made, written to, delivered from, looked at and taken down; whatever is in the name stays a name."""
    engine = sqlalchemy_engine(empty_database_url)
    migrate(engine, schema=schema)
    with engine.begin() as connection:
        event = Outbox(schema).enqueue("order", "1", version=1, channels=channel, payload={})
        connection.execute(event)
    assert run_relay(database_url=empty_database_url, schema=schema) is Ended.EMPTY
    environment = {
        "OUTBOX_RELAY_DATABASE_URL": empty_database_url,
        "OUTBOX_RELAY_SCHEMA": schema,
        "OUTBOX_RELAY_CENTRIFUGO_URL": centrifugo.api_url,
        "OUTBOX_RELAY_CENTRIFUGO_API_KEY": centrifugo.api_key,
    }
    for verb in ("check", "status", "events list", "events show 1", "events replay 1", "dead list", "prune --yes"):
        result = CliRunner().invoke(app, verb.split(), env=environment)
        assert result.exit_code == 0, f"{verb}: {result.output}"
    assert run_relay(database_url=empty_database_url, schema=schema) is Ended.EMPTY
    migrate(engine, "base", schema=schema, down=True)


def test_a_compressed_payload_has_its_real_size(connect: Connect) -> None:
    """PostgreSQL hands on what another table has compressed: 60 MB in 700 kB. What fits is stored as it is read."""
    connection = connect()
    connection.execute("CREATE TEMP TABLE source (payload json)")
    insert = (
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) "
        "SELECT 'order', '1', 1, '{plain:a}', payload FROM source"
    )
    connection.execute("INSERT INTO source SELECT to_json(repeat('x', 60000000))")
    assert connection.execute("SELECT pg_column_size(payload) < 1000000 FROM source").fetchone() == (True,)
    with pytest.raises(psycopg.errors.CheckViolation, match="payload has at most 1 mib"):
        connection.execute(insert)
    connection.execute("UPDATE source SET payload = to_json(repeat('x', 1000000))")
    connection.execute(insert)
    size = connection.execute("SELECT pg_column_size(payload), pg_column_compression(payload) FROM outbox").fetchone()
    assert size == (1_000_002, None)


@pytest.mark.parametrize("form", ["console", "json"])
def test_nothing_in_a_row_forges_a_line_of_the_log(
    form: str, connect: Connect, start_relay: StartRelay, gateway: Gateway, channel: str
) -> None:
    """A refused event is logged with its names: in one line, in which a terminal finds nothing to obey."""
    connection = connect()
    name = TEXTS["a line of a log"] + TEXTS["what a terminal obeys"]
    connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) VALUES (%s, %s, 1, %s, '{}')",
        (name, name, [channel]),
    )
    gateway.fault = refuse(102, lambda _: True)
    relay = start_relay({"centrifugo_url": gateway.url, "log_format": form}, wait=False)
    gateway.wait_for_requests(3)
    relay.terminate()
    lines = [line for line in relay.output.splitlines() if "forged" in line]
    assert lines
    assert all("event refused" in line for line in lines)
    assert all(character.isprintable() for line in lines for character in line)


def test_nothing_in_a_row_is_obeyed_by_the_operator_s_terminal(connect: Connect, database_url: str) -> None:
    """Lists and details show names, tags, payload and errors of an event in lines of their own."""
    connection = connect()
    text = "".join(TEXTS.values())
    connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload, tags, traceparent) "
        "VALUES (%s, %s, 1, %s, %s, %s, %s)",
        (text[:255], text[:255], ["\x1b[2J\n"], '"\x9b31m"', json.dumps({text: text}), text),
    )
    connection.execute("UPDATE outbox SET state = 'dead', settled_at = now(), error = %s", [text])
    for verb in ("events list", "dead list", "events show 1"):
        result = CliRunner().invoke(app, verb.split(), env={"OUTBOX_RELAY_DATABASE_URL": database_url})
        assert result.exit_code == 0
        assert all(line.isprintable() for line in result.output.splitlines())
        assert not any(line.startswith("2026-01-01") for line in result.output.splitlines())
