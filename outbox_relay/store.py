"""Every SQL statement the relay runs: claim, read, park, settle, and what status and check ask.

A `Store` is one connection of one worker. A batch is one transaction, `batch()`; inside it the locked rows
of `outbox_lane` are the fence, and everything that changes an event's or a hold's state happens under them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import errors

from outbox_relay import conflation
from outbox_relay.conflation import Covered, Took, kept
from outbox_relay.database import DatabaseUnavailableError, bigints, one_line
from outbox_relay.event import Clock, Event, Hold, boottime
from outbox_relay.outcome import SUPERSEDED, GivenUp, Held, Owed, Policy, Settlement
from outbox_relay.start_hint import Seen, SharedHint, StartHint, hinted, start_in
from outbox_relay.upkeep import Upkeep

SWEEP: Final = 10_000
DUE_HOLDS: Final = 256
SETTLE_TRIES: Final = 3
# Passing trouble between transactions, nothing that publishing had a part in: the statements alone are retried.
_RETRIED: Final = (errors.SerializationFailure, errors.DeadlockDetected, errors.LockNotAvailable)


class Lane(NamedTuple):
    lane: int
    has_due_hold: bool


class Claim(NamedTuple):
    lanes: list[Lane]
    clock: Clock


@dataclass(slots=True)
class Batch:
    """What one claim brought: events in the order in which they may be sent, and the holds that are due."""

    events: list[Event] = field(default_factory=list)
    holds: dict[tuple[str, str], Hold] = field(default_factory=dict)
    parked: int = 0
    covered: dict[int, Covered] = field(default_factory=dict)
    """By the id of an event, those that it stands for."""


_EVENT: Final = [field.name for field in fields(Event)]
_ID, _LANE, _PAYLOAD = map(_EVENT.index, ("id", "lane", "payload"))
_FIELDS: Final = """id, event_id::text, aggregate_type, aggregate_id, lane, version, kind::text, channels,
    CASE WHEN held IS NULL THEN payload::text END, tags::text, accepted, date_part('epoch', created_at), replay,
    base_version, (SELECT {outbox_epoch}()), date_part('epoch', expires_at), ending::text"""
_COLUMNS: Final = f"{_FIELDS}, false"
_HOLD_COLUMNS: Final = "hold_type, hold_id, head_id, tries, attempts, alone, first_refused_at, refused_at"
_DUE_COLUMNS: Final = f"""{_FIELDS}, coalesce(id = head_id AND tries > 0, false),
    hold_type, hold_id, head_id, tries, attempts, alone,
    date_part('epoch', first_refused_at), date_part('epoch', refused_at)"""

# The first lane after `lane`, up to part.high, that has pending events. Where lanes have starts of their own the very
# next one is looked at from there, before the others. Here and below the lane is asked for as a range: only the index
# by lane has this order. With `=` the planner may walk through another one instead, where statistics say that most rows
# are in one lane.
_NEXT_PENDING: Final = (
    hinted("""
    coalesce(
        (SELECT {lane} FROM {outbox} AS o
         WHERE {own_starts} > 0 AND lane < part.high
           AND {lane} BETWEEN lane + 1 AND lane + 1 AND o.id >= {start_in} AND o.state = 'pending'
         ORDER BY {lane}, o.id LIMIT 1),
        (SELECT {lane} FROM {outbox} AS o
         WHERE {lane} > lane + least({own_starts}, 1) AND {lane} <= part.high
           AND o.id >= {start} AND o.state = 'pending'
         ORDER BY {lane}, o.id LIMIT 1))
""")
    .replace("{start_in}", start_in("lane + 1"))
    .replace("{own_starts}", "cardinality(%(starts)s::bigint[])")
)

# From one busy lane to the next, so that a single event costs a few buffers, round the circle of lanes. The next lane
# with pending events is looked for once: between two of them may be many that only have a hold among those longest due.
_CLAIM: Final = hinted("""
SELECT l.lane, coalesce(l.lane = ANY(due.lanes), false), date_part('epoch', clock_timestamp())
FROM (
    SELECT array_agg(h.lane) AS lanes
    FROM (SELECT lane FROM {outbox_hold} WHERE {is_due}
          ORDER BY due_at LIMIT %(holds)s) AS h
) AS due
CROSS JOIN (VALUES (%(after)s::smallint, 255::smallint), (-1::smallint, %(after)s::smallint)) AS part(low, high)
CROSS JOIN LATERAL (
    WITH RECURSIVE busy(lane, pending) AS (
        SELECT part.low, part.low
        UNION ALL
        SELECT least(next.pending, (SELECT min(lane) FROM unnest(due.lanes) AS lane
                                    WHERE lane > next.after AND lane <= part.high)), next.pending
        FROM (
            SELECT lane AS after, CASE WHEN lane = pending THEN {next_pending} ELSE pending END AS pending FROM busy
            OFFSET 0
        ) AS next
        WHERE next.after IS NOT NULL
    )
    SELECT lane FROM busy WHERE lane > part.low
) AS busy
CROSS JOIN LATERAL (
    SELECT c.lane FROM {outbox_lane} AS c WHERE c.lane = busy.lane FOR NO KEY UPDATE SKIP LOCKED
) AS l
LIMIT %(limit)s
""").replace("{next_pending}", _NEXT_PENDING)

_PENDING: Final = """
    FROM (
        SELECT lane, CASE WHEN (SELECT true FROM {outbox_hold} LIMIT 1) THEN (
            SELECT true FROM {outbox_hold} AS h WHERE h.lane BETWEEN lanes.lane AND lanes.lane
            ORDER BY h.lane DESC, h.due_at DESC LIMIT 1) END AS has_hold
        FROM unnest(%(lanes)s::smallint[]) AS lanes(lane)
        OFFSET 0
    ) AS l
    CROSS JOIN LATERAL (
        SELECT l.lane, o.* FROM {outbox} AS o
        WHERE {lane} BETWEEN l.lane AND l.lane AND o.id >= {start_in} AND o.state = 'pending'
        ORDER BY {lane}, o.id LIMIT %(quota)s
    ) AS e
""".replace("{start_in}", start_in("l.lane"))

# Not a join: whatever the statistics say, a scalar subquery is one probe of the primary key. In a lane where nothing is
# on hold there is none.
_IS_HELD: Final = """
    CASE WHEN l.has_hold THEN (
        SELECT true FROM {outbox_hold} AS h
        WHERE h.aggregate_type = e.aggregate_type AND h.aggregate_id = e.aggregate_id) END
"""

# The bytes of all rows up to a row bound the batch, but for the first one; id order makes the cut a suffix of every
# aggregate.
_READ_PENDING: Final = f"""
SELECT {_COLUMNS}
FROM (
    SELECT e.*, {_IS_HELD} AS held,
           sum(pg_column_size(e.payload)) OVER (ORDER BY e.id ROWS UNBOUNDED PRECEDING) AS bytes
    {_PENDING}
) AS e
WHERE bytes <= %(max_bytes)s OR bytes = pg_column_size(payload)
ORDER BY id
"""  # noqa: S608 - all of it is written here

_DUE: Final = hinted("""
    FROM (
        SELECT aggregate_type AS hold_type, aggregate_id AS hold_id, lane,
               head_id, tries, attempts, alone, first_refused_at, refused_at
        FROM {outbox_hold}
        WHERE lane = ANY(%(lanes)s::smallint[]) AND {is_due}
        ORDER BY due_at LIMIT %(holds)s
    ) AS h
    LEFT JOIN LATERAL (
        SELECT o.* FROM {outbox} AS o
        WHERE o.state = 'parked' AND o.aggregate_type = h.hold_type AND o.aggregate_id = h.hold_id
        ORDER BY o.id LIMIT %(quota)s
    ) AS e ON true
""")

_READ_DUE: Final = f"""
SELECT {_DUE_COLUMNS}
FROM (
    SELECT e.*, h.*, NULL AS held,
           sum(pg_column_size(e.payload)) OVER (ORDER BY e.id) - pg_column_size(e.payload) AS bytes_before
    {_DUE}
) AS e
WHERE bytes_before IS NULL OR bytes_before < %(max_bytes)s
ORDER BY id
"""  # noqa: S608

_KEPT_PENDING: Final = kept(f"e.lane, {_IS_HELD} AS held {_PENDING}", _COLUMNS)
_KEPT_DUE: Final = kept(f"h.lane, NULL AS held, {_HOLD_COLUMNS} {_DUE}", _DUE_COLUMNS, f"{_HOLD_COLUMNS},")

_PARK: Final = "UPDATE {outbox} SET state = 'parked' WHERE id = ANY(%(ids)s::bigint[]) AND state = 'pending'"

_SWEEP: Final = """
UPDATE {outbox} AS p SET state = 'parked'
FROM unnest(%(lanes)s::smallint[]) AS l(lane)
CROSS JOIN LATERAL (
    SELECT o.id, o.aggregate_type, o.aggregate_id FROM {outbox} AS o
    WHERE {lane} BETWEEN l.lane AND l.lane AND o.id >= {start_in} AND o.state = 'pending'
    ORDER BY {lane}, o.id LIMIT %(limit)s
) AS met
WHERE p.id = met.id AND p.state = 'pending'
  AND (SELECT true FROM {outbox_hold} AS h
       WHERE h.aggregate_type = met.aggregate_type AND h.aggregate_id = met.aggregate_id)
""".replace("{start_in}", start_in("l.lane"))

_DELIVERED: Final = """
UPDATE {outbox} SET state = 'delivered', settled_at = clock_timestamp(), accepted = NULL, error = NULL
WHERE id = ANY(%(ids)s::bigint[]) AND state IN ('pending', 'parked')
"""

_SUPERSEDED: Final = _DELIVERED.replace("'delivered'", "'superseded'")

# The reason of a dead event stays beside the one for which its gap is untold.
_ENDED: Final = """
UPDATE {outbox} AS o
SET state = s.state::{outbox_state}, settled_at = clock_timestamp(), ending = NULL,
    error = CASE WHEN o.ending IS NULL THEN coalesce(s.error, o.error)
                 ELSE nullif(concat_ws('; ', o.error, s.error), '') END
FROM unnest(%(ids)s::bigint[], %(states)s::text[], %(errors)s::text[]) AS s(id, state, error)
WHERE o.id = s.id AND o.state IN ('pending', 'parked')
"""

_HEAD_PARKED: Final = """
UPDATE {outbox} AS o
SET state = 'parked', ending = s.ending::{outbox_state}, error = coalesce(s.reason, o.error)
FROM unnest(%(ids)s::bigint[], %(endings)s::text[], %(reasons)s::text[]) AS s(id, ending, reason)
WHERE o.id = s.id AND o.state IN ('pending', 'parked')
"""

_ACCEPTED: Final = "UPDATE {outbox} SET accepted = %(accepted)s::text[] WHERE id = %(id)s"

_HOLD: Final = """
INSERT INTO {outbox_hold} AS h
    (aggregate_type, aggregate_id, head_id, due_at, tries, attempts, alone, first_refused_at, refused_at, error)
SELECT s.type, s.aggregate, s.id,
       CASE WHEN s.delay < 'infinity' THEN clock_timestamp() + s.delay * interval '1 second' ELSE 'infinity' END,
       s.tries, s.attempts, s.alone, clock_timestamp(), clock_timestamp(), s.error
FROM unnest(%(types)s::text[], %(aggregates)s::text[], %(ids)s::bigint[],
            %(delays)s::float8[], %(tries)s::int[], %(attempts)s::int[], %(alone)s::bool[], %(errors)s::text[])
     AS s(type, aggregate, id, delay, tries, attempts, alone, error)
ON CONFLICT (aggregate_type, aggregate_id) DO UPDATE SET
    due_at = excluded.due_at, tries = excluded.tries, attempts = excluded.attempts, alone = excluded.alone,
    error = excluded.error, refused_at = excluded.refused_at, head_id = excluded.head_id,
    first_refused_at = CASE WHEN h.head_id = excluded.head_id THEN h.first_refused_at
                            ELSE excluded.first_refused_at END
"""

_HELD_COLUMNS: Final = "types aggregates ids endings reasons delays tries attempts alone errors".split()  # noqa: SIM905

# The hold ends when nothing of the aggregate is parked any more; else its next event is due now, as a new head.
_RELEASE: Final = """
WITH due AS (
    SELECT s.type, s.id, (
        SELECT o.id FROM {outbox} AS o
        WHERE o.state = 'parked' AND o.aggregate_type = s.type AND o.aggregate_id = s.id
        ORDER BY o.id LIMIT 1
    ) AS next_id
    FROM unnest(%(types)s::text[], %(ids)s::text[]) AS s(type, id)
), ended AS (
    DELETE FROM {outbox_hold} AS h USING due
    WHERE h.aggregate_type = due.type AND h.aggregate_id = due.id AND due.next_id IS NULL
)
UPDATE {outbox_hold} AS h
SET head_id = due.next_id, due_at = clock_timestamp(), tries = 0, attempts = 0, alone = false, error = NULL,
    first_refused_at = clock_timestamp(), refused_at = clock_timestamp()
FROM due
WHERE h.aggregate_type = due.type AND h.aggregate_id = due.id AND h.head_id <> due.next_id
"""

_DELIVERED_AND_DELETED: Final = """
DELETE FROM {outbox} WHERE id = ANY(%(ids)s::bigint[]) AND state IN ('pending', 'parked')
"""

# Cheap enough to ask many times a second: index probes.
_IDLE: Final = hinted("""
SELECT (SELECT true FROM {outbox} AS o WHERE o.id >= {start} AND o.state = 'pending' ORDER BY {lane}, o.id LIMIT 1)
    OR (SELECT true FROM {outbox_hold} WHERE {is_due} ORDER BY due_at LIMIT 1), {drawn}
""")


class Store(Upkeep):
    """One worker's session with the outbox, and what delivers events.

    Takes what `Session` takes; without `keep_delivered` a delivered event's row is deleted. The stores of one relay
    `share` what they know.
    """

    def __init__(
        self, database_url: str, *, keep_delivered: bool = True, share: SharedHint | None = None, **options: Any
    ) -> None:
        super().__init__(database_url, **options)
        self._delivered = _DELIVERED if keep_delivered else _DELIVERED_AND_DELETED
        self._superseded = _SUPERSEDED if keep_delivered else _DELIVERED_AND_DELETED
        self._window = conflation.WINDOW
        self._hint = StartHint(self.execute, self.table, share or SharedHint(), usable=self.direct)
        self._sparse = True
        self._seen: Seen | None = None
        self._gone: Set[int] = frozenset()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """As that of a session; for one claim and what it brings."""
        self._seen, self._gone = None, frozenset()
        with super().batch():
            yield
        self._pass()

    def _pass(self) -> None:
        if self._seen is not None:
            self._hint.passed(self._seen.starts(self._gone))

    def claim(self, after: int, lanes: int) -> Claim:
        """Lock up to `lanes` lanes with something to do, the first one after lane `after`.

        The lock is a statement of its own: what it waited for is seen by the next statement's fresh snapshot.
        """
        self._hint.renew(sparse=self._sparse)
        bounds: dict[str, float | str] = {"after": after, "limit": lanes, "holds": DUE_HOLDS, **self._hint.parameters}
        rows = self.execute_with_waiting(_CLAIM, bounds).fetchall()
        self._sparse = len(rows) < lanes
        clock = Clock(rows[0][2] if rows else 0.0, boottime())
        return Claim([Lane(lane, due) for lane, due, _ in rows], clock)

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
        """Read what may be sent now from the locked lanes, and park what waits behind a hold.

        About `events` events, at least `per_lane` from each lane, `max_bytes` of payload, but one event always. Of the
        types in `conflated` only those that no later one makes needless; `now` is on the database's clock.
        """
        quota = max(per_lane, events // max(len(lanes), 1))
        due, pending, window = _READ_DUE, _READ_PENDING, 1
        bounds: dict[str, Any] = {"max_bytes": max_bytes, **self._hint.parameters}
        if conflated:
            due, pending, window = _KEPT_DUE, _KEPT_PENDING, self._window
            bounds |= {"most": quota * len(lanes), **conflation.parameters(conflated, now)}
        batch = Batch()
        on_hold = [lane.lane for lane in lanes if lane.has_due_hold]
        if on_hold:
            rows = self.execute(due, lanes=on_hold, holds=DUE_HOLDS, quota=per_lane * window, **bounds).fetchall()
            for row in conflation.uncovered(rows, batch.covered) if conflated else rows:
                aggregate_type, aggregate_id, *hold = row[len(_EVENT) :]
                batch.holds[aggregate_type, aggregate_id] = Hold(*hold)
                if row[_ID] is not None:
                    batch.events.append(Event(*row[: len(_EVENT)]))
        rows = self.execute(pending, lanes=[lane.lane for lane in lanes], quota=quota * window, **bounds).fetchall()
        if not conflated:
            lane_of, ids = [row[_LANE] for row in rows], [row[_ID] for row in rows]
            self._seen = Seen([lane.lane for lane in lanes], quota, lane_of, ids)
        self._take(batch, conflation.uncovered(rows, batch.covered) if conflated else rows, quota * window)
        self._window = conflation.next_window(window, len(batch.events), batch.covered.values())
        return batch

    def _take(self, batch: Batch, rows: Sequence[tuple[Any, ...]], quota: int) -> None:
        """Put what was read of the pending events into the batch; what came without its payload is held, and parked."""
        if rows:
            self._hint.read(len(rows), rows[-1][_ID])
        held: dict[int, list[int]] = {}
        for row in rows:
            if row[_PAYLOAD] is None:
                held.setdefault(row[_LANE], []).append(row[_ID])
        batch.events += [Event(*row) for row in rows if row[_PAYLOAD] is not None]
        if held:
            batch.parked = self._park(held, quota)

    def _park(self, held: Mapping[int, list[int]], quota: int) -> int:
        """Move what was met of held aggregates (ids by lane) out of the pending index: nobody meets it again."""
        parked = self.execute(_PARK, ids=[id_ for ids in held.values() for id_ in ids]).rowcount
        crowded = [lane for lane, ids in held.items() if 2 * len(ids) > quota]
        if crowded:
            limit = SWEEP // len(crowded)
            parked += self.execute(_SWEEP, lanes=crowded, limit=limit, **self._hint.parameters).rowcount
        return parked

    def rehearse(self, ids: Sequence[int]) -> None:
        """Write the outcome that these events would have if all are delivered, and take it back."""
        self.execute_raw("SAVEPOINT rehearsal")
        self.execute(self._delivered, ids=bigints(ids))
        self.roll_back_to("rehearsal")

    def settle(
        self,
        delivered: Sequence[int],
        refused: Sequence[Settlement],
        holds: Mapping[tuple[str, str], Hold],
        stood_for: Sequence[Took] = (),
    ) -> Counter[str]:
        """Write what became of a batch: the ids delivered, the refused ones' outcomes, and the due holds' ends.

        And the ends of those that others stood for, which are counted by state. It happens behind a savepoint, so that
        the lanes stay locked whatever happens to the statements.
        """
        self._gone = frozenset(delivered)
        left = SETTLE_TRIES
        while True:
            self.send_with_next("SAVEPOINT settle")
            try:
                # First: a hold ends when nothing of its aggregate is parked any more.
                ended = conflation.settle(self.execute, self._superseded, stood_for)
                self._settle(delivered, refused, holds)
            except _RETRIED:
                left -= 1
                if not left:
                    raise
                self.roll_back_to("settle")
            else:
                return ended

    def _settle(
        self, delivered: Sequence[int], refused: Sequence[Settlement], holds: Mapping[tuple[str, str], Hold]
    ) -> None:
        if delivered:
            self.execute_with_waiting(self._delivered, {"ids": bigints(delivered)}, last=not refused and not holds)
        superseded = [s.event.id for s in refused if s.outcome is SUPERSEDED]
        if superseded:
            self.execute(self._superseded, ids=bigints(superseded))
        ended = [
            (s.event.id, s.outcome) for s in refused if isinstance(s.outcome, GivenUp) and s.outcome is not SUPERSEDED
        ]
        if ended:
            self.execute(
                _ENDED,
                ids=[id_ for id_, _ in ended],
                states=[end.state for _, end in ended],
                errors=[end.error for _, end in ended],
            )
        held = [(s.event, *hold) for s in refused if (hold := _hold(s))]
        if held:
            rows = [
                (*e.aggregate, e.id, ending, reason, h.delay, h.tries, h.attempts, h.alone, h.error)
                for e, ending, reason, h in held
            ]
            columns = dict(zip(_HELD_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
            self.execute(_HEAD_PARKED, **columns)
            self.execute(_HOLD, **columns)
        for event, _, accepted in refused:
            if accepted:
                self.execute(_ACCEPTED, id=event.id, accepted=[*(event.accepted or ()), *accepted])
        released = holds.keys() - {event.aggregate for event, *_ in held}
        if released:
            self.execute(_RELEASE, types=[type_ for type_, _ in released], ids=[id_ for _, id_ in released])

    def anything_to_do(self) -> bool:
        """Whether some event is pending or some hold is due: the question of an idle relay."""
        if not self.direct:
            # A batch's settings come with a transaction alone.
            return self.ask(_IDLE, **self._hint.parameters)[0] is True
        try:
            self._hint.renew()
            [(anything, drawn)] = self.execute(_IDLE, **self._hint.parameters).fetchall()
        except psycopg.Error as error:
            raise DatabaseUnavailableError(one_line(error)) from error
        self._hint.drawn(drawn)
        return anything is True


def _hold(settlement: Settlement) -> tuple[str | None, str | None, Held] | None:
    """What makes an event the head of a hold: how it ends once its gap is told, the reason to keep, and the hold.

    A gap that is refused leaves the event's own reason as it is. Until the first try there is no wait; after a dead
    event there is one that only a person ends.
    """
    match settlement.outcome:
        case Held() as held:
            ending = settlement.event.ending
            return ending, None if ending else held.error, held
        case Owed(ending=ending, error=error):
            return ending, error, Held(0, 0, 0.0, error)
        case GivenUp(wait=True, error=error):
            return None, None, Held(0, 0, math.inf, error or "its head is dead")
    return None
