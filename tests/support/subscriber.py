"""A subscriber that shares no code with the relay: Centrifugo's JSON protocol on a bare WebSocket.

Data is cut out of the frames as bytes, never parsed, so that a test sees what was on the wire.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from tests.support.waiting import PATIENCE

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


class Publication(NamedTuple):
    """One publication as it arrived. `offset` is 0 where the channel keeps no history."""

    channel: str
    data: bytes
    tags: dict[str, str]
    offset: int

    @property
    def aggregate(self) -> tuple[str, str]:
        return self.tags["ob_type"], self.tags["ob_id"]

    @property
    def version(self) -> int:
        return int(self.tags["ob_version"])


class Subscriber:
    """Subscribed to `channels` from the moment the constructor returns until `close`.

    Reconnects and recovers by itself; `connections` counts. `lost` says why the stream has a hole: whoever
    judges completeness by this subscriber must check that it is None.
    """

    def __init__(self, url: str, channels: Sequence[str]) -> None:
        self.lost: str | None = None
        self.connections = 0
        self._url = url
        self._positions: dict[str, tuple[int, str]] = dict.fromkeys(channels, (0, ""))
        self._received: list[Publication] = []
        self._changed = threading.Condition()
        self._subscribed = threading.Event()
        self._closing = threading.Event()
        self._connection: ClientConnection | None = None
        self._thread = threading.Thread(target=self._run, name="subscriber", daemon=True)
        self._thread.start()
        if not self._subscribed.wait(PATIENCE):
            self.close()
            raise AssertionError(f"could not subscribe within {PATIENCE:g} s: {self.lost}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._closing.set()
        connection = self._connection
        if connection is not None:
            connection.close()
        self._thread.join(PATIENCE)

    @property
    def received(self) -> list[Publication]:
        """Everything received so far, in order of arrival."""
        with self._changed:
            return list(self._received)

    def wait_for(self, count: int, seconds: float = PATIENCE) -> list[Publication]:
        """Wait until at least `count` publications have arrived, and return all there are."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._received) >= count, seconds):
                raise AssertionError(
                    f"{len(self._received)} of {count} publications within {seconds:g} s (lost: {self.lost})"
                )
            return list(self._received)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                with connect(self._url, max_size=None, ping_interval=None, compression=None) as connection:
                    self._connection = connection
                    self.connections += 1
                    self._listen(connection)
            except (OSError, EOFError, WebSocketException):
                time.sleep(0.02)  # nobody tells when the server is back

    def _listen(self, connection: ClientConnection) -> None:
        connection.send(json.dumps({"id": 1, "connect": {}}))
        asked: dict[int, str] = {}
        for id_, (channel, (offset, epoch)) in enumerate(self._positions.items(), 2):
            asked[id_] = channel
            request = {"channel": channel, "recover": True, "offset": offset, "epoch": epoch}
            connection.send(json.dumps({"id": id_, "subscribe": request}))
        while True:
            frame = connection.recv(decode=False)
            for line in frame.split(b"\n"):
                if line == b"{}":
                    connection.send("{}")
                elif line:
                    self._take(line, asked)

    def _take(self, line: bytes, asked: dict[int, str]) -> None:
        message = members(line)
        if "error" in message:
            self.lost = f"refused: {message['error'].decode()}"
        elif "subscribe" in message:
            channel = asked.pop(json.loads(message["id"]))
            reply = members(message["subscribe"])
            if reply.get("was_recovering") == b"true" and reply.get("recovered") != b"true":
                self.lost = f"{channel} was not recovered"
            offset, epoch = self._positions[channel]
            new_epoch = json.loads(reply.get("epoch", b'""'))
            self._positions[channel] = (offset if new_epoch == epoch else int(reply.get("offset", b"0"))), new_epoch
            for publication in items(reply.get("publications", b"[]")):
                self._record(channel, members(publication))
            if not asked:
                self._subscribed.set()
        elif "push" in message:
            push = members(message["push"])
            if "pub" in push:
                self._record(json.loads(push["channel"]), members(push["pub"]))
            elif "unsubscribe" in push:
                self.lost = f"unsubscribed: {message['push'].decode()}"

    def _record(self, channel: str, publication: dict[str, bytes]) -> None:
        offset = int(publication.get("offset", b"0"))
        if offset:
            self._positions[channel] = (offset, self._positions[channel][1])
        tags: dict[str, str] = json.loads(publication.get("tags", b"{}"))
        with self._changed:
            self._received.append(Publication(channel, publication["data"], tags, offset))
            self._changed.notify_all()


def members(text: bytes) -> dict[str, bytes]:
    """The members of a JSON object, their values as the bytes that are there."""
    return {json.loads(key): value for key, value in _pairs(text)}


def items(text: bytes) -> list[bytes]:
    """The items of a JSON array, as the bytes that are there."""
    return [text[start:end] for start, end in _parts(text)]


def _pairs(text: bytes) -> Iterator[tuple[bytes, bytes]]:
    for start, end in _parts(text):
        key = _TOKEN.match(text, start)
        assert key is not None, text[:200]
        yield key[0], text[key.end() : end].lstrip()[1:].strip()


def _parts(text: bytes) -> Iterator[tuple[int, int]]:
    """Where the comma-separated parts of the outermost object or array begin and end."""
    depth = 0
    start: int | None = None
    for token in _TOKEN.finditer(text):
        mark = token[0]
        if depth == 1 and start is None and mark not in b"}]":
            start = token.start()
        if mark in (b"{", b"["):
            depth += 1
        elif mark in (b"}", b"]"):
            depth -= 1
        if start is not None and ((depth == 1 and mark == b",") or depth == 0):
            yield start, token.start()
            start = None


def as_json(publication: Publication) -> Any:
    """The data parsed, for tests that are not about its bytes."""
    return json.loads(publication.data)
