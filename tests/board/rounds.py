"""A fault, and what the page made of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from playwright.sync_api import Browser, expect
from sqlalchemy.orm import Session

from examples.board.app import Card, advance
from examples.board.harm import Playground
from tests.board.faults import Board, Fault
from tests.board.watch import SCRIPT, Cards, Watch
from tests.support.waiting import wait_until

NAIVE_SECONDS: Final = 2.0
"""So long the page without versions may go on after the live one is right."""


class Round(NamedTuple):
    """`socket` and `seconds`: from the healing until the live page's WebSocket was back (0: it was never away), and
    from then until the page showed what the database had, and said that it did.

    `backwards` and `naive_backwards`: how often an older version of a card was shown than one before it in its epoch,
    on the live page and on the one without versions. `naive_wrong`: how many cards of that one were wrong in the end.
    """

    socket: float
    seconds: float
    changes: int
    backwards: int
    naive_backwards: int
    naive_wrong: int


@contextmanager
def open_board(browser: Browser, url: str, playground: Playground) -> Iterator[Board]:
    """The board, once it shows cards. Nothing went wrong in it by the end of the block."""
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.add_init_script(SCRIPT)
    page.goto(url)
    expect(page.locator("#page li")).not_to_have_count(0)
    expect(page.locator("#naive li")).not_to_have_count(0)
    yield Board(page, playground, Watch(page))
    page.close()
    assert errors == []


def database(playground: Playground) -> Cards:
    with Session(playground.engine) as session:
        return {card.id: (card.version, f"{card.title}: {card.status}") for card in session.query(Card)}


def play(board: Board, fault: Fault) -> Round:
    """Strike a board that is right, heal it, and wait until it is right again."""
    playground, watch = board.playground, board.watch
    with playground.life:
        board.load_naive()
        truth = database(playground)
        for name in ("page", "naive"):
            wait_until(lambda name=name: watch.shows(name, truth), f"{name} is right before the fault")  # type: ignore[misc]
    changes, backwards = watch.changes.copy(), watch.backwards.copy()
    healed = fault.strike(board)
    with playground.life:
        # After a restore, nobody would hear of it otherwise.
        advance(playground.engine, "1")
        truth = database(playground)
        wait_until(lambda: watch.shows("page", truth), f"the page is right after: {fault.label}")
        right = watch.last["page"].at
        back = min((at for at in watch.opened if healed <= at <= right), default=healed)
        naive_wrong = _wrong_naive(board, truth)
    return Round(
        socket=round(back - healed, 3),
        seconds=round(max(right - back, 0.0), 3),
        changes=watch.changes["page"] - changes["page"],
        backwards=watch.backwards["page"] - backwards["page"],
        naive_backwards=watch.backwards["naive"] - backwards["naive"],
        naive_wrong=naive_wrong,
    )


def _wrong_naive(board: Board, truth: Cards) -> int:
    try:
        wait_until(lambda: board.watch.shows("naive", truth), "the page without versions is right", NAIVE_SECONDS)
    except AssertionError:
        shown = board.watch.last["naive"].cards
        return sum(shown.get(key) != truth.get(key) for key in shown.keys() | truth.keys())
    return 0
