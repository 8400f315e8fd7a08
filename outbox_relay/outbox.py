"""The tables, and how an application writes events: `enqueue` and `enqueue_all` return an INSERT to execute.

Impossible values are refused by a trigger, which the migrations make: PostgreSQL parses a table's CHECKs anew for
every INSERT statement, a trigger's function once per session (docs/architecture.md has the measurement).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from itertools import accumulate
from typing import Any, Final, Literal

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.sql.elements import quoted_name

Kind = Literal["change", "snapshot", "tombstone"]

KINDS: Final = ("change", "snapshot", "tombstone")
STATES: Final = ("pending", "parked", "delivered", "superseded", "expired", "dead", "discarded")
LANES: Final = 256
MAX_NAME: Final = 255
MAX_CHANNELS: Final = 32
MAX_VERSION: Final = 2**53 - 1
MAX_PAYLOAD: Final = 1024 * 1024
MAX_TAGS: Final = 4096
_STRINGS: Final = re.compile(r'"(?:[^"\\]|\\.)*"')
EARLIEST: Final = datetime(1970, 1, 1, tzinfo=UTC)
LATEST: Final = datetime(9999, 1, 1, tzinfo=UTC)
"""Of `expires_at`: what programs in every language can read, in every time zone."""
DEFAULT_MAX_PAYLOAD: Final = 256 * 1024
# Eleven parameters each, where asyncpg takes 32,767.
MAX_EVENTS_PER_STATEMENT: Final = 2_900
RESERVED_TAG_PREFIX: Final = "ob"


class InvalidEventError(ValueError):
    """An event that could never be delivered. Nothing was sent to the database."""


class PayloadTooLargeError(InvalidEventError):
    """The payload's JSON is larger than the limit. Nothing was sent to the database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """One event to write: the object that changed, its new version, who hears of it and what.

    `aggregate_type`, `aggregate_id`: 1 to 255 characters. `version`: 1 to 2**53 - 1, rising per aggregate.
    `channels`: one channel or up to 32, each 1 to 255 bytes in UTF-8.
    `payload`: any value that orjson encodes, or JSON text as `bytes`, which is stored as it is. Beside
    orjson's own types (datetime as RFC 3339, UUID, dataclass, enum; NaN and infinity become null), a Decimal
    becomes a string, so that no digit is lost.
    `tags`: strings for Centrifugo's own tag filters, at most 4 KiB of JSON; keys that start with `ob` are reserved.
    `event_id`: a fresh UUID unless given.
    `base_version`: the version that this change applies to, below `version`; 0 for an object that is new. With it
    a subscriber notices that it missed a change.
    """

    aggregate_type: str
    aggregate_id: str | int | uuid.UUID
    version: int
    channels: str | Iterable[str]
    payload: Any
    kind: Kind = "change"
    tags: Mapping[str, str] | None = None
    expires_at: datetime | None = None
    event_id: uuid.UUID | None = None
    traceparent: str | None = None
    base_version: int | None = None


class _JSONText(sa.types.UserDefinedType[str]):
    """JSON that is text already: neither SQLAlchemy nor a driver encodes it a second time."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "JSON"


class Outbox:
    """Where events are written: a schema, and the application's own limit on payloads.

    `schema=None` leaves the choice to `search_path` or `schema_translate_map`. `max_payload` is in bytes of
    JSON. Subscribers are disconnected by larger ones unless Centrifugo's `client.queue_max_size` is raised.
    """

    def __init__(self, schema: str | None = None, *, max_payload: int = DEFAULT_MAX_PAYLOAD) -> None:
        if not 1 <= max_payload <= MAX_PAYLOAD:
            raise ValueError(f"max_payload is {max_payload}: choose 1 to {MAX_PAYLOAD} bytes")
        self.max_payload = max_payload
        # A table of its own, without what only migrations need; and a Table, because of schema_translate_map.
        self._table = sa.Table(
            "outbox",
            sa.MetaData(),
            sa.Column("aggregate_type", sa.Text),
            sa.Column("aggregate_id", sa.Text),
            sa.Column("version", sa.BigInteger),
            sa.Column("kind", _enum("outbox_kind", KINDS, schema)),
            sa.Column("channels", pg.ARRAY(sa.Text)),
            sa.Column("payload", _JSONText),
            sa.Column("tags", _JSONText),
            sa.Column("expires_at", sa.DateTime(timezone=True)),
            sa.Column("event_id", sa.Uuid),
            sa.Column("traceparent", sa.Text),
            sa.Column("base_version", sa.BigInteger),
            schema=schema,
        )
        self._packages = () if schema is None else (quoted_name(schema, quote=True),)

    def enqueue(
        self,
        aggregate_type: str,
        aggregate_id: str | int | uuid.UUID,
        *,
        version: int,
        channels: str | Iterable[str],
        payload: Any,
        kind: Kind = "change",
        tags: Mapping[str, str] | None = None,
        expires_at: datetime | None = None,
        event_id: uuid.UUID | None = None,
        traceparent: str | None = None,
        base_version: int | None = None,
    ) -> sa.Insert:
        """Return an INSERT of one event, to be executed in the transaction that changed the object.

        Take the version under the object's row lock: after the flush, not before it. Fields are those of
        `NewEvent`. Raises `InvalidEventError` or `PayloadTooLargeError` before the database is asked.
        """
        event = NewEvent(
            aggregate_type=aggregate_type,
            aggregate_id=aggregate_id,
            version=version,
            channels=channels,
            payload=payload,
            kind=kind,
            tags=tags,
            expires_at=expires_at,
            event_id=event_id,
            traceparent=traceparent,
            base_version=base_version,
        )
        return sa.insert(self._table).values(checked(event, self.max_payload))

    def enqueue_all(self, events: Iterable[NewEvent]) -> sa.Insert:
        """Return one INSERT of 1 to 2,900 events, in their order. Raises as `enqueue` does."""
        rows = self._rows(events)
        if not 1 <= len(rows) <= MAX_EVENTS_PER_STATEMENT:
            raise InvalidEventError(
                f"{len(rows)} events in one statement: give 1 to {MAX_EVENTS_PER_STATEMENT}, or several statements"
            )
        return sa.insert(self._table).values(rows)

    def write(self, connection: sa.Connection, events: Iterable[NewEvent]) -> None:
        """Write any number of events in the connection's transaction, in their order. Raises as `enqueue` does.

        The same statement for each event, compiled once and pipelined where the driver can: a quarter of the Python of
        one long statement.
        """
        if rows := self._rows(events):
            connection.execute(sa.insert(self._table), rows)

    def _rows(self, events: Iterable[NewEvent]) -> list[dict[str, Any]]:
        rows = [checked(event, self.max_payload) for event in events]
        columns = {column for row in rows for column in row}
        defaults: dict[str, Any] = {"kind": "change"}
        for row in rows:
            for column in columns - row.keys():
                # One statement has one list of columns, so a default that only the database knows is made here.
                row[column] = uuid.uuid4() if column == "event_id" else defaults.get(column)
        return rows

    def epoch(self) -> sa.Select[Any]:
        """Return a SELECT of the epoch, a short text that changes whenever versions may have gone back.

        It is on every publication (`ob_epoch`). The application's own state says it too, read in the same session and
        before the objects, so that a subscriber knows which versions it may compare. Without `schema` the function is
        found by `search_path` alone.
        """
        return sa.select(sa.Function("outbox_epoch", type_=sa.Text(), packagenames=self._packages))


def checked(event: NewEvent, max_payload: int) -> dict[str, Any]:
    """Check one event and return the columns that differ from the table's defaults.

    Raises `InvalidEventError` or `PayloadTooLargeError`.
    """
    row: dict[str, Any] = {
        "aggregate_type": _name("aggregate_type", event.aggregate_type),
        "aggregate_id": _name("aggregate_id", _identifier(event.aggregate_id)),
        "version": _version(event.version),
        "channels": _channels(event.channels),
        "payload": _payload(event.payload, max_payload),
    }
    if event.kind not in KINDS:
        raise InvalidEventError(f"kind is {event.kind!r}: choose one of {', '.join(KINDS)}")
    if event.kind != "change":
        row["kind"] = event.kind
    if event.tags:
        row["tags"] = _tags(event.tags)
    if event.expires_at is not None:
        row["expires_at"] = _expires_at(event.expires_at)
    if event.event_id is not None:
        if not isinstance(event.event_id, uuid.UUID):
            raise InvalidEventError(f"event_id is a {type(event.event_id).__name__}: give a uuid.UUID")
        row["event_id"] = event.event_id
    if event.traceparent is not None:
        row["traceparent"] = _text("traceparent", event.traceparent)
    if event.base_version is not None:
        row["base_version"] = _base_version(event.base_version, event.version)
    return row


def _identifier(value: object) -> object:
    return str(value) if isinstance(value, int | uuid.UUID) and not isinstance(value, bool) else value


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidEventError(f"{field} is a {type(value).__name__}: give a str")
    if "\0" in value:
        raise InvalidEventError(f"{field} contains a NUL character, which PostgreSQL cannot store")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidEventError(f"{field} is not valid Unicode: {error.reason}") from None
    return value


def _name(field: str, value: object) -> str:
    text = _text(field, value)
    if not 1 <= len(text) <= MAX_NAME:
        raise InvalidEventError(f"{field} has {len(text)} characters: give 1 to {MAX_NAME}")
    return text


def _version(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        hint = ": flush first, so that the object has its version" if value is None else ""
        raise InvalidEventError(f"version is {value!r}, not an int{hint}")
    if not 1 <= value <= MAX_VERSION:
        raise InvalidEventError(f"version is {value}: give 1 to {MAX_VERSION} (2**53 - 1)")
    return value


def _base_version(value: object, version: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidEventError(f"base_version is {value!r}, not an int")
    if not 0 <= value < version:
        raise InvalidEventError(f"base_version is {value}: give 0 to {version - 1}, it is below the version")
    return value


def _channels(value: object) -> list[str]:
    if not isinstance(value, Iterable) or isinstance(value, bytes | Mapping):
        raise InvalidEventError(f"channels is a {type(value).__name__}: give a str, or a list of them")
    channels = [value] if isinstance(value, str) else list(value)
    if not 1 <= len(channels) <= MAX_CHANNELS:
        raise InvalidEventError(f"{len(channels)} channels: give 1 to {MAX_CHANNELS}")
    for channel in channels:
        size = len(_text("channel", channel).encode())
        if not 1 <= size <= MAX_NAME:
            raise InvalidEventError(
                f"a channel of {size} bytes: give 1 to {MAX_NAME}, nobody can subscribe to a longer one"
            )
    if len(set(channels)) != len(channels):
        raise InvalidEventError("the same channel is listed twice")
    return channels


def _expires_at(value: object) -> datetime:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise InvalidEventError("expires_at needs a datetime with a time zone, such as datetime.now(UTC) + ...")
    if not EARLIEST <= value <= LATEST:
        raise InvalidEventError(f"expires_at is in the year {value.year}: give 1970 to 9998")
    return value


def _tags(tags: object) -> str:
    if not isinstance(tags, Mapping):
        raise InvalidEventError(f"tags is a {type(tags).__name__}: give a dict of strings")
    for key, value in tags.items():
        _text("tag", key)
        _text(f"tag {key!r}", value)
        if key.startswith(RESERVED_TAG_PREFIX):
            raise InvalidEventError(f"tag {key!r}: names that start with 'ob' are reserved for the relay")
    encoded = json.dumps(dict(tags), ensure_ascii=False)  # as PostgreSQL writes jsonb, spaces included
    if len(encoded.encode()) > MAX_TAGS:
        raise InvalidEventError(f"tags have {len(encoded.encode())} bytes of JSON, the limit is {MAX_TAGS}")
    return encoded


def _payload(value: Any, max_payload: int) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        encoded = bytes(value)
        text = _json_text(encoded)
    else:
        try:
            encoded = orjson.dumps(value, default=_default)
        except TypeError as error:
            raise InvalidEventError(f"payload cannot be encoded as JSON: {error}") from error
        text = encoded.decode()
    if len(encoded) > max_payload:
        raise PayloadTooLargeError(
            f"payload has {len(encoded)} bytes of JSON, the limit is {max_payload}: publish a reference instead, "
            f"or raise max_payload (at most {MAX_PAYLOAD}) and Centrifugo's client.queue_max_size"
        )
    return text


def _json_text(encoded: bytes) -> str:
    try:
        text = encoded.decode()
    except UnicodeDecodeError as error:
        raise InvalidEventError(f"payload is not UTF-8: {error.reason}") from None
    try:
        orjson.loads(encoded)
    except orjson.JSONDecodeError:
        # orjson is stricter than JSON: it refuses 1e400 and 1,024 levels, which travel unharmed.
        try:
            json.loads(text, parse_float=str, parse_int=str, parse_constant=_refuse_constant)
        except RecursionError:
            # Too deep to parse here; PostgreSQL does, but nobody does so before Centrifugo for what goes there at once.
            if not _closes_at_its_end(text):
                raise InvalidEventError("payload is not JSON: its brackets do not close where it ends") from None
        except ValueError as error:
            raise InvalidEventError(f"payload is not JSON: {error}") from None
    return text


def _closes_at_its_end(text: str) -> bool:
    """Whether this is one value, if it is JSON at all: no end of its own would let the rest begin another command."""
    rest = _STRINGS.sub("", text.strip(" \t\n\r"))
    depths = list(accumulate(1 if bracket in "[{" else -1 for bracket in re.findall(r"[][{}]", rest)))
    whole = '"' not in rest and rest[0] in "[{" and rest[-1] in "]}"
    return whole and depths.pop() == 0 and min(depths) > 0


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _default(value: Any) -> Any:
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"no JSON for a {type(value).__name__}")


def _enum(name: str, values: tuple[str, ...], schema: str | None) -> pg.ENUM:
    return pg.ENUM(*values, name=name, schema=schema, create_type=False)


DEFAULT = Outbox()
enqueue = DEFAULT.enqueue
enqueue_all = DEFAULT.enqueue_all
epoch = DEFAULT.epoch


# The tables as SQLAlchemy metadata, for autogenerate and `alembic check`. The migrations create them.


def tables(metadata: sa.MetaData, schema: str | None = None) -> sa.MetaData:
    """Add the outbox's tables to `metadata` and return it.

    Autogenerate turns missing ones into a call of `outbox_relay.migrations.upgrade` if env.py passes
    `process_revision_directives=outbox_relay.migrations.autogenerate`.
    """
    now = sa.text("clock_timestamp()")
    info = {"outbox_relay": True}
    sa.Table(
        "outbox",
        metadata,
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("event_id", sa.Uuid, nullable=False, server_default=sa.text("gen_random_uuid()")),
        sa.Column("aggregate_type", sa.Text, nullable=False),
        sa.Column("aggregate_id", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("kind", _enum("outbox_kind", KINDS, schema), nullable=False, server_default="change"),
        sa.Column("channels", pg.ARRAY(sa.Text), nullable=False),
        sa.Column("payload", pg.JSON, nullable=False),
        sa.Column("tags", pg.JSONB),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("state", _enum("outbox_state", STATES, schema), nullable=False, server_default="pending"),
        # Given up: the state that it will have once its channels were told.
        sa.Column("ending", _enum("outbox_state", STATES, schema)),
        sa.Column("accepted", pg.ARRAY(sa.Text)),
        sa.Column("settled_at", sa.DateTime(timezone=True)),
        sa.Column("error", sa.Text),
        sa.Column("replay", sa.Integer),
        sa.Column("traceparent", sa.Text),
        sa.Column("base_version", sa.BigInteger),
        sa.Index("outbox_pending", sa.text(LANE), "id", postgresql_where=sa.text("state = 'pending'")),
        sa.Index(
            "outbox_parked",
            "aggregate_type",
            "aggregate_id",
            "id",
            postgresql_where=sa.text("state = 'parked'"),
        ),
        sa.Index("outbox_dead", "id", postgresql_where=sa.text("state = 'dead'")),
        schema=schema,
        info=info,
    )
    sa.Table(
        "outbox_lane",
        metadata,
        sa.Column("lane", sa.SmallInteger, primary_key=True, autoincrement=False),
        schema=schema,
        info=info,
    )
    sa.Table(
        "outbox_hold",
        metadata,
        sa.Column("aggregate_type", sa.Text, primary_key=True),
        sa.Column("aggregate_id", sa.Text, primary_key=True),
        sa.Column("lane", sa.SmallInteger, sa.Computed(LANE, persisted=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("head_id", sa.BigInteger, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("alone", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("first_refused_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("refused_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("error", sa.Text),
        sa.Index("outbox_hold_lane", "lane", "due_at"),
        sa.Index("outbox_hold_due", "due_at"),
        schema=schema,
        info=info,
    )
    sa.Table(
        "outbox_epoch",
        metadata,
        sa.Column("bumped_at", sa.DateTime(timezone=True), primary_key=True),
        schema=schema,
        info=info,
    )
    return metadata


# As PostgreSQL prints it: Alembic compares the texts.
LANE: Final = "((hashtextextended((aggregate_type || '/'::text) || aggregate_id, 0::bigint) & 255::bigint)::smallint)"
metadata: Final = tables(sa.MetaData())

__all__ = [
    "DEFAULT_MAX_PAYLOAD",
    "MAX_PAYLOAD",
    "InvalidEventError",
    "NewEvent",
    "Outbox",
    "PayloadTooLargeError",
    "enqueue",
    "enqueue_all",
    "epoch",
    "metadata",
    "tables",
]
