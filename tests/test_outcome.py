"""Decisions: what a refusal means, how long to wait, and who is guilty of a request that failed whole."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox_relay.event import Event, Hold, Outage, Refusal, Reply, boottime
from outbox_relay.outcome import (
    SUPERSEDED,
    UNSETTLED,
    GivenUp,
    Held,
    Owed,
    Policy,
    Settlement,
    backoff,
    decide,
    judge,
    namespace,
)
from outbox_relay.suspects import Suspects

POLICY = Policy(max_attempts=3, min_age=60.0, backoff_base=1.0, backoff_max=30.0)
OLD = Hold(head_id=1, tries=4, attempts=2, alone=False, first_refused_at=100.0, refused_at=190.0)
"""An event that was refused four times, twice by its own fault. The next time is its last chance."""


def event(id_: int = 1, name: str = "1", channels: tuple[str, ...] = ("chat:a",)) -> Event:
    return Event(
        id=id_,
        event_id="e",
        aggregate_type="order",
        aggregate_id=name,
        lane=0,
        version=1,
        kind="change",
        channels=list(channels),
        payload="{}",
        tags=None,
        accepted=None,
        created_at=0.0,
    )


def refused(*codes: int, channel: str = "chat:a") -> Reply:
    return Reply(tuple(Refusal(channel, code, "because") for code in codes))


# decide

BEFORE, AFTER = 189.9, 190.1
"""Others were accepted in a request that was sent before, or after, the last refusal."""

DECISIONS: dict[str, tuple[Reply, Hold | None, float, float, tuple[int, int] | None]] = {
    # name: reply, hold, others accepted at, now, (tries, attempts) of a hold or None for dead
    "the first refusal never counts": (refused(107), None, 199.0, 200.0, (1, 0)),
    "the first refusal by a request of its own": (refused(0), None, 199.0, 200.0, (1, 0)),
    "no evidence: nobody was accepted": (refused(102), OLD, 0.0, 200.0, (5, 2)),
    "no evidence: others were accepted before": (refused(102), OLD, BEFORE, 200.0, (5, 2)),
    "no evidence: sent at that very moment": (refused(102), OLD, OLD.refused_at, 200.0, (5, 2)),
    "evidence counts an attempt": (refused(102), replace(OLD, attempts=1), AFTER, 200.0, (5, 2)),
    "the last attempt": (refused(102), OLD, AFTER, 200.0, None),
    "the last attempt of what is not available": (refused(108), OLD, AFTER, 200.0, None),
    "enough attempts, too young": (refused(102), replace(OLD, first_refused_at=140.1), AFTER, 200.0, (5, 3)),
    "just old enough": (refused(102), replace(OLD, first_refused_at=140.0), AFTER, 200.0, None),
    "old, too few attempts": (refused(102), replace(OLD, attempts=1), AFTER, 9e9, (5, 2)),
    "a bad request is hopeless at once": (refused(107), replace(OLD, attempts=0), AFTER, 191.0, None),
    "an unknown command is hopeless at once": (refused(104), replace(OLD, attempts=0), AFTER, 191.0, None),
    "a bad request, without evidence": (refused(107), replace(OLD, attempts=0), BEFORE, 191.0, (5, 0)),
    "an internal error never kills": (refused(100), replace(OLD, attempts=99), AFTER, 9e9, (5, 99)),
    "an internal error beside another": (refused(102, 100), replace(OLD, attempts=99), AFTER, 9e9, (5, 99)),
    "a bad request beside another": (refused(102, 107), replace(OLD, attempts=0), AFTER, 191.0, None),
    "a request of its own that is answered 403 counts": (refused(-403), replace(OLD, attempts=1), AFTER, 200.0, (5, 2)),
    "a request of its own, the last attempt": (refused(-403), OLD, AFTER, 200.0, None),
    "a request of its own without an answer never counts": (refused(0), replace(OLD, attempts=99), AFTER, 9e9, (5, 99)),
    "the first refusal of a new head": (refused(107), replace(OLD, tries=0, attempts=0), AFTER, 200.0, (1, 0)),
}


@pytest.mark.parametrize(("reply", "hold", "others", "now", "expected"), DECISIONS.values(), ids=DECISIONS.keys())
def test_what_a_refusal_means(
    reply: Reply, hold: Hold | None, others: float, now: float, expected: tuple[int, int] | None
) -> None:
    """An event is blamed on evidence alone, and dead only after enough attempts and enough time."""
    outcome = decide(reply, hold, others, now, POLICY, jitter=1.0)
    if expected is None:
        assert isinstance(outcome, Owed)
        assert outcome.ending == "dead"
        for wait in (False, True):
            silent = replace(POLICY, gap=False, wait_after_dead=wait)
            assert decide(reply, hold, others, now, silent) == GivenUp("dead", outcome.error, wait)
    else:
        assert isinstance(outcome, Held)
        assert (outcome.tries, outcome.attempts) == expected
        assert outcome.delay == backoff(outcome.tries, 1.0, 30.0, 1.0)
        assert outcome.alone is (reply.refusals[0].code <= 0)


def test_the_reason_is_told() -> None:
    """Channel, code and Centrifugo's own words, bounded; or that the whole request failed."""
    reason = decide(refused(102, channel="chat:x"), None, 0.0, 0.0, POLICY).error
    assert reason == "Centrifugo refused channel 'chat:x' with 102: because"
    assert decide(refused(0), None, 0.0, 0.0, POLICY).error == "sent alone, its request failed: because"
    long = Reply((Refusal("chat:x", 102, "x" * 9999),))
    assert len(decide(long, None, 0.0, 0.0, POLICY).error or "") == 1000


GAPS: dict[str, tuple[Reply, Hold | None, float, bool]] = {
    # name: reply, hold, others accepted at, whether the event ends, its gap untold
    "the first refusal": (refused(102), replace(OLD, tries=0, attempts=0), AFTER, False),
    "without evidence": (refused(102), OLD, BEFORE, False),
    "one refusal with evidence": (refused(102), replace(OLD, tries=1, attempts=0), AFTER, True),
    "an internal error": (refused(100), OLD, AFTER, False),
    "no answer": (refused(0), OLD, AFTER, False),
    "a request of its own that is answered 403": (refused(-403), replace(OLD, tries=1, attempts=0), AFTER, True),
}


@pytest.mark.parametrize(("reply", "hold", "others", "untold"), GAPS.values(), ids=GAPS.keys())
@pytest.mark.parametrize("ending", ["dead", "expired", "discarded"])
def test_a_gap_is_tried_until_one_refusal_is_its_own(
    reply: Reply, hold: Hold | None, others: float, untold: bool, ending: str
) -> None:
    """No age and no number of attempts: its event has ended already. Only a dead event may make others wait."""
    policy = replace(POLICY, wait_after_dead=True)
    outcome = decide(reply, hold, others, 191.0, policy, ending=ending)
    if untold:
        assert isinstance(outcome, GivenUp)
        assert (outcome.state, outcome.wait) == (ending, ending == "dead")
        assert outcome.error is not None
        assert outcome.error.startswith("the gap is untold: ")
    else:
        assert isinstance(outcome, Held)


# backoff


@pytest.mark.parametrize(
    ("tries", "jitter", "seconds"),
    [(1, 1.0, 1.0), (2, 1.0, 2.0), (5, 1.0, 16.0), (6, 1.0, 30.0), (10**9, 1.0, 30.0), (0, 1.0, 1.0), (3, 0.0, 2.0)],
)
def test_backoff_doubles_up_to_a_ceiling(tries: int, jitter: float, seconds: float) -> None:
    """Twice as long each time, half of it by chance, never longer than the ceiling, however often."""
    assert backoff(tries, 1.0, 30.0, jitter) == seconds


def test_backoff_is_spread() -> None:
    """Relays that failed together do not come back together."""
    waits = {backoff(3, 1.0, 30.0) for _ in range(50)}
    assert len(waits) > 25
    assert all(2.0 <= seconds <= 4.0 for seconds in waits)


# namespace, unsent, key


@pytest.mark.parametrize(
    ("channel", "name"),
    [
        ("chat:a", "chat"),
        ("chat:a:b", "chat"),
        ("$chat:a", "chat"),
        ("a", ""),
        ("$a", ""),
        (":a", ""),
        ("a$b:c", "a$b"),
    ],
)
def test_the_namespace_of_a_channel(channel: str, name: str) -> None:
    """What is before the first colon, without the mark of private channels."""
    assert namespace(channel) == name


def test_what_is_left_to_send() -> None:
    """The channels that have not accepted, in their order."""
    written = event(channels=("a", "b", "c"))
    assert written.unsent == ["a", "b", "c"]
    assert replace(written, accepted=["b"]).unsent == ["a", "c"]


def test_the_idempotency_key() -> None:
    """Neither a repeated event_id nor a replay is swallowed as a repetition."""
    keys = [event(1), event(2), replace(event(1), replay=1), replace(event(1), replay=2), event(1)]
    assert [key.idempotency_key for key in keys] == ["e:1", "e:2", "e:1:r1", "e:1:r2", "e:1"]


# judge

OWN = ("order", "1")


def verdict(
    reply: Reply,
    *,
    holds: Mapping[tuple[str, str], Hold] | None = None,
    accepted_at: Mapping[str, float] | None = None,
    anything_accepted: bool = True,
) -> tuple[list[Settlement], Outage | None]:
    return judge(
        [(event(), reply)],
        holds or {},
        accepted_at or {},
        200.0,
        lambda _type: POLICY,
        anything_accepted=anything_accepted,
    )


def test_an_internal_error_where_nothing_is_accepted_is_an_outage() -> None:
    """The broker's trouble: the event stays as it is. Where others pass, its aggregate waits."""
    settlements, outage = verdict(refused(100), anything_accepted=False)
    assert settlements == []
    assert outage is not None
    assert "because" in outage.reason
    settlements, outage = verdict(refused(100))
    assert outage is None
    assert [type(settlement.outcome) for settlement in settlements] == [Held]


def test_a_held_event_brings_no_news_of_an_outage() -> None:
    """It was refused before: that it is again says nothing of the others, who are not there."""
    settlements, outage = verdict(refused(100), holds={OWN: OLD}, anything_accepted=False)
    assert outage is None
    assert isinstance(settlements[0].outcome, Held)


def test_other_refusals_are_the_namespaces_own_affair() -> None:
    """An unknown namespace is no outage, not even where nothing else was sent."""
    settlements, outage = verdict(refused(102), anything_accepted=False)
    assert outage is None
    assert isinstance(settlements[0].outcome, Held)


def test_each_refused_event_is_judged() -> None:
    """Whatever the one before it was: the broker's trouble, or in a bundle of which some channel took nothing."""
    pairs = [
        (event(1, "1"), refused(100)),
        (event(2, "2", ("chat:a", "chat:b")), refused(102)._replace(accepted=("chat:b",), bundled=True)),
        (event(3, "3"), refused(102)),
    ]
    settlements, outage = judge(pairs, {}, {}, 200.0, lambda _type: POLICY, anything_accepted=False)
    assert outage is not None
    assert settlements[0] == Settlement(pairs[1][0], UNSETTLED, ("chat:b",))
    assert [settlement.event.id for settlement in settlements] == [2, 3]
    assert isinstance(settlements[1].outcome, Held)


def test_what_is_not_said() -> None:
    """The documented defaults, and that nothing is assumed of an event, a hold, an end or an outage."""
    assert Policy() == Policy(10, 900.0, 1.0, 60.0, False, math.inf, True, False)
    assert (event().tried, event().epoch) == (False, "")
    assert Held(1, 0, 1.0, "") == Held(1, 0, 1.0, "", alone=False)
    assert GivenUp("dead") == GivenUp("dead", None, wait=False)
    assert Outage("") == Outage("", None, verdict=0)
    assert GivenUp("superseded") == SUPERSEDED


def test_the_clock_goes_on_while_the_machine_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(time, "clock_gettime", asked.append)
    boottime()
    assert asked == [time.CLOCK_BOOTTIME]


@pytest.mark.parametrize(
    ("accepted_at", "dead"),
    [
        ({"chat": AFTER}, True),
        ({"chat": BEFORE}, False),
        ({"news": AFTER}, False),
        ({}, False),
    ],
)
def test_evidence_comes_from_the_same_namespace(accepted_at: dict[str, float], dead: bool) -> None:
    """That another namespace works says nothing about this one."""
    [settlement], _ = verdict(refused(102), holds={OWN: OLD}, accepted_at=accepted_at)
    assert isinstance(settlement.outcome, Owed) is dead


def test_every_refusing_namespace_needs_evidence() -> None:
    """Refused in two namespaces, of which one accepts nothing from anybody: not the event's fault yet."""
    reply = Reply((Refusal("chat:a", 102, ""), Refusal("news:a", 102, "")), accepted=("plain:a",))
    [settlement], _ = verdict(reply, holds={OWN: OLD}, accepted_at={"chat": AFTER})
    assert isinstance(settlement.outcome, Held)
    assert settlement.accepted == ("plain:a",)
    [settlement], _ = verdict(reply, holds={OWN: OLD}, accepted_at={"chat": AFTER, "news": AFTER})
    assert isinstance(settlement.outcome, Owed)


def test_a_hold_counts_for_its_head_alone() -> None:
    """The event that follows a dead one starts anew."""
    held = {OWN: replace(OLD, head_id=0)}
    [settlement], _ = verdict(refused(102), holds=held, accepted_at={"chat": AFTER})
    assert isinstance(settlement.outcome, Held)
    assert (settlement.outcome.tries, settlement.outcome.attempts) == (1, 0)


def test_each_type_has_its_policy() -> None:
    """The policy is asked for by the aggregate's type."""
    asked: list[str] = []

    def policy_of(aggregate_type: str) -> Policy:
        asked.append(aggregate_type)
        return replace(POLICY, max_attempts=99)

    pairs = [(event(), refused(102))]
    [settlement], _ = judge(pairs, {OWN: OLD}, {"chat": AFTER}, 200.0, policy_of, anything_accepted=True)
    assert isinstance(settlement.outcome, Held)
    assert asked == ["order"]


# Requests that failed whole


def rounds(suspects: Suspects, batch: list[Event], bad: set[int], limit: int) -> list[int]:
    """Send a batch again and again, as a worker does, until nothing of it is left: whoever is sent together with
    a bad one fails, and others pass all the time. Returns who was found guilty, in at most `limit` requests."""
    guilty: list[int] = []
    requests = 0
    clock = accepted_at = 0.0
    left = list(batch)
    while left:
        clock += 1.0
        accepted_at = clock
        free, apart = suspects.part(left, set())
        for request in [free, *apart]:
            if not request:
                continue
            requests += 1
            assert requests <= limit, f"{len(left)} left, {guilty} found"
            clock += 1.0
            ids = {sent.id for sent in request}
            if not ids & bad:
                suspects.answered(request)
            elif suspects.failed(request, clock + 0.5, accepted_at):
                guilty += ids
            else:
                continue
            left = [kept for kept in left if kept.id not in ids]
    return guilty


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(2, 1_000), st.data())
def test_the_guilty_are_found_among_many(size: int, data: st.DataObject) -> None:
    """Whoever breaks whole requests is found, nobody else is, and it takes a few requests per guilty one."""
    bad = data.draw(st.sets(st.integers(1, size), min_size=1, max_size=min(3, size - 1)))
    batch = [event(id_, str(id_)) for id_ in range(1, size + 1)]
    assert sorted(rounds(Suspects(), batch, bad, limit=22 * len(bad))) == sorted(bad)


def test_an_outage_blames_nobody() -> None:
    """While nothing is accepted anywhere a failure is no evidence, however often it comes; afterwards all pass."""
    suspects = Suspects()
    batch = [event(id_, str(id_)) for id_ in range(1, 101)]
    assert not suspects.failed(batch, 1.0, accepted_at=0.0)
    for now in range(2, 500):
        free, apart = suspects.part(batch, set())
        assert free == []
        assert sum(map(len, apart)) == 100
        assert not suspects.failed(apart[0], float(now), accepted_at=0.0)
    for request in apart:
        suspects.answered(request)
    assert suspects.part(batch, set()) == (batch, [])


def test_a_few_innocents_among_many_guilty_are_found() -> None:
    """Each half of what failed has somebody guilty in it, and nothing else is there to show that there is no outage."""
    suspects = Suspects()
    batch = [event(id_, str(id_)) for id_ in range(1, 9)]
    bad = {1, 2, 3, 5, 6, 7}
    assert not suspects.failed(batch, 1.0, accepted_at=0.0)
    clock, accepted_at, innocent = 1.0, 0.0, set()
    for _ in range(40):
        clock += 1.0
        _, apart = suspects.part([sent for sent in batch if sent.id not in innocent], set())
        if not apart:
            break
        ids = {sent.id for sent in apart[0]}
        if ids & bad:
            suspects.failed(apart[0], clock, accepted_at)
        else:
            suspects.answered(apart[0])
            innocent |= ids
            accepted_at = clock
    assert innocent == {4, 8}


def test_a_suspects_successors_wait() -> None:
    """Order holds among suspects too; the other aggregates are free to go."""
    suspects = Suspects()
    head, successor, other = event(1, "1"), event(2, "1"), event(3, "2")
    suspects.failed([head], 1.0, 0.0)
    assert suspects.part([head, successor, other], set()) == ([other], [[head]])
    suspects.answered([head])
    assert suspects.part([head, successor, other], set()) == ([head, successor, other], [])


def test_what_was_accepted_before_the_failure_proves_nothing() -> None:
    """Nor does what was sent at that very moment."""
    suspects = Suspects()
    assert not suspects.failed([event(1, "1")], 2.0, 5.0)
    assert not suspects.failed([event(1, "1")], 3.0, 2.0)
    assert suspects.failed([event(1, "1")], 4.0, 3.1)
    assert suspects.part([event(1, "1")], set()) == ([event(1, "1")], [])


def test_whoever_must_go_alone_does() -> None:
    """A hold that says so gives its head a request of its own."""
    first, second = event(1, "1"), event(2, "2")
    assert Suspects().part([first, second], {1}) == ([second], [[first]])


def test_memory_is_bounded() -> None:
    """The oldest suspicions are forgotten first."""
    suspects = Suspects(limit=2)
    batch = [event(id_, str(id_)) for id_ in (1, 2, 3)]
    for written in batch:
        suspects.failed([written], 1.0, 0.0)
    assert suspects.part(batch, set()) == ([batch[0]], [[batch[1]], [batch[2]]])
    suspects.failed(batch[1:2], 2.0, 0.0)
    suspects.failed(batch[:1], 2.0, 0.0)
    assert suspects.part(batch, set())[0] == [batch[2]]  # the one that has not failed again
