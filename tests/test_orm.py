"""Classes that publish: what every flush writes, and what it does not."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.orm.exc import StaleDataError

from outbox_relay import (
    BulkChangeError,
    InvalidEventError,
    Outbox,
    PayloadTooLargeError,
    aenqueue_objects,
    enqueue_for,
    enqueue_objects,
    publishes,
)
from outbox_relay.drift import Source, find
from outbox_relay.migrations import migrate
from tests.conftest import Connect, RunRelay, database, in_database, sqlalchemy_engine
from tests.support.subscriber import Subscriber
from tests.support.waiting import in_background, wait_until
from tests.support.writing import backend_waits

Subscribe = Callable[..., Subscriber]


LATER = datetime(2030, 1, 2, tzinfo=UTC)


class Base(DeclarativeBase):
    pass


watches = sa.Table(
    "watches",
    Base.metadata,
    sa.Column("order_id", sa.ForeignKey("orders.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("watcher_id", sa.ForeignKey("watchers.id"), primary_key=True),
)


class Watcher(Base):
    __tablename__ = "watchers"
    id: Mapped[int] = mapped_column(primary_key=True)


def status(order: Order) -> dict[str, Any]:
    return {"status": order.status, "version": order.revision, "total": order.total, "touched": order.touched}


@publishes(
    channels=lambda order: [] if order.status == "draft" else ["plain:orders", f"plain:order-{order.id}"],
    payload=status,
    tags=lambda order: {"status": order.status},
)
class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    type: Mapped[str] = mapped_column(default="order")
    status: Mapped[str]
    total: Mapped[int] = mapped_column(server_default="990")
    touched: Mapped[int] = mapped_column(server_default="0", server_onupdate=sa.FetchedValue())  # what a trigger counts
    revision: Mapped[int] = mapped_column("version")
    lines: Mapped[list[Line]] = relationship(back_populates="order", cascade="all, delete-orphan")
    watchers: Mapped[list[Watcher]] = relationship(secondary=watches)
    __mapper_args__ = {  # noqa: RUF012 - as SQLAlchemy documents it
        "version_id_col": revision,
        "polymorphic_on": "type",
        "polymorphic_identity": "order",
    }


class Express(Order):
    """A table of its own beside the base class's, and no declaration of its own."""

    __tablename__ = "express_orders"
    id: Mapped[int] = mapped_column(sa.ForeignKey("orders.id"), primary_key=True)
    courier: Mapped[str]
    __mapper_args__ = {"polymorphic_identity": "express"}  # noqa: RUF012


@publishes(channels="plain:gifts", payload=lambda gift: gift.status, aggregate_type="gift")
class Gift(Order):
    """In the base class's table, with a declaration of its own."""

    __mapper_args__ = {"polymorphic_identity": "gift"}  # noqa: RUF012


@publishes(channels="plain:lines", payload=lambda line: line.text, kind="change")
class Line(Base):
    __tablename__ = "lines"
    order_id: Mapped[int] = mapped_column(sa.ForeignKey("orders.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    version: Mapped[int] = mapped_column()
    order: Mapped[Order] = relationship(back_populates="lines")
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


@publishes(
    channels="plain:notes",
    payload=lambda note: note.text,
    kind=lambda note: "tombstone" if note.gone else "snapshot",
    expires_at=lambda _: LATER,
)
class Note(Base):
    """Kept and marked as deleted."""

    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    gone: Mapped[bool] = mapped_column(default=False)
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


def microseconds(previous: int | None) -> int:
    """As docs/writing-events.md has it."""
    return max(time.time_ns() // 1_000, (previous or 0) + 1)


@publishes(channels=lambda cart: cart.channel, payload=lambda cart: cart.channel)
class Cart(Base):
    __tablename__ = "carts"
    id: Mapped[str] = mapped_column(primary_key=True)
    channel: Mapped[str]
    version: Mapped[int] = mapped_column(sa.BigInteger)
    __mapper_args__ = {"version_id_col": version, "version_id_generator": microseconds}  # noqa: RUF012


@publishes(channels="plain:stock", payload=lambda stock: stock.count)
class Stock(Base):
    """Versions are the database's own: a trigger raises them, for every writer in every language."""

    __tablename__ = "stocks"
    id: Mapped[int] = mapped_column(primary_key=True)
    count: Mapped[int]
    version: Mapped[int] = mapped_column(server_default="1", server_onupdate=sa.FetchedValue())
    __mapper_args__ = {"version_id_col": version, "version_id_generator": False}  # noqa: RUF012


TRIGGERS = """
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN NEW.touched := OLD.touched + 1; RETURN NEW; END $$;
CREATE TRIGGER touch BEFORE UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION touch();
CREATE FUNCTION raise_version() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN NEW.version := OLD.version + 1; RETURN NEW; END $$;
CREATE TRIGGER raise_version BEFORE UPDATE ON stocks FOR EACH ROW EXECUTE FUNCTION raise_version();
"""


@pytest.fixture
def shop(engine: sa.Engine) -> sa.Engine:
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.text(TRIGGERS.replace(":=", r"\:=")))
    return engine


Written = list[tuple[Any, ...]]


def written(connection: psycopg.Connection[Any], columns: str = "") -> Written:
    """The events so far, in their order: aggregate, version, kind, and more columns."""
    more = f", {columns}" if columns else ""
    statement = f"SELECT aggregate_type, aggregate_id, version, kind::text{more} FROM outbox ORDER BY id"
    return connection.execute(statement.encode()).fetchall()


# What a flush writes


def test_insert_update_delete(shop: sa.Engine, connect: Connect) -> None:
    """One event each, complete, with the version that SQLAlchemy wrote; the tombstone has the next one."""
    with Session(shop) as session:
        order = Order(status="placed")
        session.add(order)
        session.commit()
        order.status = "paid"
        session.commit()
        session.delete(order)
        session.commit()
    channels = ["plain:orders", "plain:order-1"]
    assert written(connect(), "channels, payload, tags, base_version") == [
        (
            "orders",
            "1",
            1,
            "snapshot",
            channels,
            {"status": "placed", "version": 1, "total": 990, "touched": 0},
            {"status": "placed"},
            None,
        ),
        (
            "orders",
            "1",
            2,
            "snapshot",
            channels,
            {"status": "paid", "version": 2, "total": 990, "touched": 1},
            {"status": "paid"},
            None,
        ),
        ("orders", "1", 3, "tombstone", channels, {}, {"status": "paid"}, None),
    ]


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("expire_on_commit", [True, False])
def test_in_an_async_session(
    shop: sa.Engine, database_url: str, connect: Connect, driver: str, expire_on_commit: bool
) -> None:
    """The same without an `await` of the application's own, also where attributes have to be loaded for it."""

    async def change() -> None:
        target = sa.make_url(database_url).set(drivername=f"postgresql+{driver}")
        async with AsyncSession(
            create_async_engine(target, poolclass=sa.NullPool), expire_on_commit=expire_on_commit
        ) as session:
            order = Order(status="placed")
            session.add(order)
            await session.commit()
            order.status = "paid"
            await session.commit()
            await session.delete(order)
            await session.commit()

    asyncio.run(change())
    assert written(connect(), "payload->'touched'") == [
        ("orders", "1", 1, "snapshot", 0),
        ("orders", "1", 2, "snapshot", 1),
        ("orders", "1", 3, "tombstone", None),
    ]


def test_expired_objects(shop: sa.Engine, connect: Connect) -> None:
    """Nothing has to be loaded before it is changed or deleted."""
    with Session(shop) as session:
        first, second = Order(status="placed"), Order(status="placed")
        session.add_all([first, second])
        session.commit()
        session.expire_all()
        first.status = "paid"
        session.delete(second)
        session.commit()
    assert written(connect())[2:] == [("orders", "1", 2, "snapshot"), ("orders", "2", 2, "tombstone")]


def test_one_event_per_flush_and_none_for_what_was_left_alone(shop: sa.Engine, connect: Connect) -> None:
    """Several flushes of a transaction are several versions. A flush that writes no row of an object writes no event:
    nothing was changed in fact, or only who watches it."""
    with Session(shop) as session:
        order, other = Order(status="placed"), Order(status="placed")
        session.add_all([order, other])
        session.flush()
        order.status = "paid"
        session.flush()
        other.status = "placed"  # as it was
        order.watchers.append(Watcher())
        session.flush()
        order.status = "sent"
        order.total = 5
        session.commit()
    assert [(event[1], event[2]) for event in written(connect())] == [("1", 1), ("2", 1), ("1", 2), ("1", 3)]


def test_a_change_says_which_version_it_applies_to(shop: sa.Engine, connect: Connect) -> None:
    """`kind` "change" has a `base_version`, 0 for a new object; the aggregate's id is the whole primary key."""
    with Session(shop) as session:
        order = Order(status="draft", lines=[Line(number=7, text="a")])
        session.add(order)
        session.commit()
        order.lines[0].text = "b"
        session.commit()
        order.lines.clear()
        session.commit()
    assert written(connect(), "payload, base_version") == [
        ("lines", "1:7", 1, "change", "a", 0),
        ("lines", "1:7", 2, "change", "b", 1),
        ("lines", "1:7", 3, "tombstone", {}, None),
    ]


def test_a_kind_of_the_objects_own(shop: sa.Engine, connect: Connect) -> None:
    """An object that is kept and marked as deleted has its tombstone, which does not expire, and goes on above it."""
    with Session(shop) as session:
        note = Note(text="a")
        session.add(note)
        session.commit()
        for gone in (True, False):
            note.gone = gone
            session.commit()
    assert written(connect(), "payload, expires_at") == [
        ("notes", "1", 1, "snapshot", "a", LATER),
        ("notes", "1", 2, "tombstone", {}, None),
        ("notes", "1", 3, "snapshot", "a", LATER),
    ]


def test_nobody_hears_of_it(shop: sa.Engine, connect: Connect) -> None:
    """No channel, no event; the versions go on."""
    with Session(shop) as session:
        order = Order(status="draft")
        session.add(order)
        session.commit()
        order.status = "placed"
        session.commit()
        order.status = "draft"
        session.commit()
        session.delete(order)
        session.commit()
    assert written(connect()) == [("orders", "1", 2, "snapshot")]


def test_subclasses(shop: sa.Engine, connect: Connect) -> None:
    """They publish as their base class does, unless they say otherwise; also what is only in a table of their own.
    The aggregate's type is the base class's table."""
    with Session(shop) as session:
        express, gift = Express(status="placed", courier="a"), Gift(status="wrapped")
        session.add_all([express, gift])
        session.commit()
        express.courier = "b"
        gift.status = "given"
        session.commit()
        session.delete(express)
        session.delete(gift)
        session.commit()
    events = written(connect())
    assert [event for event in events if event[0] == "orders"] == [
        ("orders", str(express_id := 1), version, kind)
        for version, kind in ((1, "snapshot"), (2, "snapshot"), (3, "tombstone"))
    ]
    assert express_id
    assert [event[2:] for event in events if event[0] == "gift"] == [
        (1, "snapshot"),
        (2, "snapshot"),
        (3, "tombstone"),
    ]
    assert len(events) == 6


def test_versions_of_the_databases_own(shop: sa.Engine, connect: Connect) -> None:
    """A version that a trigger raises is the event's, whoever else changed the row."""
    with Session(shop) as session:
        stock = Stock(count=1)
        session.add(stock)
        session.commit()
        connect().execute("UPDATE stocks SET count = 2")
        session.refresh(stock)
        stock.count = 3
        session.commit()
        session.delete(stock)
        session.commit()
    assert written(connect()) == [
        ("stocks", "1", 1, "snapshot"),
        ("stocks", "1", 3, "snapshot"),
        ("stocks", "1", 4, "tombstone"),
    ]


def test_an_object_replaced_in_one_flush(shop: sa.Engine, connect: Connect) -> None:
    """Deleted and created again under its id: SQLAlchemy makes an UPDATE of it, and the version goes on."""
    with Session(shop) as session:
        session.add(Note(id=1, text="a"))
        session.commit()
        session.delete(session.get_one(Note, 1))
        session.add(Note(id=1, text="b"))
        session.commit()
    assert written(connect(), "payload") == [("notes", "1", 1, "snapshot", "a"), ("notes", "1", 2, "snapshot", "b")]


def test_an_object_that_comes_back_starts_above_its_tombstone(
    shop: sa.Engine, connect: Connect, subscribe: Subscribe, channel: str, run_relay: RunRelay
) -> None:
    """With versions from a clock; a subscriber that compares versions sees the object again."""
    subscriber = subscribe(channel)
    with Session(shop) as session:
        for _ in range(3):
            session.add(Cart(id="c", channel=channel))
            session.commit()
            session.delete(session.get_one(Cart, "c"))
            session.commit()
    run_relay()
    versions = [publication.version for publication in subscriber.wait_for(6)]
    assert versions == sorted(set(versions))
    assert [event[3] for event in written(connect())] == ["snapshot", "tombstone"] * 3


# In whose transaction


def test_savepoints_and_rollback(shop: sa.Engine, connect: Connect) -> None:
    """An event goes with its change."""
    with Session(shop) as session:
        order = Order(status="placed")
        session.add(order)
        session.commit()
        with session.begin_nested() as savepoint:
            order.status = "lost"
            session.flush()
            savepoint.rollback()
        with session.begin_nested():
            order.status = "paid"
        session.commit()
        order.status = "lost"
        session.flush()
        session.rollback()
    assert written(connect(), "payload->>'status'") == [
        ("orders", "1", 1, "snapshot", "placed"),
        ("orders", "1", 2, "snapshot", "paid"),
    ]


def test_a_flush_that_fails_leaves_nothing_behind(shop: sa.Engine, connect: Connect) -> None:
    """Neither in the table nor in the session, which goes on after the rollback."""
    with Session(shop) as session:
        session.add_all([Order(id=1, status="placed"), Note(id=1, text=None)])
        with pytest.raises(sa.exc.IntegrityError):
            session.flush()
        session.rollback()
        session.add(Note(id=2, text="a"))
        session.commit()
    assert written(connect()) == [("notes", "2", 1, "snapshot")]


@pytest.mark.parametrize("delete", [True, False], ids=["delete", "update"])
def test_somebody_was_faster(shop: sa.Engine, connect: Connect, delete: bool) -> None:
    """StaleDataError, as without us, and no event of the loser's."""
    with Session(shop) as session:
        order = Order(status="placed")
        session.add(order)
        session.commit()
        assert order.revision == 1
        connect().execute("UPDATE orders SET status = 'paid', version = 2")
        if delete:
            session.delete(order)
        else:
            order.status = "sent"
        with pytest.raises(StaleDataError):
            session.commit()
        session.rollback()
        order.status = "sent"
        session.commit()
    assert written(connect()) == [("orders", "1", 1, "snapshot"), ("orders", "1", 3, "snapshot")]


def test_two_writers_of_one_object(shop: sa.Engine, connect: Connect) -> None:
    """The second one waits at the row, and ids are in the order of versions."""
    observer = connect()
    with Session(shop) as first, Session(shop) as second:
        first.add(Note(id=1, text="a"))
        first.commit()
        mine = first.get_one(Note, 1, with_for_update=True)
        mine.text = "b"
        first.flush()

        def write() -> None:
            theirs = second.get_one(Note, 1, with_for_update=True)
            theirs.text = "c"
            second.commit()

        with in_background(write) as ended:
            wait_until(lambda: backend_waits(observer, "Lock"), "the second one waits")
            first.commit()
            ended()
    assert written(observer, "payload") == [("notes", "1", n, "snapshot", text) for n, text in enumerate("abc", 1)]


def test_two_databases(shop: sa.Engine, server_url: str, connect: Connect) -> None:
    """The event is written where its object is."""
    with database(server_url) as name:
        url = in_database(server_url, name)
        other = sqlalchemy_engine(url)
        migrate(other)
        Base.metadata.create_all(other)
        with Session(binds={Note: other, Order: shop}) as session:
            session.add_all([Note(text="a"), Order(status="placed")])
            session.commit()
        with psycopg.connect(url) as connection:
            assert written(connection) == [("notes", "1", 1, "snapshot")]
    assert written(connect()) == [("orders", "1", 1, "snapshot")]


def test_an_invalid_event_stops_the_flush(shop: sa.Engine, connect: Connect) -> None:
    """With our own error, and the change is not committed without its event."""
    with Session(shop) as session:
        session.add(Note(text="x" * 300_000))
        with pytest.raises(PayloadTooLargeError):
            session.commit()
    assert connect().execute("SELECT count(*) FROM notes").fetchone() == (0,)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("ab"), st.sampled_from("xyz")),
        st.tuples(st.just("delete"), st.sampled_from("ab")),
        st.sampled_from([("flush",), ("savepoint",), ("release",), ("undo",), ("commit",), ("rollback",), ("expire",)]),
    ),
    min_size=5,
    max_size=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_whatever_a_session_does(
    shop: sa.Engine, database_url: str, connect: Connect, steps: list[tuple[str, ...]]
) -> None:
    """In the end each object's last event says what it is, or that it is gone, and its versions only rose."""
    connection = connect()
    connection.execute("TRUNCATE outbox, carts")
    with Session(shop) as session:
        for step, *arguments in steps:
            match step, arguments:
                case "put", [key, text]:
                    cart = session.get(Cart, key)
                    if cart is None:
                        session.add(Cart(id=key, channel=text))
                    else:
                        cart.channel = text
                case "delete", [key]:
                    cart = session.get(Cart, key)
                    if cart is not None:
                        session.delete(cart)
                case "savepoint", _:
                    session.begin_nested()
                case "release" | "undo", _:
                    if (savepoint := session.get_nested_transaction()) is not None:
                        savepoint.commit() if step == "release" else savepoint.rollback()
                case "expire", _:
                    session.flush()
                    session.expire_all()
                case _:
                    getattr(session, step)()
        session.commit()
    assert find(database_url, Source(table="carts", aggregate_type="carts"), keep=3600.0).drifts == []
    events = written(connection, "payload")
    last = {event[1]: event for event in events}
    shown = {key: payload for key, (*_, kind, payload) in last.items() if kind != "tombstone"}
    assert shown == dict(connection.execute("SELECT id, channel FROM carts").fetchall())
    for key in last:
        versions = [event[2] for event in events if event[1] == key]
        assert versions == sorted(set(versions))


# Bulk statements


BULK = [
    sa.update(Order).values(status="paid"),
    sa.delete(Express),
    sa.insert(Order).values(status="paid", revision=1),
]


@pytest.mark.parametrize("statement", BULK, ids=["update", "delete", "insert"])
def test_a_bulk_statement_does_not_slip_through(shop: sa.Engine, connect: Connect, statement: sa.Executable) -> None:
    """It would write no event, so it is refused, with what to do; unless the application says that it knows."""
    with Session(shop) as session:
        with pytest.raises(BulkChangeError, match="raise the version in it, call enqueue_objects"):
            session.execute(statement)
        if not isinstance(statement, sa.Insert):
            session.execute(statement.execution_options(outbox_relay_bulk=True))
        session.execute(sa.insert(watches).from_select(["order_id", "watcher_id"], sa.select(watches)))
        session.execute(sa.update(Watcher).values(id=Watcher.id + 1))
        session.commit()
    assert written(connect()) == []


def test_the_events_of_a_bulk_statement(shop: sa.Engine, connect: Connect) -> None:
    """`enqueue_objects` writes them as declared, in the order given, at the versions that the rows have now."""
    with Session(shop) as session:
        session.add_all([Order(status="placed"), Express(status="placed", courier="a"), Note(text="a")])
        session.commit()
        connect().execute("TRUNCATE outbox")
        known = session.scalars(sa.select(Order).order_by(Order.id.desc())).all()
        note = session.scalars(sa.select(Note)).one()
        session.execute(
            sa.update(Order).values(status="paid", revision=Order.revision + 1),
            execution_options={"outbox_relay_bulk": True, "synchronize_session": False},
        )
        session.execute(sa.text("UPDATE express_orders SET courier = 'b'"))
        session.execute(sa.text("UPDATE notes SET text = 'b', version = 7"))
        enqueue_objects(session, [*known, note])
        assert [order.status for order in known] == ["paid", "paid"]
        session.commit()
    assert written(connect(), "payload->>'status'")[:2] == [
        ("orders", "2", 2, "snapshot", "paid"),
        ("orders", "1", 2, "snapshot", "paid"),
    ]
    assert written(connect())[2:] == [("notes", "1", 7, "snapshot")]


def test_the_events_of_a_bulk_statement_in_an_async_session(
    shop: sa.Engine, database_url: str, connect: Connect
) -> None:
    async def change() -> None:
        target = sa.make_url(database_url).set(drivername="postgresql+asyncpg")
        async with AsyncSession(create_async_engine(target, poolclass=sa.NullPool)) as session:
            session.add(Note(text="a"))
            await session.commit()
            changed = sa.update(Note).values(text="b", version=Note.version + 1).returning(Note)
            notes = await session.scalars(changed, execution_options={"outbox_relay_bulk": True})
            await aenqueue_objects(session, notes.all())
            await session.commit()

    asyncio.run(change())
    assert written(connect(), "payload")[1:] == [("notes", "1", 2, "snapshot", "b")]


def test_what_has_no_event(shop: sa.Engine, connect: Connect) -> None:
    """Objects of a class that does not publish, without a session, or without a row are refused by name."""
    with Session(shop) as session:
        watcher, note = Watcher(), Note(text="a")
        session.add_all([watcher, note])
        session.commit()
        with pytest.raises(InvalidEventError, match="Watcher does not publish"):
            enqueue_objects(session, [watcher])
        with pytest.raises(InvalidEventError, match="this Note is not in the session"):
            enqueue_objects(session, [Note(text="b")])
        connect().execute("DELETE FROM notes")
        with pytest.raises(InvalidEventError, match="this Note has no row any more"):
            enqueue_objects(session, [note])


# Declarations


def test_a_class_without_a_version(shop: sa.Engine) -> None:
    """Refused where it is declared, with the lines that are missing."""
    declare = publishes(channels="plain:a", payload=lambda watcher: watcher.id)
    with pytest.raises(InvalidEventError, match=r"Watcher has no version: add a column and .*version_id_col"):
        declare(Watcher)
    with pytest.raises(InvalidEventError, match="Unmapped is not mapped"):

        @declare
        class Unmapped:
            pass


def test_an_outbox_of_the_applications_choice(shop: sa.Engine, connect: Connect) -> None:
    """Schema and limits are those of `outbox`."""

    class Own(DeclarativeBase):
        pass

    @publishes(
        channels=iter(["plain:a", "plain:b"]),
        payload=lambda thing: "x" * 300_000,
        outbox=Outbox("public", max_payload=400_000),
    )
    class Thing(Own):
        __tablename__ = "things"
        id: Mapped[int] = mapped_column(primary_key=True)
        version: Mapped[int] = mapped_column()
        __mapper_args__ = {"version_id_col": version}  # noqa: RUF012

    Own.metadata.create_all(shop)
    with Session(shop) as session:
        session.connection().execute(sa.text("SET search_path = pg_catalog"))
        session.connection().execute(sa.text("SET search_path = public, pg_temp"))
        session.add_all([Thing(), Thing()])
        session.commit()
    assert written(connect(), "channels") == [
        ("things", "1", 1, "snapshot", ["plain:a", "plain:b"]),
        ("things", "2", 1, "snapshot", ["plain:a", "plain:b"]),
    ]


def test_by_hand_beside_it(shop: sa.Engine, connect: Connect) -> None:
    """`enqueue_for` writes one more event, of the same aggregate."""
    with Session(shop) as session:
        express = Express(status="placed", courier="a")
        session.add(express)
        enqueue_for(session, express, channels="plain:couriers", payload={"courier": "a"})
        session.commit()
    assert written(connect()) == [("orders", "1", 1, "snapshot"), ("orders", "1", 1, "change")]


def test_many_objects_are_one_statement(shop: sa.Engine, connect: Connect) -> None:
    """However many a flush writes, their events are one statement of ours, in the order in which they were written."""
    statements = itertools.count()

    def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "INSERT INTO outbox" in statement:
            next(statements)

    sa.event.listen(shop, "before_cursor_execute", count)
    with Session(shop) as session:
        session.add_all(Note(text=str(n)) for n in range(5_000))
        session.commit()
    assert next(statements) == 1
    assert [event[1] for event in written(connect())] == [str(n) for n in range(1, 5_001)]
