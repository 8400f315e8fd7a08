"""`outbox-relay check`: what a relay needs of PostgreSQL and Centrifugo, looked at one by one."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql

from outbox_relay import migrations
from outbox_relay.build import build_publisher, wires
from outbox_relay.centrifugo import Centrifugo
from outbox_relay.config import Settings
from outbox_relay.database import DatabaseUnavailableError, connect
from outbox_relay.endpoint import NO_ANSWER, api_url
from outbox_relay.event import Outage
from outbox_relay.outbox import LANES

OLDEST_POSTGRESQL: Final = 14
_UPDATED: Final = "state, ending, accepted, settled_at, error, replay"
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_GRANTS: Final = {
    "outbox": ("SELECT", f"UPDATE ({_UPDATED})", "DELETE"),
    "outbox_lane": ("SELECT", "UPDATE"),
    "outbox_hold": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "outbox_epoch": ("SELECT", "UPDATE"),
    "outbox_generation": ("SELECT",),
    "outbox_id_seq": ("SELECT",),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at, and what to do about it if it is not well, or could be better."""

    ok: bool
    what: str
    advice: str = ""

    def redacted(self, redact: Callable[[str], str]) -> Finding:
        return replace(self, what=redact(self.what), advice=redact(self.advice))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at everything; what cannot be looked at for want of something earlier is left out."""
    yield from _database(settings)
    yield from _centrifugo(settings)


def _database(settings: Settings) -> Iterator[Finding]:
    url = settings.database_url.get_secret_value() if settings.database_url else ""
    try:
        connection = connect(url)
    except DatabaseUnavailableError as error:
        advice = "check OUTBOX_RELAY_DATABASE_URL, and that PostgreSQL accepts connections from here"
        if "read-only" in str(error) or "standby" in str(error):
            advice = "the relay needs the primary: this is a standby, or read-only"
        yield Finding(False, f"database: {error}", advice)
        return
    with connection, connection.transaction():
        connection.execute("SET LOCAL search_path = pg_catalog")
        info = connection.info
        yield privacy(
            info.host, encrypted=connection.pgconn.ssl_in_use, mode=info.get_parameters().get("sslmode", "prefer")
        )
        yield from _server(connection)
        yield from _schema(connection, settings)


def privacy(host: str, *, encrypted: bool, mode: str) -> Finding:
    """Who can read or change what goes between us and PostgreSQL on `host`; `mode` is libpq's sslmode."""
    if encrypted and mode == "verify-full":
        return Finding(True, "TLS, and the certificate is for this host")
    if not encrypted and (host.startswith("/") or host in _LOOPBACK):
        return Finding(True, "PostgreSQL is on this host: no TLS")
    advice = "add sslmode=verify-full and sslrootcert=FILE to the database URL, unless the network between is trusted"
    what = (
        f"TLS, but whose certificate it is goes unexamined: sslmode is {mode}" if encrypted else "no TLS to PostgreSQL"
    )
    return Finding(True, what, advice)


def _server(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    major = connection.info.server_version // 10_000
    yield Finding(
        major >= OLDEST_POSTGRESQL,
        f"PostgreSQL {major}, primary",
        "" if major >= OLDEST_POSTGRESQL else f"upgrade to PostgreSQL {OLDEST_POSTGRESQL} or newer",
    )
    encoding = _one(connection, "SHOW server_encoding")
    yield Finding(
        encoding == "UTF8",
        f"server encoding {encoding}",
        "" if encoding == "UTF8" else "payloads need a database created with ENCODING 'UTF8'",
    )
    free = _one(
        connection,
        "SELECT current_setting('max_connections')::int - count(*)::int FROM pg_stat_activity "
        "WHERE backend_type = 'client backend'",
    )
    yield Finding(
        free > 5, f"{free} connections free", "" if free > 5 else "raise max_connections or run fewer workers"
    )
    limit = _one(connection, "SELECT setting::int FROM pg_settings WHERE name = 'transaction_timeout'", 0)
    yield Finding(
        limit == 0 or limit >= 10_000,
        "no transaction_timeout in the way",
        "" if limit == 0 or limit >= 10_000 else "the relay's role needs transaction_timeout = 0, or at least 10 s",
    )
    if _one(connection, "SHOW synchronous_commit") == "off":
        advice = (
            "ALTER ROLE the relay's role SET synchronous_commit = on: a crash of PostgreSQL may undo the end of an"
            " event that was given up, which is then sent after its successors"
        )
        yield Finding(True, "commits do not wait for the disk: synchronous_commit is off", advice)


def _schema(connection: psycopg.Connection[Any], settings: Settings) -> Iterator[Finding]:
    schema = settings.schema
    names = {table: sql.Identifier(schema, table).as_string(connection) for table in _GRANTS}
    missing = [table for table, name in names.items() if _one(connection, "SELECT to_regclass(%s) IS NULL", None, name)]
    if missing:
        yield Finding(
            False,
            f"schema {schema!r} has no {', '.join(missing)}",
            "run: outbox-relay migrate; or set OUTBOX_RELAY_SCHEMA to where the tables are",
        )
        return
    yield from _revision(connection, schema)
    for table, privileges in _GRANTS.items():
        lacking = [privilege for privilege in privileges if not _has(connection, names[table], privilege)]
        yield Finding(
            not lacking,
            f"{table}: {'all grants' if not lacking else 'no ' + ', '.join(lacking)}",
            "" if not lacking else f"GRANT {', '.join(lacking)} ON {names[table]} TO the relay's role",
        )
        if lacking:
            return
    count = _one(connection, sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(schema, "outbox_lane")))
    yield Finding(
        count == LANES,
        f"{count} lanes",
        "" if count == LANES else f"outbox_lane must have the rows 0 to {LANES - 1}: insert the missing ones",
    )


def _revision(connection: psycopg.Connection[Any], schema: str) -> Iterator[Finding]:
    table = sql.Identifier(schema, migrations.VERSION_TABLE)
    if _one(connection, "SELECT to_regclass(%s) IS NULL", None, table.as_string(connection)):
        yield Finding(True, "tables made by the application's own migrations")
        return
    try:
        with connection.transaction():
            revision = _one(connection, sql.SQL("SELECT version_num FROM {}").format(table))
    except psycopg.errors.InsufficientPrivilege:
        yield Finding(
            False, "schema version unknown", f"GRANT SELECT ON {table.as_string(connection)} TO the relay's role"
        )
        return
    newest = migrations.head()
    yield Finding(
        revision == newest,
        f"schema version {revision}",
        "" if revision == newest else f"run: outbox-relay migrate ({newest})",
    )


def _centrifugo(settings: Settings) -> Iterator[Finding]:
    with closing(build_publisher(settings)) as publisher:
        outage = publisher.probe()
        yield from _endpoint(settings, outage)
        if outage is None:
            for name, wire in wires(settings).items():
                if wire.channels == "map":
                    yield _map(name, publisher)


def _endpoint(settings: Settings, outage: Outage | None) -> Iterator[Finding]:
    url = api_url(settings.centrifugo_url or "")
    if url.scheme == "http" and url.host not in _LOOPBACK:
        advice = "use https://, unless the network between is trusted"
        yield Finding(True, "the API key goes to Centrifugo without TLS", advice)
    if outage is None:
        yield Finding(True, "Centrifugo answers and takes the API key")
    else:
        yield Finding(
            False,
            f"Centrifugo: {outage.reason}",
            "check OUTBOX_RELAY_CENTRIFUGO_URL (its internal port, if it has one) and OUTBOX_RELAY_CENTRIFUGO_API_KEY",
        )


def _map(name: str, publisher: Centrifugo) -> Finding:
    """Whether a namespace's channels take `map_publish` with a version, asked of a channel that nobody uses.

    `map_stats` only reads, and fails where the namespace has no maps or their broker does not work. No command that
    reads tells the mode: but an ephemeral map refuses any version before it looks at anything else, so a publication
    with one is tried, under the condition that its key is there, which it is not: nothing is published. Centrifugo
    keeps an epoch for the channel (in Redis for good), which `map_clear` deletes. Source: `MapPublish` in Centrifugo
    6.9.1, `Publish` of its three map brokers.
    """
    unused = f"outbox-relay-check-{uuid.uuid4().hex}"
    channel = {"channel": f"{name}:{unused}" if name else unused}
    attempt = channel | {"key": "none", "key_mode": "if_exists", "version": 1, "data": {}}
    asked = {"map_stats": channel, "map_publish": attempt, "map_clear": channel}
    answers = publisher.ask([json.dumps({method: params}) for method, params in asked.items()])
    what, log = f"namespace {name!r}", "maps need Centrifugo 6.8 or newer and its map_broker: look into its log"
    if isinstance(answers, Outage):
        return Finding(False, f"{what}: whether it is a map is unknown: {answers.reason}", log)
    try:
        codes = [int(answer["error"]["code"]) if "error" in answer else 0 for answer in answers]
    except NO_ANSWER:
        return Finding(False, f"{what}: whether it is a map is unknown: the reply is not Centrifugo's", log)
    ours = f'or take channels = "map" from [namespaces.{json.dumps(name)}]'
    modes = 'map.mode "recoverable" or "persistent"'
    match codes:
        case [0, 0, 0]:
            return Finding(True, f"{what} is a map that takes versions")
        case [0, 100, 0]:
            return Finding(
                False,
                f"{what} is an ephemeral map, which takes no versions: no event can be delivered there",
                f"give it {modes} in Centrifugo's configuration, {ours}",
            )
        case [102, *_]:
            return Finding(
                False,
                f"{what} is unknown to Centrifugo",
                f'define it in Centrifugo\'s configuration with subscription_type "map" and {modes}, {ours}',
            )
        case [107, *_]:
            return Finding(
                False,
                f"{what} is no map: no event can be delivered there",
                f'give it subscription_type "map" and {modes} in Centrifugo\'s configuration, {ours}',
            )
    failed = ", ".join(f"{method} with {code}" for method, code in zip(asked, codes, strict=True) if code)
    return Finding(False, f"{what}: whether it is a map is unknown: Centrifugo answers {failed}", log)


def _has(connection: psycopg.Connection[Any], table: str, privilege: str) -> bool:
    """Whether we have a privilege such as `SELECT`, or `UPDATE (a, b)` on each of these columns."""
    kind, _, columns = privilege.rstrip(")").partition(" (")
    if not columns:
        return bool(_one(connection, "SELECT has_table_privilege(%s, %s)", None, table, kind))
    query: LiteralString = "SELECT bool_and(has_column_privilege(%s, name, %s)) FROM unnest(%s::text[]) AS name"
    return bool(_one(connection, query, None, table, kind, columns.split(", ")))


def _one(
    connection: psycopg.Connection[Any], query: LiteralString | sql.Composed, default: Any = None, *parameters: Any
) -> Any:
    row = connection.execute(query, parameters or None).fetchone()  # None: nothing in a name is a placeholder
    return default if row is None else row[0]
