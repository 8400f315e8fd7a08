"""An ordinary FastAPI and SQLAlchemy application: cards that change, the page, and what the page loads.

Nothing in it knows of relays or of harm; what it needs for its page to be live is `@publishes` and `/cards`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import sqlalchemy as sa
from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import FileResponse
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox_relay import epoch, publishes

CHANNEL: Final = "hist:cards"
STATUSES: Final = ("to do", "doing", "done")
TITLES: Final = ("Order coffee", "Paint the fence", "Call the bank", "Water plants", "Fix the bike", "Write a letter")
ASSETS: Final = Path(__file__).parent / "static"
CLIENT: Final = Path(__file__).parent.parent.parent / "clients" / "js"


def next_version(previous: int | None) -> int:
    """Milliseconds since 2026: a card that is made anew never starts below its tombstone."""
    return max((previous or 0) + 1, time.time_ns() // 1_000_000 - 1_767_225_600_000)


class Base(DeclarativeBase):
    pass


@publishes(channels=CHANNEL, payload=lambda card: card.as_json())
class Card(Base):
    """A card. SQLAlchemy raises the version with every UPDATE, and every flush writes the event."""

    __tablename__ = "cards"

    id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(sa.BigInteger)
    title: Mapped[str]
    status: Mapped[str]

    __mapper_args__ = {"version_id_col": version, "version_id_generator": next_version}  # noqa: RUF012

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "version": self.version, "title": self.title, "status": self.status}


def fill(engine: sa.Engine) -> None:
    """The tables, and the cards that the board starts with."""
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        for number, title in enumerate(TITLES, 1):
            session.add(Card(id=str(number), title=title, status=STATUSES[0]))


def advance(engine: sa.Engine, card_id: str) -> None:
    """Move a card on; one that is not there is made anew."""
    with Session(engine) as session, session.begin():
        card = session.get(Card, card_id, with_for_update=True)
        if card is None:
            title = TITLES[(int(card_id) - 1) % len(TITLES)]
            session.add(Card(id=card_id, title=title, status=STATUSES[0]))
        else:
            card.status = STATUSES[(STATUSES.index(card.status) + 1) % len(STATUSES)]


def remove(engine: sa.Engine, card_id: str) -> None:
    with Session(engine) as session, session.begin():
        card = session.get(Card, card_id, with_for_update=True)
        if card is not None:
            session.delete(card)


def create_app(engine: Callable[[], sa.Engine], websocket: Callable[[], str]) -> FastAPI:
    """`engine` is the database; `websocket` the address where Centrifugo serves pages."""
    app = FastAPI(openapi_url=None)
    files = {path.name: path for path in (*ASSETS.iterdir(), CLIENT / "index.js", CLIENT / "replica.js")}

    @app.get("/cards")
    def cards(keys: Annotated[str, Query()] = "") -> dict[str, Any]:
        """What a page loads: the cards with these keys, or all. The epoch is read before them, in one session."""
        with Session(engine()) as session:
            said = session.scalar(epoch())
            query = sa.select(Card).order_by(Card.id)
            if keys:
                query = query.where(Card.id.in_(keys.split(",")))
            return {"epoch": said, "objects": [card.as_json() for card in session.scalars(query)]}

    @app.post("/cards/{card_id}", status_code=204)
    def move(card_id: str) -> None:
        if not card_id.isdecimal():
            raise HTTPException(404)
        advance(engine(), card_id)

    @app.delete("/cards/{card_id}", status_code=204)
    def delete(card_id: str) -> None:
        remove(engine(), card_id)

    @app.get("/settings")
    def settings() -> dict[str, str]:
        return {"websocket": websocket(), "channel": CHANNEL}

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(files["index.html"])

    @app.get("/static/{name}")
    def asset(name: str) -> FileResponse:
        if name not in files:
            raise HTTPException(404)
        return FileResponse(files[name])

    return app
