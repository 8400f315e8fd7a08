"""What networks and middle boxes do to the ways of a relay: to its database, and to Centrifugo."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Final

from tests.chaos.fault import Fault, Strike
from tests.chaos.world import World
from tests.chaos.writers import REFUSED
from tests.support.gateway import Exchange
from tests.support.proxy import TcpProxy
from tests.support.waiting import wait_until


def database(harm: Callable[[TcpProxy], None]) -> Strike:
    """A fault of one relay's way to the database."""

    @contextmanager
    def strike(world: World, chance: Random) -> Iterator[None]:
        with world.victim(chance) as slot:
            harm(slot.database)
            try:
                yield
            finally:
                slot.database.mend()

    return strike


@contextmanager
def database_half_open(world: World, chance: Random) -> Iterator[None]:
    """Nothing comes through any more and nobody says so, until the connection turns out to be gone."""
    with world.victim(chance) as slot:
        slot.database.stall()
        yield
        slot.database.cut()
        slot.database.mend()


@contextmanager
def commit_cut(world: World, chance: Random) -> Iterator[None]:
    """A COMMIT reaches the database, its answer never reaches the relay."""
    with world.victim(chance) as slot:
        slot.database.cut_after(b"COMMIT")
        wait_until(lambda: not slot.database.armed, f"{slot.name} commits")
    yield


def centrifugo(harm: Callable[[Exchange], None]) -> Strike:
    """A fault of the way to Centrifugo: of all relays, or of one."""

    @contextmanager
    def strike(world: World, chance: Random) -> Iterator[None]:
        with world.window.doing(harm, chance.choice([None, *(slot.name for slot in world.slots)])):
            yield

    return strike


@contextmanager
def held_then_forwarded(world: World, chance: Random) -> Iterator[None]:
    """Requests arrive after their relays have given them up: what was sent once more comes twice, or late."""
    flowing = threading.Event()

    def hold(exchange: Exchange) -> None:
        flowing.wait()
        exchange.answer(*exchange.forward())

    with world.window.doing(hold):
        yield
        flowing.set()


def half_open(exchange: Exchange) -> None:
    exchange.wait_for_client_to_leave()


def reply_dripping(exchange: Exchange) -> None:
    """Each byte within any time-out of a single read."""
    exchange.forward()
    exchange.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        exchange.write(b" ")
        time.sleep(0.05)


def reply_cut(exchange: Exchange) -> None:
    status, body = exchange.forward()
    exchange.write(f"HTTP/1.1 {status} OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) // 2])
    exchange.reset()


def request_duplicated(exchange: Exchange) -> None:
    """A middle box that repeats what it thinks was lost, when the relay has long gone on."""
    exchange.answer(*exchange.forward())
    threading.Timer(0.3, exchange.forward).start()


def slow(exchange: Exchange) -> None:
    time.sleep(0.4)
    exchange.answer(*exchange.forward())


def too_large(exchange: Exchange) -> None:
    """413 for what is larger than 16 KiB."""
    if len(exchange.body) > 16 * 1024:
        exchange.answer(413)
    else:
        exchange.answer(*exchange.forward())


def one_payload_refused(exchange: Exchange) -> None:
    """403 for a request that holds a certain text, whatever else is in it."""
    if REFUSED.encode() in exchange.body:
        exchange.answer(403)
    else:
        exchange.answer(*exchange.forward())


def answered(status: int, **headers: str) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.answer(status, json.dumps({"replies": []}).encode(), headers)


FAULTS: Final = (
    Fault("database connection cut", database(TcpProxy.cut), (0.2, 1.5), beside=True, from_strike=True),
    Fault("database connection half-open", database_half_open, (6.0, 8.0), beside=True, from_strike=True),
    Fault("database connection held, then on", database(TcpProxy.stall), (0.5, 8.0), beside=True, from_strike=True),
    Fault("database connection dripping", database(lambda proxy: proxy.drip(64)), (1.0, 3.0), beside=True),
    Fault("answer to COMMIT cut", commit_cut, from_strike=True),
    Fault("Centrifugo connections cut", centrifugo(Exchange.reset), (0.3, 2.0)),
    Fault("Centrifugo connections half-open", centrifugo(half_open), (0.5, 4.0)),
    Fault("requests held, then forwarded", held_then_forwarded, (3.5, 5.0)),
    Fault("replies dripping", centrifugo(reply_dripping), (0.5, 4.0)),
    Fault("replies cut in the middle", centrifugo(reply_cut), (0.3, 2.0)),
    Fault("requests duplicated", centrifugo(request_duplicated), (1.0, 3.0)),
    Fault("slow Centrifugo", centrifugo(slow), (1.0, 3.0)),
    Fault("429", centrifugo(answered(429)), (0.3, 2.0)),
    Fault("502", centrifugo(answered(502)), (0.3, 2.0)),
    Fault("503 with Retry-After", centrifugo(answered(503, **{"Retry-After": "1"})), (0.3, 2.0)),
    Fault("413 for large requests", centrifugo(too_large), (0.5, 3.0)),
    Fault("one payload refused", centrifugo(one_payload_refused), (1.0, 3.0)),
    Fault("redirect", centrifugo(answered(307, Location="http://127.0.0.1:9/api/batch")), (0.3, 2.0)),
)
