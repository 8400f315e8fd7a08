"""`Store` without a database: what its statements say in SQL is said in plain Python, on a clock that a test turns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import cast

from outbox_relay.conflation import Covered, Took
from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.event import GAP_ALONE, Clock, Event, Hold
from outbox_relay.outcome import GivenUp, Held, Owed, Policy, Settlement
from outbox_relay.policy import expired
from outbox_relay.store import Batch, Claim, Lane

Aggregate = tuple[str, str]

BLINK = 0.001
"""Seconds that a request, a reply or a transaction takes."""
WAITING = frozenset({"pending", "parked"})
WINDOW = 4
"""How many times as many events are looked at where a type is conflated."""
ENDED = frozenset({"delivered", "superseded", "expired", "dead", "discarded"})


@dataclass
class Row:
    event: Event
    state: str = "pending"
    accepted: list[str] = field(default_factory=list)
    ending: str | None = None
    error: str | None = None


@dataclass
class Wait:
    """A row of outbox_hold."""

    hold: Hold
    due_at: float


class Memory:
    """The outbox. Two of `aggregates` share each lane; those that come on top are all in one.

    `quota`: no more events of a lane than that are read, as where they are large, or many lanes have work.
    """

    wake_up = None

    def __init__(self, aggregates: Sequence[Aggregate]) -> None:
        self._aggregates = aggregates
        self.now = 1_000.0
        self.quota = math.inf
        self.rows: dict[int, Row] = {}
        self.waits: dict[Aggregate, Wait] = {}
        self.fails_to_settle = False

    def enqueue(
        self,
        aggregate: Aggregate,
        channels: list[str],
        *,
        kind: str = "change",
        version: int | None = None,
        expires_at: float | None = None,
    ) -> Event:
        """An event, by default of a version of its own."""
        id_ = len(self.rows) + 1
        event = Event(
            id_,
            f"event {id_}",
            *aggregate,
            lane=self._lane(aggregate),
            version=id_ if version is None else version,
            kind=kind,
            channels=channels,
            payload="{}",
            tags=None,
            accepted=None,
            created_at=self.now,
            expires_at=expires_at,
        )
        self.rows[id_] = Row(event)
        return event

    def of(self, aggregate: Aggregate, *states: str) -> list[Row]:
        """An aggregate's events in these states, in id order."""
        return [row for row in self.rows.values() if row.event.aggregate == aggregate and row.state in states]

    # What a worker asks of its store.

    def prove_writable(self) -> None:
        pass

    def rehearse(self, ids: Sequence[int]) -> None:
        pass

    def request_deadline(self) -> float | None:
        return math.inf

    @contextmanager
    def batch(self) -> Iterator[None]:
        rows = {id_: replace(row, accepted=list(row.accepted)) for id_, row in self.rows.items()}
        waits = {aggregate: Wait(wait.hold, wait.due_at) for aggregate, wait in self.waits.items()}
        try:
            yield
        except BaseException:
            self.rows, self.waits = rows, waits
            raise
        self.now += BLINK

    def claim(self, after: int, lanes: int) -> Claim:
        due = {self._lane(aggregate) for aggregate, wait in self.waits.items() if wait.due_at <= self.now}
        pending = {row.event.lane for row in self.rows.values() if row.state == "pending"}
        count = 1 + len(self._aggregates) // 2
        order = [(after + step) % count for step in range(1, count + 1)]
        return Claim(
            [Lane(lane, lane in due) for lane in order if lane in due | pending][:lanes],
            cast(Clock, _Now(self)),
        )

    def read(
        self,
        lanes: Sequence[Lane],
        *,
        events: int,
        per_lane: int,
        max_bytes: int,
        conflated: Mapping[str, Policy] | None = None,
        now: float = 0.0,
    ) -> Batch:
        batch = Batch()
        quota = int(min(per_lane * (WINDOW if conflated else 1), self.quota))
        due: list[Event] = []
        for aggregate, wait in self.waits.items():
            if wait.due_at <= self.now and Lane(self._lane(aggregate), True) in lanes:
                batch.holds[aggregate] = wait.hold
                due += [self._sent(row) for row in self.of(aggregate, "parked")[:quota]]
        met: list[Row] = []
        for lane, _ in lanes:
            mine = [row for row in self.rows.values() if row.event.lane == lane and row.state == "pending"]
            met += mine[:quota]
        for row in met:
            if row.event.aggregate in self.waits:
                row.state = "parked"
                batch.parked += 1
        free = [self._sent(row) for row in met if row.state == "pending"]
        for events_of in (due, free):
            needless = self.needless(events_of, conflated or {}, now, batch.covered)
            batch.events += [event for event in sorted(events_of, key=attrgetter("id")) if event.id not in needless]
        return batch

    @staticmethod
    def needless(
        events: Sequence[Event], conflated: Mapping[str, Policy], now: float, covered: dict[int, Covered]
    ) -> set[int]:
        """From each last snapshot or tombstone back to the first event that it does not stand for."""
        needless: set[int] = set()
        for aggregate in {event.aggregate for event in events if event.aggregate_type in conflated}:
            policy = conflated[aggregate[0]]
            mine = sorted((event for event in events if event.aggregate == aggregate), key=attrgetter("id"))
            over = {event.id for event in mine if event.ending or expired(event, now, policy)}
            lasts = [event for event in mine if event.kind in {"snapshot", "tombstone"} and event.id not in over]
            superseded: list[int] = []
            ended: list[int] = []
            for event in reversed([event for event in mine if lasts and event.id < lasts[-1].id]):
                waits = event.ending == "dead" and policy.wait_after_dead
                if waits or event.version > lasts[-1].version or not {*event.channels} <= {*lasts[-1].channels}:
                    break
                (ended if event.id in over else superseded).append(event.id)
            if superseded or ended:
                covered[lasts[-1].id] = Covered(_array(superseded), _array(ended))
            needless |= {*superseded, *ended}
        return needless

    def settle(
        self,
        delivered: Sequence[int],
        refused: Sequence[Settlement],
        holds: Mapping[Aggregate, Hold],
        stood_for: Sequence[Took] = (),
    ) -> Counter[str]:
        if self.fails_to_settle:
            raise DatabaseUnavailableError("while settling")
        needless = Counter(end for took in stood_for for end in self._stood_for(took))
        for id_ in delivered:
            self.rows[id_].state, self.rows[id_].ending = "delivered", None
        held: set[Aggregate] = set()
        for event, outcome, accepted in refused:
            row = self.rows[event.id]
            if accepted:
                row.accepted = [*(event.accepted or ()), *accepted]
            match outcome:
                case Held():
                    row.state, row.ending = "parked", event.ending
                    self._hold(event, outcome, self.now + outcome.delay)
                    held.add(event.aggregate)
                case Owed():
                    row.state, row.ending = "parked", outcome.ending
                    self._hold(event, Held(0, 0, 0.0, outcome.error), self.now)
                    held.add(event.aggregate)
                case GivenUp():
                    row.state, row.ending, row.error = outcome.state, None, outcome.error
                    if outcome.wait:
                        self._hold(event, Held(0, 0, 0.0, ""), math.inf)
                        held.add(event.aggregate)
        for aggregate in holds.keys() - held:
            self._release(aggregate)
        return needless

    def _stood_for(self, took: Took) -> Iterator[str]:
        """What has ended is named; the rest remembers who has accepted the one in its place."""
        for array, ended in zip(took.covered, (False, True), strict=True):
            for row in [self.rows[int(id_)] for id_ in array[1:-1].split(",")] if array else []:
                accepted = [c for c in row.event.channels if took.channels is None or c in took.channels]
                row.accepted += [channel for channel in accepted if channel not in row.accepted]
                if {*row.event.channels} <= {*row.accepted}:
                    row.state = row.ending or "expired" if ended else "superseded"
                    row.ending = None
                    yield row.state
                elif took.wait:
                    row.state = "parked"

    # What an operator does, as `Operator` does it.

    def discard(self, row: Row) -> None:
        if row.state == "dead" or row.ending is not None:
            row.state, row.ending = "discarded", None
        else:
            row.ending = "discarded"
        self._move_on(row.event.aggregate)

    def requeue(self, row: Row) -> None:
        if GAP_ALONE in row.accepted:
            row.accepted = row.accepted[: row.accepted.index(GAP_ALONE)]
        row.state, row.error = "parked" if row.event.aggregate in self.waits else "pending", None
        self._move_on(row.event.aggregate)

    def gone_out_after(self, row: Row) -> bool:
        """Whether a later event of its aggregate was delivered, or accepted by some channel."""
        return any(
            other.event.id > row.event.id and (other.state == "delivered" or other.accepted)
            for other in self.of(row.event.aggregate, *WAITING, *ENDED)
        )

    def _move_on(self, aggregate: Aggregate) -> None:
        wait = self.waits.get(aggregate)
        if wait is None or (wait.due_at == math.inf and self.rows[wait.hold.head_id].state == "dead"):
            return
        parked = self.of(aggregate, "parked")
        if parked and (wait.due_at == math.inf or self.rows[wait.hold.head_id].ending is not None):
            self.waits[aggregate] = Wait(Hold(parked[0].event.id, 0, 0, False, self.now, self.now), self.now)
        else:
            self._release(aggregate)

    def _sent(self, row: Row) -> Event:
        wait = self.waits.get(row.event.aggregate)
        tried = wait is not None and wait.hold.head_id == row.event.id and wait.hold.tries > 0
        return replace(row.event, accepted=list(row.accepted) or None, ending=row.ending, tried=tried)

    def _hold(self, event: Event, outcome: Held, due_at: float) -> None:
        known = self.waits.get(event.aggregate)
        same = known is not None and known.hold.head_id == event.id
        first = known.hold.first_refused_at if known is not None and same else self.now
        hold = Hold(event.id, outcome.tries, outcome.attempts, outcome.alone, first, self.now)
        self.waits[event.aggregate] = Wait(hold, due_at)

    def _lane(self, aggregate: Aggregate) -> int:
        return 1 + self._aggregates.index(aggregate) // 2 if aggregate in self._aggregates else 0

    def _release(self, aggregate: Aggregate) -> None:
        parked = self.of(aggregate, "parked")
        if not parked:
            del self.waits[aggregate]
        elif parked[0].event.id != self.waits[aggregate].hold.head_id:
            self.waits[aggregate] = Wait(Hold(parked[0].event.id, 0, 0, False, self.now, self.now), self.now)


def _array(ids: Sequence[int]) -> str | None:
    return f"{{{','.join(map(str, ids))}}}" if ids else None


class _Now:
    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def now(self) -> float:
        return self._memory.now
