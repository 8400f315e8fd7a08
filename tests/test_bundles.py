"""Bundles: several events of a channel in one publication, in order, all or none."""

from __future__ import annotations

import itertools
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import DEFAULT_CONFIG, Centrifugo
from outbox_relay.event import Event, Refusal
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from outbox_relay.packing import ENTRY_BYTES, Limits, Wire, waves
from outbox_relay.wire import Command, commands, encode_commands, replies
from tests.conftest import Connect
from tests.support.gateway import Gateway
from tests.support.oracle import Fact, violations
from tests.support.stepping import Stepper
from tests.support.subscriber import Publication, Subscriber, items, members
from tests.support.waiting import wait_until
from tests.support.writing import Connection, states, write

Subscribe = Callable[..., Subscriber]

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
WIRES = {"b": Wire(bundle_events=4), "pair": Wire(bundle_events=2)}
_ids = itertools.count(1)


def event(name: str = "1", channels: Sequence[str] = ("b:x",), payload: str = "{}", **fields: Any) -> Event:
    id_ = next(_ids)
    written = Event(id_, f"e{id_}", "order", name, 0, id_, "change", list(channels), payload, None, None, 0.0)
    return replace(written, **fields)


# Which events may travel together

batches = st.lists(
    st.builds(
        event,
        name=st.sampled_from("abc"),
        channels=st.lists(st.sampled_from(["b:x", "b:y", "pair:z", "plain:w"]), min_size=1, max_size=3, unique=True),
        payload=st.text("aü☃", max_size=12),
        accepted=st.sampled_from([None, ["b:x"]]),
        tried=st.sampled_from([False, False, False, True]),
    ).filter(lambda written: written.unsent),
    max_size=40,
)
some_limits = st.builds(
    Limits, events=st.integers(1, 8), bytes=st.integers(1, 3_000), channel_bytes=st.integers(1, 2_000)
)


@unhurried
@given(batches, some_limits)
def test_waves_of_bundles_keep_every_promise(events: list[Event], limits: Limits) -> None:
    """Every event once. Events of one aggregate in one request are in the same publications, in order: they share their
    fate. Bundles and requests keep their bounds, unless one event alone is beyond them."""
    requests = waves(events, limits, WIRES)
    assert sorted(sent.id for request in requests for sent in request) == [sent.id for sent in events]
    for request in requests:
        asked = commands(request, WIRES)
        places: dict[int, list[tuple[tuple[str, ...], int]]] = {n: [] for n in range(len(request))}
        for number, command in enumerate(asked):
            assert list(command.events) == sorted(command.events)
            for n in command.events:
                places[n].append((tuple(command.channels), number))
            if len(command.events) > 1:
                [channel] = command.channels
                assert len(command.events) <= WIRES[channel.partition(":")[0]].bundle_events
                assert not any(request[n].tried for n in command.events)
                size = sum(len(request[n].payload.encode()) + ENTRY_BYTES for n in command.events)
                assert size <= limits.channel_bytes
        for n, sent in enumerate(request):
            assert sorted(channel for channels, _ in places[n] for channel in channels) == sorted(sent.unsent)
        for name in {sent.aggregate_id for sent in request}:
            mine = [n for n, sent in enumerate(request) if sent.aggregate_id == name]
            assert len({tuple(sorted(number for _, number in places[n])) for n in mine}) == 1
    for aggregate in {sent.aggregate for sent in events}:
        ids = [sent.id for request in requests for sent in request if sent.aggregate == aggregate]
        assert ids == sorted(ids)


def test_one_aggregate_fills_bundles() -> None:
    """Four, four and two of ten; where a channel takes none, one by one."""
    assert [len(request) for request in waves([event() for _ in range(10)], Limits(), WIRES)] == [4, 4, 2]
    mixed = [event(channels=["b:x", "plain:w"]) for _ in range(3)]
    assert [len(request) for request in waves(mixed, Limits(), WIRES)] == [1, 1, 1]
    pairs = [event(channels=["pair:z"]) for _ in range(4)]
    assert [len(request) for request in waves(pairs, Limits(), WIRES)] == [2, 2]


def test_who_is_in_no_bundle_has_no_bound() -> None:
    """Another aggregate's event on a plain channel shares a request as ever."""
    events = [event(str(n), channels=["plain:w"]) for n in range(10)]
    assert waves(events, Limits(), WIRES) == [events]


def test_what_was_refused_before_travels_by_itself() -> None:
    """In no bundle, and in no request with another event of its aggregate."""
    tried = [event(tried=True), event(tried=True)]
    assert waves([*tried, event()], Limits(), WIRES)[:2] == [tried[:1], tried[1:]]
    assert [list(command.events) for command in commands([tried[0], event("2"), event("3")], WIRES)] == [[0], [1, 2]]


def test_a_request_counts_publications() -> None:
    """Room for one publication is room for a whole bundle, and for no more."""
    events = [event(str(n % 2), channels=[f"b:{n % 2}"]) for n in range(6)]
    assert [len(request) for request in waves(events, Limits(events=1), WIRES)] == [3, 3]
    assert waves(events, Limits(events=2), WIRES) == [events]
    wider = [event("1", channels=["b:x"]), event("2", channels=["b:x", "b:y"])]
    assert waves(wider, Limits(events=1), WIRES) == [wider[:1], wider[1:]]
    # What has a publication of its own beside its bundle counts as one.
    beside = [event(str(n), channels=["b:x", "plain:w"]) for n in range(3)]
    assert waves(beside, Limits(events=2), WIRES) == [beside[:2], beside[2:]]


def test_a_bundle_counts_all_its_bytes() -> None:
    """The tags, and about what is beside them and the payload."""
    tags = json.dumps({"note": "x" * 1_000})
    events = [event(tags=tags) for _ in range(4)]
    assert [len(request) for request in waves(events, Limits(channel_bytes=3_000), WIRES)] == [2, 2]
    usual = [event(str(uuid.uuid4()), event_id=str(uuid.uuid4()), epoch="7d2f.1", payload="{}") for _ in range(4)]
    [command] = commands(usual, WIRES)
    assert 0.5 < len(command.text) / (4 * ENTRY_BYTES) < 1


# What a request says


def test_a_bundle_on_the_wire() -> None:
    """Payloads byte for byte, each with the tags that it would have alone; one event alone is no bundle."""
    first = event(payload='{"n": 9007199254740993}', tags='{"region": "eu"}', epoch="e", base_version=0)
    second, other = event(payload="[1e400]", kind="tombstone"), event("2", channels=["b:y"])
    asked = commands([first, second, other], WIRES)
    assert [(list(command.channels), list(command.events)) for command in asked] == [(["b:x"], [0, 1]), (["b:y"], [2])]
    [bundle, alone] = items(members(encode_commands(asked, parallel=False))["commands"])
    fields = members(members(bundle)["publish"])
    assert json.loads(fields["tags"]) == {"ob": "1", "ob_bundle": "2"}
    entries = [members(entry) for entry in items(members(fields["data"])["ob"])]
    assert [entry["data"] for entry in entries] == [first.payload.encode(), second.payload.encode()]
    for entry, sent in zip(entries, (first, second), strict=True):
        [by_itself] = items(members(encode_commands(commands([sent], WIRES), parallel=False))["commands"])
        assert json.loads(entry["tags"]) == json.loads(members(members(by_itself)["publish"])["tags"])
    assert json.loads(members(members(alone)["publish"])["idempotency_key"]) == other.idempotency_key


def test_the_key_of_a_bundle_is_that_of_its_channel_and_its_events_in_order() -> None:
    """The same bundle again is a duplicate for Centrifugo; anything else is not."""
    one, two, three = event(), event(), event()
    elsewhere = [replace(sent, channels=["b:y"]) for sent in (one, two)]
    groups = ([one, two], [one, two], [two, one], [one, three], [one, two, three], elsewhere)
    keys = [json.loads(commands(group, WIRES)[0].text)["publish"]["idempotency_key"] for group in groups]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5
    assert all(key.startswith("bundle:") and len(key) == 39 for key in keys)


def test_a_refusal_of_a_bundle_is_no_events_own() -> None:
    """What refused an event alone is its own; the other channel's bundle has accepted it."""
    events = [event(channels=["b:x", "plain:w"]), event("2")]
    asked = commands(events, WIRES)
    error = {"code": 107, "message": "no"}

    def refuse(channel: str, error: Any) -> Refusal:
        return Refusal(channel, error["code"], error["message"])

    assert [list(command.channels) for command in asked] == [["plain:w"], ["b:x"]]
    bundle_refused = replies(events, asked, [{"publish": {}}, {"error": error}], refuse)
    assert [(reply.accepted, reply.bundled) for reply in bundle_refused] == [(("plain:w",), True), ((), True)]
    own_refused = replies(events, asked, [{"error": error}, {"publish": {}}], refuse)
    assert [(reply.accepted, reply.bundled) for reply in own_refused] == [(("b:x",), False), ((), False)]
    assert own_refused[1].refusals == ()
    with pytest.raises((AttributeError, KeyError, TypeError)):
        replies(events, [Command("", ["b:x"], (0, 1))], [{"broadcast": {}}], refuse)


# A real Centrifugo


@pytest.fixture(scope="module")
def server(centrifugo_binary: Path) -> Iterator[Centrifugo]:
    hist = DEFAULT_CONFIG["channel"]["namespaces"][0]
    namespaces = [hist, hist | {"name": "bundles"}]
    with Centrifugo(centrifugo_binary, config={"channel": {"namespaces": namespaces}}) as own:
        yield own


OPTIONS = Options(
    policy=Policy(backoff_base=3600.0, backoff_max=3600.0),
    wires={"bundles": Wire(bundle_events=100)},
    lanes=256,
    events_per_lane=1_000,
)


def publisher(url: str, server: Centrifugo) -> Publisher:
    return Publisher(url, server.api_key, wires=OPTIONS.wires)


def hear(subscriber: Subscriber, count: int) -> list[tuple[Fact, str]]:
    """The events received, with their kinds, once they are so many."""
    wait_until(lambda: len(unpacked(subscriber.received)) >= count, f"{count} events are heard")
    return unpacked(subscriber.received)


def unpacked(publications: Sequence[Publication]) -> list[tuple[Fact, str]]:
    """The events received, with their kinds."""
    entries: list[dict[str, str]] = []
    for publication in publications:
        if "ob_bundle" in publication.tags:
            bundle = [json.loads(members(entry)["tags"]) for entry in items(members(publication.data)["ob"])]
            assert publication.tags == {"ob": "1", "ob_bundle": str(len(bundle))}
            entries += bundle
        else:
            entries.append(publication.tags)
    return [
        (Fact((tags["ob_type"], tags["ob_id"]), int(tags["ob_version"]), tags["ob_event"]), tags["ob_kind"])
        for tags in entries
    ]


def test_a_hot_aggregate_travels_in_bundles(
    connect: Connect, database_url: str, server: Centrifugo, subscribe: Subscribe
) -> None:
    """250 events of one order in three publications of three requests, in order; a single one is no bundle. A lane that
    is alone may fill a batch as it is shipped."""
    connection, subscriber = connect(), subscribe("bundles:hot", server=server)
    with (
        Gateway(server.api_url) as gateway,
        Stepper(database_url, publisher(gateway.url, server), Options(wires=OPTIONS.wires)) as steps,
    ):
        with connection.transaction():
            committed = [write(connection, "1", version, "bundles:hot") for version in range(1, 251)]
        steps.drain()
        received = subscriber.wait_for(3)
        assert [publication.tags["ob_bundle"] for publication in received] == ["100", "100", "50"]
        assert violations(committed, [fact for fact, _ in unpacked(received)]) == []
        committed.append(write(connection, "1", 251, "bundles:hot"))
        steps.drain()
        [*_, last] = subscriber.wait_for(4)
        assert last.tags["ob_version"] == "251"
        assert len(gateway.requests) == 4
    assert states(connection) == {"delivered": 251}


@pytest.mark.parametrize("hot", [True, False], ids=["of one order", "of many orders"])
def test_a_refused_bundle_is_split_until_the_guilty_is_alone(
    connect: Connect, database_url: str, server: Centrifugo, subscribe: Subscribe, hot: bool
) -> None:
    """A bundle is refused whenever it holds the 37th event. It alone is held, and in the end dead; everybody else gets
    through, its own order's successors after its gap. (A stand-in refuses one publication among its like.)"""
    channel = f"bundles:{hot}"
    connection, subscriber = connect(), subscribe(channel, server=server)
    committed = [
        write(connection, "1" if hot else str(n), n, channel, '"poison"' if n == 37 else "{}") for n in range(1, 101)
    ]
    with (
        Gateway(server.api_url, refuse_commands(b'"poison"')) as gateway,
        Stepper(database_url, publisher(gateway.url, server), OPTIONS) as steps,
    ):
        steps.drain(batches=30)
        assert [(hold.aggregate_id, hold.tries) for hold in steps.holds] == [("1" if hot else "37", 1)]
        write(connection, "neighbour", 1, channel)
        steps.drain()
        steps.make_due()
        steps.drain(batches=30)
        assert steps.holds == []
        assert len(gateway.requests) < 40
    facts = [(fact, kind) for fact, kind in hear(subscriber, 101) if fact.aggregate[1] != "neighbour"]
    gaps = [fact for fact, kind in facts if kind == "gap"]
    assert gaps == [committed[36]]
    if hot:
        assert [fact.version for fact, _ in facts] == list(range(1, 101))
    assert violations(committed, [fact for fact, _ in facts]) == []
    assert states(connection) == {"delivered": 100, "dead": 1}


def test_what_one_channel_has_accepted_of_a_bundle_is_not_sent_there_again(
    connect: Connect, database_url: str, server: Centrifugo, subscribe: Subscribe
) -> None:
    """Two channels with a bundle each, of which one is refused: the events are split for that one only."""
    connection = connect()
    subscriber = subscribe("bundles:good", server=server)
    for version in range(1, 9):
        write(connection, "1", version, ["bundles:good", "bundles:bad"])
    with (
        Gateway(server.api_url, refuse_commands(b'"bundles:bad"')) as gateway,
        Stepper(database_url, publisher(gateway.url, server), OPTIONS) as steps,
    ):
        steps.drain()
        assert [hold.tries for hold in steps.holds] == [1]
    received = [fact.version for fact, _ in hear(subscriber, 8)]
    assert received == list(range(1, 9))
    accepted = connection.execute("SELECT DISTINCT accepted, state::text FROM outbox").fetchall()
    assert accepted == [(["bundles:good"], "parked")]


def test_a_payload_too_deep_for_centrifugo_takes_nobody_with_it(
    connect: Connect, database_url: str, server: Centrifugo, subscribe: Subscribe
) -> None:
    """It is never sent, and its successors wait for its end."""
    connection, subscriber = connect(), subscribe("bundles:deep", server=server)
    for version in range(1, 9):
        deep = "[" * 9_995 + "]" * 9_995
        write(connection, "1", version, "bundles:deep", deep if version == 5 else "{}")
    with Stepper(database_url, publisher(server.api_url, server), OPTIONS) as steps:
        steps.drain()
        assert [hold.tries for hold in steps.holds] == [1]
    assert [fact.version for fact, _ in hear(subscriber, 4)] == [1, 2, 3, 4]
    assert Counter(steps_states(connection)) == {"delivered": 4, "parked": 4}


def test_bundles_and_an_outage(connect: Connect, database_url: str, server: Centrifugo, subscribe: Subscribe) -> None:
    """Nothing is accepted, each bundle answered with 100, as while a broker is down: the relay pauses, and when it is
    over all go out in order. (A stand-in refuses: the memory engine cannot be down by itself.)"""
    connection, subscriber = connect(), subscribe("bundles:out", server=server)
    committed = [write(connection, "1", version, "bundles:out") for version in range(1, 41)]
    with (
        Gateway(server.api_url, refuse_commands(b"bundles", code=100)) as gateway,
        Stepper(database_url, publisher(gateway.url, server), OPTIONS) as steps,
    ):
        for _ in range(4):
            steps.step()
            assert steps.pauses
        assert steps.holds == []
        gateway.fault = None
        steps.drain()
    assert violations(committed, [fact for fact, _ in hear(subscriber, 40)]) == []
    assert states(connection) == {"delivered": 40}


def steps_states(connection: Connection) -> list[str]:
    return [state for (state,) in connection.execute("SELECT state::text FROM outbox")]


def refuse_commands(needle: bytes, code: int = 107) -> Callable[..., None]:
    """A stand-in that refuses the commands whose text holds `needle`; the real one answers for the others."""

    def fault(exchange: Any) -> None:
        body = members(exchange.body)
        asked = items(body["commands"])
        exchange.body = b'{"commands":[' + b",".join(command for command in asked if needle not in command) + b"]}"
        status, answer = exchange.forward()
        answers = iter(json.loads(answer).get("replies", []))
        error = {"error": {"code": code, "message": "refused by the stand-in"}}
        found = [error if needle in command else next(answers) for command in asked]
        exchange.answer(status, json.dumps({"replies": found}).encode())

    return fault
