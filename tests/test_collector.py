"""Python's collector has nothing to do for a relay, which makes it run seldom: what a batch leaves is in no cycles."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.cli import statements_leave_cycles
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.options import Options
from outbox_relay.relay import Worker
from outbox_relay.shared import Pause, Shared
from outbox_relay.store import Store
from tests.conftest import Connect
from tests.support.gateway import Exchange, Gateway
from tests.support.waiting import PATIENCE
from tests.support.writing import write
from tests.test_hostile_server import refusing

BATCHES = 5


@contextmanager
def uncollected() -> Iterator[Counter[str]]:
    """What of a relay's the collector would have had to free, by type, once the block has ended."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds = [type(each) for each in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    watched = {"outbox_relay", "httpx"} | (set() if statements_leave_cycles() else {"psycopg", "psycopg_binary"})
    found.update(f"{kind.__module__}.{kind.__name__}" for kind in kinds if kind.__module__.partition(".")[0] in watched)


def broken_off(exchange: Exchange) -> None:
    exchange.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    exchange.hang_up()


@pytest.mark.parametrize(
    "fault",
    [
        None,
        refusing({"code": 102, "message": "unknown channel"}),
        broken_off,
        Exchange.reset,
        Exchange.wait_for_client_to_leave,
        lambda exchange: exchange.answer(503, b"busy"),
        lambda exchange: exchange.answer(200, b"welcome"),
        lambda exchange: exchange.write(b"who are you?\r\n\r\n"),
    ],
    ids=["delivered", "refused", "broken off", "reset", "no answer", "503", "no JSON", "no HTTP"],
)
def test_batches_leave_no_cycles(
    database_url: str,
    connect: Connect,
    centrifugo: Centrifugo,
    gateway: Gateway,
    channel: str,
    fault: Callable[[Exchange], None] | None,
) -> None:
    """Neither where all is well nor where a request or its events fail: not in the first batch, nor in later ones."""
    connection = connect()
    for n in range(20 * BATCHES):
        write(connection, str(n), 1, channel)
    gateway.fault = fault
    timeout = 0.1 if fault is Exchange.wait_for_client_to_leave else PATIENCE
    publisher = Publisher(gateway.url, centrifugo.api_key, timeout=timeout)
    options = Options(batch_events=10, lanes=4, events_per_lane=1)
    shared = Shared(Pause(options.pause_min, options.pause_max))
    with closing(Store(database_url)) as store, closing(publisher), uncollected() as found:
        worker = Worker(store, publisher, options, shared)
        assert [worker.run_once() for _ in range(BATCHES)] == [True] * BATCHES
    assert not found
