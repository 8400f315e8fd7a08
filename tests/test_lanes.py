"""The lane of an aggregate is the same on every version of PostgreSQL: else an upgrade would let an event overtake."""

from __future__ import annotations

from outbox_relay.database import LANE
from tests.conftest import Connect

GOLDEN = {
    ("order", "1"): 70,
    ("order", "2"): 135,
    ("order", "42"): 208,
    ("Order", "1"): 145,
    ("o", "rder/1"): 42,
    ("order/1", "x"): 131,
    ("invoice", "2026-000017"): 75,
    ("ä", "☃"): 12,
    ("e\u0301", "𝄞💥"): 185,
    ("x" * 255, "y" * 255): 55,
    (" ", " "): 100,
    ("a/b", "c"): 89,
    ("a", "b/c"): 89,
    ("user", "3fa85f64-5717-4562-b3fc-2c963f66afa6"): 134,
    ("\n", "\t'\"\\"): 164,
}
"""By aggregate; `('a/b', 'c')` and `('a', 'b/c')` share a lane and are two aggregates all the same."""


def test_golden_aggregates_are_in_their_lanes(connect: Connect) -> None:
    connection = connect()
    lanes = {
        (type_, name): lane
        for type_, name, lane in connection.execute(
            f"SELECT aggregate_type, aggregate_id, {LANE} "
            "FROM unnest(%s::text[], %s::text[]) AS o(aggregate_type, aggregate_id)",
            ([type_ for type_, _ in GOLDEN], [name for _, name in GOLDEN]),
        )
    }
    assert lanes == GOLDEN
