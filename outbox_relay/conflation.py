"""Which waiting events a later one makes needless. The database decides while it reads, so they never leave it.

The last snapshot or tombstone that is read of an aggregate stands for the events right before it, back to the first one
that has a higher version or a channel more, or that waits for a person. So what goes out before it goes out before
them too; and of what is read only the last may go unsent. Nothing overtakes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, LiteralString, NamedTuple

import psycopg

from outbox_relay.event import Event
from outbox_relay.outcome import GivenUp, Held, Owed, Policy, Settlement

WINDOW: Final = 16
"""How many times as many events are looked at, while most of them need not be sent.

A new session begins with it. What a crash has left is looked at as far as before, so that what was sent before it, and
is known to nobody, is not followed by something older.
"""

# The waiting events that are looked at, without what is large: they are sorted in memory. When one ends is said in
# policy.py, too. Without the OFFSET what is computed once would be computed wherever it is used.
_LOOKED_AT: Final = """
SELECT id, lane, aggregate_id, aggregate_type, version, channels, size, held, ends, {carried}
       n IS NOT NULL AND held IS NULL AND kind IN ('snapshot', 'tombstone') AND NOT ends AS stands,
       coalesce(ending = 'dead' AND (%(waits)s::bool[])[n], false) AS waits
FROM (
    SELECT e.*, ending IS NOT NULL OR coalesce(replay IS NULL AND %(now)s::float8 >= least(
        date_part('epoch', created_at) + (%(ages)s::float8[])[n], date_part('epoch', expires_at)), false) AS ends
    FROM (
        SELECT e.id, e.aggregate_id COLLATE "C" AS aggregate_id, e.aggregate_type COLLATE "C" AS aggregate_type,
               e.version, e.kind, e.channels, e.ending, e.replay, e.created_at, e.expires_at,
               pg_column_size(e.payload) AS size, array_position(%(types)s::text[], e.aggregate_type) AS n, {source}
        OFFSET 0
    ) AS e
    OFFSET 0
) AS e
"""

_MARKED: Final = """
SELECT e.*, CASE WHEN id = cover THEN array_agg(id) FILTER (WHERE needless AND NOT ends) OVER its END AS superseded,
       CASE WHEN id = cover THEN array_agg(id) FILTER (WHERE needless AND ends) OVER its END AS ended
FROM (
    SELECT e.*, coalesce(
        id < cover AND id > coalesce(max(id) FILTER (WHERE id < cover AND NOT covered) OVER its, 0), false) AS needless
    FROM (
        SELECT e.*, CASE WHEN first_value(stands) OVER newest THEN first_value(id) OVER newest END AS cover,
               NOT waits AND version <= first_value(version) OVER newest
                   AND channels <@ first_value(channels) OVER newest AS covered
        FROM ({looked_at}) AS e
        WINDOW newest AS (PARTITION BY aggregate_id, aggregate_type ORDER BY stands DESC, id DESC)
    ) AS e
    WINDOW its AS (PARTITION BY aggregate_id, aggregate_type)
) AS e
WINDOW its AS (PARTITION BY aggregate_id, aggregate_type)
""".replace("{looked_at}", _LOOKED_AT)

# What is large is fetched for those that go out. Where a batch's bounds are met, what comes last is cut off. Without
# the LIMIT it would be a join, which the planner may do by walking through the whole table.
_KEPT: Final = """
SELECT {columns}, superseded::text, ended::text
FROM (
    SELECT id AS kept_id, lane, held, superseded, ended, {carried}
           sum(size) OVER so_far AS bytes, count(*) OVER so_far AS number
    FROM ({marked}) AS e
    WHERE NOT needless
    WINDOW so_far AS (ORDER BY id ROWS UNBOUNDED PRECEDING)
) AS k
LEFT JOIN LATERAL (SELECT * FROM {outbox} WHERE id = kept_id LIMIT 1) AS o ON true
WHERE number <= %(most)s AND (bytes <= %(max_bytes)s OR number = 1) OR kept_id IS NULL
ORDER BY kept_id
""".replace("{marked}", _MARKED)

_ENDED: Final = """
UPDATE {outbox} SET state = coalesce(ending, 'expired'), settled_at = clock_timestamp(), ending = NULL
WHERE id = ANY(%(ids)s::bigint[]) AND state IN ('pending', 'parked')
RETURNING state::text
"""

# Of these, those of which all channels have accepted a later one.
_OVER: Final = """
SELECT array_agg(id)::text FROM {outbox}
WHERE id = ANY(%(ids)s::bigint[]) AND channels <@ (coalesce(accepted, '{{}}') || %(took)s::text[])
"""

_REMEMBERED: Final = """
UPDATE {outbox} AS o
SET state = CASE WHEN %(wait)s THEN 'parked' ELSE state END,
    accepted = nullif(coalesce(accepted, '{{}}') || ARRAY(
        SELECT channel FROM unnest(o.channels) WITH ORDINALITY AS c(channel, n)
        WHERE channel = ANY(%(took)s::text[]) AND channel <> ALL(coalesce(o.accepted, '{{}}')) ORDER BY n), '{{}}')
WHERE id = ANY(%(ids)s::bigint[]) AND state IN ('pending', 'parked')
"""

Execute = Callable[..., psycopg.Cursor[Any]]


class Covered(NamedTuple):
    """The needless events that one stands for, as arrays of ids, as PostgreSQL writes them; most are many.

    `ended`: those among them that were not to be sent anyway: they end as they were to, and owe no gap any more.
    """

    superseded: str | None
    ended: str | None


class Took(NamedTuple):
    """What became of the one in the place of others: the channels that accepted it, None if all of theirs did.

    `wait`: it put their aggregate on hold, and they wait with it. Else they might be met too late, when it was sent.
    """

    covered: Covered
    channels: Sequence[str] | None = None
    wait: bool = False


def kept(source: LiteralString, columns: LiteralString, carried: LiteralString = "") -> LiteralString:
    """The statement that reads what is to be sent.

    `source` gives, beside the rows `e` of the outbox that are looked at, their `lane`, whether they are `held`, and
    what is `carried` along. `columns` are all that is wanted.
    """
    return _KEPT.replace("{source}", source).replace("{columns}", columns).replace("{carried}", carried)


def parameters(conflated: Mapping[str, Policy], now: float) -> dict[str, Any]:
    """What `kept` wants to know of the types that are conflated. `now` is on the database's clock."""
    policies = conflated.values()
    return {
        "types": list(conflated),
        "ages": [policy.max_age for policy in policies],
        "waits": [policy.wait_after_dead for policy in policies],
        "now": now,
    }


def uncovered(rows: Sequence[tuple[Any, ...]], covered: dict[int, Covered]) -> list[tuple[Any, ...]]:
    """What `kept` has brought, without its two last columns: these are noted in `covered` by the id of the row."""
    for id_, *_, superseded, ended in rows:
        if superseded or ended:
            covered[id_] = Covered(superseded, ended)
    return [row[:-2] for row in rows]


def next_window(window: int, events: int, covered: Iterable[Covered]) -> int:
    """How many times as many events to look at in the next batch, after one with so many to send."""
    needless = sum(array.count(",") + 1 for pair in covered for array in pair if array)
    return min(2 * window, WINDOW) if needless > events else max(window // 2, 1)


def took(covered: Mapping[int, Covered], accepted: Sequence[Event], settlements: Sequence[Settlement]) -> list[Took]:
    """Say for each event that stands for others, and was answered, how that went."""
    if not covered:
        return []
    found = [Took(covered[event.id]) for event in accepted if event.id in covered]
    for event, outcome, accepted_now in settlements:
        if event.id in covered:
            channels = [*(event.accepted or ()), *accepted_now]
            wait = isinstance(outcome, Held | Owed) or (isinstance(outcome, GivenUp) and outcome.wait)
            if channels or wait:
                found.append(Took(covered[event.id], channels, wait))
    return found


def settle(execute: Execute, superseded: LiteralString, standing: Sequence[Took]) -> Counter[str]:
    """Write what becomes of needless events, and return how many have ended, by state.

    They are over once all their channels have accepted the one in their place. Until then those that did are
    remembered: they are not sent the older event any more. `superseded` is the statement for what is over.
    """
    ended: Counter[str] = Counter()
    partly = [one for one in standing if one.channels is not None]
    over = [one.covered for one in standing if one.channels is None]
    for one in partly:
        found = [execute(_OVER, ids=ids, took=one.channels).fetchone() if ids else None for ids in one.covered]
        over.append(Covered(*(row[0] if row else None for row in found)))
    if simply := joined(covered.superseded for covered in over):
        ended["superseded"] = execute(superseded, ids=simply).rowcount
    if otherwise := joined(covered.ended for covered in over):
        ended.update(state for (state,) in execute(_ENDED, ids=otherwise))
    for one in partly:
        execute(_REMEMBERED, ids=joined(one.covered), took=one.channels, wait=one.wait)
    return ended


def joined(arrays: Iterable[str | None]) -> str | None:
    """One array of several, as PostgreSQL writes and reads them; None if there are none."""
    found = [array[1:-1] for array in arrays if array]
    return f"{{{','.join(found)}}}" if found else None
