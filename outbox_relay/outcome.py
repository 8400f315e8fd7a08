"""What became of an event: decisions, without database or network.

`decide` is the one place that says what a refusal means. Times are seconds on the database's clock.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from outbox_relay.event import GAP_ALONE, Event, Hold, Outage, Reply


@dataclass(frozen=True, slots=True)
class Policy:
    """When an event is given up, and how long its aggregate waits in between; seconds.

    `wait_after_dead`: the aggregate's later events wait for a person to requeue or discard the dead one. `max_age`: an
    event older than that has expired. `gap`: channels are told of an event that they will not get. `conflate`: an event
    that a later snapshot or tombstone makes needless is not sent.
    """

    max_attempts: int = 10
    min_age: float = 15 * 60
    backoff_base: float = 1.0
    backoff_max: float = 60.0
    wait_after_dead: bool = False
    max_age: float = math.inf
    gap: bool = True
    conflate: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """Some channel refused the event: its aggregate waits `delay` seconds, nobody else does."""

    tries: int
    attempts: int
    delay: float
    error: str
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Owed:
    """The event is given up, but keeps its place until its channels were told of the gap; then it ends as `ending`."""

    ending: str
    error: str


@dataclass(frozen=True, slots=True)
class GivenUp:
    """The event ends undelivered in `state`, with the reason if there is more to say.

    Its channels were told of the gap, or will not be. `wait` says that its aggregate waits for a person.
    """

    state: str
    error: str | None = None
    wait: bool = False


SUPERSEDED: Final = GivenUp("superseded")
"""The end of an event in whose place a later one was accepted by all its channels."""


@dataclass(frozen=True, slots=True)
class Unsettled:
    """The event has not ended. Only some channels have accepted it, and are remembered."""


UNSETTLED: Final = Unsettled()

Outcome = Held | Owed | GivenUp | Unsettled
"""What becomes of an event that was refused, or that is not sent. The others are delivered."""


class Settlement(NamedTuple):
    """An event's outcome, and the channels that accepted it, or its gap, this time."""

    event: Event
    outcome: Outcome
    accepted: tuple[str, ...]


# Centrifugo's codes that can never become a success by waiting: unknown command, bad request.
PERMANENT: Final = frozenset({104, 107})
# "Internal": a broker failure, or anything at all. It says nothing about the event, so it never kills one.
INTERNAL: Final = 100
# None of Centrifugo's codes: the request failed whole, with this event alone in it, and that says nothing about it.
UNANSWERED: Final = 0


def namespace(channel: str) -> str:
    """The part of a channel's name that selects its configuration (`channel.private_prefix` is `$`)."""
    name, boundary, _ = channel.removeprefix("$").partition(":")
    return name if boundary else ""


def backoff(tries: int, base: float, ceiling: float, jitter: float | None = None) -> float:
    """Seconds to wait after `tries` failures in a row: doubling, capped, spread over the upper half."""
    spread = random.random() if jitter is None else jitter  # noqa: S311 - spreads load, guards nothing
    return min(ceiling, base * 2.0 ** min(max(tries, 1) - 1, 32)) * (0.5 + 0.5 * spread)


def decide(
    reply: Reply,
    hold: Hold | None,
    others_accepted_at: float,
    now: float,
    policy: Policy,
    *,
    ending: str | None = None,
    jitter: float | None = None,
) -> Held | Owed | GivenUp:
    """Say what a refused event becomes.

    `hold` is the wait that this event is the head of, if there is one. `others_accepted_at` is when the
    last request was sent in which this event's namespaces accepted something. A refusal is the event's own
    fault only if, since then, another aggregate of the same namespace was accepted in a request sent after
    the refusal; so a refusal is judged when the next one arrives, and the first never counts. The held
    aggregate itself sends nothing in between, so whatever was accepted there belongs to another one.
    `ending` says that what was refused is not the event but its gap: one such refusal ends it, untold.
    """
    codes = {refusal.code for refusal in reply.refusals}
    first = reply.refusals[0]
    alone = first.code <= UNANSWERED
    refused = f"Centrifugo refused channel {first.channel!r} with {first.code}: {first.message}"
    error = (f"sent alone, its request failed: {first.message}" if alone else refused)[:1000]
    if hold is None or not hold.tries:
        tries, attempts, age = 1, 0, 0.0
    else:
        blamed = not codes & {INTERNAL, UNANSWERED} and others_accepted_at > hold.refused_at
        tries, attempts, age = hold.tries + 1, hold.attempts + blamed, now - hold.first_refused_at
        hopeless = bool(codes & PERMANENT) or (attempts >= policy.max_attempts and age >= policy.min_age)
        if blamed and ending:
            return given_up(ending, policy, f"the gap is untold: {error}")
        if blamed and hopeless:
            return Owed("dead", error) if policy.gap else given_up("dead", policy, error)
    delay = backoff(tries, policy.backoff_base, policy.backoff_max, jitter)
    return Held(tries=tries, attempts=attempts, delay=delay, error=error, alone=alone)


def given_up(state: str, policy: Policy, error: str | None = None) -> GivenUp:
    """The end of an event whose gap was told, or that owes none; `error` where it owes one that nobody takes."""
    return GivenUp(state, error, wait=state == "dead" and policy.wait_after_dead)


def judge(
    refused: Sequence[tuple[Event, Reply]],
    holds: Mapping[tuple[str, str], Hold],
    accepted_at: Mapping[str, float],
    now: float,
    policy_of: Callable[[str], Policy],
    *,
    anything_accepted: bool,
) -> tuple[list[Settlement], Outage | None]:
    """Say what becomes of a batch's refused events, and whether Centrifugo itself is in trouble.

    `holds` are the due ones, by aggregate; `accepted_at` says for each namespace when the last request was
    sent in which it accepted something. Where nothing at all was accepted, an internal error is the broker's:
    the events stay as they are and the relay pauses. An event that was held before brings no such news.
    `policy_of` gives the policy of an aggregate type.
    """
    settlements: list[Settlement] = []
    outage: Outage | None = None
    for event, reply in refused:
        hold = holds.get(event.aggregate)
        internal = [refusal for refusal in reply.refusals if refusal.code == INTERNAL]
        if internal and hold is None and not anything_accepted:
            outage = Outage(f"Centrifugo accepts nothing: error {INTERNAL}, {internal[0].message}")
            continue
        accepted = (GAP_ALONE, *reply.accepted) if event.ending and reply.accepted else reply.accepted
        if reply.bundled:
            settlements.append(Settlement(event, UNSETTLED, accepted))
            continue
        others = min(accepted_at.get(namespace(refusal.channel), 0.0) for refusal in reply.refusals)
        own_hold = hold if hold is not None and hold.head_id == event.id else None
        outcome = decide(reply, own_hold, others, now, policy_of(event.aggregate_type), ending=event.ending)
        settlements.append(Settlement(event, outcome, accepted))
    return settlements, outage
