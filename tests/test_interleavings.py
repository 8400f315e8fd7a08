"""Every order in which the steps of two writers and two relays can follow each other, on a real PostgreSQL.

Writers have two steps, relays three, which makes 25,200 orders for each scene. The relays are real workers on real
stores, the operator is the real one; in place of Centrifugo stands a list of what was sent. `make test` plays some
of the orders, chosen by a seed, and `make interleavings` all of them.
"""

from __future__ import annotations

import functools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Final

import psycopg
import pytest

from outbox_relay import operator as operator_room
from outbox_relay import start_hint
from outbox_relay.event import ACCEPTED, Event, Outage, Refusal, Reply
from outbox_relay.operator import Operator
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from outbox_relay.relay import Worker
from outbox_relay.shared import Pause, Shared
from outbox_relay.start_hint import SharedHint
from outbox_relay.store import Batch, Store
from tests.support.interleaving import Actor, Gate, Stage, interleavings
from tests.support.oracle import Fact, violations
from tests.support.writing import Connection, write

STEPS: Final = {"v": 2, "w": 2, "r": 3, "s": 3}
"""Two writers, v and w (in one scene w is an operator), and two relays, r and s."""
ORDERS: Final = 25_200
PARTS: Final = 20
SOME: Final = 250
SEED: Final = 7
WAITS: Final = (0.0, 3600.0)
"""After a refusal that the one relay meets, the object is due again at once; after the other's, not by itself."""


ALIKE: Final = {
    "test_two_changes_of_one_object": (("v", "w"), ("r", "s")),
    "test_changes_of_two_objects": (("v", "w"), ("r", "s")),
    "test_a_change_and_a_requeue": (("r", "s"),),
}
"""Who does the same in a scene. Orders that differ only in these names are one, and played once."""


@functools.cache
def every_order() -> list[str]:
    every = list(interleavings(STEPS))
    assert len(every) == len(set(every)) == ORDERS
    return every


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "orders" not in metafunc.fixturenames:
        return
    every = every_order()
    if metafunc.config.getoption("full") and metafunc.function is not test_a_naive_claim_fails:
        alike = ALIKE.get(metafunc.function.__name__, ())
        every = [order for order in every if all(order.index(one) < order.index(other) for one, other in alike)]
        ids = [f"{n + 1:02}_of_{PARTS}" for n in range(PARTS)]
        metafunc.parametrize("orders", [every[n::PARTS] for n in range(PARTS)], ids=ids)
    else:
        metafunc.parametrize("orders", [random.Random(SEED).sample(every, SOME)], ids=["some"])


class Wire:
    """Where relays publish: a list of what was accepted. An event of `refuses` is refused once."""

    def __init__(self) -> None:
        self.accepted: list[Fact] = []
        self.refuses: set[int] = set()
        self._lock = threading.Lock()

    def room(self, limit: int) -> int:
        return limit

    def close(self) -> None:
        pass

    def publish(self, events: Sequence[Event], deadline: float = 0.0) -> list[Reply] | Outage:
        with self._lock:
            return [self._reply(event) for event in events]

    def _reply(self, event: Event) -> Reply:
        if event.id in self.refuses:
            self.refuses.remove(event.id)
            return Reply((Refusal(event.channels[0], 108, "once"),))
        self.accepted.append(Fact(event.aggregate, event.version, event.event_id))
        return ACCEPTED


class SteppedStore(Store):
    """A store that asks a gate before it reads and before it settles; the gate before the claim is the actor's."""

    gate: Callable[[], None]

    def read(self, *args: Any, **kwargs: Any) -> Batch:
        self.gate()
        return super().read(*args, **kwargs)

    def settle(self, *args: Any, **kwargs: Any) -> Counter[str]:
        self.gate()
        return super().settle(*args, **kwargs)


class KeptConnection(psycopg.Connection[Any]):
    """The operator's connection, kept for its next verb. It asks a gate before the commit of a change."""

    gate: Callable[[], None]
    locked = False

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> psycopg.Cursor[Any]:
        self.locked |= "FOR NO KEY UPDATE" in (query if isinstance(query, str) else query.as_string(self))
        return super().execute(query, *args, **kwargs)

    def commit(self) -> None:
        if self.locked:
            self.gate()
            self.locked = False
        super().commit()

    def close(self) -> None:
        pass


def look_twice(store: Store) -> None:
    """Once to remember who writes, and once to start above what was settled, if they have ended."""
    store.anything_to_do()
    store.anything_to_do()


class Cast:
    """The sessions of a scene. `object` is the application's table; every order of steps has an object of its own."""

    def __init__(self, database_url: str, stack: ExitStack) -> None:
        def opened(of: type[psycopg.Connection[Any]], *, autocommit: bool) -> Any:
            connection = of.connect(database_url, autocommit=autocommit)
            stack.callback(psycopg.Connection.close, connection)
            return connection

        self.wire = Wire()
        self.committed: list[Fact] = []
        self.connection: Connection = opened(psycopg.Connection, autocommit=True)
        self.connection.execute("CREATE TABLE IF NOT EXISTS object (id text PRIMARY KEY, version bigint NOT NULL)")
        self.writers: list[Connection] = [opened(psycopg.Connection, autocommit=False) for _ in range(2)]
        self.naive: list[Connection] = [opened(psycopg.Connection, autocommit=False) for _ in range(2)]
        self.operator: KeptConnection = opened(KeptConnection, autocommit=True)
        # As the workers of one relay: each knows also what the other has found out, so more than those of two would.
        share = SharedHint()
        self.stores = [SteppedStore(database_url, wake_up=False, share=share) for _ in range(2)]
        for store in self.stores:
            stack.callback(store.close)
        self.workers = [self._worker(store, seconds) for store, seconds in zip(self.stores, WAITS, strict=True)]
        for worker in self.workers:
            worker._untried = False  # the statements of a session's first batch are another test's matter
        self.stage = Stage(opened(psycopg.Connection, autocommit=True), len(STEPS))
        stack.callback(self.stage.close)

    def _worker(self, store: Store, wait: float) -> Worker:
        options = Options(policy=Policy(backoff_base=wait, backoff_max=wait))
        return Worker(store, self.wire, options, Shared(Pause(options.pause_min, options.pause_max)))

    def begin(self, order: str, version: int) -> None:
        """Nothing was sent or committed yet; the order's object has this version."""
        self.wire.accepted.clear()
        self.wire.refuses.clear()
        self.committed.clear()
        self.connection.execute("INSERT INTO object VALUES (%s, %s)", (order, version))

    def change(self, writer: Connection, order: str, *, undone: bool = False) -> Actor:
        def run(gate: Gate) -> None:
            gate()
            statement = "UPDATE object SET version = version + 1 WHERE id = %s RETURNING version"
            [(version,)] = writer.execute(statement, (order,)).fetchall()
            fact = write(writer, order, version, "plain:a")
            gate()
            if undone:
                writer.rollback()
            else:
                writer.commit()
                self.committed.append(fact)

        return Actor(writer.info.backend_pid, run)

    def requeue(self, id_: int, dead: Fact) -> Actor:
        def run(gate: Gate) -> None:
            self.operator.gate = gate
            gate()
            if Operator("the kept connection").requeue([id_]).events:
                self.committed.append(dead)

        return Actor(self.operator.info.backend_pid, run)

    def relay(self, number: int) -> Actor:
        store, worker = self.stores[number], self.workers[number]

        def run(gate: Gate) -> None:
            store.gate = gate
            gate()
            worker.run_once()
            look_twice(store)

        return Actor(store._connection.info.backend_pid, run)

    def naive_relay(self, number: int) -> Actor:
        """What everybody writes first: take the first event that nobody else has locked, send it, mark it."""
        connection = self.naive[number]

        def run(gate: Gate) -> None:
            gate()
            taken = connection.execute(
                "SELECT id, aggregate_id, version, event_id::text FROM outbox WHERE state = 'pending' "
                "ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED"
            ).fetchall()
            gate()
            self.wire.accepted += [Fact(("order", name), version, key) for _, name, version, key in taken]
            gate()
            connection.execute("UPDATE outbox SET state = 'delivered' WHERE id = ANY(%s)", ([row[0] for row in taken],))
            connection.commit()

        return Actor(connection.info.backend_pid, run)

    def finish(self) -> list[str]:
        """Have one of the relays deliver what is left, and say everything that the promise does not allow."""
        store, worker = self.stores[0], self.workers[0]
        store.gate = lambda: None
        for _ in range(10):
            if store.left() == (False, False):
                break
            self.connection.execute("UPDATE outbox_hold SET due_at = now()")
            worker.run_once()
            look_twice(store)
        return violations(self.committed, self.wire.accepted)


@pytest.fixture
def cast(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cast]:
    """The hint where to start is renewed with each look, instead of now and then."""
    monkeypatch.setattr(start_hint, "RENEW_EVERY", 0.0)
    with ExitStack() as stack:
        yield Cast(database_url, stack)


def begin_with_one(cast: Cast, order: str) -> None:
    """Version 1 waits to be sent."""
    cast.begin(order, 1)
    cast.committed.append(write(cast.connection, order, 1, "plain:a"))


def test_two_changes_of_one_object(cast: Cast, orders: Sequence[str]) -> None:
    for order in orders:
        begin_with_one(cast, order)
        writers = {letter: cast.change(writer, order) for letter, writer in zip("vw", cast.writers, strict=True)}
        cast.stage.play(writers | {"r": cast.relay(0), "s": cast.relay(1)}, order)
        assert cast.finish() == [], order


def test_changes_of_two_objects(cast: Cast, orders: Sequence[str]) -> None:
    """The writers do not wait for each other: a lower id may be committed after a higher one was delivered."""
    for order in orders:
        names = [f"{order} {number}" for number in range(2)]
        cast.begin(names[0], 0)
        cast.connection.execute("INSERT INTO object VALUES (%s, 0)", (names[1],))
        changes = map(cast.change, cast.writers, names)
        cast.stage.play(dict(zip("vw", changes, strict=True)) | {"r": cast.relay(0), "s": cast.relay(1)}, order)
        assert cast.finish() == [], order


def test_a_naive_claim_fails(cast: Cast, orders: Sequence[str]) -> None:
    """The same scene and the same orders of steps: it sends what was written later first."""
    counterexamples: dict[str, list[str]] = {}
    for order in orders:
        begin_with_one(cast, order)
        writers = {letter: cast.change(writer, order) for letter, writer in zip("vw", cast.writers, strict=True)}
        cast.stage.play(writers | {"r": cast.naive_relay(0), "s": cast.naive_relay(1)}, order)
        if found := cast.finish():
            counterexamples[order] = found
    assert counterexamples
    print(
        f"{len(counterexamples)} of {len(orders)} orders fail, the first of them:", *next(iter(counterexamples.items()))
    )
    assert all("too early" in found[0] for found in counterexamples.values())


def test_a_change_and_a_requeue(cast: Cast, orders: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 is dead. It goes out before version 2, or is refused because that has gone out."""
    monkeypatch.setattr(operator_room, "connect", lambda _: cast.operator)
    requeued: set[bool] = set()
    for order in orders:
        cast.begin(order, 1)
        dead = write(cast.connection, order, 1, "plain:a")
        [(id_,)] = cast.connection.execute(
            "UPDATE outbox SET state = 'dead', settled_at = now() WHERE state = 'pending' RETURNING id"
        ).fetchall()
        cast.committed.append(write(cast.connection, f"{order} before", 1, "plain:a"))
        assert cast.finish() == []  # by a relay that starts above both of them from now on
        cast.stage.play(
            {
                "v": cast.change(cast.writers[0], order),
                "w": cast.requeue(id_, dead),
                "r": cast.relay(0),
                "s": cast.relay(1),
            },
            order,
        )
        assert cast.finish() == [], order
        requeued.add(dead in cast.committed)
    assert requeued == {True, False}


def test_a_refusal(cast: Cast, orders: Sequence[str]) -> None:
    """Version 1 is refused once; version 2 waits behind it, and what would have been another is rolled back."""
    for order in orders:
        begin_with_one(cast, order)
        cast.wire.refuses = {id_ for (id_,) in cast.connection.execute("SELECT max(id) FROM outbox")}
        cast.stage.play(
            {
                "v": cast.change(cast.writers[0], order),
                "w": cast.change(cast.writers[1], order, undone=True),
                "r": cast.relay(0),
                "s": cast.relay(1),
            },
            order,
        )
        assert cast.finish() == [], order
        assert not cast.wire.refuses
