"""Writes docs/benchmarks.md, its charts and its raw data from the files that the scenarios saved.

`python -m bench.report FOLDER`. All files must be of one commit and one mode: ratios between runs mean nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.charts import Bar, Panel, number, svg
from bench.harness import Result
from bench.ratios import RATIOS, Score, judged
from bench.report_text import INTRODUCTION, NOTES, ON_PAPER, RATIOS_EXPLAINED
from bench.scenarios.scale import ceilings

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "benchmarks.md"
ORDER: Final = (
    "drain",
    "round_trip",
    "latency",
    "writers",
    "flat",
    "cold",
    "hot",
    "conflation",
    "idle",
    "scale",
    "take_over",
    "floor",
)
REASONS: Final = "reasons.md"
NO_REASON: Final = "no reason given yet"


class MixedFilesError(Exception):
    """Files that do not belong to one run, or none at all."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario's file."""

    name: str
    title: str
    results: list[Result]

    def groups(self) -> dict[str, list[Result]]:
        """Rows by what their keys have in common: all but the side, or less where that would be one row alone."""
        sizes = Counter(_parent(result.key) for result in self.results)
        groups: dict[str, list[Result]] = {}
        for result in self.results:
            name = _parent(result.key)
            groups.setdefault(name if sizes[name] > 1 else _parent(name), []).append(result)
        return groups


@dataclass(frozen=True, slots=True)
class Run:
    """All files of one run, in the order of the document."""

    commit: str
    mode: str
    repetitions: int
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    dates: tuple[str, str]
    """When the first scenario was measured, and when the last one."""
    scenarios: list[Scenario]

    @property
    def results(self) -> dict[str, Result]:
        return {result.key: result for scenario in self.scenarios for result in scenario.results}


def read(folder: Path) -> Run:
    """Read a folder of scenario files. Raises `MixedFilesError`."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not files:
        raise MixedFilesError(f"{folder} holds no results: run the benchmark first")
    for name in ("commit", "mode", "machine", "versions"):
        values = {json.dumps(file[name]) for file in files}
        if len(values) > 1:
            raise MixedFilesError(f"{folder} holds results of more than one {name}: {', '.join(sorted(values))}")
    files.sort(key=lambda file: ORDER.index(file["scenario"]))
    dates = [file["date"] for file in files]
    return Run(
        commit=files[0]["commit"],
        mode=files[0]["mode"],
        repetitions=files[0]["repetitions"],
        machine=files[0]["machine"],
        versions=files[0]["versions"],
        dates=(min(dates), max(dates)),
        scenarios=[
            Scenario(file["scenario"], file["title"], [Result(**row) for row in file["rows"]]) for file in files
        ],
    )


def write(folder: Path, document: Path = DOCUMENT) -> list[Score]:
    """Write the document, and beside it a folder of its name with charts and raw data. Returns the scores.

    Raises `MixedFilesError`.
    """
    run = read(folder)
    attachments = document.with_suffix("")
    (attachments / "raw").mkdir(parents=True, exist_ok=True)
    for path in (*attachments.glob("*.svg"), *attachments.glob("raw/*.json")):
        path.unlink()
    for path in sorted(folder.glob("*.json")):
        (attachments / "raw" / path.name).write_text(
            json.dumps(json.loads(path.read_text()), separators=(",", ":"), sort_keys=True) + "\n"
        )
    for scenario in run.scenarios:
        (attachments / f"{scenario.name}.svg").write_text(chart(scenario))
    scores = [judged(ratio, run.results) for ratio in RATIOS]
    reasons = read_reasons(attachments / REASONS)
    document.write_text("\n\n".join(paragraphs(run, scores, reasons, attachments.name)) + "\n")
    return scores


def read_reasons(path: Path) -> dict[str, str]:
    """The hand-written reasons: a heading `## ID` of a ratio, and a text below it. Raises ValueError."""
    if not path.exists():
        return {}
    _, *parts = re.split(r"^## (\S+)$", path.read_text(), flags=re.MULTILINE)
    reasons = {id_: text.strip() for id_, text in zip(parts[::2], parts[1::2], strict=True)}
    if unknown := reasons.keys() - {ratio.id for ratio in RATIOS}:
        raise ValueError(f"{path.name} gives reasons for what is no ratio: {', '.join(sorted(unknown))}")
    return reasons


def paragraphs(run: Run, scores: Sequence[Score], reasons: Mapping[str, str], attachments: str) -> Iterator[str]:
    """The document. `attachments` is the name of the folder beside it."""
    yield "# Benchmarks"
    yield from _alarms(run, scores)
    yield INTRODUCTION
    yield "## The run"
    yield _table(("what", "value"), _facts(run))
    yield "## What the relay must reach"
    yield RATIOS_EXPLAINED
    yield _table(("ratio", "at least", "aim", "measured", "spread", "verdict", "rows"), map(_score_cells, scores))
    yield "## What stands between"
    yield from _between(scores, reasons)
    for scenario in run.scenarios:
        yield f"## {scenario.title}"
        yield f"![{scenario.title}: the medians of the tables below]({attachments}/{scenario.name}.svg)"
        yield NOTES[scenario.name]
        for name, results in scenario.groups().items():
            yield f"### {name}"
            yield _group_table(name, results)
            yield _settings(name, results)
        if scenario.name == "scale":
            yield from _on_paper(run)
        yield (
            f"One row again: `{_command(run.mode, scenario.results[0].key)}`. Every repetition: "
            f"[{scenario.name}.json]({attachments}/raw/{scenario.name}.json)."
        )


def _alarms(run: Run, scores: Sequence[Score]) -> Iterator[str]:
    missed = [score.ratio.title for score in scores if score.verdict == "MISSED"]
    unmeasured = sum(score.verdict == "not measured" for score in scores)
    if missed:
        yield f"**MISSED, below what is owed at least: {'; '.join(missed)}.**"
    if unmeasured:
        yield f"**{unmeasured} of the {len(scores)} ratios below were not measured in this run.**"
    if run.commit.endswith("+changes"):
        yield "**Measured with changes that are in no commit.**"


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    yield "commit", run.commit
    yield "measured", " to ".join(dict.fromkeys(run.dates))
    yield "form", f"{run.mode}; repetitions unless a table says otherwise: {run.repetitions}"
    for facts in (run.machine, run.versions):
        yield from ((name.replace("_", " "), str(value)) for name, value in facts.items())


def _score_cells(score: Score) -> tuple[str, ...]:
    ratio = score.ratio
    sign = "≥" if ratio.better == "higher" else "≤"
    bounds = (f"{sign} {bound:,g}{ratio.unit}" for bound in (ratio.at_least, ratio.aim))
    if score.verdict == "not measured":
        return (ratio.title, *bounds, "", "", f"**{score.verdict}**", "")
    return (
        ratio.title,
        *bounds,
        f"{number(score.value)}{ratio.unit}",
        f"{number(score.low)} to {number(score.high)}",
        f"**{score.verdict}**" if score.verdict == "MISSED" else score.verdict,
        " ÷ ".join(f"`{key}`" for key in _shortened(score.keys)),
    )


def _between(scores: Sequence[Score], reasons: Mapping[str, str]) -> Iterator[str]:
    behind = [score for score in scores if score.verdict in {"misses the aim", "MISSED"}]
    if not behind:
        yield "Whatever was measured reaches its aim."
    for score in behind:
        ratio = score.ratio
        yield (
            f"**{ratio.title}**: {number(score.value)}{ratio.unit}; the aim is {ratio.aim:,g}{ratio.unit}. "
            + (reasons.get(ratio.id) or f"*{NO_REASON}* (`{ratio.id}`)")
        )


def _group_table(group: str, results: Sequence[Result]) -> str:
    """A line per row: its median and spread, and the medians of its figures."""
    figures = list(dict.fromkeys(name for result in results for name in result.figures))
    return _table(
        ("row", "unit", "median", "lowest to highest", "n", *(name.replace("_", " ") for name in figures)),
        (
            (
                f"{result.title} (`{_within(group, result)}`)",
                result.unit,
                number(result.median),
                f"{number(min(result.samples))} to {number(max(result.samples))}",
                str(len(result.samples)),
                *(
                    number(statistics.median(result.figures[name])) if name in result.figures else ""
                    for name in figures
                ),
            )
            for result in results
        ),
    )


def _settings(group: str, results: Sequence[Result]) -> str:
    lines = "\n".join(
        f"- `{_within(group, result)}`: {_words(result.settings)}" for result in results if result.settings
    )
    return f"<details><summary>Settings</summary>\n\n{lines}\n\n</details>"


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}: ({_words(value)})" if isinstance(value, Mapping) else f"{name} = {value}"
        for name, value in settings.items()
    )


def _on_paper(run: Run) -> Iterator[str]:
    """What hosts of their own would do, by the CPU time per event that was measured with everything on one."""
    floor = run.results.get("floor/us")
    if floor is None:
        return
    cpu_us = {name: statistics.median(samples) for name, samples in floor.figures.items()}
    yield "### On paper: PostgreSQL, relays and Centrifugo on hosts of their own"
    yield ON_PAPER
    cores = run.machine["cores"]
    tables = {relays: ceilings(cpu_us, cores, relays) for relays in (1, 2, 4, 8, 16) if relays <= cores}
    yield _table(
        ("relay processes", "saturates first", "then", "then"),
        (
            (str(relays), *(f"{part}, {number(rate)} events/s" for part, rate in found))
            for relays, found in tables.items()
        ),
    )


def _command(mode: str, key: str) -> str:
    """What measures one row alone, without saving it."""
    form = "" if mode == "short" else f"{mode.upper()}=1 "
    return f"make bench {form}ARGS=\"--only '{key}'\""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def chart(scenario: Scenario) -> str:
    """A scenario's medians: a panel for each group, or several where its units differ."""
    panels = [
        Panel(
            name.removeprefix(scenario.name).removeprefix("/"),
            unit,
            [
                Bar(result.title, result.median, min(result.samples), max(result.samples), _is_ours(result.key))
                for result in results
                if result.unit == unit
            ],
        )
        for name, results in scenario.groups().items()
        for unit in dict.fromkeys(result.unit for result in results)
    ]
    return svg(scenario.title, panels)


def _parent(key: str) -> str:
    return key.rpartition("/")[0]


def _shortened(keys: Sequence[str]) -> Iterator[str]:
    """The first key, and of the others only the side where they are of the same group."""
    first, *others = keys
    yield first
    yield from (key.removeprefix(f"{_parent(first)}/") for key in others)


def _within(group: str, result: Result) -> str:
    """A row's key without what the group's name says already."""
    return result.key.removeprefix(f"{group}/")


def _is_ours(key: str) -> bool:
    return key.rpartition("/")[2].startswith("us")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/benchmarks.md from the results of one run.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strict", action="store_true", help="exit with 1 unless every ratio is at least what is owed")
    chosen = parser.parse_args(arguments)
    try:
        scores = write(chosen.folder)
    except MixedFilesError as error:
        sys.exit(str(error))
    owed = any(score.verdict in {"MISSED", "not measured"} for score in scores)
    return int(chosen.strict and owed)


if __name__ == "__main__":
    sys.exit(main())
