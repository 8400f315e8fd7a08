"""Centrifugo's API key is changed while relays run: they read its file again, and need no restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from outbox_relay.embedded.centrifugo import Centrifugo
from tests.conftest import Connect, StartRelay
from tests.support.gateway import Gateway
from tests.support.relays import RelayProcess
from tests.support.waiting import wait_until
from tests.support.writing import states, write

TAKEN = "Centrifugo refuses the API key: its file has another one, which is used from now on"
OUTAGE = "outage: nothing is published, no event is blamed"


@pytest.fixture
def key_file(centrifugo: Centrifugo, tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text(f"{centrifugo.api_key}\n")
    return file


@pytest.fixture
def relay(start_relay: StartRelay, gateway: Gateway, key_file: Path) -> RelayProcess:
    """One that finds Centrifugo behind the gateway, and the key in its file alone."""
    return start_relay(
        {"centrifugo_url": gateway.url, "centrifugo_api_key": "", "centrifugo_api_key_file": key_file, "workers": 2}
    )


@pytest.fixture
def successor(start_centrifugo: Callable[..., Centrifugo], centrifugo: Centrifugo) -> Centrifugo:
    """A Centrifugo with another key."""
    other = start_centrifugo()
    assert other.api_key != centrifugo.api_key
    return other


def test_the_file_first_then_centrifugo(
    relay: RelayProcess, key_file: Path, connect: Connect, gateway: Gateway, successor: Centrifugo, channel: str
) -> None:
    """The refused request is sent again under the new key at once: it is no outage."""
    connection = connect()
    write(connection, "1", 1, channel)
    wait_until(lambda: states(connection) == {"delivered": 1}, "the first event is delivered")
    key_file.write_text(successor.api_key)
    gateway.upstream = successor.api_url
    for version in range(2, 12):
        write(connection, "1", version, channel)
    wait_until(lambda: states(connection) == {"delivered": 11}, "all events are delivered")
    assert relay.said(TAKEN) >= 1
    assert relay.said(OUTAGE) == 0
    assert successor.api_key not in relay.output


def test_centrifugo_first_then_the_file(
    relay: RelayProcess, key_file: Path, connect: Connect, gateway: Gateway, successor: Centrifugo, channel: str
) -> None:
    """An outage meanwhile, in which no event is blamed, whatever the file holds while it is changed."""
    connection = connect()
    gateway.upstream = successor.api_url
    write(connection, "1", 1, channel)
    relay.wait_for(OUTAGE)
    for broken in ("", "\u2603", "wrong"):
        key_file.write_text(broken)
        gateway.wait_for_requests(len(gateway.requests) + 2)
    key_file.unlink()
    gateway.wait_for_requests(len(gateway.requests) + 2)
    assert states(connection) == {"pending": 1}
    key_file.write_text(successor.api_key)
    wait_until(lambda: states(connection) == {"delivered": 1}, "the event is delivered")
    assert successor.api_key not in relay.output


def test_a_key_that_is_no_file_s_stays(
    start_relay: StartRelay, connect: Connect, gateway: Gateway, successor: Centrifugo, channel: str
) -> None:
    """An outage until somebody restarts the relay: nothing else knows another key."""
    gateway.upstream = successor.api_url
    connection = connect()
    write(connection, "1", 1, channel)
    relay = start_relay({"centrifugo_url": gateway.url})
    gateway.wait_for_requests(3)
    assert relay.said(TAKEN) == 0
    assert states(connection) == {"pending": 1}
