"""Alembic environment of the outbox's own tree: knows the tables' metadata and where the database is."""

import os

import sqlalchemy as sa

from alembic import context
from outbox_relay import outbox
from outbox_relay.migrations import LOCK_TIMEOUT, VERSION_TABLE, autogenerate

attributes = context.config.attributes
schema = attributes.get("schema") or os.environ.get("OUTBOX_RELAY_SCHEMA") or "public"
url = attributes.get("url") or os.environ.get("OUTBOX_RELAY_DATABASE_URL")


names = {"outbox", "outbox_lane", "outbox_hold", "outbox_epoch"}
options = {"version_table": VERSION_TABLE, "version_table_schema": schema, "include_schemas": True}


def run(connection):
    connection.execute(sa.text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
    if not sa.inspect(connection).has_schema(schema):
        connection.execute(sa.schema.CreateSchema(schema))
    # Alembic compares the connection's default schema under the name None.
    compared = None if schema == connection.dialect.default_schema_name else schema

    def include_name(name, kind, _parents):
        """Only the outbox's own tables are compared: the application's are not ours to judge."""
        return name == compared if kind == "schema" else kind != "table" or name in names

    context.configure(
        connection=connection,
        target_metadata=outbox.tables(sa.MetaData(), compared),
        include_name=include_name,
        process_revision_directives=autogenerate,
        **options,
    )
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    context.configure(url=url or "postgresql+psycopg://", literal_binds=True, **options)
    with context.begin_transaction():
        context.execute(sa.schema.CreateSchema(schema, if_not_exists=True))
        context.run_migrations()
elif (given := attributes.get("connection")) is not None:
    run(given)
else:
    if not url:
        raise SystemExit("set OUTBOX_RELAY_DATABASE_URL to the database's URL")
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool)
    with engine.begin() as own:
        run(own)
