"""The plans of the relay's statements beside 100,000 settled and 100,000 pending events and 10,000 holds.

PostgreSQL itself reports the plans that it ran (auto_explain), for the statements as the relay sends them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay import conflation, start_hint
from outbox_relay.outcome import Policy
from outbox_relay.store import Store
from tests.conftest import database, in_database

ROWS = 100_000
HOLDS = 10_000
LANES = 64
BATCH = 1_000
SEQUENCES = {"outbox_generation", "outbox_id_seq"}
"""One row each."""
INDEX_SCANS = {"Index Scan", "Index Only Scan"}

_EXPLAIN = " ".join(
    f"-c {setting}"
    for setting in (
        "session_preload_libraries=auto_explain",
        "auto_explain.log_min_duration=0",
        "auto_explain.log_analyze=on",
        "auto_explain.log_buffers=on",
        "auto_explain.log_format=json",
        "client_min_messages=log",
    )
)


class Node(NamedTuple):
    """A step of a plan that touches a table. `rows` is how many it looked at, all its loops together."""

    relation: str
    kind: str
    rows: float


class Plan(NamedTuple):
    query: str
    buffers: int
    nodes: list[Node]


@pytest.fixture(scope="module")
def crowded_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """10,000 orders with ten settled and ten pending events each, and as many others that are held for an hour."""
    with database(server_url, migrated_template) as name:
        url = in_database(server_url, name)
        with psycopg.connect(url, autocommit=True) as connection:
            # Statistics are what each test makes them.
            connection.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")
            for state in ("delivered", "pending"):
                connection.execute(
                    "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload, state, settled_at) "
                    "SELECT 'order', n %% 10000, 1 + n / 10000, '{hist:1}', '{\"a\": 1}', %(state)s::outbox_state, "
                    "       CASE WHEN %(state)s = 'delivered' THEN now() END "
                    "FROM generate_series(0, %(rows)s - 1) n",
                    {"state": state, "rows": ROWS},
                )
                if state == "delivered":
                    connection.execute("VACUUM outbox")
            connection.execute(
                "INSERT INTO outbox_hold "
                "(aggregate_type, aggregate_id, due_at, head_id, tries, attempts, first_refused_at, refused_at) "
                "SELECT 'held', n, now() + interval '1 hour', 1, 1, 0, now(), now() "
                "FROM generate_series(1, %s) n",
                (HOLDS,),
            )
        yield url


FORGET = "DELETE FROM pg_statistic; UPDATE pg_class SET (reltuples, relpages) = {} WHERE relname LIKE 'outbox%'"


@pytest.fixture(
    params=[
        FORGET.format("(-1, 0)"),
        # As after ANALYZE of an outbox whose rows and holds have all gone.
        FORGET.format("(0, 1)"),
        "ANALYZE",
    ],
    ids=["no statistics", "statistics of a drained outbox", "fresh statistics"],
)
def url(request: pytest.FixtureRequest, crowded_url: str) -> str:
    """The crowded database, with the statistics of an outbox's life."""
    with psycopg.connect(crowded_url, autocommit=True) as connection:
        connection.execute("VACUUM outbox")  # of what the test before has settled
        connection.execute(request.param)
    return make_conninfo(crowded_url, options=_EXPLAIN)


def test_statements_stay_index_scans(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The idle question, claim, read and settle each touch what they need by an index, whatever the statistics
    say; claim and read together take at most 5 buffers for an event."""
    monkeypatch.setattr(start_hint, "RENEW_EVERY", math.inf)
    monkeypatch.setattr(start_hint, "DUE_ANEW", math.inf)
    plans: list[Plan] = []
    with closing(Store(url)) as store:
        store._connection.add_notice_handler(lambda notice: plans.extend(_plan(notice.message_primary or "")))
        assert store.anything_to_do()
        with store.batch():
            lanes = store.claim(after=0, lanes=LANES).lanes
            batch = store.read(lanes, events=BATCH, per_lane=1, max_bytes=10_000_000)
            store.settle([event.id for event in batch.events], [], {})
    assert len(lanes) == LANES
    assert len(batch.events) > 0.9 * BATCH
    idle, claim, read, settle = plans
    for plan in plans:
        for node in plan.nodes:
            assert node.kind in INDEX_SCANS or node.relation in SEQUENCES, (node, plan.query)
            assert node.rows <= len(batch.events), (node, plan.query)
    assert idle.buffers <= 12
    assert claim.buffers + read.buffers <= 5 * len(batch.events)
    assert {node.relation for node in settle.nodes} == {"outbox"}
    assert {node.relation for node in claim.nodes + read.nodes} == {
        "outbox",
        "outbox_lane",
        "outbox_hold",
        "outbox_generation",
    }


def test_so_does_the_look_at_what_is_conflated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It touches sixteen times as many events, by the same indexes, and what it sends once more, by its id."""
    monkeypatch.setattr(start_hint, "RENEW_EVERY", math.inf)
    monkeypatch.setattr(start_hint, "DUE_ANEW", math.inf)
    plans: list[Plan] = []
    with closing(Store(url)) as store, store.batch():
        lanes = store.claim(after=0, lanes=LANES).lanes
        store._connection.add_notice_handler(lambda notice: plans.extend(_plan(notice.message_primary or "")))
        types = {"order": Policy(conflate=True)}
        batch = store.read(lanes, events=BATCH, per_lane=1, max_bytes=10_000_000, conflated=types)
    assert len(batch.events) > 0.9 * BATCH
    read = plans[-1]
    looked_at = conflation.WINDOW * len(batch.events)
    for node in read.nodes:
        assert node.kind in INDEX_SCANS or node.relation in SEQUENCES, (node, read.query)
        assert node.rows <= looked_at, (node, read.query)
    assert read.buffers <= 3 * looked_at + 5 * len(batch.events)


class Place(NamedTuple):
    """A database of one test, whose sessions at `url` are explained, and a connection to it."""

    url: str
    connection: psycopg.Connection[tuple[Any, ...]]

    def hold(self, aggregates: int) -> None:
        """Put so many aggregates on hold, each in a lane of its own, that are due now."""
        self.connection.execute(
            "INSERT INTO outbox_hold "
            "(aggregate_type, aggregate_id, due_at, head_id, tries, attempts, first_refused_at, refused_at) "
            "SELECT 'held', min(n), now(), 1, 1, 0, now(), now() FROM generate_series(1, 10000) n "
            "GROUP BY hashtextextended('held/' || n, 0) & 255 "
            "HAVING hashtextextended('held/' || min(n), 0) & 255 BETWEEN 1 AND %s",
            (aggregates,),
        )


@pytest.fixture
def under_snapshot(server_url: str, migrated_template: str) -> Iterator[Place]:
    """An empty outbox, of which somebody holds a snapshot."""
    with database(server_url, migrated_template) as name:
        url = in_database(server_url, name)
        with psycopg.connect(url) as snapshot, psycopg.connect(url, autocommit=True) as connection:
            snapshot.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            snapshot.execute("SELECT")
            yield Place(make_conninfo(url, options=_EXPLAIN), connection)


@pytest.mark.parametrize("holds", [1, LANES])
def test_due_holds_do_not_multiply_the_walk(holds: int, under_snapshot: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a snapshot is held the entries of settled events stay in the index: a claim walks over them once, however
    many lanes have nothing but a due hold."""
    monkeypatch.setattr(start_hint, "RENEW_EVERY", math.inf)
    monkeypatch.setattr(start_hint, "DUE_ANEW", math.inf)
    settled = 5_000
    under_snapshot.connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) "
        "SELECT 'order', n, 1, '{hist:1}', '{}' FROM generate_series(1, %s) n",
        (settled,),
    )
    under_snapshot.connection.execute("UPDATE outbox SET state = 'delivered', settled_at = now()")
    under_snapshot.hold(holds)
    plans: list[Plan] = []
    with closing(Store(under_snapshot.url)) as store, store.batch():
        store._connection.add_notice_handler(lambda notice: plans.extend(_plan(notice.message_primary or "")))
        lanes = store.claim(after=255, lanes=LANES).lanes
    assert lanes == [(lane, True) for lane in range(1, holds + 1)]
    [claim] = plans
    assert settled / 2 < claim.buffers < settled + 10 * holds


def test_holds_that_are_tried_again_leave_nothing_to_walk_over(under_snapshot: Place) -> None:
    """While a snapshot is held each try leaves an entry in the index of the holds; a claim does not meet them again."""
    tries, holds = 50, 100
    under_snapshot.hold(holds)
    for _ in range(tries):
        under_snapshot.connection.execute("UPDATE outbox_hold SET due_at = now() - random() * interval '1 hour'")
    under_snapshot.connection.execute("UPDATE outbox_hold SET due_at = now()")
    plans: list[Plan] = []
    with closing(Store(under_snapshot.url)) as store:
        store._connection.add_notice_handler(lambda notice: plans.extend(_plan(notice.message_primary or "")))
        assert store.anything_to_do()
        with store.batch():
            lanes = store.claim(after=0, lanes=LANES).lanes
            store.read(lanes, events=BATCH, per_lane=1, max_bytes=10_000_000)
    assert len(lanes) == LANES
    longest_due, *others = plans
    assert longest_due.buffers > tries * holds / 2
    for plan in others:
        assert plan.buffers < 10 * holds, plan.query


def _plan(message: str) -> Iterator[Plan]:
    _, found, text = message.partition("plan:\n")
    if found:
        plan: dict[str, Any] = json.loads(text)
        root = plan["Plan"]
        buffers = root["Shared Hit Blocks"] + root["Shared Read Blocks"]
        yield Plan(plan["Query Text"], buffers, list(_nodes(root)))


def _nodes(node: dict[str, Any]) -> Iterator[Node]:
    if "Relation Name" in node and node["Node Type"] != "ModifyTable":
        rows = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
        yield Node(node["Relation Name"], node["Node Type"], rows)
    for child in node.get("Plans", ()):
        yield from _nodes(child)
