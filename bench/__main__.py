"""Runs the benchmark: `python -m bench`. A file per scenario, and the report once all are there.

A run that was stopped goes on where it was: what has been measured at the same commit in the same mode is kept.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg

from bench import benthos, harness, report
from bench.harness import FULL, QUICK, SHORT, Mode, Scenario, WrongRunError
from outbox_relay.embedded import centrifugo
from outbox_relay.embedded.postgres import find_binaries
from tests.support import redis

MODES: Final = {mode.name: mode for mode in (QUICK, SHORT, FULL)}
FOLDER: Final = Path("build/bench")

say = partial(print, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save and report. Returns the exit status: 1 if a scenario went wrong."""
    chosen = _parser().parse_args(arguments)
    mode = MODES[chosen.mode]
    if chosen.only:
        for name in report.ORDER:
            if fnmatch.fnmatchcase(name, chosen.only.partition("/")[0]):
                harness.measure(_scenario(name), mode, chosen.only, say)
        return 0
    wrong = [] if chosen.report else [name for name in report.ORDER if not _measured(name, mode, chosen.out)]
    if wrong:
        say(f"no report: {', '.join(wrong)} went wrong")
        return 1
    try:
        scores = report.write(chosen.out)
    except report.MixedFilesError as error:
        say(str(error))
        return 1
    for score in scores:
        say(f"{score.verdict:14} {score.value:10,.2f}   {score.ratio.title}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the relay beside its rivals.")
    parser.add_argument("--mode", choices=MODES, default=SHORT.name)
    parser.add_argument("--only", metavar="PATTERN", help="rows to measure, such as 'drain/*'; nothing is saved")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=FOLDER, help="where results are saved")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the report of what was saved")
    return parser


def _scenario(name: str) -> Scenario:
    """A scenario by its module's name. Loaded only now: each brings what it needs, and one may be all that is asked."""
    scenario: Scenario = importlib.import_module(f"bench.scenarios.{name}").SCENARIO
    return scenario


def _measured(name: str, mode: Mode, folder: Path) -> bool:
    """Measure and save a scenario, unless that was done. Returns whether its file is there."""
    path = folder / f"{name}.json"
    commit = harness.commit()
    if _is_saved(path, commit, mode):
        say(f"{name}: measured before, see {path}")
        return True
    path.unlink(missing_ok=True)
    say(f"{name}: measuring")
    started = time.monotonic()
    scenario = _scenario(name)
    try:
        results = harness.measure(scenario, mode, say=say)
    except WrongRunError as error:
        say(f"{name}: WRONG, {error}")
        return False
    facts = {
        "commit": commit,
        "machine": harness.machine(),
        "versions": _versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started),
        "command": f"python -m bench --mode {mode.name} --only 'KEY'",
    }
    harness.save(path, scenario, mode, results, facts)
    return True


def _is_saved(path: Path, commit: str, mode: Mode) -> bool:
    """Whether a file is of this commit and mode. Changes that are in no commit may be others by now."""
    if not path.exists() or commit.endswith("+changes"):
        return False
    saved = json.loads(path.read_text())
    return (saved["commit"], saved["mode"]) == (commit, mode.name)


def _versions() -> dict[str, Any]:
    """Of everything that is measured, as it says itself."""

    def ask(program: Path, *arguments: str) -> str:
        return subprocess.run((program, *arguments), capture_output=True, text=True, check=True).stdout.strip()

    return {
        "PostgreSQL": ask(find_binaries() / "postgres", "--version"),
        "Centrifugo": ask(centrifugo.find_or_build(), "version"),
        "Redis": ask(redis.program(), "--version"),
        "Benthos": benthos.version(benthos.find_or_build()),
        "psycopg": psycopg.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
