"""What a fault is, and when faults strike: a schedule that its seed alone decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tests.chaos.world import World

Strike = Callable[["World", Random], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault. `strike` is a block: entering it does the harm, leaving it heals what it can.

    `seconds` are the shortest and the longest time in between; both 0 where the harm is done at once. `beside`
    says that others may strike meanwhile, because most of the system goes on. `from_strike`: recovery counts
    from the strike, because others take over and nobody waits for the healing.
    """

    kind: str
    strike: Strike
    seconds: tuple[float, float] = (0.0, 0.0)
    beside: bool = False
    from_strike: bool = False
    within: float = 0.0
    """Seconds of recovery that are promised. Every second round nothing else strikes for so long, so that whatever
    takes longer is seen. 0 where nothing is promised."""
    quiet: bool = False
    """Whether it keeps no event from being delivered, so that the recovery from others can be measured meanwhile."""
    alone_with: Literal["", "Centrifugo", "PostgreSQL", "Redis"] = ""
    """The server that it stops and starts: one fault at a time may do so."""
    needs: Literal["", "disk", "faketime"] = ""
    """What a machine may lack: a disk that can be made small, or libfaketime."""


@dataclass(frozen=True, slots=True)
class Appointment:
    """A fault of the schedule: when it strikes, in seconds from the start, and for how long."""

    at: float
    fault: Fault
    seconds: float
    seed: str
    """Decides whatever else chance decides about it: the victim, the point, the moment."""
    alone: bool = False
    """Whether nothing else is at work until its recovery is over, or has taken longer than is promised."""


PAUSE = (0.7, 1.6)
"""Seconds from the end of a fault to the next one."""
OVERLAP = 0.15
"""How often a fault strikes while another one is at work."""


def schedule(faults: Sequence[Fault], seconds: float, seed: str) -> list[Appointment]:
    """Faults for so many seconds: rounds in which each kind comes once, in an order of their own."""
    chance = Random(seed)
    appointments: list[Appointment] = []
    at = chance.uniform(*PAUSE)
    busy = 0.0  # until when something is at work
    waiting: list[Fault] = []
    rounds = 0
    while faults and at < seconds:
        if not waiting:
            waiting = chance.sample(faults, len(faults))
            rounds += 1
        fault = waiting.pop()
        alone = fault.within > 0 and rounds % 2 == 0
        if alone:
            at = max(at, busy + PAUSE[0])
        lasts = chance.uniform(*fault.seconds)
        if at + lasts > seconds and fault.seconds[1] > 0:
            lasts = min(lasts, fault.seconds[0])
        appointments.append(Appointment(at, fault, lasts, f"{seed}/{len(appointments)}", alone))
        if not fault.quiet:
            busy = max(busy, at + lasts)
        overlaps = not alone and (fault.beside or chance.random() < OVERLAP)
        at += 0.0 if overlaps else lasts
        if alone:
            at += fault.within if not fault.from_strike else max(0.0, fault.within - lasts)
        at += chance.uniform(*PAUSE)
    return appointments
