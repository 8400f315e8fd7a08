"""What the writers did and what reached the screen, noted by several threads while it happens."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

RECENT: Final = 500


class Tally(NamedTuple):
    """The ledger's numbers at one moment. `lags` are those of the most recent events, in seconds.

    `reloaded` counts the events that reached the screen by reloading the state, not by a publication.
    """

    committed: int
    rolled_back: int
    received: int
    reloaded: int
    duplicates: int
    lags: Sequence[float]


class Waiting(NamedTuple):
    """A committed event that has not reached the screen, and when it was committed."""

    order: str
    version: int
    since: float


class Ledger:
    """Events by their ids: committed, received, and the lag in between, in seconds.

    `troubles` are failures that nobody staged; any thread may append one.
    """

    def __init__(self) -> None:
        self.troubles: list[str] = []
        self._lock = threading.Lock()
        self._committed: set[str] = set()
        self._waiting: dict[str, Waiting] = {}
        self._received: Counter[str] = Counter()
        self._lags: list[float] = []
        self._arrivals = 0
        self._reloaded = 0
        self._rolled_back = 0

    def commit(self, event_id: str, order: str, version: int) -> None:
        """Note a commit: to be called as soon as it has returned."""
        now = time.monotonic()
        with self._lock:
            self._committed.add(event_id)
            if event_id in self._received:
                self._lags.append(0.0)  # it arrived before its writer had learnt of the commit
            else:
                self._waiting[event_id] = Waiting(order, version, now)

    def roll_back(self) -> None:
        """Note a transaction that was rolled back."""
        with self._lock:
            self._rolled_back += 1

    def receive(self, event_id: str) -> float | None:
        """Note a publication, and return its event's lag; None if it is not the first of a committed event."""
        now = time.monotonic()
        with self._lock:
            self._arrivals += 1
            self._received[event_id] += 1
            return self._seen(event_id, now)

    def reload(self, versions: Mapping[str, int]) -> None:
        """Note that the screen has loaded these versions of the orders: what waited for them has been seen."""
        now = time.monotonic()
        with self._lock:
            for event_id, waiting in list(self._waiting.items()):
                if waiting.version <= versions.get(waiting.order, 0):
                    self._seen(event_id, now)
                    self._reloaded += 1

    def _seen(self, event_id: str, now: float) -> float | None:
        waiting = self._waiting.pop(event_id, None)
        if waiting is None:
            return None
        self._lags.append(now - waiting.since)
        return self._lags[-1]

    def tally(self) -> Tally:
        with self._lock:
            return Tally(
                committed=len(self._committed),
                rolled_back=self._rolled_back,
                received=self._arrivals,
                reloaded=self._reloaded,
                duplicates=self._arrivals - len(self._received),
                lags=self._lags[-RECENT:],
            )

    def lags(self) -> list[float]:
        """The lags of the whole run."""
        with self._lock:
            return list(self._lags)

    def committed(self) -> set[str]:
        """The events whose commits have returned."""
        with self._lock:
            return set(self._committed)

    def received(self) -> dict[str, int]:
        """How often each event arrived in a publication."""
        with self._lock:
            return dict(self._received)


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The nearest-rank percentile, or None of nothing."""
    return sorted(values)[(len(values) - 1) * percent // 100] if values else None
