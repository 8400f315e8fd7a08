"""httpx's transport, whose time-outs are per operation, with one deadline for the whole request.

A process that was stopped in mid-request and goes on after the deadline sends not one byte more: the server sees
a request cut short and runs none of it.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any, Final

import httpcore
import httpx

from outbox_relay.outcome import boottime

_CHUNK: Final = 256 * 1024


class Deadline:
    """When the request under way must have ended, on `boottime()`, which goes on while the process is stopped."""

    def __init__(self) -> None:
        self.at = 0.0

    def left(self, expired: type[httpcore.TimeoutException]) -> float:
        """Seconds until the deadline. Raises `expired` when there are none."""
        left = self.at - boottime()
        if left <= 0:
            raise expired("the request's deadline has passed")
        return left


class DeadlineTransport(httpx.HTTPTransport):
    """One kept-alive connection, on which nothing is sent or awaited past `deadline`."""

    def __init__(self, deadline: Deadline, verify: ssl.SSLContext | bool) -> None:
        super().__init__(verify=verify, trust_env=False)
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpx.create_ssl_context(verify=verify, trust_env=False),
            max_connections=1,
            max_keepalive_connections=1,
            keepalive_expiry=10.0,
            network_backend=_Backend(deadline),
        )

    def drop_surplus(self) -> None:
        """Close a kept-alive connection that holds more than the last answer.

        httpcore would take those bytes, of a proxy that answers twice, for the answer to the next request.
        """
        for connection in self._pool.connections:
            http11 = connection._connection  # type: ignore[attr-defined]  # noqa: SLF001 - no public name tells it
            if http11 is not None and http11._h11_state.trailing_data[0]:  # noqa: SLF001
                connection.close()


class _Backend(httpcore.NetworkBackend):
    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - the deadline stands in its place, here and below
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        left = self._deadline.left(httpcore.ConnectTimeout)
        return _Stream(self._inner.connect_tcp(host, port, left, local_address, socket_options), self._deadline)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._inner = inner
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        return self._inner.read(max_bytes, self._deadline.left(httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        for start in range(0, len(buffer), _CHUNK):
            self._inner.write(buffer[start : start + _CHUNK], self._deadline.left(httpcore.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        left = self._deadline.left(httpcore.ConnectTimeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
