"""Tables of the documentation, as parameters of the tests that keep them true."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"

Row = dict[str, str]


def table(document: str, heading: str) -> list[Row]:
    """The rows of the first table under a heading of a Markdown file in docs: cells by column, without backticks."""
    text = (DOCS / document).read_text(encoding="utf-8")
    _, found, section = f"\n{text}".partition(f"\n## {heading}\n")
    assert found, f"{document} has no heading {heading!r}"
    lines = section.partition("\n## ")[0].partition("\n|")[2].partition("\n\n")[0].splitlines()
    columns, _, *rows = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]
    assert rows, f"{document} has no table under {heading!r}"
    assert all(len(row) == len(columns) for row in rows), f"{document}: a row under {heading!r} has too few cells"
    return [dict(zip(columns, row, strict=True)) for row in rows]


def split(rows: list[Row], column: str) -> list[Row]:
    """The same rows with one value each in a column that lists several, by commas."""
    return [row | {column: value} for row in rows for value in row[column].split(", ")]
