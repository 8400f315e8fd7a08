"""Commits at times fixed beforehand, from a few sessions: an application that does not wait for its subscribers.

`python -m bench.commits` is a process of its own, with a thread per session. Each event is one statement that is its
own transaction: the UPDATE of a business row, and what the side adds. `sent_at` in its payload is the moment right
before that statement is sent, so the commit is in the same round trip.
"""

from __future__ import annotations

import json
import random
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Final, NamedTuple, Self

import psycopg

from bench import load
from bench.harness import WrongRunError

SEED: Final = 20261124
ANSWER_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """`events` at `rate` per second with exponential gaps, the same ones each time; each of a random aggregate."""

    rate: float
    events: int
    aggregates: int = load.AGGREGATES

    def drawn(self) -> list[tuple[float, int]]:
        """Seconds from the start, rising, and the aggregate."""
        source = random.Random(SEED)
        at = 0.0
        drawn = []
        for _ in range(self.events):
            at += source.expovariate(self.rate)
            drawn.append((at, source.randrange(self.aggregates)))
        return drawn


class Written(NamedTuple):
    """What the writers did. `started_at` is of `time.monotonic()`."""

    started_at: float
    late: list[float]
    """Seconds from the time at which an event was due until it was sent."""


class Writer:
    """Connected and warm from the start of the `with` block.

    `statement` takes %(aggregate)s, a bigint that is the business row's id, %(channel)s, %(key)s, a text that no other
    event has, and %(payload)s. It must have no effect where it is rolled back.
    """

    def __init__(self, url: str, statement: str, schedule: Schedule, *, sessions: int) -> None:
        request = {"url": url, "statement": statement, "schedule": asdict(schedule), "sessions": sessions}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.commits"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._say(json.dumps(request))

    def __enter__(self) -> Self:
        if self._line() != "ready":
            raise WrongRunError("the writer is not ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def write(self) -> Written:
        """Let it write everything, and wait for the last commit."""
        self._say("go")
        return Written(**json.loads(self._line()))

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _line(self) -> str:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
        line = self._process.stdout.readline().rstrip() if readable else ""
        if not line:
            raise WrongRunError("the writer has nothing to say")
        return line


class _Sessions:
    """Threads that share one schedule: whoever is free takes the event that is due next."""

    def __init__(self, url: str, statement: str, due: Sequence[tuple[float, int]], sessions: int) -> None:
        self._statement = statement.encode()
        self._due = due
        self._next = iter(range(len(due)))
        self._taking = threading.Lock()
        self._late = [0.0] * len(due)
        self._connections = [psycopg.connect(url, autocommit=True, prepare_threshold=0) for _ in range(sessions)]

    def warm(self) -> None:
        """Let every session plan its statement."""
        for connection in self._connections:
            with connection.transaction(force_rollback=True):
                self._execute(connection, 0, "warm")

    def write(self) -> Written:
        started_at = time.monotonic()
        with ThreadPoolExecutor(len(self._connections)) as pool:
            for done in [pool.submit(self._work, connection, started_at) for connection in self._connections]:
                done.result()
        for connection in self._connections:
            connection.close()
        return Written(started_at, self._late)

    def _work(self, connection: psycopg.Connection, started_at: float) -> None:
        while True:
            with self._taking:
                number = next(self._next, None)
            if number is None:
                return
            after, aggregate = self._due[number]
            time.sleep(max(0.0, started_at + after - time.monotonic()))
            self._late[number] = self._execute(connection, aggregate, str(number)) - started_at - after

    def _execute(self, connection: psycopg.Connection, aggregate: int, key: str) -> float:
        """Commit one event and return its `sent_at`."""
        channel = f"plain:{aggregate % load.CHANNELS}"
        sent_at = time.monotonic()
        payload = f'{{"sent_at":{sent_at:.6f},"text":"'.ljust(load.PAYLOAD_BYTES - 2, "x") + '"}'
        connection.execute(
            self._statement, {"aggregate": aggregate, "channel": channel, "key": key, "payload": payload}
        )
        return sent_at


def _main() -> None:
    request = json.loads(sys.stdin.readline())
    due = Schedule(**request["schedule"]).drawn()
    sessions = _Sessions(request["url"], request["statement"], due, request["sessions"])
    sessions.warm()
    _answer("ready")
    sys.stdin.readline()
    _answer(json.dumps(sessions.write()._asdict()))


def _answer(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _main()
