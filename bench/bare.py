"""What a relay is made of, each alone: its statements without HTTP, and batch posts without a database.

`python -m bench.bare` is a process of its own, with as many threads as a relay has workers.
"""

from __future__ import annotations

import http.client
import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import urlsplit

from bench.harness import WrongRunError
from outbox_relay import build, config
from outbox_relay.options import Options
from outbox_relay.store import Store

Work = Literal["settle", "post"]

SECONDS: Final = 120.0


class Bare:
    """A process with all it needs at the start of the `with` block, that works from `go` on.

    `settle` wants `settings` of a relay. `post` wants `api_url`, `api_key`, `threads` and `bodies`, a file with one
    request a line.
    """

    def __init__(self, work: Work, request: Mapping[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.bare"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self._say(json.dumps({"work": work, **request}))

    def __enter__(self) -> Self:
        self._hear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def go(self) -> None:
        self._say("go")

    def ended_at(self) -> float:
        """Wait until all is done; when that was, on `time.monotonic()`."""
        return float(self._hear())

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], SECONDS)
        line = self._process.stdout.readline() if readable else ""
        if not line:
            raise WrongRunError("a part of the floor failed")
        return line


def _main() -> None:
    request = json.loads(sys.stdin.readline())
    threads = _settle(**request) if request.pop("work") == "settle" else _post(**request)
    _say("ready")
    sys.stdin.readline()
    with ThreadPoolExecutor(len(threads)) as pool:
        for ended in [pool.submit(thread) for thread in threads]:
            ended.result()
    _say(f"{time.monotonic()}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _settle(settings: Mapping[str, Any]) -> list[Callable[[], None]]:
    known = config.load(settings, environ={})
    return [partial(_drain, build.build_store(known), build.options(known)) for _ in range(known.workers)]


def _drain(store: Store, options: Options) -> None:
    """One worker's part: batches as the relay's own, in which everything counts as delivered at once."""
    after: int | None = 0
    with closing(store):
        while after is not None:
            with store.batch():
                after = _settle_batch(store, options, after)


def _settle_batch(store: Store, options: Options, after: int) -> int | None:
    """Claim, read and settle; the lane claimed last, or None where no lane has anything left."""
    claim = store.claim(after=after, lanes=options.lanes)
    if not claim.lanes:
        return None
    batch = store.read(
        claim.lanes,
        events=min(options.batch_events, options.lanes * options.events_per_lane),
        per_lane=options.events_per_lane,
        max_bytes=options.batch_bytes,
    )
    store.settle([event.id for event in batch.events], [], batch.holds)
    return claim.lanes[-1].lane


def _post(api_url: str, api_key: str, threads: int, bodies: str) -> list[Callable[[], None]]:
    requests = Path(bodies).read_bytes().splitlines()
    # Aggregates come round after ten requests, so that with two threads each has its aggregates for itself.
    return [partial(_send, api_url, api_key, requests[number::threads]) for number in range(threads)]


def _send(api_url: str, api_key: str, requests: Sequence[bytes]) -> None:
    url = urlsplit(api_url)
    headers = {"X-API-Key": api_key, "Content-Type": "application/json"}
    with closing(http.client.HTTPConnection(url.netloc)) as connection:
        for body in requests:
            connection.request("POST", f"{url.path}/batch", body, headers)
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200 or b'"error"' in answer:
                raise WrongRunError(f"HTTP {response.status}: {answer[:200]!r}")


if __name__ == "__main__":
    _main()
