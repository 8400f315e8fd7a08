"""What events become on the wire: a table of values, without servers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from outbox_relay import event as event_room
from outbox_relay.event import Clock, Event
from outbox_relay.outcome import GivenUp, Policy, Settlement
from outbox_relay.policy import plan

NOW = 1_000.0
LASTING, AGED, SILENT = Policy(), Policy(max_age=100.0), Policy(max_age=100.0, gap=False)
WAITING = Policy(gap=False, wait_after_dead=True)

_ids = itertools.count(1)


def event(**fields: Any) -> Event:
    id_ = next(_ids)
    written = Event(id_, f"e{id_}", "order", "1", 0, 1, "change", ["a"], '{"n":1}', None, None, created_at=NOW)
    return replace(written, **fields)


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
        assert planned == ([written], [])
    elif what == TOLD:
        ending = written.ending or "expired"
        assert planned == ([replace(written, kind="gap", payload="{}", ending=ending)], [])
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
    keys = {sent.idempotency_key for sent in (first, replace(first, ending="dead"), replace(replayed, ending="dead"))}
    assert keys == {f"e{first.id}:{first.id}", f"e{first.id}:{first.id}:gap", f"e{replayed.id}:{replayed.id}:r2:gap"}


def test_each_type_has_its_policy() -> None:
    """Only the one with a greatest age expires."""
    types = {"old": AGED, "any": LASTING}
    events = [event(aggregate_type=name, created_at=0.0) for name in ("old", "any")]
    assert [sent.ending for sent in plan(events, NOW, types.__getitem__).events] == ["expired", None]
    assert LASTING.max_age == math.inf


def test_the_databases_clock_is_carried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was asked once: what has passed here since then has passed there."""
    monkeypatch.setattr(event_room, "boottime", lambda: 30.0)
    assert Clock(epoch=NOW, read_at=20.0).now() == NOW + 10.0
