"""What events become on the wire: a table of values, without servers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from outbox_relay.event import Event
from outbox_relay.outcome import BEHIND, SUPERSEDED, UNSETTLED, GivenUp, Held, Outcome, Owed, Policy, Settlement
from outbox_relay.policy import plan, superseded

NOW = 1_000.0
LASTING, AGED, SILENT = Policy(), Policy(max_age=100.0), Policy(max_age=100.0, gap=False)
WAITING = Policy(gap=False, wait_after_dead=True)

_ids = itertools.count(1)


def event(**fields: Any) -> Event:
    id_ = next(_ids)
    written = Event(id_, f"e{id_}", "order", "1", 0, 1, "change", ["a"], '{"n":1}', None, None, created_at=NOW)
    return written._replace(**fields)


SENT, TOLD = "sent", "told"

WHAT: dict[str, tuple[Event, Policy, str | GivenUp]] = {
    "an event": (event(), LASTING, SENT),
    "an event of any age": (event(created_at=-1e9), LASTING, SENT),
    "one that has not expired yet": (event(expires_at=NOW + 0.001), LASTING, SENT),
    "one that expires now": (event(expires_at=NOW), LASTING, TOLD),
    "one at its greatest age": (event(created_at=NOW - 100.0), AGED, TOLD),
    "one just below its greatest age": (event(created_at=NOW - 99.9), AGED, SENT),
    "one that expires before its greatest age": (event(expires_at=NOW), AGED, TOLD),
    "one that would last longer than its greatest age": (event(created_at=0.0, expires_at=NOW + 9), AGED, TOLD),
    "one that has expired, no gaps": (event(expires_at=NOW), SILENT, GivenUp("expired")),
    "one that has expired, accepted by some": (event(channels=["a", "b"], accepted=["a"], expires_at=0.0), AGED, TOLD),
    "one that has expired, accepted by all": (event(accepted=["a"], expires_at=0.0), AGED, GivenUp("expired")),
    "a replay of one that has expired": (event(expires_at=0.0, created_at=0.0, replay=1), AGED, SENT),
    "one that is dead": (event(ending="dead"), LASTING, TOLD),
    "one that is dead and has expired": (event(ending="dead", expires_at=0.0), LASTING, TOLD),
    "one that is discarded": (event(ending="discarded"), AGED, TOLD),
    "one that is discarded, no gaps": (event(ending="discarded"), WAITING, GivenUp("discarded")),
    "one that is dead, no gaps, its aggregate waits": (event(ending="dead"), WAITING, GivenUp("dead", None, wait=True)),
}


@pytest.mark.parametrize(("written", "policy", "what"), WHAT.values(), ids=WHAT.keys())
def test_what_becomes_of_an_event(written: Event, policy: Policy, what: str | GivenUp) -> None:
    """It is sent as it is, its gap is told in its place, or it ends without a word."""
    planned = plan([written], NOW, lambda _: policy)
    if what == SENT:
        assert planned == ([written], [], {})
    elif what == TOLD:
        ending = written.ending or "expired"
        assert planned == ([written._replace(kind="gap", payload="{}", ending=ending)], [], {})
    else:
        [settlement] = planned.ends
        assert planned.events == []
        assert isinstance(settlement, Settlement)
        assert (settlement.event.id, settlement.outcome, settlement.accepted) == (written.id, what, ())


def test_a_gap_keeps_the_place_of_its_event() -> None:
    """Order is that of the events, whatever they become."""
    events = [event(), event(expires_at=0.0), event(), event(ending="dead")]
    assert [sent.id for sent in plan(events, NOW, lambda _: LASTING).events] == [sent.id for sent in events]


def test_behind_a_dead_event_nothing_is_sent_where_its_aggregate_waits() -> None:
    """Others go on; behind what has expired or was discarded so does its own."""
    policy = Policy(wait_after_dead=True)
    events = [event(expires_at=0.0), event(ending="dead"), event(), event(aggregate_id="2"), event(ending="discarded")]
    assert [sent.id for sent in plan(events, NOW, lambda _: policy).events] == [events[n].id for n in (0, 1, 3)]
    assert len(plan(events, NOW, lambda _: LASTING).events) == len(events)


def test_a_gap_has_a_key_of_its_own() -> None:
    """Else Centrifugo would take it for the event, sent again."""
    first, replayed = event(), event(replay=2)
    keys = {sent.idempotency_key for sent in (first, first._replace(ending="dead"), replayed._replace(ending="dead"))}
    assert keys == {f"e{first.id}:{first.id}", f"e{first.id}:{first.id}:gap", f"e{replayed.id}:{replayed.id}:r2:gap"}


def test_each_type_has_its_policy() -> None:
    """Only the one with a greatest age expires."""
    types = {"old": AGED, "any": LASTING}
    events = [event(aggregate_type=name, created_at=0.0) for name in ("old", "any")]
    assert [sent.ending for sent in plan(events, NOW, types.__getitem__).events] == ["expired", None]
    assert LASTING.max_age == math.inf


# Conflation

CONFLATED = Policy(conflate=True)
PAIR = ["a", "b"]

SUPERSEDES: dict[str, tuple[Event, Event, bool]] = {
    # name: an event, a later one, whether that makes the first one needless
    "a snapshot": (event(kind="snapshot"), event(kind="snapshot", version=2), True),
    "a change": (event(), event(kind="snapshot", version=2), True),
    "a tombstone": (event(kind="snapshot"), event(kind="tombstone", version=2), True),
    "of the same version": (event(version=2), event(kind="snapshot", version=2), True),
    "a change comes later": (event(), event(version=2), False),
    "of a lower version": (event(version=2), event(kind="snapshot", version=1), False),
    "of more channels": (event(channels=["b"]), event(kind="snapshot", version=2, channels=PAIR), True),
    "of fewer channels": (event(channels=PAIR), event(kind="snapshot", version=2), False),
    "of fewer channels, the other one has it": (
        event(channels=PAIR, accepted=["b"]),
        event(kind="snapshot", version=2),
        False,
    ),
    "of another object": (event(), event(kind="snapshot", version=2, aggregate_id="2"), False),
    "that has expired": (event(), event(kind="snapshot", version=2, expires_at=0.0), False),
    "that is given up": (event(), event(kind="snapshot", version=2, ending="dead"), False),
}


@pytest.mark.parametrize(("first", "later", "needless"), SUPERSEDES.values(), ids=SUPERSEDES.keys())
def test_what_makes_an_event_needless(first: Event, later: Event, needless: bool) -> None:
    """A later snapshot or tombstone, of a version not lower, that all its channels will hear of; on demand."""
    planned = plan([first, later], NOW, lambda _: CONFLATED)
    assert [sent.id for sent in planned.events] == ([later.id] if needless else [first.id, later.id])
    assert planned.covered == ({later.id: [first]} if needless else {})
    assert plan([first, later], NOW, lambda _: LASTING).covered == {}


def test_only_the_newest_is_sent_and_order_is_kept() -> None:
    """A change behind it goes out after it; another object's events are left alone."""
    events = [
        event(kind="snapshot", version=1),
        event(version=1, aggregate_id="2"),
        event(version=2),
        event(kind="snapshot", version=3),
        event(version=4),
    ]
    planned = plan(events, NOW, lambda _: CONFLATED)
    assert planned.events == [events[1], events[3], events[4]]
    assert planned.covered == {events[3].id: [events[2], events[0]]}


IN_BETWEEN: dict[str, tuple[Event, bool]] = {
    # name: what is sent between a snapshot on channel a and the next one there, whether the first one is needless
    "on another channel": (event(channels=["b"], version=2), True),
    "a change on its channel too": (event(channels=PAIR, version=2), False),
    "a gap on its channel too": (event(channels=PAIR, version=2, ending="dead"), False),
    "a version that fell": (event(channels=PAIR, version=0, kind="snapshot"), False),
}


@pytest.mark.parametrize(("between", "needless"), IN_BETWEEN.values(), ids=IN_BETWEEN.keys())
def test_nothing_overtakes_what_waits_for_a_later_one(between: Event, needless: bool) -> None:
    """What goes out in between would be followed by the older event, if the batch ended there."""
    first, last = event(kind="snapshot"), event(kind="snapshot", version=3)
    planned = plan([first, between, last], NOW, lambda _: CONFLATED)
    assert planned.covered == ({last.id: [first]} if needless else {})
    assert [sent.id for sent in planned.events] == [*([] if needless else [first.id]), between.id, last.id]


def test_the_next_one_that_covers_an_event_stands_for_it() -> None:
    events = [
        event(kind="snapshot"),
        event(kind="snapshot", version=2, channels=PAIR),
        event(kind="snapshot", version=3),
    ]
    assert plan(events, NOW, lambda _: CONFLATED).covered == {events[1].id: [events[0]]}


def test_types_that_are_not_conflated_lose_nothing() -> None:
    """Where a batch has both, one keeps all its events, in their places."""
    types = {"order": CONFLATED, "payment": LASTING}
    events = [
        event(kind="snapshot"),
        event(kind="snapshot", aggregate_type="payment"),
        event(kind="snapshot", version=2, aggregate_type="payment"),
        event(kind="snapshot", version=2),
        event(aggregate_type="payment"),
    ]
    planned = plan(events, NOW, types.__getitem__)
    assert planned.events == events[1:]
    assert planned.covered == {events[3].id: [events[0]]}


def test_a_dead_event_does_not_stop_conflation_where_nobody_waits_for_it() -> None:
    events = [event(kind="snapshot"), event(ending="dead", version=2), event(kind="snapshot", version=3)]
    assert plan(events, NOW, lambda _: CONFLATED).covered == {events[2].id: [events[1], events[0]]}
    living = [event(kind="snapshot"), event(version=2), event(kind="snapshot", version=3)]
    waiting = Policy(conflate=True, wait_after_dead=True)
    assert plan(living, NOW, lambda _: waiting).covered == {living[2].id: [living[1], living[0]]}


HELD = Held(1, 0, 1.0, "")


def test_needless_events_end_with_the_one_in_their_place() -> None:
    """Superseded, or as they were to end, without a gap; where a channel has refused it, only those of others."""
    earlier = [
        event(),
        event(expires_at=NOW),
        event(ending="discarded"),
        event(channels=PAIR),
        event(channels=["b"]),
        event(channels=PAIR, accepted=["b"]),
    ]
    later = event(kind="snapshot", channels=PAIR)
    covered = {later.id: earlier}
    delivered = superseded(covered, [later], [], NOW, lambda _: CONFLATED)
    assert [settlement.event for settlement in delivered] == earlier
    ends = [SUPERSEDED, GivenUp("expired"), GivenUp("discarded"), SUPERSEDED, SUPERSEDED, SUPERSEDED]
    assert [settlement.outcome for settlement in delivered] == ends
    partly = superseded(covered, [], [Settlement(later, HELD, ("a",))], NOW, lambda _: CONFLATED)
    assert partly == [
        *delivered[:3],
        Settlement(earlier[3], BEHIND, ("a",)),
        Settlement(earlier[4], BEHIND, ()),
        Settlement(earlier[5], SUPERSEDED, ()),
    ]
    before = later._replace(accepted=["a"])
    assert (
        superseded({later.id: earlier[:1]}, [], [Settlement(before, HELD, ())], NOW, lambda _: CONFLATED)
        == delivered[:1]
    )
    assert superseded(covered, [], [], NOW, lambda _: CONFLATED) == []


ON_HOLD: dict[str, tuple[Outcome, bool]] = {
    "refused": (HELD, True),
    "its gap is owed": (Owed("dead", ""), True),
    "dead, its aggregate waits for a person": (GivenUp("dead", wait=True), True),
    "dead, its aggregate goes on": (GivenUp("dead"), False),
    "one of a bundle": (UNSETTLED, False),
}


@pytest.mark.parametrize(("outcome", "waits"), ON_HOLD.values(), ids=ON_HOLD.keys())
def test_needless_events_wait_with_the_one_in_their_place(outcome: Outcome, waits: bool) -> None:
    """Where it puts their aggregate on hold."""
    earlier, later = event(), event(kind="snapshot", version=2)
    settled = superseded({later.id: [earlier]}, [], [Settlement(later, outcome, ())], NOW, lambda _: CONFLATED)
    assert settled == ([Settlement(earlier, BEHIND, ())] if waits else [])


def test_nothing_is_sent_in_the_place_of_what_waits_for_a_person() -> None:
    """Behind a dead event of an aggregate that waits nothing is sent, so nothing is covered by it."""
    policy = Policy(conflate=True, wait_after_dead=True)
    events = [event(kind="snapshot"), event(ending="dead", version=2), event(kind="snapshot", version=3)]
    planned = plan(events, NOW, lambda _: policy)
    assert ([sent.id for sent in planned.events], planned.covered) == ([events[0].id, events[1].id], {})
