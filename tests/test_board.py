"""The board in a real Chromium: whatever is done to it, the page ends as the database is and never goes back.

`BOARD_ROUNDS=20` does every harm that often, and `BOARD_REPORT=FILE` writes how long the page took, as JSON.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.sync_api import Browser, Page, expect
from sqlalchemy.orm import Session

from examples.board.__main__ import create_board, serve
from examples.board.app import Card, advance
from examples.board.harm import HARM, Playground
from tests.support.browser import chromium
from tests.support.waiting import PATIENCE, wait_until

ROUNDS: Final = int(os.environ.get("BOARD_ROUNDS", "1"))
REPORT: Final = os.environ.get("BOARD_REPORT")

# What each list showed, whenever it changed: [list, epoch, key, version].
LOG: Final = """
window.shown = [];
addEventListener('DOMContentLoaded', () => {
  const look = (mutations) => {
    for (const { target } of mutations) {
      const { key, version } = target.dataset;
      const list = target.parentElement?.id;
      if (list) window.shown.push([list, document.getElementById('page').dataset.epoch, key, Number(version)]);
    }
  };
  new MutationObserver(look).observe(document.body, { subtree: true, attributeFilter: ['data-version'] });
});
"""

Rows = dict[str, tuple[int, str]]


@pytest.fixture(scope="module")
def playground() -> Iterator[Playground]:
    with Playground(lambda _text: None) as playground:
        yield playground


@pytest.fixture(scope="module")
def url(playground: Playground) -> Iterator[str]:
    with serve(create_board(playground)) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, url: str, playground: Playground) -> Iterator[Page]:
    """The board, once it shows what the database has. Nothing went wrong in it when the test ends."""
    playground.lively.set()
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.add_init_script(LOG)
    page.goto(url)
    expect(page.locator("#page li")).not_to_have_count(0)
    yield page
    page.close()
    assert errors == []


def database(playground: Playground) -> Rows:
    with Session(playground.engine) as session:
        return {card.id: (card.version, f"{card.title}: {card.status}") for card in session.query(Card)}


def shown(page: Page, list_: str = "page") -> Rows:
    items: list[list[Any]] = page.evaluate(
        "(list) => [...document.getElementById(list).children].map((item) =>"
        " [item.dataset.key, Number(item.dataset.version), item.querySelector('span').textContent])",
        list_,
    )
    return {key: (version, text) for key, version, text in items}


def wait_for_truth(page: Page, playground: Playground) -> float:
    """Let nobody change anything, and return the seconds until the page shows what the database has."""
    playground.lively.clear()
    begun = time.monotonic()
    wait_until(lambda: shown(page) == database(playground) and not is_old(page), "the page shows the truth")
    return time.monotonic() - begun


def is_old(page: Page) -> bool:
    return page.locator("#page").get_attribute("aria-busy") == "true"


def went_back(page: Page, list_: str = "page") -> int:
    """How often a version was shown that is older than one shown before, within an epoch."""
    highest: dict[tuple[str, str], int] = {}
    count = 0
    for where, epoch, key, version in page.evaluate("window.shown"):
        if where == list_:
            count += version < highest.get((epoch, key), 0)
            highest[epoch, key] = max(version, highest.get((epoch, key), 0))
    return count


def freeze(page: Page, playground: Playground) -> None:
    """As a closed laptop: nothing in the tab runs, and its connection goes."""
    session = page.context.new_cdp_session(page)
    session.send("Page.setWebLifecycleState", {"state": "frozen"})
    playground.harm("kill-centrifugo")
    advance(playground.engine, "2")
    session.send("Page.setWebLifecycleState", {"state": "active"})
    session.detach()


def go_offline(page: Page, playground: Playground) -> None:
    page.context.set_offline(True)
    wait_until(lambda: is_old(page), "the page says that it is old")
    advance(playground.engine, "3")
    page.context.set_offline(False)


def press(name: str) -> Callable[[Page, Playground], None]:
    def do(page: Page, _playground: Playground) -> None:
        label = HARM[name].label
        page.get_by_role("button", name=label).click()
        expect(page.locator("#done")).to_have_text(f"{label}: done.", timeout=PATIENCE * 1000)

    return do


HARMS: Final[dict[str, Callable[[Page, Playground], None]]] = {
    **{name: press(name) for name in HARM},
    "freeze": freeze,
    "offline": go_offline,
}


@pytest.mark.parametrize("name", HARMS)
@pytest.mark.timeout(180 + 60 * ROUNDS)
def test_the_page_ends_as_the_database_is(name: str, page: Page, playground: Playground) -> None:
    seconds = []
    for _ in range(ROUNDS):
        HARMS[name](page, playground)
        advance(playground.engine, "1")  # after a restore, nobody would hear of it otherwise
        seconds.append(wait_for_truth(page, playground))
        playground.lively.set()
    assert went_back(page) == 0
    if REPORT:
        with Path(REPORT).open("a") as report:
            report.write(json.dumps({"harm": name, "seconds": seconds}) + "\n")


def test_a_page_without_versions_goes_back(page: Page, playground: Playground) -> None:
    wait_for_truth(page, playground)
    playground.gateway.repeat = 0.5
    try:
        advance(playground.engine, "4")
        wait_until(lambda: shown(page) == database(playground), "the first change arrives")
        playground.gateway.repeat = 0.0
        advance(playground.engine, "4")
        wait_until(lambda: shown(page) == database(playground), "the second change arrives")
        wait_until(lambda: went_back(page, "naive") > 0, "the copy of the first arrives")
    finally:
        playground.gateway.repeat = 0.0
    assert went_back(page) == 0
    assert shown(page) == database(playground) != shown(page, "naive")


def test_the_page_says_that_it_differs(page: Page, playground: Playground) -> None:
    wait_for_truth(page, playground)
    expect(page.get_by_role("status").first).to_have_text("This page shows what the database has.")
    playground.gateway.delay = 2.0
    try:
        page.get_by_role("button", name="Order coffee").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("status").first).to_have_text("1 of 6 cards differ from the database, for 1 s")
    finally:
        playground.gateway.delay = 0.0
    expect(page.get_by_role("status").first).to_have_text("This page shows what the database has.")


def test_nothing_comes_from_elsewhere(browser: Browser, url: str) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    expect(page.locator("#page li")).not_to_have_count(0)
    assert [address for address in asked if not address.startswith((url, "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling on a telephone"
    page.close()
