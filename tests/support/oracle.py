"""The judge of a run: what was committed against what was published and received. Pure: histories in, sentences out.

It knows the promise and nothing of the relay. The invariants are numbered as in the project's list of hazards: every
committed event arrives or its row says why not (I1), nothing else does (I2), first deliveries of an aggregate on a
channel are a gapless prefix (I3), nothing is repeated but what a fault met in flight (I4), what a subscriber that
compares versions shows at the end is what the table says (I5), and after the healing nothing is left (I6).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

LONGEST: Final = 60.0
"""Seconds that no fault lasts."""

Aggregate = tuple[str, str]
Stream = tuple[Aggregate, str]
"""An aggregate on a channel: what the promised order is of."""


class Fact(NamedTuple):
    """One event, as the writer committed it or as a subscriber received it. `key` is its event_id.

    A `gap` was received in the event's place: it says that the event will not come.
    """

    aggregate: Aggregate
    version: int
    key: str
    gap: bool = False


class Hole(NamedTuple):
    """A place where a subscriber lost its stream and loaded everything anew: what it missed nobody knows."""


Heard = Fact | Hole


@dataclass(slots=True)
class Sent:
    """A request of a relay, as the proxy before Centrifugo saw it. Times are seconds since 1970.

    `events` are keys, channels, and whether it is the event's gap. `codes` are what Centrifugo answered for each
    event's channels, 0 where it accepted; empty where it never executed the request. `answered_at` is when the relay
    was told so; None where it was not. `repeated`: the proxy itself sent it twice.
    """

    at: float
    events: Sequence[tuple[str, Sequence[str], bool]]
    codes: Sequence[Sequence[int]] = ()
    executed_at: float = 0.0
    answered_at: float | None = None
    repeated: bool = False

    def executed(self, at: float, codes: Sequence[Sequence[int]]) -> None:
        self.repeated = bool(self.codes)
        self.codes, self.executed_at = self.codes or codes, self.executed_at or at


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that was injected: from `at` until it was `healed`, both in seconds since 1970."""

    kind: str
    at: float
    healed: float


@dataclass(slots=True)
class Rows:
    """What the table says at the end."""

    ended: set[str] = field(default_factory=set)
    """Events that ended as expired, dead or discarded: they, or their gaps, were received."""
    excused: set[str] = field(default_factory=set)
    """Events that nobody need have heard of: superseded, or ended with a gap that Centrifugo refused as well."""
    dead: set[str] = field(default_factory=set)
    unfinished: set[str] = field(default_factory=set)
    """Events that are still pending or parked."""
    settled_at: dict[str, float] = field(default_factory=dict)
    versions: dict[Aggregate, int] = field(default_factory=dict)
    """The objects' own versions, of the application's table."""


@dataclass(slots=True)
class History:
    """All that is known of a run. Every list is in order of time; `owed` is in order of versions."""

    owed: dict[Stream, list[Fact]]
    heard: dict[Stream, list[Heard]]
    sent: Sequence[Sent] = ()
    faults: Sequence[Struck] = ()
    rows: Rows = field(default_factory=Rows)
    poison: Container[str] = frozenset()
    """Events that no relay could deliver: the only ones that may be dead."""
    asked: set[str] = field(default_factory=set)
    """Events that a person had sent again, after their successors perhaps: they have no place in any order."""
    retried: set[str] = field(default_factory=set)
    """Events that a person had sent again in their place, after their gaps were told."""
    whole: bool = True
    """Whether the subscriber's own stream has no hole: else the proxy's log says what was published."""


class Bill(NamedTuple):
    """What a fault cost: events sent again, and those that were in flight, the most that it may cost."""

    fault: Struck
    duplicates: int
    in_flight: int


class Verdict(NamedTuple):
    """`violations` is empty where the promise was kept."""

    violations: list[str]
    bills: list[Bill]
    late: int
    """Events that surfaced late, where the proxy shows a request without an answer."""


def violations(committed: Iterable[Fact], received: Iterable[Fact], duplicates_allowed: int = 0) -> list[str]:
    """Judge one subscriber of one channel; an empty list is a pass."""
    owed: dict[Stream, list[Fact]] = defaultdict(list)
    for fact in sorted(committed, key=lambda fact: fact.version):
        owed[fact.aggregate, ""].append(fact)
    heard: dict[Stream, list[Heard]] = defaultdict(list)
    for fact in received:
        heard[fact.aggregate, ""].append(fact)
    found: list[str] = []
    duplicates = 0
    for stream in owed.keys() | heard.keys():
        judged = judge_stream(owed.get(stream, []), heard.get(stream, []))
        found += judged.violations
        duplicates += judged.duplicates
    if duplicates > duplicates_allowed:
        found.append(f"duplicates: {duplicates}, allowed are {duplicates_allowed}")
    return found


def judge(history: History) -> Verdict:
    """Judge a whole run."""
    may_be_late = _unanswered(history.sent) | history.asked
    found: list[str] = []
    late = 0
    for stream in history.owed.keys() | history.heard.keys():
        judged = judge_stream(
            history.owed.get(stream, []),
            history.heard.get(stream, []),
            excused=history.rows.excused,
            ended=history.rows.ended,
            late=may_be_late,
            asked=history.asked,
        )
        found += [f"{text} (channel {stream[1]})" for text in judged.violations]
        late += judged.late
    if history.sent:
        found += list(_published(history))
        found += list(_sent_in_order(history))
    found += [f"blamed: {key} is dead and was no poison" for key in history.rows.dead if key not in history.poison]
    found += list(_false_gaps(history))
    found += [f"unfinished: {key} has not ended" for key in history.rows.unfinished]
    found += list(_stale(history))
    bills, free = bill(history)
    found += free
    return Verdict(found, bills, late)


class Judged(NamedTuple):
    violations: list[str]
    duplicates: int
    late: int


def judge_stream(
    owed: Sequence[Fact],
    heard: Iterable[Heard],
    *,
    excused: Container[str] = frozenset(),
    ended: Container[str] = frozenset(),
    late: Container[str] = frozenset(),
    asked: Container[str] = frozenset(),
) -> Judged:
    """Judge what was heard of an aggregate on a channel.

    Each delivery is the successor of the one before, or a step back of which the way forward is then repeated: after
    a crash the events of a batch come again. A gap is as good as the event in whose place it comes. `excused` events
    need not come. `late` ones may come again, or after their successors where they are `excused`, `ended` or `asked`
    for. After a hole the stream may go on anywhere.
    """
    position = {fact: place for place, fact in enumerate(owed)}
    # How many owed events there are before each place: what may be skipped does not count.
    before = [0]
    for fact in owed:
        before.append(before[-1] + (fact.key not in excused and fact.key not in asked))
    found: list[str] = []
    seen: set[int] = set()
    sound: set[str] = set()  # keys of events heard themselves, not their gaps
    last = -1
    duplicates = surfaced = 0
    holes = anywhere = False
    for delivery in heard:
        if isinstance(delivery, Hole):
            holes = anywhere = True
            continue
        fact = delivery._replace(gap=False) if delivery.gap else delivery
        otherwise = fact.key in ended or fact.key in excused
        place = position.get(fact)
        if place is None:
            found.append(f"phantom: {fact} was never committed")
            continue
        again = place in seen
        duplicates += again
        if delivery.gap and again:
            # It was sent, not settled because of a fault, and has expired before it could be sent again.
            continue
        if place < last and fact.key in late and (again or otherwise or fact.key in asked):
            surfaced += 1
            seen.add(place)
            continue
        if anywhere:
            anywhere, last = False, place - 1
        missed = before[place] - before[last + 1] if place > last else 0
        if missed:
            found.append(f"order: {fact} arrived {missed} event(s) too early")
        elif place < last and otherwise and not delivery.gap and not holes and fact.key not in sound:
            found.append(f"resurrected: {fact} had ended otherwise and arrived after {owed[last]}")
        seen.add(place)
        if not delivery.gap:
            sound.add(fact.key)
        last = place
    if not holes:
        found += [
            f"loss: {fact} never arrived"
            for place, fact in enumerate(owed)
            if place not in seen and fact.key not in excused
        ]
        if seen and before[-1] > before[last + 1]:
            newest = max(place for place in range(len(owed)) if before[place + 1] > before[place])
            found.append(f"stale: {owed[last].aggregate} ended at {owed[last]} though {owed[newest]} is newer")
    return Judged(found, duplicates, surfaced)


def bill(history: History) -> tuple[list[Bill], list[str]]:
    """Charge every event that was accepted once more to the fault that met it in flight."""
    faults = sorted(history.faults, key=lambda fault: fault.at)
    strikes = [fault.at for fault in faults]
    settled = history.rows.settled_at
    charged: Counter[int] = Counter()
    in_flight: Counter[int] = Counter()
    found: list[str] = []
    last_sent: dict[tuple[str, bool], float] = {}
    for request in history.sent:
        for number in range(bisect_right(strikes, request.at - LONGEST), len(faults)):
            fault = faults[number]
            if fault.healed < request.at:
                continue
            met = sum(settled.get(key, request.executed_at) > fault.at for key, _, _ in request.events)
            if fault.at > request.at and not met:
                break
            in_flight[number] += met
        for (key, _, gap), codes in zip(request.events, request.codes, strict=False):
            if 0 not in codes:
                continue
            before = last_sent.get((key, gap))
            last_sent[key, gap] = request.at
            if before is None or key in history.asked:
                continue
            # The last fault that met it: sent before the healing, and not settled when it struck.
            earlier = range(bisect_right(strikes, request.executed_at) - 1, -1, -1)
            guilty = next((number for number in earlier if before <= faults[number].healed), None)
            if guilty is None or settled.get(key, request.executed_at) <= faults[guilty].at:
                found.append(f"duplicates: {key} was sent again and no fault had met it in flight")
            else:
                charged[guilty] += 1
    bills = [Bill(fault, charged[number], in_flight[number]) for number, fault in enumerate(faults)]
    found += [
        f"duplicates: {cost.duplicates} after {cost.fault.kind!r}, {cost.in_flight} were in flight"
        for cost in bills
        if cost.duplicates > cost.in_flight
    ]
    return bills, found


def _unanswered(sent: Iterable[Sent]) -> set[str]:
    """Events of requests whose outcome the relay could not know, or that a middle box repeated."""
    keys: set[str] = set()
    for request in sent:
        if request.answered_at is None or request.repeated:
            keys.update(key for key, _, _ in request.events)
        else:
            keys.update(key for (key, _, _), codes in zip(request.events, request.codes, strict=False) if 100 in codes)
    return keys


def _published(history: History) -> Iterable[str]:
    """I1 at the proxy: Centrifugo accepted every owed event on each of its channels."""
    accepted: dict[str, set[str]] = defaultdict(set)
    for request in history.sent:
        for (key, channels, _), codes in zip(request.events, request.codes, strict=False):
            accepted[key].update(channel for channel, code in zip(channels, codes, strict=True) if not code)
    for (_, channel), facts in history.owed.items():
        for fact in facts:
            if channel not in accepted.get(fact.key, ()) and fact.key not in history.rows.excused:
                yield f"loss: {fact} was never accepted on {channel}"


def _sent_in_order(history: History) -> Iterable[str]:
    """I3 at the proxy: when an event is first sent, its relay knows that all its predecessors have ended."""
    places: dict[str, list[tuple[Stream, int]]] = defaultdict(list)
    for stream, facts in history.owed.items():
        for place, fact in enumerate(facts):
            places[fact.key].append((stream, place))
    answers = sorted(
        (request.answered_at, number) for number, request in enumerate(history.sent) if request.answered_at is not None
    )
    never_awaited = history.rows.excused | history.asked
    told = 0
    accepted: set[tuple[str, str]] = set()
    next_place: dict[Stream, int] = defaultdict(int)
    first_sent: set[str] = set()
    for request in sorted(history.sent, key=lambda request: request.at):
        while told < len(answers) and answers[told][0] <= request.at:
            answered = history.sent[answers[told][1]]
            told += 1
            for (key, channels, _), codes in zip(answered.events, answered.codes, strict=False):
                accepted.update((key, channel) for channel, code in zip(channels, codes, strict=True) if not code)
        for key, _, _ in request.events:
            if key in first_sent or key in history.asked:
                continue
            first_sent.add(key)
            for stream, place in places[key]:
                facts, channel = history.owed[stream], stream[1]
                reached = next_place[stream]
                while reached < place and (
                    (facts[reached].key, channel) in accepted or facts[reached].key in never_awaited
                ):
                    reached += 1
                next_place[stream] = max(next_place[stream], reached)
                if reached < place:
                    yield f"order: {facts[place]} was sent on {channel} while {facts[reached]} had not ended"


def _false_gaps(history: History) -> Iterable[str]:
    """A gap is told of an event that will not come, and of no other."""
    may = history.rows.ended | history.rows.excused | history.asked | history.retried
    for stream, heard in history.heard.items():
        for fact in heard:
            if isinstance(fact, Fact) and fact.gap and fact.key not in may:
                yield f"gap: {fact} was told on {stream[1]} and has not ended so"


def _stale(history: History) -> Iterable[str]:
    """I5: who keeps the newest version heard shows what the table says; a subscriber with holes reads the table."""
    if not history.whole:
        return
    for (aggregate, channel), facts in history.owed.items():
        owed = [fact for fact in facts if fact.key not in history.rows.excused]
        if not owed or owed[-1].version != history.rows.versions.get(aggregate, owed[-1].version):
            continue
        heard = history.heard.get((aggregate, channel), ())
        newest = max((fact.version for fact in heard if isinstance(fact, Fact)), default=0)
        if newest != owed[-1].version:
            yield f"stale: {aggregate} shows version {newest} on {channel}, the table has {owed[-1].version}"
