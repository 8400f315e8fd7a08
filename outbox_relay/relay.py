"""The order of things: claim, read, publish in waves, judge, settle.

`Worker.run_once` is the path of an event. When it is run, and when no more, is the runner's to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import Final, Protocol

from outbox_relay.conflation import took
from outbox_relay.event import ACCEPTED, OVERTAKEN, Clock, Event, Outage, Refusal, Reply, boottime
from outbox_relay.options import Options
from outbox_relay.outcome import INTERNAL, SUPERSEDED, UNANSWERED, Settlement, judge
from outbox_relay.packing import waves, worthwhile
from outbox_relay.policy import end, plan
from outbox_relay.shared import Shared, log_outcomes
from outbox_relay.store import Batch, Store

PROBE_LANES: Final = 4


class Publisher(Protocol):
    """Where events go. Exactly one reply per event, in order, or one outage for all; nothing is sent past `deadline`.

    The deadline is on `boottime()`, and was taken while the lanes were surely ours. `room` is how many events the
    publisher wants in a request now, `limit` at most.
    """

    def room(self, limit: int) -> int: ...

    def publish(self, events: Sequence[Event], deadline: float) -> list[Reply] | Outage: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Sent:
    """What is known of a batch after its requests: events without an answer are in neither list."""

    delivered: list[Event] = field(default_factory=list)
    told: list[Event] = field(default_factory=list)
    """Gaps that were accepted."""
    overtaken: list[Event] = field(default_factory=list)
    """All their channels had a newer version."""
    refused: list[tuple[Event, Reply]] = field(default_factory=list)
    behind: set[tuple[str, str]] = field(default_factory=set)
    """Aggregates of which nothing more may be sent in this batch."""
    anything_accepted: bool = False
    outage: Outage | None = None

    @property
    def sound(self) -> bool:
        """Whether Centrifugo did its work: it accepted something, or refused an event for the event's own sake."""
        codes = {refusal.code for _, reply in self.refused for refusal in reply.refusals}
        return self.anything_accepted or any(code > UNANSWERED and code != INTERNAL for code in codes)


class Worker:
    """One thread's share of a relay: its own database session and its own HTTP connection."""

    def __init__(self, store: Store, publisher: Publisher, options: Options, shared: Shared) -> None:
        self._store = store
        self._publisher = publisher
        self._options = options
        self._shared = shared
        self._after = 0
        # A new session, so also the one after a settle or a commit that failed, proves first that outcomes can
        # be written: else a full disk or a lost grant would publish the same events again and again.
        self._untried = True
        self.full = False
        """Whether the last batch had as many lanes as it may: there may be work in others too."""

    def run_once(self) -> bool:
        """Deliver one batch, and return whether there was anything to do.

        One transaction: what was locked by `claim` is locked until the outcomes are written. A crash at any
        point leaves the events as they were. Raises `DatabaseUnavailableError`; nothing is lost then, and at
        most this batch is published again.
        """
        options = self._options
        if self._untried:
            self._store.prove_writable()
        with self._store.batch():
            # While nothing is known to be accepted, a few events are enough to find out.
            lanes = PROBE_LANES if self._shared.pause.outage else options.lanes
            claim = self._store.claim(after=self._after, lanes=lanes)
            if not claim.lanes:
                return False
            self._after = claim.lanes[-1].lane
            now = claim.clock.now()
            self.full = len(claim.lanes) == lanes
            batch = self._store.read(
                claim.lanes,
                events=min(options.batch_events, lanes * options.events_per_lane),
                per_lane=options.events_per_lane,
                max_bytes=options.batch_bytes,
                conflated=options.conflated,
                now=now,
            )
            if self._untried:
                self._store.rehearse([event.id for event in batch.events])
            batch.events, ends = plan(batch.events, now, options.policy_of)
            sent = self._publish(batch, claim.clock)
            settlements, trouble = judge(
                sent.refused,
                batch.holds,
                self._shared.accepted_at,
                claim.clock.now(),
                options.policy_of,
                anything_accepted=sent.anything_accepted,
            )
            stood_for = took(batch.covered, [*sent.delivered, *sent.overtaken], settlements)
            settlements += [*ends, *(end(gap, options.policy_of(gap.aggregate_type)) for gap in sent.told)]
            settlements += [Settlement(event, SUPERSEDED, ()) for event in sent.overtaken]
            outage = sent.outage or trouble
            # Before the lanes are free for another worker, which would not know.
            self._shared.pause.report(outage, sound=sent.sound)
            delivered = [event.id for event in sent.delivered]
            needless: Mapping[str, int] = {}
            if delivered or settlements or batch.holds:
                needless = self._store.settle(delivered, settlements, batch.holds, stood_for)
        self._untried = False
        self._shared.observer.batch(sent.delivered, settlements, claim.clock.now())
        self._shared.observer.overtaken(len(sent.overtaken))
        self._shared.observer.needless(needless)
        self._shared.watch_versions(sent.delivered)
        log_outcomes(len(sent.delivered), settlements)
        return bool(sent.delivered or settlements or batch.parked or outage)

    def _publish(self, batch: Batch, clock: Clock) -> Sent:
        """Send the batch wave by wave, suspects last, until it is sent, its time is over or there is an outage."""
        sent = Sent()
        alone = {hold.head_id for hold in batch.holds.values() if hold.alone}
        free, suspects = self._shared.suspects.part(batch.events, alone)
        limits = self._options.limits
        wires = self._options.wires
        planned = waves(free, replace(limits, events=self._publisher.room(limits.events)), wires)
        lone = [waves(group, limits, wires)[0] for group in suspects]
        requests = chain(zip(worthwhile(planned, sent.behind), repeat(False)), zip(lone, repeat(True)))
        ends_at = boottime() + self._options.batch_time
        for number, (wave, suspect) in enumerate(requests):
            if number and (self._shared.stopping.is_set() or boottime() >= ends_at):
                break
            events = [event for event in wave if event.aggregate not in sent.behind] if sent.behind else wave
            if not events:
                continue
            deadline = self._store.request_deadline()
            if deadline is None:
                break
            outage = self._send(events, deadline, clock, sent)
            if outage is None:
                continue
            if events[0].id in alone or self._shared.failed(events, clock):
                refusals = (Refusal(channel, -outage.verdict, outage.reason) for channel in events[0].unsent)
                sent.refused.append((events[0], Reply(tuple(refusals))))
            elif not (suspect and sent.anything_accepted):
                sent.outage = outage
                break
            sent.behind.update(event.aggregate for event in events)
        return sent

    def _send(self, events: Sequence[Event], deadline: float, clock: Clock, sent: Sent) -> Outage | None:
        """Send one request and note its answers in `sent`."""
        sent_at, started = clock.now(), boottime()
        replies = self._publisher.publish(events, deadline)
        outage = replies if isinstance(replies, Outage) else None
        self._shared.observer.request(len(events), boottime() - started, outage)
        if isinstance(replies, Outage):
            return replies
        accepted: set[str] = set()
        doubted: list[Event] = []
        for event, reply in zip(events, replies, strict=True):
            if reply is ACCEPTED:
                (sent.told if event.ending else sent.delivered).append(event)
                accepted.update(event.unsent if event.accepted else event.channels)
            elif reply is OVERTAKEN:
                (sent.told if event.ending else sent.overtaken).append(event)
                accepted.update(event.unsent)
            else:
                # What its other channels accept proves that Centrifugo works, but nothing against this event.
                sent.refused.append((event, reply))
                sent.behind.add(event.aggregate)
                sent.anything_accepted |= bool(reply.accepted)
                if reply.bundled:
                    doubted.append(event)
        sent.anything_accepted |= bool(accepted)
        self._shared.answered(events, accepted, sent_at)
        if doubted:
            self._shared.failed(doubted, clock)
        return None
