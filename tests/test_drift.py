"""Objects that were changed past their events are found, and no others."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from outbox_relay import cli
from outbox_relay.drift import Drift, Source, find
from outbox_relay.operator import OperatorError
from outbox_relay.runner import Ended
from tests.conftest import Connect, RunRelay
from tests.support.writing import write

ORDERS = Source(table="orders", aggregate_type="order", version_column="revision", changed_at="updated_at")
HOUR = 3600.0


@pytest.fixture
def orders(connect: Connect) -> psycopg.Connection[Any]:
    """A table of objects, `order` to the outbox."""
    connection = connect()
    connection.execute(
        "CREATE TABLE orders (id int PRIMARY KEY, revision int NOT NULL, updated_at timestamptz DEFAULT now())"
    )
    return connection


def order(connection: psycopg.Connection[Any], id_: int, version: int, *events: int) -> None:
    """An object at `version`, and events of these versions."""
    connection.execute("INSERT INTO orders (id, revision) VALUES (%s, %s)", (id_, version))
    for event in events:
        write(connection, str(id_), event, "plain:a")


def tombstone(connection: psycopg.Connection[Any], id_: int, version: int) -> None:
    connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, kind, channels, payload) "
        "VALUES ('order', %s, %s, 'tombstone', '{plain:a}', '{}')",
        (str(id_), version),
    )


def drifted(url: str, source: Source = ORDERS, **options: Any) -> list[tuple[str, str]]:
    """The ids of what drifted, and why."""
    return [(drift.aggregate_id, drift.why) for drift in find(url, source, keep=HOUR, **options).drifts]


def test_what_is_no_drift(database_url: str, orders: psycopg.Connection[Any], run_relay: RunRelay) -> None:
    """Objects at the version of their last event, delivered or not; deleted ones after their tombstone, also when they
    are kept and marked; old ones, whose events are gone; other types."""
    order(orders, 1, 3, 1, 2, 3)
    tombstone(orders, 2, 5)
    order(orders, 3, 1, 1)
    orders.execute("UPDATE orders SET revision = 2 WHERE id = 3")
    tombstone(orders, 3, 2)
    order(orders, 4, 7)
    orders.execute("UPDATE orders SET updated_at = now() - interval '2 hours' WHERE id = 4")
    assert run_relay() is Ended.EMPTY
    order(orders, 5, 1, 1)
    write(orders, "6", 1, "plain:a")
    orders.execute("UPDATE outbox SET aggregate_type = 'invoice' WHERE aggregate_id = '6'")
    assert find(database_url, ORDERS, keep=HOUR) == ([], 0)


def test_every_drift(database_url: str, orders: psycopg.Connection[Any], run_relay: RunRelay) -> None:
    """Each with what must have happened."""
    order(orders, 1, 3, 1, 2)
    order(orders, 2, 1)
    write(orders, "3", 4, "plain:a")
    order(orders, 4, 1, 8)
    tombstone(orders, 5, 3)
    order(orders, 5, 4)
    order(orders, 6, 1, 1)
    assert run_relay() is Ended.EMPTY
    assert find(database_url, ORDERS, keep=HOUR).drifts == [
        Drift("1", 3, 2, "change"),
        Drift("2", 1, None, None),
        Drift("3", None, 4, "change"),
        Drift("4", 1, 8, "change"),
        Drift("5", 4, 3, "tombstone"),
    ]
    assert drifted(database_url) == [
        ("1", "it was changed without an event since its last one"),
        ("2", "it was changed without an event"),
        ("3", "it was deleted without a tombstone"),
        ("4", "its version is below that of its last event"),
        ("5", "it was changed without an event since its last one"),
    ]
    assert [id_ for id_, _ in drifted(database_url, limit=2)] == ["1", "2"]


def test_without_the_time_of_the_last_change(database_url: str, orders: psycopg.Connection[Any]) -> None:
    """Objects without an event cannot be judged, which is said."""
    order(orders, 1, 1, 1)
    order(orders, 2, 1)
    source = Source(table="public.orders", aggregate_type="order", version_column="revision")
    assert find(database_url, source, keep=HOUR) == ([], 1)


def test_strange_names_and_keys_of_several_columns(database_url: str, connect: Connect) -> None:
    connection = connect()
    connection.execute(
        'CREATE SCHEMA "a %s"; CREATE TABLE "a %s"."se"" ats" ("r %d" text, n int, v int);'
        """INSERT INTO "a %s"."se"" ats" VALUES ('B', 12, 2)"""
    )
    write(connection, "B:12", 1, "plain:a")
    source = Source(table='a %s.se" ats', aggregate_type="order", id_columns=["r %d", "n"], version_column="v")
    assert find(database_url, source, keep=HOUR).drifts == [Drift("B:12", 2, 1, "change")]


def test_nothing_to_compare_with(database_url: str, orders: psycopg.Connection[Any]) -> None:
    """Refused in words, not with an empty list."""
    with pytest.raises(OperatorError, match="keep is 0"):
        find(database_url, ORDERS, keep=0)
    with pytest.raises(OperatorError, match="there is no table 'carts': check the names"):
        find(database_url, Source(table="carts", aggregate_type="cart"), keep=HOUR)
    with pytest.raises(OperatorError, match='column "version" does not exist'):
        find(database_url, Source(table="orders", aggregate_type="order"), keep=HOUR)


def test_on_the_command_line(database_url: str, orders: psycopg.Connection[Any]) -> None:
    """Exit code 1 where something has drifted, 0 where nothing has, 2 for what makes no sense."""

    def drift(*arguments: str) -> Any:
        return CliRunner().invoke(
            cli.app,
            ["drift", "orders", "--type", "order", "--version", "revision", *arguments],
            env={"OUTBOX_RELAY_DATABASE_URL": database_url},
        )

    order(orders, 1, 1, 1)
    order(orders, 2, 1)
    ended = drift()
    assert (ended.exit_code, ended.stdout) == (0, "no object has drifted\n")
    assert "objects without an event: 1; --changed-at says" in ended.stderr
    ended = drift("--changed-at", "updated_at", "--json")
    assert ended.exit_code == 1
    assert json.loads(ended.stdout) == {
        "drifts": [
            {
                "aggregate_id": "2",
                "object_version": 1,
                "event_version": None,
                "event_kind": None,
                "why": "it was changed without an event",
            }
        ],
        "unjudged": 0,
    }
    ended = drift("--keep", "0s")
    assert (ended.exit_code, "keep is 0" in ended.stderr) == (1, True)
    assert drift("--keep", "soon").exit_code == 2
