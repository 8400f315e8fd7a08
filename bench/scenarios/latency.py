"""Latency: from an application's commit to a subscriber, at rates that do not wait for anybody.

An event's time runs from the moment before its statement is sent, which commits by itself (`bench.commits`), to the
arrival of its publication's last byte at the witness. So it holds the transaction too, the same one on all sides but
for what each side adds to it. Where the writers are late, because the database keeps them waiting, the schedule goes
on without them; how late they were is a figure of its own.

The first half second is not counted: sessions and connections of all sides are new then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import business, load, stage
from bench.commits import Schedule, Writer
from bench.drain import check_settled, wait_for_workers
from bench.harness import Mode, Row, Sample
from bench.open_loop import percentile
from bench.sides import CONSUMERS, OurRelay, relay_settings
from bench.witness import Witness
from outbox_relay.config import Settings
from outbox_relay.embedded.centrifugo import Centrifugo, find_or_build
from outbox_relay.embedded.postgres import Postgres

SESSIONS: Final = 4
WARM_SECONDS: Final = 0.5
IDLE_SECONDS: Final = 0.5
"""From the start of whoever delivers until the first event."""
ARRIVAL_SECONDS: Final = 30.0

CONSUMER: Final = CONSUMERS["centrifugo-8"]


@dataclass(frozen=True, slots=True)
class Pace:
    """Events per second, and the seconds that are counted."""

    rate: int
    full: float
    short: float
    quick: float


PACES: Final = (
    Pace(50, full=5.0, short=5.0, quick=0.0),
    Pace(500, full=4.0, short=2.5, quick=1.5),
    Pace(2_000, full=4.0, short=1.5, quick=0.0),
)
"""At 50 per second, 5 s bring 250 events, few enough for a p99. Without seconds a form has no such rows."""

# The business row is the aggregate, and its version that of the event.
_CHANGE: Final = """
WITH changed AS (
    UPDATE business SET version = version + 1, status = 'paid', updated_at = now() WHERE id = %(aggregate)s::bigint
    RETURNING id::text AS id, version
)
"""
_TAGS: Final = f"""
jsonb_build_object('ob', '1', 'ob_type', 'order', 'ob_id', id, 'ob_version', version::text, 'ob_event', %(key)s::text,
                   'ob_kind', 'change', 'ob_epoch', '{load.EPOCH}')
"""
_OURS: Final = f"""
{_CHANGE}
INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload)
SELECT 'order', id, version, ARRAY[%(channel)s::text], %(payload)s::json FROM changed
"""
_POLLED: Final = f"""
{_CHANGE}
INSERT INTO centrifugo_outbox (method, payload, partition)
SELECT 'publish', jsonb_build_object('channel', %(channel)s::text, 'data', %(payload)s::jsonb, 'idempotency_key',
       %(key)s::text, 'tags', {_TAGS}), abs(hashtext(id)) %% {CONSUMER.partitions}
FROM changed
"""
_NOTIFIED: Final = f"""
{_POLLED}
RETURNING pg_notify('{business.NOTIFICATIONS}', partition::text)
"""
_STREAM: Final = f"""
{_CHANGE}
SELECT out_suppressed FROM changed, cf_stream_publish(p_channel := %(channel)s::text, p_data := %(payload)s::jsonb,
    p_tags := {_TAGS}, p_idempotency_key := %(key)s::text)
"""


@dataclass(frozen=True, slots=True)
class Side:
    """What a writer sends, and who delivers it: our relay, or a Centrifugo that is configured for it."""

    key: str
    title: str
    statement: str
    settings: Mapping[str, object]
    centrifugo: Callable[[Path, str], Centrifugo] = lambda binary, _url: stage.centrifugo(binary)
    relay: Mapping[str, object] | None = None


def _consumer(**more: object) -> Callable[[Path, str], Centrifugo]:
    return lambda binary, url: stage.centrifugo(binary, consumers=[CONSUMER.config(url, **more)])


def _ours(key: str, title: str, settings: Mapping[str, object]) -> Side:
    return Side(key, title, _OURS, relay_settings(settings), relay=settings)


SIDES: Final = (
    _ours("us-poll", "outbox-relay, polling", {"wake_up": False}),
    _ours("us-wake", "outbox-relay, wake-up", {}),
    Side("centrifugo-poll", "Centrifugo's consumer, polling", _POLLED, CONSUMER.settings, _consumer()),
    Side(
        "centrifugo-notify",
        "Centrifugo's consumer, NOTIFY",
        _NOTIFIED,
        {**CONSUMER.settings, "partition_notification_channel": business.NOTIFICATIONS},
        _consumer(partition_notification_channel=business.NOTIFICATIONS),
    ),
    Side(
        "centrifugo-stream",
        "Centrifugo's stream broker, NOTIFY",
        _STREAM,
        {"use_notify": True},
        lambda binary, url: stage.centrifugo(binary, broker=business.stream_broker(url)),
    ),
)


class Latency:
    """Rows `latency/RATE/SIDE`."""

    name = "latency"
    title = "Latency from commit to subscriber"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        """Yield a group per rate. The short form has one repetition of the slowest, which takes longest."""
        server = stack.enter_context(stage.postgres())
        binary = find_or_build()
        template = stage.template(server, "latency", lambda url: business.make(url, load.AGGREGATES, binary))
        for pace in PACES:
            seconds = {"full": pace.full, "short": pace.short, "quick": pace.quick}[mode.name]
            if seconds:
                run = _Run(server, template, binary, pace.rate, seconds)
                repetitions = 1 if mode.name == "short" and pace is PACES[0] else None
                yield [run.row(side, repetitions) for side in SIDES]


@dataclass(frozen=True, slots=True)
class _Run:
    server: Postgres
    template: str
    binary: Path
    rate: int
    seconds: float

    def row(self, side: Side, repetitions: int | None) -> Row:
        return Row(
            key=f"latency/{self.rate}/{side.key}",
            title=side.title,
            unit="ms",
            measure=lambda: self._measured(side),
            settings={"events per second": self.rate, "seconds": self.seconds, "writers": SESSIONS, **side.settings},
            repetitions=repetitions,
        )

    def _measured(self, side: Side) -> Sample:
        """The value is the p50."""
        schedule = Schedule(self.rate, round(self.rate * (WARM_SECONDS + self.seconds)))
        with stage.database(self.server, self.template) as url:
            with ExitStack() as stack:
                centrifugo = stack.enter_context(side.centrifugo(self.binary, url))
                witness = stack.enter_context(
                    Witness(
                        centrifugo.ws_url,
                        load.channels("plain"),
                        schedule.events,
                        seconds=self.seconds + ARRIVAL_SECONDS,
                    )
                )
                if side.relay is not None:
                    stack.enter_context(OurRelay(url, centrifugo, side.relay))
                    wait_for_workers(url, Settings.workers)
                writer = stack.enter_context(Writer(url, side.statement, schedule, sessions=SESSIONS))
                time.sleep(IDLE_SECONDS)
                written = writer.write()
                seen = witness.wait()
            if side.relay is not None:
                check_settled(url)
        counted_from = written.started_at + WARM_SECONDS
        lags = [lag * 1e3 for lag, at in zip(seen.lags, seen.arrivals, strict=True) if at - lag >= counted_from]
        figures = {
            "p90": percentile(lags, 0.9),
            "p99": percentile(lags, 0.99),
            "max": max(lags),
            "writers_late_p99": percentile(written.late, 0.99) * 1e3,
            "duplicates": float(seen.duplicates),
        }
        return Sample(percentile(lags, 0.5), figures)


SCENARIO: Final = Latency()
