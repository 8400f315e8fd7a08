"""What is asked and done beside delivering: how much waits, what is old, who hangs."""

from __future__ import annotations

from typing import Final, NamedTuple

from outbox_relay.database import APPLICATION_NAME
from outbox_relay.event import boottime
from outbox_relay.log import get_logger
from outbox_relay.session import Session

log = get_logger()

COUNT_LIMIT: Final = 10_000
LANE_SAMPLE: Final = 12
PRUNE_CHUNK: Final = 5_000
PRUNE_EVERY: Final = 1.0
# Rows that were too young, or not ended, when the pruning passed them.
PRUNE_FROM_START_EVERY: Final = 3600.0


class Pruned(NamedTuple):
    """How many rows were deleted, and the last id looked at that was old enough.

    None where no further row is old enough yet, or where another relay is pruning at this moment.
    """

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
              AND o.settled_at < now() - %(keep_dead)s * interval '1 second'
              -- A dead event that its aggregate waits for is how a person ends the wait.
              AND NOT EXISTS (SELECT FROM {outbox_hold} AS h WHERE h.head_id = o.id
                              AND h.aggregate_type = o.aggregate_type AND h.aggregate_id = o.aggregate_id))
    RETURNING 1
)
SELECT max(id) FILTER (WHERE created_at < now() - least(%(keep)s, %(keep_dead)s) * interval '1 second'),
       (SELECT count(*) FROM deleted)
FROM scanned
"""

_LEFT: Final = """
SELECT (SELECT true FROM {outbox} AS o WHERE o.state = 'pending' ORDER BY {lane}, o.id LIMIT 1) IS NOT NULL
       OR EXISTS (SELECT FROM {outbox_hold} WHERE due_at <= statement_timestamp()),
       EXISTS (SELECT FROM {outbox_hold})
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
    WHERE {lane} BETWEEN c.lane AND c.lane AND o.state = 'pending' ORDER BY {lane}, o.id LIMIT 1) AS oldest
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
          WHERE {lane} BETWEEN c.lane AND c.lane AND o.state = 'pending' ORDER BY {lane}, o.id LIMIT %(sample)s) AS x
) AS head
CROSS JOIN LATERAL (
    SELECT o.id AS newest FROM {outbox} AS o
    WHERE {lane} BETWEEN c.lane AND c.lane AND o.state = 'pending'
    ORDER BY {lane} DESC, o.id DESC LIMIT 1
) AS tail
"""

# A relay frozen while it receives rows keeps its lanes past every time-out: its session hangs in ClientWrite,
# where PostgreSQL applies none. Another relay ends such a session.
_END_STUCK: Final = """
SELECT count(pg_terminate_backend(pid))
FROM pg_stat_activity
WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
  AND application_name = %(application_name)s
  AND wait_event = 'ClientWrite' AND state_change < clock_timestamp() - %(age)s * interval '1 second'
"""

# A small write that must commit: where the disk is full, a transaction may fail as late as that.
_WRITE: Final = """
UPDATE {outbox_lane} SET lane = lane
WHERE lane = (SELECT lane FROM {outbox_lane} LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED)
"""


class Upkeep(Session):
    """A session that looks after the outbox. Every method raises `DatabaseUnavailableError`."""

    def prove_writable(self) -> None:
        """Commit a small write, so that nothing is published by a relay that could not record it."""
        with self.batch():
            self.execute(_WRITE)

    def prune(self, after: int, *, keep: float, keep_dead: float, limit: int = PRUNE_CHUNK) -> Pruned:
        """Delete ended rows older than `keep` seconds (`keep_dead`: expired, dead, discarded) above id `after`."""
        last, deleted = self.ask(_PRUNE, after=after, keep=keep, keep_dead=keep_dead, limit=limit, schema=self.schema)
        return Pruned(deleted, last)

    def left(self) -> tuple[bool, bool]:
        """Whether anything is pending or some hold is due, and whether any aggregate is on hold."""
        pending, held = self.ask(_LEFT)
        return pending, held

    def backlog(self) -> Backlog:
        """Count and estimate: some 10,000 buffers, whatever waits. Raises `DatabaseUnavailableError`."""
        backlog = Backlog(*self.ask(_BACKLOG, limit=COUNT_LIMIT))
        if backlog.pending < COUNT_LIMIT:
            return backlog
        estimate = self.ask(_ESTIMATE, sample=LANE_SAMPLE)[0]
        return backlog._replace(pending=max(COUNT_LIMIT, estimate or 0))

    def end_stuck_sessions(self) -> int:
        """End relay sessions that hang while sending rows to a frozen relay. Returns how many."""
        ended: int = self.ask(_END_STUCK, application_name=APPLICATION_NAME, age=self.session_timeout)[0]
        return ended


class Chores:
    """What one worker of a relay does now and then beside its batches."""

    def __init__(self, keep: float, keep_dead: float) -> None:
        self._keep = keep
        self._keep_dead = keep_dead
        self._watched_at = self._pruned_at = self._started_over_at = boottime()
        self._pruned_to = 0

    def do(self, session: Upkeep) -> None:
        """Do what is due. Raises `DatabaseUnavailableError`."""
        now = boottime()
        if now - self._watched_at >= session.session_timeout / 2:
            self._watched_at = now
            if ended := session.end_stuck_sessions():
                log.warning("ended sessions of relays that no longer read", sessions=ended)
        if now - self._pruned_at >= PRUNE_EVERY:
            self._pruned_at = now
            if now - self._started_over_at >= PRUNE_FROM_START_EVERY:
                self._started_over_at, self._pruned_to = now, 0
            pruned = session.prune(self._pruned_to, keep=self._keep, keep_dead=self._keep_dead)
            self._pruned_to = pruned.last_id or self._pruned_to
