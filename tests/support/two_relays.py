"""Two workers over one outbox in memory that die and lose their database; what else happens is a state machine's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, cast

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.options import Options
from outbox_relay.relay import Publisher, Worker
from outbox_relay.shared import Pause, Shared
from outbox_relay.store import Store
from tests.support.memory import Memory


class KilledError(BaseException):
    """The end of a relay, in the middle of what it did."""


class Heard(Publisher, Protocol):
    """A publisher that keeps what it has heard."""

    kills_after: float
    """In so many requests the relay dies: the last one is heard, and its answer is not."""

    @property
    def log(self) -> Sequence[object]: ...

    def undo(self, since: int) -> None:
        """The batch in which everything from here on was heard is rolled back."""


class TwoRelays(RuleBasedStateMachine):
    def __init__(self, memory: Memory, publisher: Heard, options: Options) -> None:
        super().__init__()
        self.memory = memory
        self._publisher = publisher
        self._options = options
        self.workers = [self._start_relay() for _ in range(2)]

    def worked(self) -> None:
        """A batch is over, well or not."""

    @rule(relay=st.integers(0, 1), requests=st.integers(0, 4))
    def a_relay_dies(self, relay: int, requests: int) -> None:
        """In the middle of a batch, if that has so many requests. Another one is started in its place."""
        began = len(self._publisher.log)
        self._publisher.kills_after = requests
        try:
            self.workers[relay].run_once()
        except KilledError:
            self._publisher.undo(began)
        self._publisher.kills_after = math.inf
        self.workers[relay] = self._start_relay()
        self.worked()

    @rule(relay=st.integers(0, 1))
    def a_relay_loses_its_database(self, relay: int) -> None:
        """Having sent, and before it can write what came of it. It knows what it has seen, and begins a new session."""
        began = len(self._publisher.log)
        self.memory.fails_to_settle = True
        try:
            self.workers[relay].run_once()
        except DatabaseUnavailableError:
            self._publisher.undo(began)
        self.memory.fails_to_settle = False
        self.worked()

    def _start_relay(self) -> Worker:
        shared = Shared(Pause(self._options.pause_min, self._options.pause_max))
        return Worker(cast(Store, self.memory), self._publisher, self._options, shared)
