"""The events that every side gets: 200-byte payloads, 10,000 aggregates round robin, 100 channels.

Each side publishes the same thing: the same channel, data, tags and a key that is the event's own.
"""

from __future__ import annotations

from typing import Final

import psycopg
import sqlalchemy as sa

from outbox_relay.migrations import migrate

AGGREGATES: Final = 10_000
CHANNELS: Final = 100
PAYLOAD_BYTES: Final = 200

# All take %(events)s, %(aggregates)s, %(namespace)s, %(kind)s. Version n of an aggregate is its n-th row.
_SOURCE: Final = f"""
    SELECT n, n %% %(aggregates)s AS aggregate, 1 + n / %(aggregates)s AS version,
           %(namespace)s || ':' || (n %% %(aggregates)s %% {CHANNELS}) AS channel
    FROM generate_series(0, %(events)s - 1) AS n
"""
PAYLOAD: Final = f"""('{{"n":' || n || ',"text":"' || repeat('x', {PAYLOAD_BYTES} - 16 - length(n::text)) || '"}}')"""
"""SQL of `{"n":12,"text":"…"}`, padded to PAYLOAD_BYTES."""

_OURS: Final = f"""
INSERT INTO outbox (aggregate_type, aggregate_id, version, kind, channels, payload)
SELECT 'order', aggregate::text, version, %(kind)s::text::outbox_kind, ARRAY[channel], {PAYLOAD}::json
FROM ({_SOURCE}) AS s ORDER BY n
"""

CENTRIFUGO_DDL: Final = """
CREATE TABLE centrifugo_outbox (
    id BIGSERIAL PRIMARY KEY,
    method text NOT NULL,
    payload JSONB NOT NULL,
    partition BIGINT NOT NULL DEFAULT 0,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT CURRENT_TIMESTAMP NOT NULL
)
"""
"""As Centrifugo documents it (docs/server/consumers.md)."""

CENTRIFUGO_INDEX: Final = "CREATE INDEX centrifugo_outbox_partition ON centrifugo_outbox (partition, id)"
"""Not documented, and needed: without it a partition's oldest rows are found by reading other partitions' rows."""

# What the relay publishes for the same event, as a request of Centrifugo's API.
EPOCH: Final = "0a4ee8b53e0d4e42"
"""As long as ours, which says what cluster it is."""

_PUBLISH: Final = f"""
json_build_object('channel', channel, 'data', {PAYLOAD}::json, 'idempotency_key', event_id || ':' || n,
    'tags', json_build_object('ob', '1', 'ob_type', 'order', 'ob_id', aggregate::text, 'ob_version', version::text,
                              'ob_event', event_id, 'ob_kind', %(kind)s::text, 'ob_epoch', '{EPOCH}'))
"""

_CENTRIFUGO: Final = f"""
INSERT INTO centrifugo_outbox (method, payload, partition)
SELECT 'publish', {_PUBLISH}, abs(hashtext(aggregate::text)) %% %(partitions)s
FROM (SELECT *, gen_random_uuid()::text AS event_id FROM ({_SOURCE}) AS s) AS s ORDER BY n
"""

_REQUESTS: Final = f"""
SELECT {_PUBLISH}::text FROM (SELECT *, gen_random_uuid()::text AS event_id FROM ({_SOURCE}) AS s) AS s ORDER BY n
"""


def channels(namespace: str) -> list[str]:
    """All channels that events go to."""
    return [f"{namespace}:{n}" for n in range(CHANNELS)]


def fill_ours(url: str, events: int, namespace: str, aggregates: int = AGGREGATES, kind: str = "change") -> None:
    """Migrate a database and commit events in its outbox."""
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool)
    migrate(engine)
    with psycopg.connect(url) as connection:
        connection.execute(_OURS, _parameters(events, namespace, aggregates, kind))


def fill_centrifugo(
    url: str,
    events: int,
    namespace: str,
    partitions: int,
    *,
    index: bool,
    aggregates: int = AGGREGATES,
    kind: str = "change",
) -> None:
    """Make Centrifugo's own outbox table and commit the same events in it."""
    with psycopg.connect(url) as connection:
        connection.execute(CENTRIFUGO_DDL)
        if index:
            connection.execute(CENTRIFUGO_INDEX)
        parameters = _parameters(events, namespace, aggregates, kind)
        connection.execute(_CENTRIFUGO, {**parameters, "partitions": partitions})


def requests(url: str, events: int, namespace: str, aggregates: int = AGGREGATES) -> list[str]:
    """The same events as bodies of Centrifugo's `/api/publish`, for sides without a database."""
    with psycopg.connect(url) as connection:
        parameters = _parameters(events, namespace, aggregates, "change")
        return [text for (text,) in connection.execute(_REQUESTS, parameters)]


def _parameters(events: int, namespace: str, aggregates: int, kind: str) -> dict[str, object]:
    return {"events": events, "namespace": namespace, "aggregates": aggregates, "kind": kind}
