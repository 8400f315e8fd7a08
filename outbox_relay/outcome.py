"""What became of an event: values and decisions, without clock, database or network.

`decide` is the one place that says what a refusal means. Times are seconds on the database's clock.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final, NamedTuple

MAX_VERSION: Final = 2**53 - 1
"""Largest version that JavaScript and Redis (doubles) compare exactly."""


class Event(NamedTuple):
    """One outbox row on its way. `payload` and `tags` are JSON text, exactly as stored."""

    id: int
    event_id: str
    aggregate_type: str
    aggregate_id: str
    lane: int
    version: int
    kind: str
    channels: list[str]
    payload: bytes
    tags: bytes | None
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
    """Centrifugo's answer for one event: the channels that accepted it and those that refused it."""

    accepted: tuple[str, ...]
    refusals: tuple[Refusal, ...]


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
class Delivered:
    """Every channel has accepted the event."""


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


Outcome = Delivered | Held | Dead

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
    jitter: float | None = None,
) -> Outcome:
    """Say what an answered event becomes.

    `hold` is the wait that this event is the head of, if there is one. `others_accepted_at` is when the
    last request was sent in which this event's namespaces accepted something. A refusal is the event's own
    fault only if, since then, another aggregate of the same namespace was accepted in a request sent after
    the refusal; so a refusal is judged when the next one arrives, and the first never counts. The held
    aggregate itself sends nothing in between, so whatever was accepted there belongs to another one.
    """
    if not reply.refusals:
        return Delivered()
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
