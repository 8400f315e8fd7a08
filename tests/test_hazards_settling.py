"""Hazards of settling, by their numbers in the list of hazards: what was published cannot be recorded.

(Hazard 8, retention, is in test_retention.py.)
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from psycopg import sql

from outbox_relay.options import Options
from tests.conftest import Connect, MakeRelay
from tests.support.gateway import Exchange, Gateway
from tests.support.oracle import violations
from tests.support.proxy import TcpProxy
from tests.support.subscriber import Subscriber
from tests.support.waiting import wait_until
from tests.support.writing import Connection, fact, states, write

Subscribe = Callable[..., Subscriber]

COMMIT_WAITS = """
CREATE FUNCTION wait_at_commit() RETURNS trigger LANGUAGE plpgsql SET lock_timeout TO 0 AS $$
BEGIN PERFORM pg_catalog.pg_advisory_xact_lock(14); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER wait_at_commit AFTER UPDATE ON outbox DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.state = 'delivered') EXECUTE FUNCTION wait_at_commit();
"""


@pytest.mark.parametrize("committed", [True, False], ids=["it was committed", "it was not"])
def test_hazard_14_the_outcome_of_a_commit_is_unknown(
    committed: bool,
    connect: Connect,
    database_url: str,
    make_relay: MakeRelay,
    relay_options: Options,
    gateway: Gateway,
    subscribe: Subscribe,
    channel: str,
) -> None:
    """The connection is cut while PostgreSQL works on the COMMIT. The relay does not guess: it connects and looks.

    Committed, nothing is published again; rolled back, each event once more under the same key. A deferred trigger
    makes the COMMIT last until the test has cut the connection.
    """
    subscriber = subscribe(channel)
    connection = connect()
    written = [write(connection, name, 1, channel) for name in ("1", "2", "3")]
    connection.execute(COMMIT_WAITS)
    connection.execute("SELECT pg_advisory_lock(14)")

    def committing() -> list[int]:
        rows = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE wait_event = 'advisory' AND query LIKE '%COMMIT' "
            "AND datname = current_database()"
        )
        return [pid for (pid,) in rows]

    url = sa.make_url(database_url)
    with TcpProxy(url.host or "", url.port or 5432) as proxy:
        by_proxy = url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        # One worker: two may share the events, and be in a COMMIT each.
        with make_relay(replace(relay_options, workers=1), database_url=by_proxy, api_url=gateway.url):
            wait_until(committing, "PostgreSQL works on the COMMIT")
            [pid] = committing()
            proxy.cut()
            if not committed:
                connection.execute("SELECT pg_terminate_backend(%s, 10000)", (pid,))
            connection.execute("SELECT pg_advisory_unlock(14)")
            wait_until(lambda: pid not in committing(), "the session has ended")
            wait_until(
                lambda: states(connection) == {"delivered" if committed else "pending": 3}, "its outcome is known"
            )
            proxy.mend()
            written.append(write(connection, "1", 2, channel))
            wait_until(lambda: states(connection) == {"delivered": 4}, "the relay goes on")
    sent = Counter(command.key for command in gateway.commands)
    assert sorted(sent.values()) == ([1, 1, 1, 1] if committed else [1, 2, 2, 2])
    assert violations(written, map(fact, subscriber.wait_for(4))) == []


# Hazard 24: trouble that stays. While it lasts nothing may be published again and again.

FULL = """
CREATE TABLE ailment (sick boolean);
INSERT INTO ailment VALUES (false);
CREATE FUNCTION fill_disk() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT sick FROM public.ailment) THEN
        RAISE 'could not extend file: No space left on device' USING ERRCODE = 'disk_full';
    END IF;
    RETURN NEW;
END $$;
"""


class Patient:
    """A database whose relay can be made unable to settle."""

    def __init__(self, connection: Connection, url: str) -> None:
        self.url = url
        self._connection = connection

    def fall_ill(self) -> None:
        raise NotImplementedError

    def recover(self) -> None:
        raise NotImplementedError

    def execute(self, statement: sql.Composable | str) -> None:
        self._connection.execute(statement)  # type: ignore[arg-type]


class FullDisk(Patient):
    """A stand-in raises PostgreSQL's own error: to fill a real file system takes one of one's own, hence root."""

    triggers = "CREATE TRIGGER fill_disk BEFORE UPDATE ON outbox FOR EACH ROW EXECUTE FUNCTION fill_disk()"

    def __init__(self, connection: Connection, url: str) -> None:
        super().__init__(connection, url)
        self.execute(FULL + self.triggers)

    def fall_ill(self) -> None:
        self.execute("UPDATE ailment SET sick = true")

    def recover(self) -> None:
        self.execute("UPDATE ailment SET sick = false")


class FullDiskAtCommit(FullDisk):
    """The statements still find room, the COMMIT of whatever was written does not."""

    triggers = "; ".join(
        f"CREATE CONSTRAINT TRIGGER fill_disk AFTER UPDATE ON {table} DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION fill_disk()"
        for table in ("outbox", "outbox_lane")
    )


class LostGrant(Patient):
    """The relay has a role of its own, which loses UPDATE on the outbox."""

    def __init__(self, connection: Connection, url: str) -> None:
        self.role = f"outbox_relay_test_{uuid4().hex}"
        super().__init__(connection, sa.make_url(url).set(username=self.role).render_as_string(hide_password=False))
        self._grant("CREATE ROLE {role} LOGIN")
        self._grant("GRANT SELECT, UPDATE, DELETE ON outbox, outbox_lane TO {role}")
        self._grant("GRANT SELECT ON SEQUENCE outbox_generation, outbox_id_seq TO {role}")
        self._grant("GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_hold TO {role}")

    def fall_ill(self) -> None:
        self._grant("REVOKE UPDATE ON outbox FROM {role}")

    def recover(self) -> None:
        self._grant("GRANT UPDATE ON outbox TO {role}")

    def close(self) -> None:
        self._grant("DROP OWNED BY {role}")
        self._grant("DROP ROLE {role}")

    def _grant(self, statement: Any) -> None:
        self.execute(sql.SQL(statement).format(role=sql.Identifier(self.role)))


class ReadOnly(Patient):
    """As after a failover that left the relay with a standby: its session is gone, and no new one may write."""

    def fall_ill(self) -> None:
        self._set("ALTER DATABASE {name} SET default_transaction_read_only = on")
        self._connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'outbox-relay' AND datname = current_database()"
        )

    def recover(self) -> None:
        self._set("ALTER DATABASE {name} RESET default_transaction_read_only")

    def _set(self, statement: Any) -> None:
        self.execute(sql.SQL(statement).format(name=sql.Identifier(self._connection.info.dbname)))


@pytest.fixture(params=[FullDisk, FullDiskAtCommit, LostGrant, ReadOnly], ids=lambda kind: kind.__name__)
def patient(request: pytest.FixtureRequest, connect: Connect, database_url: str) -> Iterator[Patient]:
    patient: Patient = request.param(connect(), database_url)
    yield patient
    patient.recover()
    if isinstance(patient, LostGrant):
        patient.close()


def sessions(connection: Connection) -> int:
    """How many sessions the database has seen begin."""
    row = connection.execute("SELECT sessions FROM pg_stat_database WHERE datname = current_database()").fetchone()
    assert row is not None
    return int(row[0])


def test_hazard_24_what_cannot_be_recorded_is_not_published_again_and_again(
    patient: Patient,
    connect: Connect,
    make_relay: MakeRelay,
    gateway: Gateway,
    subscribe: Subscribe,
    channel: str,
    relay_options: Options,
) -> None:
    """The database falls ill while a request is under way. What that published cannot be settled; after that the
    relay tries to write before it publishes, however often it comes back. Cured, it repeats each event at most once,
    under the same key. There is one worker: another one may have proved that it can write right before.
    """
    subscriber = subscribe(channel)
    connection = connect()
    written = [write(connection, str(number), version, channel) for version in (1, 2) for number in range(10)]
    once = threading.Lock()

    def fall_ill(exchange: Exchange) -> None:
        if once.acquire(blocking=False):
            patient.fall_ill()
        exchange.answer(*exchange.forward())

    gateway.fault = fall_ill
    with make_relay(replace(relay_options, workers=1), database_url=patient.url, api_url=gateway.url):
        gateway.wait_for_requests(1)
        before = sessions(connection)
        wait_until(lambda: sessions(connection) >= before + 12, "the relay has come back a dozen times")
        sent = Counter(command.key for command in gateway.commands)
        assert set(sent.values()) == {1}
        assert states(connection).get("delivered", 0) <= len(written) - len(sent)
        patient.recover()
        wait_until(lambda: states(connection) == {"delivered": 20}, "all are delivered")
    assert set(Counter(command.key for command in gateway.commands).values()) <= {1, 2}
    assert violations(written, map(fact, subscriber.wait_for(20))) == []
