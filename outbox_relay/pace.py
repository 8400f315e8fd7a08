"""Whether Centrifugo publishes the commands of a request faster side by side, found out by trying.

Measured: on the Redis engine three to four times faster, on the memory engine a fifth slower. A relay cannot ask which
engine it is, so now and then it sends a few small requests either way and compares.
"""

from __future__ import annotations

from statistics import median
from typing import Final

from outbox_relay.event import boottime

TRY_EVENTS: Final = 64
"""Events in a request that tries: so few that a slow broker is done with them, one by one, long before the deadline."""
TRIES: Final = 4
TRY_EVERY: Final = 60.0
WORTH_SECONDS: Final = 20e-6
"""What side by side must spare per event. On Redis it spares 70 µs and more, on the memory engine nothing. A
difference, not a ratio: the way to Centrifugo and back is in both."""


class Pace:
    """One connection's choice: `parallel` where it is given, else what the times of its own requests say."""

    def __init__(self, parallel: bool | None = None) -> None:
        self._fixed = parallel is not None
        self._parallel = parallel is not False
        self._tried: dict[bool, list[float]] = {True: [], False: []}
        self._decided_at: float | None = None

    def room(self, limit: int) -> int:
        """How many events the next requests may hold at most: few while both ways are tried."""
        if self._fixed:
            return limit
        if self._decided_at is not None and boottime() - self._decided_at > TRY_EVERY:
            self._decided_at = None
        return limit if self._decided_at is not None else min(limit, TRY_EVENTS)

    def choose(self, events: int) -> bool:
        """Whether a request of so many events should ask for `parallel`."""
        if self._fixed or self._decided_at is not None or events != TRY_EVENTS:
            return self._parallel and events > 1
        return len(self._tried[True]) <= len(self._tried[False])

    def note(self, events: int, seconds: float, *, parallel: bool) -> None:
        """Take note of a request that was answered, and decide once both ways were tried often enough."""
        if self._fixed or self._decided_at is not None or events != TRY_EVENTS:
            return
        self._tried[parallel].append(seconds)
        if min(map(len, self._tried.values())) >= TRIES:
            spared = median(self._tried[False]) - median(self._tried[True])
            self._parallel = spared > WORTH_SECONDS * events
            self._tried = {True: [], False: []}
            self._decided_at = boottime()
