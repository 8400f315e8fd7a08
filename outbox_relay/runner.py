"""Workers in threads of their own: when to deliver a batch, when to wait, when to stop."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from contextlib import closing
from types import TracebackType
from typing import Final, Self

from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.event import boottime
from outbox_relay.health import Health, Progress
from outbox_relay.log import get_logger
from outbox_relay.options import Options
from outbox_relay.outcome import backoff
from outbox_relay.relay import Publisher, Worker
from outbox_relay.shared import Observer, Pause, Shared, Unobserved
from outbox_relay.store import Store
from outbox_relay.upkeep import Chores

log = get_logger()

SLEEP_AT_MOST: Final = 0.5
OTHERS_AT_IT: Final = 0.01
"""Seconds, at most, until a worker looks for another lane while others have all those with work."""
ALONE: Final = 0.01
"""Seconds in which a batch that is not full is quick: its worker goes on alone, others would only make them smaller."""
STAND_BY: Final = 0.5
"""Seconds, at most, until a worker looks for events though another one keeps watch."""


class Ended(enum.Enum):
    """Why a relay's run has ended."""

    STOPPED = "stopped"
    EMPTY = "nothing is pending"
    ONLY_HELD = "only held or parked events are left"
    HUNG = "a worker did not stop in time"
    FAILED = "a worker failed"


class _Watch:
    """One idle worker looks out for events and delivers them; the others stand by until there are too many for it.

    Their waits grow to `longest` seconds.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._lock = threading.Lock()
        self._keeper: int | None = None
        self._quiet = False
        self._stopped = False
        self._over = threading.Event()

    def keep(self, number: int) -> bool:
        """Whether this worker, which has found nothing, keeps watch, from now on where nobody did."""
        with self._lock:
            if self._keeper is None and not self._stopped:
                self._keeper = number
                self._over.clear()
            if self._keeper == number:
                self._quiet = True
            return self._keeper == number

    def busy(self, number: int, *, again: bool = False) -> None:
        """This worker does not look out just now: the others do before long, or are called where it is so again."""
        with self._lock:
            if self._keeper == number:
                self._quiet = False
                if again:
                    self._keeper = None
                    self._over.set()

    def stand_by(self, seconds: float) -> None:
        """Wait for `seconds`, and on while all is quiet, for half a second at most."""
        until = boottime() + STAND_BY
        while not self._over.wait(min(seconds, STAND_BY)) and self._quiet and boottime() < until:
            seconds = min(2 * seconds, self._longest)

    def stop(self) -> None:
        """Nobody stands by any more."""
        with self._lock:
            self._stopped = True
            self._over.set()


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
        self._watch = _Watch(self._options.poll_max)
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
        self._watch.stop()

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
                    self._watch.busy(number, again=True)
                    progress.alive()
                    failures = failures + 1 if progress.has_database is False else 1
                    progress.has_database = False
                    if failures == 1:
                        log.warning("database lost, connecting again", worker=number, reason=str(error))
                    stopping.wait(backoff(failures, self._options.pause_min, self._options.pause_max))
        except BaseException:
            log.exception("worker failed", worker=number)
            self._ended = Ended.FAILED
            self.stop()

    def _deliver(self, worker: Worker, store: Store, number: int, chores: Chores | None) -> None:
        """Batches at once while there is work, growing waits while there is none, until asked to stop."""
        stopping, progress = self._shared.stopping, self._shared.progress[number]
        told = found = many = False
        idle = self._options.poll_min
        while not stopping.is_set():
            progress.alive()
            with self._shared.pause.turn(stopping, progress):
                # Where there was work there may be more: a claim finds out as fast as the question does.
                unasked = told or found
                wanted = not stopping.is_set() and (unasked or store.anything_to_do())
                if wanted:
                    self._watch.busy(number, again=many)
                started = boottime()
                found = wanted and worker.run_once()
                many = found and (worker.full or boottime() - started > ALONE)
            if progress.has_database is False:
                log.info("database is back", worker=number)
            progress.has_database = True
            if chores is not None:
                self._watch.busy(number)
                chores.do(store)
            told = False
            if found:
                idle = self._options.poll_min
            if found or unasked:
                continue
            if self._until_empty and self._finished(store):
                return
            if wanted:
                # Others have the lanes. Nobody is told when they are free, and to fall asleep would only wake us again.
                stopping.wait(min(idle, OTHERS_AT_IT))
            elif self._watch.keep(number):
                told = self._rest(store, idle)
            else:
                self._watch.stand_by(idle)
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
        self.stop()
        return True
