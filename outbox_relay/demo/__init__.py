"""The main job on real servers: PostgreSQL, Centrifugo, an application, two relays, a subscriber, and a verdict.

A relay and Centrifugo are killed on the way. All of it ends with this process, after `kill -9` too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from rich.console import Console

from outbox_relay.demo import view
from outbox_relay.demo.play import Demo, interruptions
from outbox_relay.embedded._process import EmbeddedError

SECONDS: Final = 20.0


def main(seconds: float | None = None) -> int:
    """Run the demo in this terminal and return its exit code: 0 only if the verdict is true."""
    return run(seconds, console=Console(highlight=False))


def run(seconds: float | None, *, console: Console, once_started: Callable[[], None] = lambda: None) -> int:
    """Run for `seconds`; by default until Ctrl-C, and 20 without a terminal. Ends with the verdict.

    `once_started` is called when everything runs and nothing is shown yet, and may raise EmbeddedError.
    """
    if seconds is None and not console.is_interactive:
        seconds = SECONDS
    try:
        with Demo(console) as demo, interruptions() as interrupted:
            once_started()
            with demo.shown():
                demo.play(seconds, interrupted)
                verdict = demo.finish(interrupted)
            console.print(view.verdict(verdict, demo.summary()), soft_wrap=True)
    except EmbeddedError as error:
        console.print(f"the demo could not run: {error}", markup=False, soft_wrap=True)
        return 1
    return 0 if all(clause.holds for clause in verdict) else 1
