"""An independent subscriber that costs next to nothing: it keeps the bytes of its WebSocket and reads them afterwards.

`python -m bench.witness` is a process of its own. A Python client that decodes each message would be the slowest part
of the run; this one calls recv. All sides have the same witness, so all pay the same for being watched.
"""

from __future__ import annotations

import base64
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self
from urllib.parse import urlsplit

import orjson

from bench.harness import WrongRunError

_MARK: Final = b'"ob_version":"'
"""Once in a publication, and once for each event in a bundle."""


class Seen(NamedTuple):
    """What a witness saw. Times are of `time.monotonic()`, which all processes of a machine share."""

    first_at: float
    last_at: float
    received: int
    """Events, duplicates included."""
    first_burst: int
    """How many of them came with the first bytes."""
    duplicates: int
    lost: int
    inverted: int
    lags: list[float]
    """Seconds from `sent_at` in the payload to the arrival, where it has one."""
    arrivals: list[float]
    """When those arrived."""

    @property
    def rate(self) -> float:
        """Publications per second between the first and the last one: what came before is start-up."""
        return (self.received - self.first_burst) / (self.last_at - self.first_at)


class Witness:
    """Subscribes from the start of the `with` block; `wait` returns what was seen of `events` events.

    Per aggregate versions must come as 1, 2, 3, …; the process checks that. `mid_stream`: as n, n + 1, n + 2, …,
    because others have seen those before. More may be pending than `events`: it leaves when it has seen as many.
    `newest`: only that version of every aggregate counts, and what came before it need not be all, but must rise.
    """

    def __init__(
        self,
        ws_url: str,
        channels: Sequence[str],
        events: int,
        *,
        seconds: float = 120.0,
        mid_stream: bool = False,
        newest: int | None = None,
    ) -> None:
        self._seconds = seconds
        request = {
            "ws_url": ws_url,
            "channels": list(channels),
            "events": events,
            "seconds": seconds,
            "mid_stream": mid_stream,
            "newest": newest,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.witness"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        if self._line() != {"subscribed": True}:
            raise WrongRunError("the witness could not subscribe")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def enough(self, events: int) -> None:
        """Say that `events` events were all, so that it leaves once nothing more comes, duplicates included."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n" % events)
        self._process.stdin.flush()

    def finished(self) -> None:
        """Wait until all publications have arrived, or time is up: the moment to look at other clocks."""
        if "arrived" not in self._line():
            raise WrongRunError("the witness ended early")

    def wait(self, *, strict: bool = True, arrived: bool = False) -> Seen:
        """Wait for all publications and check them. Raises WrongRunError where one is lost, or out of order.

        Without `strict` the order is only counted: a side that promises none is not wrong.
        """
        if not arrived:
            self.finished()
        seen = Seen(**self._line())
        if seen.lost or (strict and seen.inverted):
            raise WrongRunError(f"{seen.lost} lost, {seen.inverted} out of order, {seen.duplicates} duplicates")
        return seen

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], self._seconds + 60)
        line = self._process.stdout.readline() if readable else b""
        if not line:
            raise WrongRunError("the witness has nothing to say")
        said: dict[str, Any] = json.loads(line)
        return said


def _main() -> None:
    request = json.loads(sys.stdin.readline())
    connection = _connect(request["ws_url"])
    mark = _MARK if request["newest"] is None else b'%b%d"' % (_MARK, request["newest"])
    record = _Record(connection, _subscribe(connection, request["channels"]), request["seconds"], mark)
    _say({"subscribed": True})
    events = record.until(request["events"])
    _say({"arrived": True})
    if request["newest"] is not None:
        _say(_judge_newest(record.chunks, events, request["newest"])._asdict())
        return
    seen = _judge(record.chunks, events, mid_stream=request["mid_stream"])
    while seen.lost and not record.over:
        # Duplicates came in the place of events that may still be on their way.
        record.until(seen.received + seen.lost)
        seen = _judge(record.chunks, events, mid_stream=request["mid_stream"])
    _say(seen._asdict())


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _connect(ws_url: str) -> socket.socket:
    url = urlsplit(ws_url)
    connection = socket.create_connection((url.hostname or "", url.port or 80), 10)
    key = base64.b64encode(os.urandom(16)).decode()
    connection.sendall(
        f"GET {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += connection.recv(1)
    if b" 101 " not in answer.split(b"\r\n", 1)[0]:
        raise WrongRunError(answer.decode(errors="replace"))
    return connection


def _send(connection: socket.socket, text: bytes) -> None:
    """One masked text frame; a mask of zeros is a mask."""
    size = len(text)
    head = bytes([0x81, 0x80 | size]) if size < 126 else bytes([0x81, 0xFE]) + size.to_bytes(2, "big")
    connection.sendall(head + bytes(4) + text)


def _subscribe(connection: socket.socket, channels: Sequence[str]) -> bytes:
    """Connect and subscribe; returns all that came until the last answer was there, publications perhaps among it."""
    _send(connection, b'{"id":1,"connect":{}}')
    for number, channel in enumerate(channels, 2):
        _send(connection, orjson.dumps({"id": number, "subscribe": {"channel": channel}}))
    waiting = set(range(1, len(channels) + 2))
    received = data = b""
    while waiting:
        new = connection.recv(1 << 16)
        if not new:
            raise WrongRunError("Centrifugo has closed the connection")
        received += new
        messages, data = _frames(data + new)
        for message in messages:
            if "error" in message:
                raise WrongRunError(f"cannot subscribe: {message}")
            waiting.discard(message.get("id", 0))
    return received


Chunk = tuple[float, bytes]


class _Record:
    """The bytes of a connection with their times of arrival, for `seconds`; `received` marks are in whole messages."""

    def __init__(self, connection: socket.socket, received: bytes, seconds: float, mark: bytes) -> None:
        self._connection = connection
        self._mark = mark
        self._until = time.monotonic() + seconds
        self._open = True
        self._incomplete = b""
        self.chunks: list[Chunk] = []
        self.received = 0
        connection.settimeout(0.5)
        self._keep(received)

    @property
    def over(self) -> bool:
        """Whether nothing more is to be expected."""
        return not self._open or time.monotonic() > self._until

    def until(self, events: int) -> int:
        """Go on until as many are here, or all that are to be expected; returns how many had to be."""
        while self.received < events and not self.over:
            try:
                data = self._connection.recv(1 << 20)
            except TimeoutError:
                if select.select([sys.stdin], [], [], 0)[0]:
                    self._open = False
                    return int(sys.stdin.readline())
                continue
            if data:
                self._keep(data)
            else:
                self._open = False
        return events

    def _keep(self, data: bytes) -> None:
        self.chunks.append((time.monotonic(), data))
        data = self._incomplete + data
        at = 0
        while (found := _message(data, at)) is not None:
            payload, at = found
            self.received += payload.count(self._mark)
        self._incomplete = data[at:]


def _frames(data: bytes) -> tuple[list[dict[str, Any]], bytes]:
    """The JSON replies and pushes of all whole messages, and what is left."""
    messages: list[dict[str, Any]] = []
    at = 0
    while (found := _message(data, at)) is not None:
        payload, at = found
        messages += [orjson.loads(line) for line in payload.split(b"\n") if line]
    return messages, data[at:]


def _message(data: bytes, at: int) -> tuple[bytes, int] | None:
    """One unmasked message that starts at `at`, its fragments joined, and where the next one starts.

    None where it is not all there.
    """
    fragments: list[bytes] = []
    final = False
    while not final:
        if len(data) < at + 2:
            return None
        final = bool(data[at] & 0x80)
        size, start = data[at + 1] & 0x7F, at + 2
        if size >= 126:
            width = 2 if size == 126 else 8
            size, start = int.from_bytes(data[start : start + width], "big"), start + width
        at = start + size
        if len(data) < at:
            return None
        fragments.append(data[start:at])
    return b"".join(fragments), at


def _publications(chunks: Sequence[Chunk]) -> Iterator[tuple[float, dict[str, Any]]]:
    """Every publication with the time at which its last byte was here; a bundle as the publications it stands for."""
    data = b"".join(chunk for _, chunk in chunks)
    ends: list[tuple[int, float]] = []
    end = 0
    for at, chunk in chunks:
        end += len(chunk)
        ends.append((end, at))
    at, position = 0, 0
    while (found := _message(data, at)) is not None:
        payload, at = found
        while ends[position][0] < at:
            position += 1
        for line in payload.split(b"\n"):
            push = orjson.loads(line).get("push") if line else None
            if push and "pub" in push:
                publication = push["pub"]
                for each in publication["data"]["ob"] if "ob_bundle" in publication["tags"] else [publication]:
                    yield ends[position][1], each


def _judge(chunks: Sequence[Chunk], events: int, *, mid_stream: bool) -> Seen:
    """Count what is lost, doubled or out of order: versions of an aggregate are 1, 2, 3, …, or go on from the first."""
    newest: dict[str, int] = {}
    seen: set[tuple[str, int]] = set()
    duplicates = inverted = 0
    times: list[float] = []
    lags: list[float] = []
    arrivals: list[float] = []
    for at, publication in _publications(chunks):
        times.append(at)
        tags = publication["tags"]
        name, version = tags["ob_id"], int(tags["ob_version"])
        if (name, version) in seen:
            duplicates += 1
            continue
        seen.add((name, version))
        inverted += version != newest.get(name, version - 1 if mid_stream else 0) + 1
        newest[name] = max(version, newest.get(name, 0))
        if isinstance(publication["data"], dict) and "sent_at" in publication["data"]:
            lags.append(at - publication["data"]["sent_at"])
            arrivals.append(at)
    lost = max(0, events - len(seen))
    return _seen(times, duplicates=duplicates, lost=lost, inverted=inverted, lags=lags, arrivals=arrivals)


def _judge_newest(chunks: Sequence[Chunk], aggregates: int, version: int) -> Seen:
    """Count the aggregates that have not come to this version, and versions that do not rise."""
    newest: dict[str, int] = {}
    duplicates = inverted = 0
    times: list[float] = []
    for at, publication in _publications(chunks):
        times.append(at)
        name, came = publication["tags"]["ob_id"], int(publication["tags"]["ob_version"])
        duplicates += came == newest.get(name)
        inverted += came < newest.get(name, 0)
        newest[name] = max(came, newest.get(name, 0))
    lost = aggregates - sum(came == version for came in newest.values())
    return _seen(times, duplicates=duplicates, lost=lost, inverted=inverted)


def _seen(
    times: Sequence[float],
    *,
    duplicates: int,
    lost: int,
    inverted: int,
    lags: list[float] | None = None,
    arrivals: list[float] | None = None,
) -> Seen:
    first = times[0] if times else 0.0
    return Seen(
        first_at=first,
        last_at=times[-1] if times else 0.0,
        received=len(times),
        first_burst=sum(at == first for at in times),
        duplicates=duplicates,
        lost=lost,
        inverted=inverted,
        lags=lags or [],
        arrivals=arrivals or [],
    )


if __name__ == "__main__":
    _main()
