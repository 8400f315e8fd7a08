"""The servers behind the board, and what is done to them."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import sqlalchemy as sa
from sqlalchemy.orm import Session

from examples.board.app import CHANNEL, TITLES, Card, advance, fill, remove
from examples.board.gateway import Gateway
from outbox_relay import enqueue
from outbox_relay.demo.stage import Stage
from outbox_relay.operator import Operator

LIFE: Final = 0.7
"""Seconds between two changes that nobody asked for."""
SECONDS: Final = 5.0
SETTINGS: Final = {"max_attempts": 3, "min_age": 2, "backoff_base": 0.3, "backoff_max": 1}
"""A poisoned event is given up soon: nobody wants to wait for a quarter of an hour here."""
CONFIG: Final = {
    "channel": {
        "namespaces": [
            {
                "name": "hist",
                "history_size": 1000,
                "history_ttl": "600s",
                "force_recovery": True,
                "allow_subscribe_for_client": True,
                "allow_subscribe_for_anonymous": True,
                "publication_data_format": "json_object",  # what is none is refused: the poison
            }
        ]
    }
}


class Harm(NamedTuple):
    """Something that a button does. `label` is what it says."""

    label: str
    do: Callable[[Playground], None]


class Playground:
    """PostgreSQL, Centrifugo, two relays behind a gateway, and somebody who changes cards, in a `with` block.

    `tell` hears of everything that is done to them. Whoever holds `life` keeps that somebody from changing anything.
    `healed` is when the last harm was over, in seconds of `time.time()`. Raises EmbeddedError if a server or a relay
    cannot be started.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.stage = Stage(tell, front=self._front, settings=SETTINGS, config=CONFIG)
        self.life = threading.Lock()
        self.healed = 0.0
        self._tell = tell
        self._closing = threading.Event()
        self._busy = threading.Lock()
        self._cleanup = ExitStack()
        self._backup: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            cleanup.enter_context(self.stage)
            fill(self.engine)
            self._backup = self._cards()
            cleanup.callback(self._closing.set)
            threading.Thread(target=self._live, name="life", daemon=True).start()
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @property
    def engine(self) -> sa.Engine:
        return self.stage.engine

    def harm(self, name: str) -> None:
        """Do one of HARM, and return once it is over. One at a time: a second one waits."""
        with self._busy:
            self._tell(f"board: {HARM[name].label}")
            HARM[name].do(self)
            self.healed = time.time()

    def _front(self, api_url: str) -> Gateway:
        self.gateway = Gateway(api_url)
        return self.gateway

    def _live(self) -> None:
        while not self._closing.wait(LIFE):
            with self.life:
                advance(self.engine, str(random.randint(1, len(TITLES))))  # noqa: S311

    def _cards(self) -> list[dict[str, Any]]:
        with Session(self.engine) as session:
            return [card.as_json() for card in session.scalars(sa.select(Card))]

    # Harm

    def delay(self) -> None:
        """Nothing reaches Centrifugo for 5 s; then everything does, also what a relay gave up waiting for."""
        self.gateway.open.clear()
        self._closing.wait(SECONDS)
        self.gateway.open.set()

    def repeat(self) -> None:
        """For 5 s everything is published a second time, 5 s later, after what has changed in the meantime."""
        self.gateway.repeat = SECONDS
        self._closing.wait(SECONDS)
        self.gateway.repeat = 0.0
        self.gateway.wait_repeated()

    def kill_relay(self) -> None:
        numbers = range(len(self.stage.relays))
        for number in numbers:
            self.stage.kill_relay(number)
        self._closing.wait(1.0)
        for number in numbers:
            self.stage.start_relay(number)
        for number in numbers:
            self.stage.relays[number].wait_started()

    def kill_centrifugo(self) -> None:
        self.stage.kill_centrifugo()
        self._closing.wait(1.0)
        self.stage.start_centrifugo()

    def poison(self) -> None:
        """An event that Centrifugo refuses, because it is no JSON object; its card waits until the relay gives it up.

        That takes 2 s at least, and others that are accepted meanwhile: without them it could be an outage.
        """
        event_id = uuid.uuid4()
        with Session(self.engine) as session, session.begin():
            card = session.scalars(sa.select(Card).order_by(Card.id).with_for_update()).first()
            if card is None:
                return
            poisoned, version = card.id, card.version
            event = enqueue("cards", poisoned, version=version, channels=CHANNEL, payload=["poison"], event_id=event_id)
            session.execute(event)
        advance(self.engine, poisoned)
        state = sa.text("SELECT state::text FROM outbox WHERE event_id = :event_id")
        while not self._closing.wait(0.1):
            with self.engine.connect() as connection:
                if connection.scalar(state, {"event_id": event_id}) not in {"pending", "parked"}:
                    return

    def recreate(self) -> None:
        """Delete a card and make it anew, twice."""
        with self.life:  # which would make it anew as well
            for _ in range(2):
                remove(self.engine, "1")
                advance(self.engine, "1")

    def restore(self) -> None:
        """The cards as they were at the start, with the versions that they had; then what an operator does about it."""
        with Session(self.engine) as session, session.begin():
            session.execute(sa.text("LOCK TABLE cards IN ACCESS EXCLUSIVE MODE"))
            session.execute(sa.text("DELETE FROM cards"))
            session.execute(sa.insert(Card.__table__), self._backup)  # type: ignore[arg-type]
        Operator(self.stage.database_url).bump_epoch()


HARM: Final[dict[str, Harm]] = {
    "delay": Harm("Hold everything back for 5 s", Playground.delay),
    "repeat": Harm("Repeat everything 5 s later", Playground.repeat),
    "kill-relay": Harm("Kill both relays", Playground.kill_relay),
    "kill-centrifugo": Harm("Kill Centrifugo with its memory", Playground.kill_centrifugo),
    "poison": Harm("Poison an event", Playground.poison),
    "recreate": Harm("Delete a card and make it anew", Playground.recreate),
    "restore": Harm("Restore an old backup", Playground.restore),
}
"""What the page has buttons for, beside cutting its own network."""
