"""Events one by one at a fixed rate, whatever becomes of them, each with the time at which it was written."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

import psycopg
from psycopg.types.json import Json

from bench.harness import WrongRunError

_LOOK_SECONDS: Final = 0.2

_INSERT: Final = """
INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) VALUES ('order', %s, %s, %s, %s)
"""

_LEFT: Final = "SELECT FROM outbox WHERE state <> 'delivered' AND channels::text[] && %s LIMIT 1"


class Target(NamedTuple):
    """An aggregate, and the channel of its events."""

    aggregate: str
    channel: str


def write(url: str, targets: Sequence[Target], rate: float, enough: threading.Event) -> Counter[Target]:
    """Commit `rate` events per second, the targets in turn, until it is enough; returns how many each got.

    Due times are fixed beforehand. `sent_at` is the moment before the INSERT, of which the commit is a part.
    """
    written: Counter[Target] = Counter()
    with psycopg.connect(url, autocommit=True) as connection:
        started = time.monotonic()
        for number, target in enumerate(itertools.cycle(targets)):
            if enough.wait(max(0.0, started + number / rate - time.monotonic())):
                break
            written[target] += 1
            payload = Json({"sent_at": time.monotonic()})
            connection.execute(_INSERT, (target.aggregate, written[target], [target.channel], payload))
    return written


def wait_until_delivered(url: str, channels: Sequence[str], seconds: float = 120.0) -> None:
    """Return once all that was written to these channels is. Raises WrongRunError after so many seconds."""
    deadline = time.monotonic() + seconds
    with psycopg.connect(url, autocommit=True) as connection:
        while connection.execute(_LEFT, (list(channels),)).fetchone() is not None:
            if time.monotonic() > deadline:
                raise WrongRunError(f"events are left {seconds:g} s after the last was written")
            time.sleep(_LOOK_SECONDS)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 … 1) of all values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
