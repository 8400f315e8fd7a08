"""Relays killed at random under concurrent writers, judged by an independent subscriber."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import closing

import httpx
import psycopg

from outbox_relay.embedded.centrifugo import Centrifugo
from tests.conftest import Connect, StartRelay
from tests.support.gateway import Gateway
from tests.support.oracle import Fact, violations
from tests.support.subscriber import Subscriber
from tests.support.waiting import wait_until
from tests.support.writing import Connection, fact, neighbours, states, write

Subscribe = Callable[..., Subscriber]

SEED = 20
KILLS = 5
ORDERS = [str(number) for number in range(12)]


class Writers:
    """Threads that change orders under their row locks, several in a transaction, and roll some back.

    `committed` is what became true. Stops with the `with` block; an error of a writer is raised there.
    """

    def __init__(self, database_url: str, channel: str, seed: int, threads: int = 3) -> None:
        self.committed: list[Fact] = []
        self._database_url = database_url
        self._channel = channel
        self._stopping = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}/{number}"),)) for number in range(threads)
        ]

    def __enter__(self) -> Writers:
        with psycopg.connect(self._database_url) as connection:
            connection.execute("CREATE TABLE orders (id text PRIMARY KEY, version bigint NOT NULL DEFAULT 0)")
            connection.execute("INSERT INTO orders SELECT unnest(%s::text[])", (ORDERS,))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _run(self, chance: random.Random) -> None:
        try:
            with closing(psycopg.connect(self._database_url)) as connection:
                while not self._stopping.wait(chance.uniform(0, 0.02)):
                    self._transaction(connection, chance)
        except BaseException as error:
            self._errors.append(error)

    def _transaction(self, connection: Connection, chance: random.Random) -> None:
        events: list[Fact] = []
        # In one order of locking, so that writers never deadlock.
        for name in sorted(chance.sample(ORDERS, chance.randint(1, 3))):
            if chance.random() < 0.2:
                connection.execute("SAVEPOINT s")
                self._change(connection, name)
                connection.execute("ROLLBACK TO s")
            events += [self._change(connection, name) for _ in range(chance.randint(1, 2))]
        if chance.random() < 0.25:
            connection.rollback()
        else:
            connection.commit()
            self.committed += events

    def _change(self, connection: Connection, name: str) -> Fact:
        statement = "UPDATE orders SET version = version + 1 WHERE id = %s RETURNING version"
        row = connection.execute(statement, (name,)).fetchone()
        assert row is not None
        return write(connection, name, row[0], self._channel)


def test_relays_killed_at_random_lose_invent_and_reorder_nothing(
    connect: Connect,
    database_url: str,
    start_relay: StartRelay,
    subscribe: Subscribe,
    gateway: Gateway,
    channel: str,
) -> None:
    """Three relay processes of two workers each; one that is at work is killed with SIGKILL after a random number
    of publications, and another one started, five times. The idempotency keys spare the subscriber every
    repetition, so it hears each event once."""
    chance = random.Random(SEED)
    subscriber = subscribe(channel)
    relays = [start_relay({"workers": 2, "centrifugo_url": gateway.url}, wait=False) for _ in range(3)]
    for relay in relays:
        relay.wait_for("relay started")
    with Writers(database_url, channel, SEED) as writers:
        for _ in range(KILLS):
            subscriber.wait_for(len(subscriber.received) + chance.randint(50, 250))
            victim = chance.choice([relay for relay in relays if relay.said("relay started")])
            victim.kill()
            relays.remove(victim)
            relays.append(start_relay({"workers": 2, "centrifugo_url": gateway.url}, wait=False))
    connection = connect()
    wait_until(lambda: states(connection) == {"delivered": len(writers.committed)}, "all are delivered")
    received = [fact(publication) for publication in subscriber.wait_for(len(writers.committed))]
    assert subscriber.lost is None
    assert violations(writers.committed, received) == []
    # A kill repeats what its victim had in flight, about a third of all here; relays that do not keep out of each
    # other's way ask for everything several times.
    assert len(gateway.commands) < 2 * len(received)
    assert len(received) > 100 * KILLS
    for relay in relays:
        relay.wait_for("relay started")
        assert relay.terminate() == 0


def test_a_naive_claim_fails_the_same_judgement(
    connect: Connect, centrifugo: Centrifugo, subscribe: Subscribe, channel: str
) -> None:
    """SKIP LOCKED on the event rows themselves, send, mark: what everybody writes first. While one such relay is
    about to send an order's first event, another one skips it and sends the second."""
    subscriber = subscribe(channel)
    connection = connect()
    [name] = neighbours(connection, 1)
    committed = [write(connection, name, version, channel) for version in (1, 2, 3)]
    first, second = connect(), connect()
    naive_batch(first, centrifugo, before_sending=lambda: naive_batch(second, centrifugo))
    naive_batch(first, centrifugo)
    assert states(connection) == {"delivered": 3}
    received = [fact(publication) for publication in subscriber.wait_for(3)]
    assert violations(committed, received) == [
        f"order: {committed[1]} arrived 1 event(s) too early",
        f"order: {committed[2]} arrived 1 event(s) too early",
    ]


def naive_batch(
    connection: Connection, centrifugo: Centrifugo, before_sending: Callable[[], None] = lambda: None
) -> None:
    with connection.transaction():
        rows = connection.execute(
            "SELECT id, event_id::text, aggregate_id::text, version, channels[1] FROM outbox WHERE state = 'pending' "
            "ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED"
        ).fetchall()
        before_sending()
        for id_, event_id, aggregate_id, version, channel in rows:
            tags = {"ob_type": "order", "ob_id": aggregate_id, "ob_version": str(version), "ob_event": event_id}
            publication = {"channel": channel, "data": {}, "tags": tags, "idempotency_key": event_id}
            httpx.post(
                f"{centrifugo.api_url}/publish", json=publication, headers={"X-API-Key": centrifugo.api_key}
            ).raise_for_status()
            connection.execute("UPDATE outbox SET state = 'delivered' WHERE id = %s", (id_,))
