"""The client helper for JavaScript: its own tests, run by Node.js, its types, and its size."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tests.support.node import CLIENT, install, run_node

ROOT = Path(__file__).parent.parent

LIMIT = 4096
"""Bytes, minified and compressed, without `centrifuge`."""


@pytest.mark.parametrize("suite", ["vectors", "property"])
def test_suite(suite: str) -> None:
    said = run_node("--test", "--test-reporter=tap", f"test/{suite}.test.js")
    assert "\n# pass 0\n" not in said
    assert "\n# fail 0\n" in said


def test_types() -> None:
    run_node("node_modules/typescript/bin/tsc", "--project", ".")


def test_the_example_has_the_centrifuge_of_the_lock_file() -> None:
    install()
    released = (CLIENT / "node_modules" / "centrifuge" / "dist" / "centrifuge.js").read_text()
    code, _, map_ = released.partition("//# sourceMappingURL=")
    assert map_.strip() == "centrifuge.js.map"
    assert (ROOT / "examples" / "board" / "static" / "centrifuge.js").read_text() == code


def test_size(tmp_path: Path) -> None:
    run_node("build.js", "index.js", tmp_path / "client.js")
    assert len(gzip.compress((tmp_path / "client.js").read_bytes(), 9)) <= LIMIT
