"""Make docs/demo.svg anew: run the demo and draw its last view and the verdict, as they are."""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME

from outbox_relay.demo import view
from outbox_relay.demo.play import Demo, interruptions

SECONDS = 20.0
WIDTH = 96
PICTURE = Path(__file__).parents[1] / "docs" / "demo.svg"


def main() -> int:
    with Demo(Console(stderr=True)) as demo, interruptions() as interrupted:
        demo.play(SECONDS, interrupted)
        verdict = demo.finish(interrupted)
        paper = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
        paper.print(demo.frame())
        paper.print(view.verdict(verdict, demo.summary()))
    picture = paper.export_svg(title="make demo", theme=SVG_EXPORT_THEME, unique_id="demo")
    # Rich names web fonts on a foreign host; whoever shows the picture should ask nobody.
    picture = re.sub(r"\s*(@font-face\s*{[^}]*}|<!--.*?-->)", "", picture)
    PICTURE.write_text(picture, encoding="utf-8")
    return 0 if all(clause.holds for clause in verdict) else 1


if __name__ == "__main__":
    sys.exit(main())
