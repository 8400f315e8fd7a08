"""What people do meanwhile: requeue, discard, replay and prune, with the verbs that they have for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Final

from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.operator import Filter, Operator, OperatorError
from tests.chaos.fault import Fault, Strike
from tests.chaos.world import World

KEEP: Final = 3.0
"""Seconds that delivered events are kept by who prunes."""


def meddling(meddle: Callable[[World, Operator, Random], object], every: float) -> Strike:
    """A person who does it again and again. That a relay or a broken database is in the way is no error."""

    @contextmanager
    def strike(world: World, chance: Random) -> Iterator[None]:
        operator = Operator(world.database_url, keep=KEEP)
        stopping = threading.Event()

        def go_on() -> None:
            while not stopping.wait(every):
                with contextlib.suppress(DatabaseUnavailableError, OperatorError):
                    meddle(world, operator, chance)

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()

    return strike


def requeue(world: World, operator: Operator, chance: Random) -> None:
    """Dead events are sent again: in their place where nothing has gone out after them, or late."""
    ids = [event.id for event in operator.dead(Filter(state="dead"))]
    if ids and chance.random() < 0.3:
        # Noted before it happens: what surfaces late must have been asked for.
        world.people.asked.update(ids[:5])
        operator.requeue(ids[:5], late=True)
    elif ids:
        world.people.retried.update(ids)
        operator.requeue(ids)


def discard(world: World, operator: Operator, chance: Random) -> None:
    """Dead events are given up, and heads of holds: those without a namespace, which can go nowhere."""
    for event in operator.dead(limit=50):
        if (event.state == "dead" or event.aggregate_id.startswith("nowhere-")) and chance.random() < 0.2:
            if event.state != "dead" and event.id in world.people.given_up:
                world.people.untold.add(event.id)
            world.people.given_up.add(event.id)
            operator.discard([event.id])


def replay(world: World, operator: Operator, chance: Random) -> None:
    """A few delivered events are sent once more, under new keys."""
    with world.database() as connection:
        rows = connection.execute(
            "SELECT id FROM outbox WHERE state = 'delivered' AND aggregate_id LIKE 'serial-%' ORDER BY id DESC LIMIT 10"
        ).fetchall()
    ids = [id_ for (id_,) in rows]
    world.people.asked.update(ids)
    operator.replay(ids)


def prune(world: World, operator: Operator, chance: Random) -> None:
    operator.prune()


FAULTS: Final = (
    Fault("requeue meanwhile", meddling(requeue, 0.3), (1.0, 3.0), beside=True, quiet=True),
    Fault("discard meanwhile", meddling(discard, 0.3), (1.0, 3.0), beside=True, quiet=True),
    Fault("replay meanwhile", meddling(replay, 0.3), (0.5, 1.0), beside=True, quiet=True),
    Fault("retention meanwhile", meddling(prune, 0.1), (1.0, 3.0), beside=True, quiet=True),
)
