"""The subscriber: a screen of orders, fed by Centrifugo, that is never stale and never goes backwards.

The rule of a client: subscribe, then load the state from the database; of each order show only what is newer
than what is shown; load again when Centrifugo could not recover what was missed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import centrifuge

from outbox_relay.demo.ledger import Ledger
from outbox_relay.demo.verdict import Row
from outbox_relay.embedded._process import EmbeddedError

LAST: Final = 20
READY_SECONDS: Final = 15


class Arrival(NamedTuple):
    """A publication: its lag in seconds, if it is known, and whether it was newer than what the screen showed."""

    order: str
    row: Row
    lag: float | None
    news: bool


class Screen:
    """What the subscriber shows, order by order."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.reloaded: dict[str, int] = {}
        self.last: tuple[Arrival, ...] = ()
        self.backwards = 0

    def receive(self, order: str, row: Row, lag: float | None = None) -> None:
        """Show an order's new state unless as new a one is shown already."""
        news = order not in self.rows or row.version > self.rows[order].version
        if news:
            self._draw(order, row)
        self.last = (*self.last, Arrival(order, row, lag, news))[-LAST:]

    def reload(self, orders: Mapping[str, Row]) -> None:
        """Take over the state of the database: it has everything that was committed before it was read."""
        for order, row in orders.items():
            self._draw(order, row)
        self.reloaded = {order: row.version for order, row in orders.items()}

    def _draw(self, order: str, row: Row) -> None:
        # Judged here, where it would be seen, whatever let it through.
        shown = self.rows.get(order)
        self.backwards += shown is not None and row.version < shown.version
        self.rows[order] = row


class Subscriber(centrifuge.SubscriptionEventHandler):  # type: ignore[misc]
    """A WebSocket client in a thread of its own, subscribed from the start of the `with` block to its end.

    `load` reads the orders from the database; `tell` hears when they had to be read again. Raises EmbeddedError
    if it cannot subscribe at first; later failures become troubles of the ledger.
    """

    def __init__(
        self, url: str, channel: str, load: Callable[[], Mapping[str, Row]], ledger: Ledger, tell: Callable[[str], None]
    ) -> None:
        self.screen = Screen()
        self.connected = False
        self._url = url
        self._channel = channel
        self._load = load
        self._ledger = ledger
        self._tell = tell
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="subscriber", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(READY_SECONDS):
            raise EmbeddedError(f"the subscriber could not subscribe within {READY_SECONDS} s")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(READY_SECONDS)

    def _run(self) -> None:
        try:
            asyncio.run(self._subscribe())
        except Exception as error:
            self._ledger.troubles.append(f"the subscriber failed: {error}")
            raise

    async def _subscribe(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._failed)
        # Never through a proxy that the environment names for the world outside.
        client = centrifuge.Client(self._url, max_reconnect_delay=0.5, proxy=None)
        await client.new_subscription(self._channel, self).subscribe()
        await client.connect()
        await self._closing.wait()
        await client.disconnect()

    def _failed(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._ledger.troubles.append(f"the subscriber failed: {context.get('exception') or context['message']}")

    async def on_subscribing(self, _context: centrifuge.SubscribingContext) -> None:
        self.connected = False

    async def on_subscribed(self, context: centrifuge.SubscribedContext) -> None:
        if not context.recovered:
            # Publications wait until this returns, so nothing can fall between the state and the stream.
            self.screen.reload(await asyncio.to_thread(self._load))
            self._ledger.reload(self.screen.reloaded)
            if context.was_recovering:
                self._tell("subscriber: not recovered, state reloaded from the database")
        self.connected = True
        self._ready.set()

    async def on_publication(self, context: centrifuge.PublicationContext) -> None:
        publication = context.pub
        tags: dict[str, str] = publication.tags
        lag = self._ledger.receive(tags["ob_event"])
        row = Row(int(tags["ob_version"]), publication.data["status"])
        self.screen.receive(tags["ob_id"], row, lag)
