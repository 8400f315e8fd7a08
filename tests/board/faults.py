"""What is done to the board. Every fault returns once it is healed, with that moment, and fails if it did no harm."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import sqlalchemy as sa
from playwright.sync_api import Page, expect

from examples.board.app import advance
from examples.board.harm import HARM, SECONDS, Playground
from tests.board.watch import Watch
from tests.support.waiting import PATIENCE, wait_until

SUSPECT_SECONDS: Final = 5.0
"""A page loads everything at most that often because it hears of another epoch."""


class Board(NamedTuple):
    """A board in a browser, with what is behind it and who watches it."""

    page: Page
    playground: Playground
    watch: Watch

    def load_naive(self) -> None:
        """Have the page without versions load, which makes it right."""
        self.press("Load it anew")

    def press(self, label: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Press a button and return once what it does is done, whatever else is under way."""
        button = self.page.get_by_role("button", name=label)
        button.click()
        meanwhile()
        expect(button).to_have_attribute("data-how", "done", timeout=PATIENCE * 1000)


class Fault(NamedTuple):
    """`label` says what it is; `strike` does it and returns when it was healed, in seconds of `time.time()`."""

    label: str
    strike: Callable[[Board], float]


def _press(board: Board, name: str, meanwhile: Callable[[], object] = lambda: None) -> float:
    """Press the button of a harm."""
    board.press(HARM[name].label, meanwhile)
    return board.playground.healed


def _delay(board: Board) -> float:
    """The page without versions is loaded anew meanwhile: what is held is older than that."""
    gateway, before = board.playground.gateway, board.playground.gateway.held

    def load_naive() -> None:
        wait_until(lambda: gateway.held > before, "something is held")
        time.sleep(SECONDS - 1)
        board.load_naive()

    return _press(board, "delay", load_naive)


def _repeat(board: Board) -> float:
    before = board.playground.gateway.repeated
    healed = _press(board, "repeat")
    assert board.playground.gateway.repeated > before, "nothing was repeated"
    return healed


def _kill_relays(board: Board) -> float:
    before = {relay.pid for relay in board.playground.stage.relays}
    healed = _press(board, "kill-relay")
    assert not before & {relay.pid for relay in board.playground.stage.relays}, "a relay survived"
    return healed


def _kill_centrifugo(board: Board) -> float:
    before = board.playground.stage.centrifugo.pid
    healed = _press(board, "kill-centrifugo")
    assert board.playground.stage.centrifugo.pid != before, "Centrifugo survived"
    return healed


def _poison(board: Board) -> float:
    before = _dead(board)
    healed = _press(board, "poison")
    assert _dead(board) == before + 1, "the event is not dead"
    return healed


def _dead(board: Board) -> int:
    with board.playground.engine.connect() as connection:
        return int(connection.scalar(sa.text("SELECT count(*) FROM outbox WHERE state = 'dead'")) or 0)


def _recreate(board: Board) -> float:
    return _press(board, "recreate")


def _restore(board: Board) -> float:
    time.sleep(SUSPECT_SECONDS)
    return _press(board, "restore")


def _offline(board: Board) -> float:
    context = board.page.context
    context.set_offline(True)
    wait_until(lambda: board.page.locator("#page").get_attribute("aria-busy") == "true", "the page says that it is old")
    time.sleep(SECONDS)
    context.set_offline(False)
    return time.time()


@contextmanager
def _stopped(board: Board, *kinds: str) -> Iterator[None]:
    """The browser's processes of these kinds, or all of them, do not run inside the block, nor can the page be asked.

    Chromium's own way, `Page.setWebLifecycleState`, freezes nothing where it has no window.
    """
    browser = board.page.context.browser
    assert browser is not None
    session = browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    session.detach()
    pids = [process["id"] for process in processes if not kinds or process["type"] in kinds]
    assert pids, f"no process is a {kinds}"
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: all(_state(pid) == "T" for pid in pids), "they have stopped")
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _state(pid: int) -> str:
    """As the kernel calls it: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _freeze(board: Board) -> float:
    with _stopped(board, "renderer"):
        time.sleep(SECONDS)
        advance(board.playground.engine, "2")
    return time.time()


def _sleep(board: Board) -> float:
    with _stopped(board):
        board.playground.harm("kill-centrifugo")
        advance(board.playground.engine, "2")
    return time.time()


FAULTS: Final[dict[str, Fault]] = {
    "delay": Fault(
        "Centrifugo gets nothing for 5 s, then all of it, also what relays gave up waiting for; the page without "
        "versions is loaded anew meanwhile",
        _delay,
    ),
    "repeat": Fault("everything is published a second time, 5 s later", _repeat),
    "kill-relay": Fault("both relays are killed, and started 1 s later", _kill_relays),
    "kill-centrifugo": Fault("Centrifugo is killed with its memory, and started 1 s later", _kill_centrifugo),
    "poison": Fault("an event that Centrifugo refuses for good, until the relay gives it up", _poison),
    "recreate": Fault("a card is deleted and made anew, twice", _recreate),
    "restore": Fault("the table is put back to what it was at the start, versions too, and the epoch raised", _restore),
    "offline": Fault("the browser's network is cut, for 5 s after the page has noticed", _offline),
    "freeze": Fault("the tab is frozen for 5 s: its process is stopped, its connection stays", _freeze),
    "sleep": Fault(
        "the laptop sleeps: all processes of the browser are stopped, Centrifugo is killed with its memory meanwhile",
        _sleep,
    ),
}
