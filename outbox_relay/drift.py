"""Objects whose last event is not about what they are now: changed behind the events' back, or deleted.

It compares the versions of an application's table with those of the events that are still there, in one snapshot. An
object and its event are committed together, so what differs in a snapshot was written apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, LiteralString, NamedTuple

import psycopg
from psycopg import errors, sql
from psycopg.rows import class_row

from outbox_relay.database import DatabaseUnavailableError, connect, one_line
from outbox_relay.operator import OperatorError

LIMIT: Final = 100
STATEMENT_TIMEOUT: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An application's table of objects, and where in it is what events say of them.

    `table` may be `schema.table`. The aggregate's id is `id_columns` as text, joined by `:` if they are several.
    `changed_at` is the column with the time of the last change, if there is one: only with it an object that has no
    event at all can be judged.
    """

    table: str
    aggregate_type: str
    id_columns: Sequence[str] = ("id",)
    version_column: str = "version"
    changed_at: str | None = None


class Drift(NamedTuple):
    """One object and its last event; None for what there is not."""

    aggregate_id: str
    object_version: int | None
    event_version: int | None
    event_kind: str | None

    @property
    def why(self) -> str:
        """What must have happened."""
        if self.object_version is None:
            return "it was deleted without a tombstone"
        if self.event_version is None:
            return "it was changed without an event"
        if self.object_version > self.event_version:
            return "it was changed without an event since its last one"
        return "its version is below that of its last event"


class Report(NamedTuple):
    """The first objects that drifted, in the order of their ids, and how many objects could not be judged."""

    drifts: list[Drift]
    unjudged: int


_NAMED: Final = """
SELECT n.nspname, c.relname FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.oid = pg_catalog.to_regclass(%s)::pg_catalog.oid
"""

_LAST: Final = """
SELECT DISTINCT ON (aggregate_id) aggregate_id, version, kind::text AS kind
FROM {outbox} WHERE aggregate_type = %(aggregate_type)s ORDER BY aggregate_id, id DESC
"""
_OBJECTS: Final = "SELECT {id} AS aggregate_id, {version} AS version, {changed_at} AS changed_at FROM {table}"

_DRIFT: Final = """
SELECT aggregate_id, o.version::bigint AS object_version, e.version AS event_version, e.kind AS event_kind
FROM ({objects}) AS o FULL JOIN ({last}) AS e USING (aggregate_id)
WHERE o.version <> e.version
   OR o.version IS NULL AND e.kind <> 'tombstone'
   OR e.version IS NULL AND o.changed_at > clock_timestamp() - %(keep)s * interval '1 second'
ORDER BY aggregate_id LIMIT %(limit)s
"""

_UNJUDGED: Final = """
SELECT count(*) FROM ({objects}) AS o LEFT JOIN ({last}) AS e USING (aggregate_id)
WHERE e.version IS NULL AND o.changed_at IS NULL
"""


def find(database_url: str, source: Source, *, keep: float, schema: str = "public", limit: int = LIMIT) -> Report:
    """Compare the objects that were changed within `keep`, the relays' own setting in seconds, with their last events.

    Older events may be deleted, and without them nothing is known; so with `keep` 0 this raises `OperatorError`, as it
    does for a table or column that is not there. The database's role needs SELECT on both tables.
    Raises `DatabaseUnavailableError`.
    """
    if keep == 0:
        raise OperatorError("keep is 0, so delivered events are deleted at once: there is nothing to compare with")
    names: dict[str, Any] = {
        "outbox": _identifier(schema, "outbox"),
        "id": sql.SQL(" || ':' || ").join(sql.SQL("{}::text").format(_identifier(name)) for name in source.id_columns),
        "version": _identifier(source.version_column),
        "changed_at": sql.SQL("NULL::timestamptz") if source.changed_at is None else _identifier(source.changed_at),
    }
    parameters = {"aggregate_type": source.aggregate_type, "keep": keep, "limit": limit}

    def composed(query: LiteralString) -> sql.Composed:
        return sql.SQL(query).format(**names)

    try:
        with closing(connect(database_url, autocommit=False)) as connection:
            connection.execute(
                "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; "
                f"SET LOCAL statement_timeout = {round(STATEMENT_TIMEOUT * 1000)}"
            )
            named = connection.execute(_NAMED, [sql.Identifier(*source.table.split(".", 1)).as_string()]).fetchone()
            if named is None:
                raise OperatorError(f"there is no table {source.table!r}: check the names, the schema and the grants")
            # The role's search_path has found the table; from now on nothing else is found by it.
            connection.execute("SET LOCAL search_path = pg_catalog")
            names["table"] = _identifier(*named)
            names["last"], names["objects"] = (sql.SQL(part).format(**names) for part in (_LAST, _OBJECTS))
            with connection.cursor(row_factory=class_row(Drift)) as cursor:
                drifts = cursor.execute(composed(_DRIFT), parameters).fetchall()
            [[unjudged]] = connection.execute(composed(_UNJUDGED), parameters).fetchall()
    except (errors.UndefinedTable, errors.UndefinedColumn, errors.InsufficientPrivilege) as error:
        raise OperatorError(f"{error.diag.message_primary}: check the names, the schema and the grants") from error
    except psycopg.Error as error:
        raise DatabaseUnavailableError(one_line(error)) from error
    return Report(drifts, unjudged)


def _identifier(*names: str) -> sql.SQL:
    # Whatever it is called, it is no placeholder.
    return sql.SQL(sql.Identifier(*names).as_string().replace("%", "%%"))
