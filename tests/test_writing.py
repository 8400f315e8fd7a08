"""Writing events: the API over every session and driver, plain SQL, and what the tables themselves refuse."""

from __future__ import annotations

import asyncio
import enum
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import sql
from psycopg.types.json import Json
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox_relay import (
    InvalidEventError,
    NewEvent,
    Outbox,
    PayloadTooLargeError,
    aenqueue_for,
    enqueue,
    enqueue_all,
    enqueue_for,
)
from outbox_relay.migrations import migrate
from outbox_relay.outbox import MAX_EVENTS_PER_STATEMENT
from tests.conftest import Connect, sqlalchemy_engine
from tests.support.programs import psql

WRITERS = [
    ("psycopg", Session),
    ("psycopg", sa.Connection),
    ("psycopg", AsyncSession),
    ("psycopg", AsyncConnection),
    ("psycopg2", Session),
    ("psycopg2", sa.Connection),
    ("asyncpg", AsyncSession),
    ("asyncpg", AsyncConnection),
]
DRIVERS = [("psycopg", sa.Connection), ("psycopg2", sa.Connection), ("asyncpg", AsyncConnection)]

every_writer = pytest.mark.parametrize(
    ("driver", "kind"), WRITERS, ids=[f"{driver}-{kind.__name__}" for driver, kind in WRITERS]
)
every_driver = pytest.mark.parametrize(("driver", "kind"), DRIVERS, ids=[driver for driver, _ in DRIVERS])

EVENT_ID = uuid.UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")
LATER = datetime(2030, 1, 2, 3, 4, 5, 678901, UTC)


def execute(
    url: str,
    driver: str,
    kind: type,
    *statements: sa.Executable,
    commit: bool = True,
    options: dict[str, Any] | None = None,
) -> None:
    """Execute in one transaction of a `kind`, over `driver`, as an application does."""
    target = sa.make_url(url).set(drivername=f"postgresql+{driver}")

    def in_threads() -> None:
        engine = sa.create_engine(target, poolclass=sa.NullPool, execution_options=options or {})
        with Session(engine) if kind is Session else engine.connect() as unit:
            for statement in statements:
                unit.execute(statement)
            unit.commit() if commit else unit.rollback()

    async def in_a_loop() -> None:
        engine = create_async_engine(target, poolclass=sa.NullPool, execution_options=options or {})
        async with AsyncSession(engine) if kind is AsyncSession else engine.connect() as unit:
            for statement in statements:
                await unit.execute(statement)
            await (unit.commit() if commit else unit.rollback())

    if kind in {AsyncSession, AsyncConnection}:
        asyncio.run(in_a_loop())
    else:
        in_threads()


def rows(connection: psycopg.Connection[Any], columns: str) -> list[tuple[Any, ...]]:
    return connection.execute(f"SELECT {columns} FROM outbox ORDER BY id").fetchall()


# The API, everywhere


@every_writer
def test_one_event_with_everything(database_url: str, connect: Connect, channel: str, driver: str, kind: type) -> None:
    """`enqueue` writes every field as it was given, in the caller's transaction, whatever the session and driver."""
    statement = enqueue(
        "order",
        7,
        version=3,
        channels=[channel, "plain:news"],
        payload={"total": Decimal("12.50"), "é": "💥 %s :x"},
        kind="snapshot",
        tags={"region": "eu", "quote": '"\\'},
        expires_at=LATER,
        event_id=EVENT_ID,
        traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        base_version=2,
    )
    execute(database_url, driver, kind, statement)
    assert rows(
        connect(),
        "aggregate_type, aggregate_id, version, channels::text[], payload::text, kind::text, tags, expires_at, "
        "event_id, traceparent, base_version, state::text, accepted, settled_at, error",
    ) == [
        (
            "order",
            "7",
            3,
            [channel, "plain:news"],
            '{"total":"12.50","é":"💥 %s :x"}',
            "snapshot",
            {"region": "eu", "quote": '"\\'},
            LATER,
            EVENT_ID,
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            2,
            "pending",
            None,
            None,
            None,
        )
    ]


@every_writer
def test_many_events_in_one_statement(
    database_url: str, connect: Connect, channel: str, driver: str, kind: type
) -> None:
    """`enqueue_all` keeps the order, and an event without a field gets that field's default, not its neighbour's."""
    events = [
        NewEvent(aggregate_type="order", aggregate_id="1", version=1, channels=channel, payload=1),
        NewEvent(
            aggregate_type="order",
            aggregate_id="1",
            version=2,
            channels=channel,
            payload=2,
            kind="tombstone",
            tags={"a": "b"},
            expires_at=LATER,
            event_id=EVENT_ID,
            traceparent="t",
            base_version=1,
        ),
        NewEvent(aggregate_type="order", aggregate_id="1", version=3, channels=channel, payload=None),
    ]
    execute(database_url, driver, kind, enqueue_all(events))
    assert rows(connect(), "version, payload::text, kind::text, tags, expires_at, traceparent, base_version") == [
        (1, "1", "change", None, None, None, None),
        (2, "2", "tombstone", {"a": "b"}, LATER, "t", 1),
        (3, "null", "change", None, None, None, None),
    ]
    ids = [event_id for (event_id,) in rows(connect(), "event_id")]
    assert ids[1] == EVENT_ID
    assert len(set(ids)) == 3


@every_driver
def test_the_largest_statement(database_url: str, connect: Connect, channel: str, driver: str, kind: type) -> None:
    """As many events as one statement may hold, with every field given: each driver can send it."""
    events = [
        NewEvent(
            aggregate_type="order",
            aggregate_id=version,
            version=version,
            channels=channel,
            payload=version,
            kind="snapshot",
            tags={"a": "b"},
            expires_at=LATER,
            event_id=uuid.uuid4(),
            traceparent="t",
            base_version=version - 1,
        )
        for version in range(1, MAX_EVENTS_PER_STATEMENT + 1)
    ]
    execute(database_url, driver, kind, enqueue_all(events))
    assert [version for (version,) in rows(connect(), "version")] == [event.version for event in events]


@every_writer
def test_a_rollback_takes_the_event_with_it(
    database_url: str, connect: Connect, channel: str, driver: str, kind: type
) -> None:
    """The event belongs to the caller's transaction: nothing is written outside of it."""
    statement = enqueue("order", "1", version=1, channels=channel, payload={})
    execute(database_url, driver, kind, statement, commit=False)
    assert rows(connect(), "id") == []


@every_driver
def test_a_schema_of_its_own(empty_database_url: str, channel: str, driver: str, kind: type) -> None:
    """The tables may live in any schema: named once in `Outbox(schema)`, or chosen by `schema_translate_map`."""
    migrate(sqlalchemy_engine(empty_database_url), schema='My "app"')
    event: dict[str, Any] = {"channels": channel, "payload": {}, "kind": "snapshot"}
    execute(empty_database_url, driver, kind, Outbox('My "app"').enqueue("order", "1", version=1, **event))
    options = {"schema_translate_map": {None: 'My "app"'}}
    execute(empty_database_url, driver, kind, enqueue("order", "1", version=2, **event), options=options)
    with psycopg.connect(empty_database_url) as connection:
        statement = sql.SQL("SELECT version, kind::text FROM {} ORDER BY id")
        table = sql.Identifier('My "app"', "outbox")
        assert connection.execute(statement.format(table)).fetchall() == [(1, "snapshot"), (2, "snapshot")]


# Payloads


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Line:
    sku: str
    price: Decimal


DEEP = b"[" * 2_000 + b"]" * 2_000
ENCODED: list[tuple[Any, str]] = [
    (None, "null"),
    ("text", '"text"'),
    ("\0 is a character of JSON", '"\\u0000 is a character of JSON"'),
    ([1, True, 1.5, "ü"], '[1,true,1.5,"ü"]'),
    ([float("nan"), float("inf")], "[null,null]"),
    (Decimal("0.10"), '"0.10"'),
    (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), '"2026-01-02T03:04:05+00:00"'),
    (EVENT_ID, '"6ba7b810-9dad-11d1-80b4-00c04fd430c8"'),
    (Colour.RED, '"red"'),
    ([Line("a", Decimal("1.20"))], '[{"sku":"a","price":"1.20"}]'),
]
READY_MADE: list[bytes] = [
    b' {"b" : 1,\n "a": 2, "a": 3} ',
    b"[1e400, 1e-400, -0.0, 9007199254740993, 123456789012345678901234567890.10]",
    rb'["\u00e9", "\ud83d\udca5", "\ud800", "\u0000", "\/"]',
    '"ü💥"'.encode(),
    DEEP,
]


@every_driver
def test_payloads(database_url: str, connect: Connect, channel: str, driver: str, kind: type) -> None:
    """Values become the JSON that users expect of them; ready-made JSON is stored byte for byte."""
    payloads = [value for value, _ in ENCODED] + READY_MADE + [bytearray(DEEP), memoryview(DEEP)]
    statements = [
        enqueue("order", "1", version=version, channels=channel, payload=payload)
        for version, payload in enumerate(payloads, 1)
    ]
    execute(database_url, driver, kind, *statements)
    stored = [text for (text,) in rows(connect(), "payload::text")]
    assert stored == [text for _, text in ENCODED] + [text.decode() for text in [*READY_MADE, DEEP, DEEP]]


# What is refused before the database is asked

Loop: list[Any] = []
Loop.append(Loop)

INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "type-empty": ({"aggregate_type": ""}, "aggregate_type has 0 characters: give 1 to 255"),
    "type-long": ({"aggregate_type": "x" * 256}, "aggregate_type has 256 characters"),
    "type-number": ({"aggregate_type": 5}, "aggregate_type is a int: give a str"),
    "type-nul": ({"aggregate_type": "a\0b"}, "aggregate_type contains a NUL character"),
    "type-surrogate": ({"aggregate_type": "\ud800"}, "aggregate_type is not valid Unicode"),
    "id-empty": ({"aggregate_id": ""}, "aggregate_id has 0 characters"),
    "id-long": ({"aggregate_id": "ü" * 256}, "aggregate_id has 256 characters"),
    "id-none": ({"aggregate_id": None}, "aggregate_id is a NoneType"),
    "id-bool": ({"aggregate_id": True}, "aggregate_id is a bool"),
    "id-float": ({"aggregate_id": 1.0}, "aggregate_id is a float"),
    "version-zero": ({"version": 0}, r"version is 0: give 1 to 9007199254740991"),
    "version-big": ({"version": 2**53}, "version is 9007199254740992"),
    "version-none": ({"version": None}, "version is None, not an int: flush first"),
    "version-bool": ({"version": True}, "version is True, not an int"),
    "version-float": ({"version": 1.0}, "version is 1.0, not an int"),
    "channels-none-given": ({"channels": []}, "0 channels: give 1 to 32"),
    "channels-33": ({"channels": [f"c{n}" for n in range(33)]}, "33 channels"),
    "channels-null": ({"channels": None}, "channels"),
    "channels-number": ({"channels": 5}, "channels"),
    "channel-empty": ({"channels": ["a", ""]}, "a channel of 0 bytes: give 1 to 255"),
    "channel-256-bytes": ({"channels": "ü" * 128}, "a channel of 256 bytes"),
    "channel-twice": ({"channels": ["a", "b", "a"]}, "the same channel is listed twice"),
    "channel-bytes": ({"channels": b"news"}, "channels is a bytes: give a str"),
    "channel-nul": ({"channels": "a\0"}, "channel contains a NUL character"),
    "kind": ({"kind": "deleted"}, "kind is 'deleted': choose one of change, snapshot, tombstone"),
    "kind-none": ({"kind": None}, "kind is None"),
    "tags-list": ({"tags": ["a"]}, "tags"),
    "tag-reserved": ({"tags": {"object": "x"}}, "tag 'object': names that start with 'ob' are reserved"),
    "tag-number": ({"tags": {"a": 1}}, "tag 'a' is a int: give a str"),
    "tag-key": ({"tags": {1: "a"}}, "tag is a int: give a str"),
    "tag-nul": ({"tags": {"a": "\0"}}, "tag 'a' contains a NUL character"),
    "expires-naive": ({"expires_at": datetime(2030, 1, 1)}, "expires_at needs a datetime with a time zone"),  # noqa: DTZ001
    "expires-early": ({"expires_at": datetime(1969, 12, 31, tzinfo=UTC)}, "in the year 1969: give 1970 to 9998"),
    "expires-late": ({"expires_at": datetime.max.replace(tzinfo=UTC)}, "in the year 9999: give 1970 to 9998"),
    "tags-big": ({"tags": {"a": "x" * 4088}}, "tags have 4097 bytes of JSON, the limit is 4096"),
    "expires-delta": ({"expires_at": timedelta(1)}, "expires_at needs a datetime with a time zone"),
    "event-id-str": ({"event_id": str(EVENT_ID)}, "event_id is a str: give a uuid.UUID"),
    "traceparent": ({"traceparent": 5}, "traceparent is a int: give a str"),
    "base-version": ({"base_version": 1}, "base_version is 1: give 0 to 0, it is below the version"),
    "base-below-zero": ({"base_version": -1}, "base_version is -1: give 0 to 0"),
    "base-text": ({"base_version": "0"}, "base_version is '0', not an int"),
    "base-bool": ({"base_version": False}, "base_version is False, not an int"),
    "payload-type": ({"payload": {"a": object()}}, "payload cannot be encoded as JSON: .*object"),
    "payload-key": ({"payload": {1: "a"}}, "payload cannot be encoded as JSON"),
    "payload-big-int": ({"payload": 2**64}, "payload cannot be encoded as JSON"),
    "payload-surrogate": ({"payload": "\ud800"}, "payload cannot be encoded as JSON"),
    "payload-endless": ({"payload": Loop}, "payload cannot be encoded as JSON"),
    "bytes-empty": ({"payload": b""}, "payload is not JSON"),
    "bytes-latin-1": ({"payload": b'"\xe9"'}, "payload is not UTF-8"),
    "bytes-not-json": ({"payload": b"{'a': 1}"}, "payload is not JSON"),
    "bytes-nan": ({"payload": b"[NaN]"}, "payload is not JSON"),
    "bytes-two-values": ({"payload": b"1 2"}, "payload is not JSON"),
    "bytes-raw-control": ({"payload": b'"\n"'}, "payload is not JSON"),
}


@pytest.mark.parametrize(("change", "says"), INVALID.values(), ids=INVALID.keys())
def test_invalid_values_are_refused_without_a_database(change: dict[str, Any], says: str) -> None:
    """Every impossible value is named by our own error where the event is made, one or many at a time."""
    valid: dict[str, Any] = {
        "aggregate_type": "order",
        "aggregate_id": "1",
        "version": 1,
        "channels": "plain:a",
        "payload": {},
    }
    enqueue(**valid)
    with pytest.raises(InvalidEventError, match=says):
        enqueue(**valid | change)
    with pytest.raises(InvalidEventError, match=says):
        enqueue_all([NewEvent(**valid), NewEvent(**valid | change)])


def test_payloads_have_a_limit_of_the_applications_choice() -> None:
    """256 KiB of JSON unless `Outbox` is told otherwise, never more than the tables' 1 MiB."""
    event: dict[str, Any] = {"version": 1, "channels": "plain:a"}
    limit = 256 * 1024
    enqueue("order", "1", payload="x" * (limit - 2), **event)
    with pytest.raises(PayloadTooLargeError, match=r"payload has 262145 bytes of JSON, the limit is 262144"):
        enqueue("order", "1", payload="x" * (limit - 1), **event)
    with pytest.raises(PayloadTooLargeError):
        enqueue("order", "1", payload=b'"%s"' % (b"x" * (limit - 1)), **event)
    Outbox(max_payload=limit + 1).enqueue("order", "1", payload="x" * (limit - 1), **event)
    for impossible in (0, 1024 * 1024 + 1):
        with pytest.raises(ValueError, match="max_payload is"):
            Outbox(max_payload=impossible)


def test_a_statement_has_a_limit() -> None:
    """No statement without events, and none that no driver could send."""
    event = NewEvent(aggregate_type="order", aggregate_id="1", version=1, channels="plain:a", payload={})
    for count in (0, MAX_EVENTS_PER_STATEMENT + 1):
        with pytest.raises(InvalidEventError, match=f"^{count} events in one statement: give 1 to "):
            enqueue_all([event] * count)


# Mapped objects and their versions


class Base(DeclarativeBase):
    pass


class Order(Base):
    """As in any application: SQLAlchemy raises `version` whenever the row changes."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]
    revision: Mapped[int] = mapped_column("version")
    total: Mapped[Decimal] = mapped_column(server_default="9.90")
    __mapper_args__ = {"version_id_col": revision}  # noqa: RUF012 - as SQLAlchemy documents it


class Seat(Base):
    """Known by two columns."""

    __tablename__ = "seats"
    row: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


class Customer(Base):
    """Without a version."""

    __tablename__ = "customers"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def shop(engine: sa.Engine) -> sa.Engine:
    Base.metadata.create_all(engine)
    return engine


def test_the_trap_a_version_read_before_the_flush(shop: sa.Engine, connect: Connect, channel: str) -> None:
    """`version=order.revision` is evaluated before the flush that raises it: the event says the old version, and
    a subscriber that has it already would ignore the change. Flushing first is the cure."""
    with Session(shop) as session:
        order = Order(status="new")
        session.add(order)
        session.flush()
        order.status = "paid"
        session.execute(enqueue("order", order.id, version=order.revision, channels=channel, payload={}))
        session.flush()
        assert order.revision == 2
        order.status = "sent"
        session.flush()
        session.execute(enqueue("order", order.id, version=order.revision, channels=channel, payload={}))
        session.commit()
    assert rows(connect(), "version") == [(1,), (3,)]


def test_enqueue_for_flushes_first(shop: sa.Engine, connect: Connect, channel: str) -> None:
    """New and changed objects alike: key, version and server-side values are those of the row just written."""

    def payload(order: Order) -> dict[str, Any]:
        return {"status": order.status, "version": order.revision, "total": order.total}

    with Session(shop) as session:
        order = Order(status="new")
        session.add(order)
        enqueue_for(session, order, channels=channel, payload=payload)
        order.status = "paid"
        enqueue_for(
            session,
            order,
            channels=[channel, "plain:a"],
            payload=payload,
            aggregate_type="Order",
            kind="snapshot",
            tags={"a": "b"},
            expires_at=LATER,
            event_id=EVENT_ID,
            base_version=1,
        )
        enqueue_for(session, order, channels=channel, payload={"ready": True}, kind="tombstone")
        session.commit()
        assert rows(
            connect(), "aggregate_type, aggregate_id, version, kind::text, payload, cardinality(channels::text[])"
        ) == [
            ("orders", str(order.id), 1, "change", {"status": "new", "version": 1, "total": "9.90"}, 1),
            ("Order", str(order.id), 2, "snapshot", {"status": "paid", "version": 2, "total": "9.90"}, 2),
            ("orders", str(order.id), 2, "tombstone", {"ready": True}, 1),
        ]
        assert rows(connect(), "tags, expires_at, event_id, base_version")[1] == ({"a": "b"}, LATER, EVENT_ID, 1)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_aenqueue_for(shop: sa.Engine, database_url: str, connect: Connect, channel: str, driver: str) -> None:
    """The same in an AsyncSession, where an attribute that needs the database may be read by `payload` too."""

    async def change() -> None:
        target = sa.make_url(database_url).set(drivername=f"postgresql+{driver}")
        engine = create_async_engine(target, poolclass=sa.NullPool)
        async with AsyncSession(engine) as session:
            order = Order(status="new")
            session.add(order)
            await session.commit()
            order.status = "paid"
            await aenqueue_for(session, order, channels=channel, payload=lambda order: [order.revision, order.total])
            await session.commit()

    asyncio.run(change())
    assert rows(connect(), "aggregate_type, aggregate_id, version, payload") == [("orders", "1", 2, [2, "9.90"])]


def test_enqueue_for_rolls_back_with_the_change(shop: sa.Engine, connect: Connect, channel: str) -> None:
    """The event of a change that is rolled back, to the start or to a savepoint, is not written."""
    with Session(shop) as session:
        order = Order(status="new")
        session.add(order)
        session.commit()
        with session.begin_nested() as savepoint:
            order.status = "paid"
            enqueue_for(session, order, channels=channel, payload={})
            savepoint.rollback()
        order.status = "lost"
        enqueue_for(session, order, channels=channel, payload={})
        session.rollback()
    assert rows(connect(), "id") == []


def test_a_composite_key_is_joined(shop: sa.Engine, connect: Connect, channel: str) -> None:
    """The aggregate's id is the whole primary key."""
    with Session(shop) as session:
        seat = Seat(row="B", number=12)
        session.add(seat)
        enqueue_for(session, seat, channels=channel, payload={})
        session.commit()
    assert rows(connect(), "aggregate_type, aggregate_id, version") == [("seats", "B:12", 1)]


def test_enqueue_for_needs_a_version_and_a_row(shop: sa.Engine, channel: str) -> None:
    """A class without a version column, and an object that has no row (any more), are named with what to do."""
    with Session(shop) as session:
        customer = Customer()
        session.add(customer)
        with pytest.raises(InvalidEventError, match=r"Customer has no version: add a column and .*version_id_col"):
            enqueue_for(session, customer, channels=channel, payload={})
        with pytest.raises(InvalidEventError, match="this Order is not in the session: add it"):
            enqueue_for(session, Order(status="new"), channels=channel, payload={})
        order = Order(status="new")
        session.add(order)
        session.flush()
        session.delete(order)
        with pytest.raises(InvalidEventError, match="this Order is not in the session"):
            enqueue_for(session, order, channels=channel, payload={})


# Plain SQL

PLAIN_INSERT = """
INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload)
VALUES ('order', '7', 1, '{plain:a}', '{"status": "paid"}')
"""


def is_complete(connection: psycopg.Connection[Any]) -> bool:
    """Whether there is one row, like one of `enqueue`: everything but those five columns has a default."""
    [row] = rows(
        connection,
        "kind::text, channels::text[], payload::text, tags, state::text, event_id IS NOT NULL, "
        "clock_timestamp() - created_at < interval '1 minute', expires_at, traceparent",
    )
    return row == ("change", ["plain:a"], '{"status": "paid"}', None, "pending", True, True, None, None)


def test_a_plain_insert_from_psycopg(connect: Connect) -> None:
    """Raw psycopg, with parameters."""
    connect().execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) VALUES (%s, %s, %s, %s, %s)",
        ("order", "7", 1, ["plain:a"], Json({"status": "paid"})),
    )
    assert is_complete(connect())


def test_a_plain_insert_from_psql(database_url: str, connect: Connect) -> None:
    """psql, as any other language: literals alone."""
    psql(database_url, f"--command={PLAIN_INSERT}")
    assert is_complete(connect())


# What the tables refuse, whoever writes


def array(items: Sequence[str | None]) -> str:
    return "{" + ",".join("NULL" if item is None else json.dumps(item, ensure_ascii=False) for item in items) + "}"


FITTING: list[dict[str, Any]] = [
    {"aggregate_type": "ü" * 255, "aggregate_id": "ü" * 255},
    {"version": 2**53 - 1},
    {"channels": array([f"plain:{n}" for n in range(32)])},
    {"channels": array(["ü" * 127 + "x"])},
    {"payload": json.dumps("x" * (1024 * 1024 - 2))},
    {"tags": "{}"},
    {"tags": '{"Ob": "x", "a": "ob"}'},
    {"version": 2, "base_version": 1},
    {"base_version": 0},
    {"tags": json.dumps({"a": "x" * 4087})},
    {"tags": json.dumps({"a": "\x1f" * 681})},
    {"expires_at": "1970-01-01 00:00Z"},
    {"expires_at": "9999-01-01 00:00Z"},
]
IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "type-empty": ({"aggregate_type": ""}, "aggregate_type_has_1_to_255_characters"),
    "type-long": ({"aggregate_type": "x" * 256}, "aggregate_type_has_1_to_255_characters"),
    "id-empty": ({"aggregate_id": ""}, "aggregate_id_has_1_to_255_characters"),
    "id-long": ({"aggregate_id": "x" * 256}, "aggregate_id_has_1_to_255_characters"),
    "version-0": ({"version": 0}, "version_is_1_to_2_to_the_53_minus_1"),
    "version-big": ({"version": 2**53}, "version_is_1_to_2_to_the_53_minus_1"),
    "channels-none": ({"channels": "{}"}, "channels_are_1_to_32"),
    "channels-33": ({"channels": array(["a"] * 33)}, "channels_are_1_to_32"),
    "channel-empty": ({"channels": array(["a", ""])}, "no_channel_is_empty"),
    "channel-null": ({"channels": array(["a", None])}, "no_channel_is_null"),
    "channel-only-null": ({"channels": array([None])}, "no_channel_is_null"),
    "channel-256-bytes": ({"channels": array(["ü" * 128])}, "channels_have_at_most_255_bytes"),
    "channel-last-256-bytes": ({"channels": array(["a"] * 31 + ["x" * 256])}, "channels_have_at_most_255_bytes"),
    "channels-nested": ({"channels": "{{a,b},{c,d}}"}, "channels_is_a_plain_list"),
    "channels-from-0": ({"channels": "[0:1]={a,b}"}, "channels_is_a_plain_list"),
    "payload-big": ({"payload": json.dumps("x" * (1024 * 1024 - 1))}, "payload_has_at_most_1_mib"),
    "tags-list": ({"tags": '["a"]'}, "tags_are_an_object_of_strings"),
    "tags-string": ({"tags": '"a"'}, "tags_are_an_object_of_strings"),
    "tags-null": ({"tags": "null"}, "tags_are_an_object_of_strings"),
    "tag-number": ({"tags": '{"a": "b", "c": 1}'}, "tags_are_an_object_of_strings"),
    "tag-null": ({"tags": '{"a": null}'}, "tags_are_an_object_of_strings"),
    "tag-object": ({"tags": '{"a": {"b": "c"}}'}, "tags_are_an_object_of_strings"),
    "tag-list": ({"tags": '{"a": ["b"]}'}, "tags_are_an_object_of_strings"),
    "tag-ob": ({"tags": '{"a": "b", "ob": "2"}'}, "no_tag_starts_with_ob"),
    "tags-big": ({"tags": json.dumps({"a": "x" * 4088})}, "tags_have_at_most_4_kib"),
    "expires-never": ({"expires_at": "infinity"}, "expires_at_is_from_1970_to_9998"),
    "expires-before-christ": ({"expires_at": "0044-03-15 BC"}, "expires_at_is_from_1970_to_9998"),
    "expires-late": ({"expires_at": "9999-12-31"}, "expires_at_is_from_1970_to_9998"),
    "tag-ob-prefix": ({"tags": '{"object": "x"}'}, "no_tag_starts_with_ob"),
    "base-version": ({"base_version": 1}, "base_version_is_0_to_version_minus_1"),
    "base-below-zero": ({"base_version": -1}, "base_version_is_0_to_version_minus_1"),
}


def insert(connection: psycopg.Connection[Any], change: dict[str, Any]) -> None:
    row = {
        "aggregate_type": "order",
        "aggregate_id": "1",
        "version": 1,
        "channels": "{plain:a}",
        "payload": "{}",
        "tags": None,
    } | change
    columns, values = (sql.SQL(", ").join(map(kind, row)) for kind in (sql.Identifier, sql.Placeholder))
    connection.execute(sql.SQL("INSERT INTO outbox ({}) VALUES ({})").format(columns, values), row)


def test_the_tables_refuse_impossible_rows(connect: Connect) -> None:
    """A plain INSERT of a row that could never be delivered names the rule that it breaks."""
    connection = connect()
    refused = {}
    for name, (change, _) in IMPOSSIBLE.items():
        with pytest.raises(psycopg.errors.CheckViolation) as caught:
            insert(connection, change)
        refused[name] = caught.value.diag.constraint_name
    assert refused == {name: rule for name, (_, rule) in IMPOSSIBLE.items()}
    for column in ("aggregate_type", "aggregate_id", "version", "channels", "payload"):
        with pytest.raises(psycopg.errors.NotNullViolation):
            insert(connection, {column: None})
    assert rows(connection, "id") == []


def test_the_tables_take_whatever_just_fits(connect: Connect) -> None:
    """The limits themselves are allowed."""
    connection = connect()
    for change in FITTING:
        insert(connection, change)
    assert len(rows(connection, "id")) == len(FITTING)


def test_what_the_relay_fills_in_is_not_taken_from_a_writer(connect: Connect) -> None:
    """Ids rise as the database gives them: an INSERT cannot choose one."""
    connection = connect()
    with pytest.raises(psycopg.errors.GeneratedAlways):
        insert(connection, {"id": 1})
