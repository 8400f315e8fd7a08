"""One drain, by this relay or by Centrifugo's consumer: committed events, from the first publication to the last.

Whoever drains is up and connected before there is anything to see: our lanes are locked until then, and so is the
table of Centrifugo's consumer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg

from bench import load, stage
from bench.delay import DelayProxy
from bench.harness import Sample, WrongRunError
from bench.sides import Consumer, OurRelay
from bench.witness import Witness
from outbox_relay.config import Settings
from outbox_relay.database import APPLICATION_NAME
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.embedded.postgres import Postgres
from tests.support.redis import Redis

START_SECONDS: Final = 30.0


class Newest(NamedTuple):
    """Of snapshots only the last one of each object matters: the time until all have arrived counts, in seconds.

    `objects` have each been written `version` times.
    """

    objects: int
    version: int


@dataclass(frozen=True, kw_only=True)
class Drain:
    """What is drained, and by whom; calling it measures once, in events per second.

    `template` is a database with `events` events. The servers are new each time, because Centrifugo remembers
    idempotency keys for five minutes. Figures: CPU microseconds per event of each part, and the busy cores of all.
    """

    postgres: Postgres
    template: str
    centrifugo: Path
    events: int
    redis: Redis | None = None
    """Centrifugo's engine, emptied before each drain; without one it is memory."""
    namespace: str = "plain"
    processes: int = 1
    round_trip: float = 0.0
    """Seconds between relay and Centrifugo; 0 is loopback, without the proxy."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the relay, where they are not as shipped."""
    newest: Newest | None = None

    def __call__(self) -> Sample:
        with ExitStack() as stack:
            url = stack.enter_context(stage.database(self.postgres, self.template))
            server = stack.enter_context(fresh_centrifugo(self.centrifugo, self.redis))
            witness = stack.enter_context(_witness(server, self.namespace, self.events, self.newest))
            parts = {"postgresql": [self.postgres.pid], "centrifugo": [server.pid], "witness": [witness.pid]}
            parts |= redis_part(self.redis)
            api_url = server.api_url
            if self.round_trip:
                proxy = stack.enter_context(DelayProxy(api_url, self.round_trip))
                parts["proxy"], api_url = [proxy.pid], proxy.url
            with OurRelay(url, server, self.settings, processes=self.processes, api_url=api_url) as relay:
                with lanes_locked(url):
                    wait_for_workers(url, self.processes * self.settings.get("workers", Settings.workers))
                    costs = Costs({**parts, "relay": relay.pids})
                sample = watched(witness, costs, self.events, newest=self.newest)
            check_settled(url)
        return sample


@dataclass(frozen=True, kw_only=True)
class ConsumerDrain:
    """The same by Centrifugo's own consumer; `template` has its table."""

    postgres: Postgres
    template: str
    centrifugo: Path
    events: int
    consumer: Consumer
    redis: Redis | None = None
    namespace: str = "plain"
    newest: Newest | None = None

    def __call__(self) -> Sample:
        with ExitStack() as stack:
            url = stack.enter_context(stage.database(self.postgres, self.template))
            gate = stack.enter_context(psycopg.connect(url))
            gate.execute("LOCK TABLE centrifugo_outbox IN ACCESS EXCLUSIVE MODE")
            server = stack.enter_context(fresh_centrifugo(self.centrifugo, self.redis, [self.consumer.config(url)]))
            witness = stack.enter_context(_witness(server, self.namespace, self.events, self.newest))
            _wait_for_waiters(gate, self.consumer.partitions)
            parts = {"postgresql": [self.postgres.pid], "centrifugo": [server.pid], "witness": [witness.pid]}
            costs = Costs(parts | redis_part(self.redis))
            gate.commit()
            sample = watched(witness, costs, self.events, newest=self.newest)
            _check_empty(gate)
        return sample


def fresh_centrifugo(binary: Path, redis: Redis | None, consumers: Sequence[Mapping[str, Any]] = ()) -> Centrifugo:
    """One that knows nothing of earlier runs, not started yet: on memory, or on a Redis that is emptied."""
    if redis is None:
        return stage.centrifugo(binary, consumers=list(consumers))
    redis.ask("FLUSHALL")
    return stage.centrifugo(binary, redis_url=redis.url, consumers=list(consumers))


def redis_part(redis: Redis | None) -> dict[str, list[int]]:
    """Centrifugo's Redis as a part with costs, where it has one."""
    return {} if redis is None else {"redis": [redis.pid]}


class Costs:
    """CPU time of processes by part, those below them included, since this was made."""

    def __init__(self, parts: Mapping[str, list[int]]) -> None:
        self._parts = parts
        self._before = self._seconds()
        self.started = time.monotonic()

    def per(self, events: int) -> dict[str, float]:
        """Figures: microseconds per event of each part as `…_us`, and how many cores all of them kept busy."""
        elapsed = time.monotonic() - self.started
        spent = {part: seconds - self._before[part] for part, seconds in self._seconds().items()}
        figures = {f"{part}_us": seconds / events * 1e6 for part, seconds in spent.items()}
        return {**figures, "busy_cores": sum(spent.values()) / elapsed}

    def _seconds(self) -> dict[str, float]:
        return {part: stage.cpu(*pids) for part, pids in self._parts.items()}


def _witness(server: Centrifugo, namespace: str, events: int, newest: Newest | None) -> Witness:
    if newest is None:
        return Witness(server.ws_url, load.channels(namespace), events)
    # Who publishes each of a million snapshots needs more than two minutes for that.
    return Witness(server.ws_url, load.channels(namespace), newest.objects, newest=newest.version, seconds=600)


def watched(
    witness: Witness, costs: Costs, events: int, *, strict: bool = True, newest: Newest | None = None
) -> Sample:
    """Wait until the witness has all, and check that: events per second, with the costs.

    Where the newest alone count, it is the seconds since the costs began.
    """
    witness.finished()
    figures = costs.per(events)
    seen = witness.wait(strict=strict, arrived=True)
    figures |= {"duplicates": seen.duplicates, "out_of_order": seen.inverted}
    if newest is None:
        return Sample(seen.rate, figures)
    return Sample(seen.last_at - costs.started, {**figures, "received": seen.received})


@contextmanager
def lanes_locked(url: str) -> Iterator[None]:
    """Nobody can claim inside the block. Relays that start in it begin together at its end, warmed up."""
    with psycopg.connect(url) as connection:
        connection.execute("SELECT FROM outbox_lane FOR UPDATE")
        yield


def wait_for_workers(url: str, count: int) -> None:
    """Return once `count` workers of relays have asked the database for something."""
    deadline = time.monotonic() + START_SECONDS
    with psycopg.connect(url, autocommit=True) as connection:
        while _workers(connection) < count:
            if time.monotonic() > deadline:
                raise WrongRunError(f"fewer than {count} workers have connected")
            time.sleep(0.01)


def _workers(connection: psycopg.Connection[Any]) -> int:
    rows = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"
        " AND query <> ''",
        (APPLICATION_NAME,),
    ).fetchall()
    return int(rows[0][0])


def check_settled(url: str) -> None:
    """Raise WrongRunError if an event is left that is neither delivered nor superseded."""
    with psycopg.connect(url) as connection:
        [(left,)] = connection.execute(
            "SELECT count(*) FROM outbox WHERE state NOT IN ('delivered', 'superseded')"
        ).fetchall()
    if left:
        raise WrongRunError(f"{left} events were received and not settled")


def _wait_for_waiters(gate: psycopg.Connection[tuple[int]], partitions: int) -> None:
    """Return once the consumer of every partition waits for the table that `gate` has locked."""
    deadline = time.monotonic() + START_SECONDS
    while _waiters(gate) < partitions:
        if time.monotonic() > deadline:
            raise WrongRunError(f"fewer than {partitions} consumers wait for their table")
        time.sleep(0.01)


def _waiters(connection: psycopg.Connection[tuple[int]]) -> int:
    return _number(
        connection,
        "SELECT count(*) FROM pg_locks WHERE relation = 'centrifugo_outbox'::regclass AND NOT granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
    )


def _check_empty(connection: psycopg.Connection[tuple[int]]) -> None:
    """The consumer deletes a page after its last publication. Raises WrongRunError if it does not."""
    deadline = time.monotonic() + START_SECONDS
    while left := _number(connection, "SELECT count(*) FROM centrifugo_outbox"):
        if time.monotonic() > deadline:
            raise WrongRunError(f"{left} events were received and not deleted")
        time.sleep(0.01)


def _number(connection: psycopg.Connection[tuple[int]], query: str) -> int:
    [(number,)] = connection.execute(query).fetchall()
    return number
