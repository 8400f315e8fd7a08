"""The judge of the chaos tests is itself judged: every kind of damage must be seen."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.support.oracle import (
    DROPPED,
    Bill,
    Fact,
    Heard,
    History,
    Hole,
    Judged,
    Sent,
    Stream,
    Struck,
    Verdict,
    judge,
    judge_stream,
    violations,
)

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


# A whole run: with the proxy's log, the rows, and faults.

CHANNEL = "hist:1"


def faultless() -> History:
    """Five rounds of three events, each round a request, answered at once and settled a moment later."""
    history = History(owed=defaultdict(list), heard=defaultdict(list))
    history.rows.versions = dict.fromkeys(AGGREGATES, 5)
    for fact in COMMITTED:
        history.owed[fact.aggregate, CHANNEL].append(fact)
        history.heard[fact.aggregate, CHANNEL].append(fact)
        history.rows.settled_at[fact.key] = fact.version + 0.5
    history.sent = [sent(version, *(aggregate[1] for aggregate in AGGREGATES)) for version in range(1, 6)]
    return history


def sent(version: int, *aggregates: str, at: float | None = None, codes: Sequence[int] = (0,)) -> Sent:
    """A request with this version of these aggregates: sent, executed and answered within 0.2 s."""
    at = float(version) if at is None else at
    events = [(f"{aggregate}-{version}", [CHANNEL], False) for aggregate in aggregates]
    return Sent(at, events, [codes for _ in events], executed_at=at + 0.1, answered_at=at + 0.2)


def found(history: History) -> list[str]:
    """The first words of what the judge finds."""
    return sorted({text.split(":")[0] for text in judge(history).violations})


def stream(aggregate: str) -> Stream:
    return ("order", aggregate), CHANNEL


def test_a_faultless_run_passes() -> None:
    assert judge(faultless()) == Verdict([], [], 0)


def test_an_event_that_nobody_heard_is_lost() -> None:
    """Also where the proxy saw that Centrifugo accepted it: acceptance is not all, if the subscriber is whole."""
    history = faultless()
    history.heard[stream("1")].pop()
    assert found(history) == ["loss", "stale"]


def test_where_the_subscriber_has_holes_the_proxy_says_what_is_lost() -> None:
    history = faultless()
    history.whole = False
    history.heard[stream("1")][2:] = [Hole()]
    assert found(history) == []
    history.sent = history.sent[:-1]
    assert found(history) == ["loss"]


def test_an_ended_row_explains_a_missing_event_and_nothing_else_does() -> None:
    history = faultless()
    del history.heard[stream("1")][2]
    history.sent = [*history.sent[:2], sent(3, "0", "2"), *history.sent[3:]]
    assert found(history) == ["loss", "order"]
    history.rows.excused.add("1-3")
    assert found(history) == []


def test_an_event_that_ended_otherwise_and_surfaces_after_its_successors_is_resurrected() -> None:
    history = faultless()
    late = history.heard[stream("1")].pop(2)
    history.heard[stream("1")].append(late)
    history.rows.excused.add("1-3")
    assert found(history) == ["resurrected", "stale"]
    # Not where a request of it was never answered: nobody could know.
    history.sent = [*history.sent, replace(sent(3, "1"), answered_at=None)]
    assert judge(history).late == 1
    assert "resurrected" not in found(history)


def gap(fact: Heard) -> Fact:
    assert isinstance(fact, Fact)
    return fact._replace(gap=True)


def test_a_gap_is_as_good_as_the_event_in_whose_place_it_is_told() -> None:
    history = faultless()
    heard = history.heard[stream("1")]
    history.rows.ended.add("1-3")
    heard[2] = gap(heard[2])
    assert found(history) == []
    heard[2], heard[3] = heard[3], heard[2]
    assert found(history) == ["order"]


def test_a_gap_that_nobody_was_told_of_is_a_loss() -> None:
    """Unless the row says that Centrifugo refused it as well."""
    history = faultless()
    history.rows.ended.add("1-3")
    del history.heard[stream("1")][2]
    assert found(history) == ["loss", "order"]
    history.rows.excused.add("1-3")
    assert found(history) == []


def test_a_gap_of_an_event_that_has_not_ended_so_is_false() -> None:
    history = faultless()
    history.heard[stream("1")].insert(3, gap(history.heard[stream("1")][2]))
    assert found(history) == ["gap"]


def test_a_gap_after_its_event_says_nothing_new() -> None:
    """The event was sent, not settled because of a kill, and expired before it could be sent again."""
    history = faultless()
    history.rows.ended.add("1-3")
    history.heard[stream("1")].insert(4, gap(history.heard[stream("1")][2]))
    assert found(history) == []


def test_an_event_that_comes_after_its_gap_and_its_successors_is_resurrected() -> None:
    history = faultless()
    history.rows.ended.add("1-3")
    heard = history.heard[stream("1")]
    heard.append(heard[2])
    heard[2] = gap(heard[2])
    assert "resurrected" in found(history)


def test_a_dead_event_must_have_been_poison() -> None:
    history = faultless()
    history.rows.dead.add("1-3")
    assert found(history) == ["blamed"]
    history.poison = {"1-3"}
    assert found(history) == []


def test_an_event_that_has_not_ended_is_seen() -> None:
    history = faultless()
    history.rows.unfinished.add("1-3")
    assert found(history) == ["unfinished"]


def test_a_successor_sent_before_its_predecessor_has_ended_is_seen_though_it_arrived_in_order() -> None:
    """Luck is no order: the relay must know before it sends."""
    history = faultless()
    history.sent = [*history.sent[:2], sent(3, "0", "1", "2", at=2.1), *history.sent[3:]]
    assert found(history) == ["order"]


def test_a_refused_predecessor_has_not_ended() -> None:
    history = faultless()
    refused = sent(3, "1", codes=(100,))
    history.sent = [*history.sent[:2], refused, sent(3, "0", "2", at=3.3), *history.sent[3:], sent(3, "1", at=6.0)]
    history.rows.settled_at["1-3"] = 7.0
    assert found(history) == ["order"]


def test_what_is_repeated_without_a_fault_is_seen() -> None:
    history = faultless()
    history.sent = [*history.sent, sent(5, "1", at=6.0)]
    assert found(history) == ["duplicates"]


def test_a_fault_pays_for_what_was_in_flight_and_for_no_more() -> None:
    """The last round was sent and not settled when the relay was killed: three events may come again, once."""
    history = faultless()
    history.faults = [Struck("relay killed", 5.3, 5.3)]
    again = sent(5, "0", "1", "2", at=6.0)
    for aggregate in "012":
        history.rows.settled_at[f"{aggregate}-5"] = 6.5
    history.sent = [*history.sent, again]
    assert judge(history) == Verdict([], [Bill(history.faults[0], 3, 3)], 0)
    history.sent = [*history.sent, sent(5, "1", at=6.4)]
    history.sent = [*history.sent, sent(4, "1", at=6.4)]
    assert found(history) == ["duplicates"]


def test_what_is_sent_after_the_healing_in_a_transaction_from_before_is_in_flight() -> None:
    """A relay hears of its session's end when it next needs it; what it began later, it began unharmed."""
    history = faultless()
    history.faults = [Struck("sessions ended", 4.6, 4.8)]
    for aggregate in "012":
        history.rows.settled_at[f"{aggregate}-5"] = 6.5
    *before, last = history.sent
    history.sent = [*before, replace(last, began_at=4.7), sent(5, "0", "1", "2", at=6.0)]
    assert judge(history) == Verdict([], [Bill(history.faults[0], 3, 3)], 0)
    history.sent = [*before, replace(last, began_at=4.9), sent(5, "0", "1", "2", at=6.0)]
    assert found(history) == ["duplicates"]


def test_what_was_settled_before_a_fault_may_not_come_again() -> None:
    history = faultless()
    history.faults = [Struck("relay killed", 9.0, 9.0)]
    history.sent = [*history.sent, sent(5, "1", at=9.5)]
    assert found(history) == ["duplicates"]


def test_what_a_person_asked_for_may_come_again_and_late() -> None:
    history = faultless()
    history.asked.add("1-2")
    history.sent = [*history.sent, sent(2, "1", at=6.0)]
    history.heard[stream("1")].append(Fact(("order", "1"), 2, "1-2"))
    assert found(history) == []


def test_a_subscriber_that_ends_with_less_than_the_table_is_stale() -> None:
    """Though the newest event is excused in the order, if another row says that it was delivered."""
    history = faultless()
    history.rows.versions[("order", "1")] = 4
    history.heard[stream("1")].pop()
    assert "stale" in found(history)


# Conflated types: a later snapshot stands in for what is older.


def conflated() -> History:
    """Version 3 of the first aggregate was not sent: version 4, a snapshot, was accepted in its place at 4.2."""
    history = faultless()
    history.covers = {"0-3", "0-4"}
    history.rows.superseded.add("0-3")
    history.rows.settled_at["0-3"] = 4.5
    del history.heard[stream("0")][2]
    history.sent = [*history.sent[:2], sent(3, "1", "2"), *history.sent[3:]]
    return history


def test_a_superseded_event_need_not_be_heard_of() -> None:
    assert judge(conflated()) == Verdict([], [], 0)


def test_only_something_newer_supersedes() -> None:
    """Not a change, and nothing of another channel."""
    history = conflated()
    history.covers = {"0-2", "0-3"}
    assert found(history) == ["loss", "order"]
    history = conflated()
    also: Stream = ("order", "0"), "hist:2"
    history.owed[also] = [COMMITTED[index("0", 3)]]
    assert "loss" in found(history)


def test_what_is_superseded_was_so_when_it_was_settled() -> None:
    """The relay knew of the newer one's acceptance: it had been answered."""
    history = conflated()
    history.rows.settled_at["0-3"] = 4.15
    assert found(history) == ["loss", "order"]
    history = conflated()
    history.sent = [replace(each, answered_at=None) if each.at == 4.0 else each for each in history.sent]
    assert "loss" in found(history)


def test_an_event_of_which_the_row_says_that_it_was_delivered_is_not_superseded() -> None:
    """But where it was accepted on another one of its channels, and is not sent to this one any more."""
    history = conflated()
    history.rows.superseded.clear()
    assert found(history) == ["loss", "order"]
    other: Stream = ("order", "0"), "hist:2"
    fact = COMMITTED[index("0", 3)]
    history.owed[other] = [fact]
    history.heard[other] = [fact]
    history.sent = [*history.sent, Sent(3.0, [("0-3", ["hist:2"], False)], [[0]], executed_at=3.1, answered_at=3.2)]
    assert found(history) == []


def in_doubt() -> History:
    """Version 4 was executed and not answered; version 3 was sent then, because it was read without version 4."""
    history = conflated()
    history.rows.superseded.clear()
    unanswered = [replace(each, answered_at=None) if each.at == 4.0 else each for each in history.sent]
    history.sent = [*unanswered, sent(3, "0", at=4.5)]
    history.heard[stream("0")].insert(3, COMMITTED[index("0", 3)])
    return history


def test_a_snapshot_whose_answer_a_fault_cut_may_come_before_what_it_stands_in_for() -> None:
    """Nobody knew: what was to be superseded by it is sent after all."""
    history = in_doubt()
    history.sent = [
        *history.sent[:-2],
        history.sent[-1],
        sent(4, "0", "1", "2", at=4.7),
        sent(5, "0", "1", "2", at=5.0),
    ]
    history.faults = [Struck("replies cut", 3.9, 4.4)]
    history.rows.settled_at.update({"0-4": 4.95, "1-4": 4.95, "2-4": 4.95, "0-3": 4.65})
    verdict = judge(history)
    assert verdict.violations == []
    assert verdict.late == 1


def struck_before_it_was_settled() -> History:
    """Version 4 was accepted, and the relay killed before it could write that down; it is sent again at last."""
    history = in_doubt()
    answered = [replace(each, answered_at=each.at + 0.2) for each in history.sent]
    history.sent = [*answered, sent(4, "0", "1", "2", at=4.8)]
    history.rows.settled_at.update({"0-3": 4.75, "0-4": 4.95, "1-4": 4.95, "2-4": 4.95})
    history.faults = [Struck("relay killed", 4.3, 4.3)]
    return history


def test_so_may_one_that_a_fault_met_before_it_was_settled() -> None:
    history = struck_before_it_was_settled()
    # The next one waits until version 4 has ended.
    late = [each for each in history.sent if each.at == 5.0]
    history.sent = [*(each for each in history.sent if each not in late), *late]
    verdict = judge(history)
    assert verdict.violations == []
    assert verdict.late == 1
    for too_soon_or_late in (Struck("relay killed", 3.5, 3.6), Struck("relay killed", 4.97, 4.97)):
        history.faults = [too_soon_or_late]
        assert "order" in found(history)


def test_so_may_what_was_sent_after_it() -> None:
    """A change went out in the same batch as the snapshot, and neither could be written down."""
    owed = [fact for fact in COMMITTED if fact.aggregate == AGGREGATES[0]]
    first, snapshot, third, fourth, fifth = owed
    doubtful = {snapshot.key}
    again = [first, snapshot, third, fourth, fifth]
    assert judge_stream(owed, [snapshot, third, *again], doubtful=doubtful) == Judged([], 2, 1)
    # What is newer than the snapshot has to wait for its turn.
    assert judge_stream(owed, [snapshot, fourth, third, *again], doubtful=doubtful).violations
    assert judge_stream(owed, [snapshot, third, *again]).violations


def test_a_change_without_an_answer_may_not() -> None:
    history = in_doubt()
    history.covers = frozenset()
    assert "order" in found(history)


def test_a_snapshot_whose_acceptance_is_known_ends_what_is_older() -> None:
    history = in_doubt()
    history.sent = [replace(each, answered_at=each.at + 0.2) for each in history.sent]
    assert "order" in found(history)


# Bundles: one publication with several events, in order, all or none.


def bundled(*versions: int, publications: Sequence[int] = (0, 0, 0)) -> History:
    """The first aggregate's versions 3 to 5 were sent in one request, in this order."""
    history = faultless()
    events = [(f"0-{n}", [CHANNEL], False) for n in versions]
    together = Sent(3.0, events, [[0]] * 3, executed_at=3.1, answered_at=3.2, publications=publications)
    history.sent = [*history.sent[:2], together, *(sent(n, "1", "2") for n in (3, 4, 5))]
    return history


def test_what_is_in_one_bundle_follows_each_other() -> None:
    assert judge(bundled(3, 4, 5)) == Verdict([], [], 0)


def test_a_bundle_in_the_wrong_order_is_seen() -> None:
    assert found(bundled(3, 5, 4)) == ["order"]


def test_two_events_of_an_aggregate_in_one_request_are_seen_if_they_are_in_no_bundle() -> None:
    """Centrifugo goes on after a failing command."""
    assert found(bundled(3, 4, 5, publications=())) == ["order"]
    assert found(bundled(3, 4, 5, publications=(0, 0, 1))) == ["order"]


def formed_anew() -> History:
    """Versions 3 to 5 of the first aggregate are sent again: 4 under its old key, 3 and 5 in other company."""
    history = faultless()
    bundle = sent(5, "0", "1")
    bundle.publications = (0, 0)
    history.sent = [*history.sent[:4], bundle, sent(5, "2"), *(sent(n, "0", at=n + 3.0) for n in (3, 4, 5))]
    history.rows.settled_at.update({f"0-{n}": 8.5 for n in (3, 4, 5)})
    history.faults = [Struck("relay killed", 5.3, 5.3)]
    heard = history.heard[stream("0")]
    heard += [heard[2], heard[4]]
    return history


def test_of_a_suffix_that_is_repeated_in_other_bundles_some_may_be_swallowed() -> None:
    history = formed_anew()
    assert found(history) == []
    del history.heard[stream("0")][-1]
    assert found(history) == []


def test_what_was_not_sent_again_was_not_swallowed() -> None:
    history = formed_anew()
    history.sent = [each for each in history.sent if each.at != 7.0]
    assert found(history) == ["order"]


def test_nothing_is_swallowed_singly_where_there_are_no_bundles() -> None:
    history = formed_anew()
    history.sent = [replace(each, publications=()) for each in history.sent]
    assert found(history) == ["order"]


def given_up(answered_at: float) -> History:
    """Version 3 of the first aggregate waits at a frozen Centrifugo; another relay sends it in a bundle with 4."""
    history = faultless()
    first = replace(sent(3, "0"), executed_at=answered_at - 0.1, answered_at=answered_at)
    both = [(f"0-{n}", [CHANNEL], False) for n in (3, 4)]
    second = Sent(3.5, both, [[0]] * 2, executed_at=3.7, answered_at=3.8, publications=(0, 0))
    others = [sent(3, "1", "2"), sent(4, "1", "2"), history.sent[4]]
    history.sent = [*history.sent[:2], first, others[0], second, *others[1:]]
    history.rows.settled_at["0-3"] = 4.5
    history.faults = [Struck("Centrifugo frozen", 2.9, 3.7)]
    heard = history.heard[stream("0")]
    heard.insert(4, heard[2])
    return history


def test_an_event_that_was_given_up_may_surface_after_its_successors() -> None:
    """Centrifugo runs the second request before the first, whose answer comes when nobody waits for it any more."""
    assert judge(given_up(4.0)).violations == []
    assert judge(given_up(4.0)).late == 1


def test_one_whose_answer_had_come_may_not() -> None:
    assert found(given_up(3.4)) == ["order"]


# Map and exclusive channels: Centrifugo keeps the versions.


def rising() -> History:
    history = faultless()
    history.rising = {CHANNEL}
    history.maps = {CHANNEL: dict.fromkeys(AGGREGATES, 5)}
    return history


def test_a_faultless_run_passes_where_versions_only_rise() -> None:
    assert judge(rising()) == Verdict([], [], 0)


@pytest.mark.parametrize("step", [1, 2])
def test_nothing_comes_again_where_versions_only_rise(step: int) -> None:
    """Elsewhere it may: a suffix that is repeated, and what was late."""
    history = rising()
    heard = history.heard[stream("1")]
    heard += heard[-step:]
    assert found(history) == ["order"]
    history.sent = [replace(each, answered_at=None) for each in history.sent]
    assert "order" in found(history)


def overtaken() -> History:
    """Version 3 was lost on its way; version 4 came first, and then the map knew better."""
    history = rising()
    history.sent = [
        *history.sent[:2],
        sent(3, "1", "2"),
        history.sent[3],
        sent(3, "0", at=4.3, codes=(DROPPED,)),
        history.sent[4],
    ]
    del history.heard[stream("0")][2]
    history.rows.superseded.add("0-3")
    history.rows.settled_at["0-3"] = 4.6
    return history


def test_what_a_map_drops_is_superseded() -> None:
    assert judge(overtaken()) == Verdict([], [], 0)


def test_what_a_map_drops_may_be_delivered_on_another_channel() -> None:
    """Then the row says so. It is settled once, after the map's answer."""
    history = overtaken()
    history.rows.superseded.clear()
    other: Stream = ("order", "0"), "hist:2"
    history.owed[other] = [COMMITTED[index("0", 3)]]
    history.heard[other] = [COMMITTED[index("0", 3)]]
    history.sent = [*history.sent[:4], sent(3, "0", at=4.3, codes=(DROPPED, 0)), *history.sent[5:]]
    history.sent[4].events = [("0-3", [CHANNEL, "hist:2"], False)]
    assert found(history) == []
    history.rows.settled_at["0-3"] = 4.05
    assert found(history) == ["loss", "order"]


def test_only_what_a_map_knew_better_is_dropped() -> None:
    """It knew nothing newer yet; the row says otherwise; a stream knows no versions."""
    history = overtaken()
    history.rows.settled_at["0-3"] = 4.05
    assert found(history) == ["loss", "order"]
    history = overtaken()
    history.rows.superseded.clear()
    assert found(history) == ["loss", "order"]
    history = overtaken()
    history.rising = frozenset()
    assert found(history) == ["loss", "order"]


def test_a_map_that_does_not_hold_what_it_told_is_stale() -> None:
    history = rising()
    history.maps = {CHANNEL: {**dict.fromkeys(AGGREGATES, 5), ("order", "1"): 4}}
    assert found(history) == ["stale"]
    history.maps = {CHANNEL: {}}
    assert found(history) == ["stale"]


def test_a_request_that_only_one_channel_accepted_is_repeated_for_the_other() -> None:
    """That is no duplicate; to the same channel it is."""
    history = faultless()
    other: Stream = ("order", "0"), "hist:2"
    history.owed[other] = [COMMITTED[index("0", 5)]]
    history.heard[other] = [COMMITTED[index("0", 5)]]
    first = Sent(5.0, [("0-5", [CHANNEL, "hist:2"], False)], [[0, 102]], executed_at=5.1, answered_at=5.2)
    again = Sent(6.0, [("0-5", ["hist:2"], False)], [[0]], executed_at=6.1, answered_at=6.2)
    history.rows.settled_at["0-5"] = 6.5
    history.sent = [*history.sent[:4], sent(5, "1", "2"), first, again]
    assert found(history) == []
    history.sent = [*history.sent, replace(again, at=7.0, executed_at=7.1, answered_at=7.2)]
    assert found(history) == ["duplicates"]


def test_order_is_of_a_channel() -> None:
    """What is sent on another one only is not sent here."""
    history = faultless()
    other: Stream = ("order", "0"), "hist:2"
    history.owed[other] = [COMMITTED[index("0", 5)]]
    history.heard[other] = [COMMITTED[index("0", 5)]]
    elsewhere = Sent(4.05, [("0-5", ["hist:2"], False)], [[0]], executed_at=4.1, answered_at=4.2)
    history.sent = [*history.sent[:4], elsewhere, *history.sent[4:]]
    assert found(history) == []
    here = Sent(4.05, [("0-5", [CHANNEL], False)], [[0]], executed_at=4.1, answered_at=4.2)
    history.sent = [*history.sent[:4], here, elsewhere, sent(5, "1", "2")]
    assert found(history) == ["order"]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("damage", ["dropped", "swapped", "repeated", "resurrected", "phantom"])
def test_any_damage_to_a_whole_run_is_seen(damage: str, seed: int) -> None:
    chance = random.Random(f"{damage}/{seed}")
    history = faultless()
    heard = history.heard[stream(chance.choice("012"))]
    place = chance.randrange(4)
    match damage:
        case "dropped":
            del heard[place]
        case "swapped":
            heard[place], heard[place + 1] = heard[place + 1], heard[place]
        case "repeated":
            history.sent = [*history.sent, sent(place + 1, "0", at=chance.uniform(6, 9))]
        case "resurrected":
            heard.append(heard[place])
        case "phantom":
            heard.insert(place, Fact(("order", "0"), place + 1, "rolled back"))
    assert judge(history).violations
