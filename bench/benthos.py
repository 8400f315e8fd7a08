"""Benthos, a rival: found, or built once from its pinned Go module. No package registry ships the program."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from outbox_relay.embedded._go import GoProgram, to_stderr

VERSION: Final = "4.27.0"
MODULE: Final = "github.com/benthosdev/benthos/v4"

_PROGRAM: Final = GoProgram(
    name="Benthos",
    version=VERSION,
    module=Path(__file__).with_name("benthos_build"),
    package=".",
    takes="about a minute",
    other_way="Set BENTHOS_BIN to a Benthos 4, or put one on PATH",
)


def find_or_build(progress: Callable[[str], None] = to_stderr) -> Path:
    """The path of a Benthos binary, built if there is none; `progress` hears a line now and then.

    Looked for in `BENTHOS_BIN`, on PATH, in the cache folder. Raises EmbeddedError.
    """
    return _PROGRAM.find_or_build(progress)


def version(binary: Path) -> str:
    """What a binary says of itself, such as `4.27.0`."""
    said = subprocess.run((binary, "--version"), capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+\.\d+\.\d+", said)
    return found[0] if found else "unknown"
