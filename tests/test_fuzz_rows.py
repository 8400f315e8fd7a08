"""Whatever a row holds: 100,000 rows that the table takes, from a seed, through a real PostgreSQL into requests.

What is in a request is cut out of it as bytes, and is what was written. Some of the rows go on through a real
Centrifugo to a subscriber. `make test` takes a part of the rows, `make fuzz` all.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Final, NamedTuple

import pytest

from outbox_relay.event import Event
from outbox_relay.runner import Ended
from outbox_relay.store import Store
from outbox_relay.wire import encode_batch
from tests.conftest import Connect, RunRelay
from tests.support.subscriber import Subscriber, items, members
from tests.support.writing import Connection

SEED: Final = 42
ROWS: Final = 100_000
PARTS: Final = 10
SOME: Final = 1_000
BATCH: Final = 500
Chance = random.Random


class Row(NamedTuple):
    """What is written, with an id of its own to find it again."""

    event_id: str
    aggregate_type: str
    aggregate_id: str
    version: int
    kind: str
    channels: list[str]
    payload: str
    base_version: int | None
    tags: dict[str, str] | None


ALPHABETS: Final = [
    "abc",
    "'\"\\/{}[]:,%$;-\x01\x1f\x7f\t\n\r",
    "äöüßéñ",
    "☃♞漢字한글עברית",
    "𝄞💥🏳️‍🌈\U0010ffff",
    "\u2028\u2029\u200b\ufeff\ufffe\u202e",
]


def text(chance: Chance, longest: int = 12) -> str:
    alphabet = chance.choice(ALPHABETS)
    return "".join(chance.choice(alphabet) for _ in range(chance.randint(1, longest)))


def name(chance: Chance) -> str:
    return text(chance, 255) if chance.random() < 0.01 else text(chance)


def gap(chance: Chance) -> str:
    """Whitespace that JSON allows between tokens."""
    return chance.choice(["", "", "", "", " ", "\t", "\n", "\r\n", "  "])


def string(chance: Chance) -> str:
    """A JSON string, its characters escaped in any of the ways there are, some of them for no text at all."""
    parts = [json.dumps(text(chance), ensure_ascii=chance.random() < 0.5)[1:-1]]
    parts += chance.choices(
        [r"\u0041", r"\/", r"\u0000", r"\ud800", r"\ud83d\ude00", r"\udc00\ud800", r"\"", r"\\"], k=2
    )
    chance.shuffle(parts)
    return f'"{"".join(parts)}"'


def number(chance: Chance) -> str:
    digits = "".join(chance.choices("0123456789", k=chance.choice([1, 5, 17, 40, 300])))
    whole = digits.lstrip("0") or "0"
    return (
        chance.choice(["", "-"])
        + whole
        + chance.choice(["", "." + digits])
        + chance.choice(["", "", "e5", "E+400", "e-0", "E0"])
    )


def value(chance: Chance, depth: int = 0) -> str:
    """JSON text of any shape, with whitespace anywhere and keys that repeat."""
    kinds: list[Callable[[], str]] = [lambda: string(chance), lambda: number(chance)]
    kinds.append(lambda: chance.choice(["null", "true", "false", "{}", "[]", '""']))
    if depth < 4:

        def array() -> str:
            return f"[{','.join(value(chance, depth + 1) for _ in range(chance.randint(0, 4)))}]"

        def object_() -> str:
            pairs = (f"{string(chance)}{gap(chance)}:{value(chance, depth + 1)}" for _ in range(chance.randint(0, 4)))
            return f"{{{','.join(pairs)}}}"

        kinds += [array, object_, object_]
    return gap(chance) + chance.choice(kinds)() + gap(chance)


def payload(chance: Chance) -> str:
    levels = chance.randint(1, 3_000) if chance.random() < 0.005 else 0
    return "[" * levels + value(chance) + "]" * levels


def row(chance: Chance, channels: Sequence[str] | None = None) -> Row:
    own = list({f"plain:{name(chance)}"[:60] for _ in range(chance.choice([1, 1, 1, 2, 5]))})
    version = chance.choice([1, 2, 2**31, 2**53 - 1, chance.randint(1, 2**53 - 1)])
    keys = (key for key in (text(chance) for _ in range(3)) if not key.startswith("ob"))
    return Row(
        str(uuid.UUID(int=chance.getrandbits(128))),
        name(chance),
        name(chance),
        version,
        chance.choice(["change", "snapshot", "tombstone"]),
        list(channels or own),
        payload(chance),
        chance.choice([None, 0, version - 1]),
        chance.choice([None, {}, {key: text(chance) for key in keys}]),
    )


def insert(connection: Connection, rows: Sequence[Row]) -> None:
    statement = (
        "INSERT INTO outbox (event_id, aggregate_type, aggregate_id, version, kind, channels, payload, base_version, "
        "                    tags) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)"
    )
    with connection.transaction(), connection.cursor() as cursor:
        cursor.executemany(statement, [(*row[:-1], None if row.tags is None else json.dumps(row.tags)) for row in rows])


def read(store: Store) -> Iterator[list[Event]]:
    """Everything that is pending, batch by batch, each settled as delivered."""
    while True:
        with store.batch():
            lanes = store.claim(after=0, lanes=256).lanes
            if not lanes:
                return
            events = store.read(lanes, events=BATCH, per_lane=16, max_bytes=1024 * 1024).events
            yield events
            store.settle([event.id for event in events], [], {})


def sent(events: Sequence[Event]) -> Iterator[tuple[Event, dict[str, bytes]]]:
    """Each event with the members of its command, as the bytes that are in the request."""
    commands = items(members(encode_batch(events, parallel=True))["commands"])
    for event, command in zip(events, commands, strict=True):
        [request] = members(command).values()
        yield event, members(request)


def as_sent(row: Row, event: Event, epoch: str) -> dict[str, Any]:
    target = {"channel": row.channels[0]} if len(row.channels) == 1 else {"channels": row.channels}
    own = {"ob": "1", "ob_type": row.aggregate_type, "ob_id": row.aggregate_id, "ob_version": str(row.version)}
    own |= {"ob_event": row.event_id, "ob_kind": row.kind, "ob_epoch": epoch}
    own |= {} if row.base_version is None else {"ob_base": str(row.base_version)}
    return {**target, "idempotency_key": f"{row.event_id}:{event.id}", "tags": own | (row.tags or {})}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        parts = range(PARTS) if metafunc.config.getoption("full") else [0]
        metafunc.parametrize("seed", [f"{SEED}/{part}" for part in parts], ids=[f"{part + 1:02}" for part in parts])


def test_rows_are_sent_as_they_were_written(
    pytestconfig: pytest.Config, connect: Connect, database_url: str, seed: str
) -> None:
    """Each once; the payload byte for byte, but for whitespace around it; all the rest as values."""
    chance, connection = Chance(seed), connect()
    count = ROWS // PARTS if pytestconfig.getoption("full") else SOME
    rows = [row(chance) for _ in range(count)]
    written = {row.event_id: row for row in rows}
    assert len(written) == count
    insert(connection, rows)
    [(epoch,)] = connection.execute("SELECT outbox_epoch()").fetchall()
    with closing(Store(database_url)) as store:
        for events in read(store):
            for event, fields in sent(events):
                original = written.pop(event.event_id)
                assert fields.pop("data") == original.payload.strip(" \t\r\n").encode()
                assert {field: json.loads(part) for field, part in fields.items()} == as_sent(original, event, epoch)
    assert written == {}


def test_rows_arrive_as_they_were_written(
    pytestconfig: pytest.Config,
    connect: Connect,
    run_relay: RunRelay,
    subscribe: Callable[..., Subscriber],
    channel: str,
) -> None:
    """The same through Centrifugo, which takes newlines out, as they separate the frames of its protocol."""
    chance = Chance(SEED)
    count = 5 * SOME if pytestconfig.getoption("full") else SOME // 4
    subscriber = subscribe(channel)
    rows = [row(chance, [channel]) for _ in range(count)]
    insert(connect(), rows)
    assert run_relay() is Ended.EMPTY
    heard = {publication.tags["ob_event"]: publication for publication in subscriber.wait_for(count)}
    assert len(heard) == len(subscriber.received) == count
    for original in rows:
        publication = heard[original.event_id]
        assert publication.data == original.payload.strip(" \t\r\n").replace("\n", "").encode()
        assert publication.aggregate == (original.aggregate_type, original.aggregate_id)
        assert publication.version == original.version
        assert publication.tags.items() >= (original.tags or {}).items()
