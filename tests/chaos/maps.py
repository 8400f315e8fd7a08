"""What Centrifugo itself says of its map channels when all is at rest: what they told their subscribers, and hold."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from outbox_relay.embedded.centrifugo import Centrifugo
from tests.chaos.witness import fact
from tests.chaos.writers import MAPS
from tests.support.oracle import Aggregate

_PAGE: Final = 1_000


def read_back(centrifugo: Centrifugo, log: Path, *, whole: bool) -> dict[str, dict[Aggregate, int]]:
    """Add to the witness's log what was told in each map channel, and return what each holds: versions of objects.

    Every subscriber is told the same, from the stream of changes that is read here. It is `whole` where the server that
    keeps it was never killed; a beginning that is missing then is noted as a hole.
    """
    held: dict[str, dict[Aggregate, int]] = {}
    with log.open("a", encoding="utf-8") as file:
        for channel in MAPS:
            lines: list[dict[str, Any]] = [] if whole else [{"lost": channel, "why": "its server may have been killed"}]
            for entry in _stream(centrifugo, channel):
                if whole and not lines and entry["offset"] != 1:
                    lines.append({"lost": channel, "why": f"its stream begins at {entry['offset']}"})
                lines.append({"at": entry["time"] / 1_000, "on": channel, "fact": fact(entry["tags"])})
            file.writelines(json.dumps(line) + "\n" for line in lines)
            held[channel] = {
                (tags["ob_type"], tags["ob_id"]): int(tags["ob_version"]) for tags in _state(centrifugo, channel)
            }
    return held


def _stream(centrifugo: Centrifugo, channel: str) -> Iterator[dict[str, Any]]:
    since: dict[str, Any] = {}
    while True:
        page = _ask(centrifugo, "map_read_stream", channel=channel, limit=_PAGE, **since)
        entries = page.get("entries", [])
        yield from entries
        if len(entries) < _PAGE:
            return
        since = {"since_offset": entries[-1]["offset"], "since_epoch": page["epoch"]}


def _state(centrifugo: Centrifugo, channel: str) -> list[dict[str, str]]:
    page = _ask(centrifugo, "map_read_state", channel=channel, limit=_PAGE)
    assert not page.get("cursor"), f"{channel} has more than {_PAGE} objects"
    return [entry["tags"] for entry in page.get("entries", [])]


def _ask(centrifugo: Centrifugo, method: str, **request: Any) -> dict[str, Any]:
    asked = urllib.request.Request(
        f"{centrifugo.api_url}/{method}", json.dumps(request).encode(), {"X-API-Key": centrifugo.api_key}
    )
    with urllib.request.urlopen(asked) as response:
        answer = json.load(response)
    assert "result" in answer, f"{method}: {answer}"
    result: dict[str, Any] = answer["result"]
    return result
