"""Logs of the relay: structlog events on the standard library's logger `outbox_relay`.

Inside an application they go wherever its own logging sends them. `configure` is for the command line.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from typing import Any, Final, Literal

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

NAME: Final = "outbox_relay"
MASK: Final = "***"


def get_logger() -> structlog.stdlib.BoundLogger:
    """A structured logger over the standard library's: the event is the message, the rest is `extra`."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(NAME),
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return logger


def configure(form: Literal["console", "json"], level: str, secrets: Iterable[str]) -> None:
    """Write logs to standard error as lines for people or as JSON lines, with every secret masked."""
    renderer: Processor = (
        structlog.processors.JSONRenderer(serializer=lambda event, **_: json_text(orjson.dumps(event, default=str)))
        if form == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.ExtraAdder(),
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            Redactor(secrets),
            *(() if form == "json" else (_escaped,)),
            renderer,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(NAME).setLevel(level.upper())
    # httpx logs every request's URL at INFO.
    logging.getLogger("httpx").setLevel(logging.WARNING)


def printable(text: str) -> str:
    """Text that came from elsewhere, as one line: what would end it, move the cursor or turn the writing is escaped."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _escaped(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """One line for each field, whatever an event's row or a server's answer holds; tracebacks keep their lines."""
    return {
        key: "\n".join(map(printable, value.split("\n")))
        if key == "exception"
        else printable(value)
        if isinstance(value, str)
        else value
        for key, value in event.items()
    }


def json_text(encoded: bytes) -> str:
    """The same JSON with escapes for what a terminal might obey: JSON itself escapes nothing beyond the blank."""
    text = encoded.decode()
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character < " " else json.dumps(character)[1:-1] for character in text
    )


class Redactor:
    """Replace every secret in whatever is about to be written, wherever it came from."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = sorted({secret for secret in secrets if len(secret) >= 3}, key=len, reverse=True)

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {key: self._clean(value) for key, value in event.items()}

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, int | float | bool) or value is None:
            return value
        return self.text(str(value))

    def text(self, value: str) -> str:
        for secret in self._secrets:
            value = value.replace(secret, MASK)
        return value
