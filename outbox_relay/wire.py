"""What a request says: events as Centrifugo's commands, and Centrifugo's answers as replies to events.

Payload and tags are spliced in as they are, never parsed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final, NamedTuple

from outbox_relay.outcome import ACCEPTED, Event, Refusal, Reply
from outbox_relay.packing import Wires, bound_of

WIRE_VERSION: Final = "1"
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
    """One command of a request: its text, the channels it publishes to, and which of the request's events are in it."""

    text: str
    channels: Sequence[str]
    events: Sequence[int]


def commands(events: Sequence[Event], wires: Wires) -> list[Command]:
    """A command for each event and for each bundle: one per channel that takes bundles and has two events or more."""
    bundles: dict[str, list[int]] = {}
    for n, event in enumerate(events):
        for channel in event.unsent:
            if bound_of(event, channel, wires) > 1:
                bundles.setdefault(channel, []).append(n)
    bundles = {channel: members for channel, members in bundles.items() if len(members) > 1}
    bundled = {(channel, n) for channel, members in bundles.items() for n in members}
    found = [
        Command(_bundle(channel, [events[n] for n in members]), (channel,), members)
        for channel, members in bundles.items()
    ]
    for n, event in enumerate(events):
        own = [channel for channel in event.unsent if (channel, n) not in bundled]
        if own:
            found.append(Command(_publication(event, own), own, (n,)))
    return found


def replies(events: Sequence[Event], asked: Sequence[Command], answers: Sequence[Any], refuse: Refuse) -> list[Reply]:
    """What became of each event. Raises where an answer is none that Centrifugo gives to its command."""
    accepted: list[list[str]] = [[] for _ in events]
    refusals: list[list[Refusal]] = [[] for _ in events]
    doubted: set[int] = set()
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
    return [
        Reply(tuple(refusals[n]), tuple(accepted[n]), n in doubted) if refusals[n] else ACCEPTED
        for n in range(len(events))
    ]


def channel_errors(channels: Sequence[str], answer: Any) -> list[tuple[str, Any]]:
    """Centrifugo's error for each channel of a command, None where it has accepted."""
    error = answer.get("error")
    if error is not None:
        return [(channel, error) for channel in channels]
    responses = answer["broadcast"]["responses"] if len(channels) > 1 else [answer["publish"]]
    return [(channel, response.get("error")) for channel, response in zip(channels, responses, strict=True)]


def _publication(event: Event, channels: Sequence[str]) -> str:
    if len(channels) == 1:
        target = f'"publish":{{"channel":{_quote(channels[0])}'
    else:
        target = f'"broadcast":{{"channels":[{",".join(map(_quote, channels))}]'
    return f'{{{target},"data":{event.payload},"idempotency_key":"{event.idempotency_key}","tags":{_tags(event)}}}}}'


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
