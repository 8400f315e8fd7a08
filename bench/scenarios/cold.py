"""Cold aggregates beside a hot one that has a standing backlog and is still written: how long their events take.

All rows have the same writer: events one by one, open loop, to 1,000 cold aggregates and to some that share the hot
one's lane. They differ only in whether there is a hot one, and in whom the subscriber hears.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psycopg

from bench import stage
from bench.bulk import Stretch, fill, make_tables
from bench.drain import wait_for_workers
from bench.harness import Mode, Row, Sample, Scenario
from bench.open_loop import Target, percentile, wait_until_delivered, write
from bench.outboxes import Refilled, in_background, write_steadily
from bench.sides import OurRelay, relay_settings
from bench.witness import Witness
from outbox_relay.config import Settings
from outbox_relay.embedded.centrifugo import find_or_build
from outbox_relay.embedded.postgres import Postgres

RATE: Final = 300.0
"""Events per second, to all of them together."""
COLD: Final = 1_000
CANDIDATES: Final = 12_800
"""Aggregates of which those in the hot one's lane are its mates: one in 256, about 50."""
HOT_RATE: Final = 100
BACKLOG: Final = {"full": 50_000, "short": 50_000, "quick": 20_000}
SECONDS: Final = {"full": 10.0, "short": 6.0, "quick": 4.0}

_LANES: Final = """
SELECT aggregate, hashtextextended('order' || '/' || aggregate, 0) & 255 FROM unnest(%s::text[]) AS aggregate
"""


class Cold:
    name = "cold"
    title = "Cold aggregates beside a hot one"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        server = stack.enter_context(stage.postgres())
        hot = Stretch("hot", BACKLOG[mode.name], 1)
        empty = stage.template(server, "empty", make_tables)
        crowded = stage.template(server, "hot", lambda url: fill(url, [hot]))
        cold, mates = _targets(server.url(empty), f"{hot.name}-0")
        without = _Run(server, find_or_build(), empty, None, [*cold, *mates], cold, SECONDS[mode.name])
        beside = replace(without, template=crowded, hot=hot)
        yield [
            Row("cold/without/us", "cold, nobody is hot", "ms, p99", without, without.settings),
            Row("cold/beside/us", "cold, beside a hot one", "ms, p99", beside, beside.settings),
        ]
        sharing = replace(beside, heard=mates)
        # It takes as long as the backlog of the hot one.
        yield [Row("cold/lane-mates/us", "cold, in the lane of the hot one", "ms, p99", sharing, sharing.settings, 1)]


def _targets(url: str, hot: str) -> tuple[list[Target], list[Target]]:
    """The cold aggregates, and the mates of the hot one's lane, which have a channel of their own."""
    with psycopg.connect(url) as connection:
        names = [hot, *(f"cold-{n}" for n in range(CANDIDATES))]
        lanes: dict[str, int] = dict(connection.execute(_LANES, (names,)).fetchall())
        connection.rollback()
    hot_lane = lanes.pop(hot)
    cold = [Target(name, f"plain:{name}") for name, lane in lanes.items() if lane != hot_lane]
    return cold[:COLD], [Target(name, "plain:mates") for name, lane in lanes.items() if lane == hot_lane]


@dataclass(frozen=True, slots=True)
class _Run:
    """One run; its sample is the p99 of those who are heard, from before the INSERT to the subscriber."""

    server: Postgres
    binary: Path
    template: str
    hot: Stretch | None
    """What is pending of the hot one in the template."""
    written: Sequence[Target]
    heard: Sequence[Target]
    seconds: float

    @property
    def settings(self) -> dict[str, object]:
        hot = {"hot backlog": self.hot.events, "hot events per second": HOT_RATE} if self.hot else {}
        return {"cold events per second": RATE, "seconds": self.seconds, **hot, "relay": relay_settings()}

    def __call__(self) -> Sample:
        targets = list(self.written)
        random.Random(0).shuffle(targets)
        channels = sorted({target.channel for target in self.heard})
        counts: Counter[Target] = Counter()
        with (
            stage.database(self.server, self.template) as url,
            stage.centrifugo(self.binary) as centrifugo,
            Witness(centrifugo.ws_url, channels, sys.maxsize, seconds=300) as witness,
            OurRelay(url, centrifugo),
        ):
            wait_for_workers(url, Settings.workers)
            with (
                self._hot_is_written(url),
                in_background(lambda enough: counts.update(write(url, targets, RATE, enough))),
            ):
                time.sleep(self.seconds)
            left = _hot_left(url)
            wait_until_delivered(url, channels)
            witness.enough(sum(counts[target] for target in self.heard))
            seen = witness.wait()
        milliseconds = [lag * 1000 for lag in seen.lags]
        figures = {"p50": percentile(milliseconds, 0.5), "events": len(milliseconds), "hot events left": left}
        return Sample(percentile(milliseconds, 0.99), figures)

    def _hot_is_written(self, url: str) -> AbstractContextManager[None]:
        if self.hot is None:
            return nullcontext()
        outbox = Refilled(url, self.hot)
        return in_background(lambda enough: write_steadily(outbox, HOT_RATE, enough))


def _hot_left(url: str) -> int:
    """What is pending of the hot one: if it were nothing, it would have been hot for a part of the run only."""
    with psycopg.connect(url) as connection:
        [(left,)] = connection.execute(
            "SELECT count(*) FROM outbox WHERE state = 'pending' AND aggregate_id = 'hot-0'"
        ).fetchall()
    return int(left)


SCENARIO: Scenario = Cold()
