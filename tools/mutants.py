"""Change the core in one small way after another, and see whether a test notices: `make mutants`.

Each mutant is a copy of the project with one change (`tools/mutations.py`), and the tests that know its module run
until the first one fails. What no test notices is read by a person: either a test is missing, or the reason why none
can be is written into `docs/mutants/read.toml`. Results are kept in `build/mutants/`, so that a run may come in pieces.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tools.mutants_report import report
from tools.mutations import Mutant, mutants

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "build" / "mutants"

# What each module's mutants must get past, the likeliest first: tests/test_NAME.py.
TESTS: Final[dict[str, str]] = {
    "event": "outcome policy wire gaps",
    "outcome": "outcome state_machine conflation gaps",
    "suspects": "outcome state_machine",
    "policy": "policy gaps state_machine_policies",
    "conflation": "conflation state_machine_policies",
    "packing": "bundles wire",
    "wire": "wire bundles versioned_channels epoch",
    "pace": "pace",
    "versions": "versions",
    "start_hint": "start_hint plans hazards_order",
    "centrifugo": "centrifugo wire hostile_server outcomes key_rotation bundles outages",
    "endpoint": "hostile_server centrifugo wire outages",
    "transport": "transport hostile_server fuzz_replies outcomes collector tls",
    "session": "session lanes hazards_order start_hint wake_up hazards_database pgbouncer hazards_process",
    "store": "batches lanes conflation gaps holds hazards_order hazards_settling start_hint plans retention outcomes "
    "hazards_database poison",
    "shared": "shared versions holds bundles outages outcomes",
    "relay": "batches lanes conflation gaps holds bundles hazards_settling cost_guard versions outages outcomes "
    "versioned_channels hazards_process runner",
    "runner": "runner watch batches outages metrics hazards_process",
}
# Loaded once, then shared by all runs; nothing of the project's own.
_LOADED_BEFORE: Final = (
    "pytest hypothesis.stateful httpx httptools orjson psycopg sqlalchemy.dialects.postgresql alembic.command "
    "structlog pydantic websockets.sync.client playwright.sync_api prometheus_client typer rich.console"
)
_PYTEST: Final = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0")
# What was loaded before is not rewritten, says pytest; it is not what fails.
_QUIET: Final = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
_TREE: Final = ("outbox_relay", "tests", "tools", "alembic", "alembic.ini", "pyproject.toml", "README.md", "docs")


@dataclass(slots=True)
class Result:
    """What became of a mutant: `killed` by the test named, `timeout`, or `survived`."""

    scope: str
    line: int
    diff: str
    fate: str
    by: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class Run:
    """One module's run: `results` of `of` mutants, chosen by `seed` where they are fewer."""

    module: str
    source: str
    of: int
    seed: int
    tests: list[str]
    results: list[Result] = field(default_factory=list)


@dataclass(slots=True)
class Trial:
    """A test run that goes on: of the mutant in a folder of its own."""

    mutant: Mutant | None
    folder: Path
    pid: int
    started: float


class Copies:
    """Copies of the project, one for each run at a time, in which a module is exchanged."""

    def __init__(self, folder: Path, jobs: int, module: str) -> None:
        self.source = (ROOT / "outbox_relay" / f"{module}.py").read_text()
        self._module = module
        self.free = [folder / str(n) for n in range(jobs)]
        for copy in self.free:
            copy.mkdir()
            for name in _TREE:
                original = ROOT / name
                if original.is_dir():
                    shutil.copytree(original, copy / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
                else:
                    shutil.copy(original, copy / name)

    def start(self, mutant: Mutant | None, tests: Sequence[str]) -> Trial:
        """Fork a run of the tests on the mutant, or on the module as it is."""
        folder = self.free.pop()
        path = folder / "outbox_relay" / f"{self._module}.py"
        path.write_text(mutant.applied(self.source) if mutant else self.source)
        # Its compiled form is known by size and second alone.
        for compiled in path.parent.glob(f"__pycache__/{self._module}.*"):
            compiled.unlink()
        shutil.rmtree(folder / ".hypothesis", ignore_errors=True)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _child(folder, tests)
        return Trial(mutant, folder, pid, time.monotonic())


def _child(folder: Path, tests: Sequence[str]) -> None:
    """Run the tests in `folder`, and end the process with pytest's own exit code."""
    code = 3
    try:
        os.setsid()
        with (folder / "log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path[:] = [str(folder), *(entry for entry in sys.path if entry not in {"", str(ROOT)})]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tools"]:
            del sys.modules[name]
        pytest = importlib.import_module("pytest")
        code = pytest.main([*_PYTEST, *_QUIET, *tests])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ended(trial: Trial, patience: float, source: str) -> Result | None:
    """What became of a mutant, or None while its tests run. One that hangs is stopped."""
    seconds = time.monotonic() - trial.started
    pid, status = os.waitpid(trial.pid, os.WNOHANG)
    if pid == 0 and seconds < patience:
        return None
    if pid == 0:
        os.killpg(trial.pid, signal.SIGKILL)
        os.waitpid(trial.pid, 0)
        fate, by = "timeout", ""
    else:
        code = os.waitstatus_to_exitcode(status)
        fate, by = ("survived", "") if code == 0 else ("killed", _culprit(trial.folder / "log"))
    mutant = trial.mutant
    about = (mutant.scope, mutant.line, mutant.diff(source)) if mutant else ("", 0, "")
    return Result(*about, fate, by, round(seconds, 1))


def _culprit(log: Path) -> str:
    """The test that failed first, or the kind of end where none got so far."""
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith(("FAILED tests/", "ERROR tests/")):
            return line.split(" ", 1)[1].split(" - ")[0]
    return "pytest itself failed"


def judge(module: str, chosen: Sequence[Mutant], jobs: int, patience: float | None) -> Iterator[Result]:
    """Try mutants, `jobs` at a time, and yield what became of each as it is known.

    Raises RuntimeError where the tests fail without a change. A mutant gets three times as long as they take, or
    `patience` seconds.
    """
    tests = [f"tests/test_{name}.py" for name in TESTS[module].split()]
    for name in _LOADED_BEFORE.split():
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = Copies(Path(folder), jobs, module)
        trial = copies.start(None, tests)
        while (sound := _ended(trial, 600, copies.source)) is None:
            time.sleep(0.02)
        if sound.fate != "survived":
            raise RuntimeError(f"{module}: without a change {sound.by} fails")
        print(f"{module}: {len(chosen)} mutants; its tests take {sound.seconds:.0f} s")
        copies.free.append(trial.folder)
        patience = patience or 3 * sound.seconds + 10
        waiting, running = list(chosen), list[Trial]()
        while waiting or running:
            while waiting and copies.free:
                running.append(copies.start(waiting.pop(0), tests))
            time.sleep(0.02)
            for trial in list(running):
                result = _ended(trial, patience, copies.source)
                if result is not None:
                    running.remove(trial)
                    copies.free.append(trial.folder)
                    yield result


def _kept(module: str, digest: str) -> list[Result]:
    """The results of the last run. Raises ValueError where the module is another one by now."""
    kept = json.loads((RESULTS / f"{module}.json").read_text())
    if kept["source"] != digest:
        raise ValueError(f"{module}.py has changed since its last run")
    return [Result(**result) for result in kept["results"]]


def run(module: str, arguments: argparse.Namespace) -> None:
    source = (ROOT / "outbox_relay" / f"{module}.py").read_text()
    found = mutants(source)
    chosen = [mutant for mutant in found if arguments.line in (None, mutant.line)]
    if arguments.sample and arguments.sample < len(chosen):
        # In the order in which they were drawn: what is left of a run that is stopped is a sample, too.
        chosen = random.Random(f"{arguments.seed} {module}").sample(chosen, arguments.sample)  # noqa: S311 - a sample
    digest = hashlib.sha256(source.encode()).hexdigest()
    done = Run(module, digest, len(found), arguments.seed, TESTS[module].split())
    if arguments.survivors:
        done.results = _kept(module, digest)
        survivors = {(result.line, result.diff) for result in done.results if result.fate == "survived"}
        done.results = [result for result in done.results if result.fate != "survived"]
        chosen = [mutant for mutant in found if (mutant.line, mutant.diff(source)) in survivors]
    for result in judge(module, chosen, arguments.jobs, arguments.patience):
        done.results.append(result)
        if arguments.line is None:
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{module}.json").write_text(json.dumps(asdict(done), indent=1))
        if result.fate == "survived" or arguments.verbose:
            print(
                f"{module}.py:{result.line} {result.fate} {result.by} ({result.seconds} s)\n{result.diff}", flush=True
            )
    fates = [result.fate for result in done.results]
    print(f"{module}: {len(fates)} of {len(found)} tried, {fates.count('survived')} survived", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}; by default all")
    parser.add_argument("--sample", type=int, default=0, help="so many mutants of each module; by default all")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    parser.add_argument("--line", type=int, help="only the mutants of this line, and nothing is kept")
    parser.add_argument("--survivors", action="store_true", help="only those that survived the last time")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--patience", type=float, help="seconds for one mutant; by default three times what is usual")
    parser.add_argument("--verbose", action="store_true", help="say what became of each, not of survivors alone")
    parser.add_argument("--record", action="store_true", help="write docs/mutants.md from what is kept, run nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - TESTS.keys():
        parser.error(f"no such module: {', '.join(sorted(unknown))}")
    if arguments.record:
        kept: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
        report(ROOT, kept, list(TESTS))
        return
    for module in arguments.modules or TESTS:
        run(module, arguments)


if __name__ == "__main__":
    main()
