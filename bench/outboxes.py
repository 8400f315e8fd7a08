"""Outboxes in some state, opened anew for every measurement."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Final, Protocol

import psycopg

from bench import stage
from bench.bulk import Stretch, append
from outbox_relay.embedded.postgres import Postgres

_LOOK_SECONDS: Final = 0.01
_STEP_SECONDS: Final = 0.1
_PENDING: Final = "SELECT count(*) FROM outbox WHERE state = 'pending'"


class Outbox(Protocol):
    """`open` yields the URL of a database in which at least `events` are pending, or will be before they are missed."""

    def open(self, events: int) -> AbstractContextManager[str]: ...


class Copied:
    """A fresh copy of a template each time."""

    def __init__(self, server: Postgres, template: str) -> None:
        self._server = server
        self._template = template

    def open(self, events: int) -> AbstractContextManager[str]:  # noqa: ARG002 - as many as the template has
        return stage.database(self._server, self._template)


class Standing:
    """One database with a backlog that outlasts all measurements together."""

    def __init__(self, url: str) -> None:
        self._url = url

    def open(self, events: int) -> AbstractContextManager[str]:  # noqa: ARG002 - always enough
        return nullcontext(self._url)


class Refilled:
    """One database that gets as many events more, each time; they go on where `stretch` ends."""

    def __init__(self, url: str, stretch: Stretch) -> None:
        self.url = url
        self._next = replace(stretch, first=stretch.first + stretch.events, state="pending")

    def add(self, connection: psycopg.Connection, events: int) -> None:
        append(connection, replace(self._next, events=events))
        self._next = replace(self._next, first=self._next.first + events)

    @contextmanager
    def open(self, events: int) -> Iterator[str]:
        with psycopg.connect(self.url) as connection:
            self.add(connection, events)
        yield self.url


class Fed:
    """A fresh copy of an empty template, in which a writer commits `step` events whenever fewer are pending."""

    def __init__(self, server: Postgres, template: str, stretch: Stretch, step: int) -> None:
        self._server = server
        self._template = template
        self._stretch = replace(stretch, events=0)
        self._step = step

    @contextmanager
    def open(self, events: int) -> Iterator[str]:
        with (
            stage.database(self._server, self._template) as url,
            psycopg.connect(url, autocommit=True) as connection,
        ):
            outbox = Refilled(url, self._stretch)
            outbox.add(connection, self._step)
            with in_background(lambda enough: self._feed(connection, outbox, events - self._step, enough)):
                yield url

    def _feed(self, connection: psycopg.Connection, outbox: Refilled, events: int, enough: threading.Event) -> None:
        while events > 0 and not enough.wait(_LOOK_SECONDS):
            row = connection.execute(_PENDING).fetchone()
            if row and row[0] < self._step:
                outbox.add(connection, self._step)
                events -= self._step


def write_steadily(outbox: Refilled, rate: int, enough: threading.Event) -> None:
    """Commit `rate` events per second, some at a time, whatever becomes of them."""
    started = time.monotonic()
    written = 0
    with psycopg.connect(outbox.url, autocommit=True) as connection:
        while not enough.wait(_STEP_SECONDS):
            due = round((time.monotonic() - started) * rate) - written
            outbox.add(connection, due)
            written += due


@contextmanager
def in_background(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` in a thread beside the `with` block and raise what it raises; the event says that the block ended."""
    enough = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, enough)
        try:
            yield
        finally:
            enough.set()
        future.result()
