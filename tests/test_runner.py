"""How a relay's run ends, and that it does not end before."""

from __future__ import annotations

import threading
from contextlib import ExitStack, closing

import pytest

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.options import Options
from outbox_relay.runner import Ended, Relay
from outbox_relay.store import Claim, Store
from tests.conftest import Connect, MakeRelay
from tests.support.waiting import in_background, wait_until
from tests.support.writing import states, write

LOOKS = 5


class Watched(Store):
    """Counts the sessions of a test, and their looks for events and claims."""

    opened = 0
    looks = 0
    claims = 0

    def __init__(self, database_url: str) -> None:
        super().__init__(database_url, wake_up=False)
        type(self).opened += 1

    def anything_to_do(self) -> bool:
        type(self).looks += 1
        return super().anything_to_do()

    def claim(self, after: int, lanes: int) -> Claim:
        type(self).claims += 1
        return super().claim(after, lanes)


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    for count in ("opened", "looks", "claims"):
        monkeypatch.setattr(Watched, count, 0)
    return Watched


@pytest.fixture
def relay(database_url: str, centrifugo: Centrifugo, sessions: type[Watched]) -> Relay:
    """Two workers, which look for events in quick succession."""
    return Relay(
        lambda: sessions(database_url),
        lambda: Publisher(centrifugo.api_url, centrifugo.api_key),
        Options(workers=2, poll_min=0.001, poll_max=0.01),
    )


def test_a_run_goes_on_where_nothing_is_pending(
    relay: Relay, sessions: type[Watched], connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Until it is asked to stop. Nothing is said of a database that was never away."""
    caplog.set_level("INFO", "outbox_relay")
    write(connect(), "1", 1, "plain:a")
    with in_background(relay.run) as ended:
        try:
            wait_until(lambda: states(connect()) == {"delivered": 1}, "it is delivered")
            before = sessions.looks
            wait_until(lambda: relay.stopping or sessions.looks >= before + LOOKS, "it looks for more")
            assert not relay.stopping
        finally:
            relay.stop()
        assert ended() is Ended.STOPPED
    assert "relay started" in caplog.text
    assert "database" not in caplog.text


def test_a_relay_runs_once(make_relay: MakeRelay) -> None:
    relay = make_relay()
    assert relay.run(until_empty=True) is Ended.EMPTY
    with pytest.raises(RuntimeError, match="make another one"):
        relay.run()


def test_what_others_are_at_is_waited_for(
    relay: Relay, sessions: type[Watched], connect: Connect, database_url: str
) -> None:
    """In a run until nothing is pending: they may not get it delivered. Nobody connects anew meanwhile."""
    write(connect(), "1", 1, "plain:a")
    with closing(Store(database_url)) as other, ExitStack() as batch:
        batch.enter_context(other.batch())
        assert len(other.claim(after=0, lanes=1).lanes) == 1
        with in_background(lambda: relay.run(until_empty=True)) as ended:
            try:
                wait_until(lambda: relay.stopping or sessions.claims >= LOOKS, "it tries again and again")
                assert not relay.stopping
                batch.close()
                assert ended() is Ended.EMPTY
            finally:
                relay.stop()
    assert states(connect()) == {"delivered": 1}
    assert sessions.opened == 2


def test_one_failed_worker_ends_the_run(
    database_url: str, centrifugo: Centrifugo, caplog: pytest.LogCaptureFixture
) -> None:
    """What is no loss of the database is not understood, and not tried again: whoever started the relay does that."""

    def open_store() -> Store:
        if threading.current_thread().name == "outbox-relay-1":
            raise LookupError("not foreseen")
        return Store(database_url)

    relay = Relay(open_store, lambda: Publisher(centrifugo.api_url, centrifugo.api_key), Options(workers=2))
    with in_background(relay.run) as ended:
        try:
            assert ended() is Ended.FAILED
        finally:
            relay.stop()
    assert "not foreseen" in caplog.text
