"""The order of the demo: start, harm on schedule, stop the writers, wait until all is delivered, judge."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from queue import Empty, SimpleQueue
from types import FrameType, TracebackType
from typing import Final, Self

from rich.console import Console, RenderableType
from rich.live import Live

from outbox_relay.demo import view
from outbox_relay.demo.ledger import Ledger, percentile
from outbox_relay.demo.screen import Subscriber
from outbox_relay.demo.shop import CHANNEL, Shop, count_states, load_orders, load_outbox
from outbox_relay.demo.stage import Stage, harm
from outbox_relay.demo.verdict import Clause, Facts, judge

TICK: Final = 0.25
PLAIN_LINE_SECONDS: Final = 2.0
FRAMES_PER_SECOND: Final = 8
DRAIN_SECONDS: Final = 30.0
DRAIN_TICK: Final = 0.1

Interrupted = SimpleQueue[int]
"""The signals that came; a queue because a handler may put into this one at any moment without a deadlock."""


class Demo:
    """Everything that runs, from the start of the `with` block to its end. Raises EmbeddedError.

    What happens is printed as lines, except while a live view shows it (see `shown`).
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = False
        self._started_at = time.monotonic()
        self._story: list[tuple[float, str]] = []
        self._states: dict[str, int] = {}
        self._ledger = Ledger()
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            self._stage = cleanup.enter_context(Stage(self._tell))
            self._subscriber = cleanup.enter_context(
                Subscriber(
                    self._stage.centrifugo.ws_url,
                    CHANNEL,
                    lambda: load_orders(self._stage.engine),
                    self._ledger,
                    self._tell,
                )
            )
            self._shop = cleanup.enter_context(Shop(self._stage.engine, self._ledger))
            self._tell("the subscriber listens, the application writes")
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show a live view where the console is a terminal that can, and lines elsewhere."""
        if not self._console.is_interactive:
            yield
            return
        self._live = True
        with Live(get_renderable=self.frame, console=self._console, refresh_per_second=FRAMES_PER_SECOND):
            yield

    def play(self, seconds: float | None, interrupted: Interrupted) -> None:
        """Do harm on schedule, until `seconds` are over or a signal comes."""
        started_at = time.monotonic()
        schedule = harm(seconds)
        due = next(schedule, None)
        line_at = PLAIN_LINE_SECONDS
        while True:
            now = time.monotonic() - started_at
            if due is not None and now >= due.at:
                due.do(self._stage)
                due = next(schedule, None)
                continue
            if seconds is not None and now >= seconds:
                return
            self._states = count_states(self._stage.engine)
            if not self._live and now >= line_at:
                self._print(view.line(self._moment()))
                line_at += PLAIN_LINE_SECONDS
            waits = (TICK, due.at - now if due else TICK, seconds - now if seconds is not None else TICK)
            if _interrupted_within(min(waits), interrupted):
                return

    def finish(self, interrupted: Interrupted) -> list[Clause]:
        """Stop the writers, wait until the verdict is true, for 30 s at most or until a signal, and return it."""
        self._tell("the writers stop, the rest is delivered")
        self._shop.close()
        self._stage.restore()
        deadline = time.monotonic() + DRAIN_SECONDS
        while True:
            self._states = count_states(self._stage.engine)
            verdict = judge(self._facts())
            if all(clause.holds for clause in verdict) or time.monotonic() > deadline:
                return verdict
            if _interrupted_within(DRAIN_TICK, interrupted):
                return verdict

    def summary(self) -> str:
        """What the run was like, in one line. The lag is that of the whole run, outages included."""
        tally, lags = self._ledger.tally(), self._ledger.lags()
        p50, p99 = (view.milliseconds(percentile(lags, percent)) for percent in (50, 99))
        return (
            f"rolled back {tally.rolled_back:,}, duplicates {tally.duplicates:,}; "
            f"killed: relay {self._stage.relay_kills}, Centrifugo {self._stage.centrifugo_kills}; "
            f"lag p50 {p50}, p99 {p99}"
        )

    def frame(self) -> RenderableType:
        """The live view as it is now."""
        return view.frame(self._moment())

    def _facts(self) -> Facts:
        # The screen first: what it shows must be in the database that is read after it.
        screen = self._subscriber.screen
        rows, reloaded, received = dict(screen.rows), screen.reloaded, self._ledger.received()
        failures = [failure for relay in self._stage.relays if (failure := relay.failure)]
        return Facts(
            committed=self._ledger.committed(),
            outbox=load_outbox(self._stage.engine),
            database=load_orders(self._stage.engine),
            screen=rows,
            received=received,
            reloaded=reloaded,
            backwards=screen.backwards,
            troubles=[*self._ledger.troubles, *failures],
        )

    def _moment(self) -> view.Moment:
        stage, subscriber = self._stage, self._subscriber
        return view.Moment(
            seconds=time.monotonic() - self._started_at,
            tally=self._ledger.tally(),
            pending=self._states.get("pending", 0) + self._states.get("parked", 0),
            delivered=self._states.get("delivered", 0),
            parts=[
                *(view.Part(relay.name, relay.pid is not None) for relay in stage.relays),
                view.Part("Centrifugo", stage.centrifugo_runs),
                view.Part("subscriber", subscriber.connected),
            ],
            story=tuple(self._story),
            arrivals=subscriber.screen.last,
        )

    def _tell(self, text: str) -> None:
        self._story.append((time.monotonic() - self._started_at, text))
        if not self._live:
            self._print(text)

    def _print(self, text: str) -> None:
        seconds = time.monotonic() - self._started_at
        self._console.print(f"{seconds:5.1f} s  {text}", markup=False, soft_wrap=True)


@contextmanager
def interruptions() -> Iterator[Interrupted]:
    """Collect SIGINT and SIGTERM instead of dying of them."""
    signals: Interrupted = SimpleQueue()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        signals.put(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted_within(seconds: float, interrupted: Interrupted) -> bool:
    try:
        interrupted.get(timeout=max(0.0, seconds))
    except Empty:
        return False
    return True
