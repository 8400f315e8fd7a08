"""Events of mapped objects: the version is read from the object after the flush that raised it.

`publishes` declares once that a class publishes: every flush then writes the events of what it has written. Or
`enqueue_for` writes one event of one object, by hand.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import InstanceState, Mapper, ORMExecuteState, Session, object_session

from outbox_relay.outbox import DEFAULT, InvalidEventError, Kind, NewEvent, Outbox

if TYPE_CHECKING:
    # Importing it needs greenlet, which not every application has.
    from sqlalchemy.ext.asyncio import AsyncSession

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])
Channels = str | Iterable[str] | None

_DECLARED: Final = "__outbox_publishes__"
_NOTES: Final = "outbox_relay notes"
LOAD_CHUNK: Final = 1_000
BULK: Final = "outbox_relay_bulk"
"""Execution option of a bulk statement on a class that publishes: True says that its events are taken care of."""


class BulkChangeError(InvalidEventError):
    """A bulk UPDATE or DELETE of a class that publishes: nothing was executed, because it would write no events."""


@dataclass(frozen=True, slots=True)
class _Publication:
    """What a class publishes. Callables get the instance."""

    channels: Callable[[Any], Channels] | str | tuple[str, ...]
    payload: Callable[[Any], Any]
    kind: Callable[[Any], Kind] | Kind
    tags: Callable[[Any], Mapping[str, str] | None] | Mapping[str, str] | None
    expires_at: Callable[[Any], datetime | None] | None
    aggregate_type: str | None
    outbox: Outbox

    def event(self, instance: Any, *, base: int | None = None) -> NewEvent | None:
        """The event of an instance as it is now, None where nobody hears of it. `base` is the version it had."""
        kind: Kind = _value(self.kind, instance)
        return self._event(
            instance,
            version=_version(instance),
            kind=kind,
            payload={} if kind == "tombstone" else self.payload(instance),
            # The whole state applies to whatever was there before.
            base=base if kind == "change" else None,
        )

    def tombstone(self, instance: Any) -> NewEvent | None:
        """The event of an instance whose row is about to be deleted."""
        return self._event(instance, version=_version(instance) + 1, kind="tombstone", payload={}, base=None)

    def _event(self, instance: Any, *, version: int, kind: Kind, payload: Any, base: int | None) -> NewEvent | None:
        channels = _value(self.channels, instance)
        if not channels:
            return None
        mapper = sa.inspect(instance).mapper
        return NewEvent(
            aggregate_type=self.aggregate_type or _aggregate_type(mapper),
            aggregate_id=_aggregate_id(mapper.primary_key_from_instance(instance)),
            version=version,
            channels=channels,
            payload=payload,
            kind=kind,
            tags=_value(self.tags, instance),
            # That an object is gone stays true.
            expires_at=None if kind == "tombstone" else _value(self.expires_at, instance),
            base_version=base,
        )


@dataclass(frozen=True, slots=True)
class _Note:
    """What is known of an instance while its flush is under way. `base` is its version before, None where it is new."""

    instance: Any
    connection: sa.Connection
    publication: _Publication
    base: int | None = None
    deleted: bool = False
    tombstone: NewEvent | None = None


def publishes(
    *,
    channels: Callable[[Any], Channels] | str | Iterable[str],
    payload: Callable[[Any], Any],
    kind: Callable[[Any], Kind] | Kind = "snapshot",
    tags: Callable[[Any], Mapping[str, str] | None] | Mapping[str, str] | None = None,
    expires_at: Callable[[Any], datetime | None] | None = None,
    aggregate_type: str | None = None,
    outbox: Outbox = DEFAULT,
) -> Callable[[C], C]:
    """Declare, as a decorator, that a mapped class and its subclasses publish what a flush writes.

    One event per object and flush, in the flush's transaction: of an INSERT and an UPDATE with the version that it
    gave to the object, of a DELETE a tombstone with the next version. An object that a flush leaves alone has no
    event. The class needs a `version_id_col`; else this raises `InvalidEventError`.

    `payload` is a function of the instance, called after the flush, so that it sees what the row has now. The others
    may be functions of the instance too. Where `channels` gives none, there is no event. `kind` "change" says also the
    version before, `base_version`. A function for `kind` may say "tombstone" of an object that is kept and only marked
    as deleted; a tombstone never expires. `aggregate_type` is the base class's table unless given, the aggregate's id
    the primary key, joined by `:` if it has several columns.

    Bulk statements write no events: an ORM-enabled one on such a class raises `BulkChangeError`; see `enqueue_objects`.
    """
    publication = _Publication(
        channels=channels if callable(channels) or isinstance(channels, str) else tuple(channels),
        payload=payload,
        kind=kind,
        tags=tags,
        expires_at=expires_at,
        aggregate_type=aggregate_type,
        outbox=outbox,
    )

    def declare(cls: C) -> C:
        mapper = sa.inspect(cls, raiseerr=False)
        if not isinstance(mapper, Mapper):
            raise InvalidEventError(f"{cls.__name__} is not mapped: declare its mapped subclasses, each by itself")
        _version_attribute(mapper)
        setattr(cls, _DECLARED, publication)
        for name, listener in _OF_MAPPERS.items():
            event.listen(cls, name, listener, propagate=True)
        for name, of_session in _OF_SESSIONS.items():
            if not event.contains(Session, name, of_session):
                event.listen(Session, name, of_session)
        return cls

    return declare


def enqueue_objects(session: Session, instances: Iterable[Any]) -> None:
    """Write an event of each instance, as its class declares it with `publishes`, at the version that its row has now.

    For objects that were changed by a bulk statement or by raw SQL, in the same transaction. Such a statement has to
    raise the version itself, which is also what locks the rows. The instances are loaded again. Raises
    `InvalidEventError` for a class that does not publish, or an instance that is not in the session.
    """
    session.flush()
    instances = list(instances)
    by_class: dict[type[Any], list[Any]] = defaultdict(list)
    for instance in instances:
        if not hasattr(type(instance), _DECLARED):
            raise InvalidEventError(f"{type(instance).__name__} does not publish: declare it with @publishes(...)")
        if not sa.inspect(instance).persistent:
            raise _not_in_session(instance)
        by_class[type(instance)].append(instance)
    loaded = {instance for cls, several in by_class.items() for instance in _load_again(session, cls, several)}
    events: Events = defaultdict(list)
    for instance in instances:
        if instance not in loaded:
            raise InvalidEventError(f"this {type(instance).__name__} has no row any more: write its tombstone yourself")
        publication: _Publication = getattr(type(instance), _DECLARED)
        if (new := publication.event(instance)) is not None:
            connection = session.connection(bind_arguments={"mapper": sa.inspect(instance).mapper})
            events[connection, publication.outbox].append(new)
    _write(events)


def _load_again(session: Session, cls: type[Any], instances: Sequence[Any]) -> Iterator[Any]:
    """Those of the instances that have a row, with all that is in it."""
    key = sa.tuple_(*sa.inspect(cls).primary_key)
    for start in range(0, len(instances), LOAD_CHUNK):
        identities = [sa.inspect(instance).identity for instance in instances[start : start + LOAD_CHUNK]]
        rows = sa.select(cls).where(key.in_(identities)).execution_options(populate_existing=True)
        yield from session.scalars(rows)


async def aenqueue_objects(session: AsyncSession, instances: Iterable[Any]) -> None:
    """`enqueue_objects` for an AsyncSession."""
    await session.run_sync(lambda sync_session: enqueue_objects(sync_session, instances))


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
    base_version: int | None = None,
    outbox: Outbox = DEFAULT,
) -> None:
    """Flush, then write the event with the version that the flush gave to `instance`, in the same transaction.

    The class needs a `version_id_col`. `payload` may be a function of the instance: it is called after the
    flush, so it sees server-side values and the new version. `aggregate_type` is the base class's table and the
    aggregate's id the primary key (joined by `:` if it has several columns) unless given. Raises
    `InvalidEventError`, also when the instance is deleted: what is gone has no row to take a version from. Where
    the flush changes nothing, the version stays what it was, and subscribers take the event for one they know.
    """
    mapper: Mapper[Any] = sa.inspect(type(instance))
    _version_attribute(mapper)
    session.flush()
    state = sa.inspect(instance)
    if not state.persistent:
        raise _not_in_session(instance)
    session.execute(
        outbox.enqueue(
            aggregate_type or _aggregate_type(mapper),
            _aggregate_id(state.identity),
            version=_version(instance),
            channels=channels,
            payload=payload(instance) if callable(payload) else payload,
            kind=kind,
            tags=tags,
            expires_at=expires_at,
            event_id=event_id,
            base_version=base_version,
        )
    )


async def aenqueue_for(session: AsyncSession, instance: T, **event: Any) -> None:
    """`enqueue_for` for an AsyncSession, with the same arguments."""
    await session.run_sync(lambda sync_session: enqueue_for(sync_session, instance, **event))


# What a mapped class says of itself.


def _version_attribute(mapper: Mapper[Any]) -> str:
    """The name of the attribute that holds the version. Raises `InvalidEventError` where there is none."""
    column = mapper.version_id_col
    if column is None:
        raise InvalidEventError(
            f"{mapper.class_.__name__} has no version: add a column and "
            '__mapper_args__ = {"version_id_col": version}, or take the version yourself and use enqueue()'
        )
    return mapper.get_property_by_column(column).key


def _version(instance: Any) -> int:
    version: int = getattr(instance, _version_attribute(sa.inspect(instance).mapper))
    return version


def _aggregate_type(mapper: Mapper[Any]) -> str:
    return str(mapper.base_mapper.local_table)


def _aggregate_id(identity: Iterable[Any]) -> str:
    return ":".join(str(part) for part in identity)


def _not_in_session(instance: Any) -> InvalidEventError:
    name = type(instance).__name__
    return InvalidEventError(f"this {name} is not in the session: add it before its event is written")


def _value(given: Any, instance: Any) -> Any:
    return given(instance) if callable(given) else given


# What SQLAlchemy tells us. The mapper's events say which rows are written, also for objects that are in no list of the
# session's, such as orphans; the end of the flush is when all attributes have their new values.

Notes = dict[InstanceState[Any], _Note]
Events = dict[tuple[sa.Connection, Outbox], list[NewEvent]]


def _note(instance: Any, connection: sa.Connection, **known: Any) -> None:
    session = object_session(instance)
    assert session is not None  # noqa: S101 - it is being flushed
    notes: Notes = session.info.setdefault(_NOTES, {})
    notes[sa.inspect(instance)] = _Note(instance, connection, getattr(type(instance), _DECLARED), **known)


def _inserting(_mapper: Mapper[Any], connection: sa.Connection, instance: Any) -> None:
    _note(instance, connection)


def _updating(_mapper: Mapper[Any], connection: sa.Connection, instance: Any) -> None:
    _note(instance, connection, base=_version(instance))


def _deleting(_mapper: Mapper[Any], connection: sa.Connection, instance: Any) -> None:
    # While its attributes can still be loaded.
    tombstone = getattr(type(instance), _DECLARED).tombstone(instance)
    _note(instance, connection, deleted=True, tombstone=tombstone)


def _flushing(session: Session, *_: Any) -> None:
    # An earlier flush may have failed halfway.
    session.info.pop(_NOTES, None)


def _flushed(session: Session, *_: Any) -> None:
    notes: Notes = session.info.pop(_NOTES, {})
    events: Events = defaultdict(list)
    for note in notes.values():
        if note.deleted:
            new = note.tombstone
        elif note.base is not None and _version(note.instance) == note.base:
            continue  # nothing of it was written
        else:
            new = note.publication.event(note.instance, base=note.base or 0)
        if new is not None:
            events[note.connection, note.publication.outbox].append(new)
    _write(events)


def _write(events: Events) -> None:
    for (connection, outbox), several in events.items():
        outbox.write(connection, several)


def _executing(statement: ORMExecuteState) -> None:
    if not (statement.is_update or statement.is_delete or statement.is_insert) or statement.execution_options.get(BULK):
        return
    mapper = statement.bind_mapper
    if mapper is not None and hasattr(mapper.class_, _DECLARED):
        raise BulkChangeError(
            f"a bulk statement on {mapper.class_.__name__} writes no events: raise the version in it, call "
            f"enqueue_objects() for what it changed, and say execution_options({BULK}=True)"
        )


_OF_MAPPERS: Final[Mapping[str, Callable[..., None]]] = {
    "before_insert": _inserting,
    "before_update": _updating,
    "before_delete": _deleting,
}
_OF_SESSIONS: Final[Mapping[str, Callable[..., None]]] = {
    "before_flush": _flushing,
    "after_flush_postexec": _flushed,
    "do_orm_execute": _executing,
}
