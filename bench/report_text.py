"""The sentences of docs/benchmarks.md that no measurement changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

INTRODUCTION: Final = """\
Written by `make bench`, which starts PostgreSQL (fsync on), Centrifugo, Redis and Benthos itself and measures all
sides on one machine in one run. Rows of one scenario take turns, so that what the machine does meanwhile befalls them
all. **Ratios within a table mean something; absolute numbers belong to this machine**, on which servers, relay,
subscriber and writers share the cores.

Unless a table says otherwise every side publishes the same ([bench/load.py](../bench/load.py)): 200-byte payloads,
10,000 aggregates round robin, 100 channels, tags and an idempotency key. Tables show medians, and the lowest and the
highest repetition.

Every run is checked while it is measured: a subscriber of its own ([bench/witness.py](../bench/witness.py)) keeps all
that arrives and judges it afterwards. All received, the versions of every aggregate in order, duplicates counted. A
run that lost or reordered something has no number. Only where a side promises no order, its order is counted and not
judged."""

RATIOS_EXPLAINED: Final = """\
*Measured* is the ratio of the medians. *Spread* is the lowest and the highest ratio of two repetitions that followed
each other. *At least* is owed, *aim* is aimed at; both bounds are within. Centrifugo's best tuning is the better one
of 8 and 64 partitions, with 1,000 rows a page and an index on (partition, id), which Centrifugo's documents lack."""

ON_PAPER: Final = """\
Computed, not measured: the CPU time per event of `floor/us`, spread over hosts with as many cores as this one. It is an
upper bound. It takes for granted that the costs per event stay as they are, that nobody waits for locks or round trips,
and that disk and network keep up. A relay process uses one core at most, because Python's threads share it."""

NOTES: Final[Mapping[str, str]] = {
    "drain": """\
Committed events, from the first publication to the last. What the rivals do not do, and so is not scored:
Centrifugo's consumer publishes inside Centrifugo, without HTTP, and deletes each row: it keeps no record of what was
delivered, drops an event that Centrifugo refuses, and stops a partition at an internal error. Benthos reads a Redis
list, which no database transaction can write to; with 20 requests in flight it keeps no order.""",
    "round_trip": """\
This relay alone, behind a proxy that delays both ways and whose own delay is measured first. Centrifugo's consumer is
inside Centrifugo: it has no round trip to Centrifugo, and one to PostgreSQL in its place.""",
    "latency": """\
From commit to subscriber, at a steady rate that does not wait for anybody (open loop). Centrifugo's PostgreSQL stream
broker takes the place of Centrifugo's engine; what is committed while no node runs reaches subscribers by recovery
only.""",
    "writers": """\
What an event costs the transaction that writes it: one UPDATE of a business row, and the named addition. All our rows
have the trigger of the wake-up, which sends NOTIFY only while a relay is asleep. Without readers, `us` is the case in
which none is asleep; `us-wake` is the worst case, in which one is kept asleep so that every writer sends NOTIFY. It is
not scored, because the first NOTIFY ends a real relay's sleep. In the group `8-read` each side's own reader runs.""",
    "flat": """\
This relay alone: every outbox against one that holds nothing else. Centrifugo's consumer deletes what it has
published, so it keeps no rows; and it puts no single aggregate on hold: an internal error stops the whole partition,
and an event refused for another reason is dropped.""",
    "cold": """\
This relay alone: the latency of aggregates that have little to say, beside one that has a backlog, against the same
without it. Those that share the hot one's lane, one in 256, wait for its events and have a row of their own.""",
    "hot": """\
One aggregate: in strict order every event waits for the answer to the one before, unless they travel in a bundle,
which its subscribers must take apart (`bundle_events = 500` here). Centrifugo's consumer publishes its
partition's rows one after the other without leaving its process, and deletes them, as the relay does with `keep = 0`;
an event that Centrifugo refuses is dropped, and its successors follow.""",
    "conflation": """\
Snapshots of 1,000 objects that piled up while nobody published: the seconds until the last one of every object has
arrived. The relay was told to conflate this type: of an object's snapshots that it looks at together it sends the last.
Centrifugo's consumer publishes every one of them, and deletes them, as the relay does with `keep = 0`.""",
    "idle": """\
This relay alone: what it costs while it has nothing to do or cannot do it, and how much memory it takes.""",
    "scale": """\
This relay alone: several processes share one outbox, and with everything else the same cores.""",
    "take_over": """\
This relay alone: one of two relays is killed or stopped while it holds lanes. Per victim the longest wait of an event
counts, from its INSERT to the subscriber; the p99 is over all victims of one run.""",
    "floor": """\
What this relay is made of, without the relay: its own SQL statements, and ready-made batch posts, at once and alone.
CPU times per event are those of the whole process, its start not included. A relay that posts like that is no faster
than the posts alone. On Redis they ask for `parallel`, as the relay does there.""",
}
