"""The only room that knows HTTP: events in, exactly one Reply per event out, or one Outage for all of them.

Centrifugo's contract was read from the source of v6.9.1: `api_handler`, `apiproto/errors.go`, `api.proto`.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import httpcore
import httpx
import orjson

from outbox_relay.outcome import Event, Outage, Refusal, Reply, boottime

WIRE_VERSION: Final = "1"
MAX_DEPTH: Final = 10_000
"""Go's JSON decoder refuses deeper nesting, and with it the whole batch."""
_REPLY_BYTES_PER_COMMAND: Final = 4096
_REPLY_FLOOR: Final = 64 * 1024
_CHUNK: Final = 256 * 1024
_TOO_DEEP: Final = 107


class Centrifugo:
    """One worker's HTTP connection to Centrifugo's server API.

    `url` may end with or without `/api`. `timeout` is for the whole of a request: connecting, sending and
    reading the last byte; in seconds. `parallel` lets Centrifugo publish a request's events side by side.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        timeout: float = 3.0,
        parallel: bool = True,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.timeout = timeout
        self._parallel = parallel
        self._api = api_url(url)
        self._deadline = _Deadline()
        self._client = httpx.Client(
            transport=_Transport(self._deadline, verify),
            headers={
                "X-API-Key": api_key,
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",
            },
            timeout=timeout,
            trust_env=False,
            follow_redirects=False,
        )

    def close(self) -> None:
        self._client.close()

    def publish(self, events: Sequence[Event]) -> list[Reply] | Outage:
        """Publish one request, and say for each event, in order, what became of it."""
        refused = {n: _refuse_too_deep(event) for n, event in enumerate(events) if _too_deep(event.payload)}
        sent = [event for n, event in enumerate(events) if n not in refused] if refused else events
        answer = self._batch(encode_batch(sent, parallel=self._parallel and len(sent) > 1), len(sent))
        if isinstance(answer, Outage):
            return answer
        try:
            replies = [_reply(event, reply) for event, reply in zip(sent, answer, strict=True)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return Outage(f"the reply is not Centrifugo's: {type(error).__name__} in a command's reply")
        for n in sorted(refused):
            replies.insert(n, refused[n])
        return replies

    def probe(self) -> Outage | None:
        """Send an empty batch: does Centrifugo answer, and does it take the key? Says nothing of its broker."""
        answer = self._batch(b'{"commands":[]}', 0)
        return answer if isinstance(answer, Outage) else None

    def _batch(self, body: bytes, commands: int) -> list[Any] | Outage:
        self._deadline.start(self.timeout)
        try:
            with self._client.stream("POST", f"{self._api}/batch", content=body) as response:
                if response.status_code != 200:
                    return _status_outage(response)
                content = _read(response, _REPLY_FLOOR + commands * _REPLY_BYTES_PER_COMMAND)
        except httpx.TimeoutException as error:
            return Outage(f"no answer within {self.timeout:g} s ({type(error).__name__})", timed_out=True)
        except httpx.HTTPError as error:
            return Outage(_describe(error))
        if content is None:
            return Outage("the reply is larger than any reply of Centrifugo's")
        try:
            answer = orjson.loads(content)
        except orjson.JSONDecodeError:
            return Outage("the reply is not JSON: is this Centrifugo's address?")
        replies = answer.get("replies", []) if isinstance(answer, dict) else None
        if not isinstance(replies, list) or (isinstance(answer, dict) and "error" in answer):
            return Outage("the reply is no batch reply: is this Centrifugo's address?")
        if len(replies) != commands:
            return Outage(f"{len(replies)} replies to {commands} commands")
        return replies


def api_url(url: str) -> httpx.URL:
    """The address of the server API, with `/api` added where it is missing. Raises ValueError."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        raise ValueError("not a URL: give one like http://127.0.0.1:8000/api") from None
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ValueError("not an http:// or https:// URL: give one like http://127.0.0.1:8000/api")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ValueError("a URL with a user, a query or a fragment: the API key is a setting of its own")
    path = parsed.path.rstrip("/")
    return parsed.copy_with(path=path if path.endswith("/api") else f"{path}/api")


def encode_batch(events: Iterable[Event], *, parallel: bool) -> bytes:
    """The body of one batch request. Payload and tags are spliced in as they are, never parsed."""
    return b'{"parallel":%b,"commands":[%b]}' % (
        b"true" if parallel else b"false",
        b",".join(map(_command, events)),
    )


def _command(event: Event) -> bytes:
    channels = event.unsent
    if len(channels) == 1:
        head = b'{"publish":{"channel":' + orjson.dumps(channels[0])
    else:
        head = b'{"broadcast":{"channels":' + orjson.dumps(channels)
    own = b"" if event.tags is None or len(event.tags) <= 2 else b"," + event.tags.strip()[1:]
    return (
        b'%b,"data":%b,"idempotency_key":"%b:%d","tags":{"ob":"1","ob_type":%b,"ob_id":%b,'
        b'"ob_version":"%d","ob_event":"%b","ob_kind":"%b"%b}}'
    ) % (
        head,
        event.payload,
        event.event_id.encode(),
        event.id,
        orjson.dumps(event.aggregate_type),
        orjson.dumps(event.aggregate_id),
        event.version,
        event.event_id.encode(),
        event.kind.encode(),
        own or b"}",
    )


def _reply(event: Event, reply: Any) -> Reply:
    channels = event.unsent
    error = reply.get("error")
    if error is not None:
        return Reply((), tuple(_refusal(channel, error) for channel in channels))
    if len(channels) == 1:
        if "publish" not in reply:
            raise KeyError("publish")
        return Reply((channels[0],), ())
    accepted: list[str] = []
    refusals: list[Refusal] = []
    for channel, response in zip(channels, reply["broadcast"]["responses"], strict=True):
        if (error := response.get("error")) is not None:
            refusals.append(_refusal(channel, error))
        else:
            accepted.append(channel)
    return Reply(tuple(accepted), tuple(refusals))


def _refusal(channel: str, error: Mapping[str, Any]) -> Refusal:
    return Refusal(channel, int(error["code"]), str(error.get("message", ""))[:200])


def _too_deep(payload: bytes) -> bool:
    """Whether Go would refuse the payload's nesting. Counting brackets rules it out for almost all."""
    if payload.count(b"[") + payload.count(b"{") <= MAX_DEPTH - 10:
        return False
    depth = deepest = 0
    in_string = escaped = False
    for byte in payload:
        if in_string:
            in_string = escaped or byte != 0x22
            escaped = not escaped and byte == 0x5C
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest > MAX_DEPTH - 10


def _refuse_too_deep(event: Event) -> Reply:
    message = "not sent: the payload is nested too deeply for Centrifugo's decoder"
    return Reply((), tuple(Refusal(channel, _TOO_DEEP, message) for channel in event.unsent))


def _read(response: httpx.Response, limit: int) -> bytes | None:
    chunks: list[bytes] = []
    size = 0
    for chunk in response.iter_raw():
        size += len(chunk)
        if size > limit:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


_STATUS_HINTS: Final = {
    401: "the API key is wrong",
    403: "the API key is wrong, or a proxy forbids the request",
    404: "no API here: is this the address of Centrifugo's server API (its internal port, if it has one)?",
    413: "a proxy in between limits the size of requests",
    429: "too many requests",
}


def _status_outage(response: httpx.Response) -> Outage:
    status = response.status_code
    if response.has_redirect_location:
        return Outage(f"HTTP {status}: a redirect, not followed because the API key would follow it")
    hint = _STATUS_HINTS.get(status)
    return Outage(f"HTTP {status}: {hint}" if hint else f"HTTP {status}", retry_after=_retry_after(response))


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() else None


def _describe(error: httpx.HTTPError) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Deadline:
    """When the request under way must have ended, on a clock that goes on while the process is stopped."""

    def __init__(self) -> None:
        self._at = 0.0

    def start(self, timeout: float) -> None:
        self._at = boottime() + timeout

    def left(self) -> float:
        return self._at - boottime()


class _Transport(httpx.HTTPTransport):
    """httpx's transport, whose time-outs are per operation, with one deadline for the whole request."""

    def __init__(self, deadline: _Deadline, verify: ssl.SSLContext | bool) -> None:
        super().__init__(verify=verify, trust_env=False)
        context = httpx.create_ssl_context(verify=verify, trust_env=False)
        self._pool = httpcore.ConnectionPool(
            ssl_context=context,
            max_connections=1,
            max_keepalive_connections=1,
            keepalive_expiry=10.0,
            network_backend=_Backend(deadline),
        )


class _Backend(httpcore.NetworkBackend):
    def __init__(self, deadline: _Deadline) -> None:
        self._deadline = deadline
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        left = _remaining(self._deadline, httpcore.ConnectTimeout)
        stream = self._inner.connect_tcp(host, port, left, local_address, socket_options)
        return _Stream(stream, self._deadline)


class _Stream(httpcore.NetworkStream):
    """A connection on which nothing is sent or awaited past the deadline.

    A process that was stopped in mid-request and goes on later sends not one byte more, so the server sees a
    request cut short and runs none of it.
    """

    def __init__(self, inner: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._inner = inner
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _remaining(self._deadline, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _CHUNK):
            self._inner.write(buffer[start : start + _CHUNK], _remaining(self._deadline, httpcore.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = _remaining(self._deadline, httpcore.ConnectTimeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _remaining(deadline: _Deadline, expired: type[httpcore.TimeoutException]) -> float:
    left = deadline.left()
    if left <= 0:
        raise expired("the request's deadline has passed")
    return left
