"""The fault harness in small: naive relays must fail it, and ours must pass. `make chaos` is the real run."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import relay_faults
from tests.chaos.fault import Fault, schedule
from tests.chaos.runner import STAGES, Result, Stage, run

RATE = 600.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """Of our own, because PostgreSQL runs as somebody else and pytest's folders are closed to others."""
    with tempfile.TemporaryDirectory(prefix="outbox-relay-chaos-") as name:
        Path(name).chmod(0o755)
        yield Path(name) / "run"


def without_faults(kind: str, folder: Path) -> Result:
    """Three naive relays beside each other, five seconds, and nothing that disturbs them."""
    command = (sys.executable, "-m", "tests.chaos.naive", kind)
    stage = Stage(f"naive: {kind}", "redis", (), 1.0, whole=True, command=command, patience=2.0)
    return run(stage, 5.0, f"naive {kind}", RATE, folder)


@pytest.mark.parametrize(
    ("kind", "fails_by"),
    [("skip_locked", ("order: ",)), ("cursor", ("loss: ",)), ("hint", ("order: ", "loss: "))],
)
def test_a_naive_relay_fails(kind: str, fails_by: tuple[str, ...], folder: Path) -> None:
    """SKIP LOCKED on event rows; id > cursor; a start hint without the safety rule.

    Such a hint leaves a late commit below it, and what becomes of that depends on whether it ever starts anew.
    """
    found = [text for text in without_faults(kind, folder).verdict.violations if text.startswith(fails_by)]
    assert found, f"the harness has nothing against {kind}"
    print(f"{kind}, one counterexample of {len(found)}: {found[0]}")


def test_ours_passes_where_relays_are_killed(folder: Path) -> None:
    """A few seconds of the real thing: relays killed at random moments and at points of their path."""
    kills = [fault for fault in relay_faults.FAULTS if fault.kind.startswith("relay killed")]
    stage = Stage("kills", "redis", kills, 1.0, whole=True)
    result = run(stage, 8.0, "kills", RATE, folder)
    assert result.violations == []
    assert len(result.injections) >= 3
    assert result.heard >= result.events > 1_000
    assert result.repeated <= sum(injection.in_flight for injection in result.injections)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_seed_decides_the_schedule(stage: Stage) -> None:
    """The same seed, the same faults at the same times for as long; another seed, others; every kind has its turn."""
    first, again, other = (schedule(stage.faults, 300, seed) for seed in ("1", "1", "2"))
    assert first == again != other
    assert {appointment.fault.kind for appointment in first} == {fault.kind for fault in stage.faults}
    assert all(earlier.at < later.at < 300 for earlier, later in itertools.pairwise(first))


def test_no_kind_has_two_names() -> None:
    """The report counts by them."""
    kinds: dict[str, Fault] = {}
    for fault in (fault for stage in STAGES for fault in stage.faults):
        assert kinds.setdefault(fault.kind, fault) is fault
