"""Values on an event's way: itself, the hold it heads, Centrifugo's answer. No decisions, no database, no network."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, NamedTuple

# Goes on while the machine sleeps or the process is stopped, where `time.monotonic` may not.
_BOOTTIME: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boottime() -> float:
    """Seconds since boot, the clock of every deadline."""
    return time.clock_gettime(_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Clock:
    """The database's clock (seconds since 1970), read once and carried on without asking."""

    epoch: float
    read_at: float

    def now(self) -> float:
        return self.epoch + boottime() - self.read_at


GAP_ALONE: Final = ""
"""Stands in a row's `accepted` before channels that took the event's gap, and not the event."""


# Not a tuple: a field of a named one takes Python five times as long to find, and each event is asked for some forty.
# Not frozen: it would be made in a loop of calls, one for each field.
@dataclass(slots=True)
class Event:
    """One outbox row on its way; nobody changes it. `payload` and `tags` are JSON text, as stored, never parsed."""

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
