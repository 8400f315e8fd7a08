"""How a batch's events are packed into requests, and which of them may travel together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from outbox_relay.event import Event, boottime
from outbox_relay.outcome import namespace

WAVE_SHRINKAGE: Final = 4
"""A wave with less than this part of the first one's events waits for the next batch, with fuller company."""
LINGER: Final = 0.03
"""Seconds after the first wave in which smaller ones start. Meanwhile the lanes that they leave alone stay locked."""
ENTRY_BYTES: Final = 320
"""What an event's tags and brackets take in a bundle, beside its payload and the application's own tags; about."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request: publications, bytes of payload, bytes of payload to one channel.

    One event always fits. Bytes per channel matter because Centrifugo disconnects a subscriber whose queue
    grows past `client.queue_max_size`, 1 MiB by default.
    """

    events: int = 1_000
    bytes: int = 1024 * 1024
    channel_bytes: int = 256 * 1024


@dataclass(frozen=True, slots=True)
class Wire:
    """How a namespace's channels are published to.

    `channels`: streams of publications; maps, which hold each aggregate's last state under its version; or exclusive
    ones, each for one aggregate, whose version Centrifugo keeps for the channel. `bundle_events`: how many events a
    bundle in a stream holds; 1 makes none.
    """

    channels: Literal["stream", "map", "exclusive"] = "stream"
    bundle_events: int = 1


Wires = Mapping[str, Wire]
"""By namespace. One that is not in it gets a publication for each event."""
PLAIN: Final = Wire()


def waves(events: Sequence[Event], limits: Limits, wires: Wires | None = None) -> list[list[Event]]:
    """Pack events into requests: the earliest that has room, after the one with the aggregate's last event.

    At most one event of an aggregate in a request, because Centrifugo goes on after a failing command and its
    successor would overtake it; but for those that share their fate because they are in the same bundles. Events of
    one aggregate keep their order.
    """
    requests: list[list[Event]] = []
    room: list[int] = []  # bytes left, by request
    used: list[dict[str, int]] = []  # bytes by channel, by request
    next_of: dict[tuple[str, str], int] = {}  # the earliest request for an aggregate's next event
    bundles = _Bundles(wires) if wires else None
    sizes = [len(event.payload) if event.payload.isascii() else len(event.payload.encode()) for event in events]
    if bundles:
        sizes = [size + ENTRY_BYTES + len(event.tags or "") for event, size in zip(events, sizes, strict=True)]
    # Where all of them together are within a channel's share, none has to be watched.
    crowded = sum(sizes) > limits.channel_bytes
    for event, size in zip(events, sizes, strict=True):
        channels = event.channels if crowded else ()
        aggregate = (event.aggregate_type, event.aggregate_id)
        n = next_of.get(aggregate, 0)
        if bundles:
            n -= bundles.take(event, aggregate)
        while n < len(requests) and not (
            size <= room[n]
            and (bundles.fit(n, limits.events) if bundles else len(requests[n]) < limits.events)
            and (not channels or _room_in_channels(used[n], channels, size, limits))
        ):
            n += 1
        if n == len(requests):
            requests.append([])
            room.append(limits.bytes)
            used.append({})
        requests[n].append(event)
        room[n] -= size
        for channel in channels:
            used[n][channel] = used[n].get(channel, 0) + size
        next_of[aggregate] = n + 1
        if bundles:
            bundles.add(n)
    return requests


def worthwhile(planned: Sequence[list[Event]], behind: set[tuple[str, str]]) -> Iterator[list[Event]]:
    """Yield the waves that are worth a request now, and put the aggregates of those that wait into `behind`."""
    lingers_until = math.inf
    for wave in planned:
        first = len(planned[0])
        if len(wave) < first and (len(wave) * WAVE_SHRINKAGE < first or boottime() >= lingers_until):
            behind.update(event.aggregate for event in wave)
        else:
            yield wave
            lingers_until = min(lingers_until, boottime() + LINGER)


def _room_in_channels(used: Mapping[str, int], channels: Sequence[str], size: int, limits: Limits) -> bool:
    for channel in channels:  # noqa: SIM110 - a generator for each event costs as much as all else here
        if used.get(channel, 0) + size > limits.channel_bytes:
            return False
    return True


class _Bundles:
    """What the bundles of each request hold while they are filled, and the event that is to be packed now."""

    def __init__(self, wires: Wires) -> None:
        self._wires = wires
        self._bounds: dict[str, int] = {}  # by channel
        self._last: dict[tuple[str, str], list[str]] = {}  # an aggregate's last event: its channels, if all bundle it
        self._counts: list[dict[str, int]] = []  # events by channel that bundles, by request
        self._publications: list[int] = []  # by request
        self._known: list[str] = []  # channels of which is known
        self._channels: list[str] = []  # those that bundle
        self._whole = False  # and whether all of them do

    def take(self, event: Event, aggregate: tuple[str, str]) -> bool:
        """Turn to an event, and say whether it may be in its predecessor's request: they share all their bundles."""
        channels = event.unsent if event.accepted else event.channels
        if event.tried:
            self._channels, self._whole, self._known = [], False, []
        elif channels != self._known:
            self._channels = [channel for channel in channels if self._bound(channel) > 1]
            self._whole, self._known = len(self._channels) == len(channels), channels
        together = self._whole and self._last.get(aggregate) == channels
        self._last[aggregate] = channels if self._whole else []
        return together

    def fit(self, n: int, limit: int) -> bool:
        """Whether request `n` has room, of `limit` publications."""
        counts = self._counts[n]
        for channel in self._channels:
            if counts.get(channel, 0) >= self._bounds[channel]:
                return False
        return self._publications[n] < limit or (self._whole and all(channel in counts for channel in self._channels))

    def add(self, n: int) -> None:
        if n == len(self._counts):
            self._counts.append({})
            self._publications.append(0)
        counts = self._counts[n]
        joins = self._whole
        for channel in self._channels:
            count = counts.get(channel, 0)
            joins = joins and count > 0
            counts[channel] = count + 1
        self._publications[n] += not joins

    def _bound(self, channel: str) -> int:
        bound = self._bounds.get(channel)
        if bound is None:
            bound = self._bounds[channel] = wire_of(channel, self._wires).bundle_events
        return bound


def wire_of(channel: str, wires: Wires) -> Wire:
    """How a channel is published to."""
    return wires.get(namespace(channel), PLAIN)
