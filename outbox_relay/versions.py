"""Whether versions rise, as writers promise: watched while events are delivered, without asking the database."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Final, NamedTuple

from outbox_relay.event import Event

SLOTS: Final = 2**15
"""Aggregates whose last version one relay remembers, at most: 24 bytes each."""


class Fall(NamedTuple):
    """An event whose version is below that of an earlier one of its aggregate."""

    event: Event
    version_before: int


class Versions:
    """The last version of each aggregate, until another one that falls into the same one of `slots` is delivered.

    It may miss a fall: where another relay has delivered the earlier event, or it was forgotten since. It never sees
    one that is none: an event that was sent again has a lower id, and another epoch begins anew. Aggregates are told
    apart by 64 bits of hash.
    """

    def __init__(self, slots: int = SLOTS) -> None:
        self._slots = slots
        self._begin("")

    def _begin(self, epoch: str) -> None:
        self._epoch = epoch
        # By slot: the aggregate's hash, its last event's id, its version. In one piece, because between two batches the
        # servers have the processor's cache: a dict's keys and values are objects that are fetched one by one.
        self._last = array("q", bytes(24 * self._slots))

    def falls(self, delivered: Iterable[Event]) -> list[Fall]:
        """Take note of delivered events, those of an aggregate in their order, and return those that fell."""
        falls: list[Fall] = []
        for event in delivered:
            if event.epoch != self._epoch:
                self._begin(event.epoch)
            last = self._last
            aggregate = hash((event.aggregate_type, event.aggregate_id))
            at = aggregate % self._slots * 3
            if last[at] == aggregate:
                if event.id <= last[at + 1]:
                    continue
                if event.version < last[at + 2]:
                    falls.append(Fall(event, last[at + 2]))
            else:
                last[at] = aggregate
            last[at + 1] = event.id
            last[at + 2] = event.version
        return falls
