"""One hot aggregate and nothing else: in strict order each of its events waits for the answer to the one before it.

In bundles it does not: a publication is atomic, so events of one aggregate may share one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from bench import load, stage
from bench.drain import ConsumerDrain, Drain
from bench.harness import Mode, Row
from bench.sides import CONSUMERS, relay_settings
from outbox_relay.embedded.centrifugo import find_or_build
from outbox_relay.embedded.postgres import Postgres


class Distance(NamedTuple):
    """A round trip in seconds, with the events of the full form: about two seconds of work, and those in bundles."""

    round_trip: float
    events: int
    bundled: int


DISTANCES: Final[Mapping[str, Distance]] = {
    "loopback": Distance(0.0, 5_000, 100_000),
    "5ms": Distance(0.005, 500, 50_000),
}
BUNDLES: Final = {"namespaces": {"plain": {"bundle_events": 500}}}
RIVAL: Final = "centrifugo-8"
RIVAL_EVENTS: Final = 50_000


class Backlog(NamedTuple):
    """A database to be copied, and how many events it holds."""

    template: str
    events: int


class Hot:
    name = "hot"
    title = "One hot aggregate alone"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        """Yield the rows on loopback, then those 5 ms away, where Centrifugo's consumer, being inside, never is."""
        postgres = stack.enter_context(stage.postgres())
        binary = find_or_build()
        for name, (round_trip, full, bundled) in DISTANCES.items():
            few, many = mode.scaled(full, least=full // 2), mode.scaled(bundled, least=bundled // 2)
            fill = partial(load.fill_ours, namespace="plain", aggregates=1)
            lonely, crowd = (
                Backlog(stage.template(postgres, f"ours_{name}_{events}", partial(fill, events=events)), events)
                for events in (few, many)
            )
            ours = partial(_ours, postgres, binary, name)
            rows = [
                ours(lonely, side="us", title="one by one", settings={}),
                ours(crowd, side="us-bundles", title="bundles", settings=BUNDLES),
                ours(crowd, side="us-bundles-keep0", title="bundles, rows deleted", settings={**BUNDLES, "keep": 0}),
            ]
            if not round_trip:
                rows.append(_rival(postgres, binary, name, mode.scaled(RIVAL_EVENTS, least=RIVAL_EVENTS // 2)))
            yield rows


def _ours(
    postgres: Postgres,
    binary: Path,
    distance: str,
    backlog: Backlog,
    *,
    side: str,
    title: str,
    settings: Mapping[str, object],
) -> Row:
    return Row(
        f"hot/{distance}/{side}",
        f"outbox-relay, {title}, {distance}",
        "events/s",
        Drain(
            postgres=postgres,
            template=backlog.template,
            centrifugo=binary,
            events=backlog.events,
            round_trip=DISTANCES[distance].round_trip,
            settings=settings,
        ),
        {**relay_settings(settings), "events": backlog.events},
    )


def _rival(postgres: Postgres, binary: Path, distance: str, events: int) -> Row:
    """All its events are in one partition, and it publishes them one after another without leaving the process."""
    consumer = CONSUMERS[RIVAL]
    fill = partial(
        load.fill_centrifugo,
        events=events,
        namespace="plain",
        partitions=consumer.partitions,
        index=consumer.index,
        aggregates=1,
    )
    return Row(
        f"hot/{distance}/{RIVAL}",
        f"Centrifugo's consumer, {consumer.partitions} partitions, of which one has events",
        "events/s",
        ConsumerDrain(
            postgres=postgres,
            template=stage.template(postgres, "rival", fill),
            centrifugo=binary,
            events=events,
            consumer=consumer,
        ),
        {**consumer.settings, "events": events},
    )


SCENARIO = Hot()
