"""Relays killed, frozen, told to stop, and given another time of day."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Final

from tests.chaos.fault import Fault
from tests.chaos.world import Slot, World
from tests.support.failpoints import POINTS
from tests.support.gateway import Exchange
from tests.support.waiting import wait_until

KILLED: Final = 1.0
FROZEN: Final = 15.0
"""Seconds after which the aggregates of a relay that is no more, or stands still, must have moved on."""
TIMEOUTS: Final = (6.0, 8.0)
"""Longer than the database waits for a silent session (5 s with the defaults): its lanes go to others."""


@contextmanager
def killed(world: World, chance: Random) -> Iterator[None]:
    with world.victim(chance) as slot:
        slot.process.kill()
    yield


@contextmanager
def killed_at_a_point(world: World, chance: Random) -> Iterator[None]:
    with world.victim(chance) as slot:
        strike_at(world, slot, chance.choice(POINTS), signal.SIGKILL)
    yield


@contextmanager
def killed_in_flight(world: World, chance: Random) -> Iterator[None]:
    """When its request has arrived, or when Centrifugo has executed it and the relay does not know."""
    with world.victim(chance) as slot:
        executed = chance.random() < 0.5

        def kill(exchange: Exchange) -> None:
            if executed:
                exchange.forward()
            slot.process.kill()
            exchange.hang_up()

        with world.window.doing(kill, slot.name):
            wait_until(lambda: not slot.process.alive(), "the relay is killed with its request")
    yield


@contextmanager
def frozen(world: World, chance: Random) -> Iterator[None]:
    with world.victim(chance) as slot:
        slot.process.freeze()
        yield
        slot.process.thaw()


@contextmanager
def frozen_at_a_point(world: World, chance: Random) -> Iterator[None]:
    with world.victim(chance) as slot:
        strike_at(world, slot, chance.choice(POINTS), signal.SIGSTOP)
        yield
        slot.process.thaw()


@contextmanager
def frozen_while_it_receives_rows(world: World, chance: Random) -> Iterator[None]:
    """The way back from the database is blocked first, so that PostgreSQL cannot get rid of the rows."""
    with world.victim(chance) as slot:
        slot.database.stall()
        slot.process.freeze()
        yield
        slot.process.thaw()
        slot.database.mend()


@contextmanager
def stopped_in_a_storm(world: World, chance: Random) -> Iterator[None]:
    """SIGTERM for each relay, again as soon as it has started, as an orchestrator does that has lost its mind."""
    with ExitStack() as stack:
        slots = [stack.enter_context(world.victim(chance)) for _ in range(2)]
        for _ in range(chance.randint(1, 2)):
            for slot in slots:
                slot.process.signal(signal.SIGTERM)
            for slot in slots:
                status = slot.process.wait()
                assert status == 0, f"SIGTERM ended a relay with {status}:\n{slot.process.output}"
                world.replace(slot)
            for slot in slots:
                slot.process.wait_for("relay started")
    yield


@contextmanager
def clock_stepped(world: World, chance: Random) -> Iterator[None]:
    """An hour forth or back, and then to where it was, in a relay that is at work."""
    with world.victim(chance) as slot:
        slot.clock.write_text(chance.choice(["+3600", "-3600"]))
        yield
        slot.clock.write_text("+0")


def strike_at(world: World, slot: Slot, point: str, number: signal.Signals) -> None:
    """Wait until the relay has come to `point` and the signal has struck it there."""
    world.arm(slot, point, number)
    wait_until(lambda: not slot.process.alive() or slot.process.is_stopped(), f"{slot.name} is struck {point}")


FAULTS: Final = (
    Fault("relay killed", killed, from_strike=True, within=KILLED),
    Fault("relay killed at a point of its path", killed_at_a_point, from_strike=True, within=KILLED),
    Fault("relay killed with a request in flight", killed_in_flight, from_strike=True, within=KILLED),
    Fault("relay frozen beyond its time-outs", frozen, TIMEOUTS, beside=True, from_strike=True, within=FROZEN),
    Fault(
        "relay frozen at a point of its path",
        frozen_at_a_point,
        TIMEOUTS,
        beside=True,
        from_strike=True,
        within=FROZEN,
    ),
    Fault(
        "relay frozen while it receives rows",
        frozen_while_it_receives_rows,
        (10.0, 14.0),
        beside=True,
        from_strike=True,
        within=FROZEN,
    ),
    Fault("SIGTERM storm", stopped_in_a_storm),
    Fault("clock stepped by an hour", clock_stepped, (2.0, 4.0), beside=True, quiet=True, needs="faketime"),
)
