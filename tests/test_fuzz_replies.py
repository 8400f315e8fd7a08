"""Whatever answers in Centrifugo's place: 100,000 replies that no Centrifugo gives, from a seed.

Each begins as a right reply and is spoilt, as JSON, as HTTP or as bytes. Most go through httpx from memory, because
that is quick; some through a socket, in front of a real Centrifugo, to a real relay. `make test` takes a part of them,
`make fuzz` all.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import random
import re
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.event import ACCEPTED, Event, Outage, Reply
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from tests.conftest import Connect
from tests.support.gateway import Exchange, Gateway
from tests.support.oracle import Fact, violations
from tests.support.stepping import Stepper
from tests.support.subscriber import Subscriber
from tests.support.waiting import wait_until
from tests.support.writing import fact, states, write

SEED: Final = 32
REPLIES: Final = 100_000
PARTS: Final = 20
SOME: Final = 1_000
BY_SOCKET: Final = 3_000
Chance = random.Random


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        parts = range(PARTS) if metafunc.config.getoption("full") else [0]
        metafunc.parametrize("seed", [f"{SEED}/{part}" for part in parts], ids=[f"{part + 1:02}" for part in parts])


# Spoiling


def any_json(chance: Chance, depth: int = 0) -> Any:
    """Some JSON value, often one that looks like a part of a reply."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: chance.choice([True, False]),
        lambda: chance.choice([0, 1, -1, 100, 102, 107, 2**31, 2**63, 2**64 - 1, 10**30]),
        lambda: chance.choice([0.5, -0.0, 1e308]),
        lambda: chance.choice(["", "publish", "error", "ünïcode ☃", "\0", "\x1b[2J", "x" * 5_000]),
        lambda: chance.choice([{}, {"publish": {}}, {"error": {"code": 107}}, {"code": 100, "message": "internal"}]),
    ]
    if depth < 3:
        kinds += [
            lambda: [any_json(chance, depth + 1) for _ in range(chance.randint(0, 4))],
            lambda: {
                chance.choice(
                    ["error", "publish", "broadcast", "responses", "replies", "code", "message", "x"]
                ): any_json(chance, depth + 1)
                for _ in range(chance.randint(0, 3))
            },
        ]
    return chance.choice(kinds)()


def spoil_json(chance: Chance, value: Any) -> Any:
    """`value` with one part of it changed, removed, doubled or moved."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return any_json(chance)
    if isinstance(value, dict):
        key = chance.choice(list(value))
        rest = {name: part for name, part in value.items() if name != key}
        ways: list[Callable[[], Any]] = [
            *[lambda: {**value, key: spoil_json(chance, value[key])}] * 6,
            lambda: rest,
            lambda: {**rest, chance.choice(["error", "publish", "broadcast", key.upper()]): value[key]},
            lambda: {**value, "error": any_json(chance)},
        ]
        return chance.choice(ways)()
    place = chance.randrange(len(value))
    parts = list(value)
    match chance.randrange(10):
        case 0:
            del parts[place]
        case 1:
            parts.insert(place, parts[place])
        case 2:
            chance.shuffle(parts)
        case _:
            parts[place] = spoil_json(chance, parts[place])
    return parts


def spoil_bytes(chance: Chance, data: bytes) -> bytes:
    """`data` with some of it flipped, cut out, doubled or put in."""
    spoilt = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place, length = chance.randrange(len(spoilt) + 1), chance.randint(1, 12)
        match chance.randrange(5):
            case 0:
                spoilt[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                del spoilt[place : place + length]
            case 2:
                spoilt[place:place] = spoilt[place : place + length]
            case 3:
                spoilt[place:place] = chance.randbytes(length)
            case _:
                del spoilt[place:]
    return bytes(spoilt)


HEADERS: Final = [
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip",
    b"Content-Encoding: gzip",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: -1",
    b"Content-Length: 5",
    b"Connection: close",
    b"Connection: upgrade",
    b"Upgrade: websocket",
    b"Retry-After: 99999999999999999999999999",
    b"Retry-After: -1",
    b"Retry-After: Fri, 31 Dec 1999 23:59:59 GMT",
    b"Retry-After: \xd9\xa3",
    b"Location: http://[::1",
    b"Location: /api",
    b"Content-Type: text/html; charset=\xff",
    b"Set-Cookie: a=b",
    b"X: " + b"y" * 200_000,
    b"X\x00: y",
    b" folded",
    b"no colon",
]
STATUSES: Final = [
    200,
    200,
    200,
    200,
    201,
    204,
    206,
    301,
    302,
    304,
    307,
    308,
    400,
    401,
    403,
    404,
    413,
    429,
    500,
    502,
    999,
]


def in_chunks(chance: Chance, body: bytes) -> bytes:
    """The body in chunks, one of which may have a size that is none."""
    middle = len(body) // 2
    sizes = [b"%x" % middle, b"%x" % (len(body) - middle), b"0"]
    if chance.random() < 0.5:
        sizes[chance.randrange(3)] = chance.choice(
            [b"-1", b"-5", b"0x5", b"5_0", b" 5", b"+5", b"5;ext=1", b"f" * 30, b"", b"\xff", b"9" * 70_000]
        )
    return b"".join(b"%b\r\n%b\r\n" % pair for pair in zip(sizes, [body[:middle], body[middle:], b""], strict=True))


def as_http(chance: Chance, body: bytes, *, spoilt: bool) -> bytes:
    """An answer with this body; `spoilt` is its envelope."""
    if not spoilt:
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    headers = chance.sample(HEADERS, chance.randint(0, 3))
    if chance.random() < 0.3:
        body = in_chunks(chance, body)
        headers.append(b"Transfer-Encoding: chunked")
    if chance.random() < 0.1:
        headers.append(b"Set-Cookie: %d=%b; Max-Age=100000" % (chance.randrange(10**9), b"z" * 2_000))
    if chance.random() < 0.8:
        headers.append(b"Content-Length: %d" % (len(body) + chance.choice([0, 0, 0, -1, 1, 1000])))
    chance.shuffle(headers)
    interim = b"HTTP/1.1 103 Early\r\n\r\n" * chance.choice([0, 0, 0, 1, 100])
    if chance.random() < 0.1:
        interim = b"HTTP/1.1 %03d Early\r\nContent-Length: %d\r\n\r\n%b" % (
            chance.choice([0, 99, 150]),
            len(body),
            body,
        )
    version = chance.choice([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"ICY"])
    head = b"%b %d %b" % (version, chance.choice(STATUSES), chance.choice([b"OK", b"", b"\xff" * 10]))
    tail = chance.choice([b"", b"", b"", b"HTTP/1.1 200 OK\r\n\r\n", body])
    return interim + b"\r\n".join([head, *headers, b"", b""]) + body + tail


def spoil(chance: Chance, right: bytes) -> bytes:
    """An HTTP answer made of a right reply's body, spoilt in one way or in several."""
    reply, body = json.loads(right), right
    ways = chance.choice(["json"] * 5 + ["bytes", "http", "http", "all", "http bytes"])
    if ways in {"json", "all"}:
        for _ in range(chance.randint(1, 3)):
            reply = spoil_json(chance, reply)
        body = json.dumps(reply, ensure_ascii=chance.random() < 0.5).encode(errors="replace")
        if chance.random() < 0.02:
            body = body.replace(b"{}", b'{"a":' * 2_000 + b"{}" + b"}" * 2_000)
        if chance.random() < 0.01:
            body += b" " * 1_000_000
    if ways in {"bytes", "all"}:
        body = spoil_bytes(chance, body)
    answer = as_http(chance, body, spoilt=ways in {"http", "all"})
    return spoil_bytes(chance, answer) if ways == "http bytes" else answer


# What a reply says, as somebody else reads it


class Received:
    """What http.client reads from, in the place of a socket."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def makefile(self, *_: Any) -> io.BytesIO:
        return self._file


def says_accepted(answer: bytes, events: Sequence[Event]) -> list[bool]:
    """Which events an HTTP answer says are accepted, read by Python's own HTTP and JSON."""
    none = [False] * len(events)
    # h11 takes any digits for the version of HTTP, and http.client does not.
    source = Received(re.sub(rb"HTTP/\d\.\d", b"HTTP/1.1", answer))
    try:
        while True:
            response = http.client.HTTPResponse(source)  # type: ignore[arg-type]
            response.begin()
            if response.status >= 200:
                break
            source = Received(source.makefile().read())
        replies = json.loads(response.read())["replies"] if response.status == 200 else none
        if len(replies) != len(events):
            return none
    except (http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError):
        return none
    return [is_success(reply, event) for reply, event in zip(replies, events, strict=True)]


def is_success(reply: Any, event: Event) -> bool:
    if not isinstance(reply, dict) or reply.get("error") is not None:
        return False
    if len(event.channels) == 1:
        return isinstance(reply.get("publish"), dict)
    broadcast = reply.get("broadcast")
    responses = broadcast.get("responses") if isinstance(broadcast, dict) else None
    return (
        isinstance(responses, list)
        and len(responses) == len(event.channels)
        and all(isinstance(response, dict) and response.get("error") is None for response in responses)
    )


# From memory


class Hostile:
    """The server's end, a stand-in: it takes what is sent, and then has `answer` to be read, in pieces."""

    def __init__(self, chance: Chance) -> None:
        self.answer = b""
        self._chance = chance
        self._left: bytes | None = None
        self._nothing, self._never = os.pipe()

    def connect(self, *_: Any, **__: Any) -> Hostile:
        self._left = None
        return self

    def settimeout(self, _seconds: float) -> None:
        pass

    def setsockopt(self, *_: int) -> None:
        pass

    def send(self, data: memoryview) -> int:
        self._left = None
        return len(data)

    def recv(self, most: int) -> bytes:
        if self._left is None:
            self._left = self.answer
        size = min(most, self._chance.choice([1, 10, 100, 100_000, 100_000]))
        data, self._left = self._left[:size], self._left[size:]
        return data

    def fileno(self) -> int:
        return self._nothing

    def close(self) -> None:
        pass

    def end(self) -> None:
        os.close(self._nothing)
        os.close(self._never)


def some_events(chance: Chance) -> list[Event]:
    return [
        Event(
            n,
            f"id {n}",
            "order",
            str(n),
            0,
            1,
            "change",
            chance.choice([["a"], ["a"], ["a", "b"]]),
            "{}",
            None,
            None,
            0.0,
        )
        for n in range(chance.randint(1, 6))
    ]


def right_reply(chance: Chance, events: Sequence[Event]) -> bytes:
    error = {"error": {"code": 108, "message": "not available"}}
    replies = [
        chance.choice([error, {"publish": {}}, {"publish": {"offset": 1, "epoch": "x"}}])
        if len(event.channels) == 1
        else {"broadcast": {"responses": [chance.choice([error, {"result": {}}]) for _ in event.channels]}}
        for event in events
    ]
    return json.dumps({"replies": replies}).encode()


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_no_reply_breaks_the_publisher(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, seed: str) -> None:
    """One answer per event or one outage for all, and accepted is only what an independent reader of the same bytes
    takes for accepted. Nothing else is raised, and nothing accumulates."""
    count = REPLIES // PARTS if pytestconfig.getoption("full") else SOME
    chance = Chance(seed)
    network = Hostile(chance)
    outcomes: Counter[str] = Counter()
    settled = 0
    monkeypatch.setattr(socket, "create_connection", network.connect)
    with closing(Publisher("http://127.0.0.1:1", "the-key")) as publisher:
        for number in range(count):
            events = some_events(chance)
            network.answer = spoil(chance, right_reply(chance, events))
            answer = publisher.publish(events)
            if number == count // 4:
                settled = resident()
            if isinstance(answer, Outage):
                outcomes["outage"] += 1
                assert answer.reason.isprintable()
                continue
            assert len(answer) == len(events)
            for reply, event, accepted in zip(answer, events, says_accepted(network.answer, events), strict=True):
                assert isinstance(reply, Reply)
                assert accepted or reply is not ACCEPTED, (network.answer, event)
                assert set(reply.accepted) | {refusal.channel for refusal in reply.refusals} <= set(event.channels)
                outcomes["accepted" if reply is ACCEPTED else "refused"] += 1
        assert resident() - settled < 30_000_000
    network.end()
    assert min(outcomes.values()) > count / 100, outcomes
    assert len(outcomes) == 3


# Through a socket


def test_no_reply_loses_an_event(
    pytestconfig: pytest.Config,
    connect: Connect,
    database_url: str,
    gateway: Gateway,
    centrifugo: Centrifugo,
    subscribe: Callable[..., Subscriber],
    channel: str,
) -> None:
    """A real relay's batches while the real Centrifugo accepts all of them, and its replies are spoilt on their way.
    Then they are right again. No event is left behind; who is dead was refused for good by a reply, for all anybody
    can tell; and the subscriber has heard all, in order, and nothing twice."""
    count = BY_SOCKET if pytestconfig.getoption("full") else BY_SOCKET // 20
    chance = Chance(SEED)
    subscriber, connection = subscribe(channel), connect()
    written: Counter[str] = Counter()
    committed = []

    def spoilt(exchange: Exchange) -> None:
        exchange.write(spoil(chance, exchange.forward()[1]))
        exchange.hang_up()

    options = Options(policy=Policy(max_attempts=1_000_000, backoff_base=0.0))
    with Stepper(database_url, Publisher(gateway.url, centrifugo.api_key, timeout=1.0), options) as stepper:
        gateway.fault = spoilt
        while len(gateway.requests) < count:
            for name in chance.sample("abcdefghij", 2):
                written[name] += 1
                committed.append(write(connection, name, written[name], channel))
            stepper.step()
        gateway.fault = None
        stepper.drain(10_000)
    ended = states(connection)
    assert ended.keys() <= {"delivered", "dead"}
    assert ended["delivered"] > ended.get("dead", 0)
    refused = connection.execute(
        "SELECT count(*) FROM outbox WHERE error LIKE 'Centrifugo refused channel%'"
    ).fetchone()
    assert refused == (ended.get("dead", 0),)

    def heard() -> list[Fact]:
        # A gap is told after an event that was accepted, and then said to be refused.
        return [fact(publication) for publication in subscriber.received if publication.tags["ob_kind"] != "gap"]

    wait_until(lambda: len(heard()) >= len(committed), "the subscriber has heard all")
    assert violations(committed, heard()) == []
