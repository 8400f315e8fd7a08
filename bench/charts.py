"""Bar charts as small SVG files, written by hand: text stays text, and no font or script comes from elsewhere.

A chart paints its own background, so that it can be read on a page of any colour; it follows the reader's choice of
light or dark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

_STYLE: Final = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.paper { fill: #ffffff } .title { font-size: 15px; font-weight: 600 } .panel { font-weight: 600 }
.ours { fill: #0969da } .theirs { fill: #8c959f } .spread { stroke: #24292f; fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .paper { fill: #0d1117 } .ours { fill: #4493f8 } .theirs { fill: #6e7681 }
  .spread { stroke: #e6edf3 }
}
"""

# Pixels.
_MARGIN: Final = 16
_CHARACTER: Final = 6.7
_TRACK: Final = 400
_VALUE: Final = 130
_LINE: Final = 22
_BAR: Final = 14
_HEAD: Final = 52


class Bar(NamedTuple):
    """A median, and how far apart the repetitions were."""

    label: str
    value: float
    low: float
    high: float
    ours: bool


class Panel(NamedTuple):
    """Bars that were measured together. Panels of one unit share their scale."""

    title: str
    unit: str
    bars: Sequence[Bar]


def number(value: float) -> str:
    """Three significant digits, or all of the whole part, thousands apart."""
    rounded = float(f"{value:.3g}")
    return f"{value:,.0f}" if rounded == 0 or abs(rounded) >= 100 else f"{rounded:#.3g}"


def svg(title: str, panels: Sequence[Panel]) -> str:
    """The text of an SVG file: horizontal bars from zero, the value beside each, and its spread as a line."""
    labels = max((len(bar.label) for panel in panels for bar in panel.bars), default=0) * _CHARACTER
    width = round(2 * _MARGIN + labels + 10 + _TRACK + _VALUE)
    height = _HEAD + sum((len(panel.bars) + 2) * _LINE for panel in panels) - _LINE
    tops: dict[str, float] = {}
    for panel in panels:
        tops[panel.unit] = max([tops.get(panel.unit, 0.0), *(bar.high for bar in panel.bars)])
    body: list[str] = []
    y = _HEAD
    for panel in panels:
        body.append(f'<text class="panel" x="{_MARGIN}" y="{y}">{escape(_heading(panel))}</text>')
        for bar in panel.bars:
            y += _LINE
            body += _bar(bar, y, _MARGIN + labels + 10, _TRACK / (tops[panel.unit] or 1.0))
        y += 2 * _LINE
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"',
            f' width="{width}" height="{height}" aria-labelledby="title desc">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(" ".join(_words(panels)))}</desc>',
            f"<style>{_STYLE}</style>",
            f'<rect class="paper" width="{width}" height="{height}" rx="6"/>',
            f'<text class="title" x="{_MARGIN}" y="26">{escape(title)}</text>',
            *body,
            "</svg>\n",
        )
    )


def _bar(bar: Bar, y: float, left: float, scale: float) -> Iterator[str]:
    """`y` is the baseline of the label."""
    middle = y - 4
    yield f'<text x="{left - 10:.0f}" y="{y:.0f}" text-anchor="end">{escape(bar.label)}</text>'
    yield (
        f'<rect class="{"ours" if bar.ours else "theirs"}" x="{left:.1f}" y="{middle - _BAR / 2:.1f}"'
        f' width="{max(1.0, bar.value * scale):.1f}" height="{_BAR}" rx="2"/>'
    )
    low, high = left + bar.low * scale, left + bar.high * scale
    yield f'<path class="spread" d="M{low:.1f} {middle:.1f}H{high:.1f}"/>'
    yield f'<text x="{max(high, left + 1) + 8:.0f}" y="{y:.0f}">{number(bar.value)}</text>'


def _words(panels: Sequence[Panel]) -> Iterator[str]:
    """The chart for those who do not see it."""
    for panel in panels:
        bars = "; ".join(f"{bar.label} {number(bar.value)}" for bar in panel.bars)
        yield f"{_heading(panel)}: {bars}."


def _heading(panel: Panel) -> str:
    return f"{panel.title}, {panel.unit}" if panel.title else panel.unit
