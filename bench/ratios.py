"""What the relay must reach: ratios within one run, the bounds they are held to, and the verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from bench.harness import Result

Better = Literal["higher", "lower"]
Verdict = Literal["holds", "misses the aim", "MISSED", "not measured"]


@dataclass(frozen=True, slots=True)
class Of:
    """A row's own values, or one of its figures. Of several rows: the one with the best median."""

    keys: tuple[str, ...]
    figure: str | None = None

    def samples(self, result: Result) -> list[float]:
        return result.samples if self.figure is None else result.figures.get(self.figure, [])

    def pick(self, results: Mapping[str, Result], better: Better) -> Result | None:
        measured = [results[key] for key in self.keys if key in results and self.samples(results[key])]
        best = max if better == "higher" else min
        return best(measured, key=lambda result: statistics.median(self.samples(result)), default=None)


@dataclass(frozen=True, slots=True)
class Ratio:
    """`of` ÷ `to`, or `of` alone in `unit`. `at_least` is owed, `aim` is aimed at; both bounds are within."""

    id: str
    title: str
    of: Of
    to: Of | None
    at_least: float
    aim: float
    better: Better
    unit: str = ""

    def verdict(self, value: float) -> Verdict:
        if self._within(value, self.aim):
            return "holds"
        return "misses the aim" if self._within(value, self.at_least) else "MISSED"

    def _within(self, value: float, bound: float) -> bool:
        return value >= bound if self.better == "higher" else value <= bound


@dataclass(frozen=True, slots=True)
class Score:
    """A ratio as measured. Repetitions alternate, so the n-th of one row and of the other belong together."""

    ratio: Ratio
    verdict: Verdict
    value: float = 0.0
    """Of medians."""
    low: float = 0.0
    high: float = 0.0
    """Of the repetitions' own ratios."""
    keys: tuple[str, ...] = ()


def judged(ratio: Ratio, results: Mapping[str, Result]) -> Score:
    """A ratio by what was measured; results by key."""
    of = ratio.of.pick(results, ratio.better)
    if of is None:
        return Score(ratio, "not measured")
    over = ratio.of.samples(of)
    if ratio.to is None:
        value = statistics.median(over)
        return Score(ratio, ratio.verdict(value), value, min(over), max(over), (of.key,))
    to = ratio.to.pick(results, ratio.better)
    if to is None:
        return Score(ratio, "not measured")
    under = ratio.to.samples(to)
    value = statistics.median(over) / statistics.median(under)
    # A row with more repetitions than its partner has some without company.
    each = [a / b for a, b in zip(over, under, strict=False)]
    return Score(ratio, ratio.verdict(value), value, min(each), max(each), (of.key, to.key))


_ENGINES: Final = {"memory": "memory", "redis": "Redis"}
_DRAINS: Final = (
    # engine, side, rival, at least, aim
    ("redis", "us", "best", 2.0, 3.5),
    ("memory", "us", "best", 0.6, 1.0),
    ("memory", "us-keep0", "best", 0.8, 1.2),
    ("memory", "us", "centrifugo-default", 1.5, 2.5),
    ("memory", "us", "benthos-1", 9, 18),
    ("memory", "us", "benthos-20", 6, 12),
)
_SIDES: Final = {
    "us": "rows kept",
    "us-keep0": "`keep = 0`",
    "best": "Centrifugo's best tuning",
    "centrifugo-default": "Centrifugo's defaults",
    "benthos-1": "Benthos in order",
    "benthos-20": "Benthos without order (20 in flight)",
}


def _drains() -> Iterator[Ratio]:
    for history, title in (("plain", "no history"), ("hist", "history")):
        for engine, side, rival, at_least, aim in _DRAINS:
            rivals = ("centrifugo-8", "centrifugo-64") if rival == "best" else (rival,)
            yield Ratio(
                f"drain-{engine}-{history}-{side}-{rival}",
                f"drain, {_ENGINES[engine]} engine, {title}, {_SIDES[side]} ÷ {_SIDES[rival]}",
                Of((f"drain/{engine}/{history}/{side}",)),
                Of(tuple(f"drain/{engine}/{history}/{name}" for name in rivals)),
                at_least,
                aim,
                "higher",
            )


def _round_trips() -> Iterator[Ratio]:
    for engine, title in _ENGINES.items():
        yield Ratio(
            f"round-trip-{engine}",
            f"strict order at 5 ms round trip, one relay, {title} engine",
            Of((f"round_trip/5ms/{engine}/us",)),
            None,
            20_000,
            40_000,
            "higher",
            " events/s",
        )


def _latencies() -> Iterator[Ratio]:
    for name, figure in (("p50", None), ("p99", "p99")):
        yield Ratio(
            f"latency-{name}-wake-up",
            f"latency {name} at 500/s, with wake-up ÷ Centrifugo with NOTIFY",
            Of(("latency/500/us-wake",), figure),
            Of(("latency/500/centrifugo-notify",), figure),
            2.0,
            1.0,
            "lower",
        )
    yield Ratio(
        "latency-p50-polling",
        "latency p50 at 500/s, polling ÷ Centrifugo polling",
        Of(("latency/500/us-poll",)),
        Of(("latency/500/centrifugo-poll",)),
        0.15,
        0.05,
        "lower",
    )


_WRITERS: Final = (
    # group, side, rival, title, at least, aim
    ("8", "us", "centrifugo", "with our event ÷ with Centrifugo's outbox row", 0.90, 1.05),
    ("8", "us", "centrifugo-notify", "with our event, no relay asleep ÷ with Centrifugo's row and NOTIFY", 1.3, 1.7),
    ("8-read", "us-wake", "centrifugo-notify", "with our event ÷ with NOTIFY, each side's reader at work", 1.3, 1.7),
    ("8", "us", "centrifugo-stream", "with our event ÷ with `cf_stream_publish`", 4, 5),
    (
        "8-read",
        "us-wake",
        "centrifugo-stream",
        "with our event ÷ with `cf_stream_publish`, each side's reader at work",
        4,
        5,
    ),
)
"""Our trigger for the wake-up is in every row. The worst case, a NOTIFY from every writer, is measured and not scored:
it takes a relay that sleeps through it all, and the first NOTIFY ends the sleep."""


def _writers() -> Iterator[Ratio]:
    for group, side, rival, title, at_least, aim in _WRITERS:
        yield Ratio(
            f"writers-{group}-{side}-{rival}",
            f"writers, 8 clients: {title}",
            Of((f"writers/{group}/{side}",)),
            Of((f"writers/{group}/{rival}",)),
            at_least,
            aim,
            "higher",
        )


FLAT_CASES: Final = {
    "pending": "10 M pending",
    "kept": "10 M delivered and kept",
    "hot": "one aggregate with 90 % of 1 M",
    "held": "10,000 aggregates on hold",
    "snapshot": "a snapshot held open 2 minutes",
    "snapshot-new": "a snapshot held open 2 minutes, new relay",
}


def _flat() -> Iterator[Ratio]:
    """What an event costs ÷ what it costs in the base: seconds, hence the base's rate ÷ the case's, and buffers."""
    for case, title in FLAT_CASES.items():
        rate, base_rate = Of((f"flat/drain/{case}/us",)), Of(("flat/drain/base/us",))
        yield Ratio(f"flat-drain-{case}", f"time per event, {title} ÷ base", base_rate, rate, 1.5, 1.2, "lower")
        buffers, base_buffers = Of((f"flat/buffers/{case}/us",)), Of(("flat/buffers/base/us",))
        yield Ratio(
            f"flat-buffers-{case}",
            f"buffers per claimed event, {title} ÷ base",
            buffers,
            base_buffers,
            1.5,
            1.2,
            "lower",
        )


def _idle() -> Iterator[Ratio]:
    for key, title in (("empty", "nothing pending"), ("outage", "10 M pending behind an outage")):
        row = (f"idle/{key}/us",)
        yield Ratio(f"idle-cpu-{key}", f"CPU of an idle relay, {title}", Of(row), None, 1.0, 0.3, "lower", " %")
    for id_, title, of in (
        ("outage", "10 M pending behind an outage", Of(("idle/outage/us",), "RSS, MB")),
        ("backlog", "most while 10 M are drained", Of(("flat/drain/pending/us",), "peak RSS, MB")),
        ("payload", "most while payloads of 1 MiB are drained", Of(("idle/large/us",))),
    ):
        yield Ratio(f"rss-{id_}", f"resident memory, {title}", of, None, 100, 70, "lower", " MB")


RATIOS: Final = (
    *_drains(),
    *_round_trips(),
    *_latencies(),
    *_writers(),
    *_flat(),
    Ratio(
        "cold",
        "cold aggregates' p99, beside a hot one ÷ without",
        Of(("cold/beside/us",)),
        Of(("cold/without/us",)),
        1.5,
        1.2,
        "lower",
    ),
    Ratio(
        "hot-bundles",
        "one hot aggregate, in bundles, both delete their rows ÷ Centrifugo's consumer",
        Of(("hot/loopback/us-bundles-keep0",)),
        Of(("hot/loopback/centrifugo-8",)),
        1.0,
        2.0,
        "higher",
    ),
    Ratio(
        "hot-bundles-5ms",
        "one hot aggregate, in bundles, at 5 ms round trip",
        Of(("hot/5ms/us-bundles",)),
        None,
        10_000,
        50_000,
        "higher",
        " events/s",
    ),
    Ratio(
        "conflation",
        "1 M snapshots of 1,000 objects behind an outage, Redis engine, both delete: until the last object is true ÷"
        " Centrifugo's best tuning",
        Of(("conflation/redis/us-keep0",)),
        Of(("conflation/redis/centrifugo-8", "conflation/redis/centrifugo-64")),
        0.25,
        0.05,
        "lower",
    ),
    *_idle(),
    Ratio(
        "python",
        "CPU of the relay's process per event, full batches",
        Of(("floor/us",), "relay_us"),
        None,
        5,
        3,
        "lower",
        " µs",
    ),
    Ratio("take-over", "take-over after `kill -9`, p99", Of(("take_over/kill/us",)), None, 1.0, 0.3, "lower", " s"),
    Ratio(
        "floor",
        "share of the floor: our drain ÷ bare statements and posts side by side",
        Of(("floor/us",)),
        Of(("floor/both",)),
        0.6,
        0.8,
        "higher",
    ),
)
"""In the order of the report. Titles are the full form's: a shorter one measures smaller outboxes."""
