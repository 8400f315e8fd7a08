"""A relay whose batches are run one by one: between two of them happens what the test does, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import psycopg

from outbox_relay.centrifugo import Centrifugo
from outbox_relay.event import Outage, boottime
from outbox_relay.options import Options
from outbox_relay.relay import Worker
from outbox_relay.shared import Observer, Pause, Shared, Unobserved
from outbox_relay.store import Store


class Hold(NamedTuple):
    """A waiting aggregate, as the table says."""

    aggregate_id: str
    tries: int
    attempts: int


class Journal(Unobserved):
    """What the relay reports of its requests: how many events each had, and why those failed that failed whole.

    And, by state, how many events ended because a later one was accepted in their place.
    """

    def __init__(self) -> None:
        self.requests: list[int] = []
        self.outages: list[Outage] = []
        self.longest = 0.0
        self.ended = Counter[str]()

    def needless(self, ended: Mapping[str, int]) -> None:
        self.ended.update(ended)

    def request(self, events: int, seconds: float, outage: Outage | None) -> None:
        self.requests.append(events)
        self.longest = max(self.longest, seconds)
        if outage is not None:
            self.outages.append(outage)


class Stepper:
    """One worker between a database and a publisher, which may be exchanged: what the relay has learnt stays."""

    def __init__(
        self,
        database_url: str,
        publisher: Centrifugo,
        options: Options | None = None,
        *,
        observer: Observer | None = None,
    ) -> None:
        """Instead of the journal, an `observer` may hear what the relay reports."""
        self.journal = Journal()
        self._options = options or Options()
        self._store = Store(database_url, request_timeout=publisher.timeout)
        self._connection: psycopg.Connection[Any] = psycopg.connect(database_url, autocommit=True)
        self._shared = Shared(
            Pause(self._options.pause_min, self._options.pause_max), observer=observer or self.journal
        )
        self._publisher = publisher
        self._worker = Worker(self._store, publisher, self._options, self._shared)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._publisher.close()
        self._connection.close()
        self._store.close()

    def step(self) -> bool:
        """Run one batch, whether or not the relay would pause. Returns whether there was anything to do."""
        return self._worker.run_once()

    def drain(self, batches: int = 100) -> None:
        """Run batches until there is nothing left to do now; fail if that takes more than `batches`."""
        for _ in range(batches):
            if not self._store.anything_to_do():
                return
            self.step()
        raise AssertionError(f"there is still something to do after {batches} batches")

    def make_due(self) -> None:
        """Let every hold's wait be over."""
        self._connection.execute("UPDATE outbox_hold SET due_at = clock_timestamp() WHERE due_at < 'infinity'")

    def age(self, seconds: float) -> None:
        """Let the heads have been refused for longer, without a single refusal more."""
        self._connection.execute(
            "UPDATE outbox_hold SET first_refused_at = first_refused_at - %s * interval '1 second'", (seconds,)
        )

    def connect_to(self, publisher: Centrifugo) -> None:
        """Publish there from now on."""
        self._publisher.close()
        self._publisher = publisher
        self._worker = Worker(self._store, publisher, self._options, self._shared)

    @property
    def pauses(self) -> bool:
        """Whether the relay takes what happens for an outage."""
        return self._shared.pause.outage

    @property
    def pause_left(self) -> float:
        """Seconds that the relay would wait now."""
        return self._shared.pause._until - boottime()

    @property
    def holds(self) -> list[Hold]:
        rows = self._connection.execute("SELECT aggregate_id::text, tries, attempts FROM outbox_hold ORDER BY 1")
        return [Hold(*row) for row in rows]

    def states(self, aggregate_id: str) -> list[str]:
        """The states of an order's events, in order."""
        rows = self._connection.execute(
            "SELECT state::text FROM outbox WHERE aggregate_id = %s ORDER BY id", (aggregate_id,)
        )
        return [state for (state,) in rows]
