"""`python -m tests.chaos.witness WS_URL LOG`: an independent subscriber that writes down every publication.

One JSON line each, written before the next frame is read. Says `subscribed` on its output once it is, and ends with
SIGTERM.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests.chaos.writers import CHANNELS, MAPS
from tests.support.subscriber import Subscriber

STREAMS: Final = [channel for channel in CHANNELS if channel not in MAPS]


class Witness(Subscriber):
    """A subscriber that keeps nothing in memory. A hole in a channel's stream is written down as such."""

    def __init__(self, url: str, path: Path) -> None:
        self._log = path.open("w", encoding="utf-8", buffering=1)
        super().__init__(url, STREAMS)

    def _take(self, line: bytes, asked: dict[int, str]) -> None:
        if line.startswith(b'{"push":{"channel"'):
            # Parsed whole: the bytes of the data are no matter here, and it is the quickest way.
            push = json.loads(line)["push"]
            if "pub" in push:
                pub = push["pub"]
                entries = pub["data"]["ob"] if "ob_bundle" in pub["tags"] else [pub]
                self._keep(push["channel"], [entry["tags"] for entry in entries], pub.get("offset", 0))
                return
        if line.startswith(b'{"id"') and b'"error"' in line[:40]:
            # Its channel comes back with the server that knows it again, and with it what was missed, or else a loss.
            self._write({"at": time.time(), "refused": asked.pop(json.loads(line)["id"])})
            if not asked:
                self._subscribed.set()
            return
        was = self.lost
        channels = set(asked.values())
        super()._take(line, asked)
        if self.lost is not was:
            for channel in channels - set(asked.values()) or STREAMS:
                self._write({"at": time.time(), "lost": channel, "why": self.lost})
            self.lost = None

    def _record(self, channel: str, publication: dict[str, bytes]) -> None:
        tags = json.loads(publication["tags"])
        entries = json.loads(publication["data"])["ob"] if "ob_bundle" in tags else [{"tags": tags}]
        self._keep(channel, [entry["tags"] for entry in entries], int(publication.get("offset", b"0")))

    def _keep(self, channel: str, facts: list[dict[str, str]], offset: int) -> None:
        """What came in one publication: the tags of an event, or of each event of a bundle."""
        if offset:
            self._positions[channel] = (offset, self._positions[channel][1])
        for tags in facts:
            self._write({"at": time.time(), "on": channel, "fact": fact(tags)})

    def _write(self, line: dict[str, Any]) -> None:
        self._log.write(json.dumps(line, separators=(",", ":")) + "\n")


def fact(tags: Mapping[str, str]) -> list[object]:
    """An event as the log has it: type and id of its aggregate, version, event_id, and whether this is its gap."""
    return [tags["ob_type"], tags["ob_id"], int(tags["ob_version"]), tags["ob_event"], tags["ob_kind"] == "gap"]


def main(url: str, path: str) -> None:
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    with Witness(url, Path(path)):
        print("subscribed", flush=True)
        while not stopping.wait(0.2):
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
