"""What the workers of one relay share: an outage, said once and tried by one; suspects; and how events are named."""

from __future__ import annotations

import threading

import pytest

from outbox_relay.event import Clock, Event, Outage, boottime
from outbox_relay.health import Progress
from outbox_relay.outcome import GivenUp, Settlement
from outbox_relay.shared import Pause, Shared, log_outcomes
from tests.support.waiting import PATIENCE


def event(number: int) -> Event:
    return Event(number, "e", "order", str(number), 0, 1, "change", ["a"], "{}", None, None, 0.0)


@pytest.fixture
def pause() -> Pause:
    """During an outage that may be tried to be over at any time."""
    pause = Pause(0.0, 0.0)
    pause.report(Outage("away"), sound=False)
    return pause


def test_an_outage_is_said_when_it_begins(caplog: pytest.LogCaptureFixture) -> None:
    pause = Pause(0.0, 0.0)
    for reason in ("away", "still away"):
        pause.report(Outage(reason), sound=False)
        assert [vars(record)["reason"] for record in caplog.records] == ["away"]


def test_who_waits_for_anothers_try_gives_signs_of_life_and_can_be_stopped(pause: Pause) -> None:
    signs = threading.Semaphore(0)
    stopping = threading.Event()

    class Watched(Progress):
        def alive(self) -> None:
            signs.release()

    def wait() -> None:
        with pause.turn(stopping, Watched()):
            pass

    with pause.turn(threading.Event(), Progress()):
        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        for _ in range(3):
            assert signs.acquire(timeout=PATIENCE)
        stopping.set()
        waiting.join(PATIENCE)
        assert not waiting.is_alive()


def test_who_was_answered_is_no_suspect_any_more() -> None:
    shared = Shared(Pause(0.0, 0.0))
    events = [event(1), event(2)]
    assert not shared.failed(events, Clock(0.0, boottime()))
    assert shared.suspects.part(events, set()) == ([], [[one] for one in events])
    shared.answered(events, ["a"], 1.0)
    assert shared.suspects.part(events, set()) == (events, [])


def test_a_line_says_which_event_it_is_about(caplog: pytest.LogCaptureFixture) -> None:
    log_outcomes(0, [Settlement(event(17), GivenUp("dead", "no such thing"), ())])
    [line] = map(vars, caplog.records)
    assert line | {"event_id": 17, "aggregate_type": "order", "aggregate_id": "17", "error": "no such thing"} == line


def test_what_was_plainly_delivered_is_counted_for_who_debugs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "outbox_relay")
    for events in (0, 3):
        log_outcomes(events, [])
    assert [(record.message, vars(record)["events"]) for record in caplog.records] == [("delivered", 3)]
