"""Transactional outbox relay for PostgreSQL and Centrifugo.

What an application imports to write events. The relay itself is `outbox-relay run`, or `outbox_relay.build`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outbox_relay.orm import aenqueue_for, enqueue_for
    from outbox_relay.outbox import (
        InvalidEventError,
        NewEvent,
        Outbox,
        PayloadTooLargeError,
        enqueue,
        enqueue_all,
        epoch,
        metadata,
        tables,
    )

__all__ = [
    "InvalidEventError",
    "NewEvent",
    "Outbox",
    "PayloadTooLargeError",
    "aenqueue_for",
    "enqueue",
    "enqueue_all",
    "enqueue_for",
    "epoch",
    "metadata",
    "tables",
]


def __getattr__(name: str) -> Any:
    """Load on first use: the relay shares this package and has no use for SQLAlchemy's 30 MB."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "orm" if name.endswith("enqueue_for") else "outbox"
    return getattr(import_module(f"{__name__}.{room}"), name)


def __dir__() -> list[str]:
    return __all__
