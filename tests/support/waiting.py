"""How tests wait: always for something, and never for ever."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds that nothing in these tests takes unless it is broken."""


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Poll until `condition` is true; fail with `what` was awaited after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)


@contextlib.contextmanager
def in_background(function: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Run `function` in a thread while the block runs; call what is yielded for its result."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(function)
        yield lambda: future.result(PATIENCE)
