"""Centrifugo killed, stopped, frozen, restarted in another shape, and slow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Final

from tests.chaos.fault import Fault
from tests.chaos.world import NAMESPACES, World

RESTARTED: Final = 2.0
"""Seconds after which all must be as before, once it is back."""


@contextmanager
def killed(world: World, chance: Random) -> Iterator[None]:
    world.centrifugo.kill()
    yield
    world.centrifugo.start()


@contextmanager
def killed_for_a_moment(world: World, chance: Random) -> Iterator[None]:
    """Back before the relays' first try: what is not in flight notices nothing."""
    world.centrifugo.kill()
    world.centrifugo.start()
    yield


@contextmanager
def stopped(world: World, chance: Random) -> Iterator[None]:
    """SIGTERM: it ends the connections of its clients, and takes publications until it is gone."""
    world.centrifugo.stop()
    yield
    world.centrifugo.start()


@contextmanager
def frozen(world: World, chance: Random) -> Iterator[None]:
    """Requests are taken by the kernel and answered when it goes on, long after the relays gave them up."""
    world.centrifugo.pause()
    yield
    world.centrifugo.resume()


@contextmanager
def wrong_key(world: World, chance: Random) -> Iterator[None]:
    world.restart_centrifugo(key="another key")
    yield
    world.restart_centrifugo()


@contextmanager
def unknown_namespace(world: World, chance: Random) -> Iterator[None]:
    """It comes back without one of its namespaces: refusals for some, which are nobody's fault."""
    lacking = chance.choice(NAMESPACES[1:])
    world.restart_centrifugo(namespaces=tuple(each for each in NAMESPACES if each is not lacking))
    yield
    world.restart_centrifugo()


FAULTS: Final = (
    Fault("Centrifugo killed", killed, (0.5, 2.0), within=RESTARTED, alone_with="Centrifugo"),
    Fault("Centrifugo killed and started at once", killed_for_a_moment, within=RESTARTED, alone_with="Centrifugo"),
    Fault("Centrifugo stopped", stopped, (0.5, 2.0), within=RESTARTED, alone_with="Centrifugo"),
    Fault("Centrifugo frozen", frozen, (0.5, 5.0), alone_with="Centrifugo"),
    Fault("Centrifugo restarted with another key", wrong_key, (0.5, 2.0), alone_with="Centrifugo"),
    Fault("Centrifugo restarted without a namespace", unknown_namespace, (0.5, 2.0), alone_with="Centrifugo"),
)
