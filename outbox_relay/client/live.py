"""Objects in memory as the database has them, over centrifuge-python."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import centrifuge

from outbox_relay.client.replica import MEMORY, Counters, Load, Object, Reduce, Replica, State, id_of

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """What a `load` may return: the objects, and the epoch that their versions belong to."""

    objects: Iterable[T]
    epoch: str | None = None


class Live(Generic[T]):
    """Follows a channel from the start of the `async with` block to its end, in one event loop.

    `load` gets the keys that are asked for, or None: everything. It reads them from the database and has 10 s. It
    must not read what is older than the call: no replica that lags, no cache. `key` and `version` tell them of a
    loaded object; a key is a string. `key_of` tells the key from the tags of an event, by default `ob_id`.

    `on_change` is called with this object, soon after something has changed: `objects`, by key, each with `version`,
    `data` and `old`; `old`, whether the whole may be behind; `changed`, the keys that have changed since the last
    call. `reduce` makes the new object of the old one and the data of a change; without it, and where it returns
    None, a changed object is loaded. `memory` bounds how many deleted objects are remembered.

    Failures of the functions are logged; a load that has failed is repeated. So is why a subscription has ended for
    good: centrifuge-python 0.7 cannot subscribe to map channels, and Centrifugo says "permission denied".
    """

    def __init__(
        self,
        client: centrifuge.Client,
        channel: str,
        *,
        load: Callable[[tuple[str, ...] | None], Awaitable[Loaded[T] | Iterable[T]]],
        key: Callable[[T], str],
        version: Callable[[T], int],
        on_change: Callable[[Live[T]], None],
        reduce: Reduce | None = None,
        key_of: Callable[[Mapping[str, str]], str] = id_of,
        memory: int = MEMORY,
    ) -> None:
        self.changed: set[str] = set()
        self._client = client
        self._load = load
        self._key = key
        self._version = version
        self._on_change = on_change
        self._replica = Replica(key_of=key_of, reduce=_guarded(reduce) if reduce else None, memory=memory)
        self._subscription = client.new_subscription(channel, _Handler(channel, self._step, self._replica))
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._announcement: asyncio.Handle | None = None
        self._was_old = True
        self._closed = False

    async def __aenter__(self) -> Self:
        self._step(self._replica.wake)
        await self._subscription.subscribe()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        for handle in (self._timer, self._announcement):
            if handle is not None:
                handle.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._subscription.unsubscribe()
        self._client.remove_subscription(self._subscription)

    @property
    def objects(self) -> Mapping[str, Object]:
        return self._replica.objects

    @property
    def old(self) -> bool:
        return self._replica.old

    @property
    def epoch(self) -> str | None:
        return self._replica.epoch

    @property
    def counters(self) -> Counters:
        return self._replica.counters

    def reload(self) -> None:
        """Load everything again."""
        self._step(self._replica.reload)

    def _step(self, tell: Callable[..., Load | None], *args: Any, **named: Any) -> None:
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        load = tell(loop.time(), *args, **named)
        if load is not None:
            task = loop.create_task(self._answer(load))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._timer is not None:
            self._timer.cancel()
        due = self._replica.due
        self._timer = loop.call_at(due, self._step, self._replica.wake) if due < float("inf") else None
        if self._announcement is None:
            self._announcement = loop.call_soon(self._announce)

    async def _answer(self, load: Load) -> None:
        try:
            answer = await self._load(load.keys)
            loaded = answer if isinstance(answer, Loaded) else Loaded(answer)
            rows = [(self._key(data), self._version(data), data) for data in loaded.objects]
            self._step(self._replica.loaded, load.id, State(rows, loaded.epoch))
        except Exception:
            log.exception("a load has failed")
            self._step(self._replica.failed, load.id)

    def _announce(self) -> None:
        self._announcement = None
        self.changed = self._replica.take_changed()
        if not self.changed and self._was_old == self.old:
            return
        self._was_old = self.old
        try:
            self._on_change(self)
        except Exception:
            log.exception("on_change has failed")


def _guarded(reduce: Reduce) -> Reduce:
    """A reducer that fails cannot tell."""

    def guarded(data: Any, change: Any, tags: Mapping[str, str]) -> Any:
        try:
            return reduce(data, change, tags)
        except Exception:
            log.exception("the reducer has failed")
            return None

    return guarded


class _Handler(centrifuge.SubscriptionEventHandler):  # type: ignore[misc]
    """What centrifuge-python calls."""

    def __init__(self, channel: str, step: Callable[..., None], replica: Replica) -> None:
        self._channel = channel
        self._step = step
        self._replica = replica

    async def on_subscribing(self, _context: centrifuge.SubscribingContext) -> None:
        self._step(self._replica.lost)

    async def on_unsubscribed(self, context: centrifuge.UnsubscribedContext) -> None:
        self._step(self._replica.lost)
        if context.code:  # 0: it was our own wish
            log.warning("no subscription to %s: %s", self._channel, context.reason)

    async def on_subscribed(self, context: centrifuge.SubscribedContext) -> None:
        self._step(self._replica.subscribed, recovered=context.recovered)

    async def on_publication(self, context: centrifuge.PublicationContext) -> None:
        self._step(self._replica.published, context.pub.data, context.pub.tags)
