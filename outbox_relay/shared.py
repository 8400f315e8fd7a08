"""What the workers of one relay know together, and whom they tell."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Final, Protocol

from outbox_relay.event import Clock, Event, Outage, boottime
from outbox_relay.health import Progress
from outbox_relay.log import get_logger
from outbox_relay.outcome import SUPERSEDED, GivenUp, Held, Owed, Settlement, backoff, namespace
from outbox_relay.suspects import Suspects
from outbox_relay.versions import Versions

log = get_logger()

OTHERS_WAIT: Final = 0.02
SIGN_OF_LIFE_EVERY: Final = 1.0
RETRY_AFTER_MAX: Final = 60.0


class Observer(Protocol):
    """Who counts what happens. Called after the fact, by several threads; must not raise."""

    def request(self, events: int, seconds: float, outage: Outage | None) -> None: ...

    def batch(self, delivered: Sequence[Event], settlements: Sequence[Settlement], now: float) -> None:
        """One committed batch. `now` is on the database's clock, as the events' `created_at`."""

    def overtaken(self, events: int) -> None:
        """So many of a committed batch's superseded events were sent, and Centrifugo itself dropped them as stale."""

    def needless(self, ended: Mapping[str, int]) -> None:
        """So many of a committed batch's events ended, by state, because a later one was accepted in their place."""

    def falls(self, events: int) -> None:
        """So many delivered events had a version below that of an earlier one of their aggregate."""


class Unobserved:
    """Nobody counts."""

    def request(self, events: int, seconds: float, outage: Outage | None) -> None:
        """Do nothing."""

    def batch(self, delivered: Sequence[Event], settlements: Sequence[Settlement], now: float) -> None:
        """Do nothing."""

    def overtaken(self, events: int) -> None:
        """Do nothing."""

    def needless(self, ended: Mapping[str, int]) -> None:
        """Do nothing."""

    def falls(self, events: int) -> None:
        """Do nothing."""


class Pause:
    """The outage that all workers of a relay share: said once, waited out with backoff, ended by any success.

    The backoff grows from `shortest` to `longest`, in seconds.
    """

    def __init__(self, shortest: float, longest: float) -> None:
        self._shortest = shortest
        self._longest = longest
        self._lock = threading.Lock()
        self._probe = threading.Lock()
        self._tries = 0
        self._until = 0.0

    @property
    def outage(self) -> bool:
        return self._tries > 0

    def report(self, outage: Outage | None, *, sound: bool) -> None:
        """Take note of how a batch went."""
        with self._lock:
            if outage is not None:
                self._tries += 1
                delay = backoff(self._tries, self._shortest, self._longest)
                if outage.retry_after is not None:
                    delay = max(delay, min(outage.retry_after, RETRY_AFTER_MAX))
                self._until = boottime() + delay
                if self._tries == 1:
                    log.warning("outage: nothing is published, no event is blamed", reason=outage.reason)
            elif sound:
                if self._tries:
                    log.info("outage is over", failed_requests=self._tries)
                self._tries = 0

    @contextmanager
    def turn(self, stopping: threading.Event, progress: Progress) -> Iterator[None]:
        """Wait until the next try is due. While the outage lasts one worker tries, and the others wait for it."""
        while self.outage and not stopping.is_set():
            progress.alive()
            left = self._until - boottime()
            if left <= 0 and self._probe.acquire(blocking=False):
                try:
                    yield
                finally:
                    self._probe.release()
                return
            stopping.wait(min(max(left, OTHERS_WAIT), SIGN_OF_LIFE_EVERY))
        yield


@dataclass(slots=True)
class Shared:
    """What the workers of one relay know together."""

    pause: Pause
    observer: Observer = field(default_factory=Unobserved)
    stopping: threading.Event = field(default_factory=threading.Event)
    suspects: Suspects = field(default_factory=Suspects)
    versions: Versions = field(default_factory=Versions)
    accepted_at: dict[str, float] = field(default_factory=dict)
    """By namespace: when the last request was sent in which it accepted something."""
    progress: list[Progress] = field(default_factory=list)
    """By worker, once they are started."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, events: Sequence[Event], accepted: Iterable[str], sent_at: float) -> None:
        """Note which channels accepted something in a request sent at `sent_at`."""
        with self._lock:
            for name in set(map(namespace, accepted)):
                self.accepted_at[name] = max(sent_at, self.accepted_at.get(name, 0.0))
            self.suspects.answered(events)

    def failed(self, events: Sequence[Event], clock: Clock) -> bool:
        """Note a request that failed whole, and say whether its only event is to blame."""
        with self._lock:
            return self.suspects.failed(events, clock.now(), max(self.accepted_at.values(), default=0.0))

    def watch_versions(self, delivered: Sequence[Event]) -> None:
        """Say which delivered events break the writers' contract: subscribers that compare versions drop them."""
        with self._lock:
            falls = self.versions.falls(delivered)
        if falls:
            self.observer.falls(len(falls))
            event, version_before = falls[0]
            log.warning(
                "version went down: subscribers ignore the event",
                events=len(falls),
                event_id=event.id,
                aggregate_type=event.aggregate_type,
                aggregate_id=event.aggregate_id,
                version=event.version,
                version_before=version_before,
            )


def log_outcomes(delivered: int, settlements: Iterable[Settlement]) -> None:
    """One line for each event that is not plainly delivered."""
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
    if delivered and log.isEnabledFor(logging.DEBUG):
        log.debug("delivered", events=delivered)
