"""httpx's transport by the standard library's HTTP, with one deadline for the whole request.

httpx's own time-outs are per operation. A process that was stopped in mid-request and goes on after the deadline sends
not one byte more: the server sees a request cut short and runs none of it. A request of one event also takes a third
less time than by httpx's own transport; one of 1,000 about the same.
"""

from __future__ import annotations

import http.client
import io
import select
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import httpx

from outbox_relay.event import boottime

_CHUNK: Final = 256 * 1024
_WITH_HEAD: Final = 64 * 1024
"""A small request leaves in one piece with its head; of a large one it is not worth the copy."""
_READ: Final = 64 * 1024
_KEEP_ALIVE: Final = 10.0


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
            with _errors(httpx.ReadTimeout, httpx.ReadError):
                response = http.client.HTTPResponse(connection, method=request.method)  # type: ignore[arg-type]
                response.begin()
        except BaseException:
            self.close()
            raise
        # As they came: httpx takes text for ASCII, and a server may send what it likes.
        received = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in response.getheaders()]
        return httpx.Response(response.status, headers=received, stream=_Body(response, self))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def answered(self) -> None:
        """Keep the connection for the next request: the last one's answer was read to its end.

        What came after it, of a proxy that answers twice, is gone with the answer's own buffer.
        """
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


class _Socket:
    """What `http.client` needs of a socket, and what a request does, each call within what is left of the deadline."""

    def __init__(self, inner: socket.socket, deadline: Deadline) -> None:
        self._inner = inner
        self._deadline = deadline

    def sendall(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            self._inner.settimeout(self._deadline.left())
            rest = rest[self._inner.send(rest[:_CHUNK]) :]

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._inner, self._deadline), _READ)

    def readable(self) -> bool:
        poll = select.poll()  # select itself knows no descriptor above 1,023
        poll.register(self._inner, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        self._inner.close()


class _Reader(io.RawIOBase):
    def __init__(self, inner: socket.socket, deadline: Deadline) -> None:
        self._inner = inner
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._inner.settimeout(self._deadline.left())
        return self._inner.recv_into(buffer)

    def readall(self) -> bytes:
        """Refuse: only a chunk of negative size asks for all, and that may be more than the memory holds."""
        raise ValueError("a chunk of negative size")


class _Body(httpx.SyncByteStream):
    """A response's body. A connection whose answer was not read to its end serves no second request."""

    def __init__(self, response: http.client.HTTPResponse, transport: DeadlineTransport) -> None:
        self._response = response
        self._transport = transport

    def __iter__(self) -> Iterator[bytes]:
        with _errors(httpx.ReadTimeout, httpx.ReadError):
            while chunk := self._response.read(_READ):
                yield chunk
            if self._response.length:
                raise http.client.IncompleteRead(b"", self._response.length)

    def close(self) -> None:
        if self._response.isclosed() and not self._response.length and not self._response.will_close:
            self._transport.answered()
        else:
            self._transport.close()
        self._response.close()


@contextmanager
def _errors(expired: type[httpx.TimeoutException], broken: type[httpx.NetworkError]) -> Iterator[None]:
    """Raise httpx's errors for the standard library's."""
    try:
        yield
    except TimeoutError as error:
        raise expired(str(error)) from error
    except (http.client.HTTPException, ValueError) as error:
        raise httpx.RemoteProtocolError(f"{type(error).__name__}: {error}") from error
    except OSError as error:
        raise broken(str(error)) from error
