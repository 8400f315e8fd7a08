"""Events of mapped objects: the version is read from the object after the flush that raised it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Mapper, Session

from outbox_relay.outbox import DEFAULT, InvalidEventError, Kind, Outbox

if TYPE_CHECKING:
    # Importing it needs greenlet, which not every application has.
    from sqlalchemy.ext.asyncio import AsyncSession

T = TypeVar("T")


def enqueue_for(
    session: Session,
    instance: T,
    *,
    channels: str | Iterable[str],
    payload: Callable[[T], Any] | Any,
    aggregate_type: str | None = None,
    kind: Kind = "change",
    tags: Mapping[str, str] | None = None,
    expires_at: datetime | None = None,
    event_id: uuid.UUID | None = None,
    outbox: Outbox = DEFAULT,
) -> None:
    """Flush, then write the event with the version that the flush gave to `instance`, in the same transaction.

    The class needs a `version_id_col`. `payload` may be a function of the instance: it is called after the
    flush, so it sees server-side values and the new version. `aggregate_type` is the table's name and the
    aggregate's id the primary key (joined by `:` if it has several columns) unless given. Raises
    `InvalidEventError`, also when the instance is deleted: what is gone has no row to take a version from. Where
    the flush changes nothing, the version stays what it was, and subscribers take the event for one they know.
    """
    mapper: Mapper[Any] = sa.inspect(type(instance))
    column = mapper.version_id_col
    if column is None:
        raise InvalidEventError(
            f"{type(instance).__name__} has no version: add a column and "
            '__mapper_args__ = {"version_id_col": version}, or take the version yourself and use enqueue()'
        )
    session.flush()
    state = sa.inspect(instance)
    if not state.persistent:
        raise InvalidEventError(f"this {type(instance).__name__} is not in the session: add it before enqueue_for()")
    version = getattr(instance, mapper.get_property_by_column(column).key)
    identity = ":".join(str(part) for part in state.identity)
    session.execute(
        outbox.enqueue(
            aggregate_type if aggregate_type is not None else str(mapper.local_table),
            identity,
            version=version,
            channels=channels,
            payload=payload(instance) if callable(payload) else payload,
            kind=kind,
            tags=tags,
            expires_at=expires_at,
            event_id=event_id,
        )
    )


async def aenqueue_for(session: AsyncSession, instance: T, **event: Any) -> None:
    """`enqueue_for` for an AsyncSession, with the same arguments."""
    await session.run_sync(lambda sync_session: enqueue_for(sync_session, instance, **event))
