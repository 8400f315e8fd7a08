"""Several sessions of one database, led step by step through a given order of their steps.

As PostgreSQL's own isolation tester does it: whoever has leave to go on runs until its next step, its end, or a lock
that another session holds. In the last case the others go on, and it does as soon as it gets the lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import psycopg

from tests.support.waiting import PATIENCE

_GLANCE: Final = 0.001
"""Seconds for a step before the database is asked whether it waits for a lock."""


class Gate:
    """What a session asks for leave before each of its steps."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._leave = 0
        self._waits = False
        self._ended = False

    def __call__(self) -> None:
        """Wait for leave to take the next step."""
        with self._changed:
            self._waits = True
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._leave > 0, PATIENCE), "nobody leads this session"
            self._leave -= 1
            self._waits = False

    def give_leave(self) -> None:
        with self._changed:
            self._leave += 1
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def quiet(self) -> bool:
        """Whether it will do nothing by itself."""
        return self._ended or (self._waits and not self._leave)


class Actor(NamedTuple):
    """A session with its database connection's process id, and what it does, asking the gate before each step."""

    pid: int
    run: Callable[[Gate], None]


class Stage:
    """Leads up to `actors` sessions. `connection` is its own: there it asks who waits."""

    def __init__(self, connection: psycopg.Connection[Any], actors: int) -> None:
        self._connection = connection
        self._changed = threading.Condition()
        self._executor = ThreadPoolExecutor(actors)

    def close(self) -> None:
        self._executor.shutdown()

    def play(self, actors: Mapping[str, Actor], schedule: Sequence[str]) -> None:
        """Run the actors, each one's steps at its names' places in the schedule. Raises what an actor raises."""
        gates = {name: Gate(self._changed) for name in actors}
        ended: list[Future[None]] = [
            self._executor.submit(self._run, actor, gates[name]) for name, actor in actors.items()
        ]
        pids = {actors[name].pid: gate for name, gate in gates.items()}
        self._settle(pids)
        for name in schedule:
            gates[name].give_leave()
            self._settle(pids)
        for future in ended:
            future.result(PATIENCE)

    @staticmethod
    def _run(actor: Actor, gate: Gate) -> None:
        try:
            actor.run(gate)
        finally:
            gate.end()

    def _settle(self, pids: Mapping[int, Gate]) -> None:
        """Wait until every session is at its gate, at its end, or waits for a lock."""
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: all(gate.quiet for gate in pids.values()), _GLANCE):
                    return
                busy = [pid for pid, gate in pids.items() if not gate.quiet]
            # Asked once: who was granted its lock by the commit of another does not show up here any more.
            query = "SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted AND pid = ANY(%s)"
            if self._connection.execute(query, (busy,)).fetchone() == (len(busy),):
                return


def interleavings(steps: Mapping[str, int]) -> Iterator[str]:
    """Every order of the actors' steps, each actor (a letter) with so many of them."""
    if not any(steps.values()):
        yield ""
    for name, left in steps.items():
        if left:
            for rest in interleavings({**steps, name: left - 1}):
                yield name + rest
