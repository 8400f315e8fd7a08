"""Outbox, lanes and holds."""

from alembic import context, op
from outbox_relay import migrations

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    migrations.upgrade(op, since=0, to=1, schema=context.get_context().version_table_schema)


def downgrade() -> None:
    migrations.downgrade(op, since=1, to=0, schema=context.get_context().version_table_schema)
