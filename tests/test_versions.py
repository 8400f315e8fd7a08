"""Versions that go down: noticed, counted and logged, and delivered all the same."""

from __future__ import annotations

from collections.abc import Callable

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.event import Event
from outbox_relay.metrics import Metrics
from outbox_relay.options import Options
from outbox_relay.runner import Relay
from outbox_relay.store import Store
from outbox_relay.versions import SLOTS, Versions
from tests.conftest import Connect, StartRelay
from tests.support.relays import drain
from tests.support.subscriber import Subscriber
from tests.support.writing import states, write

Subscribe = Callable[..., Subscriber]


def event(id_: int, name: str, version: int, epoch: str = "e") -> Event:
    return Event(
        id=id_,
        event_id="",
        aggregate_type="order",
        aggregate_id=name,
        lane=0,
        version=version,
        kind="change",
        channels=["plain:a"],
        payload="{}",
        tags=None,
        accepted=None,
        created_at=0.0,
        epoch=epoch,
    )


def slot(name: str) -> int:
    return hash(("order", name)) % SLOTS


def test_what_is_a_fall() -> None:
    """A version below that of an earlier event of the same object, in one batch or in another. What rises, stays, or
    was sent again is none, and another epoch begins anew."""
    versions = Versions()
    b = next(name for name in "bcd" if slot(name) != slot("a"))
    assert versions.falls([event(1, "a", 5), event(2, b, 3), event(3, "a", 5), event(4, "a", 6)]) == []
    fallen = event(5, "a", 1)
    assert versions.falls([fallen, event(6, "a", 2)]) == [(fallen, 6)]
    assert versions.falls([event(4, "a", 6), event(1, "a", 5)]) == []
    sent_again, fell = event(4, "a", 6), event(7, b, 1)
    assert versions.falls([sent_again, fell]) == [(fell, 3)]
    assert versions.falls([event(8, "a", 1, "f"), event(9, b, 1, "f")]) == []
    assert versions.falls([event(10, "a", 2, "f"), fell := event(11, "a", 1, "f")]) == [(fell, 2)]


def test_memory_is_bounded() -> None:
    """What is forgotten is not noticed, and is not taken for another object's; the newest object is remembered."""
    versions = Versions(slots=100)
    assert versions.falls(event(n, str(n), 2_000 - n) for n in range(1, 1_001)) == []
    fallen = versions.falls(event(3_000 - n, str(n), 1) for n in range(1_000, 0, -1))
    assert 1 <= len(fallen) <= 100
    assert (fallen[0].event.aggregate_id, fallen[0].version_before) == ("1000", 1_000)


def test_most_objects_of_a_usual_number_are_remembered() -> None:
    versions = Versions()
    assert versions.falls(event(n, str(n), 2) for n in range(1, 10_001)) == []
    fallen = versions.falls(event(n + 10_000, str(n), 1) for n in range(1, 10_001))
    assert 6_000 < len(fallen) < 10_000


def test_a_fall_is_counted_logged_and_delivered(
    connect: Connect, start_relay: StartRelay, subscribe: Subscribe, channel: str
) -> None:
    """Once per event, with the object's name in the log; the subscriber gets it."""
    subscriber = subscribe(channel)
    relay = start_relay()
    for version in (8, 1, 2):
        write(connect(), "7", version, channel)
    assert [publication.version for publication in subscriber.wait_for(3)] == [8, 1, 2]
    relay.wait_for("version went down: subscribers ignore the event")
    [line] = [line for line in relay.log if line["event"].startswith("version went down")]
    assert (line["aggregate_type"], line["aggregate_id"], line["version"], line["version_before"]) == (
        "order",
        "7",
        1,
        8,
    )
    assert line["events"] == 1


def test_a_fall_is_in_the_metrics(connect: Connect, database_url: str, centrifugo: Centrifugo, channel: str) -> None:
    metrics = Metrics()
    for name, version in (("a", 2), ("a", 1), ("b", 1), ("b", 2), ("c", 3), ("c", 1)):
        write(connect(), name, version, channel)
    drain(
        Relay(
            lambda: Store(database_url),
            lambda: Publisher(centrifugo.api_url, centrifugo.api_key),
            Options(workers=1),
            metrics,
        )
    )
    assert states(connect()) == {"delivered": 6}
    [falls] = [family for family in metrics.collect() if family.name == "outbox_relay_version_falls"]
    assert [sample.value for sample in falls.samples] == [2]
