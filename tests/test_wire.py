"""On the wire: how events are packed into requests, what a request says, and how long one may take."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.endpoint import api_url
from outbox_relay.event import ACCEPTED, Event, Outage, Refusal, Reply
from outbox_relay.packing import LINGER, Limits, waves, worthwhile
from outbox_relay.wire import MAX_DEPTH, encode_batch
from tests.support.gateway import Exchange, Fault, Gateway, drip
from tests.support.subscriber import Subscriber, items, members
from tests.support.waiting import in_background

Subscribe = Callable[..., Subscriber]

# How long an example takes says nothing on a machine that runs four of these at once.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

_ids = itertools.count(1)


def event(
    *,
    aggregate: tuple[str, str] = ("order", "1"),
    version: int = 1,
    kind: str = "change",
    channels: Sequence[str] = ("plain:a",),
    payload: str = "{}",
    tags: str | None = None,
    accepted: list[str] | None = None,
    base_version: int | None = None,
    epoch: str = "",
) -> Event:
    return Event(
        id=next(_ids),
        event_id=str(uuid.uuid4()),
        aggregate_type=aggregate[0],
        aggregate_id=aggregate[1],
        lane=0,
        version=version,
        kind=kind,
        channels=list(channels),
        payload=payload,
        tags=tags,
        accepted=accepted,
        created_at=0.0,
        base_version=base_version,
        epoch=epoch,
    )


# Waves

batches = st.lists(
    st.builds(
        event,
        aggregate=st.tuples(st.just("order"), st.sampled_from("abcdef")),
        channels=st.lists(st.sampled_from(["x", "y", "z"]), min_size=1, unique=True),
        payload=st.text("aü☃", max_size=12),
    ),
    max_size=40,
)
some_limits = st.builds(Limits, events=st.integers(1, 8), bytes=st.integers(1, 60), channel_bytes=st.integers(1, 30))


@unhurried
@given(batches, some_limits)
def test_waves_keep_every_promise(events: list[Event], limits: Limits) -> None:
    """Every event exactly once; one of an aggregate per request, in order; within the limits, unless one event
    alone is beyond them."""
    requests = waves(events, limits)
    assert sorted(sent.id for request in requests for sent in request) == [sent.id for sent in events]
    for request in requests:
        assert request
        assert len({sent.aggregate for sent in request}) == len(request) <= limits.events
        sizes = [len(sent.payload.encode()) for sent in request]
        assert sum(sizes) <= limits.bytes or len(request) == 1
        for channel in "xyz":
            channel_sizes = [size for sent, size in zip(request, sizes, strict=True) if channel in sent.channels]
            assert sum(channel_sizes) <= limits.channel_bytes or len([size for size in channel_sizes if size]) == 1
    for aggregate in {sent.aggregate for sent in events}:
        ids = [sent.id for request in requests for sent in request if sent.aggregate == aggregate]
        assert ids == sorted(ids)


@unhurried
@given(batches)
def test_there_are_no_more_waves_than_order_demands(events: list[Event]) -> None:
    """With room for all, as many requests as the busiest aggregate has events."""
    busiest = max(Counter(sent.aggregate for sent in events).values(), default=0)
    assert len(waves(events, Limits())) == busiest


def wave_of(*names: str) -> list[Event]:
    return [event(aggregate=("order", name)) for name in names]


def test_a_wave_much_smaller_than_the_first_waits() -> None:
    planned = [wave_of(*"12345678"), wave_of("1", "2"), wave_of("1")]
    behind: set[tuple[str, str]] = set()
    assert list(worthwhile(planned, behind)) == planned[:2]
    assert behind == {("order", "1")}


def test_a_wave_smaller_than_the_first_does_not_keep_lanes_locked_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one has all the time that it needs, and so has one as large."""
    now = 100.0
    monkeypatch.setattr("outbox_relay.packing.boottime", lambda: now)
    planned = [wave_of("1", "2"), wave_of("1"), wave_of("1"), wave_of("3", "4")]
    behind: set[tuple[str, str]] = set()
    sent = []
    for wave, seconds in zip(worthwhile(planned, behind), (1.0, LINGER, 0.0), strict=True):
        sent.append(wave)
        now += seconds
    assert sent == [planned[0], planned[1], planned[3]]
    assert behind == {("order", "1")}


def test_requests_are_filled_to_their_limits() -> None:
    """To the last byte, of the request and of a channel."""
    events = [event(aggregate=("order", str(n))) for n in range(5)]
    assert [len(request) for request in waves(events, Limits(bytes=4))] == [2, 2, 1]
    assert [len(request) for request in waves(events, Limits(channel_bytes=4))] == [2, 2, 1]


# The body of a request

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
payloads = st.builds(
    lambda value, ascii_, indent: json.dumps(value, ensure_ascii=ascii_, indent=indent),
    values,
    st.booleans(),
    st.sampled_from([None, 1]),
) | st.sampled_from(["1e400", "9007199254740993", "[" * 900 + "]" * 900, '{"a":1,"a":2}', r'"\ud800\u0000\/"', " 1 "])
tags = st.none() | st.dictionaries(texts.filter(lambda key: not key.startswith("ob")), texts, max_size=3)


@st.composite
def hostile_events(draw: st.DrawFn) -> tuple[Event, dict[str, str]]:
    """Any event that the tables take, and its own tags."""
    channels = draw(st.lists(texts, min_size=1, max_size=4, unique=True))
    own_tags = draw(tags)
    written = event(
        aggregate=(draw(texts), draw(texts)),
        version=draw(st.integers(1, 2**53 - 1)),
        kind=draw(st.sampled_from(["change", "snapshot", "tombstone"])),
        channels=channels,
        payload=draw(payloads),
        # As PostgreSQL writes a jsonb out.
        tags=None if own_tags is None else json.dumps(own_tags, ensure_ascii=False),
        accepted=draw(st.none() | st.just(channels[1:])),
        base_version=draw(st.none() | st.integers(0, 2**53 - 2)),
        epoch=draw(st.just("") | texts),
    )
    return written, own_tags or {}


@unhurried
@given(st.lists(hostile_events(), max_size=4), st.booleans())
def test_a_request_says_what_the_events_say(written: list[tuple[Event, dict[str, str]]], parallel: bool) -> None:
    """One command per event, in order, with these fields and no others (`version` is not one: it gates a channel,
    not an object). Strings survive whatever is in them, and the payload is there byte for byte."""
    body = members(encode_batch([sent for sent, _ in written], parallel=parallel))
    assert json.loads(body.get("parallel", b"false")) is parallel
    for (sent, own_tags), command in zip(written, items(body["commands"]), strict=True):
        [(method, request)] = members(command).items()
        fields = members(request)
        assert fields.pop("data") == sent.payload.strip(" ").encode()
        channels = [sent.channels[0]] if sent.accepted is not None else sent.channels
        target = {"channel": channels[0]} if len(channels) == 1 else {"channels": channels}
        assert method == ("publish" if len(channels) == 1 else "broadcast")
        assert {name: json.loads(value) for name, value in fields.items()} == {
            **target,
            "idempotency_key": f"{sent.event_id}:{sent.id}",
            "tags": {
                "ob": "1",
                "ob_type": sent.aggregate_type,
                "ob_id": sent.aggregate_id,
                "ob_version": str(sent.version),
                "ob_event": sent.event_id,
                "ob_kind": sent.kind,
                **({"ob_epoch": sent.epoch} if sent.epoch else {}),
                **({} if sent.base_version is None else {"ob_base": str(sent.base_version)}),
                **own_tags,
            },
        }


# A real Centrifugo


@pytest.fixture
def publisher(centrifugo: Centrifugo) -> Iterator[Publisher]:
    with closing(Publisher(centrifugo.api_url, centrifugo.api_key)) as own:
        yield own


def test_what_a_subscriber_sees(publisher: Publisher, subscribe: Subscribe, channel: str) -> None:
    """Data as it was written, our tags beside the application's, whatever characters are in them."""
    subscriber = subscribe(channel)
    sent = event(
        aggregate=('t"\\\u2028', "ü💥\x01"),
        version=2**53 - 1,
        kind="snapshot",
        channels=[channel],
        payload='{"n": 9007199254740993, "x": 1e400, "s": "\\u0041", "s": "💥"}',
        tags='{"region": "e\\"u"}',
        base_version=2**53 - 2,
        epoch="0123456789abcdef",
    )
    assert publisher.publish([sent]) == [ACCEPTED]
    [publication] = subscriber.wait_for(1)
    assert publication.data == sent.payload.encode()
    assert publication.tags == {
        "ob": "1",
        "ob_type": 't"\\\u2028',
        "ob_id": "ü💥\x01",
        "ob_version": "9007199254740991",
        "ob_event": sent.event_id,
        "ob_kind": "snapshot",
        "ob_epoch": "0123456789abcdef",
        "ob_base": "9007199254740990",
        "region": 'e"u',
    }


def test_an_event_published_twice_arrives_once(publisher: Publisher, subscribe: Subscribe, channel: str) -> None:
    """The idempotency key is the event's own: a repetition is swallowed, another event with its event_id is not."""
    subscriber = subscribe(channel)
    first = event(channels=[channel], version=1)
    twin = replace(event(channels=[channel], version=2), event_id=first.event_id)
    assert publisher.publish([first]) == publisher.publish([first]) == publisher.publish([twin]) == [ACCEPTED]
    last = event(channels=[channel], version=3)
    publisher.publish([last])
    assert [publication.version for publication in subscriber.wait_for(3)] == [1, 2, 3]


def test_a_version_lower_than_the_channels_last_one_arrives(
    publisher: Publisher, subscribe: Subscribe, channel: str
) -> None:
    """Versions are an object's, not the channel's: Centrifugo does not filter by them."""
    subscriber = subscribe(channel)
    for name, version in (("1", 7), ("2", 1)):
        publisher.publish([event(aggregate=("order", name), version=version, channels=[channel])])
    assert [publication.version for publication in subscriber.wait_for(2)] == [7, 1]


def test_one_channel_of_several_is_refused(publisher: Publisher, subscribe: Subscribe, channel: str) -> None:
    """The reply says who accepted and who refused; the next request goes to those alone who have not accepted."""
    subscriber = subscribe(channel)
    other = f"{channel}-b"
    sent = event(channels=[channel, "nowhere:a", other])
    refusal = Refusal("nowhere:a", 102, "unknown channel")
    assert publisher.publish([sent]) == [Reply((refusal,), (channel, other))]
    again = replace(sent, accepted=[channel, other])
    assert publisher.publish([again]) == [Reply((refusal,))]
    subscriber.wait_for(1)
    assert publisher.publish([event(channels=[channel, other])]) == [ACCEPTED]
    assert len(subscriber.wait_for(2)) == 2


def test_every_event_has_its_own_answer(publisher: Publisher, channel: str) -> None:
    """In the order of the events, also when some are refused."""
    channels = [channel, "nowhere:a", channel, "nowhere:b"]
    replies = publisher.publish([event(aggregate=("order", str(n)), channels=[c]) for n, c in enumerate(channels)])
    refused = [Reply((Refusal(c, 102, "unknown channel"),)) for c in ("nowhere:a", "nowhere:b")]
    assert replies == [ACCEPTED, refused[0], ACCEPTED, refused[1]]


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")], ids=["arrays", "objects"])
def test_too_deep_a_payload_is_refused_alone(
    opening: str, closing: str, publisher: Publisher, subscribe: Subscribe, channel: str
) -> None:
    """Centrifugo would refuse the whole request for it, so it is not sent; its neighbours, one just within the
    limit and one with brackets that only look like nesting, arrive."""
    subscriber = subscribe(channel)

    def nested(levels: int, name: str) -> Event:
        return event(aggregate=("order", name), channels=[channel], payload=f"{opening * levels}0{closing * levels}")

    flat = event(aggregate=("order", "flat"), channels=[channel], payload='"\\"' + "[" * (MAX_DEPTH + 1) + '"')
    replies = publisher.publish([nested(MAX_DEPTH, "just"), nested(MAX_DEPTH + 1, "deep"), flat])
    assert isinstance(replies, list)
    assert replies[::2] == [ACCEPTED, ACCEPTED]
    [refusal] = replies[1].refusals
    assert (refusal.channel, refusal.code) == (channel, 107)
    assert "nested too deeply" in refusal.message
    assert {publication.aggregate[1] for publication in subscriber.wait_for(2)} == {"just", "flat"}


# Stand-ins for servers that are none


def drip_headers(exchange: Exchange) -> None:
    """Headers without end, each byte within any time-out of a single read."""
    exchange.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        exchange.write(b"x")
        time.sleep(0.02)


def say_nothing(exchange: Exchange) -> None:
    exchange.wait_for_client_to_leave()


def flood(exchange: Exchange) -> None:
    """A body without end."""
    exchange.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
    while True:
        exchange.write(b" " * 65_536)


def publish_to(url: str, events: Sequence[Event], timeout: float) -> tuple[list[Reply] | Outage, float]:
    """What a publisher makes of the server at `url`, and how long it took."""
    with closing(Publisher(url, "key", timeout=timeout)) as publisher:
        began = time.monotonic()
        return publisher.publish(events), time.monotonic() - began


@pytest.mark.parametrize("fault", [drip_headers, drip, say_nothing])
def test_the_deadline_is_for_the_whole_request(fault: Fault) -> None:
    """A server that always has one more byte to say does not get more time for it."""
    with Gateway("http://nowhere", fault) as gateway:
        answer, seconds = publish_to(gateway.url, [event()], timeout=0.4)
    assert isinstance(answer, Outage)
    assert answer.reason.startswith("no answer within 0.4 s")
    assert 0.4 <= seconds < 3.0


def test_a_server_that_sips() -> None:
    """Sending counts towards the deadline too, however often a bit more of it gets through."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def sip() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(ConnectionResetError):
                while not over.wait(0.05):
                    connection.recv(65_536)

        events = [event(payload=json.dumps("x" * 1_000_000)) for _ in range(20)]
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        with in_background(sip):
            answer, seconds = publish_to(address, events, timeout=0.4)
            over.set()
    assert answer == Outage("no answer within 0.4 s (WriteTimeout)")
    assert 0.4 <= seconds < 3.0


def test_a_reply_has_a_limit() -> None:
    """A flood is turned off long before the deadline, and not read into memory."""
    with Gateway("http://nowhere", flood) as gateway:
        answer, seconds = publish_to(gateway.url, [event()], timeout=8.0)
    assert answer == Outage("the reply is larger than any reply of Centrifugo's", verdict=200)
    assert seconds < 4.0


def close_after(exchange: Exchange) -> None:
    """A whole answer, the last one on this connection, which stays open for a while."""
    answer = b'{"replies":[{"publish":{}}]}'
    exchange.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))
    exchange.wait_for_client_to_leave()


def test_a_connection_that_was_the_last_ones_serves_no_other_request() -> None:
    with Gateway("http://nowhere", close_after) as gateway, closing(Publisher(gateway.url, "key")) as publisher:
        assert [publisher.publish([event()]) for _ in range(3)] == [[ACCEPTED]] * 3


def test_no_header_becomes_two() -> None:
    """A key with a line break is no key of Centrifugo's. The relay's own settings refuse it before."""
    with Gateway("http://nowhere") as gateway, closing(Publisher(gateway.url, "a\r\nX-Other: b")) as publisher:
        answer = publisher.publish([event()])
        assert gateway.requests == []
    assert isinstance(answer, Outage)
    assert "X-Other" not in answer.reason


def test_the_environments_proxies_are_ignored(
    publisher: Publisher, centrifugo: Centrifugo, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that is meant for the rest of the machine sees neither the events nor the key."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        with closing(Publisher(centrifugo.api_url, centrifugo.api_key)) as publisher:
            assert publisher.publish([event(channels=[channel])]) == [ACCEPTED]


@pytest.mark.parametrize(
    ("given_url", "api"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/api"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/api"),
        ("http://127.0.0.1:8000/api", "http://127.0.0.1:8000/api"),
        ("https://host/prefix/api/", "https://host/prefix/api"),
        ("https://host/prefix", "https://host/prefix/api"),
        ("http://[::1]:8000", "http://[::1]:8000/api"),
    ],
)
def test_the_address_may_end_with_api(given_url: str, api: str) -> None:
    """With or without `/api`, below a prefix too."""
    assert str(api_url(given_url)) == api


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "127.0.0.1:8000",
        "ftp://host",
        "http://",
        "http://u:p@host",
        "http://host?a=b",
        "http://host#a",
        "http://h:x",
    ],
)
def test_what_is_no_address(wrong: str) -> None:
    """Refused before anything is sent, without repeating what may be a secret."""
    with pytest.raises(ValueError, match="URL") as caught:
        api_url(wrong)
    assert "u:p" not in str(caught.value)


@pytest.mark.parametrize(
    "reply",
    ["publish", ["publish"], {"publish": None}, {"publish": "x"}, {}, {"broadcast": {"responses": [{}]}}, None, 7],
    ids=str,
)
def test_what_is_no_answer_to_a_command_is_no_success(gateway: Gateway, reply: Any) -> None:
    """A stand-in, because no real Centrifugo answers so: whatever stands in a reply's place, nothing was accepted."""
    body = json.dumps({"replies": [reply]}).encode()
    gateway.fault = lambda exchange: exchange.answer(200, body)
    with closing(Publisher(gateway.url, "key")) as publisher:
        assert isinstance(publisher.publish([event(channels=["plain:a"])]), Outage)
