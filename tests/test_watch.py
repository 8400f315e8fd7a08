"""One worker of an idle relay looks out for events: the others stand by, and come when they are called."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from outbox_relay import runner
from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.event import Event, Outage, Reply
from outbox_relay.options import Options
from outbox_relay.runner import Ended, Relay
from outbox_relay.store import Store
from tests.conftest import Connect
from tests.support.waiting import PATIENCE, in_background, wait_until
from tests.support.writing import states, write

EAGER = Options(workers=3, poll_min=0.001, poll_max=0.001, batch_events=1, lanes=1, events_per_lane=1)
LOOKS = 50


@pytest.fixture(autouse=True)
def nobody_comes_uncalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "STAND_BY", 3600.0)


class Place:
    """A relay whose workers are told apart by their threads: who looked for events, who published any."""

    def __init__(self, database_url: str, centrifugo: Centrifugo, options: Options = EAGER) -> None:
        self.looks: Counter[str] = Counter()
        self.published: Counter[str] = Counter()
        self.pids: dict[str, int] = {}
        self.banned = ""
        """The worker that gets no session any more."""
        self.free = threading.Event()
        """Until it is set, requests with an event of the object "slow" wait."""
        self.free.set()
        place = self

        class Looking(Store):
            def anything_to_do(self) -> bool:
                place.looks[threading.current_thread().name] += 1
                return super().anything_to_do()

        class Publishing(Publisher):
            def publish(self, events: Sequence[Event], deadline: float | None = None) -> list[Reply] | Outage:
                place.published[threading.current_thread().name] += 1
                if any(event.aggregate_id == "slow" for event in events) and not place.free.wait(PATIENCE):
                    raise AssertionError("nobody has freed the request")
                return super().publish(events, deadline)

        def open_store() -> Store:
            if threading.current_thread().name == self.banned:
                raise DatabaseUnavailableError("no session for this one")
            store = Looking(database_url, wake_up=False)
            self.pids[threading.current_thread().name] = store.execute("SELECT pg_backend_pid()").fetchall()[0][0]
            return store

        self.relay = Relay(open_store, lambda: Publishing(centrifugo.api_url, centrifugo.api_key), options)

    @property
    def keeper(self) -> str:
        """Once all others have come to rest."""
        wait_until(lambda: len(self.looks) == EAGER.workers, "every worker has looked")
        before = Counter(self.looks)
        wait_until(lambda: max((self.looks - before).values(), default=0) >= LOOKS, "somebody keeps watch")
        return (self.looks - before).most_common(1)[0][0]


@pytest.fixture
def place(database_url: str, centrifugo: Centrifugo) -> Place:
    return Place(database_url, centrifugo)


def test_one_worker_asks_for_all(place: Place) -> None:
    """And nobody has to wait for those that stand by when the relay is stopped."""
    with place.relay:
        keeper = place.keeper
        before = Counter(place.looks)
        wait_until(lambda: place.looks[keeper] >= before[keeper] + LOOKS, "the watch goes on")
        assert set(place.looks - before) == {keeper}
    assert place.relay.join() is Ended.STOPPED


def test_the_watch_outlasts_a_single_event(
    database_url: str, centrifugo: Centrifugo, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "ALONE", math.inf)
    place = Place(database_url, centrifugo, replace(EAGER, lanes=2))
    with place.relay:
        keeper = place.keeper
        write(connect(), "1", 1, "plain:a")
        wait_until(lambda: states(connect()) == {"delivered": 1}, "it is delivered")
        assert place.keeper == keeper


def test_a_call_ends_the_watch() -> None:
    """Of the one who keeps it, and by nobody else; that it is busy is no call."""
    watch = runner._Watch(3600.0)
    assert watch.keep(0)
    assert not watch.keep(1)
    with in_background(lambda: watch.stand_by(2 * PATIENCE)) as ended:
        watch.busy(1, again=True)
        watch.busy(0)
        assert not watch.keep(1)
        watch.busy(0, again=True)
        ended()
    assert watch.keep(1)
    assert not watch.keep(0)


def test_nobody_stands_by_once_it_is_stopped() -> None:
    """Whoever comes to rest only after that does not wait either."""
    watch = runner._Watch(3600.0)
    watch.stop()
    watch.keep(0)
    watch.keep(1)
    with in_background(lambda: watch.stand_by(2 * PATIENCE)) as ended:
        ended()


@pytest.mark.parametrize(
    ("lanes", "alone", "called"),
    [(20, math.inf, True), (256, 0.0, True), (256, math.inf, False)],
    ids=["full batches", "slow batches", "quick batches"],
)
def test_many_events_call_the_others(
    lanes: int,
    alone: float,
    called: bool,
    database_url: str,
    centrifugo: Centrifugo,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where one worker's batches are quick, and take not all the lanes that they may, it delivers them all."""
    monkeypatch.setattr(runner, "ALONE", alone)
    monkeypatch.setattr(runner._Watch, "stand_by", lambda watch, _: watch._over.wait(PATIENCE))
    place = Place(database_url, centrifugo, replace(EAGER, lanes=lanes))
    connection = connect()
    with place.relay:
        keeper = place.keeper
        connection.execute(
            "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) "
            "SELECT 'order', n % 200, 1 + n / 200, '{plain:a}', '{}' FROM generate_series(0, 2999) AS n"
        )
        wait_until(lambda: states(connection) == {"delivered": 3000}, "all are delivered")
    assert (set(place.published) != {keeper}) == called


def test_nobody_waits_for_a_batch_that_takes_long(place: Place, connect: Connect) -> None:
    """The one who keeps watch is in it, and the others look for themselves."""
    connection = connect()
    with place.relay:
        assert place.keeper
        place.free.clear()
        try:
            write(connection, "slow", 1, "plain:a")
            wait_until(lambda: place.published.total() == 1, "the slow one is under way")
            write(connection, "1", 1, "plain:a")
            wait_until(lambda: states(connection) == {"delivered": 1, "pending": 1}, "the other one is delivered")
        finally:
            place.free.set()
        wait_until(lambda: states(connection) == {"delivered": 2}, "the slow one is too")


def test_another_one_keeps_watch_where_the_database_is_lost(place: Place, connect: Connect) -> None:
    connection = connect()
    with place.relay:
        place.banned = lost = place.keeper
        connection.execute("SELECT pg_terminate_backend(%s, 10000)", (place.pids[lost],))
        write(connection, "1", 1, "plain:a")
        wait_until(lambda: states(connection) == {"delivered": 1}, "it is delivered")
        assert place.keeper != lost
    assert lost not in place.published
