"""The fault harness in small: naive relays must fail it, and ours must pass. `make chaos` is the real run."""

from __future__ import annotations

import itertools
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from outbox_relay.embedded.centrifugo import Centrifugo
from tests.chaos import relay_faults
from tests.chaos.fault import Fault, schedule
from tests.chaos.logs import read_proxy
from tests.chaos.measure import Strike, Waiting, recovery
from tests.chaos.runner import STAGES, Result, Stage, run
from tests.chaos.window import Window
from tests.support.gateway import Exchange
from tests.support.waiting import PATIENCE

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


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_what_strikes_alone_is_left_alone_as_long_as_is_promised(stage: Stage) -> None:
    """Else only recoveries shorter than the pause to the next fault would ever be measured."""
    appointments = schedule(stage.faults, 900, "1")
    alone = [each for each in appointments if each.alone]
    assert {each.fault.kind for each in alone} == {fault.kind for fault in stage.faults if fault.within}
    for each in alone:
        until = each.at + each.fault.within + (0 if each.fault.from_strike else each.seconds)
        for other in appointments:
            meanwhile = other is not each and other.at < until and other.at + other.seconds > each.at
            assert not meanwhile or other.fault.quiet, f"{other} while {each}"


KILLED = Fault("killed", lambda *_: nullcontext(), from_strike=True, within=1.0)
STOPPED = Fault("stopped", lambda *_: nullcontext(), within=1.0)
SLOW = Fault("slow", lambda *_: nullcontext())
WAITING = Waiting({"a": 9.0, "b": 9.9, "later": 10.5}, {"a": 9.5, "b": 10.8, "later": 99.0})


@pytest.mark.parametrize(
    ("strike", "seconds"),
    [
        (Strike(KILLED, 10.0, 10.0, 12.0, alone=True), 0.8),
        (Strike(STOPPED, 10.0, 10.1, 10.3, alone=True), 0.5),
        (Strike(STOPPED, 10.0, 10.1, 11.5, alone=True), 0.0),
        (Strike(SLOW, 10.0, 10.0, 10.3), 0.5),
        # Promised, and not alone.
        (Strike(KILLED, 10.0, 10.0, 12.0), None),
        # It takes longer than is promised.
        (Strike(KILLED, 10.9, 10.9, 12.0, alone=True), 88.1),
        # Nothing waits.
        (Strike(KILLED, 9.6, 9.6, 9.6, alone=True), None),
    ],
)
def test_recovery_is_until_all_that_waited_is_settled(strike: Strike, seconds: float | None) -> None:
    found = recovery(strike, [strike], WAITING, end=1000.0)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_what_disturbs_a_recovery_excuses_it_only_within_what_is_promised() -> None:
    killed = Strike(KILLED, 10.0, 10.0, 10.0, alone=True)
    slow = Waiting({"a": 9.0}, {"a": 14.0})
    for at, seconds in ((10.9, None), (11.1, 4.0)):
        assert recovery(killed, [killed, Strike(SLOW, at, at, at + 1)], slow, end=1000.0) == seconds
    assert recovery(killed, [killed], slow, end=10.5) is None
    stopped = Strike(STOPPED, 10.0, 10.1, 11.5, alone=True)
    assert recovery(stopped, [stopped, Strike(SLOW, 11.0, 11.0, 11.2)], WAITING, end=1000.0) is None
    assert recovery(killed, [killed], slow, end=11.5) == 4.0


def test_no_kind_has_two_names() -> None:
    """The report counts by them."""
    kinds: dict[str, Fault] = {}
    for fault in (fault for stage in STAGES for fault in stage.faults):
        assert kinds.setdefault(fault.kind, fault) is fault


@pytest.mark.parametrize("patient", [True, False])
def test_an_answer_that_comes_to_nobody_is_none(centrifugo: Centrifugo, tmp_path: Path, patient: bool) -> None:
    """Centrifugo was frozen for as long as a relay waits: it takes the request, and whoever sent it has given up."""
    path, over = tmp_path / "proxy.jsonl", threading.Event()
    with Window(centrifugo.api_url, path) as window:

        def too_late(exchange: Exchange) -> None:
            if not patient:
                exchange.wait_for_client_to_leave()
            try:
                exchange.answer(*exchange.forward())
            finally:
                over.set()

        with window.doing(too_late):
            client = HTTPConnection(urlsplit(window.url).netloc, timeout=PATIENCE)
            client.request("POST", "/relay-0/api/batch", '{"commands":[]}', {"X-API-Key": centrifugo.api_key})
            if patient:
                assert client.getresponse().status == 200
            client.close()
            assert over.wait(PATIENCE)
    window.close_log()
    [request] = read_proxy(path)
    assert (request.answered_at is not None) == patient
