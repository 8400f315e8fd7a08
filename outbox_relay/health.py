"""Signs of life of a relay's workers, and what follows from them. Values, without network or database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from outbox_relay.event import boottime

Reason = Literal["starting", "stopping", "frozen", "database", "outage"]


@dataclass(slots=True)
class Progress:
    """How one worker gets on. Written by that worker alone, so without a lock."""

    seen: float = field(default_factory=boottime)
    """When it last came to a new turn or went on waiting, on the boot-time clock."""
    has_database: bool | None = None
    """Whether its last turn could use the database; None before the first one has ended."""

    def alive(self) -> None:
        self.seen = boottime()


class Health(NamedTuple):
    """A relay at one moment.

    A worker that waits, be it for the end of an outage, for the database or for events, gives signs of life all
    the same. One that has given none for `patience` seconds is frozen: nothing that it does takes so long.
    """

    silent: tuple[float, ...]
    """By worker: seconds since its last sign of life."""
    has_database: tuple[bool | None, ...]
    """By worker, as in `Progress`."""
    outage: bool
    stopping: bool
    patience: float

    @property
    def frozen(self) -> list[int]:
        """The numbers of the workers that do not get on."""
        return [number for number, seconds in enumerate(self.silent) if seconds > self.patience]

    @property
    def without_database(self) -> list[int]:
        return [number for number, has in enumerate(self.has_database) if has is False]

    @property
    def live(self) -> bool:
        """Whether a restart would change nothing. A relay that stops has a time limit of its own."""
        return self.stopping or not self.frozen

    @property
    def obstacle(self) -> Reason | None:
        """Why events cannot be delivered now, the nearest cause first; None if they can."""
        if self.stopping:
            return "stopping"
        if self.frozen:
            return "frozen"
        if self.without_database:
            return "database"
        if self.outage:
            return "outage"
        return "starting" if not self.silent or None in self.has_database else None
