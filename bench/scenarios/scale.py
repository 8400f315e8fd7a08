"""Several relay processes at once, Centrifugo 5 ms away; and what the measured costs promise on hosts of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Final, NamedTuple

from bench import load, stage
from bench.drain import Drain
from bench.harness import Mode, Row
from bench.sides import relay_settings
from outbox_relay.embedded.centrifugo import find_or_build

EVENTS: Final = 100_000
PROCESSES: Final = (1, 2, 4)
ROUND_TRIP: Final = 0.005


class Scale:
    name = "scale"
    title = "One, two and four relay processes on the same cores, round trip 5 ms"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        events = mode.scaled(EVENTS, least=20_000)
        postgres = stack.enter_context(stage.postgres())
        template = stage.template(postgres, "scale", partial(load.fill_ours, events=events, namespace="plain"))
        binary = find_or_build()
        yield [
            Row(
                f"scale/5ms/us-{processes}",
                f"outbox-relay, {processes} process{'es' if processes > 1 else ''}",
                "events/s",
                Drain(
                    postgres=postgres,
                    template=template,
                    centrifugo=binary,
                    events=events,
                    processes=processes,
                    round_trip=ROUND_TRIP,
                ),
                {**relay_settings(), "events": events, "processes": processes},
            )
            for processes in PROCESSES
        ]


class Ceiling(NamedTuple):
    """What one part of the path can do on a host of its own."""

    part: str
    events_per_second: float


def ceilings(cpu_us: Mapping[str, float], cores: int, relays: int) -> list[Ceiling]:
    """What PostgreSQL, the relays and Centrifugo could each do on a host of its own; the first saturates first.

    `cpu_us` are the measured CPU microseconds per event: `postgresql_us`, `relay_us`, `centrifugo_us`, as in the
    figures of `floor/us`. Every host has `cores` like those measured. PostgreSQL and Centrifugo use all of theirs; a
    relay process uses one, because Python's threads share it, so `relays` processes use `relays` cores at most.

    An upper bound: it takes for granted that the costs per event stay as they are, that no part waits for another
    (neither for its round trips, which more workers hide, nor for its locks), and that disk and network keep up.
    """
    busy = {"postgresql": cores, "relay": min(relays, cores), "centrifugo": cores}
    rates = [Ceiling(part, count * 1e6 / cpu_us[f"{part}_us"]) for part, count in busy.items()]
    return sorted(rates, key=lambda ceiling: ceiling.events_per_second)


SCENARIO = Scale()
