"""Every SQL statement the relay runs: claim, read, park, settle, and what status and check ask.

A `Store` is one connection of one worker. A batch is one transaction, `batch()`; inside it the locked rows
of `outbox_lane` are the fence, and everything that changes an event's or a hold's state happens under them.
"""

from __future__ import annotations

import math
import select
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, LiteralString, NamedTuple

import psycopg
from psycopg import errors, sql

from outbox_relay.database import APPLICATION_NAME, DatabaseUnavailableError, connect, one_line
from outbox_relay.outbox import LANES
from outbox_relay.outcome import Dead, Event, Held, Hold, Outcome, Settlement, boottime

SWEEP: Final = 10_000
DUE_HOLDS: Final = 256
COUNT_LIMIT: Final = 10_000
LANE_SAMPLE: Final = 12
SETTLE_TRIES: Final = 3
PRUNE_CHUNK: Final = 5_000
# Passing trouble between transactions, nothing that publishing had a part in: the statements alone are retried.
_RETRIED: Final = (errors.SerializationFailure, errors.DeadlockDetected, errors.LockNotAvailable)


class Lane(NamedTuple):
    lane: int
    has_due_hold: bool


@dataclass(frozen=True, slots=True)
class Clock:
    """The database's clock (seconds since 1970), read once and carried on without asking."""

    epoch: float
    read_at: float

    def now(self) -> float:
        return self.epoch + boottime() - self.read_at


class Claim(NamedTuple):
    lanes: list[Lane]
    clock: Clock


@dataclass(slots=True)
class Batch:
    """What one claim brought: events in the order in which they may be sent, and the holds that are due."""

    events: list[Event] = field(default_factory=list)
    holds: dict[tuple[str, str], Hold] = field(default_factory=dict)
    parked: int = 0


class Pruned(NamedTuple):
    """How many rows were deleted, and the last id looked at that was old enough; None at the end."""

    deleted: int
    last_id: int | None


class Backlog(NamedTuple):
    """What waits, without ever counting ten million rows.

    Counts are exact below 10,000. There they stop, but for `pending`, which goes on as an estimate. The ages of
    the oldest pending event count from its INSERT and from its COMMIT; None where nothing is pending, the latter
    also where `track_commit_timestamp` is off.
    """

    pending: int
    parked: int
    holds: int
    dead: int
    oldest_pending_seconds: float | None
    oldest_pending_commit_seconds: float | None


_ID, _LANE, _PAYLOAD = (Event._fields.index(name) for name in ("id", "lane", "payload"))
_COLUMNS: Final = (
    "id, event_id::text, aggregate_type::text, aggregate_id::text, lane, version, kind, channels::text[], "
)

_CLAIM: Final = """
SELECT l.lane, l.has_due_hold, extract(epoch FROM clock_timestamp())::float8
FROM generate_series(1, {lanes_total}) AS step(n)
CROSS JOIN LATERAL (
    SELECT c.lane, d.due IS NOT NULL AS has_due_hold
    FROM {outbox_lane} AS c
    LEFT JOIN LATERAL (
        SELECT true AS due FROM {outbox_hold} AS h
        WHERE h.lane = c.lane AND h.due_at <= statement_timestamp()
        ORDER BY h.due_at LIMIT 1
    ) AS d ON true
    WHERE c.lane = (%(after)s + step.n) %% {lanes_total}
      -- A scalar subquery with ORDER BY and LIMIT stays one index probe per lane; EXISTS may become a hash of
      -- the whole backlog.
      AND (d.due OR (SELECT true FROM {outbox} AS o
                     WHERE o.lane = c.lane AND o.state = 'pending' ORDER BY o.id LIMIT 1))
    FOR NO KEY UPDATE OF c SKIP LOCKED
) AS l
LIMIT %(limit)s
"""

# The bytes that the rows before a row take bound the batch; id order makes the cut a suffix of every aggregate.
_READ_PENDING: Final = """
SELECT {columns} CASE WHEN NOT held THEN payload::text END, tags::text, accepted,
       extract(epoch FROM created_at)::float8, replay
FROM (
    SELECT e.*, h.head_id IS NOT NULL AS held,
           sum(pg_column_size(e.payload)) OVER (ORDER BY e.id) - pg_column_size(e.payload) AS bytes_before
    FROM unnest(%(lanes)s::smallint[]) AS l(lane)
    CROSS JOIN LATERAL (
        SELECT o.* FROM {outbox} AS o
        WHERE o.lane = l.lane AND o.state = 'pending'
        ORDER BY o.id LIMIT %(quota)s
    ) AS e
    LEFT JOIN {outbox_hold} AS h
        ON h.aggregate_type = e.aggregate_type AND h.aggregate_id = e.aggregate_id
) AS e
WHERE bytes_before < %(max_bytes)s
ORDER BY id
"""

_READ_DUE: Final = """
SELECT {columns} payload::text, tags::text, accepted, extract(epoch FROM created_at)::float8, replay,
       hold_type, hold_id, head_id, tries, attempts, alone,
       extract(epoch FROM first_refused_at)::float8, extract(epoch FROM refused_at)::float8
FROM (
    SELECT e.*, h.*,
           sum(pg_column_size(e.payload)) OVER (ORDER BY e.id) - pg_column_size(e.payload) AS bytes_before
    FROM (
        SELECT aggregate_type::text AS hold_type, aggregate_id::text AS hold_id,
               head_id, tries, attempts, alone, first_refused_at, refused_at
        FROM {outbox_hold}
        WHERE lane = ANY(%(lanes)s::smallint[]) AND due_at <= statement_timestamp()
        ORDER BY due_at LIMIT %(holds)s
    ) AS h
    LEFT JOIN LATERAL (
        SELECT o.* FROM {outbox} AS o
        WHERE o.state = 'parked' AND o.aggregate_type = h.hold_type AND o.aggregate_id = h.hold_id
        ORDER BY o.id LIMIT %(quota)s
    ) AS e ON true
) AS e
WHERE bytes_before IS NULL OR bytes_before < %(max_bytes)s
ORDER BY id
"""

_PARK: Final = "UPDATE {outbox} SET state = 'parked' WHERE id = ANY(%(ids)s::bigint[]) AND state = 'pending'"

_SWEEP: Final = """
UPDATE {outbox} AS o SET state = 'parked'
FROM unnest(%(lanes)s::smallint[]) AS l(lane)
CROSS JOIN LATERAL (
    SELECT p.id, p.aggregate_type, p.aggregate_id FROM {outbox} AS p
    WHERE p.lane = l.lane AND p.state = 'pending'
    ORDER BY p.id LIMIT %(limit)s
) AS met
JOIN {outbox_hold} AS h ON h.aggregate_type = met.aggregate_type AND h.aggregate_id = met.aggregate_id
WHERE o.id = met.id AND o.state = 'pending'
"""

_DELIVERED: Final = """
UPDATE {outbox} SET state = 'delivered', settled_at = clock_timestamp(), accepted = NULL, error = NULL
WHERE id = ANY(%(ids)s::bigint[]) AND state IN ('pending', 'parked')
"""

_DEAD: Final = """
UPDATE {outbox} AS o SET state = 'dead', settled_at = clock_timestamp(), error = s.error
FROM unnest(%(ids)s::bigint[], %(errors)s::text[]) AS s(id, error)
WHERE o.id = s.id AND o.state IN ('pending', 'parked')
"""

_HEAD_PARKED: Final = """
UPDATE {outbox} AS o SET state = 'parked', error = s.error
FROM unnest(%(ids)s::bigint[], %(errors)s::text[]) AS s(id, error)
WHERE o.id = s.id AND o.state IN ('pending', 'parked')
"""

_ACCEPTED: Final = "UPDATE {outbox} SET accepted = %(accepted)s::text[] WHERE id = %(id)s"

_HOLD: Final = """
INSERT INTO {outbox_hold} AS h
    (aggregate_type, aggregate_id, lane, head_id, due_at, tries, attempts, alone, first_refused_at, refused_at, error)
SELECT s.type, s.aggregate, s.lane, s.id,
       CASE WHEN s.delay < 'infinity' THEN clock_timestamp() + s.delay * interval '1 second' ELSE 'infinity' END,
       s.tries, s.attempts, s.alone, clock_timestamp(), clock_timestamp(), s.error
FROM unnest(%(types)s::text[], %(aggregates)s::text[], %(lanes)s::smallint[], %(ids)s::bigint[],
            %(delays)s::float8[], %(tries)s::int[], %(attempts)s::int[], %(alone)s::bool[], %(errors)s::text[])
     AS s(type, aggregate, lane, id, delay, tries, attempts, alone, error)
ON CONFLICT (aggregate_type, aggregate_id) DO UPDATE SET
    due_at = excluded.due_at, tries = excluded.tries, attempts = excluded.attempts, alone = excluded.alone,
    error = excluded.error, refused_at = excluded.refused_at, head_id = excluded.head_id,
    first_refused_at = CASE WHEN h.head_id = excluded.head_id THEN h.first_refused_at
                            ELSE excluded.first_refused_at END
"""

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

# A small write that must commit: where the disk is full, a transaction may fail as late as that.
_WRITE: Final = """
UPDATE {outbox_lane} SET lane = lane
WHERE lane = (SELECT lane FROM {outbox_lane} LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED)
"""

# Ids rise about as time does, so the scan stops where rows become too young. A row that has not ended, or was made
# pending again meanwhile, fails the condition of the DELETE itself, which PostgreSQL tests again under the row's lock.
_PRUNE: Final = """
WITH scanned AS MATERIALIZED (
    SELECT id, created_at FROM {outbox}
    WHERE id > %(after)s AND (SELECT pg_try_advisory_xact_lock(hashtext('outbox_relay prune'), hashtext(%(schema)s)))
    ORDER BY id LIMIT %(limit)s
), deleted AS (
    DELETE FROM {outbox} AS o USING scanned
    WHERE o.id = scanned.id
      AND (o.state IN ('delivered', 'superseded') AND o.settled_at < now() - %(keep)s * interval '1 second'
           OR o.state IN ('expired', 'dead', 'discarded')
              AND o.settled_at < now() - %(keep_dead)s * interval '1 second')
    RETURNING 1
)
SELECT max(id) FILTER (WHERE created_at < now() - %(keep)s * interval '1 second'), (SELECT count(*) FROM deleted)
FROM scanned
"""

_LEFT: Final = """
SELECT (SELECT true FROM {outbox} WHERE state = 'pending' ORDER BY lane, id LIMIT 1) IS NOT NULL,
       EXISTS (SELECT FROM {outbox_hold})
"""

# Cheap enough to ask many times a second: two index probes.
_IDLE: Final = """
SELECT (SELECT true FROM {outbox} WHERE state = 'pending' ORDER BY lane, id LIMIT 1)
    OR (SELECT true FROM {outbox_hold} WHERE due_at <= statement_timestamp() ORDER BY due_at LIMIT 1)
"""

_BACKLOG: Final = """
SELECT (SELECT count(*) FROM (SELECT FROM {outbox} WHERE state = 'pending' LIMIT %(limit)s) AS x),
       (SELECT count(*) FROM (SELECT FROM {outbox} WHERE state = 'parked' LIMIT %(limit)s) AS x),
       (SELECT count(*) FROM (SELECT FROM {outbox_hold} LIMIT %(limit)s) AS x),
       (SELECT count(*) FROM (SELECT FROM {outbox} WHERE state = 'dead' LIMIT %(limit)s) AS x),
       extract(epoch FROM clock_timestamp() - min(oldest.created_at))::float8,
       extract(epoch FROM clock_timestamp() - min(oldest.committed_at))::float8
FROM {outbox_lane} AS c CROSS JOIN LATERAL (
    SELECT o.created_at,
           CASE WHEN current_setting('track_commit_timestamp')::bool
                THEN pg_xact_commit_timestamp(o.xmin) END AS committed_at
    FROM {outbox} AS o
    WHERE o.lane = c.lane AND o.state = 'pending' ORDER BY o.id LIMIT 1) AS oldest
"""

# How dense a lane's ids are among its oldest events, times the span of its ids: right within some per cent, also while
# a backlog is worked off, when the planner's statistics lag behind. An id is in one lane, so the whole span is a bound.
_ESTIMATE: Final = """
SELECT least(sum(CASE WHEN met < %(sample)s THEN met
                      ELSE greatest(met, (newest - oldest) * (met - 2.0) / (last - oldest)) END),
             max(newest) - min(oldest) + 1)::bigint
FROM {outbox_lane} AS c
CROSS JOIN LATERAL (
    SELECT count(*) AS met, min(id) AS oldest, max(id) AS last
    FROM (SELECT o.id FROM {outbox} AS o
          WHERE o.lane = c.lane AND o.state = 'pending' ORDER BY o.id LIMIT %(sample)s) AS x
) AS head
CROSS JOIN LATERAL (
    SELECT o.id AS newest FROM {outbox} AS o
    WHERE o.lane = c.lane AND o.state = 'pending' ORDER BY o.id DESC LIMIT 1
) AS tail
"""

# A relay frozen while it receives rows keeps its lanes past every time-out: its session hangs in ClientWrite,
# where PostgreSQL applies none. Another relay ends such a session.
_END_STUCK: Final = """
SELECT count(pg_terminate_backend(pid))
FROM pg_stat_activity
WHERE usename = current_user AND application_name = %(application_name)s AND pid <> pg_backend_pid()
  AND wait_event = 'ClientWrite' AND state_change < clock_timestamp() - %(age)s * interval '1 second'
"""


class Store:
    """One worker's connection to the outbox in `schema`.

    `request_timeout` is the deadline of a request to Centrifugo and `batch_time` the longest time in which a
    batch starts requests, both in seconds: the database ends a session that is silent for longer.
    """

    def __init__(
        self,
        database_url: str,
        *,
        schema: str = "public",
        request_timeout: float = 3.0,
        batch_time: float = 1.0,
        keep_delivered: bool = True,
    ) -> None:
        self._connection = connect(database_url)
        self._schema = schema
        self.request_timeout = request_timeout
        self._delivered = _DELIVERED if keep_delivered else _DELIVERED_AND_DELETED
        self.session_timeout = request_timeout + batch_time + 1.0
        self._asked_at = boottime()
        # Whatever the schema is called, it is no placeholder.
        self._names: Mapping[str, Any] = {
            name: sql.SQL(sql.Identifier(schema, name).as_string().replace("%", "%%"))
            for name in ("outbox", "outbox_lane", "outbox_hold")
        } | {
            "columns": sql.SQL(_COLUMNS),
            "lanes_total": sql.Literal(LANES),
        }
        self._sql: dict[str, sql.Composed] = {}
        milliseconds = round(self.session_timeout * 1000)
        # One text, one round trip. A role's own defaults must not decide what a batch sees or how long it waits.
        self._begin = (
            "BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE; "
            f"SET LOCAL idle_in_transaction_session_timeout = {milliseconds}; "
            f"SET LOCAL statement_timeout = {milliseconds}; SET LOCAL lock_timeout = 1000; "
            "SET LOCAL search_path = pg_catalog; SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; "
            "SET LOCAL enable_mergejoin = off; SET LOCAL enable_bitmapscan = off; SET LOCAL jit = off"
        )

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """One transaction. Committed at the end, rolled back when anything is raised.

        Raises `DatabaseUnavailableError` for whatever the database or the connection has against it.
        """
        try:
            self._execute_raw(self._begin)
            try:
                yield
            except BaseException:
                if not self._connection.closed:
                    self._connection.rollback()
                raise
            self._asked_at = boottime()
            self._connection.commit()
        except psycopg.Error as error:
            raise DatabaseUnavailableError(one_line(error)) from error

    def claim(self, after: int, lanes: int) -> Claim:
        """Lock up to `lanes` lanes with something to do, the first one after lane `after`.

        The lock is a statement of its own: what it waited for is seen by the next statement's fresh snapshot.
        """
        rows = self._execute(_CLAIM, after=after, limit=lanes).fetchall()
        clock = Clock(rows[0][2] if rows else 0.0, boottime())
        return Claim([Lane(lane, due) for lane, due, _ in rows], clock)

    def read(self, lanes: Sequence[Lane], *, events: int, per_lane: int, max_bytes: int) -> Batch:
        """Read what may be sent now from the locked lanes, and park what waits behind a hold.

        About `events` events, at least `per_lane` from each lane, `max_bytes` of payload (and one more event).
        """
        quota = max(per_lane, events // max(len(lanes), 1))
        batch = Batch()
        due = [lane.lane for lane in lanes if lane.has_due_hold]
        if due:
            rows = self._execute(_READ_DUE, lanes=due, holds=DUE_HOLDS, quota=per_lane, max_bytes=max_bytes)
            for row in rows.fetchall():
                aggregate_type, aggregate_id, *hold = row[len(Event._fields) :]
                batch.holds[aggregate_type, aggregate_id] = Hold(*hold)
                if row[_ID] is not None:
                    batch.events.append(Event._make(row[: len(Event._fields)]))
        numbers = [lane.lane for lane in lanes]
        held: dict[int, list[int]] = {}
        rows = self._execute(_READ_PENDING, lanes=numbers, quota=quota, max_bytes=max_bytes)
        for row in rows.fetchall():
            if row[_PAYLOAD] is not None:
                batch.events.append(Event._make(row))
            else:
                held.setdefault(row[_LANE], []).append(row[_ID])
        if held:
            batch.parked = self._park(held, quota)
        return batch

    def _park(self, held: Mapping[int, list[int]], quota: int) -> int:
        """Move what was met of held aggregates (ids by lane) out of the pending index: nobody meets it again."""
        parked = self._execute(_PARK, ids=[id_ for ids in held.values() for id_ in ids]).rowcount
        crowded = [lane for lane, ids in held.items() if 2 * len(ids) > quota]
        if crowded:
            parked += self._execute(_SWEEP, lanes=crowded, limit=SWEEP // len(crowded)).rowcount
        return parked

    def prune(self, after: int, *, keep: float, keep_dead: float, limit: int = PRUNE_CHUNK) -> Pruned:
        """Delete ended rows older than `keep` seconds (`keep_dead`: expired, dead, discarded) above id `after`."""
        last, deleted = self._ask(_PRUNE, after=after, keep=keep, keep_dead=keep_dead, limit=limit, schema=self._schema)
        return Pruned(deleted, last)

    def still_ours(self) -> bool:
        """Whether a request that starts now ends before the database could give the lanes to another relay.

        The clock counts from before the last answered statement was sent, and goes on while the process is
        stopped. A session that was ended has left its last words on the socket.
        """
        if boottime() - self._asked_at + self.request_timeout >= self.session_timeout:
            return False
        readable, _, _ = select.select([self._connection.fileno()], [], [], 0)
        return not readable

    def prove_writable(self) -> None:
        """Commit a small write, so that nothing is published by a relay that could not record it."""
        with self.batch():
            self._execute(_WRITE)

    def rehearse(self, ids: Sequence[int]) -> None:
        """Write the outcome that these events would have if all are delivered, and take it back."""
        self._execute_raw("SAVEPOINT rehearsal")
        self._execute(self._delivered, ids=ids)
        self._execute_raw("ROLLBACK TO SAVEPOINT rehearsal")

    def settle(
        self, delivered: Sequence[int], refused: Sequence[Settlement], holds: Mapping[tuple[str, str], Hold]
    ) -> None:
        """Write what became of a batch: the ids delivered, the refused ones' outcomes, and the due holds' ends.

        It happens behind a savepoint, so that the lanes stay locked whatever happens to the statements.
        """
        for left in reversed(range(SETTLE_TRIES)):
            self._execute_raw("SAVEPOINT settle")
            try:
                self._settle(delivered, refused, holds)
                self._execute_raw("RELEASE SAVEPOINT settle")
            except _RETRIED:
                if not left:
                    raise
                self._execute_raw("ROLLBACK TO SAVEPOINT settle")
            else:
                return

    def _settle(
        self, delivered: Sequence[int], refused: Sequence[Settlement], holds: Mapping[tuple[str, str], Hold]
    ) -> None:
        if delivered:
            self._execute(self._delivered, ids=delivered)
        dead = [(s.event, s.outcome.error) for s in refused if isinstance(s.outcome, Dead)]
        if dead:
            self._execute(_DEAD, ids=[event.id for event, _ in dead], errors=[error for _, error in dead])
        held = [(s.event, _hold(s.outcome)) for s in refused if isinstance(s.outcome, Held) or s.outcome.wait]
        if held:
            columns = {
                "types": [event.aggregate_type for event, _ in held],
                "aggregates": [event.aggregate_id for event, _ in held],
                "lanes": [event.lane for event, _ in held],
                "ids": [event.id for event, _ in held],
                "delays": [outcome.delay for _, outcome in held],
                "tries": [outcome.tries for _, outcome in held],
                "attempts": [outcome.attempts for _, outcome in held],
                "alone": [outcome.alone for _, outcome in held],
                "errors": [outcome.error for _, outcome in held],
            }
            self._execute(_HEAD_PARKED, **columns)
            self._execute(_HOLD, **columns)
        for event, _, accepted in refused:
            if accepted:
                self._execute(_ACCEPTED, id=event.id, accepted=[*(event.accepted or ()), *accepted])
        released = holds.keys() - {event.aggregate for event, _ in held}
        if released:
            self._execute(_RELEASE, types=[type_ for type_, _ in released], ids=[id_ for _, id_ in released])

    def anything_to_do(self) -> bool:
        """Whether some event is pending or some hold is due: the question of an idle relay."""
        try:
            return self._execute(_IDLE).fetchall()[0][0] is True
        except psycopg.Error as error:
            raise DatabaseUnavailableError(one_line(error)) from error

    def left(self) -> tuple[bool, bool]:
        """Whether anything is pending, and whether any aggregate is on hold."""
        pending, held = self._ask(_LEFT)
        return pending, held

    def backlog(self) -> Backlog:
        """Count and estimate: some 10,000 buffers, whatever waits. Raises `DatabaseUnavailableError`."""
        backlog = Backlog(*self._ask(_BACKLOG, limit=COUNT_LIMIT))
        if backlog.pending < COUNT_LIMIT:
            return backlog
        estimate = self._ask(_ESTIMATE, sample=LANE_SAMPLE)[0]
        return backlog._replace(pending=max(COUNT_LIMIT, estimate or 0))

    def end_stuck_sessions(self) -> int:
        """End relay sessions that hang while sending rows to a frozen relay. Returns how many."""
        ended: int = self._ask(_END_STUCK, application_name=APPLICATION_NAME, age=self.session_timeout)[0]
        return ended

    def _ask(self, query: LiteralString, **parameters: Any) -> tuple[Any, ...]:
        with self.batch():
            rows: list[tuple[Any, ...]] = self._execute(query, **parameters).fetchall()
        return rows[0]

    def _execute(self, query: LiteralString, **parameters: Any) -> psycopg.Cursor[Any]:
        composed = self._sql.get(query)
        if composed is None:
            composed = self._sql[query] = sql.SQL(query).format(**self._names)
        asked_at = boottime()
        cursor = self._connection.execute(composed, parameters)
        self._asked_at = asked_at
        return cursor

    def _execute_raw(self, query: LiteralString) -> None:
        asked_at = boottime()
        self._connection.execute(query)
        self._asked_at = asked_at


def _hold(outcome: Outcome) -> Held:
    """The hold that a refused event's outcome asks for: after a dead one, until a person ends it."""
    return outcome if isinstance(outcome, Held) else Held(0, 0, math.inf, outcome.error)
