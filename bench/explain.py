"""What the relay's own statements cost, in buffers, as PostgreSQL explains them while they run (auto_explain)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from psycopg.conninfo import make_conninfo

from bench.harness import WrongRunError

_OPTIONS: Final = " ".join(
    f"-c {setting}"
    for setting in (
        "session_preload_libraries=auto_explain",
        "auto_explain.log_min_duration=0",
        "auto_explain.log_analyze=on",
        "auto_explain.log_buffers=on",
        "auto_explain.log_timing=off",
        "auto_explain.log_format=json",
        "auto_explain.log_parameter_max_length=0",
    )
)


class Claiming(NamedTuple):
    """What it took to find events: the question whether there are any, the claims and the reads, not the settling."""

    buffers: int
    """Pages looked at, in memory or not."""
    events: int
    """Rows that the reads brought."""

    @property
    def per_event(self) -> float:
        return self.buffers / self.events


def explained(url: str) -> str:
    """The same database, for sessions whose statements are explained in the server's log."""
    return make_conninfo(url, options=_OPTIONS)


def claiming(log: Path, offset: int) -> Claiming:
    """Add up the explained statements that only read the outbox, from a byte of the server's log on."""
    buffers = events = 0
    for plan in _plans(log, offset):
        root, nodes = plan["Plan"], list(_nodes(plan["Plan"]))
        if any(node["Node Type"] == "ModifyTable" for node in nodes):
            continue
        if not any(node.get("Relation Name") == "outbox" for node in nodes):
            continue
        buffers += root["Shared Hit Blocks"] + root["Shared Read Blocks"]
        if "payload" in plan["Query Text"]:
            events += int(root["Actual Rows"])
    if not events:
        raise WrongRunError("no statement that reads events was explained")
    return Claiming(buffers, events)


def _plans(log: Path, offset: int) -> Iterator[dict[str, Any]]:
    """The JSON after each `LOG:  duration: … plan:` line; its lines begin with a tab."""
    with log.open("rb") as file:
        file.seek(offset)
        text = b""
        for line in file:
            if line.startswith(b"\t"):
                text += line
            else:
                if text.startswith(b"\t{"):
                    yield json.loads(text)
                text = b""


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)
