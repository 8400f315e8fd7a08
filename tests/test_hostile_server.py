"""Whoever answers in Centrifugo's place can refuse, delay and lie; no answer stops a relay or passes for another's.

The servers here are stand-ins: no Centrifugo answers like this.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress

import pytest

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.endpoint import CUT
from outbox_relay.event import Event, Outage, Refusal, Reply, boottime
from tests.conftest import Connect, MakeRelay
from tests.support.gateway import Exchange, Gateway
from tests.support.waiting import wait_until
from tests.support.writing import states, write

EVENT = Event(1, "00000000-0000-0000-0000-000000000001", "order", "1", 0, 1, "change", ["a"], "{}", None, None, 0.0)


BLAMELESS = (401, 404, 405, 407, 408, 421, 425, 429, 503, 504)
"""Statuses that speak of the key, the address or the time."""
NO_REPLY = (b"welcome", b"[1]", b'{"error":{"code":100}}', b'{"replies":{}}', b'{"replies":[]}', b'{"replies":[3]}')


def refusing(error: object) -> Callable[[Exchange], None]:
    """Every event is refused with this error."""
    return lambda exchange: exchange.answer(
        200, json.dumps({"replies": [{"error": error}] * len(exchange.commands)}).encode()
    )


@contextmanager
def answers(*bodies: Sequence[bytes]) -> Iterator[str]:
    """A server that writes to its n-th request the n-th sequence of replies at once, and its URL."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        left = list(bodies)

        def serve(connection: socket.socket) -> None:
            with closing(connection), connection.makefile("rb") as lines:
                while line := lines.readline():
                    if line.lower().startswith(b"content-length:"):
                        size = int(line.split()[1])
                    if line == b"\r\n":
                        lines.read(size)
                        connection.sendall(b"".join(map(response, left.pop(0))))

        def accept() -> None:
            for _ in bodies:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def response(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


ACCEPTED = b'{"replies":[{"publish":{}}]}'
REFUSED = b'{"replies":[{"error":{"code":107,"message":"bad request"}}]}'


def test_an_answer_too_many_is_not_taken_for_the_next_one() -> None:
    """A proxy that answers twice: the second answer says that the next event was accepted, which Centrifugo refused."""
    with answers([REFUSED, ACCEPTED], [REFUSED], [REFUSED]) as url, closing(Publisher(url, "key")) as publisher:
        for _ in range(3):
            assert publisher.publish([EVENT]) == [Reply((Refusal("a", 107, "bad request"),))]


@pytest.mark.parametrize("code", [0, -1, 1.5, True, "107", None, [], {}, 10**30])
def test_a_code_that_is_none(code: object, gateway: Gateway) -> None:
    """Nothing but a positive whole number is a code; an answer with another one is nobody's fault."""
    gateway.fault = refusing({"code": code, "message": "no"})
    with closing(Publisher(gateway.url, "key")) as publisher:
        answer = publisher.publish([EVENT])
    assert isinstance(answer, Outage)
    assert "not Centrifugo's" in answer.reason


def test_a_message_is_text_of_one_line_without_the_key(gateway: Gateway) -> None:
    """No NUL, which PostgreSQL would refuse, no line of its own in a log, nothing that a terminal obeys."""
    gateway.fault = refusing(
        {"code": 107, "message": "\0\n2026 [error] forged\x1b[2J\u202e s3cret-key" + "\x07" * 10_000}
    )
    with closing(Publisher(gateway.url, "s3cret-key")) as publisher:
        [reply] = publisher.publish([EVENT])  # type: ignore[misc]
    [refusal] = reply.refusals
    assert refusal.message.startswith(r"\x00\n2026 [error] forged\x1b[2J\u202e ***\x07")
    assert refusal.message.isprintable()
    assert len(refusal.message) <= 200


def test_a_message_that_postgresql_cannot_store_stops_nobody(
    connect: Connect, make_relay: MakeRelay, gateway: Gateway, channel: str
) -> None:
    """The refused event is settled with its message, and its successors go out when the refusals are over."""
    connection = connect()
    write(connection, "1", 1, channel)
    gateway.fault = refusing({"code": 102, "message": "a\0b"})
    with make_relay(api_url=gateway.url):
        wait_until(lambda: states(connection) == {"parked": 1}, "the refused event is parked")
        gateway.fault = None
        wait_until(lambda: states(connection) == {"delivered": 1}, "the event is delivered")


def test_a_chunk_of_negative_size_does_not_fill_the_memory(gateway: Gateway) -> None:
    """Who takes it for all that comes reads on until the connection ends, and here it never does."""
    sent = 0

    def endless(exchange: Exchange) -> None:
        nonlocal sent
        exchange.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n")
        with suppress(OSError):
            while True:
                exchange.write(b"x" * 65_536)
                sent += 65_536

    gateway.fault = endless
    with closing(Publisher(gateway.url, "key")) as publisher:
        assert isinstance(publisher.publish([EVENT], boottime() + 0.5), Outage)
    assert sent < 20_000_000


HEAD = b"HTTP/1.1 200 OK\r\n"
IN_CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
WITH_LENGTH = HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(ACCEPTED), ACCEPTED)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.1 103 Early\r\nContent-Length: 5\r\n\r\n" * 3 + WITH_LENGTH, id="after interim answers"),
        pytest.param(HEAD + b"\r\n" + ACCEPTED, id="until the connection ends"),
        pytest.param(WITH_LENGTH.replace(b"1.1", b"1.0"), id="of an old server"),
        pytest.param(IN_CHUNKS + b"%x\r\n%b\r\n0\r\n\r\n" % (len(ACCEPTED), ACCEPTED), id="in a chunk"),
        pytest.param(
            IN_CHUNKS + b"".join(b"1;why=not\r\n%c\r\n" % byte for byte in ACCEPTED) + b"0\r\nX: y\r\n\r\n",
            id="byte by byte, with a trailer",
        ),
        pytest.param(WITH_LENGTH + b"\0 garbage", id="before garbage"),
        pytest.param(WITH_LENGTH + WITH_LENGTH.replace(b"publish", b"nothing"), id="before another one"),
    ],
)
def test_an_answer_that_http_allows(gateway: Gateway, answer: bytes) -> None:
    """Read once, though it is not how Centrifugo writes it; the next request has an answer of its own."""

    def write(exchange: Exchange) -> None:
        exchange.write(answer)
        if answer == HEAD + b"\r\n" + ACCEPTED:
            exchange.hang_up()

    with closing(Publisher(gateway.url, "key")) as publisher:
        for _ in range(2):
            gateway.fault = write
            assert publisher.publish([EVENT]) == [Reply(())]
            gateway.fault = lambda exchange: exchange.answer(200, REFUSED)
            assert publisher.publish([EVENT]) == [Reply((Refusal("a", 107, "bad request"),))]


def test_what_an_interim_answer_says_is_not_of_the_final_one(gateway: Gateway) -> None:
    gateway.fault = lambda exchange: exchange.write(
        b"HTTP/1.1 103 Early\r\nRetry-After: 60\r\n\r\nHTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"
    )
    with closing(Publisher(gateway.url, "key")) as publisher:
        assert publisher.publish([EVENT]) == Outage("HTTP 503")


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(WITH_LENGTH[:-1], id="cut short"),
        pytest.param(IN_CHUNKS + b"%x\r\n%b\r\n" % (len(ACCEPTED), ACCEPTED), id="without its last chunk"),
        pytest.param(HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + ACCEPTED, id="compressed, it says"),
        pytest.param(
            IN_CHUNKS.replace(b"Transfer", b"Transfer-Encoding: gzip\r\nTransfer")
            + b"%x\r\n%b\r\n0\r\n\r\n" % (len(ACCEPTED), ACCEPTED),
            id="compressed and in chunks",
        ),
        pytest.param(HEAD[:-2] + b"\r\n", id="cut in its head"),
        pytest.param(
            b"HTTP/1.1 150 Wait\r\nContent-Length: %d\r\n\r\n%b" % (len(ACCEPTED), ACCEPTED)
            + HEAD
            + b"Content-Length: 0\r\n\r\n",
            id="in the body of an interim answer",
        ),
        pytest.param(b"HTTP/1.1 099 Wait\r\nContent-Length: 0\r\n\r\n" + WITH_LENGTH, id="after no status at all"),
        pytest.param(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", id="upgrade"),
        pytest.param(
            HEAD + b"Content-Length: 1\r\nContent-Length: %d\r\n\r\n%b" % (len(ACCEPTED), ACCEPTED), id="two lengths"
        ),
        pytest.param(
            IN_CHUNKS.replace(b"Transfer", b"Content-Length: 5\r\nTransfer")
            + b"%x\r\n%b\r\n0\r\n\r\n" % (len(ACCEPTED), ACCEPTED),
            id="a length and chunks",
        ),
    ],
)
def test_an_answer_that_may_be_another_one(gateway: Gateway, answer: bytes) -> None:
    """Not whole, or to be read in two ways: nothing in it counts."""

    def write_and_leave(exchange: Exchange) -> None:
        exchange.write(answer)
        exchange.hang_up()

    gateway.fault = write_and_leave
    with closing(Publisher(gateway.url, "key")) as publisher:
        outage = publisher.publish([EVENT])
    assert isinstance(outage, Outage)
    assert outage.reason.startswith("RemoteProtocolError: ")
    assert outage.verdict == CUT


WAIT = b"HTTP/1.1 150 Wait\r\nContent-Length: 999999999999\r\n\r\n"


@pytest.mark.parametrize("head", [HEAD + b"X: ", HEAD, b"", WAIT, IN_CHUNKS + b"0\r\nX: ", IN_CHUNKS + b"0\r\n"])
@pytest.mark.parametrize(
    "more", [b"x" * 1_000, b"X: y\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"1;%b\r\nx\r\n" % (b"x" * 100)]
)
def test_an_answer_without_an_end_does_not_fill_the_memory(gateway: Gateway, head: bytes, more: bytes) -> None:
    """A head, a trailer, interim answers or the body of one, or chunks with much about them, for ever."""
    sent = 0

    def endless(exchange: Exchange) -> None:
        nonlocal sent
        exchange.write(head)
        with suppress(OSError):
            while True:
                exchange.write(more * 64)
                sent += len(more) * 64

    gateway.fault = endless
    with closing(Publisher(gateway.url, "key")) as publisher:
        outage = publisher.publish([EVENT])
    assert isinstance(outage, Outage)
    assert "no answer within" not in outage.reason
    assert sent < 20_000_000


def test_many_small_objects_in_the_place_of_a_reply(gateway: Gateway) -> None:
    gateway.fault = lambda exchange: exchange.answer(200, b'{"replies":[' + b"[]," * 20_000 + b"[]]}")
    with closing(Publisher(gateway.url, "key")) as publisher:
        assert publisher.publish([EVENT]) == Outage("20001 replies to 1 commands", verdict=200)


def test_an_address_with_colons(gateway: Gateway) -> None:
    """An IPv6 address whose end is no port: here one that stands for 127.0.0.1."""
    port = gateway.url.rpartition(":")[2]
    gateway.fault = lambda exchange: exchange.answer(200, b'{"replies":[{"publish":{}}]}')
    with closing(Publisher(f"http://[::ffff:127.0.0.1]:{port}", "key")) as publisher:
        assert publisher.publish([EVENT]) == [Reply(())]


@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        *((status, b"", 0) for status in BLAMELESS),
        *((status, b"", status) for status in (400, 403, 413, 422, 500, 502)),
        *((200, body, 200) for body in NO_REPLY),
    ],
)
def test_what_an_answer_has_against_the_request(gateway: Gateway, status: int, body: bytes, verdict: int) -> None:
    """And perhaps against the events in it."""
    gateway.fault = lambda exchange: exchange.answer(status, body)
    with closing(Publisher(gateway.url, "key")) as publisher:
        outage = publisher.publish([EVENT])
    assert isinstance(outage, Outage)
    assert outage.verdict == verdict
