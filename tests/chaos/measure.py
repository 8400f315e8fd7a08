"""What a fault cost, and what is left when all are healed."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg

from outbox_relay.database import APPLICATION_NAME
from tests.chaos.fault import Fault
from tests.chaos.world import World
from tests.support.oracle import Struck

MEMORY_MIB: Final = 150
"""What a relay may have resident at the end, whatever it has been through."""


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault that was injected. Times are seconds since 1970: its harm was being done from `at`, was done at
    `struck`, and had ended at `healed`."""

    fault: Fault
    at: float
    struck: float
    healed: float
    alone: bool = False

    @property
    def as_struck(self) -> Struck:
        return Struck(self.fault.kind, self.at, self.healed)


class Injection(NamedTuple):
    """One fault and its price. `recovery` is in seconds; None where it could not be measured."""

    kind: str
    duplicates: int
    in_flight: int
    recovery: float | None


class Waiting:
    """The events of a run by the time of their commit."""

    def __init__(self, committed_at: Mapping[str, float], settled_at: Mapping[str, float]) -> None:
        both = sorted((at, settled_at[key]) for key, at in committed_at.items() if key in settled_at)
        self._committed = [at for at, _ in both]
        self._settled = [at for _, at in both]

    def until(self, at: float) -> float | None:
        """When the last event was settled that waited at that time. None where nothing did."""
        first, last = bisect_left(self._committed, at - 30.0), bisect_right(self._committed, at)
        return max((settled for settled in self._settled[first:last] if settled > at), default=None)


def recovery(strike: Strike, strikes: Sequence[Strike], waiting: Waiting, end: float) -> float | None:
    """Seconds until everything was settled that waited when the fault struck.

    They count from the healing, or from the strike where others take over. None where nothing waited, where others
    disturb or the run ended at `end`, and where much is promised but the fault was not alone. Once it has taken longer
    than is promised, nothing excuses it.
    """
    fault = strike.fault
    ended = waiting.until(strike.struck)
    if ended is None or (fault.within and not strike.alone):
        return None
    counts_from = strike.struck if fault.from_strike else strike.healed
    until = min(ended, counts_from + fault.within) if fault.within else ended
    if not fault.from_strike:
        until = max(until, strike.healed)
    if until > end or any(
        other is not strike and not other.fault.quiet and other.at < until and other.healed > strike.at
        for other in strikes
    ):
        return None
    return max(0.0, ended - counts_from)


_LEFT: Final = """
SELECT (SELECT count(*) FROM outbox WHERE state IN ('pending', 'parked')),
       (SELECT count(*) FROM outbox_hold),
       (SELECT count(*) FROM pg_stat_activity WHERE application_name = %(name)s),
       (SELECT count(*) FROM pg_stat_activity WHERE application_name = %(name)s AND state LIKE 'idle in%%'),
       (SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted)
"""


@dataclass(slots=True)
class Left:
    """I6: what is there after the healing, and after how many seconds nothing was that should not be."""

    seconds: float = 0.0
    unfinished: int = 0
    holds: int = 0
    sessions: int = 0
    sessions_expected: int = 0
    in_transaction: int = 0
    waiting: int = 0
    memory: dict[str, float] = field(default_factory=dict)
    """MiB by relay."""
    failures: list[str] = field(default_factory=list)

    def measure_database(self, connection: psycopg.Connection[Any], world: World) -> None:
        row = connection.execute(_LEFT, {"name": APPLICATION_NAME}).fetchone()
        assert row is not None
        self.unfinished, self.holds, self.sessions, self.in_transaction, self.waiting = row
        self.sessions_expected = world.sessions

    def measure_processes(self, world: World) -> None:
        for slot in world.slots:
            if not slot.process.alive():
                self.failures.append(f"{slot.name} has ended by itself: {slot.process.output[-500:]}")
                continue
            status = Path(f"/proc/{slot.process.pid}/status").read_text()
            found = re.search(r"VmRSS:\s+(\d+)", status)
            assert found is not None
            self.memory[slot.name] = int(found[1]) / 1024
        for path in world.folder.glob("relay-*.log"):
            if "worker failed" in path.read_text():
                self.failures.append(f"a worker failed: {path}")

    @property
    def violations(self) -> list[str]:
        found = list(self.failures)
        if self.unfinished or self.holds:
            found.append(f"left: {self.unfinished} events have not ended, {self.holds} aggregates are on hold")
        if self.sessions > self.sessions_expected:
            found.append(f"left: {self.sessions} sessions of relays, not {self.sessions_expected}")
        if self.in_transaction or self.waiting:
            found.append(f"left: {self.in_transaction} open transactions, {self.waiting} that wait for one")
        found += [f"left: {name} has {mib:.0f} MiB" for name, mib in self.memory.items() if mib > MEMORY_MIB]
        return found
