"""The demo in this terminal, and the board beside it for as long: `python -m examples.demo [--seconds N]`.

Each has servers of its own. What the demo alone is: `outbox-relay demo`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from outbox_relay.demo import run
from outbox_relay.embedded._process import Process

ROOT: Final = Path(__file__).parent.parent
START_SECONDS: Final = 60
STOP_SECONDS: Final = 30


class Board:
    """`python -m examples.board` on a free port, as a process that ends when this one does."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "board.log"
        self._process = Process(
            [sys.executable, "-u", "-m", "examples.board", "--port", "0"],
            log=self._log,
            cwd=ROOT,
            env=os.environ,
            remove=folder,
        )

    def wait_served(self) -> str:
        """Its address, once it is served there. Raises EmbeddedError, with the end of its log."""
        self._process.wait_until(lambda: self._address() is not None, START_SECONDS, "the board")
        return self._address() or ""

    def stop(self) -> None:
        self._process.stop(signal.SIGTERM, STOP_SECONDS)

    def _address(self) -> str | None:
        found = re.search(r"^the board: (\S+) ", self._log.read_text(), re.MULTILINE)
        return found and found[1]


@contextmanager
def starting_board() -> Iterator[Board]:
    """A board that starts meanwhile, and is stopped at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="outbox-relay-board-") as folder:
        board = Board(Path(folder))
        try:
            yield board
        finally:
            board.stop()


def show(url: str, console: Console) -> None:
    """Say where the board is, and open it where somebody sits before a screen."""
    console.print(f"the board, a live page to do harm to: {url}", markup=False, soft_wrap=True)
    if console.is_interactive and {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        # In a process of its own, which may say and wait for what it likes. Without TERM it takes no browser that
        # would run in this terminal.
        subprocess.Popen(
            [sys.executable, "-m", "webbrowser", url],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name != "TERM"},
        )


def main(
    seconds: Annotated[
        float | None, typer.Option(min=1, help="How long it runs. \\[default: until Ctrl-C, 20 without a terminal]")
    ] = None,
) -> None:
    """Run the demo, and serve the board on the loopback address until the demo ends. Exits as the demo does."""
    console = Console(highlight=False)
    with starting_board() as board:
        code = run(seconds, console=console, once_started=lambda: show(board.wait_served(), console))
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
