"""What a measurement is: rows that alternate, samples, medians, and a file per scenario.

A scenario yields groups of rows. The rows of a group alternate, so that what the machine does meanwhile befalls all of
them alike; only ratios within a group mean something. A wrong result is an error, never a number.
"""

from __future__ import annotations

import fnmatch
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol


class WrongRunError(Exception):
    """A run in which something was lost, invented or reordered: it has no result."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How much is measured: `repetitions` of every row, and `size` as a factor on event counts and durations.

    Rows whose keys match a pattern of `left_out` are not measured.
    """

    name: Literal["quick", "short", "full"]
    repetitions: int
    size: float
    left_out: tuple[str, ...] = ()

    def scaled(self, full: int, least: int = 1) -> int:
        """A count or a duration of the full form, in this mode's size."""
        return max(least, round(full * self.size))

    def has(self, key: str) -> bool:
        """Whether the row with this key is measured."""
        return not any(fnmatch.fnmatchcase(key, pattern) for pattern in self.left_out)


# It tells whether everything still runs: the start of each row takes longer than the row.
QUICK = Mode(
    "quick",
    repetitions=1,
    size=0.1,
    left_out=(
        "drain/*/hist/*",
        "drain/*/centrifugo-default",
        "drain/*/centrifugo-64",
        "drain/*/benthos-20",
        "round_trip/*20ms*",
        "latency/*-poll",
        "writers/[14]/*",
        "writers/*-*/*",
        "flat/drain/[!bh]*",
        "flat/drain/held/*",
        "flat/buffers/base/*",
        "flat/buffers/held/*",
        "flat/buffers/pending/*",
        "cold/lane-mates/*",
        "hot/loopback/us",
        "hot/5ms/us",
        "hot/*keep0",
        "conflation/memory/*",
        "conflation/*/us",
        "conflation/*/centrifugo-*",
        "idle/large/*",
        "idle/*-poll",
        "scale/5ms/us-4",
        "take_over/stop/*",
        "floor/*-*",
    ),
)
# The slower one of a rival's tunings, as the full form has them, takes longest. The floors that bear no ratio go, too.
SHORT = Mode(
    "short",
    repetitions=2,
    size=0.2,
    left_out=("drain/memory/*/centrifugo-64", "drain/redis/*/centrifugo-8", "floor/*-*"),
)
FULL = Mode("full", repetitions=5, size=1.0)


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition of one row: its value in the row's unit, and whatever else was seen on the way."""

    value: float
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """Something that is measured. `key` is `scenario/…/side`; `settings` are what that side was given."""

    key: str
    title: str
    unit: str
    measure: Callable[[], Sample]
    settings: Mapping[str, Any] = field(default_factory=dict)
    repetitions: int | None = None
    """If not the mode's own."""


class Scenario(Protocol):
    """A module's `SCENARIO`."""

    name: str
    title: str

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        """Yield rows that alternate. What was set up for a group may be taken down when the next is asked for."""


@dataclass(slots=True)
class Result:
    """A row as it is kept: every sample, not only the median."""

    key: str
    title: str
    unit: str
    settings: Mapping[str, Any]
    samples: list[float]
    figures: dict[str, list[float]]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def measure(scenario: Scenario, mode: Mode, pattern: str = "*", say: Callable[[str], None] = print) -> list[Result]:
    """Run a scenario's rows whose keys match `pattern`, alternating within each group."""
    results: list[Result] = []
    with ExitStack() as stack:
        for group in scenario.groups(mode, stack):
            rows = [row for row in group if mode.has(row.key) and fnmatch.fnmatchcase(row.key, pattern)]
            by_key = {row.key: Result(row.key, row.title, row.unit, row.settings, [], {}) for row in rows}
            for number in range(max((row.repetitions or mode.repetitions for row in rows), default=0)):
                for row in rows:
                    if number >= (row.repetitions or mode.repetitions):
                        continue
                    started = time.monotonic()
                    sample = row.measure()
                    result = by_key[row.key]
                    result.samples.append(sample.value)
                    for name, value in sample.figures.items():
                        result.figures.setdefault(name, []).append(value)
                    say(f"{row.key:60} {sample.value:14,.2f} {row.unit}   ({time.monotonic() - started:.1f} s)")
            results += by_key.values()
    return results


def save(path: Path, scenario: Scenario, mode: Mode, results: Iterable[Result], facts: Mapping[str, Any]) -> None:
    """Write a scenario's file, whole or not at all."""
    content = {
        "scenario": scenario.name,
        "title": scenario.title,
        "mode": mode.name,
        "repetitions": mode.repetitions,
        **facts,
        "rows": [asdict(result) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    draft.replace(path)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cores": os.cpu_count(),
        "cpu": model,
        "memory_gib": round(memory / 2**20, 1),
        "kernel": platform.release(),
        "python": sys.version.split()[0],
    }


def commit() -> str:
    """The commit that is measured, with a mark where the code differs from it."""
    root = Path(__file__).parent.parent
    code = ("outbox_relay", "alembic", "bench", "pyproject.toml", "requirements")

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", root, *arguments), capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", *code)
    return git("log", "-1", "--format=%h", "--", *code) + ("+changes" if changed else "")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
