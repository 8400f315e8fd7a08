"""The address of Centrifugo's server API, and what an HTTP answer of it means: replies to commands, or an outage."""

from __future__ import annotations

from typing import Any, Final

import httpx
import orjson

from outbox_relay.event import Outage

CUT: Final = 1
"""The verdict on a request after which the connection was cut."""
NO_ANSWER: Final = (AttributeError, KeyError, TypeError, ValueError)
"""What reading a command's reply raises where it is none of Centrifugo's."""


def no_answer(error: Exception) -> Outage:
    return Outage(f"the reply is not Centrifugo's: {type(error).__name__} in a command's reply", verdict=200)


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


def batch_replies(response: httpx.Response, content: bytes | None, commands: int) -> list[Any] | Outage:
    """The replies to a batch of so many commands. `content` is None where it was larger than any reply of theirs."""
    if response.status_code != 200:
        return _status_outage(response)
    if content is None:
        return Outage("the reply is larger than any reply of Centrifugo's", verdict=200)
    try:
        answer = orjson.loads(content)
    except orjson.JSONDecodeError:
        return Outage("the reply is not JSON: is this Centrifugo's address?", verdict=200)
    replies = answer.get("replies", []) if isinstance(answer, dict) else None
    if not isinstance(replies, list) or (isinstance(answer, dict) and "error" in answer):
        return Outage("the reply is no batch reply: is this Centrifugo's address?", verdict=200)
    if len(replies) != commands:
        return Outage(f"{len(replies)} replies to {commands} commands", verdict=200)
    return replies


_STATUS_HINTS: Final = {
    401: "the API key is wrong",
    403: "the API key is wrong, or a proxy forbids the request",
    404: "no API here: is this the address of Centrifugo's server API (its internal port, if it has one)?",
    413: "a proxy in between limits the size of requests",
    429: "too many requests",
}


# Statuses that speak of the key, the address, or the time.
_NOT_THE_REQUEST: Final = frozenset({401, 404, 405, 407, 408, 421, 425, 429, 503, 504})


def _status_outage(response: httpx.Response) -> Outage:
    status = response.status_code
    if response.has_redirect_location:
        return Outage(f"HTTP {status}: a redirect, not followed because the API key would follow it")
    hint = _STATUS_HINTS.get(status)
    verdict = 0 if status in _NOT_THE_REQUEST else status
    return Outage(f"HTTP {status}: {hint}" if hint else f"HTTP {status}", _retry_after(response), verdict)


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() else None
