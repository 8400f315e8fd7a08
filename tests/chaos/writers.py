"""`python -m tests.chaos.writers DATABASE_URL FOLDER SEED RATE APPLICATIONS`: applications that change things.

Each thread is a kind of application with a database session of its own. It writes events of what it changes, and keeps
a commit log in FOLDER: what a transaction wrote, on disk before COMMIT is sent, and what became of it, on disk before
the next one begins. Where COMMIT was not answered there is no second line, and whoever judges must look. Ends with
SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import psycopg

SETUP: Final = """
CREATE TABLE thing (id text PRIMARY KEY, version bigint NOT NULL DEFAULT 0, channels text[] NOT NULL);
CREATE TABLE written (tx text PRIMARY KEY);
-- Retention deletes superseded events, and the judge has to know of them.
CREATE TABLE pruned (event_id text, settled_at timestamptz);
CREATE FUNCTION note_pruned() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN INSERT INTO public.pruned VALUES (OLD.event_id, OLD.settled_at); RETURN OLD; END $$;
CREATE TRIGGER note_pruned AFTER DELETE ON outbox FOR EACH ROW WHEN (OLD.state = 'superseded')
EXECUTE FUNCTION note_pruned();
"""
TOO_DEEP: Final = "[" * 9_995 + "]" * 9_995
"""JSON to PostgreSQL and too deep for Centrifugo: the relay finds that it is refused for ever."""
REFUSED: Final = "refuse-me"
"""What a payload holds that the middle box does not let pass, when it is in that mood."""
MIDDLE_BOX_BYTES: Final = 12_000
"""The longest payload that passes a middle box which refuses large requests, alone in one."""

# The version is taken under the thing's row lock, and the events come after it: the writer's contract.
_CHANGE: Final = """
WITH locked AS MATERIALIZED (SELECT id FROM thing WHERE id = ANY(%(ids)s) ORDER BY id FOR UPDATE),
changed AS (
    UPDATE thing AS t SET version = version + 1 FROM locked WHERE t.id = locked.id
    RETURNING t.id, t.version, t.channels
)
INSERT INTO outbox (aggregate_type, aggregate_id, version, kind, channels, payload, expires_at)
SELECT %(type)s, id, version, %(kind)s::outbox_kind, channels, %(payload)s::json,
       clock_timestamp() + %(lives)s * interval '1 second'
FROM changed
RETURNING event_id::text, aggregate_id, version, id
"""

BACKLOG: Final = 5_000
HOT_BACKLOG: Final = 100
"""The same of one thing that changes all the time: its events need a request each."""
GENTLE_BACKLOG: Final = 100
GENTLE_HOT_BACKLOG: Final = 5
GENTLE: Final = "gentle"
"""The file in FOLDER that says that the relays shall catch up."""
_PENDING: Final = """
SELECT sum(events), max(events) FILTER (WHERE name LIKE 'hot-%%' OR name LIKE 'zipf-%%')
FROM (
    SELECT aggregate_id, count(*) FROM (SELECT aggregate_id FROM outbox WHERE state = 'pending' LIMIT %s) AS x
    GROUP BY aggregate_id
) AS x(name, events)
"""


class Group(NamedTuple):
    """Things of a kind: how many, their channels by number, and the type of their aggregates."""

    name: str
    size: int
    channels: Callable[[int], Sequence[str]]
    type: str = "thing"


THINGS: Final = 3_000
CONFLATED: Final = "state"
"""The type of which only the newest of what waits is sent."""
MAPS: Final = ("map:0", "map:1")
GROUPS: Final = (
    Group("uniform", THINGS, lambda n: [f"hist:u{n % 20}"]),
    Group("zipf", 300, lambda n: [f"hist:z{n % 5}"]),
    Group("hot", 1, lambda _: ["hist:hot"]),
    Group("several", 40, lambda n: [f"hist:s{n % 2}", "hist:s2", "hist:s3"]),
    Group("reborn", 20, lambda n: [f"hist:r{n % 2}"]),
    Group("serial", 20, lambda _: ["hist:serial"]),
    Group("slow", 20, lambda _: ["hist:slow"]),
    Group("big", 6, lambda n: [f"big:{n % 3}"]),
    Group("poison", 10, lambda _: ["hist:poison"]),
    Group("fleeting", 20, lambda _: ["hist:fleeting"]),
    Group("nowhere", 3, lambda _: ["nowhere:x"]),
    Group("refused", 10, lambda _: ["hist:refused"]),
    Group("state", 12, lambda n: (["hist:c0"], ["hist:c0", "hist:c1"], ["map:0", "hist:c1"])[n % 3], CONFLATED),
    Group("packed", 30, lambda n: (["bundle:0"], ["bundle:0", "bundle:1"], ["bundle:1", "hist:p"])[n % 3]),
    Group("mapped", 30, lambda n: (["map:0"], ["map:1"], ["map:1", "hist:m"])[n % 3]),
    Group("alone", 8, lambda n: [f"one:{n}", "hist:a"][: n % 2 + 1]),
)
PLAIN: Final = frozenset({"uniform", "several", "serial", "reborn"})
"""What nothing but a fault holds up."""
CHANGING: Final = frozenset({"hot", "zipf"})
"""What changes all the time: what is in its lane waits for it."""
CHANNELS: Final = sorted({channel for group in GROUPS for n in range(group.size) for channel in group.channels(n)})
TYPES: Final = {group.name: group.type for group in GROUPS}


def set_up(database_url: str) -> None:
    """Make the application's tables."""
    with psycopg.connect(database_url) as connection:
        connection.execute(SETUP)
        rows = [(f"{group.name}-{n}", list(group.channels(n))) for group in GROUPS for n in range(group.size)]
        connection.cursor().executemany("INSERT INTO thing (id, channels) VALUES (%s, %s)", rows)


class Brake:
    """Lets the writers wait while the relays have a backlog: a run is about faults, not about how fast a machine is."""

    def __init__(self, database_url: str, gentle: Path, stopping: threading.Event) -> None:
        self.off = threading.Event()
        self.hot_off = threading.Event()
        for each in (self.off, self.hot_off):
            each.set()
        self._database_url = database_url
        self._gentle = gentle
        self._stopping = stopping

    def watch(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(psycopg.Error), psycopg.connect(self._database_url, autocommit=True) as connection:
                while not self._stopping.wait(0.2):
                    [(pending, of_one)] = connection.execute(_PENDING, (BACKLOG,)).fetchall()
                    gentle = self._gentle.exists()
                    most, most_of_one = (GENTLE_BACKLOG, GENTLE_HOT_BACKLOG) if gentle else (BACKLOG, HOT_BACKLOG)
                    (self.off.set if (pending or 0) < most else self.off.clear)()
                    (self.hot_off.set if (of_one or 0) < most_of_one else self.hot_off.clear)()
            self._stopping.wait(0.2)


class Application:
    """One thread's session, commit log and chance. `rate` is in events per second."""

    def __init__(self, name: str, database_url: str, folder: Path, chance: Random, rate: float, brake: Brake) -> None:
        self.chance = chance
        self._brake = brake
        self._name = name
        self._database_url = database_url
        self._rate = rate
        self._log = os.open(folder / f"writer-{name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._written: list[list[Any]] = []
        self._count = 0
        self._connection: psycopg.Connection[Any] | None = None

    def run(self, transaction: Callable[[Application], None], stopping: threading.Event) -> None:
        due = time.monotonic()
        while not stopping.wait(max(0.0, due - time.monotonic())):
            if not (self._brake.hot_off if transaction in {hot, zipf} else self._brake.off).wait(0.2):
                continue
            with contextlib.suppress(psycopg.Error):
                if self._connection is None or self._connection.closed:
                    self._connection = psycopg.connect(self._database_url, connect_timeout=3)
                self._transaction(transaction)
                due = max(due + len(self._written) / self._rate, time.monotonic() - 1.0)
                continue
            due = time.monotonic() + 0.1

    def change(
        self,
        group: str,
        numbers: Sequence[int],
        payload: str = '{"n":1}',
        kind: str = "change",
        *,
        lives: float | None = None,
    ) -> None:
        """Give these things a new version each, with an event that says so; it `lives` for so many seconds."""
        ids = [f"{group}-{number}" for number in numbers]
        parameters = {"ids": ids, "type": TYPES[group], "payload": payload, "kind": kind, "lives": lives}
        rows = self.session.execute(_CHANGE, parameters).fetchall()
        # Maps and exclusive channels take no changes.
        misplaced = group in {"mapped", "alone"} and kind == "change"
        may_die = misplaced or REFUSED in payload or len(payload) > MIDDLE_BOX_BYTES
        self._written += [[*row, kind, may_die] for row in rows]

    @property
    def session(self) -> psycopg.Connection[Any]:
        assert self._connection is not None
        return self._connection

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        """What is done in this block is taken back."""
        before = len(self._written)
        self.session.execute("SAVEPOINT s")
        yield
        self.session.execute("ROLLBACK TO s")
        del self._written[before:]

    def _transaction(self, transaction: Callable[[Application], None]) -> None:
        self._written = []
        self._count += 1
        tx = f"{self._name}-{self._count}"
        try:
            transaction(self)
            if self.chance.random() < 0.05:
                self.session.rollback()
                return
            self.session.execute("INSERT INTO written VALUES (%s)", (tx,))
        except psycopg.Error:
            # Nobody has asked for a COMMIT: it is not committed, whatever has become of the session.
            self.session.rollback()
            raise
        self._say({"tx": tx, "events": self._written})
        try:
            self.session.commit()
        except psycopg.errors.SerializationFailure:
            self._say({"tx": tx, "committed": False})
            raise
        self._say({"tx": tx, "committed": True, "at": time.time()})

    def _say(self, line: dict[str, Any]) -> None:
        os.write(self._log, json.dumps(line, separators=(",", ":")).encode() + b"\n")
        os.fsync(self._log)


def uniform(app: Application) -> None:
    """Many things, some of them several times in a transaction, some changes taken back."""
    for _ in range(app.chance.randint(1, 3)):
        app.change("uniform", app.chance.sample(range(THINGS), app.chance.randint(1, 100)), _payload(app.chance))
        if app.chance.random() < 0.1:
            with app.savepoint():
                app.change("uniform", app.chance.sample(range(THINGS), 5))


def zipf(app: Application) -> None:
    """A few things have most of the changes, and others come in several channels."""
    numbers = {min(int(app.chance.paretovariate(0.6)) - 1, 299) for _ in range(30)}
    app.change("zipf", sorted(numbers), _payload(app.chance))
    if app.chance.random() < 0.5:
        app.change("several", app.chance.sample(range(40), 5))


def hot(app: Application) -> None:
    """One thing changes all the time, in one channel."""
    for _ in range(app.chance.randint(1, 8)):
        app.change("hot", [0])


def serializable(app: Application) -> None:
    """Transactions that fail now and then because of each other."""
    app.session.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
    app.session.execute("SELECT sum(version) FROM thing WHERE id LIKE 'serial-%'").fetchall()
    app.change("serial", app.chance.sample(range(20), 3))


def late(app: Application) -> None:
    """Transactions that commit long after they wrote: ids become visible in another order than they were given."""
    app.change("slow", app.chance.sample(range(20), 2))
    time.sleep(app.chance.uniform(0.05, 1.5) if app.chance.random() < 0.9 else app.chance.uniform(2, 6))


def odd(app: Application) -> None:
    """Deleted and made again; soon expired; up to a mebibyte; refused for ever by Centrifugo, or by a middle box."""
    number = app.chance.randrange(20)
    app.change("reborn", [number], "null", "tombstone")
    app.change("reborn", [number], '{"reborn":true}', "snapshot")
    app.change("fleeting", [number], lives=app.chance.choice([0.01, 0.5, 2.0]))
    match app.chance.randrange(12):
        case 0:
            app.change(
                "big", [app.chance.randrange(6)], json.dumps("x" * app.chance.choice([70_000, 300_000, 2**20 - 2]))
            )
        case 1:
            app.change("poison", [app.chance.randrange(10)], TOO_DEEP)
        case 2:
            app.change("nowhere", [app.chance.randrange(3)])
        case 3 | 4:
            app.change("refused", [app.chance.randrange(10)], json.dumps(REFUSED))
        case _:
            app.change("poison", [app.chance.randrange(10)])
            app.change("refused", [app.chance.randrange(10)])


def states(app: Application) -> None:
    """Things that say their full state again and again: of what waits only the newest is worth sending."""
    for _ in range(app.chance.randint(5, 20)):
        kind = _full(app.chance) if app.chance.random() < 0.9 else "change"
        numbers = app.chance.sample(range(12), 3)
        app.change("state", [n for n in numbers if kind != "change" or n % 3 < 2], kind=kind)


def packed(app: Application) -> None:
    """Many changes of a few things: they travel in bundles, and now and then one of them is refused for ever."""
    for _ in range(app.chance.randint(1, 20)):
        app.change("packed", app.chance.sample(range(30), 4), _payload(app.chance))
    match app.chance.randrange(40):
        case 0:
            app.change("packed", [app.chance.randrange(30)], TOO_DEEP)
        case 1 | 2:
            app.change("packed", [app.chance.randrange(30)], json.dumps(REFUSED))


def versioned(app: Application) -> None:
    """Things in maps and in channels of their own, where Centrifugo keeps the versions; changes are misplaced there."""
    app.change("mapped", app.chance.sample(range(30), 5), kind=_full(app.chance))
    app.change("alone", app.chance.sample(range(8), 2), kind=_full(app.chance))
    if app.chance.random() < 0.02:
        app.change(*app.chance.choice([("mapped", [app.chance.randrange(30)]), ("alone", [app.chance.randrange(8)])]))


def pulse(app: Application) -> None:
    """A little that goes on, so that relays can tell what an event is refused for from an outage."""
    app.change("uniform", app.chance.sample(range(THINGS), 3))


def shaped_pulse(app: Application) -> None:
    """The same in other namespaces."""
    for group, size in (("packed", 30), ("mapped", 30), ("alone", 8)):
        app.change(group, app.chance.sample(range(size), 2), kind="snapshot")


def _full(chance: Random) -> str:
    return "snapshot" if chance.random() < 0.9 else "tombstone"


def _payload(chance: Random) -> str:
    size = min(int(chance.paretovariate(0.8) * 20), 8_000) if chance.random() < 0.1 else 60
    return json.dumps({"text": "x" * size})


PLAIN_APPLICATIONS: Final[Sequence[tuple[Callable[[Application], None], float]]] = (
    (uniform, 0.36),
    (uniform, 0.36),
    (zipf, 0.22),
    # In strict order and one a request: it must not be more than a few hundred requests a second can do.
    (hot, 0.02),
    (serializable, 0.015),
    (late, 0.005),
    (odd, 0.02),
)
"""What runs beside each other, and its part of all events."""
SHAPED: Final = (*PLAIN_APPLICATIONS, (states, 0.04), (packed, 0.06), (versioned, 0.03))
"""The same, where types and namespaces are configured for it."""
APPLICATIONS: Final[Mapping[str, Sequence[tuple[Callable[[Application], None], float]]]] = {
    "plain": PLAIN_APPLICATIONS,
    "shaped": SHAPED,
    "plain pulse": ((pulse, 1.0),),
    "shaped pulse": ((pulse, 1.0), (shaped_pulse, 1.0)),
}


def main(database_url: str, folder: str, seed: str, rate: str, applications: str) -> None:
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    brake = Brake(database_url, Path(folder) / GENTLE, stopping)
    threads = [threading.Thread(target=brake.watch, daemon=True)]
    for number, (transaction, part) in enumerate(APPLICATIONS[applications]):
        name = f"{transaction.__name__}{number}"
        app = Application(name, database_url, Path(folder), Random(f"{seed}/{name}"), float(rate) * part, brake)
        threads.append(threading.Thread(target=app.run, args=(transaction, stopping), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
