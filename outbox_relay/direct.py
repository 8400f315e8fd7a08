"""Publishing without the outbox: at once, and at most once, for what may be lost, such as who is typing.

    publish("typing", order.id, channels=f"live:order-{order.id}", payload={"by": user.name})

The settings, the client, the checks and the tags are those of the relay. What is published here belongs to no
transaction: it is out before a commit, and stays out after a rollback.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

from outbox_relay import config
from outbox_relay.build import build_publisher
from outbox_relay.centrifugo import Centrifugo
from outbox_relay.config import Settings
from outbox_relay.event import Event, Outage, Refusal, Reply
from outbox_relay.outbox import DEFAULT_MAX_PAYLOAD, Kind, NewEvent, checked

IDLE_CONNECTIONS: Final = 8


class PublishError(Exception):
    """Something was not accepted by Centrifugo, or nobody knows whether it was."""


class UnavailableError(PublishError):
    """No answer that is one: no connection, a time-out, an HTTP status, a wrong key. It may have been published."""

    def __init__(self, outage: Outage) -> None:
        super().__init__(outage.reason)
        self.retry_after = outage.retry_after


class RefusedError(PublishError):
    """Centrifugo's own error, which comes inside a success of HTTP; codes in its `apiproto/errors.go`.

    `code` is that of the first refusal, `refusals` has one for each channel that did not accept it, `accepted` are
    the channels that did.
    """

    def __init__(self, reply: Reply) -> None:
        first = reply.refusals[0]
        super().__init__(f"Centrifugo refused channel {first.channel!r} with {first.code}: {first.message}")
        self.code = first.code
        self.refusals: tuple[Refusal, ...] = reply.refusals
        self.accepted = reply.accepted


class InternalError(RefusedError):
    """100: Centrifugo's broker failed, or anything else. It may succeed later."""


class UnknownChannelError(RefusedError):
    """102: Centrifugo's configuration has no such namespace."""


class BadRequestError(RefusedError):
    """107: Centrifugo will never accept this."""


class NotAvailableError(RefusedError):
    """108: the channel's namespace does not allow it."""


_BY_CODE: Final = {100: InternalError, 102: UnknownChannelError, 107: BadRequestError, 108: NotAvailableError}


class Direct:
    """Publishes directly to the Centrifugo of these settings; by default those that `outbox-relay run` would read.

    Safe to share between threads: each call has a connection to itself, and up to `IDLE_CONNECTIONS` are kept.
    Raises `ConfigError` for settings that are missing or wrong.
    """

    def __init__(self, settings: Settings | None = None, *, max_payload: int = DEFAULT_MAX_PAYLOAD) -> None:
        self._settings = settings or config.load({})
        self._max_payload = max_payload
        self._idle: deque[Centrifugo] = deque([build_publisher(self._settings)])

    def publish(
        self,
        aggregate_type: str,
        aggregate_id: str | int | uuid.UUID,
        *,
        channels: str | Iterable[str],
        payload: Any,
        version: int | None = None,
        kind: Kind = "change",
        tags: Mapping[str, str] | None = None,
        event_id: uuid.UUID | None = None,
        base_version: int | None = None,
        epoch: str = "",
    ) -> None:
        """Publish at once, and return when all channels have accepted it. Fields as those of `enqueue`.

        Without a `version` it is the present time in microseconds, so that of two of an object the later one counts.
        `epoch` is what `SELECT outbox_epoch()` says, for an object that the outbox's events are about too. A repetition
        with the same `event_id` is swallowed by Centrifugo within 5 minutes.

        Raises `InvalidEventError` before anything is sent, `UnavailableError` within the setting `request_timeout`, and
        `RefusedError` or one of its kinds. Nothing is tried again.
        """
        new = NewEvent(
            aggregate_type=aggregate_type,
            aggregate_id=aggregate_id,
            version=time.time_ns() // 1_000 if version is None else version,
            channels=channels,
            payload=payload,
            kind=kind,
            tags=tags,
            event_id=event_id or uuid.uuid4(),
            base_version=base_version,
        )
        event = _event(checked(new, self._max_payload), epoch)
        with self._connection() as centrifugo:
            answer = centrifugo.publish([event])
        if isinstance(answer, Outage):
            raise UnavailableError(answer)
        [reply] = answer
        if reply.refusals:
            raise _BY_CODE.get(reply.refusals[0].code, RefusedError)(reply)

    async def apublish(self, aggregate_type: str, aggregate_id: str | int | uuid.UUID, **event: Any) -> None:
        """`publish` for a coroutine, with the same arguments. It runs in a thread: a cancellation does not undo it."""
        await asyncio.to_thread(self.publish, aggregate_type, aggregate_id, **event)

    def close(self) -> None:
        """Close the connections that are kept."""
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _connection(self) -> Iterator[Centrifugo]:
        """A connection that nobody else uses meanwhile."""
        try:
            centrifugo = self._idle.pop()
        except IndexError:
            centrifugo = build_publisher(self._settings)
        try:
            yield centrifugo
        finally:
            if len(self._idle) < IDLE_CONNECTIONS:
                self._idle.append(centrifugo)
            else:
                centrifugo.close()


def _event(row: Mapping[str, Any], epoch: str) -> Event:
    return Event(
        id=0,
        event_id=str(row["event_id"]),
        aggregate_type=row["aggregate_type"],
        aggregate_id=row["aggregate_id"],
        lane=0,
        version=row["version"],
        kind=row.get("kind", "change"),
        channels=row["channels"],
        payload=row["payload"],
        tags=row.get("tags"),
        accepted=None,
        created_at=time.time(),
        base_version=row.get("base_version"),
        epoch=epoch,
    )


@cache
def default() -> Direct:
    """The one that `publish` and `apublish` use, made at the first use."""
    return Direct()


def publish(aggregate_type: str, aggregate_id: str | int | uuid.UUID, **event: Any) -> None:
    """`Direct.publish` with the settings of this process's environment and file."""
    default().publish(aggregate_type, aggregate_id, **event)


async def apublish(aggregate_type: str, aggregate_id: str | int | uuid.UUID, **event: Any) -> None:
    """`Direct.apublish` with the settings of this process's environment and file."""
    await default().apublish(aggregate_type, aggregate_id, **event)
