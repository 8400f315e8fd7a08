"""The verdict: what must be true at the end, judged from what the writers, the database and the subscriber say."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Row(NamedTuple):
    """An order as somebody sees it: the database, or the subscriber's screen."""

    version: int
    status: str


class OutboxRow(NamedTuple):
    """Of one row of the outbox, what the verdict needs."""

    order: str
    version: int
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the parts say once the writers have stopped. Orders and events are named by their ids.

    `committed` is what the writers know, `outbox` and `database` what PostgreSQL says, all else the subscriber's
    account: `received` says how often each event came, `reloaded` which version of an order came at the last
    time by reloading, after a gap. `troubles` are failures that nobody staged.
    """

    committed: Collection[str]
    outbox: Mapping[str, OutboxRow]
    database: Mapping[str, Row]
    screen: Mapping[str, Row]
    received: Mapping[str, int]
    reloaded: Mapping[str, int] = field(default_factory=dict)
    backwards: int = 0
    troubles: Sequence[str] = ()

    @property
    def duplicates(self) -> int:
        return sum(self.received.values()) - len(self.received)


class Clause(NamedTuple):
    """One sentence of the verdict; `but` says how it is wrong and is empty if it is true."""

    claim: str
    but: str

    @property
    def holds(self) -> bool:
        return not self.but


def judge(facts: Facts) -> list[Clause]:
    """Every clause of the verdict, true or not."""
    committed = set(facts.committed)
    delivered = {event for event, row in facts.outbox.items() if row.state == "delivered"}
    orders = facts.database.keys() | facts.screen.keys()
    different = sum(facts.database.get(order) != facts.screen.get(order) for order in orders)
    missing = sum(
        event not in facts.received and row.version > facts.reloaded.get(row.order, 0)
        for event, row in facts.outbox.items()
    )
    return [
        Clause(
            f"every order on the screen equals the database ({len(facts.database)} orders)",
            _count(different, "order differs", "orders differ") or ("" if facts.database else "there is no order"),
        ),
        Clause(
            "no order ever went backwards on the screen",
            _count(facts.backwards, "step backwards", "steps backwards"),
        ),
        Clause(
            "nothing of a rolled-back transaction arrived",
            _count(len(facts.received.keys() - committed), "such event", "such events"),
        ),
        Clause(
            f"committed = delivered ({len(committed):,} events)",
            _count(len(committed - delivered), "event not delivered", "events not delivered")
            or _count(len(facts.outbox.keys() - committed), "event nobody committed", "events nobody committed"),
        ),
        Clause(
            "whatever was delivered arrived, or was reloaded after a gap",
            _count(missing, "event is missing", "events are missing"),
        ),
        Clause("nothing failed but what was harmed on purpose", "; ".join(facts.troubles)),
    ]


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}" if number else ""
