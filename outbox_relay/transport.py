"""httpx's transport with one deadline for the whole request, its answers read by llhttp (`httptools`), as Node.js does.

httpx's own time-outs are per operation. A process that was stopped in mid-request and goes on after the deadline sends
not one byte more: the server sees a request cut short and runs none of it. What a request of one event costs by this
and by other clients says docs/architecture.md.
"""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import httptools
import httpx

from outbox_relay.event import boottime

_CHUNK: Final = 256 * 1024
_WITH_HEAD: Final = 64 * 1024
"""A small request leaves in one piece with its head; of a large one it is not worth the copy."""
_READ: Final = 64 * 1024
_BESIDE_BODY: Final = 64 * 1024
"""Bytes, at most, that come without any of the body: a head, interim answers, a trailer."""
_KEEP_ALIVE: Final = 10.0
_MALFORMED: Final = (httptools.HttpParserError, httptools.HttpParserUpgrade)


class Deadline:
    """When the request under way must have ended, on `boottime()`, which goes on while the process is stopped."""

    def __init__(self) -> None:
        self.at = 0.0

    def left(self) -> float:
        """Seconds until the deadline. Raises TimeoutError when there are none."""
        left = self.at - boottime()
        if left <= 0:
            raise TimeoutError("the request's deadline has passed")
        return left


class DeadlineTransport(httpx.BaseTransport):
    """One kept-alive connection to one server, on which nothing is sent or awaited past `deadline`."""

    def __init__(self, deadline: Deadline, verify: ssl.SSLContext | bool) -> None:
        self._deadline = deadline
        self._verify = verify
        self._tls: ssl.SSLContext | None = None  # some megabytes, so not where nobody needs it
        self._connection: _Socket | None = None
        self._used_at = 0.0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request`; the response's body is read as it is asked for. Raises httpx's errors."""
        connection = self._connected(request.url)
        try:
            with _errors(httpx.WriteTimeout, httpx.WriteError):
                content = memoryview(request.content)
                connection.sendall(_head(request) + content[:_WITH_HEAD])
                connection.sendall(content[_WITH_HEAD:])
            answer = _Answer(connection, self)
            answer.begin()
        except BaseException:
            self.close()
            raise
        return httpx.Response(answer.status, headers=answer.headers, stream=answer)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def answered(self) -> None:
        """Keep the connection for the next request: the last one's answer was read to its end."""
        self._used_at = boottime()

    def _connected(self, url: httpx.URL) -> _Socket:
        """The connection, a new one where the old one may have been given up by the server."""
        if self._connection is not None:
            if boottime() - self._used_at < _KEEP_ALIVE and not self._connection.readable():
                return self._connection
            self.close()
        with _errors(httpx.ConnectTimeout, httpx.ConnectError):
            host, secure = url.raw_host.decode(), url.scheme == "https"
            port = url.port or (443 if secure else 80)
            if secure and self._tls is None:
                self._tls = httpx.create_ssl_context(verify=self._verify, trust_env=False)
            plain = socket.create_connection((host, port), self._deadline.left())
            try:
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                plain.settimeout(self._deadline.left())
                wrapped = self._tls.wrap_socket(plain, server_hostname=host) if self._tls else plain
            except BaseException:
                plain.close()
                raise
        self._connection = _Socket(wrapped, self._deadline)
        return self._connection


def _head(request: httpx.Request) -> bytes:
    """A request up to its content. Raises ValueError where a header would be two."""
    headers = b"".join([b"%b: %b\r\n" % header for header in request.headers.raw])
    if headers.count(b"\n") != len(request.headers):
        raise ValueError("a header with a line break")
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (request.method.encode(), request.url.raw_path, headers)


@contextmanager
def _errors(expired: type[httpx.TimeoutException], broken: type[httpx.NetworkError]) -> Iterator[None]:
    """Raise httpx's errors for those of others."""
    try:
        yield
    except TimeoutError as error:
        raise expired(str(error)) from error
    except OSError as error:  # before ValueError, which a bad certificate is, too
        raise broken(str(error)) from error
    except (*_MALFORMED, ValueError) as error:
        raise httpx.RemoteProtocolError(f"{type(error).__name__}: {error}") from error


class _Socket:
    """A socket of which each call ends within what is left of the deadline."""

    def __init__(self, inner: socket.socket, deadline: Deadline) -> None:
        self._inner = inner
        self._deadline = deadline

    def sendall(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            self._inner.settimeout(self._deadline.left())
            rest = rest[self._inner.send(rest[:_CHUNK]) :]

    def recv(self) -> bytes:
        """What has come, and if nothing has, what comes next; empty at the end."""
        self._inner.settimeout(self._deadline.left())
        return self._inner.recv(_READ)

    def readable(self) -> bool:
        poll = select.poll()  # select itself knows no descriptor above 1,023
        poll.register(self._inner, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        self._inner.close()


class _Answer(httpx.SyncByteStream):
    """An answer, read piece by piece; as a stream its body. What is called `on_` is called by httptools.

    A connection whose answer was not read to its end, or is followed by another one, serves no second request.
    """

    def __init__(self, connection: _Socket, transport: DeadlineTransport) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._connection = connection
        self._transport = transport
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._size = self._idle = 0
        self._begun = self._complete = self._lasting = False

    @_errors(httpx.ReadTimeout, httpx.ReadError)
    def begin(self) -> None:
        """Read the head. Raises httpx's errors, as reading the body does."""
        try:
            while not self._begun:
                self._read()
            self._check_coding()
        except BaseException:
            self._parser = None  # which knows us: a cycle
            raise

    def __iter__(self) -> Iterator[bytes]:
        while True:
            pieces, self._body = self._body, []
            yield b"".join(pieces)
            if self._complete:
                return
            with _errors(httpx.ReadTimeout, httpx.ReadError):
                self._read()

    def close(self) -> None:
        self._parser = None
        if self._complete and self._lasting:
            self._transport.answered()
        else:
            self._transport.close()

    def _read(self) -> None:
        assert self._parser is not None  # noqa: S101 - nobody reads on after `close`
        data = self._connection.recv()
        if not data:
            self._end()
            return
        size = self._size
        try:
            self._parser.feed_data(data)
        except _MALFORMED:
            # What comes after an answer is no part of it.
            self._lasting = False
            if not self._complete:
                raise
        if self._size == size:
            self._idle += len(data)
        if self._idle > _BESIDE_BODY:
            raise ValueError("an answer with too much beside its body")

    def _check_coding(self) -> None:
        codings = [value.strip().lower() for name, value in self.headers if name.lower() == b"transfer-encoding"]
        if codings and codings != [b"chunked"]:
            raise ValueError("a transfer coding that was not asked for")

    def _end(self) -> None:
        """The connection has ended: so has the body, where nothing says how long it is."""
        lengths = {b"content-length", b"transfer-encoding"}
        if not self._begun or any(name.lower() in lengths for name, _ in self.headers):
            raise ValueError("the connection was closed before the end of the answer")
        self._complete = True

    def on_message_begin(self) -> None:
        self._lasting = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._begun:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None  # noqa: S101 - it calls
        if self._begun:
            return
        self.status = self._parser.get_status_code()
        if self.status < 100:
            raise ValueError("not a status")
        if self.status >= 200:
            self._begun, self._lasting = True, self._parser.should_keep_alive()

    def on_body(self, piece: bytes) -> None:
        if not self._begun:
            raise ValueError("an interim answer with a body")
        if not self._complete:
            self._body.append(piece)
            self._size += len(piece)

    def on_message_complete(self) -> None:
        if self._begun:
            self._complete = True
        else:
            self.headers.clear()  # of an interim one
