"""Below which id no event is pending, and since when holds are due, so that nobody walks over what is long done.

While some snapshot is held open, a replica's or a backup's, PostgreSQL keeps what settled events leave in the index of
the pending ones, and what each try leaves in that of the holds. Whoever reads them from their start walks over all of
that, batch after batch.

An id that is not there may still come: its transaction has not committed. But whoever may write such an event holds
ROW EXCLUSIVE on the outbox from before its id is drawn until it ends. So: some ids are known to be drawn; those who
hold that lock then are waited for, and what is pending after that is all that will ever be of them. Whoever puts an
event back draws from a sequence of its own while holding that lock: a hint from before that is void. So is every hint
where sessions reserve ids ahead, whose lower ones may come at any time.

A hold that is due and not found costs no order, only time: what is known of them is less certain, and asked anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, LiteralString, NamedTuple

import psycopg

from outbox_relay.event import boottime

RENEW_EVERY: Final = 0.25
"""Seconds. Between two renewals the events of that time are walked over, then no more.

A new session walks over everything, so its first renewals follow each other faster: after a 32nd of that, a 16th, ...
"""

GENERATION: Final = "(SELECT last_value + is_called::int FROM {outbox_generation})"
START: Final = f"CASE WHEN {GENERATION} = %(generation)s THEN %(start)s::bigint ELSE 0 END"
"""Where to start, in any statement with the hint's `parameters`."""

DUE_ANEW: Final = 5.0
"""Seconds until all due holds are looked at again, and that much earlier than the longest due one they are looked for:
a hold that is written now is due from its statement on, and there for others from its commit on."""
IS_DUE: Final = "due_at BETWEEN to_timestamp(%(due_since)s::float8) AND statement_timestamp()"
"""Whether a hold is due, in any statement with the hint's `parameters`."""

_LONGEST_DUE: Final = """
SELECT date_part('epoch', coalesce(
    (SELECT due_at FROM {outbox_hold} WHERE due_at <= statement_timestamp() ORDER BY due_at LIMIT 1),
    statement_timestamp()))
"""

DRAWN: Final = "(SELECT last_value - 1 + is_called::int FROM {outbox_id_seq})"
"""The highest id that is drawn, as a statement that is run anyway can learn it."""

_STATE: Final = """
SELECT {generation}, (
    SELECT r.seqcache > 1 FROM {outbox_id_seq} AS s JOIN pg_sequence AS r ON r.seqrelid = s.tableoid)
""".replace("{generation}", GENERATION)

# A prepared transaction keeps its virtual id (until a restart, which ends this session), and has no pid.
_WRITERS: Final = """
SELECT array_agg(l.virtualtransaction)
FROM pg_locks AS l
WHERE l.locktype = 'relation' AND l.relation = %(table)s::regclass AND l.mode = 'RowExclusiveLock' AND l.granted
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.pid IS DISTINCT FROM pg_backend_pid()
"""

_OLDEST: Final = """
SELECT min(oldest.id)
FROM {outbox_lane} AS c CROSS JOIN LATERAL (
    SELECT o.id FROM {outbox} AS o
    WHERE {lane} BETWEEN c.lane AND c.lane AND o.id >= {start} AND o.state = 'pending'
    ORDER BY {lane}, o.id LIMIT 1) AS oldest
""".replace("{start}", START)


def hinted(query: LiteralString) -> LiteralString:
    """A statement that starts where the hint's `parameters` say: from {start} on, with holds that are {is_due}.

    {drawn} is the highest id that is drawn.
    """
    return query.replace("{start}", START).replace("{is_due}", IS_DUE).replace("{drawn}", DRAWN)


Execute = Callable[..., psycopg.Cursor[Any]]


class _Awaited(NamedTuple):
    """The transactions that must end before every id below `below` is decided."""

    below: int
    generation: int
    writers: frozenset[str]


class StartHint:
    """One session's hints. Never carried to another one: behind a new connection there may be another history.

    `execute` runs a statement with named parameters and a snapshot of its own; `table` is the outbox's quoted name.
    Unless `usable`, they stay at the start: behind a pooler one session may be several.
    """

    def __init__(self, execute: Execute, table: str, *, usable: bool) -> None:
        self._execute = execute
        self._table = table
        self._usable = usable
        self._start = 1
        self._generation = 0
        self._drawn = 0
        self._awaited: _Awaited | None = None
        self._renewed_at = 0.0
        self._pause = RENEW_EVERY / 32
        self._due_since = -math.inf
        self._due_asked_at = -math.inf

    @property
    def parameters(self) -> dict[str, float]:
        return {"start": self._start, "generation": self._generation, "due_since": self._due_since}

    def drawn(self, last_id: int) -> None:
        """Take note that all ids up to this one are drawn: an event that has it was read, or its sequence says so."""
        self._drawn = max(self._drawn, last_id)

    def renew(self) -> None:
        """Raise the hints where that is due: that of the holds every five seconds, that of the events where it is safe.

        The latter at most four times a second, while ids are drawn.
        """
        if self._usable and boottime() - self._due_asked_at > DUE_ANEW:
            self._due_asked_at = boottime()
            self._due_since = self._ask(_LONGEST_DUE)[0] - DUE_ANEW
        if not self._usable or self._start > self._drawn or boottime() - self._renewed_at < self._pause:
            return
        self._renewed_at = boottime()
        self._pause = min(RENEW_EVERY, 2 * self._pause)
        generation, reserved = self._ask(_STATE)
        if reserved:
            self._start, self._awaited = 1, None
            return
        writers = frozenset(self._ask(_WRITERS, table=self._table)[0] or ())
        latest = _Awaited(self._drawn + 1, generation, writers)
        awaited = self._awaited if self._awaited and writers else latest
        if awaited.writers.isdisjoint(writers):
            oldest = self._ask(_OLDEST, **self.parameters)[0]
            self._start = awaited.below if oldest is None else min(oldest, awaited.below)
            self._generation = awaited.generation
            awaited = latest
        self._awaited = awaited

    def _ask(self, query: LiteralString, **parameters: Any) -> tuple[Any, ...]:
        row: tuple[Any, ...] = self._execute(query, **parameters).fetchall()[0]
        return row
