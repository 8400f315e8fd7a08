"""The client helper for Python: the vectors that both helpers share, any interleaving, and real servers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from outbox_relay.client.replica import MEMORY, Load, Replica, State

CASES = json.loads((Path(__file__).parent.parent / "clients" / "vectors.json").read_text())["cases"]


class Event(NamedTuple):
    """What is published."""

    data: dict[str, Any]
    tags: dict[str, str]


def merge(data: dict[str, Any], change: dict[str, Any], _tags: Mapping[str, str]) -> dict[str, Any] | None:
    return None if change.get("refuse") else {**data, **change}


def tell(replica: Replica, step: dict[str, Any]) -> Load | None:
    """Give a step of the vectors, whose times are milliseconds, to a replica."""
    now = step["at"] / 1000
    match step:
        case {"subscribed": {"recovered": recovered}}:
            return replica.subscribed(now, recovered=recovered)
        case {"lost": True}:
            return replica.lost(now)
        case {"reload": True}:
            return replica.reload(now)
        case {"publication": publication}:
            return replica.published(now, publication["data"], publication.get("tags"))
        case {"loaded": {"id": id_, "epoch": epoch, "objects": objects}}:
            return replica.loaded(now, id_, State([(row["id"], row["version"], row) for row in objects], epoch))
        case {"failed": id_}:
            return replica.failed(now, id_)
    assert step.keys() <= {"at", "expect"}, step
    return replica.wake(now + 1e-9)  # a sum of seconds need not be as exact as one of milliseconds


def seen(replica: Replica, load: Load | None) -> dict[str, Any]:
    return {
        "load": load and ("all" if load.keys is None else list(load.keys)),
        "shows": {key: [shown.version, shown.data] for key, shown in replica.objects.items()},
        "behind": [key for key, shown in replica.objects.items() if shown.old],
        "old": replica.old,
        "due": None if replica.due == math.inf else pytest.approx(replica.due * 1000),
        "changed": sorted(replica.take_changed()),
        "epoch": replica.epoch,
    }


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_vector(case: dict[str, Any]) -> None:
    options = case.get("options", {})
    reduce = merge if options.get("reduce") else None
    replica = Replica(reduce=reduce, memory=options.get("memory", MEMORY), chance=lambda: 0.5)
    for number, step in enumerate(case["steps"], 1):
        found = seen(replica, tell(replica, step))
        expected = {"load": None, **step.get("expect", {})}
        for what, count in expected.pop("counters", {}).items():
            assert getattr(replica.counters, what) == count, f"step {number}: {what}"
        for what, value in expected.items():
            assert found[what] == value, f"step {number}: {what}"


# Any interleaving


class World:
    """A database with its outbox, a relay, a recoverable channel and a page; all that can happen, a step at a time.

    Judged by what the database had: no object is ever shown at an older version within an epoch, or with other data
    than the database had at that version; and once nothing fails any more, the page is what the database is.
    """

    def __init__(self, *, reduces: bool, based: bool, memory: int, seed: int) -> None:
        self.reduces, self.based = reduces, based
        self.now = 0.0
        self.epoch = 1
        self.rows: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, int] = {}
        self.backups: list[tuple[dict[str, dict[str, Any]], dict[str, int]]] = []
        self.had: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.outbox: list[Event] = []
        self.published: list[Event] = []
        self.stream: list[Event] = []
        self.position: int | None = None
        self.connected = False
        self.asked: list[Load] = []
        self.read: dict[int, State] = {}
        self.highest: dict[tuple[str, str], int] = {}
        self.events = 0
        self.replica = Replica(reduce=merge if reduces else None, memory=memory, chance=random.Random(seed).random)
        self.ask(self.replica.wake(self.now))

    def ask(self, load: Load | None) -> None:
        if load is not None:
            self.asked.append(load)

    def judge(self) -> None:
        epoch = self.replica.epoch
        for key, shown in self.replica.objects.items():
            assert epoch is not None
            assert shown.version >= self.highest.get((epoch, key), 0), f"{key} went back"
            assert shown.data == self.had[epoch, key, shown.version], f"{key} never was that"
            self.highest[epoch, key] = shown.version

    # What can happen; chance decides the details.

    def write(self, chance: random.Random) -> None:
        key = chance.choice("abcde")
        row, version = self.rows.get(key), self.versions.get(key, 0) + 1
        self.versions[key] = version
        kind = "change" if self.reduces and row is not None and chance.random() < 0.7 else "snapshot"
        data: dict[str, Any] = {}
        if row is not None and chance.random() < 0.25:
            kind = "tombstone"
            del self.rows[key]
        else:
            change = {"version": version, chance.choice("xyz"): chance.randrange(1000)}
            self.rows[key] = {"id": key, **(row or {}), **change}
            self.had[str(self.epoch), key, version] = self.rows[key]
            data = change if kind == "change" else self.rows[key]
        self.events += 1
        tags = {"ob": "1", "ob_type": "t", "ob_id": key, "ob_version": str(version), "ob_event": str(self.events)}
        tags |= {"ob_kind": kind, "ob_epoch": str(self.epoch)}
        if kind == "change" and row is not None and self.based:
            tags["ob_base"] = str(row["version"])
        self.outbox.append(Event(data, tags))

    def back_up(self, _chance: random.Random) -> None:
        self.backups.append((dict(self.rows), dict(self.versions)))

    def restore(self, chance: random.Random) -> None:
        if not self.backups:
            return
        rows, versions = chance.choice(self.backups)
        self.rows, self.versions, self.outbox = dict(rows), dict(versions), []
        self.epoch += 1
        for key, row in rows.items():
            self.had[str(self.epoch), key, row["version"]] = row

    def relay(self, chance: random.Random) -> None:
        count = chance.randint(1, 4)
        taken, self.outbox = self.outbox[:count], self.outbox[count:]
        self.published += taken
        told = [Event({}, {**e.tags, "ob_kind": "gap"}) if chance.random() < 0.1 else e for e in taken]
        if len(told) > 1 and chance.random() < 0.3:
            items = [event._asdict() for event in told]
            told = [Event({"ob": items}, {"ob": "1", "ob_bundle": str(len(items))})]
        self.stream += told

    def copy(self, chance: random.Random) -> None:
        """What a crash repeats, and what surfaces late."""
        if self.published:
            self.stream.append(chance.choice(self.published))

    def deliver(self, _chance: random.Random) -> None:
        if self.connected and self.position is not None and self.position < len(self.stream):
            self.position += 1
            self.ask(self.replica.published(self.now, *self.stream[self.position - 1]))

    def disconnect(self, _chance: random.Random) -> None:
        if self.connected:
            self.connected = False
            self.ask(self.replica.lost(self.now))

    def connect(self, chance: random.Random) -> None:
        if self.connected:
            return
        recovered = self.position is not None and chance.random() < 0.5
        if not recovered:
            self.position = len(self.stream)
        self.connected = True
        self.ask(self.replica.subscribed(self.now, recovered=recovered))

    def find(self, chance: random.Random) -> None:
        """The database reads for a load, some time between the question and the answer."""
        if self.asked:
            load = chance.choice(self.asked)
            rows = [(key, row["version"], row) for key, row in self.rows.items() if key in (load.keys or self.rows)]
            self.read.setdefault(load.id, State(rows, str(self.epoch)))

    def answer(self, chance: random.Random) -> None:
        if self.read:
            load = chance.choice([load for load in self.asked if load.id in self.read])
            self.asked.remove(load)
            self.ask(self.replica.loaded(self.now, load.id, self.read.pop(load.id)))

    def fail(self, chance: random.Random) -> None:
        if self.asked:
            load = chance.choice(self.asked)
            self.asked.remove(load)
            self.read.pop(load.id, None)
            self.ask(self.replica.failed(self.now, load.id))

    def wait(self, chance: random.Random) -> None:
        self.now += 3 * chance.random() ** 3
        self.ask(self.replica.wake(self.now))

    def heal(self, chance: random.Random) -> None:
        """Nothing fails any more: what is under way arrives."""
        self.write(chance)  # or nobody would hear of a restored database
        while self.outbox:
            self.relay(chance)
        self.connect(chance)
        for _ in range(500):
            while self.position is not None and self.position < len(self.stream):
                self.deliver(chance)
                self.judge()
            if self.asked:
                self.find(chance)
                self.answer(chance)
            elif self.replica.due < math.inf:
                self.now = max(self.now, self.replica.due)
                self.ask(self.replica.wake(self.now))
            else:
                break
            self.judge()
        assert not self.replica.old
        assert self.replica.epoch == str(self.epoch)
        assert {key: shown.data for key, shown in self.replica.objects.items()} == self.rows
        assert not any(shown.old for shown in self.replica.objects.values())


STEPS = (
    *[World.write, World.relay, World.wait, World.find, World.answer] * 6,
    *[World.deliver] * 10,
    *[World.connect, World.copy] * 2,
    *[World.disconnect, World.fail, World.back_up, World.restore],
)


@given(
    reduces=st.booleans(),
    based=st.booleans(),
    memory=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 2**64),
    steps=st.lists(st.sampled_from(STEPS), min_size=200, max_size=300),
)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_interleaving_ends_in_the_state_of_the_database(
    reduces: bool, based: bool, memory: int, seed: int, steps: list[Callable[[World, random.Random], None]]
) -> None:
    chance = random.Random(seed)
    world = World(reduces=reduces, based=based, memory=memory, seed=seed)
    for step in steps:
        step(world, chance)
        world.judge()
    world.heal(chance)
