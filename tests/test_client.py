"""The client helper for Python: the vectors that both helpers share, any interleaving, and real servers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outbox_relay.client.replica import MEMORY, Load, Replica, State

CASES = json.loads((Path(__file__).parent.parent / "clients" / "vectors.json").read_text())["cases"]

KEYS = st.sampled_from("abcde")


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


class World(RuleBasedStateMachine):
    """A database with its outbox, a relay, a recoverable channel and a page; all that can happen, a step at a time.

    Judged by what the database had: no object is ever shown at an older version within an epoch, or with other data
    than the database had at that version; and once nothing fails any more, the page is what the database is.
    """

    @initialize(reduces=st.booleans(), based=st.booleans(), memory=st.sampled_from([1, 3, 1000]), chance=st.randoms())
    def start(self, reduces: bool, based: bool, memory: int, chance: random.Random) -> None:
        self.reduces, self.based = reduces, based
        self.now = 0.0
        self.epoch = 1
        self.rows: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, int] = {}
        self.backups: list[tuple[dict[str, Any], dict[str, int]]] = []
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
        self.replica = Replica(reduce=merge if reduces else None, memory=memory, chance=chance.random)
        self.ask(self.replica.wake(self.now))

    def ask(self, load: Load | None) -> None:
        if load is not None:
            self.asked.append(load)

    @rule(key=KEYS, field=st.sampled_from("xyz"), value=st.integers(0, 9), deletes=st.booleans(), whole=st.booleans())
    def write(self, key: str, field: str, value: int, deletes: bool, whole: bool) -> None:
        row, version = self.rows.get(key), self.versions.get(key, 0) + 1
        self.versions[key] = version
        kind = "snapshot" if whole or not self.reduces or row is None else "change"
        change = {"version": version, field: value}
        data: dict[str, Any] = {}
        if row is not None and deletes:
            kind = "tombstone"
            del self.rows[key]
        else:
            self.rows[key] = {"id": key, **(row or {}), **change}
            self.had[str(self.epoch), key, version] = self.rows[key]
            data = change if kind == "change" else self.rows[key]
        self.events += 1
        tags = {"ob": "1", "ob_type": "t", "ob_id": key, "ob_version": str(version), "ob_event": str(self.events)}
        tags |= {"ob_kind": kind, "ob_epoch": str(self.epoch)}
        if kind == "change" and row is not None and self.based:
            tags["ob_base"] = str(row["version"])
        self.outbox.append(Event(data, tags))

    @rule()
    def back_up(self) -> None:
        self.backups.append((dict(self.rows), dict(self.versions)))

    @precondition(lambda self: self.backups)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        rows, versions = data.draw(st.sampled_from(self.backups))
        self.rows, self.versions, self.outbox = dict(rows), dict(versions), []
        self.epoch += 1
        for key, row in rows.items():
            self.had[str(self.epoch), key, row["version"]] = row

    @precondition(lambda self: self.outbox)
    @rule(count=st.integers(1, 4), bundles=st.booleans(), gap=st.integers(0, 9))
    def relay(self, count: int, bundles: bool, gap: int) -> None:
        taken, self.outbox = self.outbox[:count], self.outbox[count:]
        self.published += taken
        told = [Event({}, {**e.tags, "ob_kind": "gap"}) if number == gap else e for number, e in enumerate(taken)]
        if bundles:
            items = [event._asdict() for event in told]
            told = [Event({"ob": items}, {"ob": "1", "ob_bundle": str(len(items))})]
        self.stream += told

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        """What a crash repeats, and what surfaces late."""
        self.stream.append(data.draw(st.sampled_from(self.published)))

    @precondition(lambda self: self.connected and self.position < len(self.stream))
    @rule(count=st.integers(1, 4))
    def deliver(self, count: int) -> None:
        assert self.position is not None
        for event in self.stream[self.position :][:count]:
            self.position += 1
            self.ask(self.replica.published(self.now, *event))
            self.judge()

    @precondition(lambda self: self.connected)
    @rule()
    def disconnect(self) -> None:
        self.connected = False
        self.ask(self.replica.lost(self.now))

    @precondition(lambda self: not self.connected)
    @rule(recovers=st.booleans())
    def connect(self, recovers: bool) -> None:
        recovered = recovers and self.position is not None
        if not recovered:
            self.position = len(self.stream)
        self.connected = True
        self.ask(self.replica.subscribed(self.now, recovered=recovered))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        """The database reads for a load, some time between the question and the answer."""
        self.find(data.draw(st.sampled_from(self.asked)))

    def find(self, load: Load) -> None:
        rows = [(key, row["version"], row) for key, row in self.rows.items() if load.keys is None or key in load.keys]
        self.read.setdefault(load.id, State(rows, str(self.epoch)))

    @precondition(lambda self: self.read)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        self.reply(data.draw(st.sampled_from([load for load in self.asked if load.id in self.read])))

    def reply(self, load: Load) -> None:
        self.asked.remove(load)
        self.ask(self.replica.loaded(self.now, load.id, self.read.pop(load.id)))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        load = data.draw(st.sampled_from(self.asked))
        self.asked.remove(load)
        self.read.pop(load.id, None)
        self.ask(self.replica.failed(self.now, load.id))

    @rule(seconds=st.sampled_from([0.03, 0.3, 3.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.ask(self.replica.wake(self.now))

    @invariant()
    def judge(self) -> None:
        epoch = self.replica.epoch
        for key, shown in self.replica.objects.items():
            assert epoch is not None
            assert shown.version >= self.highest.get((epoch, key), 0), f"{key} went back"
            assert shown.data == self.had[epoch, key, shown.version], f"{key} never was that"
            self.highest[epoch, key] = shown.version

    def teardown(self) -> None:
        """Nothing fails any more: what is under way arrives."""
        if not hasattr(self, "replica"):
            return
        self.write("a", "x", 0, deletes=False, whole=True)  # or nobody would hear of a restored database
        while self.outbox:
            self.relay(4, bundles=False, gap=9)
        if not self.connected:
            self.connect(recovers=True)
        for _ in range(500):
            self.deliver(len(self.stream))
            if self.asked:
                self.find(self.asked[0])
                self.reply(self.asked[0])
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


TestAnyInterleaving = World.TestCase
TestAnyInterleaving.settings = settings(
    max_examples=150,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
