"""`python -m tests.board`: every fault, many times, in a real Chromium. Exit code 1: a figure is missed."""

from __future__ import annotations

import argparse
import sys
import time

from examples.board.__main__ import create_board, serve
from examples.board.harm import Playground
from tests.board import report
from tests.board.faults import FAULTS
from tests.board.rounds import Round, open_board, play
from tests.support.browser import chromium


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.board", description=__doc__)
    arguments.add_argument("--rounds", type=int, default=report.LEAST_ROUNDS, help="of every fault")
    arguments.add_argument("--fault", choices=FAULTS, help="this one alone; nothing is saved")
    chosen = arguments.parse_args()
    names = [chosen.fault] if chosen.fault else list(FAULTS)
    facts = report.facts()
    rounds: dict[str, list[Round]] = {}
    with Playground(lambda _text: None) as playground, serve(create_board(playground)) as url, chromium() as browser:
        for name in names:
            begun = time.monotonic()
            with open_board(browser, url, playground) as board:
                rounds[name] = [play(board, FAULTS[name]) for _ in range(chosen.rounds)]
            print(f"{name:16} {time.monotonic() - begun:4.0f} s  {_said(rounds[name])}", flush=True)
    if not chosen.fault:
        report.save(facts, rounds)
        report.DOCUMENT.write_text(report.document(report.load()))
    every = [each for some in rounds.values() for each in some]
    return int(any(each.backwards or each.seconds > report.MOST_SECONDS for each in every))


def _said(rounds: list[Round]) -> str:
    slowest = " ".join(f"{seconds:.2f}" for seconds in sorted((each.seconds for each in rounds), reverse=True)[:3])
    return (
        f"slowest {slowest} s, backwards {sum(each.backwards for each in rounds)}; without versions backwards"
        f" {sum(each.naive_backwards for each in rounds)}, wrong {sum(bool(each.naive_wrong) for each in rounds)}"
    )


if __name__ == "__main__":
    sys.exit(main())
