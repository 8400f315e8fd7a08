"""What the writers did and what the subscriber received, noted by several threads while it happens."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

RECENT: Final = 500


class Tally(NamedTuple):
    """The ledger's numbers at one moment. `lags` are those of the most recent events, in seconds."""

    committed: int
    rolled_back: int
    received: int
    duplicates: int
    lags: Sequence[float]


class Ledger:
    """Events by id: when committed, when and how often received; and the lag in between, in seconds.

    `troubles` are failures that nobody staged; any thread may append one.
    """

    def __init__(self) -> None:
        self.troubles: list[str] = []
        self._lock = threading.Lock()
        self._committed_at: dict[str, float] = {}
        self._received_at: dict[str, float] = {}
        self._received: Counter[str] = Counter()
        self._arrivals = 0
        self._rolled_back = 0
        self._lags: list[float] = []

    def commit(self, event_id: str) -> None:
        """Note a commit: to be called as soon as it has returned."""
        now = time.monotonic()
        with self._lock:
            self._committed_at[event_id] = now
            self._measure(event_id)

    def roll_back(self) -> None:
        with self._lock:
            self._rolled_back += 1

    def receive(self, event_id: str) -> None:
        """Note an arrival. Only the first one of an event counts for the lag."""
        now = time.monotonic()
        with self._lock:
            self._received[event_id] += 1
            self._arrivals += 1
            if event_id not in self._received_at:
                self._received_at[event_id] = now
                self._measure(event_id)

    def _measure(self, event_id: str) -> None:
        if (lag := self._lag(event_id)) is not None:
            self._lags.append(lag)

    def _lag(self, event_id: str) -> float | None:
        committed, received = self._committed_at.get(event_id), self._received_at.get(event_id)
        # An event may arrive before its writer has learnt of the commit.
        return None if committed is None or received is None else max(0.0, received - committed)

    def lag(self, event_id: str) -> float | None:
        """From the commit to the first arrival; None while one of them is not known."""
        with self._lock:
            return self._lag(event_id)

    def tally(self) -> Tally:
        with self._lock:
            return Tally(
                committed=len(self._committed_at),
                rolled_back=self._rolled_back,
                received=self._arrivals,
                duplicates=self._arrivals - len(self._received),
                lags=self._lags[-RECENT:],
            )

    def lags(self) -> list[float]:
        """The lags of the whole run."""
        with self._lock:
            return list(self._lags)

    def committed(self) -> set[str]:
        with self._lock:
            return set(self._committed_at)

    def received(self) -> dict[str, int]:
        """How often each event arrived."""
        with self._lock:
            return dict(self._received)


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The nearest-rank percentile, or None of nothing."""
    return sorted(values)[(len(values) - 1) * percent // 100] if values else None
