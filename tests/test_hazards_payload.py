"""Hazards of payloads: bytes untouched, escapes nobody can decode, sizes; by their numbers in the list of hazards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import psycopg
import pytest

from outbox_relay.embedded.centrifugo import DEFAULT_CONFIG, Centrifugo
from outbox_relay.options import Options
from outbox_relay.packing import Limits
from outbox_relay.runner import Ended
from tests.conftest import Connect, MakeRelay, RunRelay, StartRelay
from tests.support.gateway import Gateway
from tests.support.subscriber import Subscriber
from tests.support.waiting import wait_until
from tests.support.writing import Traffic, fact, states, write

Subscribe = Callable[..., Subscriber]

UNTOUCHED = {
    "an integer beyond 2**53": b'{"n":9007199254740993}',
    "an integer of 400 digits": b"1" * 400,
    "a number beyond the doubles": b'{"n":1e400}',
    "a number with more digits than a double has": b"0.1000000000000000055511151231257827",
    "minus zero, and an exponent": b"[-0, 1E+2, 1.0]",
    "keys in their order, some twice": b'{"b":1,"a":2,"b":3}',
    "spaces": b'  { "a" :  [ 1 ,\t2 ] }  ',
    "1,000 levels": b"[" * 1_000 + b"]" * 1_000,
    "5,000 levels": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "escapes as they were chosen": rb'"\u0041\/\b"',
    "text outside the basic plane": '"𝄞 — \u2028 ☃"'.encode(),
    "null": b"null",
    "an empty string": b'""',
    "what looks like the end of a command": rb'"}}]},{\"publish\":{"',
}


def test_hazard_42_payloads_arrive_byte_for_byte(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """The payload is never decoded on its way. (Whitespace around it belongs to nobody and is dropped.)"""
    subscriber = subscribe(channel)
    connection = connect()
    for name, payload in UNTOUCHED.items():
        write(connection, name, 1, channel, payload)
    assert run_relay() is Ended.EMPTY
    received = {publication.aggregate[1]: publication.data for publication in subscriber.wait_for(len(UNTOUCHED))}
    assert received == {name: payload.strip() for name, payload in UNTOUCHED.items()}


def test_hazard_42_raw_newlines_between_tokens_are_stripped_by_centrifugo(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str
) -> None:
    """They separate the frames of Centrifugo's protocol. Inside a JSON string there are none, only escapes."""
    subscriber = subscribe(channel)
    write(connect(), "1", 1, channel, b'{\n  "a": "x\\ny",\n  "b": 2\n}')
    assert run_relay() is Ended.EMPTY
    assert subscriber.wait_for(1)[0].data == b'{  "a": "x\\ny",  "b": 2}'


@pytest.mark.parametrize(
    "payload",
    [
        rb'"a\u0000b"',
        rb'{"\u0000":1}',
        rb'"\ud800"',
        rb'"\udc00\ud800"',
        rb'{"\ud83d":"\ud83d"}',
    ],
)
def test_hazard_43_escapes_that_no_text_can_hold(
    connect: Connect, run_relay: RunRelay, subscribe: Subscribe, channel: str, payload: bytes
) -> None:
    """NUL and lone surrogates, as escapes: valid JSON that jsonb refuses. They arrive as they were written, and
    so do their neighbours in the same request."""
    subscriber = subscribe(channel)
    connection = connect()
    for name, data in (("before", b"1"), ("odd", payload), ("after", b"2")):
        write(connection, name, 1, channel, data)
    assert run_relay() is Ended.EMPTY
    received = {publication.aggregate[1]: publication.data for publication in subscriber.wait_for(3)}
    assert received == {"before": b"1", "odd": payload, "after": b"2"}


@pytest.mark.parametrize("payload", [b'"\x01"', b'{"a":}', b"NaN", b"", rb'"\ud8"', b"'a'"])
def test_hazard_43_what_is_no_json_is_refused_where_it_is_written(
    connect: Connect, channel: str, payload: bytes
) -> None:
    """The writer hears it; the outbox never holds what a request could break on."""
    with pytest.raises(psycopg.errors.InvalidTextRepresentation):
        write(connect(), "1", 1, channel, payload)


def test_hazard_43_nesting_that_centrifugo_refuses_harms_nobody_else(
    connect: Connect, make_relay: MakeRelay, subscribe: Subscribe, channel: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Go's decoder refuses 10,000 levels, and with them the whole request: 400 for everybody's events.

    Such an event is not even sent: it is held and ends dead, its gap, its successor and its neighbours arrive.
    """
    subscriber = subscribe(channel)
    connection = connect()
    write(connection, "deep", 1, channel, b"[" * 11_000 + b"]" * 11_000)
    write(connection, "deep", 2, channel)
    traffic = Traffic(connection, "other", channel)
    with make_relay():
        traffic.until(lambda: states(connection).get("dead") == 1, "the event is dead")
        wait_until(lambda: states(connection).keys() == {"dead", "delivered"}, "the others are delivered")
    publications = subscriber.wait_for(len(traffic.written) + 2)
    of_deep = [(heard.version, heard.tags["ob_kind"]) for heard in publications if heard.aggregate[1] == "deep"]
    assert of_deep == [(1, "gap"), (2, "change")]
    received = [fact(publication) for publication in publications]
    assert [heard for heard in received if heard.aggregate[1] == "other"] == traffic.written
    assert "outage" not in caplog.text


def test_hazard_44_huge_payloads_do_not_fill_the_memory(
    connect: Connect,
    start_relay: StartRelay,
    start_centrifugo: Callable[..., Centrifugo],
    subscribe: Subscribe,
    channel: str,
) -> None:
    """64 payloads of 1 MiB, the most that the table takes: the process never has more than 100 MB resident."""
    patient = {"client": {**DEFAULT_CONFIG["client"], "queue_max_size": 100_000_000}}
    server = start_centrifugo(patient)
    subscriber = subscribe(channel, server=server)
    connection = connect()
    connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) "
        "SELECT 'order', n %% 8, n, %s, to_json(repeat(chr(96 + n %% 16), 1048574)) FROM generate_series(1, 64) n",
        ([channel],),
    )
    relay = start_relay({"workers": 2}, server=server)
    wait_until(lambda: states(connection) == {"delivered": 64}, "all are delivered")
    assert relay.peak_memory() <= 100_000_000
    received = subscriber.wait_for(64)
    assert subscriber.lost is None
    for publication in received:
        assert publication.data == b'"%b"' % (bytes([96 + publication.version % 16]) * 1_048_574)


def test_hazard_44_one_channel_is_not_flooded_by_one_request(
    connect: Connect,
    run_relay: RunRelay,
    subscribe: Subscribe,
    gateway: Gateway,
    relay_options: Options,
    channel: str,
) -> None:
    """Centrifugo disconnects a subscriber with more than 1 MiB in its queue. Twenty times 200 kB, which one request
    could carry but for its limit per channel, go one by one and come through without a reconnect."""
    subscriber = subscribe(channel)
    connection = connect()
    payload = '"%s"' % ("x" * 200_000)
    for number in range(20):
        write(connection, str(number), 1, channel, payload)
    roomy = replace(relay_options, batch_bytes=64_000_000, limits=Limits(bytes=64_000_000))
    assert run_relay(roomy, api_url=gateway.url) is Ended.EMPTY
    assert [len(request) for request in gateway.requests] == [1] * 20
    assert len(subscriber.wait_for(20)) == 20
    assert subscriber.connections == 1
