"""docs/mutants.md: how many changes of the core no test noticed, each of them, and why that is so."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from tools.mutations import mutants

READ: Final = Path("docs") / "mutants" / "read.toml"
PAGE: Final = Path("docs") / "mutants.md"

Verdict = Literal["equivalent", "cost", "open"]

_INTRO: Final = """# Mutants

Does a test notice when the core is wrong? `make mutants` changes one small thing of a module at a time (a comparison,
a condition, a number, a word of SQL, a statement that is left out: `tools/mutations.py`) and runs that module's tests
(`tools/mutants.py`) until one of them fails. Whatever none of them noticed is below, each read by a person:
*equivalent*, where nobody could tell the difference; *cost*, where only time or the number of statements differs, which
no test times; *open*, where a test is owed. Annotations, log lines and messages for people are left alone.

Where not all were tried they are drawn by chance, with the seed beside them. A survivor for which a test was written
since was tried again (`--survivors`). This page is written by `make mutants ARGS=--record`, from runs of modules whose
first digits of their SHA-256 it gives.
"""


class Count(NamedTuple):
    module: str
    source: str
    seed: int
    of: int
    tried: int
    killed: int
    hung: int
    survivors: Sequence[Mapping[str, Any]]
    noticed: Sequence[str]
    """The differences that failed a test, or hung."""


def report(root: Path, kept: Iterable[Mapping[str, Any]], order: Sequence[str]) -> None:
    """Write the page from the results of runs. Raises ValueError where a reason is of none that survived.

    One that was not drawn this time keeps its reason.
    """
    read = {
        (entry["module"], _plain(entry["diff"])): entry for entry in tomllib.loads((root / READ).read_text())["read"]
    }
    counts = sorted(map(_count, kept), key=lambda count: order.index(count.module))
    lines = [_INTRO, *_table(counts, read)]
    for count in counts:
        if count.survivors:
            lines += [f"## {count.module}.py", ""]
        for survivor in count.survivors:
            key = (count.module, _plain(survivor["diff"]))
            lines += [f"Line {survivor['line']}, {_verdict(read, *key)}:", "", "```diff", survivor["diff"], "```", ""]
            if key in read:
                lines += [read[key]["why"].strip(), ""]
    if stale := read.keys() - _may_survive(root, counts, order):
        raise ValueError(f"{READ} speaks of what did not survive: {sorted(stale)}")
    (root / PAGE).write_text("\n".join(lines))


def _may_survive(root: Path, counts: Iterable[Count], modules: Iterable[str]) -> set[tuple[str, str]]:
    """The mutants that no test has noticed, or that were not tried, by module and difference."""
    found: set[tuple[str, str]] = set()
    for module in modules:
        source = (root / "outbox_relay" / f"{module}.py").read_text()
        found.update((module, _plain(mutant.diff(source))) for mutant in mutants(source))
    for count in counts:
        found -= {(count.module, _plain(diff)) for diff in count.noticed}
        # The same line may stand in two places.
        found |= {(count.module, _plain(survivor["diff"])) for survivor in count.survivors}
    return found


def _count(run: Mapping[str, Any]) -> Count:
    results = run["results"]
    survivors = [result for result in results if result["fate"] == "survived"]
    survivors.sort(key=lambda result: result["line"])
    fates = [result["fate"] for result in results]
    killed, hung = fates.count("killed"), fates.count("timeout")
    noticed = [result["diff"] for result in results if result["fate"] != "survived"]
    source = run["source"][:12]
    return Count(run["module"], source, run["seed"], run["of"], len(results), killed, hung, survivors, noticed)


def _table(counts: Sequence[Count], read: Mapping[tuple[str, str], Any]) -> list[str]:
    verdict_columns: tuple[Verdict, ...] = ("equivalent", "cost", "open")
    heads = ["module", "mutants", "tried", "failed a test", "hung", "survived", *verdict_columns, "seed", "SHA-256"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    totals = [0] * 8
    for count in counts:
        verdicts = [_verdict(read, count.module, _plain(survivor["diff"])) for survivor in count.survivors]
        numbers = [count.of, count.tried, count.killed, count.hung, len(verdicts)]
        numbers += [verdicts.count(verdict) for verdict in verdict_columns]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        seed = count.seed if count.tried < count.of else ""
        rows.append(f"| `{count.module}.py` | {' | '.join(map(str, numbers))} | {seed} | `{count.source}` |")
    rows.append(f"| all | {' | '.join(map(str, totals))} | | |")
    of_tried = f"{totals[4] / totals[1]:.1%} of those tried survived" if totals[1] else "None was tried"
    return [*rows, "", f"{of_tried}; {totals[7]} of them are open.", ""]


def _verdict(read: Mapping[tuple[str, str], Any], module: str, diff: str) -> Verdict:
    entry = read.get((module, diff))
    verdict: Verdict = entry["verdict"] if entry else "open"
    return verdict


def _plain(diff: str) -> str:
    """A diff without what formatting may change."""
    return "\n".join(" ".join(line.split()) for line in diff.strip().splitlines())
