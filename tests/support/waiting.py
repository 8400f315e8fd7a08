"""The one way to wait for something that sends no event."""

import time
from collections.abc import Callable

PATIENCE = 20.0
"""Seconds that nothing in these tests takes unless it is broken."""


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Poll until `condition` is true; fail with `what` was awaited after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)
