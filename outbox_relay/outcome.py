"""What became of an event: values and decisions, without database or network.

`decide` is the one place that says what a refusal means. Times are seconds on the database's clock.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

# Goes on while the machine sleeps or the process is stopped, where `time.monotonic` may not.
_BOOTTIME: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boottime() -> float:
    """Seconds since boot, the clock of every deadline."""
    return time.clock_gettime(_BOOTTIME)


class Event(NamedTuple):
    """One outbox row on its way. `payload` and `tags` are JSON text, exactly as stored, never parsed."""

    id: int
    event_id: str
    aggregate_type: str
    aggregate_id: str
    lane: int
    version: int
    kind: str
    channels: list[str]
    payload: str
    tags: str | None
    accepted: list[str] | None

    @property
    def aggregate(self) -> tuple[str, str]:
        return self.aggregate_type, self.aggregate_id

    @property
    def unsent(self) -> list[str]:
        """The channels that have not accepted this event yet."""
        if not self.accepted:
            return self.channels
        return [channel for channel in self.channels if channel not in self.accepted]


class Refusal(NamedTuple):
    """Centrifugo's error for one channel of one event; codes in its `apiproto/errors.go`."""

    channel: str
    code: int
    message: str


class Reply(NamedTuple):
    """Centrifugo's answer for one event: who refused it, and which channels accepted it all the same."""

    refusals: tuple[Refusal, ...]
    accepted: tuple[str, ...] = ()


ACCEPTED: Final = Reply(())
"""The answer for an event that all its channels accepted."""


@dataclass(frozen=True, slots=True)
class Outage:
    """A request that failed whole: no event's fault until something else is accepted.

    `retry_after` is Centrifugo's or a proxy's own wish, in seconds. `timed_out` says that a smaller request
    may pass where this one did not.
    """

    reason: str
    retry_after: float | None = None
    timed_out: bool = False


@dataclass(frozen=True, slots=True)
class Hold:
    """An aggregate that waits. Everything counts for the head event alone, and starts anew with the next.

    `tries` are refusals in a row, `attempts` those that were the event's own fault.
    """

    head_id: int
    tries: int
    attempts: int
    first_refused_at: float
    refused_at: float


@dataclass(frozen=True, slots=True)
class Policy:
    """When an event is given up, and how long its aggregate waits in between; seconds."""

    max_attempts: int = 10
    min_age: float = 15 * 60
    backoff_base: float = 1.0
    backoff_max: float = 60.0


@dataclass(frozen=True, slots=True)
class Held:
    """Some channel refused the event: its aggregate waits `delay` seconds, nobody else does."""

    tries: int
    attempts: int
    delay: float
    error: str


@dataclass(frozen=True, slots=True)
class Dead:
    """The event is given up, with its reason."""

    error: str


Outcome = Held | Dead
"""What becomes of an event that was refused. The others are delivered."""


class Settlement(NamedTuple):
    """A refused event's outcome, and the channels that accepted it this time."""

    event: Event
    outcome: Outcome
    accepted: tuple[str, ...]


# Centrifugo's codes that can never become a success by waiting: unknown command, bad request.
PERMANENT: Final = frozenset({104, 107})
# "Internal": a broker failure, or anything at all. It says nothing about the event, so it never kills one.
INTERNAL: Final = 100


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
    jitter: float | None = None,
) -> Outcome:
    """Say what a refused event becomes.

    `hold` is the wait that this event is the head of, if there is one. `others_accepted_at` is when the
    last request was sent in which this event's namespaces accepted something. A refusal is the event's own
    fault only if, since then, another aggregate of the same namespace was accepted in a request sent after
    the refusal; so a refusal is judged when the next one arrives, and the first never counts. The held
    aggregate itself sends nothing in between, so whatever was accepted there belongs to another one.
    """
    codes = {refusal.code for refusal in reply.refusals}
    first = reply.refusals[0]
    error = f"Centrifugo refused channel {first.channel!r} with {first.code}: {first.message}"[:1000]
    if hold is None:
        tries, attempts, age = 1, 0, 0.0
    else:
        blamed = INTERNAL not in codes and others_accepted_at > hold.refused_at
        tries, attempts, age = hold.tries + 1, hold.attempts + blamed, now - hold.first_refused_at
        hopeless = bool(codes & PERMANENT) or (attempts >= policy.max_attempts and age >= policy.min_age)
        if blamed and hopeless:
            return Dead(error)
    delay = backoff(tries, policy.backoff_base, policy.backoff_max, jitter)
    return Held(tries=tries, attempts=attempts, delay=delay, error=error)


def judge(
    refused: Sequence[tuple[Event, Reply]],
    holds: Mapping[tuple[str, str], Hold],
    accepted_at: Mapping[str, float],
    now: float,
    policy: Policy,
    *,
    anything_accepted: bool,
) -> tuple[list[Settlement], Outage | None]:
    """Say what becomes of a batch's refused events, and whether Centrifugo itself is in trouble.

    `holds` are the due ones, by aggregate; `accepted_at` says for each namespace when the last request was
    sent in which it accepted something. Where nothing at all was accepted, an internal error is the broker's:
    the events stay as they are and the relay pauses. An event that was held before brings no such news.
    """
    settlements: list[Settlement] = []
    outage: Outage | None = None
    for event, reply in refused:
        hold = holds.get(event.aggregate)
        internal = [refusal for refusal in reply.refusals if refusal.code == INTERNAL]
        if internal and hold is None and not anything_accepted:
            outage = Outage(f"Centrifugo accepts nothing: error {INTERNAL}, {internal[0].message}")
            continue
        others = min(accepted_at.get(namespace(refusal.channel), 0.0) for refusal in reply.refusals)
        own_hold = hold if hold is not None and hold.head_id == event.id else None
        settlements.append(Settlement(event, decide(reply, own_hold, others, now, policy), reply.accepted))
    return settlements, outage
