"""PostgreSQL's own programs, run against a test's database."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from outbox_relay.embedded.postgres import find_binaries


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
