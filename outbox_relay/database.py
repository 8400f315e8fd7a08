"""How this project connects to PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

APPLICATION_NAME: Final = "outbox-relay"
LANE: Final = "((hashtextextended(o.aggregate_type || '/' || o.aggregate_id, 0) & 255)::smallint)"
"""The lane of the event `o`, word for word as the index of the pending events has it."""


class DatabaseUnavailableError(Exception):
    """The connection was lost or could not be had. Whatever the batch locked is free again."""


def connect(database_url: str, *, autocommit: bool = True) -> psycopg.Connection[Any]:
    """Connect as the relay does: UTF-8, a primary, dead peers noticed, nothing that pgbouncer would miss.

    Raises `DatabaseUnavailableError`; its text never holds the password.
    """
    scheme, separator, rest = database_url.partition("://")
    if separator:
        database_url = f"{scheme.partition('+')[0]}://{rest}"
    try:
        settings: dict[str, Any] = {
            "connect_timeout": 5,
            "application_name": APPLICATION_NAME,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
            "target_session_attrs": "read-write",
        } | conninfo_to_dict(database_url)
        settings["client_encoding"] = "UTF8"
        return psycopg.connect(make_conninfo("", **settings), autocommit=autocommit, prepare_threshold=None)
    except psycopg.ProgrammingError:
        # libpq's message quotes the part that it could not read, which may be the password.
        raise DatabaseUnavailableError(
            "the database URL cannot be read: check it, and quote special characters"
        ) from None
    except psycopg.OperationalError as error:
        raise DatabaseUnavailableError(one_line(error)) from None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def bigints(ids: Sequence[int]) -> str:
    """An array as PostgreSQL reads it: a tenth of what psycopg takes to write a list of a thousand."""
    return f"{{{','.join(map(str, ids))}}}"
