"""Whether versions rise, as writers promise: watched while events are delivered, without asking the database."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, NamedTuple

from outbox_relay.event import Event

REMEMBERED: Final = 10_000
"""Aggregates whose last version one relay remembers: some 3 MB."""


class Fall(NamedTuple):
    """An event whose version is below that of an earlier one of its aggregate."""

    event: Event
    version_before: int


class Versions:
    """The last version of each of the aggregates that were new to this relay most recently, at most `limit`.

    It may miss a fall: where another relay has delivered the earlier event, or it was forgotten since. It never sees
    one that is none: an event that was sent again has a lower id, and another epoch begins anew.
    """

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit = limit
        self._epoch = ""
        # Gives up its oldest at once, where a dict looks for it among all that it gave up before.
        self._last: OrderedDict[tuple[str, str], tuple[int, int]] = OrderedDict()

    def falls(self, delivered: Iterable[Event]) -> list[Fall]:
        """Take note of delivered events, those of an aggregate in their order, and return those that fell."""
        falls: list[Fall] = []
        last = self._last
        for event in delivered:
            if event.epoch != self._epoch:
                last.clear()
                self._epoch = event.epoch
            aggregate = (event.aggregate_type, event.aggregate_id)
            id_, version = last.get(aggregate, (0, 0))
            if event.id > id_:
                if event.version < version:
                    falls.append(Fall(event, version))
                last[aggregate] = (event.id, event.version)
        while len(last) > self._limit:
            last.popitem(last=False)
        return falls
