"""How fast one relay is in strict order when Centrifugo is 5 or 20 ms away, and how far away the proxy really is."""

from __future__ import annotations

import http.client
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from typing import Final
from urllib.parse import urlsplit

from bench import load, stage
from bench.delay import DelayProxy
from bench.drain import Drain
from bench.harness import Mode, Row, Sample
from bench.sides import relay_settings
from outbox_relay.embedded.centrifugo import Centrifugo, find_or_build
from tests.support.redis import Redis

EVENTS: Final = 100_000
DISTANCES: Final[Mapping[str, float]] = {"5ms": 0.005, "20ms": 0.020}
"""Round trips in seconds."""
PING_SECONDS: Final = 2.0


class RoundTrip:
    name = "round_trip"
    title = "Strict order, one relay, with a round trip of 5 and 20 ms between it and Centrifugo"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        binary = find_or_build()
        with stage.centrifugo(binary) as server:
            yield [
                Row(
                    f"round_trip/proxy/{name}",
                    f"delay proxy, {name}, in addition to loopback",
                    "ms",
                    partial(_ping, server, round_trip),
                    {"request": "POST /api/batch without commands, one after another"},
                )
                for name, round_trip in DISTANCES.items()
            ]
        events = mode.scaled(EVENTS, least=20_000)
        postgres = stack.enter_context(stage.postgres())
        template = stage.template(postgres, "round_trip", partial(load.fill_ours, events=events, namespace="plain"))
        redis = stack.enter_context(Redis())
        yield [
            Row(
                f"round_trip/{name}/{engine}/us",
                f"outbox-relay, {name}, {engine} engine",
                "events/s",
                Drain(
                    postgres=postgres,
                    template=template,
                    centrifugo=binary,
                    events=events,
                    redis=redis if engine == "redis" else None,
                    round_trip=round_trip,
                ),
                {**relay_settings(), "events": events},
            )
            for engine in ("memory", "redis")
            for name, round_trip in DISTANCES.items()
        ]


def _ping(server: Centrifugo, round_trip: float) -> Sample:
    """Milliseconds that the proxy adds to a request, the median of both; figure: the proxy's p99 less that median."""
    count = round(PING_SECONDS / round_trip)
    near = statistics.median(_times(server.api_url, server.api_key, count))
    with DelayProxy(server.api_url, round_trip) as proxy:
        far = _times(proxy.url, server.api_key, count)
    return Sample(
        (statistics.median(far) - near) * 1e3,
        {"p99_ms": (statistics.quantiles(far, n=100)[98] - near) * 1e3, "loopback_ms": near * 1e3},
    )


def _times(api_url: str, api_key: str, count: int) -> list[float]:
    """Seconds that each of `count` requests took, on one connection that is open already."""
    url = urlsplit(api_url)
    headers = {"X-API-Key": api_key, "Content-Type": "application/json"}
    times = []
    with closing(http.client.HTTPConnection(url.netloc)) as connection:
        for _ in range(count + 1):
            started = time.perf_counter()
            connection.request("POST", f"{url.path}/batch", b'{"commands":[]}', headers)
            connection.getresponse().read()
            times.append(time.perf_counter() - started)
    return times[1:]


SCENARIO = RoundTrip()
