"""The order of things: claim, read, publish in waves, judge, settle; and when to do it again.

`Worker.run_once` is the path of an event. Everything else here decides when to run it, and when to stop.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Protocol, Self

from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.log import get_logger
from outbox_relay.outcome import (
    ACCEPTED,
    Dead,
    Event,
    Held,
    Outage,
    Policy,
    Reply,
    Settlement,
    backoff,
    boottime,
    judge,
    namespace,
)
from outbox_relay.store import Batch, Clock, Store

log = get_logger()

WAVE_SHRINKAGE: Final = 4
"""A wave with less than this part of the first one's events waits for the next batch, with fuller company."""
PROBE_EVENTS: Final = 64
OTHERS_WAIT: Final = 0.02
RETRY_AFTER_MAX: Final = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request: events, bytes of payload, bytes of payload to one channel.

    One event always fits. Bytes per channel matter because Centrifugo disconnects a subscriber whose queue
    grows past `client.queue_max_size`, 1 MiB by default.
    """

    events: int = 1_000
    bytes: int = 1024 * 1024
    channel_bytes: int = 256 * 1024


@dataclass(frozen=True, slots=True)
class Options:
    """How a relay works; times in seconds."""

    workers: int = 2
    lanes: int = 64
    events_per_lane: int = 16
    batch_events: int = 1_000
    batch_bytes: int = 2 * 1024 * 1024
    batch_time: float = 1.0
    poll_min: float = 0.002
    poll_max: float = 0.1
    pause_min: float = 0.1
    pause_max: float = 1.0
    stop_timeout: float = 10.0
    limits: Limits = field(default_factory=Limits)
    policy: Policy = field(default_factory=Policy)


class Publisher(Protocol):
    """Where events go. Exactly one reply per event, in order, or one outage for all."""

    def publish(self, events: Sequence[Event]) -> list[Reply] | Outage: ...

    def close(self) -> None: ...


class Ended(enum.Enum):
    """Why a relay's run has ended."""

    STOPPED = "stopped"
    EMPTY = "nothing is pending"
    ONLY_HELD = "only held or parked events are left"
    HUNG = "a worker did not stop in time"
    FAILED = "a worker failed"


def waves(events: Iterable[Event], limits: Limits) -> list[list[Event]]:
    """Pack events into requests: the earliest that has room, after the one with the aggregate's last event.

    At most one event of an aggregate in a request, because Centrifugo goes on after a failing command and its
    successor would overtake it. Events of one aggregate keep their order.
    """
    requests: list[list[Event]] = []
    room: list[int] = []  # bytes left, by request
    used: list[dict[str, int]] = []  # bytes by channel, by request
    next_of: dict[tuple[str, str], int] = {}  # the earliest request for an aggregate's next event
    for event in events:
        size = len(event.payload)
        aggregate = (event.aggregate_type, event.aggregate_id)
        n = next_of.get(aggregate, 0)
        while n < len(requests) and not (
            size <= room[n]
            and len(requests[n]) < limits.events
            and all(used[n].get(channel, 0) + size <= limits.channel_bytes for channel in event.channels)
        ):
            n += 1
        if n == len(requests):
            requests.append([])
            room.append(limits.bytes)
            used.append({})
        requests[n].append(event)
        room[n] -= size
        for channel in event.channels:
            used[n][channel] = used[n].get(channel, 0) + size
        next_of[aggregate] = n + 1
    return requests


@dataclass(slots=True)
class Sent:
    """What is known of a batch after its requests: events without an answer are in neither list."""

    delivered: list[int] = field(default_factory=list)
    refused: list[tuple[Event, Reply]] = field(default_factory=list)
    anything_accepted: bool = False
    outage: Outage | None = None


class Worker:
    """One thread's share of a relay: its own database session and its own HTTP connection."""

    def __init__(self, store: Store, publisher: Publisher, options: Options, shared: Shared) -> None:
        self._store = store
        self._publisher = publisher
        self._options = options
        self._shared = shared
        self._after = 0

    def run_once(self) -> bool:
        """Deliver one batch, and return whether there was anything to do.

        One transaction: what was locked by `claim` is locked until the outcomes are written. A crash at any
        point leaves the events as they were. Raises `DatabaseUnavailableError`; nothing is lost then, and at
        most this batch is published again.
        """
        if not self._store.anything_to_do():
            return False
        options = self._options
        with self._store.batch():
            claim = self._store.claim(after=self._after, lanes=options.lanes)
            if not claim.lanes:
                return False
            self._after = claim.lanes[-1].lane
            batch = self._store.read(
                claim.lanes,
                events=self._shared.pause.batch_events(options.batch_events),
                per_lane=options.events_per_lane,
                max_bytes=options.batch_bytes,
            )
            sent = self._publish(batch, claim.clock)
            settlements, trouble = judge(
                sent.refused,
                batch.holds,
                self._shared.accepted_at,
                claim.clock.now(),
                options.policy,
                anything_accepted=sent.anything_accepted,
            )
            if sent.delivered or settlements or batch.holds:
                self._store.settle(sent.delivered, settlements, batch.holds)
        outage = sent.outage or trouble
        self._shared.pause.report(outage, answered=bool(sent.delivered or settlements))
        _log_outcomes(len(sent.delivered), settlements)
        return bool(sent.delivered or settlements or batch.parked or outage)

    def _publish(self, batch: Batch, clock: Clock) -> Sent:
        """Send the batch wave by wave until it is sent, its time is over, or a request fails whole."""
        sent = Sent()
        behind: set[tuple[str, str]] = set()  # aggregates whose successors wait
        planned = waves(batch.events, self._options.limits)
        ends_at = boottime() + self._options.batch_time
        for number, wave in enumerate(planned):
            late = self._shared.stopping.is_set() or boottime() >= ends_at
            if number and (late or len(wave) * WAVE_SHRINKAGE < len(planned[0])):
                break
            events = [event for event in wave if event.aggregate not in behind] if behind else wave
            if not events:
                continue
            if not self._store.still_ours():
                break
            sent_at = clock.now()
            replies = self._publisher.publish(events)
            if isinstance(replies, Outage):
                sent.outage = replies
                break
            accepted: set[str] = set()
            for event, reply in zip(events, replies, strict=True):
                if reply is ACCEPTED:
                    sent.delivered.append(event.id)
                    accepted.update(event.channels)
                else:
                    sent.refused.append((event, reply))
                    behind.add(event.aggregate)
                    accepted.update(reply.accepted)
            sent.anything_accepted |= bool(accepted)
            self._shared.accepted_at.update(dict.fromkeys(map(namespace, accepted), sent_at))
        return sent


def _log_outcomes(delivered: int, settlements: Iterable[Settlement]) -> None:
    for event, outcome, _ in settlements:
        about = {"event_id": event.id, "aggregate_type": event.aggregate_type, "aggregate_id": event.aggregate_id}
        match outcome:
            case Held():
                log.warning(
                    "event refused, its aggregate waits",
                    **about,
                    tries=outcome.tries,
                    attempts=outcome.attempts,
                    seconds=round(outcome.delay, 1),
                    error=outcome.error,
                )
            case Dead():
                log.error("event is dead", **about, error=outcome.error)
    if delivered:
        log.debug("delivered", events=delivered)


class Pause:
    """The outage that all workers of a relay share: said once, waited out with backoff, ended by any success."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._probe = threading.Lock()
        self._tries = 0
        self._until = 0.0
        self._events = options.batch_events

    @property
    def outage(self) -> bool:
        return self._tries > 0

    def batch_events(self, usual: int) -> int:
        """How many events to read: few while it is not known whether Centrifugo takes any."""
        return min(usual, self._events)

    def report(self, outage: Outage | None, *, answered: bool) -> None:
        """Take note of how a batch went."""
        with self._lock:
            if outage is not None:
                self._tries += 1
                delay = backoff(self._tries, self._options.pause_min, self._options.pause_max)
                if outage.retry_after is not None:
                    delay = max(delay, min(outage.retry_after, RETRY_AFTER_MAX))
                self._until = boottime() + delay
                self._events = max(1, self._events // 2 if outage.timed_out else min(self._events, PROBE_EVENTS))
                if self._tries == 1:
                    log.warning("outage: nothing is published, no event is blamed", reason=outage.reason)
            elif answered:
                if self._tries:
                    log.info("outage is over", failed_requests=self._tries)
                self._tries = 0
                self._events = min(self._options.batch_events, self._events * 2)

    @contextmanager
    def turn(self, stopping: threading.Event) -> Iterator[None]:
        """Wait until the next try is due. While the outage lasts one worker tries, and the others wait for it."""
        while self.outage and not stopping.is_set():
            left = self._until - boottime()
            if left <= 0 and self._probe.acquire(blocking=False):
                try:
                    yield
                finally:
                    self._probe.release()
                return
            stopping.wait(max(left, OTHERS_WAIT))
        yield


@dataclass(slots=True)
class Shared:
    """What the workers of one relay know together."""

    pause: Pause
    stopping: threading.Event = field(default_factory=threading.Event)
    accepted_at: dict[str, float] = field(default_factory=dict)


class Relay:
    """Workers in threads of their own. `run` blocks; as a context manager the relay runs beside the caller.

    `open_store` and `open_publisher` are called once per worker, again after the database was lost; the first
    may raise `DatabaseUnavailableError`.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        open_publisher: Callable[[], Publisher],
        options: Options | None = None,
    ) -> None:
        self._open_store = open_store
        self._open_publisher = open_publisher
        self._options = options or Options()
        self._shared = Shared(Pause(self._options))
        self._threads: list[threading.Thread] = []
        self._until_empty = False
        self._ended = Ended.STOPPED

    def start(self, *, until_empty: bool = False) -> None:
        """Start the workers and return. A relay runs once: make another one to run again."""
        if self._threads:
            raise RuntimeError("this relay has run already: make another one")
        self._until_empty = until_empty
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"outbox-relay-{number}", daemon=True)
            for number in range(self._options.workers)
        ]
        log.info("relay started", workers=self._options.workers)
        for thread in self._threads:
            thread.start()

    @property
    def stopping(self) -> bool:
        return self._shared.stopping.is_set()

    def stop(self) -> None:
        """Ask the workers to finish the request in flight, settle what is known and end. Returns at once."""
        self._shared.stopping.set()

    def join(self) -> Ended:
        """Wait until the workers have ended; after `stop`, at most `stop_timeout` seconds."""
        while not self._shared.stopping.wait(1.0):
            pass  # a wait without end would keep signal handlers from running on some platforms
        deadline = boottime() + self._options.stop_timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - boottime()))
        if any(thread.is_alive() for thread in self._threads):
            self._ended = Ended.HUNG
        log.info("relay stopped", why=self._ended.value)
        return self._ended

    def run(self, *, until_empty: bool = False) -> Ended:
        self.start(until_empty=until_empty)
        return self.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.join()

    def _work(self, number: int) -> None:
        """One worker's life: connect, deliver batches, and after the database was lost connect again."""
        stopping = self._shared.stopping
        failures = 0
        try:
            while not stopping.is_set():
                try:
                    with closing(self._open_store()) as store, closing(self._open_publisher()) as publisher:
                        if failures:
                            log.info("database is back", worker=number)
                        failures = 0
                        self._deliver(Worker(store, publisher, self._options, self._shared), store, watch=number == 0)
                except DatabaseUnavailableError as error:
                    failures += 1
                    if failures == 1:
                        log.warning("database lost, connecting again", worker=number, reason=str(error))
                    stopping.wait(backoff(failures, self._options.pause_min, self._options.pause_max))
        except BaseException:
            log.exception("worker failed", worker=number)
            self._ended = Ended.FAILED
            stopping.set()

    def _deliver(self, worker: Worker, store: Store, *, watch: bool) -> None:
        """Batches at once while there is work, growing waits while there is none, until asked to stop."""
        stopping, pause = self._shared.stopping, self._shared.pause
        idle = self._options.poll_min
        watched_at = boottime()
        while not stopping.is_set():
            with pause.turn(stopping):
                busy = not stopping.is_set() and worker.run_once()
            if watch and boottime() - watched_at > store.session_timeout / 2:
                watched_at = boottime()
                if ended := store.end_stuck_sessions():
                    log.warning("ended sessions of relays that no longer read", sessions=ended)
            if busy:
                idle = self._options.poll_min
                continue
            if self._until_empty and self._finished(store):
                return
            stopping.wait(idle)
            idle = min(idle * 2, self._options.poll_max)

    def _finished(self, store: Store) -> bool:
        pending, held = store.left()
        if pending:
            return False
        self._ended = Ended.ONLY_HELD if held else Ended.EMPTY
        self._shared.stopping.set()
        return True
