"""Gaps, expiry, conflation and bundles under weather: two relays over an outbox in memory, driven by Hypothesis.

The workers, `plan`, `superseded`, `waves`, `commands`, `replies`, `judge` and `Suspects` are the real ones. In place of
PostgreSQL stands `Memory`; in place of Centrifugo `Channels`: some refuse whatever comes, and a command with a guilty
event in it is refused as a whole. The judge knows only what each channel has accepted, in which order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import invariant, precondition, rule

from outbox_relay.event import Event, Outage, Refusal, Reply
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from outbox_relay.packing import Limits, Wire
from outbox_relay.wire import commands, replies
from tests.support.memory import BLINK, WAITING, Aggregate, Memory, Row
from tests.support.two_relays import KilledError, TwoRelays

AGGREGATES: Sequence[Aggregate] = [("kept", "1"), ("conflated", "1"), ("conflated", "2"), ("silent", "1")]
CHANNELS = ["single:1", "single:2", "bundled:1", "bundled:2"]
WIRES: Final = {"bundled": Wire("stream", 3)}
POLICY = Policy(max_attempts=2, min_age=10.0, backoff_base=1.0, backoff_max=8.0)
POLICIES: Final[Mapping[str, Policy]] = {
    "conflated": Policy(max_attempts=2, min_age=10.0, backoff_base=1.0, backoff_max=8.0, conflate=True),
    "silent": Policy(max_attempts=2, min_age=10.0, backoff_base=1.0, backoff_max=8.0, gap=False),
}
OPTIONS = Options(
    lanes=4,
    events_per_lane=4,
    batch_time=math.inf,
    limits=Limits(events=4),
    policy=POLICY,
    policies=POLICIES,
    wires=WIRES,
)
FULL = frozenset({"snapshot", "tombstone"})


@dataclass
class Accepted:
    """What one channel has accepted: an event, or the gap in its place."""

    channel: str
    event: Event
    undone: bool = False
    """Whether what became of it was never committed."""

    @property
    def gap(self) -> bool:
        return self.event.kind == "gap"


class Channels:
    """A publisher. A command with a guilty event in it is refused; the gap in its place is not."""

    def __init__(self, memory: Memory) -> None:
        self.guilty: set[int] = set()
        self.refusing: frozenset[str] = frozenset()
        self.down = False
        self.kills_after: float = math.inf
        """In so many requests the relay dies: the last one is heard, and its answer is not."""
        self.log: list[Accepted] = []
        self.was_refused: set[int] = set()
        """Of whom a command with nobody else in it was refused."""
        self._memory = memory

    def close(self) -> None:
        pass

    def room(self, limit: int) -> int:
        return limit

    def publish(self, events: Sequence[Event], deadline: float) -> list[Reply] | Outage:
        self._memory.now += BLINK
        if self.down:
            return Outage("the weather")
        asked = commands(events, WIRES)
        answers = [self._answer([events[n] for n in command.events], command.channels) for command in asked]
        self._memory.now += BLINK
        self.kills_after -= 1
        if self.kills_after < 0:
            raise KilledError
        return replies(events, asked, answers, lambda channel, error: Refusal(channel, error["code"], ""))

    def undo(self, since: int) -> None:
        for accepted in self.log[since:]:
            accepted.undone = True

    def _answer(self, events: Sequence[Event], channels: Sequence[str]) -> dict[str, Any]:
        guilty = any(event.id in self.guilty and event.kind != "gap" for event in events)
        responses: list[dict[str, Any]] = []
        for channel in channels:
            if guilty or channel in self.refusing:
                responses.append({"error": {"code": 107 if guilty else 102, "message": ""}})
                if len(events) == 1:
                    self.was_refused.add(events[0].id)
            else:
                responses.append({})
                self.log += [Accepted(channel, event) for event in events]
        if guilty or (len(channels) == 1 and responses[0]):
            return responses[0]
        return {"publish": {}} if len(channels) == 1 else {"broadcast": {"responses": responses}}


class PoliciesUnderWeather(TwoRelays):
    def __init__(self) -> None:
        memory = Memory(AGGREGATES)
        self.channels = Channels(memory)
        super().__init__(memory, self.channels, OPTIONS)
        self.requeued: set[int] = set()
        self.let_go: set[int] = set()
        """Discarded a second time: nobody is told."""
        self.endings: dict[int, str] = {}
        """How those end that are given up and whose gap is not told yet."""

    @rule(
        aggregate=st.sampled_from(AGGREGATES),
        channels=st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=3, unique=True),
        kinds=st.lists(st.sampled_from(["change", "snapshot", "snapshot", "tombstone"]), min_size=1, max_size=4),
        falls=st.booleans(),
        lasts=st.sampled_from([None, None, 0.0, 5.0]),
        guilty=st.sampled_from([False, False, True]),
    )
    def enqueue(
        self,
        aggregate: Aggregate,
        channels: list[str],
        *,
        kinds: list[str],
        falls: bool,
        lasts: float | None,
        guilty: bool,
    ) -> None:
        for kind in kinds:
            expires_at = None if lasts is None else self.memory.now + lasts
            version = 1 if falls else None
            event = self.memory.enqueue(aggregate, channels, kind=kind, version=version, expires_at=expires_at)
            if guilty:
                self.channels.guilty.add(event.id)

    @rule(quota=st.sampled_from([1, 2, 3, math.inf]))
    def less_is_read_at_once(self, quota: float) -> None:
        self.memory.quota = quota

    @rule(down=st.sampled_from([False, False, True]), refusing=st.frozensets(st.sampled_from(CHANNELS), max_size=2))
    def the_weather_changes(self, *, down: bool, refusing: frozenset[str]) -> None:
        self.channels.down, self.channels.refusing = down, refusing

    @rule()
    def the_weather_clears(self) -> None:
        self.channels.down, self.channels.refusing = False, frozenset()

    @rule(seconds=st.sampled_from([0.0, 1.0, 8.0, 20.0]), relays=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def work(self, seconds: float, relays: list[int]) -> None:
        for relay in relays:
            self.memory.now += seconds
            self.workers[relay].run_once()

    @precondition(lambda self: self._dead())
    @rule(data=st.data(), innocent=st.sampled_from([True, True, False]))
    def requeue(self, data: st.DataObject, *, innocent: bool) -> None:
        row = data.draw(st.sampled_from(self._dead()))
        if not self.memory.gone_out_after(row):
            self.memory.requeue(row)
            self.requeued.add(row.event.id)
            self.endings.pop(row.event.id, None)
            if innocent:
                self.channels.guilty.discard(row.event.id)

    @precondition(lambda self: self._discardable())
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self._discardable()))
        if row.ending is not None:
            self.let_go.add(row.event.id)
        self.memory.discard(row)
        self.endings.pop(row.event.id, None)

    def _dead(self) -> list[Row]:
        return [row for row in self.memory.rows.values() if row.state == "dead"]

    def _discardable(self) -> list[Row]:
        heads = {wait.hold.head_id for wait in self.memory.waits.values()}
        return [
            *self._dead(),
            *(row for row in self.memory.rows.values() if row.event.id in heads and row.state == "parked"),
        ]

    @invariant()
    def first_acceptances_are_in_order(self) -> None:
        """An event, or the gap in its place. A relay that dies may have sent what nobody knows of: what is conflated or
        requeued may come after that."""
        sent: dict[tuple[Aggregate, str], int] = {}
        known: dict[tuple[Aggregate, str], int] = {}
        seen: set[tuple[int, str]] = set()
        for accepted in self.channels.log:
            event, place = accepted.event, (accepted.event.aggregate, accepted.channel)
            if (event.id, accepted.channel) not in seen:
                excepted = event.aggregate_type == "conflated" or event.id in self.requeued
                assert (known if excepted else sent).get(place, 0) < event.id
                seen.add((event.id, accepted.channel))
            sent[place] = max(event.id, sent.get(place, 0))
            if not accepted.undone:
                known[place] = max(event.id, known.get(place, 0))

    @invariant()
    def nobody_is_sent_anything_twice(self) -> None:
        """An event, and the gap in its place, each once, in requests of which the outcome was written; but for the gap
        of one that died, was requeued and died again."""
        known = [(a.event.id, a.gap, a.channel) for a in self.channels.log if not a.undone]
        once = [key for key in known if not (key[1] and key[0] in self.requeued)]
        assert len(once) == len(set(once))

    @invariant()
    def nothing_ends_without_a_word(self) -> None:
        for row in self.memory.rows.values():
            if row.state in WAITING:
                continue
            event = row.event
            policy = OPTIONS.policy_of(event.aggregate_type)
            for channel in event.channels:
                heard = [a for a in self.channels.log if not a.undone and a.channel == channel]
                got = any(a.event.id == event.id and not a.gap for a in heard)
                told = any(a.event.id == event.id and a.gap for a in heard)
                covered = policy.conflate and any(self._covers(a, event) for a in heard)
                if row.state == "delivered":
                    assert got or covered
                elif row.state == "superseded":
                    assert policy.conflate
                    assert got or covered
                else:
                    untold = "untold" in (row.error or "") or event.id in self.let_go
                    assert got or told or covered or untold or not policy.gap

    @staticmethod
    def _covers(accepted: Accepted, event: Event) -> bool:
        later = accepted.event
        return (
            later.aggregate == event.aggregate
            and later.id > event.id
            and later.version >= event.version
            and later.kind in FULL
        )

    @invariant()
    def who_is_given_up_ends_as_it_was_said(self) -> None:
        for id_, row in self.memory.rows.items():
            if row.state in WAITING and row.ending is not None:
                self.endings[id_] = row.ending
            elif row.state not in WAITING:
                assert self.endings.get(id_, row.state) == row.state

    @invariant()
    def only_the_guilty_die(self) -> None:
        assert {row.event.id for row in self._dead()} <= self.channels.was_refused

    @invariant()
    def the_last_truth_is_never_hidden(self) -> None:
        """What is written superseded has a later event that was accepted wherever it would have been."""
        for row in self.memory.rows.values():
            if row.state == "superseded":
                assert any(
                    other.event.id > row.event.id and other.event.kind in FULL
                    for other in self.memory.of(row.event.aggregate, "delivered", "superseded", *WAITING, "dead")
                )

    def teardown(self) -> None:
        """One channel refuses whatever comes, and new orders keep coming elsewhere: everything ends. An event that is
        refused is in its aggregate's way for POLICY.max_attempts batches, one for its gap, and one to move on; and
        before that, bundles are split, of so many events at most one time less often; and with the new orders'."""
        self.channels.down, self.channels.refusing = False, frozenset({"single:2"})
        self.memory.quota = math.inf
        waiting = [len(self.memory.of(aggregate, *WAITING)) for aggregate in AGGREGATES]
        most = (POLICY.max_attempts + 2) * max(waiting) + sum(waiting) + 20
        for number in itertools.count():
            stuck = [row.event.id for row in self.memory.rows.values() if row.state in WAITING]
            if not stuck:
                return
            assert number <= most, f"these events still wait: {stuck}"
            for channel in ("single:1", "bundled:1"):
                self.memory.enqueue(("kept", f"new {number} {len(self.memory.rows)}"), [channel])
            self.memory.now += POLICY.backoff_max + POLICY.min_age
            self.workers[number % 2].run_once()
            self.nothing_ends_without_a_word()
            self.first_acceptances_are_in_order()


# Whoever wants to know why it fails adds Phase.shrink, and some minutes.
PoliciesUnderWeather.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=50,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
TestPoliciesUnderWeather = PoliciesUnderWeather.TestCase
