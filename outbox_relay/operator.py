"""The operator's verbs as functions: for the command line, and for an application's own admin.

    operator = Operator(database_url)
    for event in operator.dead():
        print(event.id, event.error, event.due_at)
    operator.requeue([42])
    operator.replay(Filter(aggregate_type="order", aggregate_id="7"))

All of them are safe while relays run. Whatever changes an event's or a hold's state holds the row lock of the
event's lane, as a relay does from its claim to its settle: so no relay has the event in its hands, and the
aggregate's hold does not change meanwhile. The lock is a statement of its own, waiting; what is read after it
has a fresh snapshot. One transaction changes one lane, at most `CHUNK` events of it.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Final, LiteralString, NamedTuple, TypeVar

import psycopg
from psycopg import errors, sql
from psycopg.rows import class_row

from outbox_relay.database import LANE, DatabaseUnavailableError, connect, one_line
from outbox_relay.outbox import STATES

CHUNK: Final = 10_000
"""Rows that one statement looks at, whatever the table's size."""
LIST_LIMIT: Final = 100
LOCK_TIMEOUT: Final = 10.0
STATEMENT_TIMEOUT: Final = 30.0
DAY: Final = 86_400.0

Row = TypeVar("Row")


class OperatorError(Exception):
    """What was asked cannot be done, or not now. The text says why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which events: those that match everything given. `aggregate_id` is the object's id within its type."""

    aggregate_type: str | None = None
    aggregate_id: str | None = None
    channel: str | None = None
    state: str | None = None
    created_before: datetime | None = None
    created_after: datetime | None = None


ALL: Final = Filter()


@dataclass(frozen=True, slots=True)
class EventRow:
    """One event without its payload.

    `tries`, `attempts` (refusals in a row; those that were the event's own fault) and `due_at` are those of the
    hold whose head the event is, None where it is none. With tries and without `due_at`, it waits for a person.
    """

    id: int
    aggregate_type: str
    aggregate_id: str
    version: int
    kind: str
    channels: list[str]
    state: str
    created_at: datetime
    settled_at: datetime | None
    error: str | None
    tries: int | None
    attempts: int | None
    due_at: datetime | None


@dataclass(frozen=True, slots=True)
class HoldRow:
    """An aggregate that waits. Without `due_at` it waits until a person requeues or discards the head.

    `parked` is how many of its events wait, up to `CHUNK`.
    """

    head_id: int
    due_at: datetime | None
    tries: int
    attempts: int
    alone: bool
    first_refused_at: datetime
    refused_at: datetime
    error: str | None
    parked: int


@dataclass(frozen=True, slots=True)
class EventDetails(EventRow):
    """Everything about one event. `payload` and `tags` are JSON text as stored, `hold` that of its aggregate.

    `ending`: given up, and in this state once its channels were told.
    """

    event_id: uuid.UUID
    lane: int
    payload: str
    tags: str | None
    accepted: list[str] | None
    ending: str | None
    expires_at: datetime | None
    replay: int | None
    traceparent: str | None
    base_version: int | None
    hold: HoldRow | None = None


@dataclass(frozen=True, slots=True)
class Epoch:
    """What subscribers are told (`ob_epoch`), and when somebody last said that versions may have gone back."""

    epoch: str
    bumped_at: datetime


class Refused(NamedTuple):
    """An event that stays as it is, and why."""

    id: int
    reason: str


@dataclass(slots=True)
class Changed:
    """How many events were changed (in a dry run: would be), and which were refused."""

    events: int = 0
    refused: list[Refused] = field(default_factory=list)

    def refuse(self, id_: int, reason: str) -> None:
        self.refused.append(Refused(id_, reason))


class _Place(NamedTuple):
    id: int
    lane: int


class _Examined(NamedTuple):
    id: int
    state: str
    type: str
    aggregate: str
    head_id: int | None
    old: bool


_EVENT: Final = (
    "o.id, o.aggregate_type::text, o.aggregate_id::text, o.version, o.kind::text, o.channels::text[], "
    "o.state::text, o.created_at, o.settled_at, o.error, h.tries, h.attempts, nullif(h.due_at, 'infinity') AS due_at"
)
_DETAILS: Final = (
    ", o.event_id, {lane} AS lane, o.payload::text, o.tags::text, array_remove(o.accepted, '') AS accepted, "
    "o.ending::text, o.expires_at, o.replay, o.traceparent, o.base_version"
)
_MATCHES: Final = """
    (%(aggregate_type)s::text IS NULL OR o.aggregate_type = %(aggregate_type)s)
AND (%(aggregate_id)s::text IS NULL OR o.aggregate_id = %(aggregate_id)s)
AND (%(channel)s::text IS NULL OR %(channel)s = ANY(o.channels::text[]))
AND (%(state)s::text IS NULL OR o.state::text = %(state)s)
AND (%(created_before)s::timestamptz IS NULL OR o.created_at < %(created_before)s)
AND (%(created_after)s::timestamptz IS NULL OR o.created_at >= %(created_after)s)
"""
_OF_AGGREGATE: Final = "h.aggregate_type = o.aggregate_type AND h.aggregate_id = o.aggregate_id"
_HEAD: Final = "{outbox_hold} AS h ON " + _OF_AGGREGATE + " AND h.head_id = o.id"

_LAST: Final = "SELECT max(id) FROM {outbox}"

_WINDOW: Final = """
SELECT max(id) FROM (SELECT id FROM {outbox} WHERE id > %(after)s ORDER BY id LIMIT %(chunk)s) AS w
"""

_LIST: Final = (
    "SELECT {event} FROM {outbox} AS o LEFT JOIN {head} WHERE o.id > %(after)s AND o.id <= %(upto)s AND {matches} "
    "ORDER BY o.id LIMIT %(limit)s"
)

# Dead events have an index of their own, and heads are as few as holds: no need to walk through the table.
_TROUBLED: Final = """
SELECT {event}
FROM (
    SELECT id FROM {outbox} WHERE state = 'dead' AND id > %(after)s
    UNION
    SELECT head_id FROM {outbox_hold} WHERE head_id > %(after)s
) AS t
JOIN {outbox} AS o ON o.id = t.id
LEFT JOIN {head}
WHERE (o.state = 'dead' OR h.head_id IS NOT NULL) AND {matches}
ORDER BY o.id LIMIT %(limit)s
"""

_SHOW: Final = "SELECT {event}{details} FROM {outbox} AS o LEFT JOIN {head} WHERE o.id = %(id)s"

_SHOW_HOLD: Final = """
SELECT h.head_id, nullif(h.due_at, 'infinity') AS due_at, h.tries, h.attempts, h.alone, h.first_refused_at,
       h.refused_at, h.error,
       (SELECT count(*) FROM (
            SELECT FROM {outbox} AS o WHERE o.state = 'parked' AND {of_aggregate} LIMIT %(chunk)s) AS p) AS parked
FROM {outbox_hold} AS h
WHERE h.aggregate_type = %(type)s AND h.aggregate_id = %(aggregate)s
"""

_PLACES: Final = "SELECT id, {lane} AS lane FROM {outbox} AS o WHERE id = ANY(%(ids)s::bigint[])"

_DEAD_PLACES: Final = """
SELECT o.id, {lane} AS lane FROM {outbox} AS o
WHERE o.state = 'dead' AND o.id > %(after)s AND {matches}
ORDER BY o.id LIMIT %(chunk)s
"""

_DELIVERED_PLACES: Final = """
SELECT o.id, {lane} AS lane FROM {outbox} AS o
WHERE o.state = 'delivered' AND o.id > %(after)s AND o.id <= %(upto)s AND {matches}
ORDER BY o.id
"""

_LOCK: Final = "SELECT FROM {outbox_lane} WHERE lane = %(lane)s FOR NO KEY UPDATE"

_EXAMINE: Final = """
SELECT o.id, o.state::text, o.aggregate_type::text AS type, o.aggregate_id::text AS aggregate, h.head_id,
       coalesce(o.settled_at < clock_timestamp() - %(keep)s * interval '1 second', true) AS old
FROM {outbox} AS o
LEFT JOIN {outbox_hold} AS h ON {of_aggregate}
WHERE o.id = ANY(%(ids)s::bigint[])
ORDER BY o.id
"""

# What has gone out: delivered or superseded, then perhaps replayed, or accepted by some of its channels.
_GONE_OUT: Final = """
SELECT o.aggregate_type::text, o.aggregate_id::text, max(o.id)
FROM {outbox} AS o
JOIN unnest(%(types)s::text[], %(aggregates)s::text[]) AS s(type, aggregate)
    ON o.aggregate_type = s.type AND o.aggregate_id = s.aggregate
WHERE o.id > %(after)s AND {lane} = %(lane)s
  AND (o.state IN ('delivered', 'superseded') OR o.accepted IS NOT NULL OR o.replay IS NOT NULL)
GROUP BY 1, 2
"""

# Behind a hold an event is parked, so that it goes out in its place. `accepted` stays, but for those who took the gap
# alone: a channel that has accepted a dead event is not sent it again. A delivered one goes to all its channels, under
# a key that is new.
_AGAIN: Final = """
UPDATE {outbox} AS o
SET state = CASE WHEN EXISTS (SELECT FROM {outbox_hold} AS h WHERE {of_aggregate})
                 THEN 'parked'::{outbox_state} ELSE 'pending'::{outbox_state} END,
    replay = CASE WHEN o.state = 'delivered' THEN coalesce(o.replay, 0) + 1 ELSE o.replay END,
    accepted = CASE WHEN array_position(o.accepted, '') IS NULL THEN o.accepted
                    ELSE nullif(o.accepted[:array_position(o.accepted, '') - 1], '{{}}') END,
    settled_at = NULL, error = NULL
WHERE o.id = ANY(%(ids)s::bigint[]) AND o.state = %(state)s::{outbox_state}
RETURNING o.id, o.aggregate_type::text, o.aggregate_id::text
"""

# A dead event's gap was told when it died. A head is marked, and ends in its place in the order once a relay has told
# its channels; discarded again, it ends at once.
_DISCARD: Final = """
UPDATE {outbox} AS o
SET state = CASE WHEN o.state = 'dead' OR o.ending IS NOT NULL THEN 'discarded' ELSE o.state END,
    settled_at = CASE WHEN o.state = 'dead' OR o.ending IS NOT NULL THEN clock_timestamp() END,
    ending = CASE WHEN o.state = 'parked' AND o.ending IS NULL THEN 'discarded'::{outbox_state} END
WHERE o.id = ANY(%(ids)s::bigint[])
  AND (o.state = 'dead'
       OR o.state = 'parked' AND EXISTS (SELECT FROM {outbox_hold} AS h WHERE {of_aggregate} AND h.head_id = o.id))
RETURNING o.id, o.aggregate_type::text, o.aggregate_id::text
"""

# The lowest parked event heads the hold, and a new head, or one that is now given up, starts anew, due now; the hold
# ends when nothing is parked. A wait for a person ends only with the dead event that it is about.
_MOVE_ON: Final = """
WITH next AS (
    SELECT h.aggregate_type, h.aggregate_id, (
        SELECT o.id FROM {outbox} AS o WHERE o.state = 'parked' AND {of_aggregate} ORDER BY o.id LIMIT 1
    ) AS head_id
    FROM unnest(%(types)s::text[], %(aggregates)s::text[]) AS s(type, aggregate)
    JOIN {outbox_hold} AS h ON h.aggregate_type = s.type AND h.aggregate_id = s.aggregate
    WHERE h.due_at < 'infinity'
       OR NOT EXISTS (SELECT FROM {outbox} AS o WHERE o.id = h.head_id AND o.state = 'dead')
), ended AS (
    DELETE FROM {outbox_hold} AS h USING next
    WHERE h.aggregate_type = next.aggregate_type AND h.aggregate_id = next.aggregate_id AND next.head_id IS NULL
)
UPDATE {outbox_hold} AS h
SET head_id = next.head_id, due_at = clock_timestamp(), tries = 0, attempts = 0, alone = false, error = NULL,
    first_refused_at = clock_timestamp(), refused_at = clock_timestamp()
FROM next
WHERE h.aggregate_type = next.aggregate_type AND h.aggregate_id = next.aggregate_id
  AND next.head_id IS NOT NULL
  AND (h.head_id <> next.head_id OR h.due_at = 'infinity'
       OR EXISTS (SELECT FROM {outbox} AS o WHERE o.id = h.head_id AND o.ending IS NOT NULL))
"""

# A wait for a person is about its dead event: without it nobody could end the wait.
_ENDED: Final = """
    o.id > %(after)s AND o.id <= %(upto)s
AND (o.state IN ('delivered', 'superseded') AND o.settled_at < clock_timestamp() - %(keep)s * interval '1 second'
     OR o.state IN ('expired', 'dead', 'discarded')
        AND o.settled_at < clock_timestamp() - %(keep_dead)s * interval '1 second'
        AND NOT EXISTS (SELECT FROM {outbox_hold} AS h WHERE {of_aggregate} AND h.head_id = o.id))
"""
_COUNT_ENDED: Final = "SELECT count(*) FROM {outbox} AS o WHERE {ended}"
_PRUNE: Final = "DELETE FROM {outbox} AS o WHERE {ended}"

_EPOCH: Final = "SELECT {outbox_epoch}() AS epoch, bumped_at FROM {outbox_epoch}"

# In their order, and waiting: no relay has read the old epoch and is yet to send.
_LOCK_ALL: Final = "SELECT FROM {outbox_lane} ORDER BY lane FOR NO KEY UPDATE"

# A clock that was set back must not repeat an epoch.
_BUMP: Final = "UPDATE {outbox_epoch} SET bumped_at = greatest(clock_timestamp(), bumped_at + interval '1 microsecond')"


class Operator:
    """The verbs on the outbox in `schema`. Each call opens a connection of its own, so threads may share one.

    `keep` and `keep_dead` are the relays' own settings, in seconds: with them the operator knows which rows may
    have been deleted already. `lock_timeout` is how long a change waits for a relay that is at work on the
    event's lane, and `statement_timeout` bounds every statement; both in seconds.

    Every method raises `OperatorError`, or `DatabaseUnavailableError` for trouble with the database. A change
    of many events that is broken off has changed those of earlier transactions; the error says how many.
    """

    def __init__(
        self,
        database_url: str,
        *,
        schema: str = "public",
        keep: float = 7 * DAY,
        keep_dead: float = 90 * DAY,
        lock_timeout: float = LOCK_TIMEOUT,
        statement_timeout: float = STATEMENT_TIMEOUT,
    ) -> None:
        self._database_url = database_url
        self._schema = schema
        self._keep = keep
        self._keep_dead = keep_dead
        self._lock_timeout = lock_timeout
        self._statement_timeout = statement_timeout

    def events(self, chosen: Filter = ALL, *, after_id: int = 0, limit: int = LIST_LIMIT) -> list[EventRow]:
        """The first `limit` matching events above id `after_id`, in id order."""
        found: list[EventRow] = []
        parameters = _parameters(chosen) | {"limit": limit}
        with self._session() as session:
            for after, upto in session.windows(after_id):
                with session.transaction():
                    found += session.rows(EventRow, _LIST, **parameters, after=after, upto=upto)
                if len(found) >= limit:
                    break
        return found[:limit]

    def event(self, id_: int) -> EventDetails:
        """Everything about one event, the hold of its aggregate included."""
        with self._session() as session, session.transaction():
            found = session.rows(EventDetails, _SHOW, id=id_)
            if not found:
                raise OperatorError(f"there is no event {id_}: it was never committed, or deleted after its time")
            [event] = found
            holds = session.rows(
                HoldRow, _SHOW_HOLD, type=event.aggregate_type, aggregate=event.aggregate_id, chunk=CHUNK
            )
        return replace(event, hold=holds[0] if holds else None)

    def dead(self, chosen: Filter = ALL, *, after_id: int = 0, limit: int = LIST_LIMIT) -> list[EventRow]:
        """What needs a person's eye, as `events`: the dead events, and those that hold their aggregate."""
        with self._session() as session, session.transaction():
            return session.rows(EventRow, _TROUBLED, **_parameters(chosen), after=after_id, limit=limit)

    def requeue(self, chosen: Filter | Iterable[int], *, late: bool = False, dry_run: bool = False) -> Changed:
        """Send dead events again, given by their ids or by a filter: in their place, or pending if nothing waits.

        An event of which a successor has gone out already, or may have and its row is deleted since, is refused
        unless `late`: subscribers would hear an old version after a newer one. The successors are looked for
        here, because a mark that each settle kept up to date would cost every event, and a person asks rarely.
        """

        def change(session: _Session, lane: int, ids: Sequence[int], changed: Changed) -> None:
            examined = _examined(session, ids, changed, keep=self._keep)
            dead = [event for event in examined if event.state == "dead"]
            for event in examined:
                if event.state != "dead":
                    changed.refuse(event.id, f"it is {event.state}, not dead{_ADVICE.get(event.state, '')}")
            too_late = {} if late else self._too_late(session, lane, dead)
            for id_, reason in too_late.items():
                changed.refuse(id_, reason)
            in_time = [event.id for event in dead if event.id not in too_late]
            _send_again(session, in_time, "dead", changed, dry_run=dry_run)

        return self._change(chosen, "dead", change, dry_run=dry_run)

    def discard(self, chosen: Filter | Iterable[int], *, dry_run: bool = False) -> Changed:
        """Give events up: dead ones, and by its id also the head of a hold.

        A head stays parked until a relay has told its channels of the gap, if its type has gaps; then what waited
        behind it goes on. One that is given up already ends at once, its gap untold.
        """

        def change(session: _Session, _lane: int, ids: Sequence[int], changed: Changed) -> None:
            allowed: list[int] = []
            for event in _examined(session, ids, changed):
                if event.state == "dead" or (event.state == "parked" and event.id == event.head_id):
                    allowed.append(event.id)
                elif event.state == "parked":
                    changed.refuse(event.id, f"it waits behind event {event.head_id}: discard or requeue that one")
                else:
                    changed.refuse(event.id, f"it is {event.state}: only dead events and heads of holds are discarded")
            if dry_run:
                changed.events += len(allowed)
            elif allowed:
                _note(session, _DISCARD, allowed, changed)

        return self._change(chosen, "dead", change, dry_run=dry_run)

    def replay(self, chosen: Filter | Iterable[int], *, dry_run: bool = False) -> Changed:
        """Send delivered events again, in id order, under new idempotency keys (`event_id:id:rN`).

        Subscribers hear old versions after newer ones: theirs is to compare versions.
        """
        if self._keep == 0:
            raise OperatorError("keep is 0, so events are deleted when they are delivered: there is nothing to replay")

        def change(session: _Session, _lane: int, ids: Sequence[int], changed: Changed) -> None:
            examined = _examined(session, ids, changed)
            for event in examined:
                if event.state != "delivered":
                    changed.refuse(event.id, f"it is {event.state}: only delivered events are replayed")
            delivered = [event.id for event in examined if event.state == "delivered"]
            _send_again(session, delivered, "delivered", changed, dry_run=dry_run)

        return self._change(chosen, "delivered", change, dry_run=dry_run)

    def prune(self, *, keep: float | None = None, keep_dead: float | None = None, dry_run: bool = False) -> int:
        """Delete ended events older than `keep` and `keep_dead` (both in seconds), and return how many.

        An event that has not ended is never deleted, whatever its age: the DELETE's own condition asks for an
        ended state and a time of its end, and PostgreSQL tests it again under the row's lock if somebody has
        changed the row meanwhile. So an event that is requeued or replayed at this moment either stays, or is
        deleted first and then refused there. No lane needs to be locked for that.
        A requeue trusts that rows are kept for the relays' own `keep`: with a shorter one given here, it can no
        longer tell that a successor has gone out.
        """
        periods = {
            "keep": self._keep if keep is None else keep,
            "keep_dead": self._keep_dead if keep_dead is None else keep_dead,
        }
        with self._session() as session:
            for after, upto in session.windows():
                with session.transaction():
                    ended = session.execute(_COUNT_ENDED if dry_run else _PRUNE, **periods, after=after, upto=upto)
                    session.done += ended.fetchall()[0][0] if dry_run else ended.rowcount
            return session.done

    def epoch(self) -> Epoch:
        """The epoch that relays put on their publications now."""
        with self._session() as session, session.transaction():
            return session.rows(Epoch, _EPOCH)[0]

    def bump_epoch(self) -> Epoch:
        """Begin another epoch: every subscriber that compares epochs loads its objects again.

        For when versions may have gone back without the database's knowing, as after a restore of the data alone.
        Waits for the batches under way: when it returns, no relay sends under the old epoch any more.
        """
        with self._session() as session:
            with session.transaction():
                session.execute(_LOCK_ALL)
                session.execute(_BUMP)
            with session.transaction():
                return session.rows(Epoch, _EPOCH)[0]

    def _change(self, chosen: Filter | Iterable[int], state: str, change: _Change, *, dry_run: bool) -> Changed:
        """Run `change` lane by lane: under the lane's lock, or without one if it only counts."""
        changed = Changed()
        with self._session() as session:
            for places in _places(session, chosen, state, changed):
                lanes: dict[int, list[int]] = defaultdict(list)
                for place in places:
                    lanes[place.lane].append(place.id)
                for lane, ids in sorted(lanes.items()):
                    with session.transaction():
                        if not dry_run:
                            session.lock(lane)
                        change(session, lane, ids, changed)
                    session.done = 0 if dry_run else changed.events
        return changed

    def _too_late(self, session: _Session, lane: int, dead: Sequence[_Examined]) -> dict[int, str]:
        """Why a successor of these dead events has gone out or may have, by the event's id; the others are in time."""
        if not dead:
            return {}
        aggregates = {(event.type, event.aggregate) for event in dead}
        rows = session.execute(
            _GONE_OUT,
            types=[type_ for type_, _ in aggregates],
            aggregates=[aggregate for _, aggregate in aggregates],
            after=min(event.id for event in dead),
            lane=lane,
        )
        gone_out = {(type_, aggregate): id_ for type_, aggregate, id_ in rows}
        reasons: dict[int, str] = {}
        for event in dead:
            successor = gone_out.get((event.type, event.aggregate), 0)
            if successor > event.id:
                why = f"a later event of its aggregate, {successor}, has gone out already"
            elif event.head_id == event.id:
                continue  # its successors wait for a person, so that none has gone out
            elif self._keep == 0:
                why = "a later event may have gone out: keep is 0, so delivered events leave no trace"
            elif event.old:
                why = "a later event may have gone out and its row be deleted: it died longer ago than keep"
            else:
                continue
            reasons[event.id] = f"{why}. If subscribers compare versions, requeue it with --late"
        return reasons

    @contextmanager
    def _session(self) -> Iterator[_Session]:
        """A connection for one verb, with PostgreSQL's errors turned into ours."""
        session: _Session | None = None
        try:
            with closing(connect(self._database_url)) as connection:
                session = _Session(connection, self._schema, self._lock_timeout, self._statement_timeout)
                yield session
        except psycopg.Error as error:
            done = f"; {session.done} events were done before that" if session is not None and session.done else ""
            match error:
                case errors.LockNotAvailable():
                    raise OperatorError(
                        f"no lock within {self._lock_timeout:g} s{done}: a relay is at work on the event's lane, or a "
                        "migration on the table. Try again; if it lasts, pg_stat_activity shows whose it is"
                    ) from error
                case errors.QueryCanceled():
                    raise OperatorError(
                        f"the database took longer than {self._statement_timeout:g} s{done}. Choose fewer events"
                    ) from error
                case errors.UndefinedTable() | errors.InvalidSchemaName():
                    raise OperatorError(
                        f"there is no outbox in schema {self._schema!r}: name its schema, or run outbox-relay migrate"
                    ) from error
            raise DatabaseUnavailableError(one_line(error) + done) from error


class _Session:
    """One connection, and what every transaction of a verb has in common."""

    def __init__(
        self, connection: psycopg.Connection[Any], schema: str, lock_timeout: float, statement_timeout: float
    ) -> None:
        self._connection = connection
        self.done = 0
        names: dict[str, Any] = {
            # Whatever the schema is called, it is no placeholder.
            name: sql.SQL(sql.Identifier(schema, name).as_string().replace("%", "%%"))
            for name in ("outbox", "outbox_lane", "outbox_hold", "outbox_epoch", "outbox_state")
        }
        names["of_aggregate"], names["lane"] = sql.SQL(_OF_AGGREGATE), sql.SQL(LANE)
        names["event"], names["details"] = sql.SQL(_EVENT), sql.SQL(_DETAILS).format(**names)
        names["matches"] = sql.SQL(_MATCHES)
        names["head"] = sql.SQL(_HEAD).format(**names)
        names["ended"] = sql.SQL(_ENDED).format(**names)
        self._names = names
        # As a relay's batch begins, but with an operator's patience. A process that was stopped gives its lock back.
        self._begin = (
            "BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE; "
            f"SET LOCAL lock_timeout = {round(lock_timeout * 1000)}; "
            f"SET LOCAL statement_timeout = {round(statement_timeout * 1000)}; "
            "SET LOCAL idle_in_transaction_session_timeout = 5000; SET LOCAL search_path = pg_catalog; "
            "SET LOCAL application_name = 'outbox-relay operator'; SET LOCAL timezone = 'UTC'; SET LOCAL jit = off"
        )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Committed at the end, rolled back when anything is raised."""
        self._connection.execute(self._begin)
        try:
            yield
        except BaseException:
            if not self._connection.closed:
                self._connection.rollback()
            raise
        self._connection.commit()

    def lock(self, lane: int) -> None:
        """Wait until no relay has the lane, and keep it until the transaction ends."""
        # The plans of a relay's batch: an event's row and its hold are found by index, however wrong statistics are.
        self._connection.execute(
            "SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; "
            "SET LOCAL enable_bitmapscan = off"
        )
        if self.execute(_LOCK, lane=lane).rowcount != 1:
            raise OperatorError(f"outbox_lane has no row {lane}: run outbox-relay check")

    def windows(self, after: int = 0) -> Iterator[tuple[int, int]]:
        """Bounds (above, up to) of at most `CHUNK` rows each, from id `after` to the last id there is now."""
        with self.transaction():
            last = self.execute(_LAST).fetchall()[0][0] or 0
        while after < last:
            with self.transaction():
                upto = self.execute(_WINDOW, after=after, chunk=CHUNK).fetchall()[0][0] or last
            yield after, min(upto, last)
            after = upto

    def places(self, query: LiteralString, **parameters: Any) -> list[_Place]:
        with self.transaction():
            return self.rows(_Place, query, **parameters)

    def execute(self, query: LiteralString, **parameters: Any) -> psycopg.Cursor[Any]:
        return self._connection.execute(sql.SQL(query).format(**self._names), parameters)

    def rows(self, of: type[Row], query: LiteralString, **parameters: Any) -> list[Row]:
        with self._connection.cursor(row_factory=class_row(of)) as cursor:
            return cursor.execute(sql.SQL(query).format(**self._names), parameters).fetchall()


_Change = Callable[[_Session, int, Sequence[int], Changed], None]
_ADVICE: Final = {
    "delivered": ": replay it",
    "parked": ": it goes out when its hold is due, or discard the hold's head",
}


def _parameters(chosen: Filter) -> dict[str, Any]:
    if chosen.state is not None and chosen.state not in STATES:
        raise OperatorError(f"there is no state {chosen.state!r}: choose one of {', '.join(STATES)}")
    return asdict(chosen)


def _places(session: _Session, chosen: Filter | Iterable[int], state: str, changed: Changed) -> Iterator[list[_Place]]:
    """Where the chosen events are, in id order and in chunks. A filter chooses among those in `state`."""
    if not isinstance(chosen, Filter):
        for ids in _chunks(sorted(set(chosen))):
            places = session.places(_PLACES, ids=ids)
            _refuse_missing(ids, {place.id for place in places}, changed)
            yield sorted(places)
    elif chosen.state not in {None, state}:
        raise OperatorError(f"this is for {state} events: leave the state out")
    elif state == "dead":
        after = 0
        while places := session.places(_DEAD_PLACES, **_parameters(chosen), after=after, chunk=CHUNK):
            yield places
            after = places[-1].id
    else:
        for after, upto in session.windows():
            yield session.places(_DELIVERED_PLACES, **_parameters(chosen), after=after, upto=upto)


def _examined(session: _Session, ids: Sequence[int], changed: Changed, *, keep: float = 0.0) -> list[_Examined]:
    """What the events are now. `old` says that one has ended longer than `keep` seconds ago."""
    examined = session.rows(_Examined, _EXAMINE, ids=ids, keep=keep)
    _refuse_missing(ids, {event.id for event in examined}, changed)
    return examined


def _chunks(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    return (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))


def _refuse_missing(ids: Iterable[int], found: Set[int], changed: Changed) -> None:
    for id_ in sorted(set(ids) - found):
        changed.refuse(id_, "there is no such event: it was never committed, or deleted after its time")


def _send_again(session: _Session, ids: Sequence[int], state: str, changed: Changed, *, dry_run: bool) -> None:
    if dry_run:
        changed.events += len(ids)
    elif ids:
        _note(session, _AGAIN, ids, changed, state=state)


def _note(session: _Session, query: LiteralString, ids: Sequence[int], changed: Changed, **parameters: Any) -> None:
    """Change the events' state, then the holds of their aggregates. A row that was pruned meanwhile is refused."""
    rows = session.execute(query, ids=ids, **parameters).fetchall()
    _refuse_missing(ids, {row[0] for row in rows}, changed)
    changed.events += len(rows)
    aggregates = {(type_, aggregate) for _, type_, aggregate in rows}
    session.execute(
        _MOVE_ON,
        types=[type_ for type_, _ in aggregates],
        aggregates=[aggregate for _, aggregate in aggregates],
    )
