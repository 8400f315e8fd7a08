"""What is said of our dependencies: their licences, and whether a vulnerability of theirs is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import audit, licences

ROOT = Path(__file__).parents[1]


def test_every_licence_is_one_that_somebody_has_said_yes_to() -> None:
    """Of this environment, whichever it is: the oldest dependencies or the newest."""
    ended = subprocess.run(
        [sys.executable, ROOT / "tools" / "licences.py"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "psycopg" in ended.stdout


def test_a_licence_that_nobody_has_read_is_refused() -> None:
    """Also of a package whose other licence is allowed by name; names are compared as registries do."""
    found = [("a", "MIT"), ("b", "GPL-3.0-only"), ("psycopg", "LGPL-3.0-only"), ("c", "LGPL-3.0-only")]
    assert licences.refused(found) == [("b", "GPL-3.0-only"), ("c", "LGPL-3.0-only")]
    assert licences.refused([("psycopg", "Proprietary"), ("d", "none in its metadata")]) != []


KNOWN = {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
NONE_KNOWN = {"name": "b", "version": "1", "vulns": []}
SKIPPED = {"name": "c", "skip_reason": "Dependency not found and could not be audited"}


@pytest.mark.parametrize(
    ("dependencies", "status", "said"),
    [
        ([NONE_KNOWN], audit.OK, ["1 examined"]),
        ([NONE_KNOWN, KNOWN], audit.VULNERABLE, ["a 1: CVE-1, mended in 2", "2 examined"]),
        (
            [NONE_KNOWN, SKIPPED],
            audit.UNREACHABLE,
            ["the database was not reached for 1 of 2: c", "1 examined"],
        ),
        (
            [KNOWN, SKIPPED],
            audit.VULNERABLE,
            ["a 1: CVE-1, mended in 2", "the database was not reached for 1 of 2: c", "1 examined"],
        ),
        ([], audit.UNREACHABLE, ["the database was not reached for 0 of 0: ", "0 examined"]),
    ],
    ids=["none is known", "one is known", "one could not be examined", "both", "nothing to examine"],
)
def test_what_was_not_examined_is_not_sound(dependencies: list[Any], status: int, said: list[str]) -> None:
    """pip-audit itself ends with 0 where it found none of the packages."""
    assert audit.judge(dependencies) == (status, said)
