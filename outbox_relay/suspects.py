"""Which events of a request that failed whole may be guilty: halved until it is known."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from dataclasses import dataclass

from outbox_relay.event import Event


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    failed_at: float


class Suspects:
    """Events of requests that failed whole, kept apart from all others until it is known who is guilty.

    A group is a request of its own, and halved each time it fails: one bad event is found among 1,000 in about 20
    requests, while all others go on. An outage halves too, one request a try, and blames nobody: when it is over all
    of them pass. At most `limit` ids are remembered, the newest.
    """

    def __init__(self, limit: int = 10_000) -> None:
        self._limit = limit
        self._group_of: OrderedDict[int, _Group] = OrderedDict()

    def part(self, events: list[Event], alone: Container[int]) -> tuple[list[Event], list[list[Event]]]:
        """Split a batch into the events that are free to go and the requests of suspects.

        Ids in `alone` get a request each. A suspect's successors are in neither, but for those of its own request: they
        wait for its answer.
        """
        if not self._group_of and not alone:
            return events, []
        free: list[Event] = []
        requests: dict[_Group, list[Event]] = {}
        behind: dict[tuple[str, str], _Group] = {}
        for event in events:
            group = _Group(0.0) if event.id in alone else self._group_of.get(event.id)
            if behind.get(event.aggregate, group) is not group:
                continue
            if group is None:
                free.append(event)
            else:
                requests.setdefault(group, []).append(event)
                behind[event.aggregate] = group
        # The one that failed longest ago first, so that a bad one does not keep its fellows from being tried.
        return free, [requests[group] for group in sorted(requests, key=lambda group: group.failed_at)]

    def failed(self, events: Sequence[Event], now: float, accepted_at: float) -> bool:
        """Note that a request failed whole. Returns whether that is the fault of the one event in it.

        `accepted_at` is when the last request was sent in which anything was accepted.
        """
        known = self._group_of.get(events[0].id)
        if len(events) == 1 and known is not None and accepted_at > known.failed_at:
            self.answered(events)
            return True
        middle = (len(events) + 1) // 2
        for half in (events[:middle], events[middle:]):
            group = _Group(now)
            for event in half:
                self._group_of.pop(event.id, None)
                self._group_of[event.id] = group
        while len(self._group_of) > self._limit:
            self._group_of.popitem(last=False)
        return False

    def answered(self, events: Sequence[Event]) -> None:
        """Clear events that got an answer of their own."""
        if self._group_of:
            for event in events:
                self._group_of.pop(event.id, None)
