"""The Redis behind Centrifugo killed, frozen and flushed: no subscriber can be whole after that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Final

from tests.chaos.fault import Fault
from tests.chaos.world import World
from tests.support.redis import Redis


@contextmanager
def killed(world: World, chance: Random) -> Iterator[None]:
    _redis(world).kill()
    yield
    _redis(world).start()


@contextmanager
def frozen(world: World, chance: Random) -> Iterator[None]:
    _redis(world).freeze()
    yield
    _redis(world).thaw()


@contextmanager
def flushed(world: World, chance: Random) -> Iterator[None]:
    """It forgets all streams, and with them the idempotency keys."""
    _redis(world).ask("FLUSHALL")
    yield


def _redis(world: World) -> Redis:
    assert world.redis is not None
    return world.redis


FAULTS: Final = (
    Fault("Redis killed", killed, (0.5, 2.0), alone_with="Redis"),
    Fault("Redis frozen", frozen, (0.5, 4.0), alone_with="Redis"),
    Fault("Redis flushed", flushed, alone_with="Redis"),
)
