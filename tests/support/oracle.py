"""The judge of a run: what was committed against what an independent subscriber received. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple


class Fact(NamedTuple):
    """One event, as the writer committed it or as a subscriber received it. `key` is its event_id."""

    aggregate: tuple[str, str]
    version: int
    key: str


def violations(committed: Iterable[Fact], received: Iterable[Fact], duplicates_allowed: int = 0) -> list[str]:
    """Say everything that the promise does not allow; an empty list is a pass.

    Per aggregate the subscriber must hear every committed event and nothing else, in version order. After a
    fault it may hear a suffix again, from some event on and then in order to the end: each delivery is either
    the successor of the one before, or a step back of which the way forward is then repeated.
    """
    found: list[str] = []
    expected: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in committed:
        expected[fact.aggregate].append(fact)
    heard: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in received:
        heard[fact.aggregate].append(fact)
    duplicates = 0
    for aggregate in expected.keys() | heard.keys():
        truth = sorted(expected[aggregate], key=lambda fact: fact.version)
        position = {fact: place for place, fact in enumerate(truth)}
        seen: set[Fact] = set()
        last = -1
        for fact in heard[aggregate]:
            place = position.get(fact)
            if place is None:
                found.append(f"phantom: {fact} was never committed")
                continue
            if place > last + 1:
                found.append(f"order: {fact} arrived {place - last - 1} event(s) too early")
            duplicates += fact in seen
            seen.add(fact)
            last = place
        found += [f"loss: {fact} never arrived" for fact in truth if fact not in seen]
        if last != len(truth) - 1 and seen:
            found.append(f"stale: {aggregate} ended at {truth[last]} though {truth[-1]} is newer")
    if duplicates > duplicates_allowed:
        found.append(f"duplicates: {duplicates}, allowed are {duplicates_allowed}")
    return found
