"""Transactional outbox relay for PostgreSQL and Centrifugo.

What an application imports to write events. The relay itself is `outbox-relay run`, or `outbox_relay.build`.
"""

from outbox_relay.orm import aenqueue_for, enqueue_for
from outbox_relay.outbox import (
    InvalidEventError,
    NewEvent,
    Outbox,
    PayloadTooLargeError,
    enqueue,
    enqueue_all,
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
    "metadata",
    "tables",
]
