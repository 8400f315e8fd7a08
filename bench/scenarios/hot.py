"""One hot aggregate and nothing else: in strict order each of its events waits for the answer to the one before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from bench import load, stage
from bench.drain import ConsumerDrain, Drain
from bench.harness import Mode, Row
from bench.sides import CONSUMERS, relay_settings
from outbox_relay.embedded.centrifugo import find_or_build
from outbox_relay.embedded.postgres import Postgres

DISTANCES: Final[Mapping[str, tuple[float, int]]] = {"loopback": (0.0, 5_000), "5ms": (0.005, 500)}
"""Round trips in seconds, with the events of the full form: about two seconds of work."""
RIVAL: Final = "centrifugo-8"
RIVAL_EVENTS: Final = 50_000


class Hot:
    name = "hot"
    title = "One hot aggregate alone"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        """Yield the rows on loopback, then those 5 ms away, where Centrifugo's consumer, being inside, never is."""
        postgres = stack.enter_context(stage.postgres())
        binary = find_or_build()
        for name, (round_trip, full) in DISTANCES.items():
            rows = [_ours(postgres, binary, name, round_trip, mode.scaled(full, least=full // 2))]
            if not round_trip:
                rows.append(_rival(postgres, binary, name, mode.scaled(RIVAL_EVENTS, least=RIVAL_EVENTS // 2)))
            yield rows


def _ours(postgres: Postgres, binary: Path, distance: str, round_trip: float, events: int) -> Row:
    fill = partial(load.fill_ours, events=events, namespace="plain", aggregates=1)
    return Row(
        f"hot/{distance}/us",
        f"outbox-relay, {distance}",
        "events/s",
        Drain(
            postgres=postgres,
            template=stage.template(postgres, f"ours_{distance}", fill),
            centrifugo=binary,
            events=events,
            round_trip=round_trip,
        ),
        {**relay_settings(), "events": events},
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
