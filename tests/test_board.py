"""The board in a real Chromium: whatever is done to it, the page ends as the database is and never goes back.

`make board-faults` does the same many times, and measures.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from examples.board.__main__ import create_board, serve
from examples.board.app import advance
from examples.board.harm import HARM, Playground
from tests.board import report
from tests.board.faults import FAULTS, Board
from tests.board.rounds import database, open_board, play
from tests.support.browser import chromium
from tests.support.waiting import wait_until


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
def board(browser: Browser, url: str, playground: Playground) -> Iterator[Board]:
    with open_board(browser, url, playground) as board:
        yield board


def test_every_button_is_a_fault() -> None:
    assert HARM.keys() <= FAULTS.keys()


@pytest.mark.parametrize("name", FAULTS)
def test_the_page_ends_as_the_database_is(name: str, board: Board) -> None:
    assert play(board, FAULTS[name]).backwards == 0


def test_a_page_without_versions_goes_back(board: Board) -> None:
    playground, watch = board.playground, board.watch
    with playground.life:
        playground.gateway.repeat = 2.0
        try:
            advance(playground.engine, "4")
            wait_until(lambda: watch.shows("page", database(playground)), "the first change arrives")
            playground.gateway.repeat = 0.0
            advance(playground.engine, "4")
            wait_until(lambda: watch.shows("page", database(playground)), "the second change arrives")
            playground.gateway.wait_repeated()
        finally:
            playground.gateway.repeat = 0.0
        wait_until(lambda: not watch.shows("naive", database(playground)), "the copy of the first arrives")
        assert watch.shows("page", database(playground))
        assert (watch.backwards["naive"], watch.backwards["page"]) == (1, 0)


def test_it_can_be_loaded_anew(board: Board) -> None:
    playground, watch = board.playground, board.watch
    with playground.life:
        playground.harm("restore")
        assert not watch.shows("naive", database(playground))
        board.load_naive()
        wait_until(lambda: watch.shows("naive", database(playground)), "the page without versions is right")


def test_the_page_says_that_it_differs(board: Board) -> None:
    page, playground = board.page, board.playground
    with playground.life:
        wait_until(lambda: board.watch.shows("page", database(playground)), "the page is right")
        expect(page.get_by_role("status").first).to_have_text("This page shows what the database has.")
        playground.gateway.open.clear()
        try:
            page.get_by_role("button", name="Order coffee").focus()
            page.keyboard.press("Enter")
            expect(page.get_by_role("status").first).to_have_text("1 of 6 cards differ from the database, for 1 s")
        finally:
            playground.gateway.open.set()
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


def test_the_document_is_that_of_the_recorded_rounds() -> None:
    """And what is owed holds in it."""
    assert report.DOCUMENT.read_text() == report.document(report.load(report.RAW))
    assert "MISSED" not in report.DOCUMENT.read_text()
