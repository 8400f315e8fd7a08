"""What the demo looks like in a terminal, and as plain lines where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from outbox_relay.demo.ledger import Tally, percentile
from outbox_relay.demo.screen import Arrival
from outbox_relay.demo.verdict import Clause

ROWS: Final = 9
"""Lines in each panel."""


class Part(NamedTuple):
    """A process of the demo, or a connection."""

    name: str
    well: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Everything that is shown at one moment. `story` are lines with their time in seconds."""

    seconds: float
    tally: Tally
    pending: int
    delivered: int
    parts: Sequence[Part]
    story: Sequence[tuple[float, str]]
    arrivals: Sequence[Arrival]


def frame(moment: Moment) -> RenderableType:
    """The whole view."""
    title = Text.assemble(("outbox-relay demo", "bold"), f"   {moment.seconds:.0f} s")
    for part in moment.parts:
        title.append("  ● ", "green" if part.well else "red")
        title.append(part.name, "" if part.well else "red")
    columns = Table.grid(expand=True, padding=(0, 1, 0, 0))
    columns.add_column(ratio=2)
    columns.add_column(ratio=3)
    columns.add_row(_panel("events", _totals(moment)), _panel("last arrivals", _arrivals(moment.arrivals)))
    return Group(title, columns, _panel("what happened", _story(moment.story)))


def line(moment: Moment) -> str:
    """The numbers in one line of plain text."""
    return ", ".join(f"{name} {value}" for name, value in _numbers(moment))


def verdict(clauses: Sequence[Clause], summary: str) -> Text:
    """The clauses, one a line, the summary, and in the last line whether all of them are true."""
    text = Text()
    for clause in clauses:
        text.append("✓ " if clause.holds else "✗ ", "bold green" if clause.holds else "bold red")
        text.append(clause.claim)
        if not clause.holds:
            text.append(f": {clause.but}", "bold red")
        text.append("\n")
    text.append(f"{summary}\n")
    if wrong := [f"{clause.claim}: {clause.but}" for clause in clauses if not clause.holds]:
        return text.append(f"verdict: NOT true that {'; nor that '.join(wrong)}", "bold red")
    return text.append("verdict: all of this is true", "bold green")


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:,.1f} ms"


def _numbers(moment: Moment) -> list[tuple[str, str]]:
    tally = moment.tally
    return [
        ("committed", f"{tally.committed:,}"),
        ("rolled back", f"{tally.rolled_back:,}"),
        ("pending", f"{moment.pending:,}"),
        ("delivered", f"{moment.delivered:,}"),
        ("received", f"{tally.received:,}"),
        ("reloaded", f"{tally.reloaded:,}"),
        ("duplicates", f"{tally.duplicates:,}"),
        ("lag p50", milliseconds(percentile(tally.lags, 50))),
        ("lag p99", milliseconds(percentile(tally.lags, 99))),
    ]


def _totals(moment: Moment) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for row in _numbers(moment):
        table.add_row(*row)
    return table


def _arrivals(arrivals: Sequence[Arrival]) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for arrival in arrivals[-ROWS:]:
        last = Text(milliseconds(arrival.lag)) if arrival.news else Text("not newer", "yellow")
        table.add_row(f"order {arrival.order}", f"v{arrival.row.version}", arrival.row.status, last)
    return table


def _story(lines: Sequence[tuple[float, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for seconds, text in lines[-ROWS:]:
        table.add_row(f"{seconds:.1f} s", Text(text, "bold" if "SIGKILL" in text else ""))
    return table


def _panel(title: str, content: RenderableType) -> Panel:
    return Panel(
        content, title=title, title_align="left", box=box.ROUNDED, border_style="bright_black", height=ROWS + 2
    )
