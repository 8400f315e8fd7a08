"""Below which id no event is pending, and since when holds are due, so that nobody walks over what is long done.

While some snapshot is held open, a replica's or a backup's, PostgreSQL keeps what settled events leave in the index of
the pending ones, and what each try leaves in that of the holds. Whoever reads them from their start walks over all of
that, batch after batch.

An id that is not there may still come: its transaction has not committed. But whoever may write such an event holds
ROW EXCLUSIVE on the outbox from before its id is drawn until it ends. So: some ids are known to be drawn; those who
hold that lock then are waited for, and what is pending after that is all that will ever be of them. Whoever puts an
event back draws from a sequence of its own while holding that lock: a hint from before that is void. So is one from
before the ids began anew, and every hint where sessions reserve ids ahead, whose lower ones may come at any time.

In between, who delivers what it has read of a lane knows where that lane's next pending event is: below what is decided
as above there is nothing else. The sessions of one relay tell each other, because they take turns at the lanes.

A hold that is due and not found costs no order, only time: what is known of them is less certain, and asked anew.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, Final, LiteralString, NamedTuple

import psycopg

from outbox_relay.database import bigints
from outbox_relay.event import boottime

LANES: Final = 256
_HIGHEST: Final = 2**63 - 1
RENEW_EVERY: Final = 0.25
"""Seconds. What came or was settled otherwise than by this relay is walked over between two renewals, then no more.

A new session walks over everything, so its first renewals follow each other faster: after a 32nd of that, a 16th, ...
"""

MANY: Final = 2_000
"""Events. After so many were read, and some of them are above what is decided, the hint is renewed at once."""
SOME: Final = 256
"""Events. After so many it is where a claim got fewer lanes than it wanted, and may have passed many without events."""

# A sequence that begins anew, by a TRUNCATE or by itself, has another file.
_GENERATION: Final = "concat(g.last_value + g.is_called::int, '/', pg_relation_filenode({sequence}))"
GENERATION: Final = """(SELECT {generation} FROM {outbox_generation} AS g)""".replace(
    "{generation}", _GENERATION.replace("{sequence}", "nullif(%(sequence)s, 0)::oid")
)
START: Final = f"CASE WHEN {GENERATION} = %(generation)s THEN %(start)s::bigint ELSE 0 END"
"""Where to start in all lanes, in any statement with the hint's `parameters`."""
_START_IN: Final = START.replace("%(start)s", "coalesce((%(starts)s::bigint[])[{lane} + 1], %(start)s)")

# Whatever makes two servers, or two histories, one connection after the other.
_SERVER: Final = "SELECT {outbox_epoch}(), pg_postmaster_start_time()"

DUE_ANEW: Final = 5.0
"""Seconds until all due holds are looked at again."""
DUE_EARLIER: Final = 1.0
"""Seconds. So much earlier than the longest due one they are looked for: a hold that is written now is due from its
statement on, and there for others from its commit on."""
IS_DUE: Final = "due_at BETWEEN to_timestamp(%(due_since)s::float8) AND statement_timestamp()"
"""Whether a hold is due, in any statement with the hint's `parameters`."""

_LONGEST_DUE: Final = """
SELECT date_part('epoch', coalesce(
    (SELECT due_at FROM {outbox_hold} WHERE due_at <= statement_timestamp() ORDER BY due_at LIMIT 1),
    statement_timestamp()))
"""

DRAWN: Final = "(SELECT last_value - 1 + is_called::int FROM {outbox_id_seq})"
"""The highest id that is drawn, as a statement that is run anyway can learn it."""

# A standby does not know who writes on the primary, and may be the primary later.
_STATE: Final = """
SELECT {generation}, s.tableoid, s.last_value - 1 + s.is_called::int, pg_is_in_recovery() OR r.seqcache > 1
FROM {outbox_generation} AS g CROSS JOIN {outbox_id_seq} AS s JOIN pg_sequence AS r ON r.seqrelid = s.tableoid
""".replace("{generation}", _GENERATION.replace("{sequence}", "s.tableoid"))

# A prepared transaction keeps its virtual id (until a restart, which ends this session), and has no pid.
_WRITERS: Final = """
SELECT array_agg(l.virtualtransaction)
FROM pg_locks AS l
WHERE l.locktype = 'relation' AND l.relation = %(table)s::regclass AND l.mode = 'RowExclusiveLock' AND l.granted
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.pid IS DISTINCT FROM pg_backend_pid()
"""

# From where the last look found the first one, so that all that was settled since is passed once: what is dead to all
# PostgreSQL then takes out of the index before long.
_OLDEST: Final = """
SELECT c.lane, oldest.id
FROM {outbox_lane} AS c CROSS JOIN LATERAL (
    SELECT o.id FROM {outbox} AS o
    WHERE {lane} BETWEEN c.lane AND c.lane AND o.id >= {swept} AND o.state = 'pending'
    ORDER BY {lane}, o.id LIMIT 1) AS oldest
""".replace("{swept}", START.replace("%(start)s", "%(swept)s"))


def hinted(query: LiteralString) -> LiteralString:
    """A statement that starts where the hint's `parameters` say: from {start} on, with holds that are {is_due}.

    {drawn} is the highest id that is drawn. In one lane there may be more to skip: see `start_in`.
    """
    return query.replace("{start}", START).replace("{is_due}", IS_DUE).replace("{drawn}", DRAWN)


def start_in(lane: LiteralString) -> LiteralString:
    """Where to start in a lane, in any statement with the hint's `parameters`."""
    return _START_IN.replace("{lane}", lane)


Execute = Callable[..., psycopg.Cursor[Any]]


class _Awaited(NamedTuple):
    """The transactions that must end before every id below `below` is decided."""

    below: int
    generation: str
    writers: frozenset[str]


class Seen(NamedTuple):
    """What was read of some `lanes`: the pending events, as the lane of each and its id, in the order of their ids.

    At most `quota` of each lane, its first ones; and of all these so many, the first ones, as the bytes allowed.
    """

    lanes: Sequence[int]
    quota: int
    lane_of: Sequence[int]
    ids: Sequence[int]

    def starts(self, delivered: Set[int]) -> dict[int, int]:
        """By lane, below which id nothing is left of what was pending when it was read."""
        # Whatever else is pending in a lane of less than its quota comes after all that was read.
        starts = dict.fromkeys(self.lanes, self.ids[-1] + 1 if self.ids else _HIGHEST)
        last = dict(zip(self.lane_of, self.ids, strict=True))
        starts |= {lane: last[lane] + 1 for lane, read in Counter(self.lane_of).items() if read >= self.quota}
        left = [(lane, id_) for lane, id_ in zip(self.lane_of, self.ids, strict=True) if id_ not in delivered]
        return starts | dict(reversed(left))


class Known:
    """What the sessions of a relay with one server have found out, under one generation.

    Whatever is written here is true and stays so, until the generation is another one. So threads need no lock: where
    two write at once one may be forgotten, which costs time.
    """

    def __init__(self, generation: str = "", sequence: int = 0, drawn: int = 0) -> None:
        self.generation = generation
        self.sequence = sequence
        self.drawn = drawn
        self.decided = 1
        self.read = 0
        self.swept = 1
        self.awaited: _Awaited | None = None
        self.renewed_at = 0.0
        self.pause = RENEW_EVERY / 32
        self.replaced_by: Known | None = None
        self._starts = [1] * LANES
        self._written: tuple[int, str] | None = (1, "{}")

    @property
    def starts(self) -> tuple[int, str]:
        """Where all lanes start, and where each one does as PostgreSQL reads an array: empty where that is the same."""
        written = self._written
        if written is None:
            starts = self._starts.copy()
            start = min(starts)
            written = self._written = (start, bigints(starts) if max(starts) > start else "{}")
        return written

    def looked(self, oldest: Mapping[int, int], decided: int) -> None:
        """Below `decided` nothing is to come, and these are the oldest pending events, by lane."""
        self.decided = max(self.decided, decided)
        self.rise((lane, min(oldest.get(lane, decided), decided)) for lane in range(LANES))
        self._written = None  # another thread may have put down what it had copied before the last rise
        self.swept = self.starts[0]

    def rise(self, starts: Iterable[tuple[int, int]]) -> None:
        """Nothing is pending in these lanes below these ids, and nothing is to come."""
        for lane, start in starts:
            if start > self._starts[lane]:
                self._starts[lane] = start
                self._written = None


class SharedHint:
    """What is known to all sessions of a relay.

    None is used that is older than a session which uses it: behind a new connection there may be another history,
    where a server has crashed, say, or another one has taken over. So with each session that comes all those with the
    same server begin anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: object = None
        self._latest = Known()

    def join(self, server: object) -> Known:
        """Begin anew, for a session that has come and for all others with the same `server`."""
        with self._lock:
            known = Known()
            if server == self._server:
                self._latest.replaced_by = known
            self._server, self._latest = server, known
        return known

    def replace(self, known: Known, by: Known) -> None:
        """Let others find the new one, unless they have begun anew: then whoever has it finds theirs, the next time."""
        with self._lock:
            if known.replaced_by is None:
                known.replaced_by = by
                self._latest = by if self._latest is known else self._latest
            else:
                by.replaced_by = known.replaced_by


class StartHint:
    """One session's hints.

    `execute` runs a statement with named parameters and a snapshot of its own; `table` is the outbox's quoted name.
    Unless `usable`, they stay at the start: behind a pooler one session may be several.
    """

    def __init__(self, execute: Execute, table: str, shared: SharedHint, *, usable: bool) -> None:
        self._execute = execute
        self._table = table
        self._shared = shared
        self._usable = usable
        self._known = Known()
        self._joined = False
        self._decided = 1
        self._due_since = -math.inf
        self._due_asked_at = -math.inf

    @property
    def parameters(self) -> dict[str, float | str]:
        start, starts = self._known.starts
        return {"start": start, "starts": starts, "due_since": self._due_since, **self._generation}

    @property
    def _generation(self) -> dict[str, int | str]:
        return {"generation": self._known.generation, "sequence": self._known.sequence}

    def read(self, events: int, last_id: int) -> None:
        """Take note of so many events that were read, the last one with this id: drawn, if the sequence agrees."""
        self._known.drawn = max(self._known.drawn, last_id)
        self._known.read += events

    def drawn(self, last_id: int) -> None:
        """Take note that all ids up to this one are drawn, as the sequence says."""
        self._known.drawn = max(self._known.drawn, last_id)

    def passed(self, starts: Mapping[int, int]) -> None:
        """Take note that in these lanes nothing is pending below these ids, of what was seen since the last `renew`."""
        self._known.rise((lane, min(start, self._decided)) for lane, start in starts.items())

    def renew(self, *, sparse: bool = True) -> None:
        """Raise the hints where that is due: that of the holds every five seconds, that of the events where it is safe.

        The latter four times a second, at first more often, and after many events; `sparse`: after fewer.
        """
        if not self._usable:
            return
        if boottime() - self._due_asked_at > DUE_ANEW:
            self._due_asked_at = boottime()
            self._due_since = self._ask(_LONGEST_DUE)[0] - DUE_EARLIER
        while self._known.replaced_by is not None:
            self._known = self._known.replaced_by
        known = self._known
        drawn = known.drawn
        many = known.read >= (SOME if sparse else MANY) and drawn >= known.decided
        due = many or boottime() - known.renewed_at >= known.pause
        if due and known.starts[0] <= drawn:
            if not self._joined:
                known = self._known = self._shared.join(self._ask(_SERVER))
                self._joined = True
            known.read = 0
            known.renewed_at = boottime()
            known.pause = min(RENEW_EVERY, 2 * known.pause)
            self._look(known, drawn)
        self._decided = self._known.decided

    def _look(self, known: Known, drawn: int) -> None:
        # Before the writers are asked for: an id that another session reads after that, and writers that it waits for
        # then, have nothing to do with those.
        below, awaited = min(drawn + 1, _HIGHEST), known.awaited
        generation, sequence, last_drawn, unknowable = self._ask(_STATE)
        # An id above the sequence was written by a hand, or the sequence set back: the lower ones are still to come.
        if unknowable or last_drawn < drawn:
            self._replace(Known(drawn=last_drawn))
            return
        # Only now: the session is still there, so what it had read before others came is true for them, too.
        known.drawn = max(known.drawn, drawn)
        writers = frozenset(self._ask(_WRITERS, table=self._table)[0] or ())
        latest = _Awaited(below, generation, writers)
        if awaited is None or not writers:
            awaited = latest
        if awaited.writers.isdisjoint(writers):
            oldest = dict(self._execute(_OLDEST, swept=known.swept, **self._generation).fetchall())
            if awaited.generation != known.generation:
                self._replace(Known(awaited.generation, sequence, drawn))
            self._known.looked(oldest, awaited.below)
            awaited = latest
        self._known.awaited = awaited

    def _replace(self, known: Known) -> None:
        """What was known is void: something was put back, or ids come again."""
        void, self._known = self._known, known
        known.renewed_at, known.pause = void.renewed_at, void.pause
        self._shared.replace(void, known)

    def _ask(self, query: LiteralString, **parameters: Any) -> tuple[Any, ...]:
        row: tuple[Any, ...] = self._execute(query, **parameters).fetchall()[0]
        return row
