"""The only room that knows HTTP: events in, exactly one Reply per event out, or one Outage for all of them.

Centrifugo's contract was read from the source of v6.9.1: `api_handler`, `apiproto/errors.go`, `api.proto`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Final

import httpx

from outbox_relay.endpoint import CUT, NO_ANSWER, api_url, batch_replies, no_answer
from outbox_relay.event import ACCEPTED, Event, Outage, Refusal, Reply, boottime
from outbox_relay.log import MASK, get_logger, printable
from outbox_relay.pace import Pace
from outbox_relay.packing import Wires
from outbox_relay.transport import Deadline, DeadlineTransport
from outbox_relay.wire import TOO_DEEP, Command, commands, encode_batch, encode_commands, replies, too_deep_for_go

log = get_logger()

_REPLY_BYTES_PER_COMMAND: Final = 4096
_REPLY_FLOOR: Final = 64 * 1024
_MESSAGE: Final = 200


class Centrifugo:
    """One worker's HTTP connection to Centrifugo's server API.

    `url` may end with or without `/api`. `timeout` is for the whole of a request: connecting, sending and
    reading the last byte; in seconds. `parallel` lets Centrifugo publish a request's events side by side; None finds
    out what is faster. `new_key` is asked when Centrifugo refuses the key: the one to use from now on, or None.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        timeout: float = 3.0,
        parallel: bool | None = None,
        wires: Wires | None = None,
        verify: ssl.SSLContext | bool = True,
        new_key: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.timeout = timeout
        self._key = api_key
        self._new_key = new_key
        self._pace = Pace(parallel)
        self._wires = wires or {}
        self._url = httpx.URL(f"{api_url(url)}/batch")
        self._deadline = Deadline()
        # Without httpx's client, of whose own ideas (redirects, cookies, proxies, time-outs) none is wanted: it takes a
        # third of a small request's time.
        self._transport = DeadlineTransport(self._deadline, verify)
        self._headers = httpx.Headers(
            {"X-API-Key": api_key, "Content-Type": "application/json", "Accept-Encoding": "identity"}
        )

    def close(self) -> None:
        self._transport.close()

    def room(self, limit: int) -> int:
        """How many events the next requests may hold, at most `limit`."""
        return self._pace.room(limit)

    def publish(self, events: Sequence[Event], deadline: float | None = None) -> list[Reply] | Outage:
        """Publish one request, and say for each event, in order, what became of it.

        `deadline` is on `boottime()`; by default `timeout` from now. Not a byte is sent past it.
        """
        too_deep = {n for n, event in enumerate(events) if too_deep_for_go(event.payload)}
        if self._wires:
            return self._publish_commands(events, too_deep, deadline)
        sent = [event for n, event in enumerate(events) if n not in too_deep] if too_deep else events
        parallel = self._pace.choose(len(sent))
        body = encode_batch(sent, parallel=parallel)
        answers = self._ask(body, len(sent), deadline, parallel=parallel)
        if isinstance(answers, Outage):
            return answers
        try:
            found = [
                ACCEPTED
                if len(event.channels) == 1 and type(answer.get("publish")) is dict and "error" not in answer
                else self._reply(event, answer)
                for event, answer in zip(sent, answers, strict=True)
            ]
        except NO_ANSWER as error:
            return no_answer(error)
        for n in sorted(too_deep):
            refusals = (self._refusal(channel, TOO_DEEP) for channel in events[n].unsent)
            found.insert(n, Reply(tuple(refusals)))
        return found

    def _publish_commands(
        self, events: Sequence[Event], too_deep: Set[int], deadline: float | None
    ) -> list[Reply] | Outage:
        """As `publish`, where some namespaces do not get a publication for each event."""
        asked = commands(events, self._wires, too_deep)
        sent = [command for command in asked if command.error is None]
        refused = [command for command in asked if command.error is not None]
        parallel = self._pace.choose(len(sent))
        answers = self._ask(encode_commands(sent, parallel=parallel), len(sent), deadline, parallel=parallel)
        if isinstance(answers, Outage):
            return answers
        answers += [{"error": command.error} for command in refused]
        try:
            return replies(events, [*sent, *refused], answers, self._refusal)
        except NO_ANSWER as error:
            return no_answer(error)

    def probe(self) -> Outage | None:
        """Send an empty batch: does Centrifugo answer, and does it take the key? Says nothing of its broker."""
        answers = self.ask([])
        return answers if isinstance(answers, Outage) else None

    def ask(self, commands: Sequence[str]) -> list[Any] | Outage:
        """Send commands that are no event's, each as JSON, one after the other; the answers as Centrifugo gave them."""
        return self._batch(f'{{"commands":[{",".join(commands)}]}}'.encode(), len(commands), None)

    def _ask(self, body: bytes, commands: int, deadline: float | None, *, parallel: bool) -> list[Any] | Outage:
        started = boottime()
        answers = self._batch(body, commands, deadline)
        if not isinstance(answers, Outage):
            self._pace.note(commands, boottime() - started, parallel=parallel)
        return answers

    def _batch(self, body: bytes, commands: int, deadline: float | None) -> list[Any] | Outage:
        self._deadline.at = boottime() + self.timeout if deadline is None else deadline
        limit = _REPLY_FLOOR + commands * _REPLY_BYTES_PER_COMMAND
        try:
            response, content = self._post(body, limit)
            if response.status_code == 401 and self._renew_key():
                response, content = self._post(body, limit)
        except httpx.TimeoutException as error:
            return Outage(f"no answer within {self.timeout:g} s ({type(error).__name__})")
        except httpx.ConnectError as error:
            return Outage(self._describe(error))
        except httpx.HTTPError as error:
            return Outage(self._describe(error), verdict=CUT)
        return batch_replies(response, content, commands)

    def _post(self, body: bytes, limit: int) -> tuple[httpx.Response, bytes | None]:
        """The response and, where it is a 200 of at most `limit` bytes, its content."""
        response = self._transport.handle_request(httpx.Request("POST", self._url, headers=self._headers, content=body))
        try:
            return response, _read(response, limit) if response.status_code == 200 else None
        finally:
            response.close()

    def _renew_key(self) -> bool:
        """Whether there is another key than the one that was refused; it is used from now on."""
        key = self._new_key()
        if key is None or key == self._key:
            return False
        log.info("Centrifugo refuses the API key: its file has another one, which is used from now on")
        self._key = self._headers["X-API-Key"] = key
        return True

    def _reply(self, event: Event, answer: Any) -> Reply:
        """The answer for an event that was not plainly accepted on its only channel. Raises where it is no answer."""
        return replies([event], [Command("", event.unsent, (0,))], [answer], self._refusal)[0]

    def _refusal(self, channel: str, error: Mapping[str, Any]) -> Refusal:
        code = error["code"]
        if type(code) is not int or code < 1:
            raise ValueError("not a code of Centrifugo's")
        return Refusal(channel, code, self._quoted(str(error.get("message", ""))))

    def _describe(self, error: httpx.HTTPError) -> str:
        text = self._quoted(" ".join(str(error).split()))
        return f"{type(error).__name__}: {text}" if text else type(error).__name__

    def _quoted(self, text: str) -> str:
        """What a server said, fit for logs, a terminal and PostgreSQL, which takes no NUL; the key is masked."""
        masked = text.replace(self._key, MASK) if self._key else text
        return printable(masked[:_MESSAGE])[:_MESSAGE]


def _read(response: httpx.Response, limit: int) -> bytes | None:
    chunks: list[bytes] = []
    size = 0
    # As it came, for no encoding was asked for. Not `iter_raw`, which takes 12 µs more for a small one.
    assert isinstance(response.stream, httpx.SyncByteStream)  # noqa: S101 - of our transport
    for chunk in response.stream:
        size += len(chunk)
        if size > limit:
            return None
        chunks.append(chunk)
    return b"".join(chunks)
