"""What became of an event: values and decisions, without database or network.

`decide` is the one place that says what a refusal means. Times are seconds on the database's clock.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Container, Mapping, Sequence
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
    created_at: float
    replay: int | None = None
    """How often an operator has asked to send it again after it was delivered."""
    base_version: int | None = None
    """The version that this change applies to."""
    epoch: str = ""
    """What the database's epoch was when the event was read under its lane's lock."""
    expires_at: float | None = None
    ending: str | None = None
    """The state in which it ends once its channels were told of the gap. It is not sent itself any more."""
    tried: bool = False
    """It was refused before: it travels in no bundle, so that nothing but itself can be to blame."""

    @property
    def aggregate(self) -> tuple[str, str]:
        return self.aggregate_type, self.aggregate_id

    @property
    def idempotency_key(self) -> str:
        """A repeated event_id of the caller's must not swallow an event, nor must a replay be swallowed."""
        key = f"{self.event_id}:{self.id}"
        if self.replay is not None:
            key = f"{key}:r{self.replay}"
        return f"{key}:gap" if self.ending else key

    @property
    def unsent(self) -> list[str]:
        """The channels that have not accepted this event yet."""
        if not self.accepted:
            return self.channels
        return [channel for channel in self.channels if channel not in self.accepted]


class Refusal(NamedTuple):
    """Centrifugo's error for one channel of one event; codes in its `apiproto/errors.go`.

    Where a request with this event alone failed whole, `code` is minus the `verdict` of its `Outage`.
    """

    channel: str
    code: int
    message: str


class Reply(NamedTuple):
    """Centrifugo's answer for one event: who refused it, and which channels accepted it all the same.

    `bundled`: some channel refused a bundle, and which of its events is to blame is not known.
    """

    refusals: tuple[Refusal, ...]
    accepted: tuple[str, ...] = ()
    bundled: bool = False


OVERTAKEN: Final = Reply(())
"""The answer for an event of which all channels have a newer version of its aggregate."""
ACCEPTED: Final = Reply(())
"""The answer for an event that all its channels accepted."""


@dataclass(frozen=True, slots=True)
class Outage:
    """A request that failed whole: no event's fault until something else is accepted.

    `retry_after` is Centrifugo's or a proxy's own wish, in seconds. `verdict` is the HTTP status that may be the
    request's own fault, or 1 where the connection was cut after it was sent; else 0, as for a time-out: a frozen
    Redis shard behind Centrifugo looks just so, for ever.
    """

    reason: str
    retry_after: float | None = None
    verdict: int = 0


@dataclass(frozen=True, slots=True)
class Hold:
    """An aggregate that waits. Everything counts for the head event alone, and starts anew with the next.

    `tries` are refusals in a row, `attempts` those that were the event's own fault. `alone` says that requests
    failed whole because of the head, so that it is sent in a request of its own.
    """

    head_id: int
    tries: int
    attempts: int
    alone: bool
    first_refused_at: float
    refused_at: float


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
    """The event stays as it is. Only some channels have accepted it, or the one in its place, and are remembered."""


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
        if reply.bundled:
            settlements.append(Settlement(event, UNSETTLED, reply.accepted))
            continue
        others = min(accepted_at.get(namespace(refusal.channel), 0.0) for refusal in reply.refusals)
        own_hold = hold if hold is not None and hold.head_id == event.id else None
        outcome = decide(reply, own_hold, others, now, policy_of(event.aggregate_type), ending=event.ending)
        settlements.append(Settlement(event, outcome, reply.accepted))
    return settlements, outage


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
        self._group_of: dict[int, _Group] = {}

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
            del self._group_of[next(iter(self._group_of))]
        return False

    def answered(self, events: Sequence[Event]) -> None:
        """Clear events that got an answer of their own."""
        if self._group_of:
            for event in events:
                self._group_of.pop(event.id, None)
