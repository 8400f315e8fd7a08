"""Makes docs/board.png, the board at a moment when the page without versions is wrong, and docs/board.svg, which shows
how that came about. `make picture` runs it.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from examples.board.__main__ import create_board, serve
from examples.board.harm import HARM, Playground
from tests.support.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Page

DOCS: Final = Path(__file__).parent.parent / "docs"
WIDTH: Final = 1000
HEIGHT: Final = 1000
MILLISECONDS: Final = 60_000
BEFORE: Final = 2
FIRST: Final = 2
AFTER: Final = 4
"""Frames before the harm, right after it, and from when the page without versions is wrong."""
EVERY: Final = 700
"""Milliseconds from frame to frame."""
QUALITY: Final = 25

WRONG: Final = (
    "document.querySelectorAll('#naive .wrong').length > 1 && !document.querySelector('#page .wrong')"
    " && document.querySelectorAll('#counters dd')[4].textContent > 0"
)


def main() -> None:
    with Playground(tell) as playground, serve(create_board(playground)) as url, chromium() as browser:
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(url)
        frames = _frames(page, BEFORE)
        page.get_by_role("button", name=HARM["restore"].label).click()
        frames += _frames(page, FIRST)
        page.wait_for_function(WRONG, timeout=MILLISECONDS)
        page.screenshot(path=DOCS / "board.png", full_page=True)
        frames += _frames(page, AFTER)
    (DOCS / "board.svg").write_text(animated(frames, WIDTH, HEIGHT, EVERY / 1000))


def _frames(page: Page, count: int) -> list[bytes]:
    found: list[bytes] = []
    for _ in range(count):
        page.wait_for_timeout(EVERY)
        found.append(page.screenshot(type="jpeg", quality=QUALITY))
    return found


def animated(frames: Sequence[bytes], width: int, height: int, seconds: float) -> str:
    """An SVG that shows each of these JPEG pictures for so many seconds, again and again."""
    whole, share = seconds * len(frames), 100 / len(frames)
    images = "\n".join(
        f'<image width="{width}" height="{height}" style="animation-delay:{n * seconds - whole:.2f}s"'
        f' href="data:image/jpeg;base64,{base64.b64encode(frame).decode()}"/>'
        for n, frame in enumerate(frames)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">\n'
        f"<style>image{{opacity:0;animation:turn {whole:.2f}s step-end infinite}}"
        f"@keyframes turn{{0%{{opacity:1}}{share:.4f}%{{opacity:0}}}}</style>\n"
        f"{images}\n</svg>\n"
    )


def tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
