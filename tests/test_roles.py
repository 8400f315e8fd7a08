"""docs/roles.sql: what each role can do, and that it can do no more."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import sql
from psycopg.errors import InsufficientPrivilege

from outbox_relay import Outbox
from outbox_relay.build import build_relay
from outbox_relay.config import load
from outbox_relay.doctor import examine
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.migrations import migrate
from tests.conftest import sqlalchemy_engine
from tests.support.gateway import Gateway, refuse
from tests.support.programs import psql
from tests.support.subscriber import Subscriber
from tests.support.waiting import wait_until

SCRIPT = Path(__file__).parents[1] / "docs" / "roles.sql"
PASSWORD = "only-for-this-test"

Subscribe = Callable[..., Subscriber]

only_public = pytest.mark.parametrize("site", ["public"], indirect=True)


class Site(NamedTuple):
    """A database with an outbox in `schema`, and the URLs of those who work on it."""

    schema: str
    admin: str
    owner: str
    writer: str
    relay: str


@pytest.fixture(params=["public", 'the "app"'], ids=["public", "strange"])
def site(empty_database_url: str, request: pytest.FixtureRequest) -> Iterator[Site]:
    """Migrated and given away to fresh roles, by the script as its first lines say; the roles go with the test."""
    schema: str = request.param
    migrate(sqlalchemy_engine(empty_database_url), schema=schema)
    run = uuid.uuid4().hex
    roles = {kind: f"{kind}-{run}" for kind in ("owner", "writer", "relay")}
    variables = [f"--set={name}={value}" for name, value in {"schema": schema, **roles}.items()]
    with psycopg.connect(empty_database_url, autocommit=True) as admin:
        admin.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # as the script says of PostgreSQL 14
        for _ in range(2):  # the second time it finds nothing to do
            psql(empty_database_url, *variables, f"--file={SCRIPT}")
        url = sa.make_url(empty_database_url)
        logins = {}
        for kind in ("writer", "relay"):
            alter = sql.SQL("ALTER ROLE {} PASSWORD {}")
            admin.execute(alter.format(sql.Identifier(roles[kind]), PASSWORD))
            login = url.set(username=roles[kind], password=PASSWORD)
            logins[kind] = login.render_as_string(hide_password=False)
        # It cannot log in: whoever is a member becomes it.
        owner = url.update_query_dict({"options": f"-c role={roles['owner']}"})
        yield Site(schema, empty_database_url, owner.render_as_string(hide_password=False), **logins)
        for role in roles.values():
            admin.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(sql.Identifier(role)))


def attempt(url: str, schema: str, statement: str) -> None:
    """Run one statement as somebody whose search path finds the outbox; what it did is rolled back."""
    with psycopg.connect(url) as connection:
        connection.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(schema)))
        try:
            connection.execute(statement.encode())
        finally:
            connection.rollback()


ROW = "(aggregate_type, aggregate_id, version, channels, payload"
INSERT = f"INSERT INTO outbox {ROW}) VALUES ('order', '1', 1, '{{plain:a}}', '{{}}')"


def insert_with(column: str, value: str) -> str:
    return f"INSERT INTO outbox {ROW}, {column}) VALUES ('order', '1', 1, '{{plain:a}}', '{{}}', {value})"


WRITTEN = [
    "event_id",
    "aggregate_type",
    "aggregate_id",
    "version",
    "kind",
    "channels",
    "payload",
    "tags",
    "expires_at",
    "traceparent",
    "base_version",
]
FORBIDDEN_TO_WRITER = [
    "SELECT FROM outbox",
    f"{INSERT} RETURNING id",
    "UPDATE outbox SET version = 2",
    "DELETE FROM outbox",
    "TRUNCATE outbox",
    insert_with("state", "'delivered'"),
    insert_with("created_at", "now()"),
    insert_with("ending", "'dead'"),
    insert_with("accepted", "'{a}'"),
    insert_with("settled_at", "now()"),
    insert_with("error", "'x'"),
    f"INSERT INTO outbox {ROW}, id) OVERRIDING SYSTEM VALUE VALUES ('order', '1', 1, '{{a}}', '{{}}', 1)",
    "SELECT FROM outbox_lane FOR UPDATE",
    "SELECT FROM outbox_hold",
    "DELETE FROM outbox_hold",
    "SELECT FROM outbox_epoch",
    "UPDATE outbox_epoch SET bumped_at = now()",
    *(f"UPDATE outbox SET {column} = {column}" for column in WRITTEN),
    "LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE",
    "CREATE TRIGGER t AFTER INSERT ON outbox FOR EACH ROW EXECUTE FUNCTION outbox_written()",
    "CREATE POLICY p ON outbox",
    "DROP TABLE outbox",
    "ALTER TABLE outbox DISABLE TRIGGER ALL",
]
FORBIDDEN_TO_RELAY = [
    INSERT,
    *(f"UPDATE outbox SET {column} = {column}" for column in WRITTEN),
    "UPDATE outbox SET created_at = now()",
    "TRUNCATE outbox",
    "INSERT INTO outbox_lane VALUES (256)",
    "DELETE FROM outbox_lane",
    "TRUNCATE outbox_hold",
    "INSERT INTO outbox_epoch VALUES (now())",
    "DELETE FROM outbox_epoch",
    "DROP TABLE outbox",
    "DROP INDEX outbox_pending",
    "ALTER TABLE outbox ADD COLUMN extra int",
    "ALTER TABLE outbox_hold OWNER TO CURRENT_USER",
    "ALTER TABLE outbox DISABLE TRIGGER outbox_written",
    "DROP FUNCTION outbox_written CASCADE",
    "DROP FUNCTION outbox_epoch",
    "CREATE TRIGGER t AFTER UPDATE ON outbox FOR EACH ROW EXECUTE FUNCTION outbox_written()",
    "CREATE FUNCTION trojan() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "UPDATE outbox_relay_version SET version_num = 'x'",
]


def test_the_writer_writes(site: Site) -> None:
    """The whole writing API, with every field, the epoch, and the plain INSERT."""
    outbox = Outbox(site.schema)
    event: dict[str, Any] = {
        "channels": "plain:a",
        "payload": {},
        "kind": "snapshot",
        "tags": {"a": "b"},
        "expires_at": datetime(2030, 1, 1, tzinfo=UTC),
        "event_id": uuid.uuid4(),
        "traceparent": "t",
        "base_version": 0,
    }
    with sqlalchemy_engine(site.writer).begin() as connection:
        connection.execute(outbox.enqueue("order", "1", version=1, **event))
        epoch = connection.scalar(outbox.epoch())
    with sqlalchemy_engine(site.relay).connect() as connection:
        assert connection.scalar(outbox.epoch()) == epoch
    attempt(site.writer, site.schema, INSERT)


@only_public
def test_the_writer_does_nothing_else(site: Site) -> None:
    """It cannot read, change or remove events, nor set what is the relay's to set."""
    assert allowed(site.writer, site, FORBIDDEN_TO_WRITER) == []


@only_public
def test_the_relay_adds_and_alters_nothing(site: Site) -> None:
    """It cannot add events, and cannot touch the tables themselves."""
    assert allowed(site.relay, site, FORBIDDEN_TO_RELAY) == []


def allowed(url: str, site: Site, statements: list[str]) -> list[str]:
    """Those of the statements that somebody may run. They are sound: the administrator may run them all."""
    found = []
    for statement in statements:
        attempt(site.admin, site.schema, statement)
        try:
            attempt(url, site.schema, statement)
        except InsufficientPrivilege:
            continue
        found.append(statement)
    return found


def test_a_relay_with_these_rights_delivers(
    site: Site, centrifugo: Centrifugo, subscribe: Subscribe, channel: str
) -> None:
    """All that a relay does, with the relay's rights alone: deliver and remove, hold, give up, go on; and the
    doctor finds nothing wrong."""
    subscriber = subscribe(channel)
    bad = refuse(107, lambda command: command.aggregate == ("order", "bad") and command.version == 1)
    with (
        Gateway(centrifugo.api_url, bad) as gateway,
        psycopg.connect(site.admin, autocommit=True) as admin,
        sqlalchemy_engine(site.writer).connect() as writer,
    ):
        settings = load(
            {
                "database_url": site.relay,
                "schema": site.schema,
                "centrifugo_url": gateway.url,
                "centrifugo_api_key": centrifugo.api_key,
                "keep": 0.0,
                "backoff_base": 0.05,
                "backoff_max": 0.05,
            },
            environ={},
        )
        assert [finding for finding in examine(settings) if not finding.ok] == []

        def write_event(name: str, version: int) -> None:
            event = Outbox(site.schema).enqueue("order", name, version=version, channels=channel, payload={})
            writer.execute(event)
            writer.commit()

        def rows(table: str) -> list[tuple[str]]:
            query = sql.SQL("SELECT aggregate_id::text FROM {}").format(sql.Identifier(site.schema, table))
            return admin.execute(query).fetchall()

        def is_given_up() -> bool:
            write_event("good", next(versions))  # that others pass is the evidence against it
            return not rows("outbox_hold")

        versions = itertools.count(1)
        with build_relay(settings):
            for version in (1, 2):
                write_event("bad", version)
            wait_until(lambda: rows("outbox_hold"), "the refused order waits")
            wait_until(is_given_up, "the refused event is dead, and its successor is delivered")
            received = subscriber.wait_for(next(versions))
            wait_until(lambda: rows("outbox") == [("bad",)], "what was delivered is gone, what is dead stays")
    assert [publication.version for publication in received if publication.tags["ob_id"] == "bad"] == [2]


def test_the_owner_migrates(site: Site) -> None:
    """The owner can take everything down and make it again."""
    migrate(sqlalchemy_engine(site.owner), "base", schema=site.schema, down=True)
    migrate(sqlalchemy_engine(site.owner), schema=site.schema)
