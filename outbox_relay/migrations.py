"""The schema's versions, as DDL that never changes once released, and the ways to apply them.

Own tree: `outbox-relay migrate` runs the bundled Alembic tree (`runner`). In an application's tree: call
`upgrade(op, to=1)` from a revision of your own, or let autogenerate write that call (`autogenerate`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import sqlalchemy as sa
from alembic.autogenerate import rewriter
from alembic.autogenerate.api import AutogenContext
from alembic.autogenerate.render import renderers
from alembic.config import Config
from alembic.operations import Operations, ops
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from alembic import command

VERSION_TABLE: Final = "outbox_relay_version"
LOCK_TIMEOUT: Final = "2s"
LOCK_RETRIES: Final = 30


class MigrationError(Exception):
    """The schema was not changed; the message says what to do."""


@dataclass(frozen=True, slots=True)
class _Version:
    up: str
    down: str


_V1_UP = """
CREATE TYPE {schema}.outbox_kind AS ENUM ('change', 'snapshot', 'tombstone');

CREATE TYPE {schema}.outbox_state AS ENUM
    ('pending', 'parked', 'delivered', 'superseded', 'expired', 'dead', 'discarded');

CREATE TABLE {schema}.outbox (
    id bigint GENERATED ALWAYS AS IDENTITY,
    event_id uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid(),
    aggregate_type text NOT NULL,
    aggregate_id text NOT NULL,
    version bigint NOT NULL,
    kind {schema}.outbox_kind NOT NULL DEFAULT 'change',
    channels text[] NOT NULL,
    payload json NOT NULL,
    tags jsonb,
    created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    expires_at timestamptz,
    state {schema}.outbox_state NOT NULL DEFAULT 'pending',
    ending {schema}.outbox_state,
    accepted text[],
    settled_at timestamptz,
    error text,
    replay integer,
    traceparent text,
    base_version bigint,
    -- Every event is settled by an UPDATE, which adds an entry beside the first one: there is room for it.
    PRIMARY KEY (id) WITH (fillfactor = 50)
);

-- Stored uncompressed, a payload's size is known without reading it: what bounds a batch in bytes.
ALTER TABLE {schema}.outbox ALTER COLUMN payload SET STORAGE EXTERNAL;

CREATE INDEX outbox_pending ON {schema}.outbox
    (((pg_catalog.hashtextextended(aggregate_type || '/' || aggregate_id, 0::bigint) & 255::bigint)::smallint), id)
    WHERE state = 'pending';

CREATE INDEX outbox_parked ON {schema}.outbox (aggregate_type, aggregate_id, id) WHERE state = 'parked';

CREATE INDEX outbox_dead ON {schema}.outbox (id) WHERE state = 'dead';

CREATE TABLE {schema}.outbox_lane (lane smallint PRIMARY KEY);

INSERT INTO {schema}.outbox_lane (lane) SELECT pg_catalog.generate_series(0, 255);

CREATE TABLE {schema}.outbox_hold (
    aggregate_type text NOT NULL,
    aggregate_id text NOT NULL,
    -- Order rests on it, so nobody else may say it, nor a dump from where texts are hashed otherwise.
    lane smallint NOT NULL GENERATED ALWAYS AS (
        (pg_catalog.hashtextextended(aggregate_type || '/' || aggregate_id, 0::bigint) & 255::bigint)::smallint
    ) STORED,
    due_at timestamptz NOT NULL,
    head_id bigint NOT NULL,
    tries integer NOT NULL,
    attempts integer NOT NULL,
    alone boolean NOT NULL DEFAULT false,
    first_refused_at timestamptz NOT NULL,
    refused_at timestamptz NOT NULL,
    error text,
    PRIMARY KEY (aggregate_type, aggregate_id)
);

CREATE INDEX outbox_hold_lane ON {schema}.outbox_hold (lane, due_at);

CREATE INDEX outbox_hold_due ON {schema}.outbox_hold (due_at);

-- One row: when somebody last said that versions may have gone back.
CREATE TABLE {schema}.outbox_epoch (bumped_at timestamptz PRIMARY KEY);

INSERT INTO {schema}.outbox_epoch (bumped_at) VALUES (pg_catalog.clock_timestamp());

-- Another value whenever versions may have gone back: another cluster, timeline, database or table, or a bump. It is
-- the same for whoever asks, hence the owner's rights. Managed services hide the first two parts.
CREATE FUNCTION {schema}.outbox_epoch() RETURNS text LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    cluster text;
    timeline integer;
BEGIN
    BEGIN
        cluster := (SELECT c.system_identifier FROM pg_control_system() AS c);
    EXCEPTION WHEN insufficient_privilege OR undefined_function OR feature_not_supported THEN
        NULL;
    END;
    BEGIN
        IF pg_is_in_recovery() THEN
            -- As far as it is written down: a standby may say the old one for a while.
            timeline := (SELECT greatest(c.timeline_id, r.min_recovery_end_timeline)
                         FROM pg_control_checkpoint() AS c, pg_control_recovery() AS r);
        ELSE
            -- The control file has a new timeline only after the first checkpoint.
            timeline := ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer;
        END IF;
    EXCEPTION WHEN insufficient_privilege OR undefined_function OR feature_not_supported
                   OR object_not_in_prerequisite_state THEN
        NULL;
    END;
    RETURN (
        SELECT lpad(to_hex(hashtextextended(
            concat_ws('/', cluster, timeline, d.oid, e.tableoid, extract(epoch FROM e.bumped_at)), 0)), 16, '0')
        FROM pg_database AS d, {schema}.outbox_epoch AS e
        WHERE d.datname = current_database()
    );
END
$$;

-- What no subscriber could get is refused, under a name that says why. One function, because CHECKs are parsed anew for
-- each INSERT. Its first expression is all that runs for almost every valid event: it is stricter than the rules.
-- It runs as whoever inserts: with that one's search_path anybody's function could stand in for PostgreSQL's.
CREATE FUNCTION {schema}.outbox_written() RETURNS trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    refused text;
BEGIN
    IF octet_length(NEW.aggregate_type) BETWEEN 1 AND 255 AND octet_length(NEW.aggregate_id) BETWEEN 1 AND 255
        AND NEW.version BETWEEN 1 AND 9007199254740991
        AND array_ndims(NEW.channels) = 1 AND array_lower(NEW.channels, 1) = 1 AND cardinality(NEW.channels) <= 32
        AND array_position(NEW.channels, NULL) IS NULL AND array_position(NEW.channels, '') IS NULL
        AND pg_column_size(NEW.channels) <= 255 AND pg_column_size(NEW.payload) <= 1048576
        -- What another table has compressed is larger than its size.
        AND pg_column_compression(NEW.channels) IS NULL AND pg_column_compression(NEW.payload) IS NULL
        AND (NEW.expires_at IS NULL OR NEW.expires_at BETWEEN '1970-01-01 00:00Z' AND '9999-01-01 00:00Z')
        AND (NEW.tags IS NULL OR jsonb_typeof(NEW.tags) = 'object'
             -- At most 6 bytes of JSON for one.
             AND pg_column_size(NEW.tags) <= 680 AND pg_column_compression(NEW.tags) IS NULL
             AND NOT jsonb_path_exists(NEW.tags, 'strict $.* ? (@.type() != "string")')
             AND NOT jsonb_path_exists(NEW.tags, '$.keyvalue() ? (@.key starts with "ob")'))
        AND (NEW.base_version IS NULL OR NEW.base_version BETWEEN 0 AND NEW.version - 1)
    THEN
        NULL;
    ELSE
        refused := CASE
            WHEN char_length(NEW.aggregate_type) BETWEEN 1 AND 255 IS FALSE
                THEN 'aggregate_type_has_1_to_255_characters'
            WHEN char_length(NEW.aggregate_id) BETWEEN 1 AND 255 IS FALSE
                THEN 'aggregate_id_has_1_to_255_characters'
            WHEN NEW.version BETWEEN 1 AND 9007199254740991 IS FALSE
                THEN 'version_is_1_to_2_to_the_53_minus_1'
            WHEN cardinality(NEW.channels) BETWEEN 1 AND 32 IS FALSE
                THEN 'channels_are_1_to_32'
            WHEN (array_ndims(NEW.channels) = 1 AND array_lower(NEW.channels, 1) = 1) IS FALSE
                THEN 'channels_is_a_plain_list'
            WHEN array_position(NEW.channels, NULL) IS NOT NULL
                THEN 'no_channel_is_null'
            WHEN array_position(NEW.channels, '') IS NOT NULL
                THEN 'no_channel_is_empty'
            WHEN (SELECT max(octet_length(channel)) FROM unnest(NEW.channels) AS channel) > 255
                THEN 'channels_have_at_most_255_bytes'
            WHEN octet_length(NEW.payload::text) > 1048576
                THEN 'payload_has_at_most_1_mib'
            WHEN NEW.expires_at NOT BETWEEN '1970-01-01 00:00Z' AND '9999-01-01 00:00Z'
                THEN 'expires_at_is_from_1970_to_9998'
            WHEN octet_length(NEW.tags::text) > 4096
                THEN 'tags_have_at_most_4_kib'
            WHEN (jsonb_typeof(NEW.tags) = 'object'
                  AND NOT jsonb_path_exists(NEW.tags, 'strict $.* ? (@.type() != "string")')) IS FALSE
                THEN 'tags_are_an_object_of_strings'
            WHEN jsonb_path_exists(NEW.tags, '$.keyvalue() ? (@.key starts with "ob")')
                THEN 'no_tag_starts_with_ob'
            WHEN NEW.base_version BETWEEN 0 AND NEW.version - 1 IS FALSE
                THEN 'base_version_is_0_to_version_minus_1'
        END;
        IF refused IS NOT NULL THEN
            RAISE EXCEPTION USING
                MESSAGE = 'the outbox refuses this event: ' || replace(refused, '_', ' '),
                ERRCODE = 'check_violation', CONSTRAINT = refused, TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA;
        END IF;
        -- The size that is stored is what bounds a batch.
        IF pg_column_compression(NEW.payload) IS NOT NULL THEN
            NEW.payload := NEW.payload::text::json;
        END IF;
    END IF;
    -- A relay that sleeps holds this lock. Whoever finds it free keeps it shared until its commit, so that no relay
    -- falls asleep before it has seen the event.
    IF NOT pg_try_advisory_xact_lock_shared(hashtextextended('outbox_relay', TG_RELID::bigint))
        AND current_setting('outbox_relay.wake_up', true) IS DISTINCT FROM 'off'
    THEN
        PERFORM pg_notify('outbox_relay', TG_RELID::text);
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER outbox_written
    BEFORE INSERT OR UPDATE OF aggregate_type, aggregate_id, version, channels, payload, tags, base_version, expires_at
    ON {schema}.outbox FOR EACH ROW EXECUTE FUNCTION {schema}.outbox_written();

-- Relays remember, by lane, below which id nothing is pending. An event that is put back, or into another lane, says
-- that this is no longer so.
CREATE SEQUENCE {schema}.outbox_generation;

CREATE FUNCTION {schema}.outbox_put_back() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM nextval((quote_ident(TG_TABLE_SCHEMA) || '.outbox_generation')::regclass);
    RETURN NULL;
END
$$;

CREATE TRIGGER outbox_put_back
    AFTER UPDATE OF state, aggregate_type, aggregate_id ON {schema}.outbox FOR EACH ROW
    WHEN (NEW.state = 'pending' AND (OLD.state <> 'pending' OR NEW.aggregate_type <> OLD.aggregate_type
                                     OR NEW.aggregate_id <> OLD.aggregate_id))
    EXECUTE FUNCTION {schema}.outbox_put_back();
"""

_V1_DOWN = """
DROP TABLE {schema}.outbox_hold, {schema}.outbox_lane, {schema}.outbox, {schema}.outbox_epoch;

DROP FUNCTION {schema}.outbox_written, {schema}.outbox_epoch, {schema}.outbox_put_back;

DROP SEQUENCE {schema}.outbox_generation;

DROP TYPE {schema}.outbox_kind, {schema}.outbox_state;
"""

# Position n is what leads from version n to n + 1.
_VERSIONS: Final[tuple[_Version, ...]] = (_Version(_V1_UP, _V1_DOWN),)
LATEST: Final = len(_VERSIONS)


def upgrade(op: Operations | Any, *, to: int, since: int = 0, schema: str | None = None) -> None:
    """Bring the outbox from version `since` to version `to`, inside the revision that calls this.

    `op` is Alembic's. The statements take their locks within 2 s or fail, so writers never wait longer.
    """
    _apply(op, schema, (version.up for version in _VERSIONS[since:to]))


def downgrade(op: Operations | Any, *, since: int, to: int = 0, schema: str | None = None) -> None:
    """Take the outbox from version `since` back to version `to`.

    Dropping the table is refused with `MigrationError` while it holds events that have not ended.
    """
    if to == 0 and since > 0:
        _refuse_to_lose_events(op, schema)
    _apply(op, schema, (version.down for version in reversed(_VERSIONS[to:since])))


def _apply(op: Operations | Any, schema: str | None, texts: Iterable[str]) -> None:
    op.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
    for text in texts:
        for statement in render(text, schema):
            op.execute(_text(statement))


def _refuse_to_lose_events(op: Operations | Any, schema: str | None) -> None:
    if op.get_context().as_sql:
        return
    outbox = f"{_quote(schema or 'public')}.outbox"
    op.execute(_text(f"LOCK TABLE {outbox} IN SHARE ROW EXCLUSIVE MODE"))
    waiting = op.get_bind().scalar(
        _text(f"SELECT EXISTS (SELECT FROM {outbox} WHERE state::text IN ('pending', 'parked'))")  # noqa: S608 - quoted
    )
    if waiting:
        raise MigrationError(
            f"{outbox} holds events that have not been delivered: drain it first "
            "(outbox-relay run --until-empty; what is refused: outbox-relay dead list), then downgrade"
        )


def render(text: str, schema: str | None) -> list[str]:
    """Split one version's text into statements for `schema` (default: public): a blank line ends one."""
    quoted = _quote(schema or "public")
    # The body of a function ends at the next such tag, and one of 64 letters is longer than a name can be.
    tag = f"${'_' * 64}$" if "$" in quoted else "$$"
    parts = (part.strip() for part in text.split(";\n\n"))
    return [part.replace("$$", tag).replace("{schema}", quoted) for part in parts if part.strip(" \n;")]


def plain_sql(schema: str | None = None) -> str:
    """The whole latest schema as plain SQL, for stacks without Alembic."""
    return "".join(f"{statement.rstrip(';')};\n\n" for v in _VERSIONS for statement in render(v.up, schema))


def _quote(name: str) -> str:
    """Quote an identifier. Not SQLAlchemy's own way: that doubles percent signs, and `text` does so again."""
    return '"' + name.replace('"', '""') + '"'


def _text(statement: str) -> sa.TextClause:
    """SQL in which no colon of ours is a parameter."""
    return sa.text(statement.replace(":", r"\:"))


# Autogenerate: our tables become one call of `upgrade`, because domains, storage and lanes are no tables.


class OutboxOp(ops.MigrateOperation):
    """A call of `upgrade` or `downgrade` in a generated revision."""

    def __init__(self, schema: str | None, *, down: bool = False) -> None:
        self.schema = schema
        self.down = down

    def reverse(self) -> OutboxOp:
        return OutboxOp(self.schema, down=not self.down)

    def to_diff_tuple(self) -> tuple[str, str | None]:
        return ("remove_outbox" if self.down else "add_outbox", self.schema)


@renderers.dispatch_for(OutboxOp)
def _render_outbox_op(context: AutogenContext, operation: OutboxOp) -> str:
    context.imports.add("import outbox_relay.migrations")
    schema = f", schema={operation.schema!r}" if operation.schema else ""
    call = f"downgrade(op, since={LATEST}" if operation.down else f"upgrade(op, to={LATEST}"
    return f"outbox_relay.migrations.{call}{schema})"


autogenerate: Final = rewriter.Rewriter()
"""Pass as `process_revision_directives` in env.py when `target_metadata` includes the outbox's tables."""


@autogenerate.rewrites(ops.UpgradeOps)
def _rewrite_upgrade(_context: Any, _revision: Any, directive: ops.UpgradeOps) -> ops.UpgradeOps:
    directive.ops = _replace_tables(directive.ops, ops.CreateTableOp, down=False)
    return directive


@autogenerate.rewrites(ops.DowngradeOps)
def _rewrite_downgrade(_context: Any, _revision: Any, directive: ops.DowngradeOps) -> ops.DowngradeOps:
    directive.ops = _replace_tables(directive.ops, ops.DropTableOp, down=True)
    return directive


_TABLES: Final = ("outbox", "outbox_lane", "outbox_hold", "outbox_epoch")


def _replace_tables(
    operations: Sequence[ops.MigrateOperation],
    table_op: type[ops.CreateTableOp] | type[ops.DropTableOp],
    *,
    down: bool,
) -> list[ops.MigrateOperation]:
    """Our tables made or dropped, and what comes with them, as one call. A change of a table that stays is kept."""
    schemas = [op.schema for op in operations if isinstance(op, table_op) and op.table_name == "outbox"]
    if not schemas:
        return list(operations)
    kept = [op for op in operations if getattr(op, "table_name", None) not in _TABLES]
    return [*kept, *(OutboxOp(schema, down=down) for schema in schemas)]


# Own tree.


def _script_location() -> Path:
    package = Path(__file__).parent
    bundled = package / "alembic"
    return bundled if bundled.is_dir() else package.parent / "alembic"


def config(
    url: str | sa.URL | None = None, schema: str | None = None, connection: sa.Connection | None = None
) -> Config:
    """Alembic configuration of the bundled tree."""
    own = Config()
    own.set_main_option("script_location", str(_script_location()).replace("%", "%%"))
    own.set_main_option("path_separator", "os")
    own.attributes.update(url=url, schema=schema, connection=connection)
    return own


def head() -> str:
    """The newest revision of the bundled tree."""
    revision = ScriptDirectory.from_config(config()).get_current_head()
    assert revision is not None  # noqa: S101 - the tree ships with at least one revision
    return revision


def current(connection: sa.Connection, schema: str | None = None) -> str | None:
    """The revision that `connection`'s database is at, None before the first."""
    options = {"version_table": VERSION_TABLE, "version_table_schema": schema or "public"}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


def migrate(
    engine: sa.Engine,
    to: str = "head",
    *,
    schema: str | None = None,
    down: bool = False,
    on_wait: Callable[[int], None] = lambda _attempt: None,
) -> None:
    """Upgrade (or downgrade) the bundled tree, retrying while a lock is not to be had within 2 s.

    Raises `MigrationError` when the locks could not be had in 30 tries, or events would be lost.
    """
    run = command.downgrade if down else command.upgrade
    for attempt in range(1, LOCK_RETRIES + 1):
        with engine.connect() as connection:
            try:
                run(config(schema=schema, connection=connection), to)
                connection.commit()
            except sa.exc.OperationalError as error:
                if getattr(error.orig, "sqlstate", None) != "55P03":
                    raise
                connection.rollback()
            else:
                return
        on_wait(attempt)
        time.sleep(1.0)
    raise MigrationError("a lock on the outbox could not be had: end the long transactions that use it, then retry")


def offline_sql(to: str, output: TextIO, *, schema: str | None = None, down: bool = False) -> None:
    """Write the SQL of a migration to `output` instead of running it."""
    own = config(url="postgresql+psycopg://", schema=schema)
    own.output_buffer = output
    (command.downgrade if down else command.upgrade)(own, f"head:{to}" if down else to, sql=True)
