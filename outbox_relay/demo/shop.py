"""The example application: a shop whose orders change, and every change writes its event in the same transaction."""

from __future__ import annotations

import random
import threading
import uuid
from types import TracebackType
from typing import Final, Self

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.orm.exc import StaleDataError

from outbox_relay import enqueue_for
from outbox_relay.demo.ledger import Ledger
from outbox_relay.demo.verdict import OutboxRow, Row

CHANNEL: Final = "hist:orders"
ORDERS: Final = 40
WRITERS: Final = 4
PAUSE: Final = 0.025
ROLLED_BACK: Final = 0.15
STATUSES: Final = ("placed", "paid", "packed", "shipped", "arrived", "returned", "refunded")
STOP_SECONDS: Final = 30


class Base(DeclarativeBase):
    pass


class Order(Base):
    """An order. SQLAlchemy raises the version with every UPDATE and refuses to overwrite a newer one."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[int] = mapped_column()
    status: Mapped[str]

    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 - SQLAlchemy's own form


def change_an_order(session: Session, event_id: uuid.UUID) -> Order:
    """Place an order or move one on, and write the event with its new state. Does not commit."""
    number = random.randrange(1, ORDERS + 1)
    order = session.get(Order, number)
    if order is None:
        order = Order(id=number, status=STATUSES[0])
        session.add(order)
    else:
        order.status = STATUSES[(STATUSES.index(order.status) + 1) % len(STATUSES)]
    enqueue_for(
        session,
        order,
        channels=CHANNEL,
        kind="snapshot",
        payload=lambda order: {"id": order.id, "status": order.status},
        aggregate_type="order",
        event_id=event_id,
    )
    return order


class Shop:
    """Several writers at once, each in a thread of its own, from the start of the `with` block to `close()`.

    Some transactions are rolled back on purpose, after the event was written; some more by SQLAlchemy, where
    two writers changed the same order.
    """

    def __init__(self, engine: sa.Engine, ledger: Ledger) -> None:
        self._engine = engine
        self._ledger = ledger
        self._closing = threading.Event()
        self._writers = [threading.Thread(target=self._write, name=f"writer-{n}", daemon=True) for n in range(WRITERS)]

    def __enter__(self) -> Self:
        for writer in self._writers:
            writer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the writers finish their transactions."""
        self._closing.set()
        for writer in self._writers:
            writer.join(STOP_SECONDS)

    def _write(self) -> None:
        try:
            while not self._closing.wait(random.expovariate(1 / PAUSE)):
                self._change()
        except Exception as error:
            self._ledger.troubles.append(f"a writer failed: {error}")
            raise

    def _change(self) -> None:
        event_id = uuid.uuid4()
        with Session(self._engine, expire_on_commit=False) as session:
            try:
                order = change_an_order(session, event_id)
            except (StaleDataError, IntegrityError):
                session.rollback()
                self._ledger.roll_back()
                return
            if random.random() < ROLLED_BACK:
                session.rollback()
                self._ledger.roll_back()
            else:
                session.commit()
                self._ledger.commit(str(event_id), str(order.id), order.version)


def load_orders(engine: sa.Engine) -> dict[str, Row]:
    """Every order as the database has it."""
    with engine.connect() as connection:
        rows = connection.execute(sa.select(Order.id, Order.version, Order.status))
        return {str(id_): Row(version, status) for id_, version, status in rows}


def load_outbox(engine: sa.Engine) -> dict[str, OutboxRow]:
    """Every event in the outbox, by its id."""
    query = sa.text("SELECT event_id::text, aggregate_id::text, version, state::text FROM outbox")
    with engine.connect() as connection:
        return {event: OutboxRow(order, version, state) for event, order, version, state in connection.execute(query)}


def count_states(engine: sa.Engine) -> dict[str, int]:
    """How many events are in which state."""
    with engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT state::text, count(*) FROM outbox GROUP BY state"))
        return {state: count for state, count in rows}  # noqa: C416 - a Row is no tuple to the type checker
