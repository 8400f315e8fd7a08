"""The demo: its verdict clause by clause, its screen's rule, its schedule; and the whole of it as a process."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from outbox_relay.demo.ledger import Ledger, percentile
from outbox_relay.demo.screen import Screen
from outbox_relay.demo.stage import harm
from outbox_relay.demo.verdict import Facts, OutboxRow, Row, judge
from tests.support.waiting import wait_until

PAID, SHIPPED = Row(1, "paid"), Row(2, "shipped")
TRUE = Facts(
    committed=["a", "b", "c"],
    outbox={
        "a": OutboxRow("1", 1, "delivered"),
        "b": OutboxRow("1", 2, "delivered"),
        "c": OutboxRow("2", 1, "delivered"),
    },
    database={"1": SHIPPED, "2": PAID},
    screen={"1": SHIPPED, "2": PAID},
    received={"a": 1, "b": 2, "c": 1},
)
DEMO_SECONDS = 100


def false_claims(facts: Facts) -> list[tuple[str, str]]:
    return [(clause.claim, clause.but) for clause in judge(facts) if not clause.holds]


def test_a_true_verdict_counts_duplicates_and_minds_none() -> None:
    assert false_claims(TRUE) == []
    assert TRUE.duplicates == 1


@pytest.mark.parametrize(
    ("change", "claim", "but"),
    [
        ({"screen": {"1": PAID, "2": PAID}}, "equals the database", "1 order differs"),
        ({"screen": {"1": Row(2, "paid"), "2": PAID}}, "equals the database", "1 order differs"),
        ({"screen": {"1": SHIPPED}}, "equals the database", "1 order differs"),
        ({"screen": {"1": SHIPPED, "2": PAID, "3": PAID, "4": PAID}}, "equals the database", "2 orders differ"),
        ({"database": {}, "screen": {}}, "equals the database", "there is no order"),
        ({"backwards": 2}, "backwards", "2 steps backwards"),
        ({"received": {"a": 1, "b": 1, "c": 1, "ghost": 1}}, "rolled-back", "1 such event"),
        ({"outbox": {**TRUE.outbox, "c": OutboxRow("2", 1, "pending")}}, "delivered", "1 event not delivered"),
        ({"outbox": {**TRUE.outbox, "c": OutboxRow("2", 1, "dead")}}, "delivered", "1 event not delivered"),
        ({"committed": ["a", "b", "c", "d"]}, "delivered", "1 event not delivered"),
        ({"received": {"a": 1, "b": 1}}, "arrived", "1 event is missing"),
        ({"received": {"a": 1, "c": 1}, "reloaded": {"1": 1}}, "arrived", "1 event is missing"),
        ({"troubles": ["relay A ended by itself"]}, "on purpose", "relay A ended by itself"),
    ],
)
def test_each_clause_can_be_false_alone(change: dict[str, Any], claim: str, but: str) -> None:
    [(said, why)] = false_claims(replace(TRUE, **change))
    assert claim in said
    assert why == but


def test_an_event_that_nobody_committed_is_false_twice_once_it_arrives() -> None:
    facts = replace(
        TRUE, outbox={**TRUE.outbox, "d": OutboxRow("2", 2, "delivered")}, received={**TRUE.received, "d": 1}
    )
    assert [why for _, why in false_claims(facts)] == ["1 such event", "1 event nobody committed"]


def test_what_a_reload_brought_is_not_missing() -> None:
    assert false_claims(replace(TRUE, received={"b": 1, "c": 1}, reloaded={"1": 1})) == []


def test_the_screen_shows_only_what_is_newer() -> None:
    screen = Screen()
    for row in (SHIPPED, PAID, SHIPPED):
        screen.receive("1", row)
    assert screen.rows == {"1": SHIPPED}
    assert [arrival.news for arrival in screen.last] == [True, False, False]
    assert screen.backwards == 0


def test_a_step_backwards_is_counted_whatever_let_it_through() -> None:
    screen = Screen()
    screen.receive("1", SHIPPED)
    screen.reload({"1": PAID})
    assert screen.backwards == 1


@pytest.mark.parametrize("seconds", [1.0, 8.0, 20.0, 50.0, 70.0])
def test_a_run_of_any_length_has_all_the_harm_in_it_in_order(seconds: float) -> None:
    times = [step.at for step in harm(seconds)]
    assert len(times) == 4 * max(1, round(seconds / 20))
    assert times == sorted(times)
    assert times[-1] < 0.95 * seconds


def test_the_ledger_measures_what_came_by_publication_and_what_by_reload() -> None:
    ledger = Ledger()
    ledger.commit("a", "1", 1)
    ledger.commit("b", "1", 2)
    ledger.commit("c", "1", 3)
    assert ledger.receive("a") is not None
    assert ledger.receive("a") is None
    ledger.reload({"1": 2})
    assert ledger.receive("early") is None
    ledger.commit("early", "1", 4)
    tally = ledger.tally()
    assert (tally.committed, tally.received, tally.reloaded, tally.duplicates) == (4, 3, 1, 1)
    assert len(tally.lags) == 3  # all but "c", which nobody has seen
    assert tally.lags[-1] == 0.0


def test_percentiles() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(n) for n in range(101)], 99) == 99.0


# The whole demo, as a process


def test_it_survives_the_harm_and_says_so() -> None:
    demo = subprocess.run(
        [sys.executable, "-m", "outbox_relay", "demo", "--seconds", "7"],
        capture_output=True,
        text=True,
        timeout=DEMO_SECONDS,
        check=False,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    lines = demo.stdout.splitlines()
    assert lines[-1] == "verdict: all of this is true", demo.stdout
    assert "killed: relay 1, Centrifugo 1" in lines[-2]
    for happened in ("relay A: SIGKILL", "relay A: started again", "Centrifugo: SIGKILL", "reloaded from the database"):
        assert happened in demo.stdout


def test_in_a_terminal_it_is_live_until_ctrl_c() -> None:
    with terminal_demo() as (demo, screen):
        screen.wait_for("last arrivals")
        screen.wait_for("SIGKILL")
        demo.send_signal(signal.SIGINT)
        assert demo.wait(DEMO_SECONDS) == 0, screen.text
        screen.wait_for("verdict: all of this is true")


def test_kill_9_leaves_nothing_running() -> None:
    with terminal_demo() as (demo, screen):
        screen.wait_for("the application writes")
        processes = {int(pid) for pid in re.findall(r"process (\d+)", screen.text)}
        assert len(processes) == 4, screen.text
        demo.kill()
        wait_until(lambda: not any(map(running, processes)), "all processes of the demo end")


def test_the_board_is_served_beside_the_demo(tmp_path: Path) -> None:
    """What `make demo` runs: the demo's status and last line, and a page for as long; nothing is left of either."""
    output = tmp_path / "output"
    with output.open("wb") as written:
        demo = subprocess.Popen(
            [sys.executable, "-m", "examples.demo", "--seconds", "5"],
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
        )
    try:
        wait_until(lambda: "the board" in output.read_text() or demo.poll() is not None, "its address", DEMO_SECONDS)
        [url] = re.findall(r"^the board, .*: (http://127\.0\.0\.1:\d+)$", output.read_text(), re.MULTILINE)
        page = httpx.get(url, trust_env=False)
        assert "<title>" in page.text
        assert httpx.get(f"{url}/cards", trust_env=False).json()["epoch"]
        assert demo.wait(DEMO_SECONDS) == 0, output.read_text()
    finally:
        demo.kill()
        demo.wait()
    assert output.read_text().splitlines()[-1] == "verdict: all of this is true"
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_kill_9_ends_the_board_as_well(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with output.open("wb") as written:
        demo = subprocess.Popen([sys.executable, "-m", "examples.demo"], stdout=written, stderr=written)
    try:
        wait_until(lambda: "the board" in output.read_text() or demo.poll() is not None, "its address", DEMO_SECONDS)
    finally:
        demo.kill()
        demo.wait()
    [port] = re.findall(r"^the board, .*:(\d+)$", output.read_text(), re.MULTILINE)

    def refused() -> bool:
        with socket.socket() as caller:
            return caller.connect_ex(("127.0.0.1", int(port))) != 0

    wait_until(refused, "the board ends")


class Terminal:
    """Everything that was written to a pseudo-terminal so far; `ended` once nobody has its other end open."""

    def __init__(self, descriptor: int) -> None:
        self.text = ""
        self.ended = False
        self._descriptor = descriptor
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._descriptor, 65536):
                self.text += data.decode(errors="replace")
        except OSError:
            pass  # how Linux says that nobody has the other end open any more
        self.ended = True

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.text or self.ended, text, DEMO_SECONDS)
        assert text in self.text

    def close(self) -> None:
        self._thread.join()
        os.close(self._descriptor)


@contextmanager
def terminal_demo() -> Iterator[tuple[subprocess.Popen[bytes], Terminal]]:
    """The demo in a terminal of its own; killed at the end if it still runs."""
    ours, theirs = pty.openpty()
    demo = subprocess.Popen(
        [sys.executable, "-m", "outbox_relay", "demo"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"},
    )
    os.close(theirs)
    terminal = Terminal(ours)
    try:
        yield demo, terminal
    finally:
        demo.kill()
        demo.wait()
        terminal.close()


def running(pid: int) -> bool:
    """Whether the process runs; a dead one that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second where it is reaped between open and read
        return False
