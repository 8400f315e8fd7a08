"""Transactional outbox relay for PostgreSQL and Centrifugo.

What an application imports to write events. The relay itself is `outbox-relay run`, or `outbox_relay.build`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outbox_relay.orm import (
        BulkChangeError,
        aenqueue_for,
        aenqueue_objects,
        enqueue_for,
        enqueue_objects,
        publishes,
    )
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
    "BulkChangeError",
    "InvalidEventError",
    "NewEvent",
    "Outbox",
    "PayloadTooLargeError",
    "aenqueue_for",
    "aenqueue_objects",
    "enqueue",
    "enqueue_all",
    "enqueue_for",
    "enqueue_objects",
    "epoch",
    "metadata",
    "publishes",
    "tables",
]


_ORM = {"BulkChangeError", "aenqueue_for", "aenqueue_objects", "enqueue_for", "enqueue_objects", "publishes"}


def __getattr__(name: str) -> Any:
    """Load on first use: the relay shares this package and has no use for SQLAlchemy's 30 MB."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "orm" if name in _ORM else "outbox"
    return getattr(import_module(f"{__name__}.{room}"), name)


def __dir__() -> list[str]:
    return __all__
