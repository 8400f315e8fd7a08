"""What a board showed, and when: every change of its DOM, and every WebSocket that it opened."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final, NamedTuple

from playwright.sync_api import Page

# What a list shows after each task that changed it. Nothing is drawn within a task, so nobody saw anything else.
SCRIPT: Final = """
window.log = { states: [], opened: [] };
window.WebSocket = class extends WebSocket {
  constructor(url, ...rest) {
    super(url, ...rest);
    this.addEventListener('open', () => window.log.opened.push([Date.now(), String(url)]));
  }
};
addEventListener('DOMContentLoaded', () => {
  const card = (item) => [
    item.dataset.key, item.dataset.epoch, Number(item.dataset.version), item.querySelector('span').textContent,
    item.classList.contains('old'),
  ];
  for (const name of ['page', 'naive']) {
    const list = document.getElementById(name);
    let last;
    new MutationObserver(() => {
      const state = [name, list.ariaBusy === 'true', [...list.children].map(card)];
      if (JSON.stringify(state) === last) return;
      last = JSON.stringify(state);
      window.log.states.push([Date.now(), ...state]);
    }).observe(list, { subtree: true, childList: true, characterData: true, attributes: true });
  }
});
"""

Cards = dict[str, tuple[int, str]]
"""Key -> version, and what is said of the card."""


class State(NamedTuple):
    """What a list showed from `at` on, in seconds of `time.time()`; `old` if it said of anything that it may be."""

    at: float
    cards: Cards
    old: bool


class Watch:
    """Reads the log of a board that has had `SCRIPT` from the start. Lists are called `page` and `naive`.

    `last` is what each list showed last, `changes` how often it changed, and `backwards` how often a card was shown
    with an older version than one that was shown before in the same epoch. `opened` are the times at which the live
    page's WebSocket opened.
    """

    def __init__(self, page: Page) -> None:
        self.last: dict[str, State] = {}
        self.changes: Counter[str] = Counter()
        self.backwards: Counter[str] = Counter()
        self.opened: list[float] = []
        self._page = page
        self._newest: dict[tuple[str, str, str], int] = {}
        self._shown: dict[str, dict[str, tuple[str, int]]] = {"page": {}, "naive": {}}

    def read(self) -> None:
        """Take what was logged since the last time."""
        log: dict[str, list[Any]] = self._page.evaluate(
            "() => { const log = window.log; window.log = { states: [], opened: [] }; return log; }"
        )
        for milliseconds, name, busy, cards in log["states"]:
            shown = {key: (version, text) for key, _, version, text, _ in cards}
            old = busy or any(is_old for *_, is_old in cards)
            self.last[name] = State(milliseconds / 1000, shown, old)
            self.changes[name] += 1
            versions = {key: (epoch, version) for key, epoch, version, _, _ in cards}
            for key, (epoch, version) in versions.items():
                newest = self._newest.get((name, key, epoch), 0)
                # Counted when it is shown, not for as long as it is.
                self.backwards[name] += version < newest and self._shown[name].get(key) != (epoch, version)
                self._newest[name, key, epoch] = max(version, newest)
            self._shown[name] = versions
        self.opened += [milliseconds / 1000 for milliseconds, url in log["opened"] if not url.endswith("?naive")]

    def shows(self, name: str, cards: Cards) -> bool:
        """Whether a list shows these cards, and does not say that it may be old."""
        self.read()
        return name in self.last and self.last[name].cards == cards and not self.last[name].old
