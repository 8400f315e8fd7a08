"""What the demo looks like in a terminal, and as plain lines where there is none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from outbox_relay.demo.ledger import Tally, percentile
from outbox_relay.demo.screen import LAST, Arrival
from outbox_relay.demo.verdict import Clause

STORY = 8


class Part(NamedTuple):
    """A process of the demo, or its connection, and how it is."""

    name: str
    state: str
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
    arrivals: Sequence[tuple[Arrival, float | None]]


def frame(moment: Moment) -> RenderableType:
    """The whole view."""
    top = Table.grid(expand=True, padding=(0, 1))
    top.add_column(ratio=1)
    top.add_column(ratio=1)
    top.add_row(
        _panel("events", _pairs(_numbers(moment)), 8),
        _panel("processes", _pairs(map(_part, moment.parts)), 8),
    )
    top.add_row(
        _panel("what happened", _story(moment.story[-STORY:]), STORY),
        _panel("last arrivals", _arrivals(moment.arrivals), STORY),
    )
    title = Text.assemble(
        ("outbox-relay demo", "bold"), f"   PostgreSQL → 2 relays → Centrifugo → screen   {moment.seconds:.0f} s"
    )
    return Group(title, top)


def line(moment: Moment) -> str:
    """The same in one line of plain text."""
    return ", ".join(f"{name} {value}" for name, value in _numbers(moment))


def verdict(clauses: Sequence[Clause], summary: str) -> Text:
    """The clauses, one a line, and the last line: whether all of them are true."""
    text = Text()
    for clause in clauses:
        text.append("✓ " if clause.holds else "✗ ", "bold green" if clause.holds else "bold red")
        text.append(clause.claim)
        if not clause.holds:
            text.append(f": {clause.but}", "bold red")
        text.append("\n")
    if wrong := [f"{clause.claim}: {clause.but}" for clause in clauses if not clause.holds]:
        return text.append(f"verdict: NOT true that {'; nor that '.join(wrong)} ({summary})", "bold red")
    return text.append("verdict: true", "bold green").append(f" ({summary})")


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
        ("duplicates", f"{tally.duplicates:,}"),
        ("lag p50", milliseconds(percentile(tally.lags, 50))),
        ("lag p99", milliseconds(percentile(tally.lags, 99))),
    ]


def _part(part: Part) -> tuple[str, Text]:
    return part.name, Text.assemble(("● ", "green" if part.well else "red"), part.state)


def _pairs(rows: Iterable[tuple[str, RenderableType]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _story(lines: Iterable[tuple[float, str]]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", justify="right", no_wrap=True)
    table.add_column()
    for seconds, text in lines:
        table.add_row(f"{seconds:.1f} s", Text(text, overflow="ellipsis", no_wrap=True))
    return table


def _arrivals(arrivals: Iterable[tuple[Arrival, float | None]]) -> Table:
    table = Table.grid(padding=(0, 1))
    for arrival, lag in list(arrivals)[-LAST:]:
        table.add_row(
            f"order {arrival.order}",
            f"v{arrival.row.version}",
            arrival.row.status,
            Text(milliseconds(lag) if arrival.news else "not newer, not shown", "dim" if arrival.news else "yellow"),
        )
    return table


def _panel(title: str, content: RenderableType, height: int) -> Panel:
    return Panel(content, title=title, title_align="left", box=box.ROUNDED, border_style="dim", height=height + 2)
