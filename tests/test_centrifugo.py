"""Centrifugo's API beside the events: is it there, what else can it be asked, and which way is it faster?"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.event import ACCEPTED, Event, Outage
from outbox_relay.pace import TRIES, TRY_EVENTS
from tests.support.gateway import Exchange, Gateway

EVENTS = [
    Event(n, f"00000000-0000-0000-0000-{n:012}", "order", str(n), 0, 1, "change", ["plain:a"], "{}", None, None, 0.0)
    for n in range(TRY_EVENTS)
]


@pytest.fixture
def connect_to() -> Iterator[Callable[..., Publisher]]:
    """Takes what `Publisher` takes; closed with the test."""
    with ExitStack() as stack:

        def make(*arguments: str, new_key: Callable[[], str | None] = lambda: None) -> Publisher:
            publisher = Publisher(*arguments, new_key=new_key)
            stack.callback(publisher.close)
            return publisher

        yield make


def test_a_probe_finds_a_server_that_takes_the_key(
    centrifugo: Centrifugo, connect_to: Callable[..., Publisher]
) -> None:
    assert connect_to(centrifugo.api_url, centrifugo.api_key).probe() is None
    assert connect_to(centrifugo.api_url, "another").probe() == Outage("HTTP 401: the API key is wrong")


def test_several_questions_in_one_request(centrifugo: Centrifugo, connect_to: Callable[..., Publisher]) -> None:
    answers = connect_to(centrifugo.api_url, centrifugo.api_key).ask(['{"info":{}}', '{"channels":{}}'])
    assert not isinstance(answers, Outage)
    assert [list(answer) for answer in answers] == [["info"], ["channels"]]


def test_a_key_that_was_refused_is_not_tried_again(
    centrifugo: Centrifugo, connect_to: Callable[..., Publisher], gateway: Gateway
) -> None:
    """Where its file still has the same one."""
    gateway.fault = lambda exchange: exchange.answer(401)
    publisher = connect_to(gateway.url, "refused", new_key=lambda: "refused")
    assert isinstance(publisher.publish(EVENTS), Outage)
    assert len(gateway.requests) == 1


def answers_503(exchange: Exchange) -> None:
    exchange.answer(503)


def answers_garbage(exchange: Exchange) -> None:
    exchange.answer(200, b"<html>")


def is_cut_short(exchange: Exchange) -> None:
    exchange.reset()


def breaks_off(exchange: Exchange) -> None:
    exchange.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    exchange.hang_up()


@pytest.mark.parametrize("fault", [None, answers_503, answers_garbage, is_cut_short, breaks_off])
def test_no_request_waits_for_the_collector(
    centrifugo: Centrifugo,
    connect_to: Callable[..., Publisher],
    gateway: Gateway,
    fault: Callable[[Exchange], None] | None,
) -> None:
    """A body may be a mebibyte, and the collector comes seldom where there are few objects."""
    gateway.fault = fault
    publisher = connect_to(gateway.url, centrifugo.api_key)

    def exchanged() -> int:
        return sum(type(thing) in {httpx.Request, httpx.Response} for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = exchanged()
        publisher.publish(EVENTS)
        assert exchanged() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("slow", ["side by side", "one after the other"])
def test_the_faster_way_is_found_and_kept(
    centrifugo: Centrifugo, connect_to: Callable[..., Publisher], gateway: Gateway, slow: str
) -> None:
    """The gateway makes one of them slow: on the memory engine, which is here, they hardly differ."""
    ways: list[str] = []

    def one_is_slow(exchange: Exchange) -> None:
        ways.append("side by side" if json.loads(exchange.body).get("parallel") else "one after the other")
        time.sleep(0.3 if ways[-1] == slow else 0.0)
        exchange.answer(*exchange.forward())

    gateway.fault = one_is_slow
    publisher = connect_to(gateway.url, centrifugo.api_key)
    for _ in range(2 * TRIES):
        assert publisher.room(10_000) == TRY_EVENTS
        assert publisher.publish(EVENTS) == [ACCEPTED] * len(EVENTS)
    assert ways.count(slow) == TRIES
    assert publisher.room(10_000) == 10_000
    publisher.publish(EVENTS)
    assert ways[-1] != slow
