"""Transactional outbox relay for PostgreSQL and Centrifugo.

What an application imports to write events. The relay itself is `outbox-relay run`, or `outbox_relay.build`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outbox_relay.direct import apublish, publish
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
    "apublish",
    "enqueue",
    "enqueue_all",
    "enqueue_for",
    "enqueue_objects",
    "epoch",
    "metadata",
    "publish",
    "publishes",
    "tables",
]

_ROOMS = {
    "BulkChangeError": "orm",
    "aenqueue_for": "orm",
    "aenqueue_objects": "orm",
    "apublish": "direct",
    "enqueue_for": "orm",
    "enqueue_objects": "orm",
    "publish": "direct",
    "publishes": "orm",
}


def __getattr__(name: str) -> Any:
    """Load on first use: the relay shares this package and has no use for SQLAlchemy's 30 MB."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'outbox')}"), name)


def __dir__() -> list[str]:
    return __all__
