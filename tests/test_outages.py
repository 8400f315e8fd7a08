"""Outages of Centrifugo, whatever their face: no event is blamed, the relay says so once and recovers by itself."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import pytest

from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.options import Options
from tests.conftest import Connect, MakeRelay
from tests.support.gateway import Exchange, Fault, Gateway, drip
from tests.support.oracle import Fact, violations
from tests.support.subscriber import Subscriber
from tests.support.waiting import wait_until
from tests.support.writing import Connection, fact, states, write

Subscribe = Callable[..., Subscriber]

SAID = "outage: nothing is published, no event is blamed"
OVER = "outage is over"


@pytest.fixture
def journal(caplog: pytest.LogCaptureFixture) -> Callable[[str], int]:
    """How often the relay has said something."""
    caplog.set_level("INFO", "outbox_relay")

    def count(message: str) -> int:
        return caplog.messages.count(message)

    return count


def status(code: int, body: bytes = b"", **headers: str) -> Fault:
    return lambda exchange: exchange.answer(
        code, body, {name.replace("_", "-"): value for name, value in headers.items()}
    )


def blame(connection: Connection) -> list[tuple[str, str | None]]:
    """Whatever is held against any event: there must be nothing during an outage."""
    return connection.execute(
        "SELECT state::text, error FROM outbox WHERE state NOT IN ('pending', 'delivered') OR error IS NOT NULL "
        "UNION ALL SELECT 'hold', error FROM outbox_hold"
    ).fetchall()


FACES: dict[str, Fault] = {
    "500": status(500),
    "502 from a proxy": status(502, b"<html>bad gateway</html>"),
    "503": status(503),
    "403": status(403),
    "404: not the API's address": status(404, b"404 page not found\n"),
    "413 from a proxy": status(413),
    "400 for the whole request": status(400, b"Bad Request\n"),
    "429": status(429, Retry_After="0"),
    "a redirect": status(307, Location="http://127.0.0.1:9/api/batch"),
    "a page for people": status(200, b"<html>welcome</html>"),
    "JSON that is no reply": status(200, b"[1]"),
    "an error for the whole batch": status(200, b'{"error":{"code":100,"message":"internal server error"}}'),
    "fewer replies than commands": status(200, b'{"replies":[]}'),
    "replies of another kind": status(200, b'{"replies":[{"history":{}},null,3]}'),
    "an endless reply": lambda exchange: exchange.answer(200, b" " * 50_000_000),
    "compressed bytes": status(200, b"\x1f\x8b\x08\x00", Content_Encoding="gzip"),
    "no HTTP": lambda exchange: exchange.write(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "a reset connection": Exchange.reset,
    "a closed connection": Exchange.hang_up,
    "silence": Exchange.wait_for_client_to_leave,
    "one byte now and then": drip,
    "error 100 for everything": lambda exchange: exchange.answer(
        200, b'{"replies":[%b]}' % b",".join([b'{"error":{"code":100,"message":"internal"}}'] * len(exchange.commands))
    ),
}


@pytest.mark.parametrize("face", FACES)
def test_a_stand_in_in_trouble(
    face: str,
    connect: Connect,
    make_relay: MakeRelay,
    subscribe: Subscribe,
    gateway: Gateway,
    channel: str,
    journal: Callable[[str], int],
) -> None:
    """A stand-in, because no healthy Centrifugo does this on demand. Three tries fail, then it forwards again."""
    subscriber = subscribe(channel)
    connection = connect()
    committed = [write(connection, str(number), 1, channel) for number in range(3)]
    gateway.fault = FACES[face]
    with make_relay(api_url=gateway.url, request_timeout=0.2):
        gateway.wait_for_requests(3)
        assert states(connection) == {"pending": 3}
        assert blame(connection) == []
        gateway.fault = None
        received = subscriber.wait_for(3)
        wait_until(lambda: journal(OVER), "the end of the outage is said")
    assert (journal(SAID), journal(OVER)) == (1, 1)
    assert violations(committed, map(fact, received)) == []
    assert states(connection) == {"delivered": 3}
    assert blame(connection) == []


def test_retry_after_is_respected(
    connect: Connect, make_relay: MakeRelay, gateway: Gateway, channel: str, relay_options: Options
) -> None:
    """429 with Retry-After: 1 is asked again after a second, not after the relay's own 20 ms."""
    write(connect(), "1", 1, channel)
    gateway.fault = status(429, Retry_After="1")
    with make_relay(replace(relay_options, workers=1), api_url=gateway.url):
        gateway.wait_for_requests(1)
        gateway.fault = None
        gateway.wait_for_requests(2)
    first, second = gateway.heard_at[:2]
    assert second - first > 3 * relay_options.pause_max


def test_the_api_key_does_not_follow_a_redirect(
    connect: Connect, make_relay: MakeRelay, centrifugo: Centrifugo, gateway: Gateway, channel: str
) -> None:
    """Whoever answers at the address in Location hears nothing."""
    write(connect(), "1", 1, channel)
    with Gateway(centrifugo.api_url) as elsewhere:
        gateway.fault = status(307, Location=f"{elsewhere.url}/api/batch")
        with make_relay(api_url=gateway.url):
            gateway.wait_for_requests(3)
        assert elsewhere.requests == []


def test_a_wrong_key(
    connect: Connect, make_relay: MakeRelay, subscribe: Subscribe, channel: str, journal: Callable[[str], int]
) -> None:
    """Centrifugo's own 401. A relay with the right key takes over, nothing was lost or blamed."""
    subscriber = subscribe(channel)
    connection = connect()
    committed = [write(connection, "1", version, channel) for version in (1, 2)]
    with make_relay(api_key="wrong"):
        wait_until(lambda: journal(SAID), "the outage is said")
    assert states(connection) == {"pending": 2}
    assert blame(connection) == []
    with make_relay():
        assert violations(committed, map(fact, subscriber.wait_for(2))) == []


def test_nobody_listens(connect: Connect, make_relay: MakeRelay, channel: str, journal: Callable[[str], int]) -> None:
    """A refused connection, and a name that does not resolve."""
    connection = connect()
    write(connection, "1", 1, channel)
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for number, url in enumerate((nobody, "http://no-such-host.invalid"), 1):
        with make_relay(api_url=url):
            wait_until(lambda number=number: journal(SAID) == number, "the outage is said")  # type: ignore[misc]
    assert states(connection) == {"pending": 1}
    assert blame(connection) == []


@pytest.mark.parametrize("how", ["killed", "stopped", "frozen"])
def test_centrifugo_goes_and_comes_back(
    how: str,
    connect: Connect,
    make_relay: MakeRelay,
    subscribe: Subscribe,
    start_centrifugo: Callable[..., Centrifugo],
    channel: str,
    journal: Callable[[str], int],
) -> None:
    """A real server that dies, ends or stands still under the relay, while events keep being written."""
    server = start_centrifugo()
    connection = connect()
    committed = [write(connection, str(number), 1, channel) for number in range(10)]
    with make_relay(server=server, request_timeout=0.3):
        wait_until(lambda: states(connection) == {"delivered": 10}, "the first events are delivered")
        {"killed": server.kill, "stopped": server.stop, "frozen": server.pause}[how]()
        later: list[Fact] = [write(connection, str(number), 2, channel) for number in range(10)]
        wait_until(lambda: journal(SAID), "the outage is said")
        assert states(connection) == {"delivered": 10, "pending": 10}
        assert blame(connection) == []
        {"killed": server.start, "stopped": server.start, "frozen": server.resume}[how]()
        wait_until(lambda: states(connection) == {"delivered": 20}, "the later events are delivered")
        wait_until(lambda: journal(OVER), "the end of the outage is said")
    assert (journal(SAID), journal(OVER)) == (1, 1)
    assert blame(connection) == []
    # The memory engine's history begins anew with the process; what it holds is asked for from its beginning.
    history = committed + later if how == "frozen" else later
    received = subscribe(channel, server=server).wait_for(len(history))
    assert violations(history, map(fact, received)) == []
