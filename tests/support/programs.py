"""Programs that tests run: PostgreSQL's own against a test's database, and those that only Debian has."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from outbox_relay.embedded.postgres import find_binaries


def debian_program(name: str, package: str) -> Path:
    """The newest program of this name that a Debian package brought, as `make debian` does.

    Where there is none the test is skipped, and fails where `CI` is `true`.
    """
    servers = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    folders = [*map(str, reversed(servers)), os.environ.get("PATH", os.defpath), "/usr/sbin"]
    if found := shutil.which(name, path=os.pathsep.join(folders)):
        return Path(found)
    message = f"no {name}: make debian, as root (apt install {package})"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def psql(url: str, *arguments: str) -> None:
    """Run psql, which stops at the first error; fail with what it said."""
    _run(["psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", f"--dbname={url}", *arguments])


def schema_dump(url: str, *, without: str = "no_such_table") -> str:
    """Everything that the database defines, as pg_dump writes it; `without` names tables that do not count."""
    dump = _run(["pg_dump", "--schema-only", f"--exclude-table=*.{without}", f"--dbname={url}"])
    # The guard against injection is random in every dump.
    return "\n".join(line for line in dump.splitlines() if not line.startswith(("\\restrict", "\\unrestrict")))


def _run(command: Sequence[str]) -> str:
    program = find_binaries() / command[0]
    ended = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{command[0]}: {ended.stderr}"
    return ended.stdout
