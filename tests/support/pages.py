"""Pages of the shop, which show its orders by means of our client helpers: in Python, and in Node.js."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import centrifuge

from outbox_relay.client import Live, Loaded
from tests.support.node import CLIENT, install, node
from tests.support.shop import Order, Shop, Website
from tests.support.waiting import PATIENCE


class View(NamedTuple):
    """What a page showed at one moment. `counters` by name, as in the helpers."""

    shown: dict[str, Order]
    old: bool
    counters: dict[str, int]


class Page(Protocol):
    """Every view that it has shown, oldest first; more come while it is open."""

    views: list[View]

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


OpenPage = Callable[[str, Shop, Website], Page]
"""(WebSocket address, shop, its website) -> the page, which opens with its `with` block."""


class PythonPage:
    """`outbox_relay.client` in a thread of its own."""

    def __init__(self, url: str, shop: Shop, website: Website) -> None:
        self.views: list[View] = []
        self._url = url
        self._shop = shop
        self._website = website
        self._closing: asyncio.Event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._follow()), name="page", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the page does not close"

    async def _follow(self) -> None:
        self._loop = asyncio.get_running_loop()
        client = centrifuge.Client(self._url, max_reconnect_delay=0.2, proxy=None)
        live = Live(
            client,
            self._shop.channel,
            load=self._load,
            key=lambda order: str(order["id"]),
            version=lambda order: int(order["version"]),
            on_change=self._changed,
        )
        async with live:
            await client.connect()
            await self._closing.wait()
        await client.disconnect()
        await let_close()

    async def _load(self, keys: tuple[str, ...] | None) -> Loaded[dict[str, Any]]:
        self._website.requests.append(None if keys is None else list(keys))
        if self._website.failing:
            raise ConnectionError("the state is not to be had")
        return Loaded(**await asyncio.to_thread(self._shop.state, None if keys is None else list(keys)))

    def _changed(self, live: Live[dict[str, Any]]) -> None:
        shown = {key: Order(shown.version, shown.data["status"]) for key, shown in live.objects.items()}
        counters = live.counters
        names = ("applied", "stale", "duplicate", "gaps", "reloads")
        self.views.append(View(shown, live.old, {name: getattr(counters, name) for name in names}))


async def let_close() -> None:
    """Let the tasks end in which centrifuge-python closes its socket after `disconnect`."""
    if closing := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(closing, timeout=PATIENCE)


class NodePage:
    """`clients/js` in a process of Node.js. `environment` is what `follow.js` says."""

    def __init__(self, url: str, shop: Shop, website: Website, *, environment: Mapping[str, str] | None = None) -> None:
        self.views: list[View] = []
        self._arguments = [url, shop.channel, f"{website.url}/orders"]
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> Self:
        install()
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [node(), "--experimental-websocket", CLIENT / "test" / "follow.js", *self._arguments],
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=self._environment,
        )
        self._thread = threading.Thread(target=self._read, name="page", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(PATIENCE)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._stderr.close()

    @property
    def errors(self) -> str:
        """What it has written to stderr, while it is open."""
        return os.pread(self._stderr.fileno(), 100_000, 0).decode()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            view = json.loads(line)
            shown = {key: Order(*order) for key, order in view["shown"].items()}
            self.views.append(View(shown, view["old"], view["counters"]))
