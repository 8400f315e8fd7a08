"""Makes docs/board.png: the board, at a moment when the page without versions is wrong. `make picture` runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from examples.board.__main__ import create_board, serve
from examples.board.harm import HARM, Playground
from tests.support.browser import chromium

TARGET: Final = Path(__file__).parent.parent / "docs" / "board.png"
MILLISECONDS: Final = 60_000


def main() -> None:
    with Playground(tell) as playground, serve(create_board(playground)) as url, chromium() as browser:
        page = browser.new_page(viewport={"width": 1000, "height": 1000}, color_scheme="light")
        page.goto(url)
        page.get_by_role("button", name=HARM["restore"].label).click()
        page.wait_for_function(
            "document.querySelectorAll('#naive .wrong').length > 1 && !document.querySelector('#page .wrong')"
            " && document.querySelectorAll('#counters dd')[4].textContent > 0",
            timeout=MILLISECONDS,
        )
        page.screenshot(path=TARGET, full_page=True)


def tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
