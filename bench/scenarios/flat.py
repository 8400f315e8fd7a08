"""Flat cost: what an event costs must not depend on what else lies in the outbox.

The base of the drains is 100,000 events in an outbox that holds nothing else. 5,000 pending would last a tenth of a
second, and kept at 5,000 by a writer (row `base-fed`) they share the cores with it: a slower base, in our favour. The
base of the buffers, which no writer disturbs, is one that commits 5,000 events whenever fewer are pending; it is the
higher one there, so that 100,000 pending (row `base-100k`) stand beside it.

Of each outbox only the first events are drained, so that no case ends in batches that are not full.

While a snapshot is held what is settled stays in the index of the pending events. A relay that is at work, as it is
where a backup begins, knows where to start in each lane, and looks again now and then; a new one (rows `snapshot-new`)
has to find that out first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import psycopg

from bench import stage
from bench.bulk import Stretch, append, fill, make_tables
from bench.drain import lanes_locked, wait_for_workers
from bench.explain import claiming, explained
from bench.harness import Mode, Row, Sample, Scenario, WrongRunError
from bench.open_loop import wait_until_delivered
from bench.outboxes import Copied, Fed, Outbox, Refilled, Standing, in_background, write_steadily
from bench.sides import OurRelay
from bench.witness import Witness
from outbox_relay.config import Settings
from outbox_relay.embedded.centrifugo import Centrifugo, find_or_build
from outbox_relay.embedded.postgres import Postgres

AGGREGATES: Final = 10_000
BASE: Final = Stretch("cold", 100_000, AGGREGATES)
FEW: Final = 5_000
DRAINED: Final = 0.95
"""Of an outbox's pending events. In the lane of a hot aggregate, one of 256, the last ones come later."""
EXPLAINED: Final = 20_000
"""Events whose claims are explained: some twenty batches."""

CHURN_RATE: Final = 2_500
"""Events per second while the snapshot grows old, before anything is measured."""
WORK_SECONDS: Final = 2.0
REFUSED: Final = Stretch("refused", 100, 100, namespace="nowhere")
"""Events of a namespace that Centrifugo does not know: with every try a hold is written anew."""
CHURN_SETTINGS: Final = {"backoff_max": 1, "log_level": "error"}

_HOLD: Final = """
INSERT INTO outbox_hold (aggregate_type, aggregate_id, due_at, head_id, tries, attempts, first_refused_at, refused_at)
SELECT aggregate_type, aggregate_id, now() + interval '1 day', min(id), 1, 0, now(), now()
FROM outbox WHERE state = 'parked' GROUP BY aggregate_type, aggregate_id
"""


@dataclass(frozen=True, slots=True)
class Case:
    """An outbox in some state, `holding` what a reader of the report must know. Its channels are those of BASE."""

    key: str
    title: str
    outbox: Outbox
    holding: Mapping[str, int | str]
    settings: Mapping[str, object] = field(default_factory=dict)
    mid_stream: bool = False
    """Whether the events are not the first ones of their aggregates."""
    at_work: Refilled | None = None
    """The outbox, where the relay has delivered some of its events before those that are measured."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much lies in the outboxes, in events, and how long a snapshot is held before anything is measured."""

    drained: int
    many: int
    crowd: int
    """Pending beside and with the one hot aggregate; half as many are parked."""
    snapshot_seconds: float


SIZES: Final = {
    "full": Sizes(100_000, 10_000_000, 1_000_000, 120.0),
    "short": Sizes(40_000, 1_000_000, 1_000_000, 20.0),
    "quick": Sizes(20_000, 200_000, 200_000, 5.0),
}


class Flat:
    """All cases alternate with their base. The quick form leaves out what takes long to prepare."""

    name = "flat"
    title = "Flat cost"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        bed = _Bed(stack.enter_context(stage.postgres()), find_or_build())
        sizes = SIZES[mode.name]
        base, fed = bed.base(), bed.fed()
        cases = [bed.hot(sizes), bed.held(sizes)]
        if mode.name == "quick":
            cases.append(bed.pending(sizes))
        else:
            with bed.snapshot(sizes, stack) as snapshot:
                new = replace(snapshot, key="snapshot-new", title=f"{snapshot.title}, by a new relay", at_work=None)
                cases += [bed.pending(sizes), bed.kept(sizes), snapshot, new]
        yield [bed.drain(case, sizes.drained) for case in (base, fed, *cases)]
        yield [bed.claims(case, mode) for case in (replace(fed, key="base"), replace(base, key="base-100k"), *cases)]


class _Bed:
    """The outboxes on one PostgreSQL. Each run has a Centrifugo of its own: it remembers keys for five minutes."""

    def __init__(self, server: Postgres, centrifugo: Path) -> None:
        self._server = server
        self._centrifugo = centrifugo

    def base(self) -> Case:
        template = self._filled("base", BASE)
        return Case("base", "nothing else", Copied(self._server, template), {"pending": BASE.events})

    def fed(self) -> Case:
        template = stage.template(self._server, "empty", make_tables)
        outbox = Fed(self._server, template, BASE, FEW)
        return Case("base-fed", "kept at 5,000 pending by a writer", outbox, {"pending": FEW})

    def hot(self, sizes: Sizes) -> Case:
        hot = Stretch("hot", sizes.crowd * 9 // 10, 1)
        template = self._filled("hot", hot, replace(BASE, events=sizes.crowd // 10))
        title = "one aggregate with 90 %, oldest first; drain of the others"
        return Case("hot", title, Copied(self._server, template), {"pending": sizes.crowd, "of one": hot.events})

    def held(self, sizes: Sizes) -> Case:
        parked = Stretch("held", sizes.crowd // 2, AGGREGATES, state="parked")
        template = self._filled("held", parked, BASE, then=_HOLD)
        holding = {"pending": BASE.events, "parked": parked.events, "holds": AGGREGATES}
        return Case("held", "10,000 aggregates on hold", Copied(self._server, template), holding)

    def pending(self, sizes: Sizes) -> Case:
        many = replace(BASE, events=sizes.many)
        outbox = Standing(self._server.url(self._filled("pending", many)))
        return Case("pending", f"{sizes.many:,} pending", outbox, {"pending": sizes.many}, mid_stream=True)

    def kept(self, sizes: Sizes) -> Case:
        many = replace(BASE, events=sizes.many, state="delivered")
        outbox = Refilled(self._server.url(self._filled("kept", many)), many)
        holding = {"delivered": sizes.many, "pending": sizes.drained}
        return Case("kept", f"{sizes.many:,} delivered and kept", outbox, holding, mid_stream=True)

    @contextmanager
    def snapshot(self, sizes: Sizes, stack: ExitStack) -> Iterator[Case]:
        """A relay works under a snapshot beside the `with` block, for as long as it must; the snapshot lasts on."""
        outbox = Refilled(
            self._server.url(stage.template(self._server, "snapshot", make_tables)), replace(BASE, events=0)
        )
        connection = stack.enter_context(psycopg.connect(outbox.url))
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("SELECT count(*) FROM outbox")
        started = time.monotonic()
        with psycopg.connect(outbox.url) as writer:
            append(writer, REFUSED)
        title = f"a snapshot held open for {sizes.snapshot_seconds:.0f} s and on"
        holding = {"pending": sizes.drained, "events per second before": CHURN_RATE, "holds": REFUSED.events}
        with (
            stage.centrifugo(self._centrifugo) as centrifugo,
            OurRelay(outbox.url, centrifugo, CHURN_SETTINGS),
            in_background(lambda enough: write_steadily(outbox, CHURN_RATE, enough)),
        ):
            yield Case("snapshot", title, outbox, holding, CHURN_SETTINGS, mid_stream=True, at_work=outbox)
            time.sleep(max(0.0, started + sizes.snapshot_seconds - time.monotonic()))
        with psycopg.connect(outbox.url) as reader:
            if reader.execute("SELECT count(*) FROM outbox_hold").fetchone() != (REFUSED.events,):
                raise WrongRunError("not every refused aggregate is on hold")

    def drain(self, case: Case, events: int) -> Row:
        def measure() -> Sample:
            with (
                case.outbox.open(0 if case.at_work else events) as url,
                stage.centrifugo(self._centrifugo) as centrifugo,
                ExitStack() as stack,
            ):
                relay = _relay(case, url, centrifugo, stack)
                witness = stack.enter_context(_witness(case, centrifugo, events))
                with lanes_locked(url):
                    if case.at_work:
                        _add(case.at_work, events)
                    else:
                        stack.enter_context(relay)
                        wait_for_workers(url, Settings.workers)
                seen = witness.wait()
                peak = stage.peak_resident(*relay.pids)
            return Sample(seen.rate, {"peak RSS, MB": peak / 1e6})

        return Row(f"flat/drain/{case.key}/us", case.title, "events/s", measure, _settings(case))

    def claims(self, case: Case, mode: Mode) -> Row:
        def measure() -> Sample:
            with (
                case.outbox.open(0 if case.at_work else EXPLAINED) as url,
                stage.centrifugo(self._centrifugo) as centrifugo,
                ExitStack() as stack,
            ):
                relay = _relay(case, explained(url), centrifugo, stack)
                witness = stack.enter_context(_witness(case, centrifugo, EXPLAINED))
                if case.at_work:
                    # Until they are committed every look walks over them, whatever else lies in the outbox: none does.
                    with relay.stopped():
                        _add(case.at_work, EXPLAINED)
                        offset = self._server.log_path.stat().st_size
                else:
                    offset = self._server.log_path.stat().st_size
                    stack.enter_context(relay)
                witness.wait()
            found = claiming(self._server.log_path, offset)
            return Sample(found.per_event, {"buffers": found.buffers, "claimed events": found.events})

        # They are counts, not times: three are enough to see that they agree.
        repetitions = min(mode.repetitions, 3)
        return Row(f"flat/buffers/{case.key}/us", case.title, "buffers/event", measure, _settings(case), repetitions)

    def _filled(self, name: str, *stretches: Stretch, then: str | None = None) -> str:
        def fill_and_finish(url: str) -> None:
            fill(url, stretches)
            if then is not None:
                with psycopg.connect(url) as connection:
                    connection.execute(then)

        return stage.template(self._server, name, fill_and_finish)


def _relay(case: Case, url: str, centrifugo: Centrifugo, stack: ExitStack) -> OurRelay:
    """A relay to be started; where it is to be at work it is, has delivered events for a while, and none is left."""
    relay = OurRelay(url, centrifugo, case.settings)
    if case.at_work:
        stack.enter_context(relay)
        outbox = case.at_work
        with in_background(lambda enough: write_steadily(outbox, CHURN_RATE, enough)):
            time.sleep(WORK_SECONDS)
        wait_until_delivered(outbox.url, BASE.channels())
    return relay


def _add(outbox: Refilled, events: int) -> None:
    with psycopg.connect(outbox.url) as connection:
        outbox.add(connection, events)


def _witness(case: Case, centrifugo: Centrifugo, events: int) -> Witness:
    return Witness(centrifugo.ws_url, BASE.channels(), round(events * DRAINED), mid_stream=case.mid_stream)


def _settings(case: Case) -> Mapping[str, Any]:
    return {"outbox": dict(case.holding), "relay": dict(case.settings) or "as shipped"}


SCENARIO: Scenario = Flat()
