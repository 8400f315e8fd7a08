"""Numbers for Prometheus: one observer of settled outcomes, and what a scrape asks of the relay and the database.

Nothing is global and nothing of an event but its age is looked at: no label holds a type, an id or a channel, so the
number of time series does not depend on what applications write.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from outbox_relay.event import Event, Outage
from outbox_relay.health import Health
from outbox_relay.log import get_logger
from outbox_relay.outcome import GivenUp, Outcome, Settlement, Unsettled

log = get_logger()

PREFIX: Final = "outbox_relay_"
OUTCOMES: Final = ("delivered", "held", "dead", "expired", "discarded", "superseded")
RESULTS: Final = ("answered", "failed")
REST: Final = 10
"""After a question to the database so many times its duration pass before the next: a tenth of a session at most."""
EVENTS: Final = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000)
REQUEST_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LAG_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1_800, 7_200, 86_400)
BACKLOG: Final = {
    "pending": "Events that wait to be sent: exact below 10,000, beyond that an estimate.",
    "parked": "Events that wait behind a hold; counted up to 10,000.",
    "holds": "Aggregates that wait after a refusal; counted up to 10,000.",
    "dead": "Events that were given up and wait for a person; counted up to 10,000.",
    "oldest_pending_seconds": "Age of the oldest pending event since its INSERT, 0 if there is none.",
}
"""Gauges from the database, and what they are."""


class Histogram:
    """How many values are at or below each bound. Many are added at once, for some 0.1 µs each."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name = PREFIX + name
        self._text = text
        self._bounds = bounds
        self._counts = [0] * len(bounds)
        self._count = 0
        self._sum = 0.0

    def add(self, values: Iterable[float]) -> None:
        ordered = sorted(values)
        for n, bound in enumerate(self._bounds):
            self._counts[n] += bisect_right(ordered, bound)
        self._count += len(ordered)
        self._sum += sum(ordered)

    def family(self) -> HistogramMetricFamily:
        buckets = [(str(float(bound)), float(n)) for bound, n in zip(self._bounds, self._counts, strict=True)]
        buckets.append(("+Inf", float(self._count)))
        return HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class Metrics(Collector):
    """A relay's observer: counts requests, committed batches and what became of their events."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self._requests: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))
        self._overtaken = 0
        self._falls = 0
        self._batch_events = Histogram("batch_events", "Events settled by a batch that settled any.", EVENTS)
        self._request_events = Histogram("request_events", "Events in a request to Centrifugo.", EVENTS)
        self._request_seconds = Histogram("request_seconds", "Time that a request took.", REQUEST_SECONDS)
        self._lag = Histogram("lag_seconds", "From an event's INSERT until its delivery was committed.", LAG_SECONDS)

    def request(self, events: int, seconds: float, outage: Outage | None) -> None:
        with self._lock:
            self._requests["failed" if outage else "answered"] += 1
            self._request_events.add((events,))
            self._request_seconds.add((seconds,))

    def batch(self, delivered: Sequence[Event], settlements: Sequence[Settlement], now: float) -> None:
        if not delivered and not settlements:
            return
        # After a failover the new server's clock may be behind; a sum that sinks would look like a restart.
        lags = [now - event.created_at if now > event.created_at else 0.0 for event in delivered]
        with self._lock:
            self._events["delivered"] += len(delivered)
            known = (settlement.outcome for settlement in settlements if not isinstance(settlement.outcome, Unsettled))
            self._events.update(map(_label, known))
            self._batch_events.add((len(delivered) + len(settlements),))
            self._lag.add(lags)

    def overtaken(self, events: int) -> None:
        with self._lock:
            self._overtaken += events

    def needless(self, ended: Mapping[str, int]) -> None:
        if ended:
            with self._lock:
                self._events.update(ended)

    def falls(self, events: int) -> None:
        with self._lock:
            self._falls += events

    def collect(self) -> list[Metric]:
        with self._lock:
            return [
                _counter("events", "Outcomes of events; each refusal is one.", "outcome", self._events),
                _counter("requests", "Requests to Centrifugo; one without an answer failed.", "result", self._requests),
                CounterMetricFamily(
                    f"{PREFIX}overtaken", "Superseded events that Centrifugo dropped as stale.", value=self._overtaken
                ),
                CounterMetricFamily(
                    f"{PREFIX}version_falls", "Events with a version below an earlier one's.", value=self._falls
                ),
                self._batch_events.family(),
                self._request_events.family(),
                self._request_seconds.family(),
                self._lag.family(),
            ]


class HealthCollector(Collector):
    """How the relay is, at the moment of the scrape."""

    def __init__(self, health: Callable[[], Health]) -> None:
        self._health = health

    def collect(self) -> Iterator[Metric]:
        health = self._health()
        yield _gauge("outage", "1 while nothing is published because Centrifugo accepts nothing.", health.outage)
        yield _gauge("ready", "1 while events can be delivered, as /ready says.", health.obstacle is None)
        yield _gauge("workers_without_database", "Workers that connect again.", len(health.without_database))
        yield _gauge("workers_frozen", "Workers without a sign of life for too long.", len(health.frozen))
        seen = GaugeMetricFamily(
            f"{PREFIX}worker_seen_timestamp_seconds", "A worker's last sign of life, since 1970.", labels=["worker"]
        )
        now = time.time()
        for number, seconds in enumerate(health.silent):
            seen.add_metric([str(number)], now - seconds)
        yield seen


class BacklogCollector(Collector):
    """What waits in the database: asked at most every `every` seconds, less often if it is slow; awaited `patience`.

    `read` gives the numbers of `outbox_relay.store.Backlog` by name, or raises. It runs in a thread of its own, one
    at a time, because a database that answers nothing must not take the other metrics with it: these gauges are then
    absent.
    """

    def __init__(self, read: Callable[[], Mapping[str, float | None]], *, every: float = 5.0, patience: float = 2.0):
        self._read = read
        self._every = every
        self._patience = patience
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._due_at = 0.0
        self._answer: Mapping[str, float | None] | None = None
        self._failing = False

    def collect(self) -> Iterator[Metric]:
        answer = self._current()
        yield _gauge("backlog_up", "1 if the database answered the last question for the backlog.", answer is not None)
        if answer is None:
            return
        for name, text in BACKLOG.items():
            yield _gauge(name, text, answer[name] or 0.0)
        since_commit = answer["oldest_pending_commit_seconds"]
        if since_commit is not None:
            yield _gauge(
                "oldest_pending_commit_seconds",
                "Age of the oldest pending event since its COMMIT, where PostgreSQL has track_commit_timestamp on.",
                since_commit,
            )

    def _current(self) -> Mapping[str, float | None] | None:
        """The answer of the question asked last, which may be a few seconds old; None if there is none."""
        with self._lock:
            asking = self._thread is not None and self._thread.is_alive()
            if not asking and time.monotonic() >= self._due_at:
                self._thread = threading.Thread(target=self._ask, name="outbox-relay-backlog", daemon=True)
                self._thread.start()
            thread = self._thread
        if thread is not None:
            thread.join(self._patience)
        return None if thread is None or thread.is_alive() else self._answer

    def _ask(self) -> None:
        asked_at = time.monotonic()
        try:
            self._answer = self._read()
            self._failing = False
        except Exception as error:
            self._answer = None
            if not self._failing:
                log.warning("metrics: the backlog cannot be read", reason=str(error))
            self._failing = True
        finally:
            took = time.monotonic() - asked_at
            self._due_at = asked_at + max(self._every, REST * took)


def _label(outcome: Outcome) -> str:
    """An outcome's name. Until its channels were told, an event that is given up is held like any other."""
    return outcome.state if isinstance(outcome, GivenUp) else "held"


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def registry(*collectors: Collector) -> CollectorRegistry:
    """A registry of its own with these collectors and what the system knows about this process."""
    own = CollectorRegistry()
    ProcessCollector(registry=own)
    for collector in collectors:
        own.register(collector)
    return own
