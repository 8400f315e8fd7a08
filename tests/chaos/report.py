"""docs/faults.md, from the files that recorded runs saved in docs/faults/: `python -m tests.chaos.report`."""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psycopg

from outbox_relay.embedded.centrifugo import find_or_build
from outbox_relay.embedded.postgres import find_binaries
from tests.chaos.runner import HEALED_IN, STAGES, Result
from tests.support import redis

ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final = ROOT / "docs" / "faults.md"
RUNS: Final = ROOT / "docs" / "faults"

PROMISED: Final = {fault.kind: fault.within for stage in STAGES for fault in stage.faults if fault.within}
KILLED: Final = sorted(kind for kind in PROMISED if kind.startswith("relay killed"))
FROZEN: Final = sorted(kind for kind in PROMISED if kind.startswith("relay frozen"))
CENTRIFUGO_RESTARTED: Final = sorted(kind for kind in PROMISED if kind.startswith("Centrifugo"))
POSTGRES_RESTARTED: Final = sorted(kind for kind in PROMISED if kind.startswith("PostgreSQL"))
HOLDS: Final = "holds"
# How the judge's sentences begin.
LOST: Final = ("loss", "stale")
REORDERED: Final = ("order",)

Run = dict[str, Any]
Price = tuple[int, int, float | None]
"""Of a fault: events repeated, events in flight, seconds of recovery."""

_INTRODUCTION: Final = f"""\
# What happens to the promise under faults

Written by `make chaos RECORD=1` from the runs in [docs/faults/](faults/). [tests/chaos/](../tests/chaos/) starts
PostgreSQL, Centrifugo, Redis and three relay processes of different settings, lets seven to ten writers change things,
and does harm at moments that the seed decides, some at named points of the relay's path. Then everything is healed, and
must have ended within {HEALED_IN:.0f} seconds.

Things change evenly, by Zipf's law, one of them all the time; many share a channel, some are in several; transactions
roll back, use savepoints, are SERIALIZABLE, commit late; things are deleted and made again, expire, have payloads up to
a mebibyte, or are refused for ever by Centrifugo or by a middle box; and, in two of the four stages, some types are
conflated, and some channels take bundles, are maps, or exclusive.

Three witnesses share no code with the relay: the writers' commit log, synced to disk before and after each COMMIT; a
proxy before Centrifugo that writes down every request and answer; and a subscriber on a bare WebSocket that writes
down every publication (what map channels told their subscribers is read from Centrifugo at the end). A pure function
([tests/support/oracle.py](../tests/support/oracle.py)) judges them. A COMMIT without an answer is looked up. If the
subscriber loses its own stream, the run is void, where Centrifugo's Redis survives; where it does not, or where the
engine is memory, the proxy says what was published, and the subscriber is judged between its holes.

What is judged: every committed event was received on each of its channels, or its row says that it ended otherwise
(only events that were written as poison may be dead, and superseded are those alone in whose place something newer had
been accepted); nothing else was received; first deliveries of an aggregate on a channel are a gapless prefix, and no
event is sent before its relay knows that its predecessor has ended; where Centrifugo keeps versions they only rise;
whoever keeps the newest version ends with what the application's table says; what is sent again was in flight when a
fault struck; and at the end no event, hold, session, transaction or lock is left.

[tests/test_oracle.py](../tests/test_oracle.py) damages histories and demands that it is seen.
[tests/test_chaos.py](../tests/test_chaos.py) runs three naive relays in this harness (SKIP LOCKED on event rows;
id > cursor; a start hint without the safety rule), and each must fail.
"""

_TERMS: Final = """\
*Repeated* are events that Centrifugo accepted once more after the fault, on average and at most; idempotency keys
spare subscribers most of them. *In flight* are the events of requests that the fault met, on average: of transactions
that began before it was healed and were not committed when it struck. (So some are sent after the healing, by a relay
that does not know yet that its session is gone. When a transaction began each request says, in a header that the
harness adds inside the relay's process; nothing else can tell.) So many may be repeated, and in each single case no
more were.

Recovery is the time until every event was settled that waited when the fault struck, but for those of things that are
refused or change all the time. It counts from the healing; where other relays take over, from the strike (marked *).
Where a figure above promises one, the fault strikes alone in every second round: once the relays have caught up, for
which writers go easy on them (20 s at most), and with nothing else at work until the promised time is over. Each of
these *n* cases counts, in every recorded run, however long it took. For the other kinds recovery is known only where no
other fault struck meanwhile, that is, mostly where it was short.
"""


def save(results: Sequence[Result], seed: str, minutes: float, rate: float, folder: Path) -> Path:
    """Write a run down as a file of `folder`."""
    run: Run = {
        "seed": seed,
        "minutes": minutes,
        "rate": rate,
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"),
        "versions": _versions(),
        "stages": [_stage(result) for result in results],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"seed-{seed}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    return path


def write(runs: Sequence[Run], path: Path = DOCUMENT) -> None:
    path.write_text("\n".join(_document(runs)))


def missed(runs: Sequence[Run]) -> list[str]:
    """The figures that recorded runs owe together and do not have."""
    return [
        f"{name}: {measured}, owed {least}" for name, least, measured, verdict in _figures(runs) if verdict != HOLDS
    ]


def too_slow(results: Sequence[Result]) -> list[str]:
    """What took longer than is promised in this run."""
    return [
        f"recovery: {each.kind} took {each.recovery:.2f} s, promised are {PROMISED[each.kind]:g} s"
        for result in results
        for each in result.injections
        if each.recovery is not None and each.recovery > PROMISED.get(each.kind, math.inf)
    ]


def summary(runs: Sequence[Run]) -> str:
    """Two lines for the README."""
    stages, faults = _stages(runs), _faults(runs)
    kinds = f"{sum(map(len, faults.values())):,} faults of {len(faults)} kinds"
    how = " and ".join(f"`{_command(run)}`" for run in runs)
    if missed(runs):
        return "The figures that are owed are not all there: see the table.\n"
    return (
        f"Under {kinds}, {sum(stage['events'] for stage in stages):,} events: none lost, invented or reordered, "
        "repeated at most what was in flight;\n"
        f"all delivered again within {_rounded_up(_p99(faults, *KILLED))} s of a relay's death, "
        f"{_rounded_up(_p99(faults, *CENTRIFUGO_RESTARTED))} s of Centrifugo's restart, "
        f"{_rounded_up(_p99(faults, *POSTGRES_RESTARTED))} s of PostgreSQL's (p99; {how}).\n"
    )


def _rounded_up(seconds: float) -> float:
    return math.ceil(seconds * 10) / 10


def _command(run: Run) -> str:
    """What repeats a run."""
    return f"make chaos MINUTES={run['minutes']:g} SEED={run['seed']} ARGS='--rate {run['rate']:g}'"


def _stage(result: Result) -> dict[str, Any]:
    return {
        "name": result.stage.name,
        "seconds": round(result.seconds, 1),
        "events": result.events,
        "transactions": result.transactions,
        "unknown": result.unknown,
        "received": result.heard,
        "requests": result.requests,
        "late": result.verdict.late,
        "holes": result.holes,
        "ended_after": round(result.left.seconds, 1),
        "memory_mib": max(result.left.memory.values(), default=0),
        "left_out": result.left_out,
        "violations": result.violations[:100],
        "faults": [
            [each.kind, each.duplicates, each.in_flight, None if each.recovery is None else round(each.recovery, 3)]
            for each in result.injections
        ],
    }


def _versions() -> dict[str, str]:
    return {
        "PostgreSQL": _output(find_binaries() / "postgres", "--version"),
        "Centrifugo": _output(find_or_build(), "version").splitlines()[0],
        "Redis": _output(redis.program(), "--version"),
        "psycopg": psycopg.__version__,
        "Python": platform.python_version(),
        "kernel": platform.release(),
    }


def _output(program: str | Path, *arguments: str) -> str:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def _document(runs: Sequence[Run]) -> Iterator[str]:
    stages, faults = _stages(runs), _faults(runs)
    violations = [text for stage in stages for text in stage["violations"]]
    yield _INTRODUCTION
    yield "## What must hold\n"
    yield from _table(["figure", "at least", "measured", "verdict"], _figures(runs))
    yield summary(runs)
    if violations:
        yield f"**The promise was broken {len(violations)} times:**\n"
        yield from (f"- `{text}`" for text in violations[:50])
        yield ""
    yield "## By kind of fault\n"
    yield _TERMS
    from_strike = {fault.kind for stage in STAGES for fault in stage.faults if fault.from_strike}
    heads = [
        "fault",
        "struck",
        "lost",
        "reordered",
        "repeated",
        "at most",
        "in flight",
        "recovery p50",
        "p99",
        "n",
        "may break in less than",
    ]
    spoiled = [any(text.startswith(starts) for text in violations) for starts in (LOST, REORDERED)]
    # A violation is nobody's in particular.
    harm = ["?" if each else "0" for each in spoiled]
    yield from _table(heads, (_kind(kind, faults[kind], harm, kind in from_strike) for kind in sorted(faults)))
    yield _proof(stages, faults, violations)
    yield "## The runs\n"
    heads = [
        "seed",
        "events/s",
        "stage",
        "seconds",
        "events",
        "received",
        "requests",
        "unknown commits",
        "late",
        "ended after",
    ]
    yield from _table(
        heads,
        (
            [
                run["seed"],
                f"{run['rate']:,.0f}",
                stage["name"],
                *(_number(stage[name]) for name in _COLUMNS),
                f"{stage['ended_after']} s",
            ]
            for run in runs
            for stage in run["stages"]
        ),
    )
    left_out = sorted({kind for stage in stages for kind in stage["left_out"]})
    yield f"Faults that the machine could not do: {', '.join(left_out) or 'none'}.\n"
    yield "*Late* are events that surfaced after their successors because a request that carried them was not answered."
    yield "*Unknown commits* are transactions of which the writer heard nothing.\n"
    versions = {f"{name} {version}" for run in runs for name, version in run["versions"].items()}
    commits = sorted({run["commit"] for run in runs})
    yield f"Commit {', '.join(commits)}. {'; '.join(sorted(versions))}.\n"


_COLUMNS: Final = ("seconds", "events", "received", "requests", "unknown", "late")


def _stages(runs: Sequence[Run]) -> list[Run]:
    return [stage for run in runs for stage in run["stages"]]


def _faults(runs: Sequence[Run]) -> dict[str, list[Price]]:
    """What each kind of fault cost, each time."""
    faults: dict[str, list[Price]] = defaultdict(list)
    for stage in _stages(runs):
        for kind, *price in stage["faults"]:
            faults[kind].append(tuple(price))
    return faults


def _recoveries(faults: Mapping[str, Sequence[Price]], *kinds: str) -> list[float]:
    return [seconds for kind in kinds for _, _, seconds in faults.get(kind, []) if seconds is not None]


def _p99(faults: Mapping[str, Sequence[Price]], *kinds: str) -> float:
    return percentile(_recoveries(faults, *kinds), 99)


def _figures(runs: Sequence[Run]) -> Iterator[list[str]]:
    stages, faults = _stages(runs), _faults(runs)
    violations = [text for stage in stages for text in stage["violations"]]

    def counted(name: str, least: int, value: int) -> list[str]:
        return [name, f"≥ {least:,}", f"{value:,}", _verdict(value >= least)]

    def none(name: str, *starts: str) -> list[str]:
        value = sum(text.startswith(starts) for text in violations)
        return [name, "0", str(value), _verdict(not value)]

    def within(name: str, kinds: Sequence[str]) -> list[str]:
        most, measured = PROMISED[kinds[0]], _recoveries(faults, *kinds)
        if not measured:
            return [name, f"≤ {most:g} s", "not measured", _verdict(False)]
        value = percentile(measured, 99)
        return [name, f"≤ {most:g} s", f"{value:.2f} s (n = {len(measured)})", _verdict(value <= most)]

    yield counted("events under faults", 10**6, sum(stage["events"] for stage in stages))
    yield counted("faults", 300, sum(map(len, faults.values())))
    yield counted("kinds of faults", 20, len(faults))
    yield none("lost", *LOST)
    yield none("phantom", "phantom", "resurrected")
    yield none("reordered first deliveries", *REORDERED)
    yield none("repeated without a fault, or more than was in flight", "duplicates")
    yield none("dead without being poison", "blamed")
    yield none("left after the healing", "left", "unfinished", "relay", "a worker")
    yield within("recovery p99: relay killed", KILLED)
    yield within("recovery p99: Centrifugo restarted", CENTRIFUGO_RESTARTED)
    yield within("recovery p99: PostgreSQL restarted", POSTGRES_RESTARTED)
    yield within("frozen relay: its aggregates move again, p99", FROZEN)


def _kind(kind: str, prices: Sequence[Price], harm: Sequence[str], from_strike: bool) -> list[str]:
    repeated, in_flight = [price[0] for price in prices], [price[1] for price in prices]
    measured = [price[2] for price in prices if price[2] is not None]
    star = "*" if from_strike else ""
    return [
        f"{kind}{star}",
        str(len(prices)),
        *harm,
        f"{statistics.mean(repeated):.0f}",
        str(max(repeated)),
        f"{statistics.mean(in_flight):.0f}",
        f"{percentile(measured, 50):.2f} s" if measured else "-",
        f"{percentile(measured, 99):.2f} s" if measured else "-",
        str(len(measured)),
        f"{min(1.0, 3 / len(prices)):.0%}",
    ]


def _proof(stages: Sequence[Run], faults: Mapping[str, Sequence[Price]], violations: Sequence[str]) -> str:
    events, count = sum(stage["events"] for stage in stages), sum(map(len, faults.values()))
    if violations:
        return "The promise was broken, so this proves that it does not hold.\n"
    return (
        f"No event of {events:,} was lost, invented or reordered under {count:,} faults. What that proves: with 95 % "
        "confidence something that goes wrong with probability p did not go unseen in n independent tries if p > 3/n. "
        f"So a fault of any kind, as these are mixed, breaks the promise with a probability below 3/{count:,} = "
        f"{3 / count:.2%}; one of a certain kind, below the last column of the table. It does not prove that there is "
        "no such fault, says nothing of faults that are not in the list, of several machines, of failovers to a "
        "standby, or of a disk that lies, and the events of one run are not independent of each other.\n"
    )


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that so many per cent of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def _verdict(holds: bool) -> str:
    return HOLDS if holds else "**MISSED**"


def _number(value: float) -> str:
    return f"{value:,}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def recorded() -> list[Run]:
    return [json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json"))]


def main() -> None:
    write(recorded())


if __name__ == "__main__":
    main()
