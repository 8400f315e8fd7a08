"""docs/live-pages-evidence.md, from the rounds that `make board-faults` recorded: `python -m tests.board.report`."""

from __future__ import annotations

import gzip
import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from outbox_relay.embedded.centrifugo import find_or_build
from outbox_relay.embedded.postgres import find_binaries
from tests.board.faults import FAULTS
from tests.board.rounds import Round
from tests.chaos.report import percentile
from tests.support.node import CLIENT, run_node
from tests.support.programs import debian_program

ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final = ROOT / "docs" / "live-pages-evidence.md"
RAW: Final = ROOT / "docs" / "live-pages-evidence.json"
MOST_SECONDS: Final = 2.0
LEAST_ROUNDS: Final = 20

Run = dict[str, Any]

_INTRODUCTION: Final = """\
# What live pages do under faults

Written by `make board-faults`. It serves the board ([examples/board/](../examples/board/): PostgreSQL, Centrifugo with
the memory engine, two relays, an ordinary FastAPI application), opens it in Chromium, does one harm after the other to
it, and looks at the page. The application changes one of six cards every 0.7 s meanwhile. The page stays open through
all rounds of a fault.

In the page, a `MutationObserver` logs what the list of cards shows after every change of its DOM, and when; nothing is
drawn in between. A round fails if the fault did no harm (nothing was held, a process survived, the browser ran on), or
if the page is not right in the end.

*Socket back*: from the healing until the page's WebSocket was open again. The client waits up to 0.5 s between two
tries here. *Page right*: from then, or from the healing where the socket stayed, until the page showed what the
database had, every version and every text, and did not say any more that it may be old. Its last change is written
after the healing. A relay and Centrifugo count as healed when they say that they have started; a poisoned event, when
it is dead.

*Backwards* counts how often a card was shown with an older version than one shown before, within an epoch. The page
beside it, *without versions*, loads once and shows events as they come, on a connection of its own with Centrifugo's
recovery. It is loaded anew before every round. *Wrong* are rounds at whose end it showed something else than the
database, 2 s after the live page was right; *cards* is how many of them in all.
"""


def facts() -> Run:
    """What is tried, and where: to be asked before anything is."""
    return {"commit": _commit(), "versions": _versions(), "cores": os.cpu_count(), "bundle_bytes": _bundle_bytes()}


def save(facts: Run, rounds: Mapping[str, Sequence[Round]], path: Path = RAW) -> None:
    """Write a run down, a line for each round."""
    head = json.dumps({**facts, "rounds": {name: [] for name in rounds}}, indent=1)
    for name, some in rounds.items():
        lines = ",\n".join(f"   {json.dumps(each._asdict())}" for each in some)
        head = head.replace(f'"{name}": []', f'"{name}": [\n{lines}\n  ]')
    path.write_text(head + "\n")


def load(path: Path = RAW) -> Run:
    run: Run = json.loads(path.read_text())
    return run


def document(run: Run) -> str:
    return "\n".join(_document(run))


def _document(run: Run) -> Iterator[str]:
    rounds = {name: [Round(**each) for each in run["rounds"][name]] for name in FAULTS if name in run["rounds"]}
    every = [each for some in rounds.values() for each in some]
    yield _INTRODUCTION
    yield "## What must hold\n"
    yield from _table(["figure", "at least", "measured", "verdict"], _figures(rounds, every, run))
    yield "## By fault\n"
    heads = ["fault", "rounds", "socket back p50", "p99", "page right p50", "p99", "changes", "backwards"]
    yield from _table([*heads, "without versions: backwards", "wrong", "cards"], map(_row, rounds, rounds.values()))
    yield "With 20 rounds the p99 is the slowest one.\n"
    yield from (f"- *{name}*: {FAULTS[name].label}." for name in rounds)
    yield ""
    yield "## The run\n"
    versions = "; ".join(f"{name} {version}" for name, version in run["versions"].items())
    yield f"`make board-faults ROUNDS={max(map(len, rounds.values()))}`, commit {run['commit']}, {run['cores']} cores."
    yield f"{versions}. Every round: [live-pages-evidence.json](live-pages-evidence.json).\n"


def _figures(rounds: Mapping[str, Sequence[Round]], every: Sequence[Round], run: Run) -> Iterator[list[str]]:
    fewest = min((len(rounds.get(name, ())) for name in FAULTS), default=0)
    yield ["rounds of each fault", f"≥ {LEAST_ROUNDS}", str(fewest), _verdict(fewest >= LEAST_ROUNDS)]
    worst = max(percentile((each.seconds for each in some), 99) for some in rounds.values())
    within = f"{worst:.2f} s (the worst fault's)"
    yield ["page right after the healing, p99", f"≤ {MOST_SECONDS:g} s", within, _verdict(worst <= MOST_SECONDS)]
    backwards = sum(each.backwards for each in every)
    changes = sum(each.changes for each in every)
    yield ["backwards", "0", f"{backwards} in {changes:,} changes", _verdict(not backwards)]
    naive, wrong = sum(each.naive_backwards for each in every), sum(bool(each.naive_wrong) for each in every)
    told = f"{naive} times backwards, wrong after {wrong} of {len(every)} rounds"
    yield ["the page without versions", "wrong", told, _verdict(naive > 0 and wrong > 0)]
    size = run["bundle_bytes"]
    yield ["JavaScript helper, minified and compressed", "≤ 4,096 bytes", f"{size:,} bytes", _verdict(size <= 4096)]


def _row(name: str, rounds: Sequence[Round]) -> list[str]:
    sockets, seconds = [each.socket for each in rounds], [each.seconds for each in rounds]
    return [
        name,
        str(len(rounds)),
        *(f"{value:.2f} s" for value in (statistics.median(sockets), percentile(sockets, 99))),
        *(f"{value:.2f} s" for value in (statistics.median(seconds), percentile(seconds, 99))),
        f"{sum(each.changes for each in rounds):,}",
        str(sum(each.backwards for each in rounds)),
        str(sum(each.naive_backwards for each in rounds)),
        str(sum(bool(each.naive_wrong) for each in rounds)),
        str(sum(each.naive_wrong for each in rounds)),
    ]


def _verdict(holds: bool) -> str:
    return "holds" if holds else "**MISSED**"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _commit() -> str:
    """The commit that was tried, with a mark where what matters differs from it."""
    code = ("outbox_relay", "alembic", "examples", "clients", "tests/board")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", *code)
    return _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def _versions() -> dict[str, str]:
    return {
        "Chromium": _output(debian_program("chromium", "chromium"), "--version").removeprefix("Chromium "),
        "PostgreSQL": _output(find_binaries() / "postgres", "--version"),
        "Centrifugo": _output(find_or_build(), "version").splitlines()[0],
        "Python": platform.python_version(),
        "kernel": platform.release(),
    }


def _bundle_bytes() -> int:
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "client.js"
        run_node("build.js", str(CLIENT / "index.js"), bundle)
        return len(gzip.compress(bundle.read_bytes(), 9))


def _output(program: str | Path, *arguments: str) -> str:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    DOCUMENT.write_text(document(load()))
