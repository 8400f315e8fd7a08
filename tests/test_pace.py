"""The choice between publishing one by one and side by side is made by trying both."""

from __future__ import annotations

import pytest

from outbox_relay import pace
from outbox_relay.pace import TRIES, TRY_EVENTS, TRY_EVERY, Pace

LIMIT = 1_000


def decide(pace: Pace, *, one_by_one: float, side_by_side: float) -> None:
    """Feed it the requests that it asks for, with their times in seconds per event."""
    for _ in range(2 * TRIES):
        assert pace.room(LIMIT) == TRY_EVENTS
        parallel = pace.choose(TRY_EVENTS)
        seconds = side_by_side if parallel else one_by_one
        pace.note(TRY_EVENTS, 0.005 + TRY_EVENTS * seconds, parallel=parallel)
    assert pace.room(LIMIT) == LIMIT


@pytest.mark.parametrize(
    ("one_by_one", "side_by_side", "parallel"),
    [(100e-6, 30e-6, True), (10e-6, 14e-6, False), (14e-6, 10e-6, False), (1000e-6, 50e-6, True)],
    ids=["Redis", "memory", "memory, within the noise", "Redis far away"],
)
def test_it_takes_what_is_faster(one_by_one: float, side_by_side: float, *, parallel: bool) -> None:
    """Also where the way to Centrifugo takes most of the time."""
    own = Pace()
    decide(own, one_by_one=one_by_one, side_by_side=side_by_side)
    assert own.choose(LIMIT) is parallel
    assert own.choose(2) is parallel
    assert own.choose(1) is False


def test_requests_of_other_sizes_are_no_trial() -> None:
    own = Pace()
    for _ in range(10 * TRIES):
        for parallel in (False, True):
            own.note(TRY_EVENTS - 1, 1.0, parallel=parallel)
    assert own.room(LIMIT) == TRY_EVENTS


def test_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Centrifugo may have got another engine."""
    now = 100.0
    monkeypatch.setattr(pace, "boottime", lambda: now)
    own = Pace()
    decide(own, one_by_one=100e-6, side_by_side=30e-6)
    now += TRY_EVERY + 1
    decide(own, one_by_one=10e-6, side_by_side=14e-6)
    assert own.choose(LIMIT) is False


@pytest.mark.parametrize("parallel", [True, False])
def test_a_setting_is_not_doubted(*, parallel: bool) -> None:
    own = Pace(parallel)
    assert own.room(LIMIT) == LIMIT
    for _ in range(10 * TRIES):
        assert own.choose(TRY_EVENTS) is parallel
        own.note(TRY_EVENTS, 1.0, parallel=parallel)
        own.note(TRY_EVENTS, 0.1, parallel=not parallel)


def test_a_large_request_is_never_sent_one_by_one_to_find_out() -> None:
    """A group of suspects may be larger than what a trial holds; a slow broker would not be done with it in time."""
    own = Pace()
    own.note(TRY_EVENTS, 1.0, parallel=True)
    assert own.choose(TRY_EVENTS) is False
    assert own.choose(LIMIT) is True
