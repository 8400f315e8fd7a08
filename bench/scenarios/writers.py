"""Writer's cost: what an event costs the transaction that it belongs to.

Every transaction is BEGIN, an UPDATE of a random one of 10,000 business rows that returns its new version, the side's
own statement if it has one, and COMMIT, each in a round trip of its own. All values are parameters, as drivers send
them. What an application would have at hand is a fixed text: our payload and the event's id, and for Centrifugo's
outbox the whole request with its tags and a key. Such a key never varies; where a consumer reads meanwhile, that
spares Centrifugo work. Left to its default, our event's id is drawn by the database: without OpenSSL, as the embedded
PostgreSQL is, it opens, reads and closes a device for each.

Nobody reads what is written, except in the group `8-read`: there each side's own reader runs, idle at the start. A
listening reader costs the writers more than NOTIFY does, and so do readers that share their cores.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psycopg

from bench import business, load, pgbench, stage
from bench.drain import Costs, wait_for_workers
from bench.harness import Mode, Row, Sample
from bench.sides import CONSUMERS, OurRelay
from outbox_relay.config import Settings
from outbox_relay.embedded.centrifugo import find_or_build
from outbox_relay.embedded.postgres import Postgres

BUSINESS_ROWS: Final = load.AGGREGATES
"""Each is an aggregate, so that its versions only go up. Writers hardly ever meet at one."""
CONSUMER: Final = CONSUMERS["centrifugo-8"]
IDLE_SECONDS: Final = 1.0
"""From a reader's start until it has nothing left to do."""
WARM_SECONDS: Final = 1

_SCRIPT: Final = f"""\
\\set row random(0, {BUSINESS_ROWS - 1})
\\set channel random(0, {load.CHANNELS - 1})
\\set partition random(0, {CONSUMER.partitions - 1})
\\set key random(1, 9000000000000000000)
BEGIN;
UPDATE business SET version = version + 1, status = 'paid', updated_at = now() WHERE id = :row
RETURNING version \\gset
{{statement}}
{{work}}
END;
"""

_PAYLOAD: Final = '{"n":1,"text":"'.ljust(load.PAYLOAD_BYTES - 2, "x") + '"}'
_EVENT_ID: Final = "0a4ee8b5-3e0d-4e42-a5a4-08a31b1b1c0a"
_TAGS: Final = {
    "ob": "1",
    "ob_type": "order",
    "ob_id": "1",
    "ob_version": "1",
    "ob_event": _EVENT_ID,
    "ob_kind": "change",
    "ob_epoch": load.EPOCH,
}
_REQUEST: Final = {
    "channel": "plain:1",
    "data": json.loads(_PAYLOAD),
    "tags": _TAGS,
    "idempotency_key": f"{_EVENT_ID}:1",
}
VARIABLES: Final[Mapping[str, str]] = {
    "event_id": _EVENT_ID,
    "payload": _PAYLOAD,
    "tags": json.dumps(_TAGS, separators=(",", ":")),
    "request": json.dumps(_REQUEST, separators=(",", ":")),
}

_OURS: Final = """\
INSERT INTO outbox (event_id, aggregate_type, aggregate_id, version, channels, payload)
VALUES (:event_id, 'order', :row, :version, ARRAY['plain:' || (:channel)::text], :payload)"""
_CENTRIFUGO: Final = (
    "INSERT INTO centrifugo_outbox (method, payload, partition) VALUES ('publish', :request, :partition)"
)
# Measured: the cheapest form. A statement of its own and the documented row trigger both cost the writers more.
_NOTIFY: Final = f"{_CENTRIFUGO} RETURNING pg_notify('{business.NOTIFICATIONS}', partition::text)"
_STREAM: Final = """\
SELECT out_suppressed FROM cf_stream_publish(p_channel := 'plain:' || (:channel)::text, p_data := :payload,
    p_tags := :tags, p_idempotency_key := (:key)::text)"""


@dataclass(frozen=True, slots=True)
class Side:
    """Who is written to: `statement` joins the transaction, `prepare` runs before each repetition."""

    key: str
    title: str
    statement: str = ""
    prepare: tuple[str, ...] = ()


BUSINESS: Final = Side("business", "business row alone")
OURS_WAKE: Final = Side(
    "us-wake", "our event, while a relay sleeps through it all: a NOTIFY from every writer", _OURS, ("TRUNCATE outbox",)
)
"""The worst case of the wake-up: in earnest the first NOTIFY ends the sleep, and `us` is what follows."""
_ASLEEP: Final = "SELECT pg_advisory_lock(hashtextextended('outbox_relay', 'outbox'::regclass::oid::bigint))"
NOTIFY: Final = Side(
    "centrifugo-notify", "Centrifugo's outbox row and NOTIFY", _NOTIFY, ("TRUNCATE centrifugo_outbox",)
)
STREAM: Final = Side(
    "centrifugo-stream",
    "`cf_stream_publish` of its stream broker",
    _STREAM,
    (f"TRUNCATE {', '.join(business.STREAM_TABLES)}",),
)
SIDES: Final = (
    BUSINESS,
    Side("us", "our event, wake-up included, no relay asleep", _OURS, ("TRUNCATE outbox",)),
    OURS_WAKE,
    Side("centrifugo", "Centrifugo's outbox row", _CENTRIFUGO, ("TRUNCATE centrifugo_outbox",)),
    NOTIFY,
    STREAM,
)


@dataclass(frozen=True, slots=True)
class Group:
    """Sessions side by side, milliseconds of work before each commit, and seconds per repetition of the full form."""

    key: str
    clients: int
    work: int
    seconds: int
    repetitions: int = 1
    """As a factor on the mode's: many short ones are less at the mercy of a disk whose fsync is slow for seconds."""


GROUPS: Final = (
    Group("1", clients=1, work=0, seconds=2),
    Group("4", clients=4, work=0, seconds=2),
    Group("8", clients=8, work=0, seconds=2, repetitions=2),
    Group("16-work", clients=16, work=3, seconds=3),
    Group("64-work", clients=64, work=3, seconds=3),
)
READ: Final = Group("8-read", clients=8, work=0, seconds=3)


class Writers:
    """Rows `writers/GROUP/SIDE`."""

    name = "writers"
    title = "Writer's cost"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        """Yield a group per number of clients, and one in which everybody's reader runs."""
        server = stack.enter_context(stage.postgres())
        binary = find_or_build()
        template = stage.template(server, "writers", lambda url: business.make(url, BUSINESS_ROWS, binary))
        bed = _Bed(server, server.url(template), binary)
        for group in GROUPS:
            yield [bed.row(group, side, mode) for side in SIDES]
        yield [bed.row(READ, side, mode, reader) for side, reader in bed.readers().items()]


Reader = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class _Bed:
    """One database for all sides: tables are emptied, so that each repetition finds what the one before it found."""

    server: Postgres
    url: str
    binary: Path
    _own_wal: dict[str, float] = field(default_factory=dict)
    """Bytes of WAL of the business row's transaction, by group."""

    def row(self, group: Group, side: Side, mode: Mode, reader: Reader | None = None) -> Row:
        seconds = mode.scaled(group.seconds)

        def measure() -> Sample:
            if group.key not in self._own_wal:
                self._own_wal[group.key] = self._run(BUSINESS, group, WARM_SECONDS).figures["wal_bytes"]
            with psycopg.connect(self.url, autocommit=True) as connection:
                for statement in side.prepare:
                    connection.execute(statement)
            if reader is None:
                return self._run(side, group, seconds, asleep=side is OURS_WAKE)
            with reader():
                time.sleep(IDLE_SECONDS)
                return self._run(side, group, seconds)

        return Row(
            key=f"writers/{group.key}/{side.key}",
            title=side.title,
            unit="transactions/s",
            measure=measure,
            settings={
                "clients": group.clients,
                "work before commit, ms": group.work,
                "protocol": pgbench.PROTOCOL,
                "seconds": seconds,
                "statement": " ".join(side.statement.split()),
            },
            repetitions=group.repetitions * mode.repetitions,
        )

    def readers(self) -> Mapping[Side, Reader]:
        """Who reads what a side writes."""
        notified = CONSUMER.config(self.url, partition_notification_channel=business.NOTIFICATIONS)
        return {
            OURS_WAKE: self._relay,
            NOTIFY: lambda: stage.centrifugo(self.binary, consumers=[notified]),
            STREAM: lambda: stage.centrifugo(self.binary, broker=business.stream_broker(self.url)),
        }

    @contextmanager
    def _relay(self) -> Iterator[None]:
        with stage.centrifugo(self.binary) as centrifugo, OurRelay(self.url, centrifugo):
            wait_for_workers(self.url, Settings.workers)
            yield

    def _run(self, side: Side, group: Group, seconds: int, *, asleep: bool = False) -> Sample:
        """Figures: CPU microseconds of PostgreSQL and bytes of WAL per transaction, those of a reader among them, and
        the event's part of the WAL."""
        script = _SCRIPT.format(
            statement=f"{side.statement};" if side.statement else "",
            work=f"\\sleep {group.work} ms" if group.work else "",
        )
        with psycopg.connect(self.url, autocommit=True) as connection:
            if asleep:
                connection.execute(_ASLEEP)
            costs = Costs({"postgresql": [self.server.pid]})
            started_at = _wal_position(connection)
            done = pgbench.run(self.url, script, clients=group.clients, seconds=seconds, variables=VARIABLES)
            wal_bytes = (_wal_position(connection) - started_at) / done.transactions
        figures = {"postgresql_us": costs.per(done.transactions)["postgresql_us"], "wal_bytes": wal_bytes}
        if side is not BUSINESS:
            figures["event_wal_bytes"] = wal_bytes - self._own_wal[group.key]
        return Sample(done.rate, figures)


def _wal_position(connection: psycopg.Connection[tuple[int]]) -> int:
    """Bytes of WAL ever written."""
    [(position,)] = connection.execute("SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint").fetchall()
    return position


SCENARIO: Final = Writers()
