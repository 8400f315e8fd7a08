"""How fast committed events reach a subscriber: this relay and its rivals, on both engines, without history and with.

Whoever drains is up and connected before there is anything to see: our lanes are locked until then, and so is the
table of Centrifugo's consumer; Benthos' list has another name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psycopg

from bench import benthos, load, stage
from bench.drain import START_SECONDS, Costs, Drain, fresh_centrifugo
from bench.harness import Mode, Row, Sample, WrongRunError
from bench.sides import CONSUMERS, Benthos, Consumer, relay_settings
from bench.witness import Witness
from outbox_relay.embedded import centrifugo
from outbox_relay.embedded.postgres import Postgres
from tests.support.redis import Redis

EVENTS: Final[Mapping[stage.Engine, Mapping[str, int]]] = {
    "memory": {"us": 150_000, "centrifugo-default": 100_000, "centrifugo": 240_000, "benthos": 16_000},
    "redis": {"us": 75_000, "centrifugo-default": 30_000, "centrifugo": 30_000, "benthos": 12_000},
}
"""Of the full form: about three seconds of a side's work."""

OURS: Final[Mapping[str, tuple[str, Mapping[str, object]]]] = {
    "us": ("outbox-relay, rows kept", {}),
    "us-keep0": ("outbox-relay, rows deleted", {"keep": 0}),
}
TITLES: Final[Mapping[str, str]] = {
    "centrifugo-default": "Centrifugo's consumer, as shipped",
    "centrifugo-8": "Centrifugo's consumer, 8 partitions",
    "centrifugo-64": "Centrifugo's consumer, 64 partitions",
}
IN_FLIGHT: Final = (1, 20)


class DrainScenario:
    """Rows `drain/ENGINE/NAMESPACE/SIDE`."""

    name = "drain"
    title = "Drain of committed events"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        """Yield a group for each engine and namespace; `hist` is the one with history."""
        place = _Place(
            postgres=stack.enter_context(stage.postgres()),
            redis=stack.enter_context(Redis()),
            queue=stack.enter_context(Redis()),
            centrifugo=centrifugo.find_or_build(),
            benthos=benthos.find_or_build(),
        )
        for engine, events in EVENTS.items():
            # Below a quarter the start and the end of a drain would be most of it.
            sizes = {side: mode.scaled(full, least=full // 4) for side, full in events.items()}
            for namespace in ("plain", "hist"):
                yield list(place.rows(engine, namespace, sizes))


@dataclass(frozen=True, kw_only=True)
class _Place:
    """The servers and fills of all rows. `redis` is Centrifugo's engine, `queue` has Benthos' list."""

    postgres: Postgres
    redis: Redis
    queue: Redis
    centrifugo: Path
    benthos: Path
    _templates: set[str] = field(default_factory=set)

    def rows(self, engine: stage.Engine, namespace: str, sizes: Mapping[str, int]) -> Iterator[Row]:
        group = f"drain/{engine}/{namespace}"
        redis = self.redis if engine == "redis" else None
        for side, (title, settings) in OURS.items():
            events = sizes["us"]
            yield Row(
                key=f"{group}/{side}",
                title=title,
                unit="events/s",
                measure=self._ours(redis, namespace, events, settings),
                settings={"events": events, **relay_settings(settings)},
            )
        for side, consumer in CONSUMERS.items():
            events = sizes.get(side, sizes["centrifugo"])
            yield Row(
                key=f"{group}/{side}",
                title=TITLES[side],
                unit="events/s",
                measure=self._consumer(redis, namespace, events, consumer),
                settings={"events": events, **consumer.settings},
            )
        for in_flight in IN_FLIGHT:
            events = sizes["benthos"]
            yield Row(
                key=f"{group}/benthos-{in_flight}",
                title=f"Benthos, {in_flight} in flight" + (" (no order promised)" if in_flight > 1 else ""),
                unit="events/s",
                measure=self._benthos(redis, namespace, events, in_flight),
                settings={"events": events, "input": "redis_list", "max_in_flight": in_flight},
            )

    def _ours(
        self, redis: Redis | None, namespace: str, events: int, settings: Mapping[str, object]
    ) -> Callable[[], Sample]:
        def measure() -> Sample:
            return Drain(
                postgres=self.postgres,
                template=self._template(
                    f"ours_{namespace}_{events}", lambda url: load.fill_ours(url, events, namespace)
                ),
                centrifugo=self.centrifugo,
                events=events,
                redis=redis,
                namespace=namespace,
                settings=settings,
            )()

        return measure

    def _consumer(self, redis: Redis | None, namespace: str, events: int, consumer: Consumer) -> Callable[[], Sample]:
        def fill(url: str) -> None:
            load.fill_centrifugo(url, events, namespace, consumer.partitions, index=consumer.index)

        def measure() -> Sample:
            template = self._template(f"consumer_{consumer.partitions}_{namespace}_{events}", fill)
            with ExitStack() as stack:
                url = stack.enter_context(stage.database(self.postgres, template))
                gate = stack.enter_context(psycopg.connect(url))
                gate.execute("LOCK TABLE centrifugo_outbox IN ACCESS EXCLUSIVE MODE")
                server = stack.enter_context(fresh_centrifugo(self.centrifugo, redis, [consumer.config(url)]))
                witness = stack.enter_context(Witness(server.ws_url, load.channels(namespace), events))
                _wait_for_waiters(gate, consumer.partitions)
                parts = {"postgresql": [self.postgres.pid], "centrifugo": [server.pid], "witness": [witness.pid]}
                costs = Costs(parts | _engine(redis))
                gate.commit()
                sample = _result(witness, costs, events)
                _check_empty(gate)
            return sample

        return measure

    def _benthos(self, redis: Redis | None, namespace: str, events: int, in_flight: int) -> Callable[[], Sample]:
        def measure() -> Sample:
            with ExitStack() as stack:
                server = stack.enter_context(fresh_centrifugo(self.centrifugo, redis))
                witness = stack.enter_context(Witness(server.ws_url, load.channels(namespace), events))
                self.queue.ask("FLUSHALL")
                sender = stack.enter_context(Benthos(self.benthos, self.queue, server, in_flight=in_flight))
                sender.prepare(load.requests(self.postgres.url(), events, namespace))
                parts = {"benthos": [sender.pid], "queue": [self.queue.pid], "centrifugo": [server.pid]}
                costs = Costs(parts | {"witness": [witness.pid]} | _engine(redis))
                sender.release()
                return _result(witness, costs, events, strict=in_flight == 1)

        return measure

    def _template(self, name: str, fill: Callable[[str], None]) -> str:
        """A template database, made when it is first asked for."""
        if name not in self._templates:
            stage.template(self.postgres, name, fill)
            self._templates.add(name)
        return name


def _engine(redis: Redis | None) -> dict[str, list[int]]:
    return {} if redis is None else {"redis": [redis.pid]}


def _result(witness: Witness, costs: Costs, events: int, *, strict: bool = True) -> Sample:
    """Wait until the witness has all, and check that."""
    witness.finished()
    figures = costs.per(events)
    seen = witness.wait(strict=strict, arrived=True)
    return Sample(seen.rate, {**figures, "duplicates": seen.duplicates, "out_of_order": seen.inverted})


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


SCENARIO: Final = DrainScenario()
