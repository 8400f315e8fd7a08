"""The floor: what our statements alone and batch posts alone cost, side by side as in the relay, and how near it is."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import orjson

from bench import load, stage
from bench.bare import Bare
from bench.drain import Costs, Drain, check_settled
from bench.harness import Mode, Row, Sample
from bench.witness import Witness
from outbox_relay.embedded.centrifugo import find_or_build
from outbox_relay.embedded.postgres import Postgres

EVENTS: Final = 200_000
REQUEST_EVENTS: Final = 1_000
THREADS: Final = 2


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The same events for either part of the work: in `template` to be settled, in the file `bodies` to be posted."""

    postgres: Postgres
    template: str
    centrifugo: Path
    bodies: Path
    events: int

    def measure(self, *, settle: bool, post: bool) -> Sample:
        """Every event once through each part, both at once, in events per second from the start to the later end."""
        with ExitStack() as stack:
            parts: dict[str, list[int]] = {}
            works: list[Bare] = []
            if settle:
                url = stack.enter_context(stage.database(self.postgres, self.template))
                works.append(stack.enter_context(Bare("settle", {"settings": {"database_url": url}})))
                parts["postgresql"] = [self.postgres.pid]
            if post:
                server = stack.enter_context(stage.centrifugo(self.centrifugo))
                witness = stack.enter_context(Witness(server.ws_url, load.channels("plain"), self.events))
                request = {"api_url": server.api_url, "api_key": server.api_key, "threads": THREADS}
                works.append(stack.enter_context(Bare("post", {**request, "bodies": str(self.bodies)})))
                parts |= {"centrifugo": [server.pid], "witness": [witness.pid]}
            costs = Costs({**parts, "python": [work.pid for work in works]})
            started = time.monotonic()
            for work in works:
                work.go()
            ended = max(work.ended_at() for work in works)
            figures = costs.per(self.events)
            if settle:
                check_settled(url)
            if post:
                witness.wait()
        return Sample(self.events / (ended - started), figures)


class Floor:
    name = "floor"
    title = "The floor under the relay: its statements and bare batch posts, side by side on the same cores"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        events = mode.scaled(EVENTS)
        postgres = stack.enter_context(stage.postgres())
        template = stage.template(postgres, "floor", partial(load.fill_ours, events=events, namespace="plain"))
        bodies = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "bodies"
        _write_bodies(bodies, postgres.url(), events)
        centrifugo = find_or_build()
        parts = _Parts(postgres=postgres, template=template, centrifugo=centrifugo, bodies=bodies, events=events)
        statements = {"threads": 2, "statements": "the relay's own: claim, read, settle; rows kept"}
        posts = {"threads": THREADS, "events per request": REQUEST_EVENTS, "client": "http.client", "parallel": False}
        yield [
            Row(
                "floor/us",
                "outbox-relay",
                "events/s",
                Drain(postgres=postgres, template=template, centrifugo=centrifugo, events=events),
                {"events": events},
            ),
            Row(
                "floor/both",
                "statements and posts at once",
                "events/s",
                partial(parts.measure, settle=True, post=True),
                {"events": events, "statements": statements, "posts": posts},
            ),
            Row(
                "floor/statements",
                "the relay's statements alone",
                "events/s",
                partial(parts.measure, settle=True, post=False),
                {"events": events, **statements},
            ),
            Row(
                "floor/posts",
                "batch posts alone",
                "events/s",
                partial(parts.measure, settle=False, post=True),
                {"events": events, **posts},
            ),
        ]


def _write_bodies(path: Path, url: str, events: int) -> None:
    """Ready-made requests of Centrifugo's `/api/batch`, one a line, as compact as the relay's."""
    commands = [{"publish": orjson.loads(text)} for text in load.requests(url, events, "plain")]
    with path.open("wb") as file:
        for start in range(0, events, REQUEST_EVENTS):
            file.write(orjson.dumps({"commands": commands[start : start + REQUEST_EVENTS]}) + b"\n")


SCENARIO = Floor()
