"""Publishing without the outbox: the relay's tags, checks and settings, and an error for whatever was not accepted."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa

from outbox_relay import InvalidEventError, PayloadTooLargeError, apublish, direct, enqueue, epoch, publish
from outbox_relay.config import ConfigError, load
from outbox_relay.direct import (
    BadRequestError,
    Direct,
    InternalError,
    NotAvailableError,
    PublishError,
    RefusedError,
    UnavailableError,
    UnknownChannelError,
)
from outbox_relay.embedded.centrifugo import Centrifugo
from tests.conftest import RunRelay
from tests.support.gateway import Gateway, refuse
from tests.support.subscriber import Subscriber, as_json

Subscribe = Callable[..., Subscriber]

EVENT_ID = uuid.UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")


def to(url: str, key: str) -> Direct:
    return Direct(load({"centrifugo_url": url, "centrifugo_api_key": key, "request_timeout": 0.5}, environ={}))


@pytest.fixture
def live(centrifugo: Centrifugo) -> Iterator[Direct]:
    with closing(to(centrifugo.api_url, centrifugo.api_key)) as own:
        yield own


@pytest.fixture
def through(gateway: Gateway, centrifugo: Centrifugo) -> Iterator[Direct]:
    """Through a window that a test may make fail."""
    with closing(to(gateway.url, centrifugo.api_key)) as own:
        yield own


def test_the_same_publication_either_way(
    live: Direct, engine: sa.Engine, subscribe: Subscribe, channel: str, run_relay: RunRelay
) -> None:
    """Data and tags are those of an event that went through the outbox."""
    subscriber = subscribe(channel)
    event: dict[str, Any] = {
        "version": 3,
        "channels": [channel, f"{channel}-b"],
        "payload": {"é": "💥"},
        "kind": "snapshot",
        "tags": {"region": "eu"},
        "base_version": 2,
        "event_id": EVENT_ID,
    }
    with engine.begin() as connection:
        connection.execute(enqueue("order", 7, **event))
        said = connection.scalar(epoch())
    run_relay()
    live.publish("order", 7, **event, epoch=said)
    by_relay, by_us = subscriber.wait_for(2)
    assert (by_us.data, by_us.tags) == (by_relay.data, by_relay.tags)


def test_what_is_left_out(live: Direct, subscribe: Subscribe, channel: str) -> None:
    """Versions come from a clock, each publication is an event of its own, and nothing says an epoch."""
    subscriber = subscribe(channel)
    for _ in range(2):
        live.publish("typing", "ann", channels=channel, payload=True)
    first, second = subscriber.wait_for(2)
    assert time.time_ns() // 1_000 > second.version > first.version > 1_700_000_000_000_000
    assert first.tags.keys() == {"ob", "ob_type", "ob_id", "ob_version", "ob_event", "ob_kind"}
    assert first.tags["ob_event"] != second.tags["ob_event"]


def test_a_repetition_is_swallowed(live: Direct, subscribe: Subscribe, channel: str) -> None:
    """With an event_id of the caller's own, and only with it."""
    subscriber = subscribe(channel)
    for _ in range(2):
        live.publish("typing", "ann", channels=channel, payload=1, event_id=EVENT_ID)
    live.publish("typing", "ann", channels=channel, payload=2)
    assert [as_json(publication) for publication in subscriber.wait_for(2)] == [1, 2]


def test_the_settings_of_the_process(
    centrifugo: Centrifugo, subscribe: Subscribe, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`publish` and `apublish` find Centrifugo where `outbox-relay run` would."""
    monkeypatch.setenv("OUTBOX_RELAY_CENTRIFUGO_URL", centrifugo.api_url)
    monkeypatch.setenv("OUTBOX_RELAY_CENTRIFUGO_API_KEY", centrifugo.api_key)
    subscriber = subscribe(channel)
    direct.default.cache_clear()
    try:
        publish("typing", "ann", channels=channel, payload=1)
        asyncio.run(apublish("typing", "bob", channels=channel, payload=2))
        assert [publication.aggregate[1] for publication in subscriber.wait_for(2)] == ["ann", "bob"]
        direct.default().close()
    finally:
        direct.default.cache_clear()


def test_a_setting_is_missing() -> None:
    with pytest.raises(ConfigError, match="centrifugo_url is missing"):
        Direct(load({}, environ={}))


# What is not accepted


def test_an_unknown_namespace(live: Direct) -> None:
    """An error inside a 200 is an error."""
    with pytest.raises(UnknownChannelError, match="refused channel 'nowhere:a' with 102: unknown channel") as caught:
        live.publish("typing", "ann", channels="nowhere:a", payload=1)
    assert (caught.value.code, caught.value.accepted) == (102, ())


def test_one_channel_of_several(live: Direct, subscribe: Subscribe, channel: str) -> None:
    """The error says who has accepted it all the same."""
    subscriber = subscribe(channel)
    with pytest.raises(UnknownChannelError) as caught:
        live.publish("typing", "ann", channels=[channel, "nowhere:a", "nowhere:b"], payload=1)
    assert caught.value.accepted == (channel,)
    assert [refusal.channel for refusal in caught.value.refusals] == ["nowhere:a", "nowhere:b"]
    assert len(subscriber.wait_for(1)) == 1


def test_too_deep(live: Direct) -> None:
    """What Centrifugo's decoder would choke on is not sent."""
    with pytest.raises(BadRequestError, match="nested too deeply"):
        live.publish("typing", "ann", channels="plain:a", payload=b"[" * 20_000 + b"]" * 20_000)


@pytest.mark.parametrize(
    ("code", "kind"),
    [(100, InternalError), (107, BadRequestError), (108, NotAvailableError), (104, RefusedError), (999, RefusedError)],
)
def test_every_refusal_has_a_type(through: Direct, gateway: Gateway, code: int, kind: type[RefusedError]) -> None:
    """By Centrifugo's code. A stand-in refuses, because a real server has no reason to."""
    gateway.fault = refuse(code, lambda _: True)
    with pytest.raises(RefusedError) as caught:
        through.publish("typing", "ann", channels="plain:a", payload=1)
    assert type(caught.value) is kind
    assert caught.value.code == code
    assert issubclass(kind, PublishError)


def test_a_wrong_key(centrifugo: Centrifugo) -> None:
    with closing(to(centrifugo.api_url, "wrong")) as own, pytest.raises(UnavailableError, match="HTTP 401"):
        own.publish("typing", "ann", channels="plain:a", payload=1)


def test_no_answer(through: Direct, gateway: Gateway, subscribe: Subscribe, channel: str) -> None:
    """Within the time-out, with what the server wants; and the next one is not spoilt by it."""
    gateway.fault = lambda exchange: exchange.wait_for_client_to_leave()
    began = time.monotonic()
    with pytest.raises(UnavailableError, match=r"no answer within 0\.5 s"):
        through.publish("typing", "ann", channels=channel, payload=1)
    assert time.monotonic() - began < 5.0
    gateway.fault = lambda exchange: exchange.answer(503, headers={"Retry-After": "7"})
    with pytest.raises(UnavailableError, match="HTTP 503") as caught:
        through.publish("typing", "ann", channels=channel, payload=1)
    assert caught.value.retry_after == 7.0
    gateway.fault = None
    subscriber = subscribe(channel)
    through.publish("typing", "ann", channels=channel, payload=2)
    assert as_json(subscriber.wait_for(1)[0]) == 2


@pytest.mark.parametrize(
    "payload",
    [
        b"[" * 3_000 + b"]" * 3_000 + b'}},{"publish":{"channel":"hist:other","data":1',
        b"[" * 3_000 + b"]" * 3_000 + b',"x":[]',
        b"[" * 3_000 + b"]" * 2_999,
        b"[" * 3_000 + b'"' + b"]" * 3_000,
        b"1," + b"[" * 3_000 + b"]" * 3_000,
    ],
    ids=["another command", "another field", "too few", "an open string", "two values"],
)
def test_what_is_too_deep_to_be_parsed_stays_one_value(through: Direct, gateway: Gateway, payload: bytes) -> None:
    """No PostgreSQL has parsed it, and it is spliced into the request as it is."""
    with pytest.raises(InvalidEventError, match="payload is not JSON"):
        through.publish("order", "1", channels="hist:a", payload=payload)
    assert gateway.requests == []


def test_what_is_never_sent(through: Direct, gateway: Gateway) -> None:
    """Impossible values are refused as `enqueue` does."""
    valid: dict[str, Any] = {"channels": "plain:a", "payload": 1}
    changes: list[dict[str, Any]] = [{"version": 0}, {"channels": []}, {"tags": {"ob": "x"}}, {"payload": object()}]
    for wrong in changes:
        with pytest.raises(InvalidEventError):
            through.publish("typing", "ann", **valid | wrong)
    with pytest.raises(PayloadTooLargeError):
        through.publish("typing", "ann", channels="plain:a", payload="x" * 300_000)
    assert gateway.requests == []


# Many at once


def test_threads_share_it(live: Direct, subscribe: Subscribe, channel: str) -> None:
    """Each call has its own connection, and no answer goes to another one's caller."""
    subscriber = subscribe(channel)

    def one(n: int) -> bool:
        try:
            live.publish("typing", n, channels=channel if n % 2 else "nowhere:a", payload=n)
        except UnknownChannelError:
            return False
        return True

    with ThreadPoolExecutor(16) as executor:
        assert list(executor.map(one, range(200))) == [n % 2 == 1 for n in range(200)]
    assert {as_json(publication) for publication in subscriber.wait_for(100)} == set(range(1, 200, 2))


def test_cancelled_coroutines_leave_it_sound(live: Direct, subscribe: Subscribe, channel: str) -> None:
    """However many callers have lost their patience, the next one is served."""
    subscriber = subscribe(channel)

    async def churn() -> None:
        tasks = [asyncio.create_task(live.apublish("typing", n, channels="plain:a", payload=n)) for n in range(100)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await live.apublish("typing", "last", channels=channel, payload="last")

    asyncio.run(churn())
    assert as_json(subscriber.wait_for(1)[0]) == "last"
