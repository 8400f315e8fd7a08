"""The proxy between the relays and Centrifugo: it writes down every request, and does what middle boxes do.

Its log is a witness of its own: what was sent, what Centrifugo answered, and whether the relay was told.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.failpoints import BEGAN
from tests.support.gateway import Exchange, Fault, Gateway
from tests.support.oracle import DROPPED


class Window(Gateway):
    """A gateway that logs to `path`, one JSON line a step; a relay is told apart by the first part of its URL's path.

    `relay_faults` are for the requests of one relay, before `fault`, which is for all.
    """

    def __init__(self, upstream: str, path: Path) -> None:
        self.relay_faults: dict[str, Fault] = {}
        self._log = path.open("a", encoding="utf-8", buffering=1)
        self._count = 0
        self._guard = threading.Lock()
        super().__init__(upstream, self._dispatch)
        self.everybodys: Fault | None = None

    def url_for(self, relay: str) -> str:
        return f"{self.url}/{relay}"

    @contextmanager
    def doing(self, fault: Fault, relay: str | None = None) -> Iterator[None]:
        """Let `fault` answer the requests of all relays, or of one."""
        if relay is None:
            self.everybodys = fault
        else:
            self.relay_faults[relay] = fault
        try:
            yield
        finally:
            if relay is None:
                self.everybodys = None
            else:
                self.relay_faults.pop(relay, None)

    def heard(self, exchange: Exchange) -> None:
        sent = [(c.channels, c.events) for c in exchange.commands]
        with self._guard:
            self._count += 1
            exchange.number = self._count
            at = time.time()
            # Only a relay of ours says it.
            age = time.monotonic() - float(exchange.headers[BEGAN]) if BEGAN in exchange.headers else 0.0
            self._write({"n": exchange.number, "at": at, "began": at - age, "relay": _relay(exchange), "sent": sent})

    def executed(self, exchange: Exchange, status: int, body: bytes) -> None:
        codes: list[list[int]] = []
        if status == 200:
            replies = json.loads(body).get("replies", [])
            codes = [_codes(reply, len(c.channels)) for reply, c in zip(replies, exchange.commands, strict=True)]
        with self._guard:
            self._write({"n": exchange.number, "at": time.time(), "executed": codes})

    def answering(self, exchange: Exchange, status: int) -> None:
        with self._guard:
            self._write({"n": exchange.number, "at": time.time(), "answered": status})

    def close_log(self) -> None:
        self._log.close()

    def _dispatch(self, exchange: Exchange) -> None:
        fault = self.relay_faults.get(_relay(exchange)) or self.everybodys
        if fault is None:
            exchange.answer(*exchange.forward())
        else:
            fault(exchange)

    def _write(self, line: dict[str, Any]) -> None:
        self._log.write(json.dumps(line, separators=(",", ":")) + "\n")


def _relay(exchange: Exchange) -> str:
    return exchange.path.split("/")[1]


def _codes(reply: dict[str, Any], channels: int) -> list[int]:
    """The error codes of a command's channels, 0 for none, `DROPPED` where Centrifugo knows better."""
    if "error" in reply:
        return [reply["error"]["code"]] * channels
    if "broadcast" in reply:
        return [response.get("error", {}).get("code", 0) for response in reply["broadcast"]["responses"]]
    return [DROPPED if reply.get("map_publish", {}).get("suppress_reason") == "version" else 0]
