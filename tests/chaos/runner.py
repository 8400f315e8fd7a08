"""One stage of a run: calm, then faults (safety), then healing (liveness), then judgement."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from tests.chaos import (
    centrifugo_faults,
    logs,
    maps,
    network_faults,
    operator_faults,
    postgres_faults,
    redis_faults,
    relay_faults,
)
from tests.chaos.fault import Appointment, Fault, schedule
from tests.chaos.measure import Injection, Left, Strike, Waiting, recovery
from tests.chaos.world import NAMESPACES, RELAY, Engine, World, end, namespace
from tests.support.oracle import Hole, Struck, Verdict, judge
from tests.support.waiting import wait_until

CALM: Final = 4.0
"""Seconds without faults at the beginning: nothing may be repeated in them."""
CALMED: Final = 20.0
"""Seconds after which what earlier faults have left behind must have passed by, before one strikes alone."""
HEALED_IN: Final = 30.0
"""Seconds after the last fault in which everything must have ended."""
OVERLOADED: Final = 6.0
"""Processes that want to run, for each core, with which nothing can be said about how long something takes."""

IN_CI: Final = os.environ.get("CI") == "true"
"""Nothing is left out there."""

_EVERYWHERE: Final = (*relay_faults.FAULTS, *postgres_faults.FAULTS, *network_faults.FAULTS, *operator_faults.FAULTS)


@dataclass(frozen=True, slots=True)
class Stage:
    """A world of its own, and the faults that fit it.

    `whole`: the subscriber's stream survives every one of these faults, so it is the witness; a hole voids the run.
    Else the proxy's log is, and the subscriber judges order between its holes.
    """

    name: str
    engine: Engine
    faults: Sequence[Fault]
    part: float
    """Of the run's time."""
    whole: bool
    pooler: bool = False
    """Whether pgbouncer is between the relays and the database, in transaction mode."""
    shaped: bool = False
    """Whether there is what is conflated, bundled, in maps or in exclusive channels beside the rest."""
    command: Sequence[str] = RELAY
    """The relay's."""
    patience: float = HEALED_IN


STAGES: Final = (
    Stage("Redis that survives", "redis", (*_EVERYWHERE, *centrifugo_faults.FAULTS), 0.58, whole=True, shaped=True),
    Stage("through pgbouncer", "redis", (*_EVERYWHERE, *centrifugo_faults.FAULTS), 0.18, whole=True, pooler=True),
    Stage("memory engine", "memory", (*relay_faults.FAULTS, *centrifugo_faults.FAULTS), 0.12, whole=False, shaped=True),
    Stage("Redis that does not", "redis", (*relay_faults.FAULTS, *redis_faults.FAULTS), 0.12, whole=False),
)


@dataclass(slots=True)
class Result:
    """What came of a stage."""

    stage: Stage
    verdict: Verdict
    injections: list[Injection]
    left: Left
    events: int
    transactions: int
    unknown: int
    heard: int
    requests: int
    repeated: int
    holes: int
    seconds: float
    left_out: list[str] = field(default_factory=list)
    """Kinds of faults that this machine cannot do."""

    @property
    def violations(self) -> list[str]:
        return [*self.verdict.violations, *self.left.violations]


class VoidRunError(Exception):
    """The harness itself failed, or its witness did: the run says nothing."""


def run(stage: Stage, seconds: float, seed: str, rate: float, folder: Path) -> Result:
    """Run a stage for so many seconds of faults. Raises `VoidRunError`."""
    folder.mkdir()
    with World(folder, stage.engine, seed, rate, stage.command, pooler=stage.pooler, shaped=stage.shaped) as world:
        possible = [fault for fault in stage.faults if not fault.needs or fault.needs in world.has]
        if len(possible) < len(stage.faults) and IN_CI:
            raise VoidRunError("this machine cannot do every fault: run as root, with libfaketime")
        appointments = schedule(possible, seconds, seed)
        started = time.time()
        world.start_writers()
        time.sleep(CALM)
        struck = _Storm(world).run(appointments, seconds)
        healed = time.time()
        world.stop_writers()
        restart = _give_the_namespace(world)
        left = _heal(world, stage.patience)
        load = os.getloadavg()[0]
        if left.violations and stage.command is RELAY and load > OVERLOADED * (os.cpu_count() or 1):
            raise VoidRunError(f"the machine has no time to heal anything, its load is {load:.0f}: {left.violations}")
        _say(f"healed after {left.seconds:.1f} s {left.violations or ''}")
        _let_the_witness_finish(world)
        held = maps.read_back(world.centrifugo, folder / "witness.jsonl", whole=stage.whole)
        with world.database() as connection:
            faults = [*(strike.as_struck for strike in struck), restart]
            history, written = logs.read(folder, connection, faults, world.people, held, whole=stage.whole)
        holes = sum(isinstance(fact, Hole) for facts in history.heard.values() for fact in facts)
        if stage.whole and holes:
            raise VoidRunError(f"the subscriber lost its stream: see {folder / 'witness.jsonl'}")
        verdict = judge(history)
        waiting = Waiting(written.plain_at, history.rows.settled_at)
        bill_of = {cost.fault: cost for cost in verdict.bills}
        injections = [
            Injection(strike.fault.kind, cost.duplicates, cost.in_flight, recovery(strike, struck, waiting, healed))
            for strike in struck
            for cost in [bill_of[strike.as_struck]]
        ]
        logs.write_faults(folder, struck, injections)
        return Result(
            stage,
            verdict,
            injections,
            left,
            events=len(written.committed_at),
            transactions=written.transactions,
            unknown=written.unknown,
            heard=sum(map(len, history.heard.values())) - holes,
            requests=len(history.sent),
            repeated=sum(cost.duplicates for cost in verdict.bills),
            holes=holes,
            seconds=healed - started,
            left_out=[fault.kind for fault in stage.faults if fault not in possible],
        )


class _Storm:
    """The faults of a schedule, each in a thread of its own."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._struck: list[Strike] = []
        self._servers: Mapping[str, AbstractContextManager[object]] = {
            "": nullcontext(),
            **{server: threading.Lock() for server in ("Centrifugo", "PostgreSQL", "Redis")},
        }
        self._errors: list[tuple[Appointment, BaseException]] = []

    def run(self, appointments: Sequence[Appointment], seconds: float) -> list[Strike]:
        """Let them all strike and heal. Returns them in the order in which they struck. Raises `VoidRunError`.

        It takes at least so many seconds.
        """
        started = time.monotonic()
        threads: list[threading.Thread] = []
        for appointment in appointments:
            time.sleep(max(0.0, started + appointment.at - time.monotonic()))
            if appointment.alone:
                # What is left of the faults before is not this one's: all others wait as long.
                now = time.monotonic()
                self._world.wait_until_calm(CALMED)
                started += time.monotonic() - now
            if self._errors:
                break
            threads.append(threading.Thread(target=self._strike, args=(appointment,), daemon=True))
            threads[-1].start()
        else:
            time.sleep(max(0.0, started + seconds - time.monotonic()))
        for thread in threads:
            thread.join()
        if self._errors:
            appointment, error = self._errors[0]
            raise VoidRunError(f"{appointment.fault.kind} (seed {appointment.seed}) could not be done") from error
        return sorted(self._struck, key=lambda strike: strike.at)

    def _strike(self, appointment: Appointment) -> None:
        fault = appointment.fault
        _say(f"{appointment.at:7.1f} s  {fault.kind}, {appointment.seconds:.1f} s")
        try:
            with self._servers[fault.alone_with]:
                at = time.time()
                with fault.strike(self._world, Random(appointment.seed)):
                    struck = time.time()
                    # Waiting for a victim is no part of the fault: what was sent then was not in flight.
                    at = self._world.held.pop(threading.get_ident(), at)
                    time.sleep(appointment.seconds)
                self._struck.append(Strike(fault, at, struck, time.time(), appointment.alone))
        except BaseException as error:
            self._errors.append((appointment, error))


_UNFINISHED: Final = """
SELECT FROM outbox WHERE state IN ('pending', 'parked') AND id <= %s UNION ALL SELECT FROM outbox_hold LIMIT 1
"""


def _give_the_namespace(world: World) -> Struck:
    """A person gives Centrifugo the namespace that it lacks; who does so with a restart cuts requests off, too."""
    at = time.time()
    world.restart_centrifugo(namespaces=(*NAMESPACES, namespace("nowhere", 20_000)))
    return Struck("Centrifugo restarted with all namespaces", at, time.time())


def _heal(world: World, patience: float) -> Left:
    """Wait until everything has ended, and say what is left.

    A little is written until what was there has ended: where nothing else is accepted, nobody can tell a refusal that
    is an event's own fault from an outage, and it waits.
    """
    left = Left()
    deadline = time.monotonic() + patience
    with world.database() as connection:
        [(last,)] = connection.execute("SELECT max(id) FROM outbox").fetchall()
    world.start_pulse()
    while time.monotonic() < deadline - 1.0:
        with world.database() as connection:
            if not connection.execute(_UNFINISHED, (last,)).fetchall():
                break
        time.sleep(0.1)
    world.stop_writers()
    while True:
        with world.database() as connection:
            left.measure_database(connection, world)
        if not left.violations or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    left.seconds = patience - (deadline - time.monotonic())
    left.measure_processes(world)
    return left


def _let_the_witness_finish(world: World) -> None:
    """Until it has heard nothing for a second: nobody can tell it that nothing more will come."""
    log = world.folder / "witness.jsonl"
    seen = (-1, 0.0)

    def silent() -> bool:
        nonlocal seen
        size = log.stat().st_size
        if size != seen[0]:
            seen = (size, time.monotonic())
        return time.monotonic() - seen[1] > 1.0

    wait_until(silent, "the witness has heard everything")
    end(world.witness)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
