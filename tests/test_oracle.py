"""The judge of the chaos tests is itself judged: every kind of damage must be seen."""

from __future__ import annotations

import random

import pytest

from tests.support.oracle import Fact, violations

AGGREGATES = [("order", str(n)) for n in range(3)]
COMMITTED = [
    Fact(aggregate, version, f"{aggregate[1]}-{version}") for version in range(1, 6) for aggregate in AGGREGATES
]


def index(aggregate: str, version: int) -> int:
    return COMMITTED.index(Fact(("order", aggregate), version, f"{aggregate}-{version}"))


def test_a_faultless_history_passes() -> None:
    """Aggregates may arrive in any mixture, each in its own order."""
    assert violations(COMMITTED, COMMITTED) == []
    mixed = sorted(COMMITTED, key=lambda fact: (fact.aggregate[1] == "0", fact.version))
    assert violations(COMMITTED, mixed) == []


def test_a_repeated_suffix_passes_within_the_allowance() -> None:
    """After a crash the events of a batch may come again, from some event on, in order."""
    suffix = [fact for fact in COMMITTED if fact.aggregate == ("order", "1") and fact.version >= 3]
    assert violations(COMMITTED, COMMITTED + suffix, duplicates_allowed=3) == []
    assert violations(COMMITTED, COMMITTED + suffix, duplicates_allowed=2) == ["duplicates: 3, allowed are 2"]


@pytest.mark.parametrize("seed", range(20))
def test_one_dropped_event_is_seen(seed: int) -> None:
    """Loss, wherever it strikes; also as the order it breaks, if a successor arrived."""
    received = list(COMMITTED)
    lost = received.pop(random.Random(seed).randrange(len(received)))
    assert f"loss: {lost} never arrived" in violations(COMMITTED, received)


@pytest.mark.parametrize("seed", range(20))
def test_two_swapped_events_of_an_aggregate_are_seen(seed: int) -> None:
    """A successor before its predecessor is a violation even though everything arrived once."""
    chance = random.Random(seed)
    aggregate = chance.choice(AGGREGATES)[1]
    first = chance.randrange(1, 5)
    received = list(COMMITTED)
    one, other = index(aggregate, first), index(aggregate, first + 1)
    received[one], received[other] = received[other], received[one]
    assert any(text.startswith("order:") for text in violations(COMMITTED, received, duplicates_allowed=100))


@pytest.mark.parametrize("seed", range(20))
def test_a_resurrected_event_is_seen(seed: int) -> None:
    """An old event that comes again alone, without the way forward, is no repeated suffix."""
    chance = random.Random(seed)
    old = COMMITTED[index(chance.choice(AGGREGATES)[1], chance.randrange(1, 4))]
    received = list(COMMITTED)
    received.insert(chance.randrange(index(old.aggregate[1], old.version + 2), len(received)) + 1, old)
    found = violations(COMMITTED, received, duplicates_allowed=100)
    assert any(text.startswith(("order:", "stale:")) for text in found)


@pytest.mark.parametrize(
    "phantom",
    [
        Fact(("order", "0"), 6, "0-6"),
        Fact(("order", "0"), 3, "another event of the same version"),
        Fact(("order", "unheard of"), 1, "x"),
    ],
)
def test_a_phantom_is_seen(phantom: Fact) -> None:
    """What was rolled back, or never written, must not arrive."""
    assert violations(COMMITTED, [*COMMITTED, phantom]) == [f"phantom: {phantom} was never committed"]


def test_silence_is_seen() -> None:
    """A relay that does nothing does not pass."""
    assert len(violations(COMMITTED, [])) == len(COMMITTED)
