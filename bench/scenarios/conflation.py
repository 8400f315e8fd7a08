"""Snapshots that piled up behind an outage: how long until every object is true on the page.

Each object was written many times meanwhile, and only its last snapshot matters. The relay conflates, as it was told
for this type; Centrifugo's consumer publishes them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from bench import load, stage
from bench.drain import ConsumerDrain, Drain, Newest
from bench.harness import Mode, Row
from bench.sides import CONSUMERS, relay_settings
from outbox_relay.embedded.centrifugo import find_or_build
from outbox_relay.embedded.postgres import Postgres
from tests.support.redis import Redis

OBJECTS: Final = 1_000
EVENTS: Final = 1_000_000
REPETITIONS: Final = {"full": 3, "short": 1, "quick": 1}
SETTINGS: Final[Mapping[str, object]] = {"types": {"order": {"conflate": True}}}
SIDES: Final[Mapping[str, Mapping[str, object]]] = {"us": SETTINGS, "us-keep0": {**SETTINGS, "keep": 0}}
RIVALS: Final[Mapping[stage.Engine, tuple[str, ...]]] = {
    "redis": ("centrifugo-8", "centrifugo-64"),
    "memory": ("centrifugo-8",),
}


class Conflation:
    """Rows `conflation/ENGINE/SIDE`."""

    name = "conflation"
    title = "Snapshots after an outage"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        """Yield a group for each engine."""
        postgres, redis = stack.enter_context(stage.postgres()), stack.enter_context(Redis())
        binary = find_or_build()
        newest = Newest(OBJECTS, mode.scaled(EVENTS // OBJECTS))
        for engine, rivals in RIVALS.items():
            place = (engine, postgres, redis if engine == "redis" else None, binary, newest)
            rows = [*_ours(*place), *(_rival(*place, side=side) for side in rivals)]
            yield [replace(row, repetitions=REPETITIONS[mode.name]) for row in rows]


def _ours(engine: stage.Engine, postgres: Postgres, redis: Redis | None, binary: Path, newest: Newest) -> Iterator[Row]:
    """Yield a row with events kept, and one with events deleted, as the rival's are."""
    events = newest.objects * newest.version
    fill = partial(load.fill_ours, events=events, namespace="plain", aggregates=newest.objects, kind="snapshot")
    template = stage.template(postgres, f"ours_{engine}", fill)
    for side, settings in SIDES.items():
        yield Row(
            f"conflation/{engine}/{side}",
            f"outbox-relay, conflation{', rows deleted' if 'keep' in settings else ''}",
            "s",
            Drain(
                postgres=postgres,
                template=template,
                centrifugo=binary,
                events=events,
                redis=redis,
                settings=settings,
                newest=newest,
            ),
            {**relay_settings(settings), "events": events, "objects": newest.objects},
        )


def _rival(
    engine: stage.Engine, postgres: Postgres, redis: Redis | None, binary: Path, newest: Newest, *, side: str
) -> Row:
    consumer, events = CONSUMERS[side], newest.objects * newest.version
    fill = partial(
        load.fill_centrifugo,
        events=events,
        namespace="plain",
        partitions=consumer.partitions,
        index=consumer.index,
        aggregates=newest.objects,
        kind="snapshot",
    )
    return Row(
        f"conflation/{engine}/{side}",
        f"Centrifugo's consumer, {consumer.partitions} partitions",
        "s",
        ConsumerDrain(
            postgres=postgres,
            template=stage.template(postgres, f"rival_{engine}_{consumer.partitions}", fill),
            centrifugo=binary,
            events=events,
            consumer=consumer,
            redis=redis,
            newest=newest,
        ),
        {**consumer.settings, "events": events, "objects": newest.objects},
    )


SCENARIO: Final = Conflation()
