"""`python -m tests.support.failpoints`: a relay that can be struck at a point of its path, once.

Everything else is the real thing: the arguments are `outbox-relay`'s own. A signal from outside cannot hit these
points on purpose. The file that OUTBOX_RELAY_FAILPOINT names says which point is armed and which signal the relay
sends itself there, as in `before it sends SIGKILL`; it is deleted when it strikes.

Each of its requests says in the header `BEGAN` when its transaction began: a fault meets in flight more than what has
been sent, and only the relay knows.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import httpx
import psycopg
from psycopg.pq import TransactionStatus

from outbox_relay import cli
from outbox_relay.centrifugo import Centrifugo
from outbox_relay.store import Claim, Store
from outbox_relay.transport import DeadlineTransport

FILE: Final = "OUTBOX_RELAY_FAILPOINT"
BEGAN: Final = "X-Transaction-Began"
"""Seconds on the clock that all processes share, and that no time of day changes: `time.monotonic`."""
POINTS: Final = (
    "after it claimed",
    "after it read",
    "before it looks at its lock",
    "before it sends",
    "after the reply",
    "before it settles",
    "before it commits",
    "after it committed",
)
_once: Final = threading.Lock()
_settled: Final = threading.local()
_began: Final = threading.local()


def arm(path: Path, point: str, number: signal.Signals) -> None:
    """Let the relay that watches `path` be struck at `point`."""
    assert point in POINTS
    new = path.with_suffix(".new")
    new.write_text(f"{point} {number.name}")
    new.replace(path)


def _reached(point: str, path: Path) -> None:
    try:
        armed, _, name = path.read_text().rpartition(" ")
    except FileNotFoundError:
        return
    if armed != point or not _once.acquire(blocking=False):
        return
    try:
        path.unlink(missing_ok=True)
        # To this thread: it takes the signal before it goes on. One to the process may be taken by another.
        signal.pthread_kill(threading.get_ident(), signal.Signals[name])
    finally:
        _once.release()


def _watch(owner: type, name: str, path: Path, *, before: str = "", after: str = "") -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if before:
            _reached(before, path)
        result = original(*args, **kwargs)
        if after and getattr(result, "lanes", True):
            _reached(after, path)
        return result

    setattr(owner, name, wrapper)


def _watch_commits(path: Path) -> None:
    """The commits of what is settled, along with its last statement or by themselves: no other one matters."""
    settle, commit, last = Store.settle, psycopg.Connection.commit, Store.execute_with_waiting

    def settling(*args: Any, **kwargs: Any) -> Counter[str]:
        _reached("before it settles", path)
        ended = settle(*args, **kwargs)
        _settled.now = True
        return ended

    def sending_the_last(*args: Any, **kwargs: Any) -> psycopg.Cursor[Any]:
        if kwargs.get("last"):
            _reached("before it commits", path)
        return last(*args, **kwargs)

    def committing(connection: psycopg.Connection[Any]) -> None:
        matters = getattr(_settled, "now", False)
        _settled.now = False
        if matters and connection.info.transaction_status != TransactionStatus.IDLE:
            _reached("before it commits", path)
        commit(connection)
        if matters:
            _reached("after it committed", path)

    Store.settle = settling  # type: ignore[method-assign]
    Store.execute_with_waiting = sending_the_last  # type: ignore[method-assign]
    psycopg.Connection.commit = committing  # type: ignore[method-assign, assignment]


def _tell_when_it_began() -> None:
    claim, send = Store.claim, DeadlineTransport.handle_request

    def claiming(*args: Any, **kwargs: Any) -> Claim:
        _began.at = time.monotonic()
        return claim(*args, **kwargs)

    def sending(transport: DeadlineTransport, request: httpx.Request) -> httpx.Response:
        if hasattr(_began, "at"):
            request.headers[BEGAN] = repr(_began.at)
        return send(transport, request)

    Store.claim = claiming  # type: ignore[method-assign]
    DeadlineTransport.handle_request = sending  # type: ignore[method-assign, assignment]


def main() -> None:
    path = Path(os.environ.pop(FILE))
    _tell_when_it_began()
    _watch(Store, "claim", path, after="after it claimed")
    _watch(Store, "read", path, after="after it read")
    _watch(Store, "request_deadline", path, before="before it looks at its lock")
    _watch(Centrifugo, "publish", path, before="before it sends", after="after the reply")
    _watch_commits(path)
    cli.main()


if __name__ == "__main__":
    main()
