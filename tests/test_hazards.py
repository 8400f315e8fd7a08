"""docs/hazards.md says the truth: every hazard has a test or a stated limit, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "hazards.md"
HAZARDS = 49


def rows() -> dict[int, list[str]]:
    """The table's cells after the number, by number."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if re.match(r"\| \d", line)]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert all(len(row) == 4 for row in cells)
    return {int(number): rest for number, *rest in cells}


def named(cell: str) -> set[str]:
    return set(re.findall(r"`(test_\w+\.py::\w+)`", cell))


def existing() -> set[str]:
    """Every test as `file::function`, as pytest collects it."""
    return {
        f"{path.name}::{node.name}"
        for path in TESTS.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def test_there_is_a_row_for_each_hazard() -> None:
    assert list(rows()) == list(range(1, HAZARDS + 1))


def test_each_hazard_has_a_test_or_a_stated_limit() -> None:
    without = [number for number, (_, done, proof) in rows().items() if not named(proof) and "*Limit:*" not in done]
    assert without == []


def test_each_test_that_is_named_exists() -> None:
    assert set.union(*(named(proof) for *_, proof in rows().values())) - existing() == set()


def test_each_test_of_a_hazard_is_named_in_its_row() -> None:
    own: dict[int, set[str]] = defaultdict(set)
    for test in existing():
        if found := re.search(r"::test_hazard_(\d+)_", test):
            own[int(found[1])].add(test)
    missing = {number: tests - named(rows()[number][2]) for number, tests in own.items()}
    assert {number: tests for number, tests in missing.items() if tests} == {}
