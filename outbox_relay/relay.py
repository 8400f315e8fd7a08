"""The order of things: claim, read, publish in waves, judge, settle; and when to do it again.

`Worker.run_once` is the path of an event. Everything else here decides when to run it, and when to stop.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from types import TracebackType
from typing import Final, Protocol, Self

from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.event import ACCEPTED, OVERTAKEN, Event, Outage, Refusal, Reply, boottime
from outbox_relay.health import Health, Progress
from outbox_relay.log import get_logger
from outbox_relay.outcome import (
    INTERNAL,
    SUPERSEDED,
    UNANSWERED,
    GivenUp,
    Held,
    Owed,
    Policy,
    Settlement,
    backoff,
    judge,
)
from outbox_relay.packing import Limits, Wires, waves
from outbox_relay.policy import end, plan, superseded
from outbox_relay.shared import Observer, Pause, Shared, Unobserved
from outbox_relay.store import Batch, Clock, Store
from outbox_relay.upkeep import Chores

log = get_logger()

WAVE_SHRINKAGE: Final = 4
"""A wave with less than this part of the first one's events waits for the next batch, with fuller company."""
PROBE_LANES: Final = 4
LOOKAHEAD: Final = 8
SLEEP_AT_MOST: Final = 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """How a relay works; times in seconds."""

    workers: int = 2
    lanes: int = 64
    events_per_lane: int = 16
    batch_events: int = 1_000
    batch_bytes: int = 1024 * 1024
    batch_time: float = 1.0
    poll_min: float = 0.002
    poll_max: float = 0.1
    pause_min: float = 0.1
    pause_max: float = 1.0
    stop_timeout: float = 10.0
    frozen_after: float = 60.0
    """Without a sign of life for so long a worker counts as frozen."""
    keep: float = 7 * 86_400.0
    keep_dead: float = 90 * 86_400.0
    limits: Limits = field(default_factory=Limits)
    policy: Policy = field(default_factory=Policy)
    policies: Mapping[str, Policy] = field(default_factory=dict)
    """By aggregate type, where it differs from `policy`."""
    wires: Wires = field(default_factory=dict)

    @property
    def lookahead(self) -> int:
        """How many times as many events are read where most of them need not be sent."""
        return LOOKAHEAD if any(policy.conflate for policy in self.policies.values()) else 1

    def policy_of(self, aggregate_type: str) -> Policy:
        return self.policies.get(aggregate_type, self.policy)


class Publisher(Protocol):
    """Where events go. Exactly one reply per event, in order, or one outage for all; nothing is sent past `deadline`.

    The deadline is on `boottime()`, and was taken while the lanes were surely ours. `room` is how many events the
    publisher wants in a request now, `limit` at most.
    """

    def room(self, limit: int) -> int: ...

    def publish(self, events: Sequence[Event], deadline: float) -> list[Reply] | Outage: ...

    def close(self) -> None: ...


class Ended(enum.Enum):
    """Why a relay's run has ended."""

    STOPPED = "stopped"
    EMPTY = "nothing is pending"
    ONLY_HELD = "only held or parked events are left"
    HUNG = "a worker did not stop in time"
    FAILED = "a worker failed"


@dataclass(slots=True)
class Sent:
    """What is known of a batch after its requests: events without an answer are in neither list."""

    delivered: list[Event] = field(default_factory=list)
    told: list[Event] = field(default_factory=list)
    """Gaps that were accepted."""
    overtaken: list[Event] = field(default_factory=list)
    """All their channels had a newer version."""
    refused: list[tuple[Event, Reply]] = field(default_factory=list)
    behind: set[tuple[str, str]] = field(default_factory=set)
    """Aggregates of which nothing more may be sent in this batch."""
    anything_accepted: bool = False
    outage: Outage | None = None

    @property
    def sound(self) -> bool:
        """Whether Centrifugo did its work: it accepted something, or refused an event for the event's own sake."""
        codes = {refusal.code for _, reply in self.refused for refusal in reply.refusals}
        return self.anything_accepted or any(code > UNANSWERED and code != INTERNAL for code in codes)


class Worker:
    """One thread's share of a relay: its own database session and its own HTTP connection."""

    def __init__(self, store: Store, publisher: Publisher, options: Options, shared: Shared) -> None:
        self._store = store
        self._publisher = publisher
        self._options = options
        self._shared = shared
        self._after = 0
        # A new session, so also the one after a settle or a commit that failed, proves first that outcomes can
        # be written: else a full disk or a lost grant would publish the same events again and again.
        self._untried = True

    def run_once(self) -> bool:
        """Deliver one batch, and return whether there was anything to do.

        One transaction: what was locked by `claim` is locked until the outcomes are written. A crash at any
        point leaves the events as they were. Raises `DatabaseUnavailableError`; nothing is lost then, and at
        most this batch is published again.
        """
        options = self._options
        if self._untried:
            self._store.prove_writable()
        with self._store.batch():
            # While nothing is known to be accepted, a few events are enough to find out.
            lanes = PROBE_LANES if self._shared.pause.outage else options.lanes
            claim = self._store.claim(after=self._after, lanes=lanes)
            if not claim.lanes:
                return False
            self._after = claim.lanes[-1].lane
            batch = self._store.read(
                claim.lanes,
                events=min(options.batch_events, lanes * options.events_per_lane) * options.lookahead,
                per_lane=options.events_per_lane * options.lookahead,
                max_bytes=options.batch_bytes,
            )
            if self._untried:
                self._store.rehearse([event.id for event in batch.events])
            batch.events, ends, covered = plan(batch.events, claim.clock.now(), options.policy_of)
            sent = self._publish(batch, claim.clock)
            settlements, trouble = judge(
                sent.refused,
                batch.holds,
                self._shared.accepted_at,
                claim.clock.now(),
                options.policy_of,
                anything_accepted=sent.anything_accepted,
            )
            settlements += [*ends, *(end(gap, options.policy_of(gap.aggregate_type)) for gap in sent.told)]
            settlements += [Settlement(event, SUPERSEDED, ()) for event in sent.overtaken]
            if covered:
                accepted, now = [*sent.delivered, *sent.overtaken], claim.clock.now()
                settlements += superseded(covered, accepted, sent.refused, now, options.policy_of)
            outage = sent.outage or trouble
            # Before the lanes are free for another worker, which would not know.
            self._shared.pause.report(outage, sound=sent.sound)
            if sent.delivered or settlements or batch.holds:
                self._store.settle([event.id for event in sent.delivered], settlements, batch.holds)
        self._untried = False
        self._shared.observer.batch(sent.delivered, settlements, claim.clock.now())
        self._shared.watch_versions(sent.delivered)
        _log_outcomes(len(sent.delivered), settlements)
        return bool(sent.delivered or settlements or batch.parked or outage)

    def _publish(self, batch: Batch, clock: Clock) -> Sent:
        """Send the batch wave by wave, suspects last, until it is sent, its time is over or there is an outage."""
        sent = Sent()
        alone = {hold.head_id for hold in batch.holds.values() if hold.alone}
        free, suspects = self._shared.suspects.part(batch.events, alone)
        limits = self._options.limits
        wires = self._options.wires
        planned = waves(free, replace(limits, events=self._publisher.room(limits.events)), wires)
        full = list(takewhile(lambda wave: len(wave) * WAVE_SHRINKAGE >= len(planned[0]), planned))
        if suspects:
            unsent = {event.aggregate for wave in planned[len(full) :] for event in wave}
            suspects = [[event for event in group if event.aggregate not in unsent] for group in suspects]
            suspects = [waves(group, limits, wires)[0] for group in suspects if group]
        ends_at = boottime() + self._options.batch_time
        for number, wave in enumerate([*full, *suspects]):
            if number and (self._shared.stopping.is_set() or boottime() >= ends_at):
                break
            events = [event for event in wave if event.aggregate not in sent.behind] if sent.behind else wave
            if not events:
                continue
            deadline = self._store.request_deadline()
            if deadline is None:
                break
            outage = self._send(events, deadline, clock, sent)
            if outage is None:
                continue
            if events[0].id in alone or self._shared.failed(events, clock):
                refusals = (Refusal(channel, -outage.verdict, outage.reason) for channel in events[0].unsent)
                sent.refused.append((events[0], Reply(tuple(refusals))))
            elif number < len(full) or not sent.anything_accepted:
                sent.outage = outage
                break
            sent.behind.update(event.aggregate for event in events)
        return sent

    def _send(self, events: Sequence[Event], deadline: float, clock: Clock, sent: Sent) -> Outage | None:
        """Send one request and note its answers in `sent`."""
        sent_at, started = clock.now(), boottime()
        replies = self._publisher.publish(events, deadline)
        outage = replies if isinstance(replies, Outage) else None
        self._shared.observer.request(len(events), boottime() - started, outage)
        if isinstance(replies, Outage):
            return replies
        accepted: set[str] = set()
        for event, reply in zip(events, replies, strict=True):
            if reply is ACCEPTED:
                (sent.told if event.ending else sent.delivered).append(event)
                accepted.update(event.unsent if event.accepted else event.channels)
            elif reply is OVERTAKEN:
                (sent.told if event.ending else sent.overtaken).append(event)
                accepted.update(event.unsent)
            else:
                # What its other channels accept proves that Centrifugo works, but nothing against this event.
                sent.refused.append((event, reply))
                sent.behind.add(event.aggregate)
                sent.anything_accepted |= bool(reply.accepted)
        sent.anything_accepted |= bool(accepted)
        self._shared.answered(events, accepted, sent_at)
        doubted = [event for event, reply in zip(events, replies, strict=True) if reply.bundled]
        if doubted:
            self._shared.failed(doubted, clock)
        return None


def _log_outcomes(delivered: int, settlements: Iterable[Settlement]) -> None:
    for event, outcome, _ in settlements:
        about = {"event_id": event.id, "aggregate_type": event.aggregate_type, "aggregate_id": event.aggregate_id}
        match outcome:
            case Held():
                log.warning("event refused, its aggregate waits", **about, **asdict(outcome))
            case Owed(error=error):
                log.error("event is given up, its channels are told", **about, error=error)
            case GivenUp(state="dead", error=error):
                log.error("event is dead", **about, error=error)
            case GivenUp(state=state, error=error) if outcome is not SUPERSEDED:
                log.info(f"event is {state}", **about, error=error)
    if delivered:
        log.debug("delivered", events=delivered)


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
        observer: Observer | None = None,
    ) -> None:
        self._open_store = open_store
        self._open_publisher = open_publisher
        self._options = options or Options()
        self._shared = Shared(Pause(self._options.pause_min, self._options.pause_max), observer or Unobserved())
        self._threads: list[threading.Thread] = []
        self._until_empty = False
        self._ended = Ended.STOPPED

    def start(self, *, until_empty: bool = False) -> None:
        """Start the workers and return. A relay runs once: make another one to run again."""
        if self._threads:
            raise RuntimeError("this relay has run already: make another one")
        self._until_empty = until_empty
        self._shared.progress = [Progress() for _ in range(self._options.workers)]
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

    def health(self) -> Health:
        """How the workers get on. Asks nobody, returns at once."""
        now, progress = boottime(), self._shared.progress
        return Health(
            silent=tuple(now - worker.seen for worker in progress),
            has_database=tuple(worker.has_database for worker in progress),
            outage=self._shared.pause.outage,
            stopping=self.stopping,
            patience=self._options.frozen_after,
        )

    def stop(self) -> None:
        """Ask the workers to finish the request in flight, settle what is known and end. Returns at once.

        Takes a lock: not for a signal handler.
        """
        self._shared.stopping.set()

    def join(self) -> Ended:
        """Wait until the workers have ended; after `stop`, at most `stop_timeout` seconds."""
        self._shared.stopping.wait()
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
        progress = self._shared.progress[number]
        chores = Chores(self._options.keep, self._options.keep_dead) if number == 0 else None
        failures = 0
        try:
            while not stopping.is_set():
                try:
                    with closing(self._open_store()) as store, closing(self._open_publisher()) as publisher:
                        worker = Worker(store, publisher, self._options, self._shared)
                        self._deliver(worker, store, number, chores)
                except DatabaseUnavailableError as error:
                    progress.alive()
                    failures = failures + 1 if progress.has_database is False else 1
                    progress.has_database = False
                    if failures == 1:
                        log.warning("database lost, connecting again", worker=number, reason=str(error))
                    stopping.wait(backoff(failures, self._options.pause_min, self._options.pause_max))
        except BaseException:
            log.exception("worker failed", worker=number)
            self._ended = Ended.FAILED
            stopping.set()

    def _deliver(self, worker: Worker, store: Store, number: int, chores: Chores | None) -> None:
        """Batches at once while there is work, growing waits while there is none, until asked to stop."""
        stopping, progress = self._shared.stopping, self._shared.progress[number]
        told = False
        idle = self._options.poll_min
        while not stopping.is_set():
            progress.alive()
            with self._shared.pause.turn(stopping, progress):
                busy = not stopping.is_set() and (told or store.anything_to_do()) and worker.run_once()
            if progress.has_database is False:
                log.info("database is back", worker=number)
            progress.has_database = True
            if chores is not None:
                chores.do(store)
            if busy:
                told, idle = False, self._options.poll_min
                continue
            if self._until_empty and self._finished(store):
                return
            told = self._rest(store, idle)
            idle = min(idle * 2, self._options.poll_max)

    def _rest(self, store: Store, seconds: float) -> bool:
        """Wait for `seconds` or until an event is committed, and return whether that is known to have happened.

        A sleeper does not hear `stop`.
        """
        told = store.wake_up.sleep(min(self._options.poll_max, SLEEP_AT_MOST)) if store.wake_up else None
        if told is None:
            self._shared.stopping.wait(seconds)
        return bool(told)

    def _finished(self, store: Store) -> bool:
        pending, held = store.left()
        if pending:
            return False
        self._ended = Ended.ONLY_HELD if held else Ended.EMPTY
        self._shared.stopping.set()
        return True
