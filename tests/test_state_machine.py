"""Whatever the weather: two relays over an outbox in memory, driven by Hypothesis, judged by a log of requests.

The workers, `waves`, `judge`, `decide` and `Suspects` are the real ones. In place of PostgreSQL stands `Memory`; in
place of Centrifugo `Weather`, which accepts and refuses as it is told. Relays die and lose their database in the middle
of a batch, which is undone then, but for what was sent. The judge knows nothing of holds, attempts or
suspects: only who was sent when, and who was accepted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import invariant, precondition, rule

from outbox_relay.event import ACCEPTED, Event, Outage, Refusal, Reply
from outbox_relay.options import Options
from outbox_relay.outcome import INTERNAL, PERMANENT, Policy, namespace
from outbox_relay.packing import Limits
from tests.support.memory import BLINK, WAITING, Aggregate, Memory, Row
from tests.support.two_relays import KilledError, TwoRelays

AGGREGATES: Sequence[Aggregate] = [(type_, name) for type_ in ("goes on", "waits") for name in "1234"]
CHANNELS = ["a:1", "a:2", "b:1", "c:1"]
CODES = [INTERNAL, 102, 104, 107, 108, 999]
POLICY = Policy(max_attempts=3, min_age=60.0, backoff_base=1.0, backoff_max=30.0, gap=False)
OPTIONS = Options(
    lanes=6,
    events_per_lane=3,
    batch_time=math.inf,
    limits=Limits(events=5),
    policy=POLICY,
    policies={"waits": replace(POLICY, wait_after_dead=True)},
)


@dataclass
class Sky:
    """What Centrifugo makes of requests: refusals by channel, events that break their requests, or all of them."""

    refusing: Mapping[str, int] = field(default_factory=dict)
    poisoned: frozenset[Aggregate] = frozenset()
    down: bool = False


@dataclass(frozen=True)
class Request:
    """One request as it was heard. An event without an entry in `refused` was accepted by all that it was sent to."""

    sent_at: float
    answered_at: float
    events: Sequence[Event]
    refused: Mapping[int, Mapping[str, int]]
    failed: bool = False
    verdict: int = 0
    undone: bool = False
    """Whether what became of it was never committed."""

    @cached_property
    def accepted(self) -> Sequence[tuple[Event, str]]:
        return [
            (event, channel)
            for event in self.events
            for channel in event.unsent
            if not self.failed and channel not in self.refused.get(event.id, {})
        ]


class Weather:
    """A publisher under a sky that changes after `change_after` events, also in the middle of a request."""

    def __init__(self, memory: Memory) -> None:
        self.sky = Sky()
        self.next_sky = Sky()
        self.change_after = math.inf
        self.kills_after: float = math.inf
        """In so many requests the relay dies: the last one is heard, and its answer is not."""
        self.log: list[Request] = []
        self._memory = memory

    def close(self) -> None:
        pass

    def room(self, limit: int) -> int:
        return limit

    def publish(self, events: Sequence[Event], deadline: float) -> list[Reply] | Outage:
        self._check(events)
        self._memory.now += BLINK
        sent_at = self._memory.now
        broken = self.sky.down or any(event.aggregate in self.sky.poisoned for event in events)
        replies = [self._reply(event) for event in events]
        self._memory.now += BLINK
        refused = {
            event.id: {refusal.channel: refusal.code for refusal in reply.refusals}
            for event, reply in zip(events, replies, strict=True)
            if reply is not ACCEPTED
        }
        verdict = 0 if self.sky.down else 403
        self.log.append(Request(sent_at, self._memory.now, events, {} if broken else refused, broken, verdict))
        self.kills_after -= 1
        if self.kills_after < 0:
            raise KilledError
        return Outage("the weather", verdict=verdict) if broken else replies

    def _reply(self, event: Event) -> Reply:
        self.change_after -= 1
        if self.change_after < 0:
            self.sky, self.change_after = self.next_sky, math.inf
        refusing = self.sky.refusing
        refusals = tuple(Refusal(channel, refusing[channel], "") for channel in event.unsent if channel in refusing)
        accepted = tuple(channel for channel in event.unsent if channel not in refusing)
        return Reply(refusals, accepted) if refusals else ACCEPTED

    def _check(self, events: Sequence[Event]) -> None:
        """One event per aggregate; a successor only after all its predecessors; nothing of who has to wait."""
        assert len({event.aggregate for event in events}) == len(events) > 0
        for event in events:
            row = self._memory.rows[event.id]
            assert row.state in WAITING
            wait = self._memory.waits.get(event.aggregate)
            assert wait is None or wait.due_at <= self._memory.now
            for other in self._memory.of(event.aggregate, *WAITING):
                over = other.ending is not None or self._complete(other.event)
                assert other.event.id >= event.id or over, f"{other} is overtaken by {event}"

    def _complete(self, event: Event) -> bool:
        return {channel for heard, channel in self.accepted() if heard.id == event.id} == set(event.channels)

    @property
    def valid(self) -> list[Request]:
        """The requests of which the outcome was written, or may still be."""
        return [request for request in self.log if not request.undone]

    def undo(self, since: int) -> None:
        """The batch of all requests from here on is rolled back."""
        self.log[since:] = [replace(request, undone=True) for request in self.log[since:]]

    def accepted(self, *, also_undone: bool = False) -> Iterator[tuple[Event, str]]:
        requests = self.log if also_undone else self.valid
        return itertools.chain.from_iterable(request.accepted for request in requests)

    def blamable(self, id_: int) -> list[tuple[float, frozenset[int]]]:
        """The event's refusals, each with when it was answered and its codes; none where its request failed with
        others in it."""
        found: list[tuple[float, frozenset[int]]] = []
        for request in self.valid:
            if request.failed and [event.id for event in request.events] == [id_]:
                found.append((request.answered_at, frozenset({request.verdict})))
            elif id_ in request.refused:
                found.append((request.answered_at, frozenset(request.refused[id_].values())))
        return found

    def evidence(self, event: Event) -> int:
        """After how many of its refusals another aggregate was accepted in a namespace of its, before what came of
        the next refusal was settled: that is, before the one after that. The next one must speak of the event."""
        refusals = self.blamable(event.id)
        times = [answered_at for answered_at, _ in refusals]
        speaks = [not codes & {INTERNAL, 0} for _, codes in refusals]
        mine = set(map(namespace, event.channels))
        others = [
            request.sent_at
            for request in self.log
            if any(other.aggregate != event.aggregate and namespace(c) in mine for other, c in request.accepted)
        ]
        turns = zip(times[:-1], [*times[2:], math.inf], speaks[1:], strict=False)
        return sum(speaking and any(begin < at < end for at in others) for begin, end, speaking in turns)


skies = st.builds(
    Sky,
    refusing=st.dictionaries(st.sampled_from(CHANNELS), st.sampled_from(CODES), max_size=3),
    poisoned=st.frozensets(st.sampled_from(AGGREGATES), max_size=3),
    down=st.sampled_from([False, False, False, True]),
)


class RelayUnderWeather(TwoRelays):
    def __init__(self) -> None:
        memory = Memory(AGGREGATES)
        self.weather = Weather(memory)
        super().__init__(memory, self.weather, OPTIONS)
        self.dead: set[int] = set()

    @rule(
        aggregate=st.sampled_from(AGGREGATES),
        channels=st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=3, unique=True),
        count=st.integers(1, 4),
    )
    def enqueue(self, aggregate: Aggregate, channels: list[str], count: int) -> None:
        for _ in range(count):
            self.memory.enqueue(aggregate, channels)

    @rule(sky=skies)
    def the_weather_changes(self, sky: Sky) -> None:
        self.weather.sky = sky

    @rule(sky=skies, after=st.integers(0, 12))
    def the_weather_will_change(self, sky: Sky, after: int) -> None:
        self.weather.next_sky, self.weather.change_after = sky, after

    @rule(seconds=st.sampled_from([0.0, 1.0, 30.0, 600.0]), relays=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def work(self, seconds: float, relays: list[int]) -> None:
        for relay in relays:
            self.memory.now += seconds
            self.workers[relay].run_once()
            self.worked()

    @rule(
        sky=st.sampled_from([Sky(down=True), Sky(refusing=dict.fromkeys(CHANNELS, INTERNAL))]),
        minutes=st.integers(1, 30),
    )
    def an_outage_of_minutes(self, sky: Sky, minutes: int) -> None:
        """It kills nothing, accepts nothing, and leaves no attempt that was not deserved before."""
        before = {id_: row.state for id_, row in self.memory.rows.items()}
        self.weather.sky, self.weather.change_after = sky, math.inf
        attempts = {wait.hold.head_id: wait.hold.attempts for wait in self.memory.waits.values()}
        for minute in range(minutes):
            self.memory.now += 60.0
            self.workers[minute % 2].run_once()
            if minute == 0:
                attempts = {wait.hold.head_id: wait.hold.attempts for wait in self.memory.waits.values()}
        self.worked()
        for wait in self.memory.waits.values():
            assert wait.hold.attempts <= attempts.get(wait.hold.head_id, 0) + 1
        changed = {(before[id_], row.state) for id_, row in self.memory.rows.items() if before[id_] != row.state}
        assert changed <= {("pending", "parked"), ("parked", "dead"), ("pending", "dead"), ("parked", "discarded")}
        self.weather.sky = Sky()

    @precondition(lambda self: any(row.state == "dead" for row in self.memory.rows.values()))
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from([row for row in self.memory.rows.values() if row.state == "dead"]))
        if not self.memory.gone_out_after(row):
            self.memory.requeue(row)
            self.dead.discard(row.event.id)

    @precondition(lambda self: self._discardable())
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        self.memory.discard(data.draw(st.sampled_from(self._discardable())))

    def _discardable(self) -> list[Row]:
        heads = {wait.hold.head_id for wait in self.memory.waits.values()}
        return [
            row
            for row in self.memory.rows.values()
            if row.state == "dead" or (row.state == "parked" and row.event.id in heads)
        ]

    def worked(self) -> None:
        """Given up only for refusals that were its own: enough and long enough, or one that can never end well."""
        for row in self.memory.rows.values():
            if row.state != "dead" or row.event.id in self.dead:
                continue
            self.dead.add(row.event.id)
            refusals, evidence = self.weather.blamable(row.event.id), self.weather.evidence(row.event)
            (first, _), (last, codes) = refusals[0], refusals[-1]
            assert not codes & {INTERNAL, 0}
            assert evidence >= (1 if codes & PERMANENT else POLICY.max_attempts)
            assert codes & PERMANENT or last - first >= POLICY.min_age - 1

    @invariant()
    def first_acceptances_are_in_order(self) -> None:
        last: dict[tuple[Aggregate, str], int] = {}
        seen: set[tuple[int, str]] = set()
        for event, channel in self.weather.accepted(also_undone=True):
            if (event.id, channel) not in seen:
                assert last.get((event.aggregate, channel), 0) < event.id
                last[event.aggregate, channel] = event.id
                seen.add((event.id, channel))

    @invariant()
    def nothing_is_lost_and_nothing_sent_twice(self) -> None:
        """Delivered is who was accepted by all channels, each of them once, in requests that were not undone."""
        accepted = sorted((event.id, channel) for event, channel in self.weather.accepted())
        assert len(accepted) == len(set(accepted))
        for row in self.memory.rows.values():
            mine = {channel for id_, channel in accepted if id_ == row.event.id}
            assert (mine == set(row.event.channels)) == (row.state == "delivered")
            assert row.state == "delivered" or mine == set(row.accepted)

    @invariant()
    def parked_is_who_is_behind_a_hold(self) -> None:
        for aggregate in AGGREGATES:
            parked = self.memory.of(aggregate, "parked")
            wait = self.memory.waits.get(aggregate)
            assert bool(parked) <= (wait is not None)
            if wait is not None and wait.due_at < math.inf:
                assert parked[0].event.id == wait.hold.head_id

    @invariant()
    def nobody_waits_or_is_blamed_without_evidence(self) -> None:
        for wait in self.memory.waits.values():
            event = self.memory.rows[wait.hold.head_id].event
            assert wait.hold.attempts <= self.weather.evidence(event)
            assert wait.hold.tries <= len(self.weather.blamable(event.id))

    def teardown(self) -> None:
        """One relay is left. Some events stay poisoned, and new orders keep coming: all but the poisoned ones end. Then
        nothing is poisoned: all end, but for those that wait for a person."""
        self.weather.sky, self.weather.change_after = Sky(poisoned=self.weather.sky.poisoned), math.inf
        self._let_go(without=self.weather.sky.poisoned)
        self.weather.sky = Sky()
        self._let_go(without=frozenset())

    def _let_go(self, without: frozenset[Aggregate]) -> None:
        for number in range(100):
            stuck = [
                row.event.id
                for row in self.memory.rows.values()
                if row.state in WAITING and row.event.aggregate not in without and not self._waits_for_a_person(row)
            ]
            if not stuck:
                return
            self.memory.enqueue(("goes on", f"new {number} {len(self.memory.rows)}"), ["a:1", "b:1", "c:1"])
            self.memory.now += POLICY.backoff_max
            self.workers[0].run_once()
        raise AssertionError(f"these events still wait: {stuck}")

    def _waits_for_a_person(self, row: Row) -> bool:
        wait = self.memory.waits.get(row.event.aggregate)
        return wait is not None and wait.due_at == math.inf


# Whoever wants to know why it fails adds Phase.shrink, and some minutes.
RelayUnderWeather.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
TestRelayUnderWeather = RelayUnderWeather.TestCase
