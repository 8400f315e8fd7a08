"""Conflation: of an object's waiting snapshots only the newest is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from outbox_relay import conflation
from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.conflation import Covered, Took
from outbox_relay.database import APPLICATION_NAME, DatabaseUnavailableError
from outbox_relay.embedded.centrifugo import DEFAULT_CONFIG, Centrifugo
from outbox_relay.options import Options
from outbox_relay.outcome import UNSETTLED, GivenUp, Held, Outcome, Owed, Policy, Settlement
from outbox_relay.runner import Relay
from outbox_relay.store import Store
from tests.conftest import Connect
from tests.support.gateway import Exchange, Gateway, refuse
from tests.support.memory import Memory
from tests.support.relays import drain
from tests.support.stepping import Stepper
from tests.support.subscriber import Subscriber
from tests.support.writing import Connection, states

Subscribe = Callable[..., Subscriber]

PATIENT = Policy(backoff_base=3600.0, backoff_max=3600.0)
OPTIONS = Options(policy=PATIENT, policies={"order": replace(PATIENT, conflate=True)})


CONFLATED: Final = Policy(conflate=True)
WAITING: Final = Policy(conflate=True, wait_after_dead=True)
LONG_AGO: Final = "2001-01-01Z"
PAIR: Final = ["a", "b"]


@dataclass
class Row:
    """An event to be written: what a reader of its row goes by."""

    version: int = 1
    kind: str = "snapshot"
    channels: Sequence[str] = ("a",)
    name: str = "1"
    type: str = "order"
    state: str = "pending"
    ending: str | None = None
    accepted: list[str] | None = None
    expires_at: str | None = None
    replay: int | None = None
    created_at: str = "2020-01-01Z"


def put(connection: Connection, rows: Sequence[Row]) -> None:
    """Empty the outbox, and write these as ids 1, 2, 3, ...; who is on hold is due."""
    connection.execute("TRUNCATE outbox, outbox_hold")
    for id_, row in enumerate(rows, 1):
        connection.execute(
            "INSERT INTO outbox (id, aggregate_type, aggregate_id, version, kind, channels, payload, state, ending, "
            "accepted, expires_at, replay, created_at) OVERRIDING SYSTEM VALUE "
            "VALUES (%s, %s, %s, %s, %s::text::outbox_kind, %s, '{}', %s::text::outbox_state, "
            "%s::text::outbox_state, %s, %s, %s, %s)",
            (id_, row.type, row.name, row.version, row.kind, list(row.channels), row.state, row.ending, row.accepted,
             row.expires_at, row.replay, row.created_at),
        )  # fmt: skip
    connection.execute(
        "INSERT INTO outbox_hold (aggregate_type, aggregate_id, head_id, due_at, tries, attempts, "
        "first_refused_at, refused_at) "
        "SELECT aggregate_type, aggregate_id, min(id), '-infinity', 1, 0, now(), now() "
        "FROM outbox WHERE state = 'parked' GROUP BY 1, 2"
    )


class Written(NamedTuple):
    """What a row says, afterwards."""

    state: str
    accepted: list[str] | None
    ending: str | None


def written(connection: Connection) -> list[Written]:
    rows = connection.execute("SELECT state::text, accepted, ending::text FROM outbox ORDER BY id")
    return [Written(*row) for row in rows]


class Read:
    """What a relay reads of it, ids alone: what is to be sent, and whom each of them stands for."""

    def __init__(
        self, store: Store, policies: Mapping[str, Policy], *, per_lane: int = 100, max_bytes: int = 10**6
    ) -> None:
        with store.batch():
            claim = store.claim(after=0, lanes=256)
            self.now = claim.clock.now()
            batch = store.read(
                claim.lanes, events=per_lane, per_lane=per_lane, max_bytes=max_bytes, conflated=policies, now=self.now
            )
        self.events = batch.events
        self.sent = [event.id for event in batch.events]
        self.covered = ids(batch.covered)


def ids(covered: Mapping[int, Covered]) -> dict[int, tuple[list[int], list[int]]]:
    """Who is superseded, and who ends otherwise."""
    return {id_: (_ids(pair.superseded), _ids(pair.ended)) for id_, pair in covered.items()}


def _ids(array: str | None) -> list[int]:
    return sorted(int(id_) for id_ in array[1:-1].split(",")) if array else []


def add(connection: Connection, name: str, version: int, channels: Sequence[str], kind: str = "snapshot") -> None:
    connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, kind, channels, payload) "
        "VALUES ('order', %s, %s, %s::text::outbox_kind, %s, '{}')",
        (name, version, kind, list(channels)),
    )


def rows(connection: Connection, name: str = "1") -> list[tuple[int, str, list[str] | None]]:
    return connection.execute(
        "SELECT version, state::text, accepted FROM outbox WHERE aggregate_id = %s ORDER BY id", (name,)
    ).fetchall()


def received(subscriber: Subscriber, count: int, channel: str) -> list[tuple[int, str]]:
    publications = subscriber.wait_for(count)
    return [(p.version, p.tags["ob_kind"]) for p in publications if p.channel == channel]


@pytest.mark.parametrize("keep", [True, False], ids=["rows are kept", "rows are deleted"])
def test_a_backlog_of_snapshots_is_one_publication_for_each_object(
    connect: Connect, database_url: str, centrifugo: Centrifugo, subscribe: Subscribe, channel: str, keep: bool
) -> None:
    """A hundred of each of five objects; a change after the last snapshot is sent as well."""
    connection, subscriber = connect(), subscribe(channel)
    with connection.transaction():
        for version in range(1, 101):
            for name in range(5):
                add(connection, str(name), version, [channel])
        add(connection, "0", 101, [channel], "change")
    drain(
        Relay(
            lambda: Store(database_url, keep_delivered=keep),
            lambda: Publisher(centrifugo.api_url, centrifugo.api_key),
            replace(OPTIONS, workers=1),
        )
    )
    publications = subscriber.wait_for(6)
    assert sorted((p.aggregate[1], p.version) for p in publications) == [
        ("0", 100),
        ("0", 101),
        *((str(name), 100) for name in range(1, 5)),
    ]
    assert states(connection) == ({"superseded": 495, "delivered": 6} if keep else {})


def test_after_a_crash_an_older_snapshot_may_come_after_the_newer_one(
    connect: Connect, database_url: str, centrifugo: Centrifugo, subscribe: Subscribe, channel: str
) -> None:
    """The exception that docs/architecture.md states. A relay dies when 40 was accepted in place of all before it, and
    before that is written. Where the next one does not look as far, the newest of what it sees goes out, once; and the
    newer one is not repeated, because its key is known."""
    connection, subscriber = connect(), subscribe(channel)
    for version in range(1, 41):
        add(connection, "1", version, [channel])

    def crash(exchange: Exchange) -> None:
        answer = exchange.forward()
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = %s",
            (APPLICATION_NAME,),
        )
        exchange.answer(*answer)

    with Gateway(centrifugo.api_url, crash) as gateway:
        with (
            Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), OPTIONS) as steps,
            pytest.raises(DatabaseUnavailableError),
        ):
            steps.step()
        assert [state for _, state, _ in rows(connection)] == ["pending"] * 40
        gateway.fault = None
        # It looks at 16 events at a time.
        small = replace(OPTIONS, lanes=1, events_per_lane=1)
        with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), small) as steps:
            steps.step()
        with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), OPTIONS) as steps:
            steps.drain()
        assert [command.version for command in gateway.commands] == [40, 16, 40]
    assert received(subscriber, 2, channel) == [(40, "snapshot"), (16, "snapshot")]
    assert [version for version, state, _ in rows(connection) if state == "delivered"] == [16, 40]
    assert states(connection) == {"superseded": 38, "delivered": 2}


def test_what_waits_behind_a_hold_is_superseded_too(
    connect: Connect, database_url: str, start_centrifugo: Callable[..., Centrifugo], subscribe: Subscribe, channel: str
) -> None:
    """A namespace is not defined yet: the newest of the first batch is refused and held, and later ones are parked.
    When it is, all of them but the last are superseded."""
    server = start_centrifugo()
    connection = connect()
    with Gateway(server.api_url) as gateway:
        with Stepper(database_url, Publisher(gateway.url, server.api_key), OPTIONS) as steps:
            for version in (1, 2, 3):
                add(connection, "1", version, ["later:1"])
            steps.step()
            for version in (4, 5):
                add(connection, "1", version, ["later:1"])
            steps.step()
            steps.make_due()
            steps.step()
        assert [command.version for command in gateway.commands] == [3, 5]
        hist = DEFAULT_CONFIG["channel"]["namespaces"][0]
        server = start_centrifugo({"channel": {"namespaces": [hist, hist | {"name": "later"}]}}, instead_of=server)
        subscriber = subscribe("later:1", server=server)
        with Stepper(database_url, Publisher(gateway.url, server.api_key), OPTIONS) as steps:
            steps.make_due()
            steps.drain()
    assert received(subscriber, 1, "later:1") == [(5, "snapshot")]
    assert [(version, state) for version, state, _ in rows(connection)] == [
        *((version, "superseded") for version in (1, 2, 3, 4)),
        (5, "delivered"),
    ]


def test_an_older_event_is_never_sent_where_the_newer_one_was_accepted(
    connect: Connect, database_url: str, centrifugo: Centrifugo, subscribe: Subscribe, gateway: Gateway, channel: str
) -> None:
    """The newest is accepted by one of its channels and refused by an undefined namespace. What concerned the first one
    alone is superseded; the others remember, also where the next relay does not conflate."""
    connection, subscriber = connect(), subscribe(channel)
    both = [channel, "unknown:1"]
    add(connection, "1", 1, [channel])
    add(connection, "1", 2, both, "change")
    add(connection, "1", 3, ["unknown:1"])
    add(connection, "1", 4, both, "tombstone")
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), OPTIONS) as steps:
        steps.step()
        assert rows(connection) == [
            (1, "superseded", None),
            (2, "parked", [channel]),
            (3, "parked", None),
            (4, "parked", [channel]),
        ]
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), Options(policy=PATIENT)) as steps:
        steps.make_due()
        steps.step()
    assert [(command.version, command.channels) for command in gateway.commands] == [
        (4, (channel, "unknown:1")),
        (2, ("unknown:1",)),
    ]
    assert received(subscriber, 1, channel) == [(4, "tombstone")]


def test_what_is_held_comes_after_what_it_was_to_stand_for(
    connect: Connect, database_url: str, centrifugo: Centrifugo, subscribe: Subscribe, gateway: Gateway, channel: str
) -> None:
    """The newest is refused, and its wait is over before anybody has looked at its aggregate again. The older one, that
    it stood for, is not left behind to be sent after it."""
    connection, subscriber = connect(), subscribe(channel)
    for version in (1, 2):
        add(connection, "1", version, [channel])
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), OPTIONS) as steps:
        gateway.fault = refuse(102, lambda command: True)
        steps.step()
        assert rows(connection) == [(1, "parked", None), (2, "parked", None)]
        gateway.fault = None
        steps.make_due()
        steps.drain()
        assert steps.journal.ended == {"superseded": 1}
    assert received(subscriber, 1, channel) == [(2, "snapshot")]
    assert [command.version for command in gateway.commands] == [2, 2]
    assert rows(connection) == [(1, "superseded", None), (2, "delivered", None)]


def test_a_hold_of_nothing_ends(
    connect: Connect, database_url: str, centrifugo: Centrifugo, gateway: Gateway, channel: str
) -> None:
    """Somebody has deleted what waited: the aggregate is free again."""
    connection = connect()
    add(connection, "1", 1, [channel])
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key), OPTIONS) as steps:
        gateway.fault = refuse(102, lambda command: True)
        steps.step()
        assert len(steps.holds) == 1
        connection.execute("DELETE FROM outbox")
        steps.make_due()
        steps.step()
        assert steps.holds == []


SUPERSEDES: dict[str, tuple[Row, Row, bool]] = {
    # name: an event, a later one, whether that makes the first one needless
    "a snapshot": (Row(), Row(2), True),
    "a change": (Row(kind="change"), Row(2), True),
    "a tombstone": (Row(), Row(2, "tombstone"), True),
    "of the same version": (Row(2), Row(2), True),
    "a change comes later": (Row(), Row(2, "change"), False),
    "of a lower version": (Row(2), Row(1), False),
    "of more channels": (Row(channels=["b"]), Row(2, channels=PAIR), True),
    "of fewer channels": (Row(channels=PAIR), Row(2), False),
    "of fewer channels, the other one has it": (Row(channels=PAIR, accepted=["b"]), Row(2), False),
    "of another object": (Row(), Row(2, name="2"), False),
    "of another type": (Row(), Row(2, type="payment"), False),
    "of a type that is not conflated": (Row(type="payment"), Row(2, type="payment"), False),
    "that has expired": (Row(), Row(2, expires_at=LONG_AGO), False),
    "that is given up": (Row(), Row(2, ending="dead"), False),
}


@pytest.mark.parametrize("state", ["pending", "parked"])
@pytest.mark.parametrize(("first", "later", "needless"), SUPERSEDES.values(), ids=SUPERSEDES.keys())
def test_what_makes_an_event_needless(
    connect: Connect, database_url: str, first: Row, later: Row, needless: bool, state: str
) -> None:
    """A later snapshot or tombstone, of a version not lower, that all its channels will hear of; on demand."""
    put(connect(), [replace(first, state=state), replace(later, state=state)])
    with closing(Store(database_url)) as store:
        read = Read(store, {"order": CONFLATED})
        assert (read.sent, read.covered) == (([2], {2: ([1], [])}) if needless else ([1, 2], {}))
        assert Read(store, {}).sent == [1, 2]


STANDS_FOR: dict[str, tuple[Sequence[Row], list[int], dict[int, tuple[list[int], list[int]]]]] = {
    # name: events 1, 2, 3, ..., those that are sent, and whom they stand for: the superseded, those that end otherwise
    "only the newest is sent, and a change behind it": (
        [Row(1), Row(1, name="2"), Row(2, "change"), Row(3), Row(4, "change")],
        [2, 4, 5],
        {4: ([1, 3], [])},
    ),
    "back to a change of more channels": ([Row(), Row(2, "change", PAIR), Row(3), Row(4)], [1, 2, 4], {4: ([3], [])}),
    "back to another channel": ([Row(), Row(2, channels=["b"]), Row(3)], [1, 2, 3], {}),
    "back to a higher version": ([Row(1), Row(9), Row(3), Row(4)], [1, 2, 4], {4: ([3], [])}),
    "what has expired or is given up owes no gap": (
        [Row(expires_at=LONG_AGO), Row(2, "change", ending="discarded"), Row(3, ending="dead"), Row(4), Row(5)],
        [5],
        {5: ([4], [1, 2, 3])},
    ),
    "a replay does not expire": ([Row(expires_at=LONG_AGO, replay=1), Row(2)], [2], {2: ([1], [])}),
    "not past a dead one that waits for a person": (
        [Row(type="waits"), Row(2, type="waits", ending="dead"), Row(3, type="waits"), Row(4, type="waits")],
        [1, 2, 4],
        {4: ([3], [])},
    ),
    "one that is too old stands for nothing": ([Row(type="aged"), Row(2, type="aged")], [1, 2], {}),
    "one that is too old ends with those that are not": (
        [Row(type="aged"), Row(2, type="aged", created_at="2100-01-01Z")],
        [2],
        {2: ([], [1])},
    ),
}


@pytest.mark.parametrize(("rows", "sent", "covered"), STANDS_FOR.values(), ids=STANDS_FOR.keys())
def test_the_last_one_stands_for_those_before_it(
    connect: Connect,
    database_url: str,
    rows: Sequence[Row],
    sent: list[int],
    covered: dict[int, tuple[list[int], list[int]]],
) -> None:
    put(connect(), rows)
    types = {"order": CONFLATED, "waits": WAITING, "aged": replace(CONFLATED, max_age=3600.0)}
    with closing(Store(database_url)) as store:
        read = Read(store, types)
    assert (read.sent, read.covered) == (sent, covered)


def test_a_batchs_bounds_cut_off_what_comes_last(connect: Connect, database_url: str) -> None:
    """They count what is sent. One that is cut off stands for nobody; the first one always fits."""
    rows = [Row(version, name=name) for version in (1, 2) for name in ("1", "2", "3")]
    put(connect(), rows)
    types = {"order": CONFLATED}
    with closing(Store(database_url)) as store:
        assert Read(store, types).covered == {4: ([1], []), 5: ([2], []), 6: ([3], [])}
        assert Read(store, types, max_bytes=1).covered == {4: ([1], [])}
        assert Read(store, types, max_bytes=2 * len("?{}")).sent == [4, 5]


_rows = st.builds(
    Row,
    version=st.integers(1, 4),
    kind=st.sampled_from(["change", "snapshot", "snapshot", "tombstone"]),
    channels=st.sampled_from([["a"], ["a"], ["b"], PAIR]),
    name=st.sampled_from(["1", "1", "2"]),
    type=st.sampled_from(["order", "order", "waits", "payment"]),
    ending=st.sampled_from([None, None, None, None, "dead", "discarded"]),
    expires_at=st.sampled_from([None, None, None, LONG_AGO, "9000-01-01Z"]),
    replay=st.sampled_from([None, None, None, 1]),
)


@given(st.lists(_rows, min_size=1, max_size=12), st.sampled_from(["pending", "parked"]))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_model_of_the_state_machines_says_the_same(
    connect: Connect, database_url: str, rows: Sequence[Row], state: str
) -> None:
    """What `Memory` says in plain Python, and the statement in SQL."""
    put(connect(), [replace(row, state=state) for row in rows])
    types = {"order": CONFLATED, "waits": WAITING}
    covered: dict[int, Covered] = {}
    with closing(Store(database_url)) as store:
        everything = Read(store, {})
        read = Read(store, types)
    needless = Memory.needless(everything.events, types, read.now, covered)
    assert read.sent == [id_ for id_ in everything.sent if id_ not in needless]
    assert read.covered == ids(covered)


ON_HOLD: dict[str, tuple[Outcome, bool]] = {
    "refused": (Held(1, 0, 1.0, ""), True),
    "its gap is owed": (Owed("dead", ""), True),
    "dead, its aggregate waits for a person": (GivenUp("dead", wait=True), True),
    "dead, its aggregate goes on": (GivenUp("dead"), False),
    "one of a bundle": (UNSETTLED, False),
}


@pytest.mark.parametrize(("outcome", "waits"), ON_HOLD.values(), ids=ON_HOLD.keys())
def test_needless_events_wait_with_the_one_in_their_place(
    connect: Connect, database_url: str, outcome: Outcome, waits: bool
) -> None:
    """Where it puts their aggregate on hold. If no channel has accepted it, and nobody waits, nothing happens."""
    connection = connect()
    put(connection, [Row(), Row(expires_at=LONG_AGO), Row(2)])
    with closing(Store(database_url)) as store:
        last = Read(store, {"order": CONFLATED}).events[-1]
        covered = {3: Covered("{1}", "{2}")}
        went = conflation.took(covered, [], [Settlement(last, outcome, ())])
        assert went == ([Took(covered[3], [], wait=True)] if waits else [])
        with store.batch():
            assert not store.settle([], [], {}, went)
    state = "parked" if waits else "pending"
    assert [row.state for row in written(connection)] == [state, state, "pending"]


@pytest.mark.parametrize("keep", [True, False], ids=["rows are kept", "rows are deleted"])
def test_needless_events_end_with_the_one_in_their_place(connect: Connect, database_url: str, keep: bool) -> None:
    """Superseded, or as they were to end, without a gap; where a channel has refused it, only those of others."""
    connection = connect()
    earlier = [
        Row(),
        Row(expires_at=LONG_AGO),
        Row(ending="discarded"),
        Row(channels=PAIR),
        Row(channels=["b"]),
        Row(channels=PAIR, accepted=["b"]),
        Row(channels=PAIR, accepted=["", "b"], ending="dead"),
    ]
    put(connection, [*earlier, Row(2, channels=PAIR)])
    with closing(Store(database_url, keep_delivered=keep)) as store:
        batch = Read(store, {"order": CONFLATED})
        [last] = batch.events
        [covered] = batch.covered.items()
        assert covered == (8, ([1, 4, 5, 6], [2, 3, 7]))
        pair = {8: Covered("{6,5,4,1}", "{2,3,7}")}
        with store.batch():
            partly = conflation.took(pair, [], [Settlement(last, Held(1, 0, 1.0, ""), ("a",))])
            ended = store.settle([], [], {}, partly)
        assert ended == {"superseded": 2, "expired": 1, "discarded": 1, "dead": 1}
        rows_left = written(connection)
        assert [(row.state, row.accepted) for row in rows_left] == [
            *([("superseded", None)] if keep else []),
            ("expired", None),
            ("discarded", None),
            ("parked", ["a"]),
            ("parked", None),
            *([("superseded", None)] if keep else []),
            ("dead", ["", "b"]),
            ("pending", None),
        ]
        with store.batch():
            ended = store.settle([], [], {}, conflation.took(pair, [last], []))
        assert ended == {"superseded": 2}
    assert {row.ending for row in written(connection)} == {None}


def test_who_looks_far_comes_back(connect: Connect, database_url: str) -> None:
    """A relay looks at more events while most of them are needless, and at fewer where they are not."""
    connection = connect()
    snapshots, changes = [Row(n) for n in range(1, 90)], [Row(n, "change") for n in range(1, 90)]
    looked_at = []
    with closing(Store(database_url)) as store:
        for rows in (*[snapshots] * 2, *[changes] * 5, *[snapshots] * 5):
            put(connection, rows)
            read = Read(store, {"order": CONFLATED}, per_lane=4)
            looked_at.append(len(read.sent) + sum(len(superseded) for superseded, _ in read.covered.values()))
    assert looked_at == [64, 64, *[4] * 5, 4, 8, 16, 32, 64]
