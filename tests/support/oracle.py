"""The judge of a run: what was committed against what was published and received. Pure: histories in, sentences out.

It knows the promise and nothing of the relay. The invariants are numbered as in the project's list of hazards: every
committed event arrives or its row says why not (I1), nothing else does (I2), first deliveries of an aggregate on a
channel are a gapless prefix (I3), nothing is repeated but what a fault met in flight (I4), what a subscriber that
compares versions shows at the end is what the table says (I5), and after the healing nothing is left (I6).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

LONGEST: Final = 60.0
"""Seconds that no fault lasts."""
DROPPED: Final = -1
"""In place of an error's code: Centrifugo has that version of the object in its map channel, or a newer one."""

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
    was told so; None where it was not. `repeated`: the proxy itself sent it twice. `publications` says which one each
    event is in: those of one number are a bundle, in order, all or none. Empty where each event has its own.
    `began_at` is when the transaction began in which it was sent; None where only the request is known.
    """

    at: float
    events: Sequence[tuple[str, Sequence[str], bool]]
    codes: Sequence[Sequence[int]] = ()
    executed_at: float = 0.0
    answered_at: float | None = None
    repeated: bool = False
    publications: Sequence[int] = ()
    began_at: float | None = None

    @property
    def began(self) -> float:
        return self.at if self.began_at is None else self.began_at

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
    """Events that nobody need have heard of: they ended with a gap that Centrifugo refused as well."""
    superseded: set[str] = field(default_factory=set)
    """Events of which the table says that something newer was accepted in their place."""
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
    covers: Container[str] = frozenset()
    """Snapshots and tombstones of types that are conflated: each makes all older events of its object needless."""
    rising: Container[str] = frozenset()
    """Channels in which Centrifugo itself drops what is not newer than what it has of an object: maps, exclusive
    ones."""
    maps: Mapping[str, Mapping[Aggregate, int]] = field(default_factory=dict)
    """What each map channel holds at the end: the objects' versions."""


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
    doubtful = _in_doubt(history)
    swallowed = _swallowed(history.sent)
    excused = _excused(history)
    found: list[str] = []
    late = 0
    for stream in history.owed.keys() | history.heard.keys():
        judged = judge_stream(
            history.owed.get(stream, []),
            history.heard.get(stream, []),
            excused=excused(stream),
            ended=history.rows.ended,
            late=may_be_late,
            asked=history.asked,
            doubtful=doubtful,
            swallowed=swallowed.get(stream[1], frozenset()),
            rising=stream[1] in history.rising,
        )
        found += [f"{text} (channel {stream[1]})" for text in judged.violations]
        late += judged.late
    if history.sent:
        found += list(_published(history, excused))
        found += list(_sent_in_order(history, excused, doubtful))
    found += [f"blamed: {key} is dead and was no poison" for key in history.rows.dead if key not in history.poison]
    found += list(_false_gaps(history))
    found += [f"unfinished: {key} has not ended" for key in history.rows.unfinished]
    found += list(_stale(history, excused))
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
    doubtful: Container[str] = frozenset(),
    swallowed: Container[str] = frozenset(),
    rising: bool = False,
) -> Judged:
    """Judge what was heard of an aggregate on a channel.

    Each delivery is the successor of the one before, or a step back of which the way forward is then repeated: after
    a crash the events of a batch come again. A gap is as good as the event in whose place it comes. `excused` events
    need not come. `late` ones may come again, or after their successors where they are `excused`, `ended` or `asked`
    for. A `doubtful` one, and what follows it, may come before what it stands in for. On the way forward again,
    `swallowed` ones may be missing. Where versions are `rising` nothing comes again. After a hole the stream may go on
    anywhere.
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
        if rising and not holes and place <= last:
            found.append(f"order: {fact} arrived after {owed[last]}, where versions only rise")
        if delivery.gap and again:
            # It was sent, not settled because of a fault, and has expired before it could be sent again.
            continue
        if place < last and (
            (fact.key in late and (again or otherwise or fact.key in asked))
            or (not again and any(owed[between].key in doubtful for between in range(place + 1, last + 1)))
        ):
            surfaced += 1
            seen.add(place)
            continue
        if anywhere:
            anywhere, last = False, place - 1
        missed = before[place] - before[last + 1] if place > last else 0
        if missed and swallowed:
            missed -= sum(owed[between].key in swallowed for between in range(last + 1, place))
        if missed > 0 and fact.key not in doubtful:
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
        newer = [place for place in range(last + 1, len(owed)) if before[place + 1] > before[place]]
        if seen and any(owed[place].key not in swallowed for place in newer):
            found.append(f"stale: {owed[last].aggregate} ended at {owed[last]} though {owed[newer[-1]]} is newer")
    return Judged(found, duplicates, surfaced)


def bill(history: History) -> tuple[list[Bill], list[str]]:
    """Charge every event that was accepted once more to the fault that met it in flight.

    In flight is what is sent in a transaction that has not committed when the fault strikes; also what is sent after
    the healing, by a relay that does not know yet that its session was ended.
    """
    faults = sorted(history.faults, key=lambda fault: fault.at)
    strikes = [fault.at for fault in faults]
    settled = history.rows.settled_at
    charged: Counter[int] = Counter()
    in_flight: Counter[int] = Counter()
    found: list[str] = []
    last_began: dict[tuple[str, bool, str], float] = {}
    for request in history.sent:
        carried = {key for key, _, _ in request.events}
        for number in range(bisect_right(strikes, request.began - LONGEST), len(faults)):
            fault = faults[number]
            if fault.healed < request.began:
                continue
            met = sum(settled.get(key, request.executed_at) > fault.at for key in carried)
            if fault.at > request.at and not met:
                break
            in_flight[number] += met
        again: dict[str, float] = {}
        for (key, channels, gap), codes in zip(request.events, request.codes, strict=False):
            for channel, code in zip(channels, codes, strict=True):
                if not code:
                    before = last_began.get((key, gap, channel))
                    last_began[key, gap, channel] = request.began
                    if before is not None and key not in history.asked:
                        again[key] = before
        for key, before in again.items():
            # The last fault that met it: in a transaction from before the healing, and not settled when it struck.
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
    """Events of requests whose outcome the relay could not know, or that a middle box repeated.

    An event that is sent again before its request is answered was given up: the answer comes to nobody, or to a zombie.
    """
    keys: set[str] = set()
    answered: dict[str, float] = {}
    for request in sent:
        carried = {key for key, _, _ in request.events}
        keys.update(key for key in carried if answered.get(key, 0.0) > request.at)
        if request.answered_at is not None:
            answered.update((key, max(answered.get(key, 0.0), request.answered_at)) for key in carried)
        if request.answered_at is None or request.repeated:
            keys.update(key for key, _, _ in request.events)
        else:
            keys.update(key for (key, _, _), codes in zip(request.events, request.codes, strict=False) if 100 in codes)
    return keys


ExcusedOn = Callable[[Stream], Container[str]]


def _excused(history: History) -> ExcusedOn:
    """Which events nobody need have heard of in a stream.

    Beside `Rows.excused` they are those in whose place something newer was accepted there, before they were settled:
    a later snapshot or tombstone, of which the relay was told; or, where Centrifugo keeps versions, anything newer. The
    row says that they are superseded, or they were accepted on another one of their channels.
    """
    told: dict[tuple[str, str], float] = {}  # by event and channel: when a relay first knew of its acceptance
    executed: dict[tuple[str, str], float] = {}  # the same: when Centrifugo accepted it
    accepted: set[str] = set()
    never = float("inf")
    conflated = {stream[0] for stream, facts in history.owed.items() if any(f.key in history.covers for f in facts)}
    streams = [stream for stream in history.owed if stream[0] in conflated or stream[1] in history.rising]
    concerned = {fact.key for stream in streams for fact in history.owed[stream]}
    for request in history.sent:
        for (key, channels, gap), codes in zip(request.events, request.codes, strict=False):
            if key not in concerned or gap:
                continue
            for channel, code in zip(channels, codes, strict=True):
                if not code:
                    accepted.add(key)
                    executed[key, channel] = min(executed.get((key, channel), never), request.executed_at)
                    if request.answered_at is not None:
                        told[key, channel] = min(told.get((key, channel), never), request.answered_at)
    also: dict[Stream, set[str]] = {}
    for stream in streams:
        channel = stream[1]
        covered = overtaken = never  # since when there is something newer than the fact at hand
        for fact in reversed(history.owed[stream]):
            key, at = fact.key, history.rows.settled_at.get(fact.key, 0.0)
            superseded = key in history.rows.superseded
            if min(covered, overtaken) <= at and (superseded or key in accepted):
                also.setdefault(stream, set(history.rows.excused)).add(key)
            if key in history.covers:
                covered = min(covered, told.get((key, channel), never))
            if channel in history.rising:
                overtaken = min(overtaken, executed.get((key, channel), never))
    return lambda stream: also.get(stream, history.rows.excused)


def _published(history: History, excused: ExcusedOn) -> Iterable[str]:
    """I1 at the proxy: Centrifugo accepted every owed event on each of its channels."""
    accepted: dict[str, set[str]] = defaultdict(set)
    for request in history.sent:
        for (key, channels, _), codes in zip(request.events, request.codes, strict=False):
            accepted[key].update(channel for channel, code in zip(channels, codes, strict=True) if not code)
    for stream, facts in history.owed.items():
        channel, needless = stream[1], excused(stream)
        for fact in facts:
            if channel not in accepted.get(fact.key, ()) and fact.key not in needless:
                yield f"loss: {fact} was never accepted on {channel}"


def _in_doubt(history: History) -> set[str]:
    """Those of `covers` that a fault met before they were settled.

    It may be that no relay knew, or could write down, that they had been accepted. Then what they were to stand in for
    may be sent after all, where it is read without them.
    """
    found: set[str] = set()
    faults = sorted((fault.at, fault.healed) for fault in history.faults)
    strikes = [at for at, _ in faults]
    for request in history.sent:
        for key, _, _ in request.events:
            if key in history.covers and key not in found:
                settled_at = history.rows.settled_at.get(key, request.executed_at)
                meant = range(bisect_right(strikes, request.began - LONGEST), bisect_left(strikes, settled_at))
                if any(faults[number][1] >= request.began for number in meant):
                    found.add(key)
    return found


def _swallowed(sent: Iterable[Sent]) -> dict[str, set[str]]:
    """By channel that takes bundles, events that were accepted more than once.

    In other company a copy comes under another key, so some copies are heard, and Centrifugo swallows others.
    """
    bundles = {channel for request in sent if request.publications for channel in _bundled(request)}
    once: set[tuple[str, str]] = set()
    again: dict[str, set[str]] = defaultdict(set)
    for request in sent:
        for (key, channels, _), codes in zip(request.events, request.codes, strict=False):
            for channel, code in zip(channels, codes, strict=True):
                if channel in bundles and not code:
                    if (key, channel) in once:
                        again[channel].add(key)
                    once.add((key, channel))
    return again


def _bundled(request: Sent) -> set[str]:
    """The channels of its bundles."""
    size = Counter(request.publications)
    pairs = zip(request.events, request.publications, strict=True)
    return {channel for (_, channels, _), number in pairs if size[number] > 1 for channel in channels}


def _sent_in_order(history: History, excused: ExcusedOn, doubtful: Container[str]) -> Iterable[str]:
    """I3 at the proxy: when an event is first sent, its relay knows that all its predecessors have ended.

    Or they are before it in its bundle, or they are excused because it stands in for them: see `_in_doubt`.
    """
    places: dict[str, list[tuple[Stream, int]]] = defaultdict(list)
    for stream, facts in history.owed.items():
        for place, fact in enumerate(facts):
            places[fact.key].append((stream, place))
    answers = sorted(
        (request.answered_at, number) for number, request in enumerate(history.sent) if request.answered_at is not None
    )
    told = 0
    accepted: set[tuple[str, str]] = set()
    next_place: dict[Stream, int] = defaultdict(int)
    first_sent: set[tuple[str, str]] = set()
    for request in sorted(history.sent, key=lambda request: request.at):
        while told < len(answers) and answers[told][0] <= request.at:
            answered = history.sent[answers[told][1]]
            told += 1
            for (key, channels, _), codes in zip(answered.events, answered.codes, strict=False):
                accepted.update((key, channel) for channel, code in zip(channels, codes, strict=True) if not code)
        before: set[tuple[int, str, str]] = set()  # what is in this request so far: its publication, itself, a channel
        for number, (key, channels, _) in enumerate(request.events):
            publication = request.publications[number] if request.publications else number
            for stream, place in places[key]:
                facts, channel, needless = history.owed[stream], stream[1], excused(stream)
                if channel not in channels or (key, channel) in first_sent or key in history.asked:
                    continue
                first_sent.add((key, channel))
                reached = next_place[stream]
                while reached < place and (
                    (facts[reached].key, channel) in accepted
                    or facts[reached].key in needless
                    or facts[reached].key in history.asked
                ):
                    reached += 1
                next_place[stream] = max(next_place[stream], reached)
                while reached < place and (
                    (publication, facts[reached].key, channel) in before
                    or facts[reached].key in needless
                    or facts[reached].key in history.asked
                ):
                    reached += 1
                if reached < place and key not in doubtful:
                    yield f"order: {facts[place]} was sent on {channel} while {facts[reached]} had not ended"
            if request.publications:
                before.update((publication, key, channel) for channel in channels)


def _false_gaps(history: History) -> Iterable[str]:
    """A gap is told of an event that will not come, and of no other."""
    may = history.rows.ended | history.rows.excused | history.rows.superseded | history.asked | history.retried
    for stream, heard in history.heard.items():
        for fact in heard:
            if isinstance(fact, Fact) and fact.gap and fact.key not in may:
                yield f"gap: {fact} was told on {stream[1]} and has not ended so"


def _stale(history: History, excused: ExcusedOn) -> Iterable[str]:
    """I5: who keeps the newest version heard shows what the table says; a subscriber with holes reads the table.

    So does who comes later, and loads what a map channel holds.
    """
    if not history.whole:
        return
    for (aggregate, channel), facts in history.owed.items():
        needless = excused((aggregate, channel))
        owed = [fact for fact in facts if fact.key not in needless]
        if not owed or owed[-1].version != history.rows.versions.get(aggregate, owed[-1].version):
            continue
        heard = history.heard.get((aggregate, channel), ())
        newest = max((fact.version for fact in heard if isinstance(fact, Fact)), default=0)
        if newest != owed[-1].version:
            yield f"stale: {aggregate} shows version {newest} on {channel}, the table has {owed[-1].version}"
        held = history.maps[channel].get(aggregate, 0) if channel in history.maps else newest
        if held != newest:
            yield f"stale: {channel} holds version {held} of {aggregate}, and told of {newest}"
