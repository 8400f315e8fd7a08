"""The floor: what our statements alone and batch posts alone cost, side by side as in the relay, and how near it is."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import orjson

from bench import load, stage
from bench.bare import Bare
from bench.drain import Costs, Drain, check_settled, fresh_centrifugo, redis_part
from bench.harness import Mode, Row, Sample
from bench.witness import Witness
from outbox_relay.embedded.centrifugo import find_or_build
from outbox_relay.embedded.postgres import Postgres
from tests.support.redis import Redis

EVENTS: Final = 200_000
REQUEST_EVENTS: Final = 1_000
THREADS: Final = 2


@dataclass(frozen=True, kw_only=True)
class _Posts:
    """Ready-made requests to Centrifugo, one a line of `bodies`; its engine is `redis`, or memory without one."""

    centrifugo: Path
    bodies: Path
    redis: Redis | None = None


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The same events for either part of the work: in `template` to be settled, and in the posts' file."""

    postgres: Postgres
    template: str
    events: int

    def measure(self, *, settle: Mapping[str, Any] | None = None, post: _Posts | None = None) -> Sample:
        """Every event once through each part, both at once, in events per second from the start to the later end.

        `settle` are the settings of the relay whose statements these are.
        """
        with ExitStack() as stack:
            parts: dict[str, list[int]] = {}
            works: list[Bare] = []
            if settle is not None:
                url = stack.enter_context(stage.database(self.postgres, self.template))
                works.append(stack.enter_context(Bare("settle", {"settings": {"database_url": url, **settle}})))
                parts["postgresql"] = [self.postgres.pid]
            if post is not None:
                server = stack.enter_context(fresh_centrifugo(post.centrifugo, post.redis))
                witness = stack.enter_context(Witness(server.ws_url, load.channels("plain"), self.events))
                request = {"api_url": server.api_url, "api_key": server.api_key, "threads": THREADS}
                works.append(stack.enter_context(Bare("post", {**request, "bodies": str(post.bodies)})))
                parts |= {"centrifugo": [server.pid], "witness": [witness.pid], **redis_part(post.redis)}
            costs = Costs({**parts, "python": [work.pid for work in works]})
            started = time.monotonic()
            for work in works:
                work.go()
            ended = max(work.ended_at() for work in works)
            figures = costs.per(self.events)
            if settle is not None:
                check_settled(url)
            if post is not None:
                witness.wait()
        return Sample(self.events / (ended - started), figures)


class Floor:
    name = "floor"
    title = "The floor under the relay: its statements and bare batch posts, side by side on the same cores"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        events = mode.scaled(EVENTS)
        postgres = stack.enter_context(stage.postgres())
        template = stage.template(postgres, "floor", partial(load.fill_ours, events=events, namespace="plain"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plain, parallel = folder / "plain", folder / "parallel"
        _write_bodies(plain, postgres.url(), events)
        _write_bodies(parallel, postgres.url(), events, parallel=True)
        binary = find_or_build()
        memory = _Posts(centrifugo=binary, bodies=plain)
        redis = _Posts(centrifugo=binary, bodies=parallel, redis=stack.enter_context(Redis()))
        measure = _Parts(postgres=postgres, template=template, events=events).measure
        kept = {"threads": THREADS, "statements": "the relay's own: claim, read, settle; rows kept"}
        deleted = {**kept, "statements": "the relay's own: claim, read, settle; rows deleted"}
        posts = {"threads": THREADS, "events per request": REQUEST_EVENTS, "client": "http.client", "parallel": False}
        drain = Drain(postgres=postgres, template=template, centrifugo=binary, events=events)

        def row(key: str, title: str, work: Callable[[], Sample], settings: Mapping[str, Any]) -> Row:
            return Row(f"floor/{key}", title, "events/s", work, {"events": events, **settings})

        yield [
            row("us", "outbox-relay", drain, {}),
            row(
                "both",
                "statements and posts at once",
                partial(measure, settle={}, post=memory),
                {"statements": kept, "posts": posts},
            ),
            row(
                "both-keep0",
                "statements that delete, and posts, at once",
                partial(measure, settle={"keep": 0}, post=memory),
                {"statements": deleted, "posts": posts},
            ),
            row("statements", "the relay's statements alone", partial(measure, settle={}), kept),
            row("posts", "batch posts alone", partial(measure, post=memory), posts),
            row(
                "posts-redis",
                "batch posts alone, Redis engine",
                partial(measure, post=redis),
                {**posts, "engine": "redis", "parallel": True},
            ),
        ]


def _write_bodies(path: Path, url: str, events: int, **options: bool) -> None:
    """Ready-made requests of Centrifugo's `/api/batch`, one a line, as compact as the relay's."""
    commands = [{"publish": orjson.loads(text)} for text in load.requests(url, events, "plain")]
    with path.open("wb") as file:
        for start in range(0, events, REQUEST_EVENTS):
            file.write(orjson.dumps({"commands": commands[start : start + REQUEST_EVENTS], **options}) + b"\n")


SCENARIO = Floor()
