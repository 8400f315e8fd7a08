"""How fast committed events reach a subscriber, by this relay and its rivals, on both engines, with history and not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench import benthos, load, stage
from bench.drain import ConsumerDrain, Costs, Drain, fresh_centrifugo, redis_part, watched
from bench.harness import Mode, Row, Sample
from bench.sides import CONSUMERS, Benthos, Consumer, relay_settings
from bench.witness import Witness
from outbox_relay.embedded import centrifugo
from outbox_relay.embedded.postgres import Postgres
from tests.support.redis import Redis

EVENTS: Final[Mapping[stage.Engine, Mapping[str, int]]] = {
    "memory": {
        "us": 150_000,
        "centrifugo-default": 100_000,
        "centrifugo-8": 240_000,
        "centrifugo-64": 256_000,
        "benthos": 16_000,
    },
    "redis": {
        "us": 75_000,
        "centrifugo-default": 20_000,
        "centrifugo-8": 75_000,
        "centrifugo-64": 256_000,
        "benthos": 12_000,
    },
}
"""Of the full form: some seconds of a side's work."""
PAGES: Final = 4
"""So often at least must a partition ask for events: what it reads before its first publication and deletes after its
last one costs time that is not seen."""

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
            for side, consumer in CONSUMERS.items():
                sizes[side] = max(sizes[side], PAGES * consumer.partitions * consumer.rows)
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
            events = sizes[side]
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
            return ConsumerDrain(
                postgres=self.postgres,
                template=self._template(f"consumer_{consumer.partitions}_{namespace}_{events}", fill),
                centrifugo=self.centrifugo,
                events=events,
                consumer=consumer,
                redis=redis,
                namespace=namespace,
            )()

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
                costs = Costs(parts | {"witness": [witness.pid]} | redis_part(redis))
                sender.release()
                return watched(witness, costs, events, strict=in_flight == 1)

        return measure

    def _template(self, name: str, fill: Callable[[str], None]) -> str:
        """A template database, made when it is first asked for."""
        if name not in self._templates:
            stage.template(self.postgres, name, fill)
            self._templates.add(name)
        return name


SCENARIO: Final = DrainScenario()
