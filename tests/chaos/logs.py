"""The logs of a run, read back as one history: who wrote what, what was sent, what was heard, what the table says."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from tests.chaos.measure import Injection, Strike
from tests.chaos.world import People
from tests.chaos.writers import CONFLATED, GROUPS, PLAIN, TYPES
from tests.support.oracle import Aggregate, Fact, Heard, History, Hole, Rows, Sent, Stream, Struck

_ENDED = ("expired", "dead", "discarded")
_UNTOLD = "the gap is untold"


@dataclass(slots=True)
class Written:
    """What the writers committed. `committed_at` is in seconds since 1970, by event."""

    owed: dict[Stream, list[Fact]] = field(default_factory=lambda: defaultdict(list))
    committed_at: dict[str, float] = field(default_factory=dict)
    plain_at: dict[str, float] = field(default_factory=dict)
    """The same, of things that nothing but a fault holds up: no refusals, no strict order of thousands."""
    poison: set[str] = field(default_factory=set)
    covers: set[str] = field(default_factory=set)
    key_of: dict[int, str] = field(default_factory=dict)
    transactions: int = 0
    unknown: int = 0
    """Transactions of which the writer never heard, found committed or not by looking."""


def read(
    folder: Path,
    connection: psycopg.Connection[Any],
    faults: Sequence[Struck],
    people: People,
    maps: Mapping[str, Mapping[Aggregate, int]],
    *,
    whole: bool,
) -> tuple[History, Written]:
    """Everything, once all is at rest."""
    written = read_writers(sorted(folder.glob("writer-*.jsonl")), connection)
    history = History(
        owed=written.owed,
        heard=read_witness(folder / "witness.jsonl"),
        sent=read_proxy(folder / "proxy.jsonl"),
        faults=faults,
        rows=read_rows(connection),
        poison=written.poison,
        asked={written.key_of[id_] for id_ in people.asked},
        retried={written.key_of[id_] for id_ in people.retried},
        whole=whole,
        covers=written.covers,
        rising={channel for _, channel in written.owed if channel.startswith(("map:", "one:"))},
        maps=maps,
    )
    history.rows.excused.update(written.key_of[id_] for id_ in people.untold)
    _add_holes(history, folder / "witness.jsonl")
    _add_pruned(history)
    return history, written


def read_writers(paths: Iterable[Path], connection: psycopg.Connection[Any]) -> Written:
    written = Written()
    channels = {f"{group.name}-{n}": group.channels(n) for group in GROUPS for n in range(group.size)}
    aggregates: dict[str, Aggregate] = {
        f"{group.name}-{n}": (group.type, f"{group.name}-{n}") for group in GROUPS for n in range(group.size)
    }
    for path in paths:
        for transaction, at in _committed(path, connection, written):
            for key, name, version, id_, kind, may_die in transaction["events"]:
                fact = Fact(aggregates[name], version, key)
                for channel in channels[name]:
                    written.owed[aggregates[name], channel].append(fact)
                written.committed_at[key] = at
                if name.split("-")[0] in PLAIN:
                    written.plain_at[key] = at
                written.key_of[id_] = key
                if may_die:
                    written.poison.add(key)
                if aggregates[name][0] == CONFLATED and kind != "change":
                    written.covers.add(key)
            written.transactions += 1
    for facts in written.owed.values():
        facts.sort(key=lambda fact: fact.version)
    return written


def _committed(
    path: Path, connection: psycopg.Connection[Any], written: Written
) -> Iterator[tuple[dict[str, Any], float]]:
    before: dict[str, Any] | None = None
    for line in _lines(path):
        if "events" in line:
            if before is not None and _looked_up(before, connection, written):
                yield before, float("inf")
            before = line
        elif before is not None:
            if line["committed"]:
                yield before, line["at"]
            before = None
    if before is not None and _looked_up(before, connection, written):
        yield before, float("inf")


def _looked_up(transaction: dict[str, Any], connection: psycopg.Connection[Any], written: Written) -> bool:
    """Whether a transaction of unknown outcome was committed: each leaves its name in a table of its own."""
    written.unknown += 1
    return connection.execute("SELECT FROM written WHERE tx = %s", (transaction["tx"],)).fetchone() is not None


def read_witness(path: Path) -> dict[Stream, list[Heard]]:
    heard: dict[Stream, list[Heard]] = defaultdict(list)
    of_channel: dict[str, set[Stream]] = defaultdict(set)
    holed: set[str] = set()  # channels: what is heard there first may have been in the hole before
    aggregates: dict[str, Aggregate] = {}
    for line in _lines(path):
        if "refused" in line:
            continue
        if "lost" in line:
            holed.add(line["lost"])
            for stream in of_channel[line["lost"]]:
                heard[stream].append(Hole())
            continue
        type_, name, version, key, gap = line["fact"]
        stream = aggregates.setdefault(name, (type_, name)), line["on"]
        if line["on"] in holed and stream not in heard:
            heard[stream].append(Hole())
        of_channel[line["on"]].add(stream)
        heard[stream].append(Fact(stream[0], version, key, gap))
    return heard


def read_proxy(path: Path) -> list[Sent]:
    sent: dict[int, Sent] = {}
    for line in _lines(path):
        number = line["n"]
        if "sent" in line:
            events = tuple((key, tuple(channels), gap) for channels, carried in line["sent"] for key, gap in carried)
            publications = tuple(n for n, (_, carried) in enumerate(line["sent"]) for _ in carried)
            single = len(events) == len(line["sent"])
            sent[number] = Sent(line["at"], events, publications=() if single else publications, began_at=line["began"])
        elif "executed" in line:
            codes, of_each = line["executed"], sent[number].publications
            sent[number].executed(line["at"], [codes[n] for n in of_each] if codes and of_each else codes)
        elif line["answered"] == 200:
            sent[number].answered_at = line["at"]
    return list(sent.values())


def read_rows(connection: psycopg.Connection[Any]) -> Rows:
    rows = Rows()
    with connection.cursor(binary=True) as cursor:
        cursor.execute("SELECT event_id::text, state::text, date_part('epoch', settled_at), error FROM outbox")
        for key, state, at, error in cursor:
            if state in _ENDED:
                rows.ended.add(key)
            if _UNTOLD in (error or ""):
                rows.excused.add(key)
            if state == "superseded":
                rows.superseded.add(key)
            if state == "dead":
                rows.dead.add(key)
            if at is None:
                rows.unfinished.add(key)
            else:
                rows.settled_at[key] = at
    for key, at in connection.execute("SELECT event_id, date_part('epoch', settled_at) FROM pruned"):
        rows.superseded.add(key)
        rows.settled_at[key] = at
    things = connection.execute("SELECT id, version FROM thing").fetchall()
    rows.versions = {(TYPES[name.rpartition("-")[0]], name): version for name, version in things}
    return rows


def write_faults(folder: Path, strikes: Sequence[Strike], injections: Sequence[Injection]) -> None:
    """For whoever looks into a run: when each fault struck, on the clock of the other logs, and what it cost."""
    with (folder / "faults.jsonl").open("w", encoding="utf-8") as file:
        for strike, injection in zip(strikes, injections, strict=True):
            times = {"at": strike.at, "struck": strike.struck, "healed": strike.healed, "alone": strike.alone}
            file.write(json.dumps({**times, **injection._asdict()}) + "\n")


def _add_holes(history: History, path: Path) -> None:
    """Whatever was never heard of a channel that the subscriber lost may have been in the hole."""
    lost = {line["lost"] for line in _lines(path) if "lost" in line}
    for stream in history.owed:
        if stream[1] in lost and stream not in history.heard:
            history.heard[stream] = [Hole()]


def _add_pruned(history: History) -> None:
    """Rows that retention has deleted were settled after the last request that had their events, as far as we know."""
    last_sent: dict[str, float] = {}
    for request in history.sent:
        for key, _, _ in request.events:
            if key not in history.rows.settled_at and key not in history.rows.unfinished:
                last_sent[key] = max(request.executed_at, request.at)
    history.rows.settled_at.update(last_sent)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
