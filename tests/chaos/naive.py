"""`python -m tests.chaos.naive KIND`: relays as everybody writes them first. Each must fail where ours must not.

Configured as `outbox-relay run` is, as far as they care. They are right about much: a request per batch, one event per
aggregate in it, idempotency keys, marked as delivered only after Centrifugo's answer. What is wrong says each itself.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

import httpx
import psycopg

_COLUMNS: Final = "id, event_id::text, aggregate_type, aggregate_id, version, channels, payload::text"
BATCH: Final = 200


class Naive:
    """A session with the database and one with Centrifugo."""

    def __init__(self) -> None:
        settings = {name: os.environ[f"OUTBOX_RELAY_{name}"] for name in ("DATABASE_URL", "CENTRIFUGO_URL")}
        self.connection = psycopg.connect(settings["DATABASE_URL"])
        key = os.environ["OUTBOX_RELAY_CENTRIFUGO_API_KEY"]
        self._client = httpx.Client(
            base_url=settings["CENTRIFUGO_URL"], headers={"X-API-Key": key}, trust_env=False, timeout=3
        )
        self.done = 0
        """What the third one remembers: all ids below have been delivered, it thinks."""

    def publish(self, rows: list[tuple[Any, ...]]) -> list[int]:
        """Send the rows, one of each aggregate, and return the ids of those accepted."""
        first = {row[2:4]: row for row in reversed(rows)}
        chosen = sorted(first.values())
        if not chosen:
            return []
        commands = [{"broadcast": _publication(*row)} for row in chosen]
        try:
            response = self._client.post("/api/batch", json={"commands": commands}).raise_for_status()
        except httpx.HTTPError:
            return []
        replies = response.json()["replies"]
        return [row[0] for row, reply in zip(chosen, replies, strict=True) if _accepted(reply)]

    def mark(self, ids: list[int]) -> None:
        self.connection.execute(
            "UPDATE outbox SET state = 'delivered', settled_at = clock_timestamp() WHERE id = ANY(%s)", (ids,)
        )


def _accepted(reply: Mapping[str, Any]) -> bool:
    return "broadcast" in reply and all("error" not in response for response in reply["broadcast"]["responses"])


def _publication(
    id_: int, event_id: str, type_: str, name: str, version: int, channels: list[str], payload: str
) -> Mapping[str, Any]:
    tags = {"ob_type": type_, "ob_id": name, "ob_version": str(version), "ob_event": event_id, "ob_kind": "change"}
    return {"channels": channels, "data": {}, "tags": tags, "idempotency_key": f"{event_id}:{id_}"}


def skip_locked(relay: Naive) -> int:
    """SKIP LOCKED on the events themselves: it skips the head that another relay has, and takes its successor."""
    rows = relay.connection.execute(
        f"SELECT {_COLUMNS} FROM outbox WHERE state = 'pending' ORDER BY id LIMIT {BATCH} FOR UPDATE SKIP LOCKED"
    ).fetchall()
    relay.mark(relay.publish(rows))
    relay.connection.commit()
    return len(rows)


def cursor(relay: Naive) -> int:
    """id > cursor, by one relay at a time: what commits with a lower id than another has been sent is never seen."""
    relay.connection.execute("SELECT pg_advisory_xact_lock(1)")
    relay.connection.execute("CREATE TABLE IF NOT EXISTS naive_cursor AS SELECT 0::bigint AS at")
    [(at,)] = relay.connection.execute("SELECT at FROM naive_cursor").fetchall()
    rows = relay.connection.execute(
        f"SELECT {_COLUMNS} FROM outbox WHERE id > %s ORDER BY id LIMIT {BATCH}", (at,)
    ).fetchall()
    left = rows
    while left:
        # Refused ones are given up.
        relay.mark(relay.publish(left))
        sent = {row[0] for row in {row[2:4]: row for row in reversed(left)}.values()}
        left = [row for row in left if row[0] not in sent]
    if rows:
        relay.connection.execute("UPDATE naive_cursor SET at = %s", (rows[-1][0],))
    relay.connection.commit()
    return len(rows)


def hint(relay: Naive) -> int:
    """Locks the lanes, then reads from where it was, because all before is done: so it was when it looked.

    An event that commits later with a lower id waits until the relay starts anew, and its successors overtake it.
    """
    lanes = relay.connection.execute("SELECT lane FROM outbox_lane ORDER BY lane FOR NO KEY UPDATE").fetchall()
    assert lanes
    rows = relay.connection.execute(
        f"SELECT {_COLUMNS} FROM outbox WHERE state = 'pending' AND id >= %s ORDER BY id LIMIT {BATCH}", (relay.done,)
    ).fetchall()
    accepted = relay.publish(rows)
    relay.mark(accepted)
    relay.connection.commit()
    # Those of a namespace that there is not are left for the next start.
    waiting = [row[0] for row in rows if row[0] not in accepted and not row[3].startswith("nowhere-")]
    relay.done = min(waiting, default=rows[-1][0] + 1 if rows else relay.done)
    return len(rows)


KINDS: Final[Mapping[str, Callable[[Naive], int]]] = {"skip_locked": skip_locked, "cursor": cursor, "hint": hint}


def main(kind: str) -> None:
    relay = Naive()
    print(json.dumps({"event": "relay started"}), flush=True)
    pause = threading.Event()  # time.sleep fails where libfaketime is at work
    while True:
        if not KINDS[kind](relay):
            pause.wait(0.005)


if __name__ == "__main__":
    main(*sys.argv[1:])
