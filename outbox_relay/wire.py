"""What a request says: events as Centrifugo's commands, and Centrifugo's answers as replies to events.

Payload and tags are spliced in as they are, never parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from hashlib import blake2b
from itertools import accumulate
from typing import Any, Final, NamedTuple

from outbox_relay.event import ACCEPTED, OVERTAKEN, Event, Refusal, Reply
from outbox_relay.packing import Wire, Wires, wire_of

WIRE_VERSION: Final = "1"
# Bad requests, answered without asking.
TOO_DEEP: Final = {"code": 107, "message": "not sent: the payload is nested too deeply for Centrifugo's decoder"}
NO_STATE: Final = {"code": 107, "message": "not sent: this channel takes snapshots and tombstones, no changes"}
MAX_DEPTH: Final = 9_990
"""Go's JSON decoder refuses more than 10,000 levels, the batch's own included, and with them the whole batch."""
_STRINGS: Final = re.compile(r'"(?:[^"\\]|\\.)*"')
_quote: Final = json.encoder.encode_basestring

Refuse = Callable[[str, Mapping[str, Any]], Refusal]


def encode_batch(events: Iterable[Event], *, parallel: bool) -> bytes:
    """The body of one batch request, with a command for each event."""
    return _body(
        [_publication(event, event.unsent if event.accepted else event.channels) for event in events], parallel
    )


def encode_commands(commands: Iterable[Command], *, parallel: bool) -> bytes:
    """The body of one batch request."""
    return _body([command.text for command in commands], parallel)


def _body(commands: list[str], parallel: bool) -> bytes:
    # Onto single commands, because one more copy of the whole is a megabyte more.
    commands = commands or [""]
    commands[0] = ('{"parallel":true,"commands":[' if parallel else '{"commands":[') + commands[0]
    commands[-1] += "]}"
    return ",".join(commands).encode()


class Command(NamedTuple):
    """One command of a request: its text, the channels it publishes to, and which of the request's events are in it.

    With an `error` it is not sent: that is its answer.
    """

    text: str
    channels: Sequence[str]
    events: Sequence[int]
    error: Mapping[str, Any] | None = None


def commands(events: Sequence[Event], wires: Wires, too_deep: Set[int] = frozenset()) -> list[Command]:
    """What a request has to ask: for each event as its channels take it, and for each bundle.

    A channel that takes bundles has one if it has two events or more. What holds an event of `too_deep` is not sent.
    """
    bundles: dict[str, list[int]] = {}
    known: dict[str, Wire] = {}
    found: list[Command] = []
    for n, event in enumerate(events):
        own: list[str] = []
        error = TOO_DEEP if n in too_deep else None
        for channel in event.unsent if event.accepted else event.channels:
            wire = known.get(channel)
            if wire is None:
                wire = known[channel] = wire_of(channel, wires)
            if wire.channels != "stream":
                keyed = wire.channels == "map"
                refused = error or (NO_STATE if event.kind == "change" else None)
                found.append(Command(_state(event, channel, keyed=keyed), (channel,), (n,), refused))
            elif wire.bundle_events > 1 and not event.tried:
                bundles.setdefault(channel, []).append(n)
            else:
                own.append(channel)
        if own:
            found.append(Command(_publication(event, own), own, (n,), error))
    for channel, members in bundles.items():
        inside = [events[n] for n in members]
        text = _bundle(channel, inside) if len(inside) > 1 else _publication(inside[0], (channel,))
        found.append(Command(text, (channel,), members, None if too_deep.isdisjoint(members) else TOO_DEEP))
    return found


def replies(events: Sequence[Event], asked: Sequence[Command], answers: Sequence[Any], refuse: Refuse) -> list[Reply]:
    """What became of each event. Raises where an answer is none that Centrifugo gives to its command."""
    accepted: list[list[str]] = [[] for _ in events]
    refusals: list[list[Refusal]] = [[] for _ in events]
    doubted: set[int] = set()
    overtaken: list[int] = []
    for command, answer in zip(asked, answers, strict=True):
        for channel, error in channel_errors(command.channels, answer):
            refusal = None if error is None else refuse(channel, error)
            for n in command.events:
                if refusal is None:
                    accepted[n].append(channel)
                else:
                    refusals[n].append(refusal)
            if refusal is not None and len(command.events) > 1:
                doubted.update(command.events)
            if "map_publish" in answer and answer["map_publish"].get("suppress_reason") == "version":
                overtaken += command.events
    outcomes: list[Reply] = []
    for n, event in enumerate(events):
        if refusals[n]:
            outcomes.append(Reply(tuple(refusals[n]), tuple(accepted[n]), n in doubted))
        else:
            everywhere = overtaken.count(n) == len(event.channels) if overtaken else False
            outcomes.append(OVERTAKEN if everywhere else ACCEPTED)
    return outcomes


def too_deep_for_go(payload: str) -> bool:
    """Whether Go would refuse the payload's nesting. Counting brackets rules it out for almost all."""
    if len(payload) <= MAX_DEPTH or payload.count("[") + payload.count("{") <= MAX_DEPTH:
        return False
    depths = accumulate(1 if bracket in "[{" else -1 for bracket in re.findall(r"[][{}]", _STRINGS.sub("", payload)))
    return max(depths, default=0) > MAX_DEPTH


def channel_errors(channels: Sequence[str], answer: Any) -> list[tuple[str, Any]]:
    """Centrifugo's error for each channel of a command, None where it has accepted."""
    error = answer.get("error")
    if error is not None:
        return [(channel, error) for channel in channels]
    if len(channels) > 1:
        responses = answer["broadcast"]["responses"]
    else:
        responses = [answer["map_publish"] if "map_publish" in answer else answer["publish"]]
    return [(channel, response.get("error")) for channel, response in zip(channels, responses, strict=True)]


def _publication(event: Event, channels: Sequence[str]) -> str:
    if len(channels) == 1:
        target = f'"publish":{{"channel":{_quote(channels[0])}'
    else:
        target = f'"broadcast":{{"channels":[{",".join(map(_quote, channels))}]'
    return f'{{{target},"data":{event.payload},"idempotency_key":"{event.idempotency_key}","tags":{_tags(event)}}}}}'


def _state(event: Event, channel: str, *, keyed: bool) -> str:
    """A publication that Centrifugo drops if it knows a newer version: of the key, or of the channel."""
    method, key = ("map_publish", f',"key":{_quote(_key(event))}') if keyed else ("publish", "")
    return (
        f'{{"{method}":{{"channel":{_quote(channel)}{key},"data":{event.payload},"version":{event.version},'
        f'"version_epoch":{_quote(event.epoch)},"idempotency_key":"{event.idempotency_key}","tags":{_tags(event)}}}}}'
    )


def _key(event: Event) -> str:
    """TYPE/ID. A slash in the type is written otherwise, so that no two aggregates have one key."""
    return f"{event.aggregate_type.replace('%', '%25').replace('/', '%2F')}/{event.aggregate_id}"


def _bundle(channel: str, events: Sequence[Event]) -> str:
    entries = ",".join([f'{{"data":{event.payload},"tags":{_tags(event)}}}' for event in events])
    digest = blake2b("\n".join([channel, *(event.idempotency_key for event in events)]).encode(), digest_size=16)
    return (
        f'{{"publish":{{"channel":{_quote(channel)},"data":{{"ob":[{entries}]}},'
        f'"idempotency_key":"bundle:{digest.hexdigest()}",'
        f'"tags":{{"ob":"{WIRE_VERSION}","ob_bundle":"{len(events)}"}}}}}}'
    )


def _tags(event: Event) -> str:
    epoch = f',"ob_epoch":{_quote(event.epoch)}' if event.epoch else ""
    base = "" if event.base_version is None else f',"ob_base":"{event.base_version}"'
    own_tags = f",{event.tags[1:]}" if event.tags and event.tags != "{}" else "}"
    return (
        f'{{"ob":"{WIRE_VERSION}","ob_type":{_quote(event.aggregate_type)},'
        f'"ob_id":{_quote(event.aggregate_id)},"ob_version":"{event.version}","ob_event":"{event.event_id}",'
        f'"ob_kind":"{event.kind}"{epoch}{base}{own_tags}'
    )
