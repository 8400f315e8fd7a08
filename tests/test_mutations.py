"""What a mutation run changes, and how its page is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.mutants import TESTS
from tools.mutants_report import PAGE, READ, report
from tools.mutations import mutants

ROOT = Path(__file__).parents[1]

CHANGES = {
    "a < b": ["(a <= b)", "(a >= b)"],
    "a is None": ["(a is not None)"],
    "a and not b": ["(a or not b)", "(not a) and not b", "a and b"],
    "f(1)": ["f(0)", "f(2)", "pass"],
    "n = 600": ["n = 0"],
    "a -= b": ["a += b", "pass"],
    "min(a, b)": ["max(a, b)", "pass"],
    "key = 'word'": ["key = ''"],
    "key = f'{a}:{b}'": ["key = f'{a}{b}'"],
    "x.y = z": ["pass"],
    "if f(): raise Bad": ["if (not f()): raise Bad", "if f(): pass"],
    "q = 'WHERE a <= 1 AND b LIMIT 1'": [
        "q = 'WHERE a < 1 AND b LIMIT 1'",
        "q = 'WHERE a <= 1 AND b OFFSET 1'",
        "q = 'WHERE a <= 1 OR b LIMIT 1'",
        "q = 'WHERE a <= 2 AND b LIMIT 1'",
        "q = 'WHERE a > 1 AND b LIMIT 1'",
    ],
    "log.info('said', n=1)": [],
    "text = 'words for people'": [],
    "text = f'{n} words'": [],
    "assert a < b": [],
    "def f(a: int) -> int: 'A docstring.'": [],
    "@d(1)\ndef f(): ...": [],
}


@pytest.mark.parametrize("source", CHANGES)
def test_what_is_changed(source: str) -> None:
    assert sorted(mutant.applied(source) for mutant in mutants(source)) == CHANGES[source]


def test_a_change_is_told_as_the_lines_that_differ() -> None:
    source = "def f(ü):\n    if ü:\n        return g(ü)\n    return h(ü)\n"
    told = [(mutant.scope, mutant.line, mutant.diff(source)) for mutant in mutants(source)]
    assert told == [
        ("f", 2, "-    if ü:\n+    if (not ü):"),
        ("f", 3, "-        return g(ü)\n+        return None"),
        ("f", 4, "-    return h(ü)\n+    return None"),
    ]


def test_every_module_has_changes_and_tests() -> None:
    for module, tests in TESTS.items():
        assert len(mutants((ROOT / "outbox_relay" / f"{module}.py").read_text())) > 10
        assert [name for name in tests.split() if not (ROOT / "tests" / f"test_{name}.py").exists()] == []


def test_the_page_says_what_survived_and_why(tmp_path: Path) -> None:
    """What nobody has read is open; a reason for what did not survive is an error, not one for what was not tried."""
    survivors = [{"line": n, "fate": "survived", "diff": f"-    a = {n}\n+    a = 0"} for n in (1, 2)]
    run = {
        "module": "pace",
        "source": "abc",
        "seed": 7,
        "of": 9,
        "results": [*survivors, {"fate": "killed", "diff": "- b\n+ c"}, {"fate": "timeout", "diff": "- d\n+ e"}],
    }
    source = "def pace(x):\n    x = 1\n    return x\n"
    (tmp_path / "outbox_relay").mkdir()
    (tmp_path / "outbox_relay" / "pace.py").write_text(source)
    (tmp_path / READ).parent.mkdir(parents=True)
    reason = '[[read]]\nmodule = "pace"\ndiff = """\n- a = 1\n+ a = 0\n"""\nverdict = "cost"\nwhy = "Dear."\n'
    (tmp_path / READ).write_text(reason)
    report(tmp_path, [json.loads(json.dumps(run))], ["pace"])
    page = (tmp_path / PAGE).read_text()
    assert "| `pace.py` | 9 | 4 | 1 | 1 | 2 | 0 | 1 | 1 | 7 | `abc` |" in page
    assert "50.0% of those tried survived; 1 of them are open." in page
    assert "Line 1, cost:" in page
    assert "Dear." in page
    assert "Line 2, open:" in page
    untried, tried = mutants(source)[:2]
    (tmp_path / READ).write_text(reason + reason.replace("- a = 1\n+ a = 0", untried.diff(source)))
    report(tmp_path, [run | {"results": [*survivors, {"fate": "killed", "diff": tried.diff(source)}]}], ["pace"])
    for results in ([], [*survivors, {"fate": "killed", "diff": untried.diff(source)}]):
        with pytest.raises(ValueError, match="did not survive"):
            report(tmp_path, [run | {"results": results}], ["pace"])
