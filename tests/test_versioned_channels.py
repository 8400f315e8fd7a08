"""Map channels and exclusive channels: Centrifugo itself drops what is older than what it has."""

from __future__ import annotations

import json
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import DEFAULT_CONFIG, Centrifugo
from outbox_relay.event import ACCEPTED, OVERTAKEN, Event
from outbox_relay.metrics import Metrics
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from outbox_relay.packing import Wire
from outbox_relay.wire import commands
from tests.conftest import Connect
from tests.support.gateway import Gateway
from tests.support.stepping import Stepper
from tests.support.subscriber import Subscriber
from tests.support.writing import Connection

Subscribe = Callable[..., Subscriber]

WIRES = {"map": Wire("map"), "one": Wire("exclusive")}
OPTIONS = Options(policy=Policy(backoff_base=3600.0, backoff_max=3600.0), wires=WIRES)


@pytest.fixture(scope="module")
def server(centrifugo_binary: Path) -> Iterator[Centrifugo]:
    hist = DEFAULT_CONFIG["channel"]["namespaces"][0]
    mapped = {"name": "map", "subscription_type": "map", "map": {"mode": "recoverable", "key_ttl": "60s"}}
    with Centrifugo(
        centrifugo_binary, config={"channel": {"namespaces": [hist, hist | {"name": "one"}, mapped]}}
    ) as own:
        yield own


@pytest.fixture
def name() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def steps(database_url: str, server: Centrifugo) -> Iterator[Stepper]:
    with Stepper(database_url, Publisher(server.api_url, server.api_key, wires=WIRES), OPTIONS) as own:
        yield own


def add(
    connection: Connection, version: int, *channels: str, kind: str = "snapshot", id_: str = "1", expired: bool = False
) -> None:
    connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, kind, channels, payload, expires_at) "
        "VALUES ('order', %s, %s, %s::text::outbox_kind, %s, %s, CASE WHEN %s THEN now() END)",
        (id_, version, kind, list(channels), json.dumps({"version": version}), expired),
    )


def ends(connection: Connection) -> list[tuple[int, str]]:
    return connection.execute("SELECT version, state::text FROM outbox ORDER BY id").fetchall()


def counted(metrics: Metrics) -> dict[str, int]:
    """Outcomes that there were, and how many events a map has dropped."""
    samples = {sample.name: sample for family in metrics.collect() for sample in family.samples}
    [events] = [family for family in metrics.collect() if family.name == "outbox_relay_events"]
    outcomes = {sample.labels["outcome"]: int(sample.value) for sample in events.samples if sample.value}
    return outcomes | {"overtaken": int(samples["outbox_relay_overtaken_total"].value)}


def state_of(server: Centrifugo, channel: str) -> dict[str, tuple[str, str, Any]]:
    """What a map channel holds, as Centrifugo says: version, kind and data by key."""
    request = urllib.request.Request(
        f"{server.api_url}/map_read_state",
        json.dumps({"channel": channel, "limit": 100}).encode(),
        {"X-API-Key": server.api_key, "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    return {
        entry["key"]: (entry["tags"]["ob_version"], entry["tags"]["ob_kind"], entry["data"])
        for entry in answer["result"].get("entries", [])
    }


def test_a_map_holds_the_newest_version_of_each_object(
    connect: Connect, steps: Stepper, server: Centrifugo, name: str
) -> None:
    """A version that comes late is superseded, and the outbox says so. A tombstone is a value, under its version, so
    that it is not forgotten; so is a gap."""
    connection, channel = connect(), f"map:{name}"
    for version in (1, 3, 2):
        add(connection, version, channel)
    add(connection, 5, channel, kind="tombstone", id_="2")
    add(connection, 4, channel, id_="2")
    add(connection, 7, channel, id_="3", expired=True)
    steps.drain()
    assert ends(connection) == [
        (1, "delivered"),
        (3, "delivered"),
        (2, "superseded"),
        (5, "delivered"),
        (4, "superseded"),
        (7, "expired"),
    ]
    assert state_of(server, channel) == {
        "order/1": ("3", "snapshot", {"version": 3}),
        "order/2": ("5", "tombstone", {"version": 5}),
        "order/3": ("7", "gap", {}),
    }


def test_what_a_map_drops_is_counted_apart(connect: Connect, database_url: str, server: Centrifugo, name: str) -> None:
    """Conflated events were never sent. A copy of what the map has is stale too; a gap is told, whatever it met."""
    connection, channel, metrics = connect(), f"map:{name}", Metrics()
    options = replace(OPTIONS, policies={"order": replace(OPTIONS.policy, conflate=True)})
    with Stepper(
        database_url, Publisher(server.api_url, server.api_key, wires=WIRES), options, observer=metrics
    ) as steps:
        for version in (3, 4, 5):
            add(connection, version, channel)
        steps.drain()
        assert counted(metrics) == {"delivered": 1, "superseded": 2, "overtaken": 0}
        add(connection, 2, channel)
        steps.drain()
        add(connection, 5, channel)
        steps.drain()
        add(connection, 1, channel, expired=True)
        steps.drain()
    assert counted(metrics) == {"delivered": 1, "superseded": 4, "overtaken": 2, "expired": 1}
    assert [state for _, state in ends(connection)] == [
        *["superseded"] * 2,
        "delivered",
        *["superseded"] * 2,
        "expired",
    ]


def test_another_epoch_begins_anew(
    connect: Connect, steps: Stepper, server: Centrifugo, subscribe: Subscribe, name: str
) -> None:
    """After a bump the database's versions count, however low."""
    connection, channels = connect(), [f"map:{name}", f"one:{name}"]
    subscriber = subscribe(channels[1], server=server)
    add(connection, 9, *channels)
    steps.drain()
    add(connection, 2, *channels)
    steps.drain()
    connection.execute("UPDATE outbox_epoch SET bumped_at = clock_timestamp()")
    add(connection, 1, *channels)
    steps.drain()
    assert state_of(server, channels[0]) == {"order/1": ("1", "snapshot", {"version": 1})}
    assert [publication.version for publication in subscriber.wait_for(2)] == [9, 1]


def test_an_exclusive_channel_drops_what_is_older(
    connect: Connect, steps: Stepper, server: Centrifugo, subscribe: Subscribe, name: str
) -> None:
    """Centrifugo does not tell, so the outbox says delivered; nobody hears it."""
    connection, channel = connect(), f"one:{name}"
    subscriber = subscribe(channel, server=server)
    for version in (1, 3, 2, 4):
        add(connection, version, channel)
    steps.drain()
    assert {state for _, state in ends(connection)} == {"delivered"}
    assert [publication.version for publication in subscriber.wait_for(3)] == [1, 3, 4]


@pytest.mark.parametrize("namespace", ["map", "one"])
def test_a_change_is_refused_there(
    connect: Connect, database_url: str, server: Centrifugo, subscribe: Subscribe, name: str, namespace: str
) -> None:
    """It is never sent; with evidence it is dead, and its successor goes on. Its other channel gets it."""
    connection, subscriber = connect(), subscribe(f"hist:{name}", server=server)
    with (
        Gateway(server.api_url) as gateway,
        Stepper(database_url, Publisher(gateway.url, server.api_key, wires=WIRES), OPTIONS) as steps,
    ):
        add(connection, 1, f"{namespace}:{name}", f"hist:{name}", kind="change")
        add(connection, 2, f"{namespace}:{name}")
        steps.step()
        add(connection, 1, f"{namespace}:{name}", id_="2")
        steps.step()
        steps.make_due()
        steps.drain()
        asked = [(command.channels, command.version, command.kind) for command in gateway.commands]
    assert asked == [
        ((f"hist:{name}",), 1, "change"),
        ((f"{namespace}:{name}",), 1, "snapshot"),
        ((f"{namespace}:{name}",), 1, "gap"),
        ((f"{namespace}:{name}",), 2, "snapshot"),
    ]
    assert ends(connection) == [(1, "dead"), (2, "delivered"), (1, "delivered")]
    [(error,)] = connection.execute("SELECT error FROM outbox WHERE state = 'dead'")
    assert "takes snapshots and tombstones, no changes" in error
    assert [publication.version for publication in subscriber.wait_for(1)] == [1]


def event(channels: list[str], version: int = 1, aggregate: tuple[str, str] = ("order", "1"), id_: int = 1) -> Event:
    return Event(id_, f"e{id_}", *aggregate, 0, version, "snapshot", channels, "{}", None, None, 0.0, epoch="e")


def test_superseded_only_where_all_channels_know_better(server: Centrifugo, name: str) -> None:
    """Accepted as a stream's publication, it is delivered. The same event once more is a duplicate, and delivered."""
    with closing(Publisher(server.api_url, server.api_key, wires=WIRES)) as publisher:
        newest = event([f"map:{name}"], version=3)
        assert publisher.publish([newest]) == [ACCEPTED]
        replies = publisher.publish([newest])
        assert isinstance(replies, list)
        assert replies[0] is ACCEPTED
        both = [f"map:{name}", f"hist:{name}"]
        replies = publisher.publish([event(both, version=2, id_=2)])
        assert isinstance(replies, list)
        assert replies[0] is ACCEPTED
        replies = publisher.publish([event(both[:1], version=1, id_=3)])
        assert isinstance(replies, list)
        assert replies[0] is OVERTAKEN


def test_no_two_aggregates_have_one_key() -> None:
    aggregates = [("a", "b/c"), ("a/b", "c"), ("a%2Fb", "c"), ("a", "b%2Fc")]
    asked = [commands([event(["map:x"], aggregate=aggregate)], WIRES)[0].text for aggregate in aggregates]
    keys = {json.loads(text)["map_publish"]["key"] for text in asked}
    assert keys == {"a/b/c", "a%2Fb/c", "a%252Fb/c", "a/b%2Fc"}
