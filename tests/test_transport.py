"""One connection to Centrifugo: kept while it is good, given up when it may not be, and nothing past the deadline.

The servers here are stand-ins: they say what was sent to them, and when to answer.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace

import pytest

from outbox_relay import transport
from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.event import ACCEPTED, Event, Outage, boottime
from tests.support.waiting import PATIENCE, wait_until

EVENT = Event(1, "00000000-0000-0000-0000-000000000001", "order", "1", 0, 1, "change", ["a"], "{}", None, None, 0.0)
BODY = b'{"replies":[{"publish":{}}]}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)


class Server:
    """It answers each request, and puts down the number of the connection that it came by, and its body."""

    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self.connections: list[socket.socket] = []
        self.answer = ANSWER
        self.reads = 1_000
        """How many requests it reads."""
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._over.set()
        self._listener.close()
        for connection in self.connections:
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection, len(self.connections)), daemon=True).start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        with suppress(OSError), connection.makefile("rb") as lines:
            size = 0
            while line := lines.readline():
                if line.lower().startswith(b"content-length:"):
                    size = int(line.split()[1])
                elif line == b"\r\n":
                    self.heard.put((number, lines.read(size)))
                    self.reads -= 1
                    connection.sendall(self.answer)
                    if not self.reads:
                        self._over.wait(PATIENCE)


@pytest.fixture
def server() -> Iterator[Server]:
    with closing(Server()) as server:
        yield server


def publish(publisher: Publisher, server: Server) -> int:
    """Publish the event, and say by which connection it came."""
    assert publisher.publish([EVENT]) == [ACCEPTED]
    return server.heard.get(timeout=PATIENCE)[0]


def test_requests_share_a_connection(server: Server) -> None:
    with closing(Publisher(server.url, "key")) as publisher:
        assert [publish(publisher, server) for _ in range(5)] == [1] * 5


def test_a_connection_that_was_idle_for_long_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server may have given it up at the same moment, and then a request is lost of which nothing is known."""
    with closing(Publisher(server.url, "key")) as publisher:
        assert publish(publisher, server) == 1
        now = boottime()
        monkeypatch.setattr(transport, "boottime", lambda: now + 9.0)
        assert publish_at(publisher, server, now + 9.0) == 1
        monkeypatch.setattr(transport, "boottime", lambda: now + 9.0 + 11.0)
        assert publish_at(publisher, server, now + 9.0 + 11.0) == 2


def publish_at(publisher: Publisher, server: Server, now: float) -> int:
    assert publisher.publish([EVENT], now + PATIENCE) == [ACCEPTED]
    return server.heard.get(timeout=PATIENCE)[0]


@pytest.mark.parametrize("late", [ANSWER, b"\r\n", b""], ids=["another answer", "an empty line", "its end"])
def test_what_comes_after_an_answer_ends_the_connection(server: Server, late: bytes) -> None:
    """It would be read as the next request's answer."""
    with closing(Publisher(server.url, "key")) as publisher:
        assert publish(publisher, server) == 1
        connection = server.connections[0]
        if late:
            connection.sendall(late)
        else:
            connection.shutdown(socket.SHUT_WR)
        kept = publisher._transport._connection
        assert kept is not None
        wait_until(kept.readable, "it has come")
        assert publish(publisher, server) == 2


def test_a_large_request_comes_whole(server: Server) -> None:
    payload = '{"a":"' + "x" * 900_000 + '"}'
    with closing(Publisher(server.url, "key")) as publisher:
        assert publisher.publish([replace(EVENT, payload=payload)]) == [ACCEPTED]
    _, body = server.heard.get(timeout=PATIENCE)
    assert body.startswith(b'{"commands":[')
    assert payload.encode() in body


def test_a_server_that_reads_nothing_is_left_at_the_deadline(server: Server) -> None:
    """Whatever the buffers in between do not hold is not sent. The connection was made for an earlier request."""
    payload = '{"a":"' + "x" * 900_000 + '"}'
    events = [replace(EVENT, id=n, payload=payload) for n in range(40)]
    server.reads = 1
    with closing(Publisher(server.url, "key", timeout=PATIENCE)) as publisher:
        assert publish(publisher, server) == 1
        outage = publisher.publish(events, boottime() + 0.3)
    assert isinstance(outage, Outage)
    assert "WriteTimeout" in outage.reason


@pytest.mark.parametrize("surplus", [b"\0 garbage", b"HTTP/1.1 ", ANSWER])
def test_what_comes_with_an_answer_ends_the_connection(server: Server, surplus: bytes) -> None:
    server.answer = ANSWER + surplus
    with closing(Publisher(server.url, "key")) as publisher:
        assert [publish(publisher, server) for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(("url", "port"), [("http://centrifugo", 80), ("https://centrifugo", 443), ("http://c:1", 1)])
def test_the_port_is_that_of_the_scheme(monkeypatch: pytest.MonkeyPatch, url: str, port: int) -> None:
    asked: list[int] = []

    def connect(address: tuple[str, int], _timeout: float) -> socket.socket:
        asked.append(address[1])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    with closing(Publisher(url, "key")) as publisher:
        assert isinstance(publisher.publish([EVENT]), Outage)
    assert asked == [port]


def test_a_key_is_no_second_header(server: Server) -> None:
    """Nothing is sent with it."""
    with closing(Publisher(server.url, "key\r\nX-Other: value")) as publisher:
        assert isinstance(publisher.publish([EVENT]), Outage)
    assert server.heard.empty()
