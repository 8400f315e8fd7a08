"""Take-over: how long events wait when the relay that holds their lanes is killed, or stops without being dead.

Two relays run and a writer writes on. A victim, either of them, is stopped at a random moment (SIGSTOP); if none of its
sessions is inside a batch, it goes on and another moment is tried. Then it is killed at once, or stays stopped until
others have its lanes: stopped for good, it is killed in the end, and never finishes a request that others have made
anew.

From then on the longest wait of an event counts, from its INSERT to the subscriber: as long as nothing was delivered
from its lane. The time in which nothing arrived from any lane, `silence`, is shorter: the other relay goes on.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

import psycopg

from bench import stage
from bench.bulk import make_tables
from bench.drain import wait_for_workers
from bench.harness import Mode, Row, Sample, Scenario
from bench.open_loop import Target, percentile, wait_until_delivered, write
from bench.outboxes import in_background
from bench.sides import OurRelay
from bench.witness import Seen, Witness
from outbox_relay.config import Settings
from outbox_relay.embedded.centrifugo import find_or_build
from outbox_relay.embedded.postgres import Postgres

RATE: Final = 200.0
CHANNELS: Final = [f"plain:{n}" for n in range(100)]
TARGETS: Final = [Target(str(n), CHANNELS[n % 100]) for n in range(10_000)]
KILLS: Final = {"full": 40, "short": 12, "quick": 4}
STOPS: Final = {"full": 8, "short": 3, "quick": 1}
APART: Final = (0.3, 0.6)
"""Seconds with both relays at work before the next victim, at random."""
STOPPED_SECONDS: Final = 6.5
"""Longer than the database waits for a silent session (request_timeout + batch_time + 1)."""
SEEN_SECONDS: Final = 0.5
"""After a kill, before the start of another process takes the cores for a moment."""

_BATCHES: Final = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND client_port = ANY(%s) AND state = 'idle in transaction' AND query !~ '^BEGIN'
"""


class TakeOver:
    name = "take_over"
    title = "Take-over"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        server = stack.enter_context(stage.postgres())
        template = stage.template(server, "empty", make_tables)
        kill = _TakeOver(server, template, find_or_build(), KILLS[mode.name], 0.0)
        stop = replace(kill, victims=STOPS[mode.name], stopped=STOPPED_SECONDS)
        yield [
            Row("take_over/kill/us", "longest wait of an event after kill -9, p99", "s", kill, kill.settings, 1),
            Row("take_over/stop/us", "longest wait of an event after SIGSTOP, p99", "s", stop, stop.settings, 1),
        ]


@dataclass(frozen=True, slots=True)
class _TakeOver:
    """One run with so many victims, one after the other, each stopped for `stopped` seconds before it is killed."""

    server: Postgres
    template: str
    binary: Path
    victims: int
    stopped: float

    @property
    def settings(self) -> dict[str, object]:
        return {"relays": 2, "events per second": RATE, "victims": self.victims, "relay": "as shipped"}

    def __call__(self) -> Sample:
        written: Counter[Target] = Counter()
        with (
            stage.database(self.server, self.template) as url,
            stage.centrifugo(self.binary) as centrifugo,
            Witness(centrifugo.ws_url, CHANNELS, sys.maxsize, seconds=600) as witness,
            OurRelay(url, centrifugo, processes=2) as relay,
        ):
            wait_for_workers(url, 2 * Settings.workers)
            with in_background(lambda enough: written.update(write(url, TARGETS, RATE, enough))):
                times = [self._take(url, relay) for _ in range(self.victims)]
            wait_until_delivered(url, CHANNELS)
            witness.enough(written.total())
            seen = witness.wait()
        waits, silences = zip(*(_beside(at, until, seen) for at, until in times), strict=True)
        figures = {
            "median wait": percentile(waits, 0.5),
            "silence, p99": percentile(silences, 0.99),
            "silence, median": percentile(silences, 0.5),
            "duplicates": float(seen.duplicates),
        }
        return Sample(percentile(waits, 0.99), figures)

    def _take(self, url: str, relay: OurRelay) -> tuple[float, float]:
        """Take one relay down, then start another in its place; returns when it stopped, and until when that counts."""
        time.sleep(random.uniform(*APART))
        victim = random.choice([process for process in relay.processes if process.poll() is None])
        at = _stop_in_a_batch(url, victim)
        time.sleep(self.stopped)
        victim.kill()
        victim.wait()
        time.sleep(SEEN_SECONDS)
        until = time.monotonic()
        relay.start_another()
        wait_for_workers(url, 2 * Settings.workers)
        return at, until


def _stop_in_a_batch(url: str, victim: subprocess.Popen[bytes]) -> float:
    """Stop a process while it holds lanes, and return when that was."""
    ports = _local_ports(victim.pid)
    with psycopg.connect(url, autocommit=True) as connection:
        while True:
            at = time.monotonic()
            victim.send_signal(signal.SIGSTOP)
            [(batches,)] = connection.execute(_BATCHES, (ports,)).fetchall()
            if batches:
                return at
            victim.send_signal(signal.SIGCONT)
            time.sleep(random.uniform(0, 2 / RATE))


def _local_ports(pid: int) -> list[int]:
    """The ports from which a process has TCP connections: how to tell its database sessions from others'."""
    files = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
    # sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode …
    sockets = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [int(fields[1].partition(":")[2], 16) for fields in sockets if f"socket:[{fields[9]}]" in files]


def _beside(at: float, until: float, seen: Seen) -> tuple[float, float]:
    """The longest wait of an event, and the longest time without arrivals, that began before `until` and ended later
    than `at`: however late the end."""
    arrived = zip(seen.lags, seen.arrivals, strict=True)
    waits = [lag for lag, arrival in arrived if arrival > at and arrival - lag < until]
    silences = [after - before for before, after in pairwise(seen.arrivals) if after > at and before < until]
    return max(waits), max(silences)


SCENARIO: Scenario = TakeOver()
