"""What an event becomes on the wire: itself, or the gap that its channels are told of in its place; or nothing.

Pure: the relay asks once per batch, before it publishes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from outbox_relay.event import Event
from outbox_relay.outcome import BEHIND, SUPERSEDED, UNSETTLED, GivenUp, Held, Owed, Policy, Settlement, given_up

PolicyOf = Callable[[str], Policy]


class Plan(NamedTuple):
    """A batch's events to send, in order, gaps among them; and the ends of those of which nothing is said.

    `covered`: by the id of an event that is sent, those in whose place it is sent too.
    """

    events: list[Event]
    ends: list[Settlement]
    covered: Covered


Covered = dict[int, list[Event]]


def plan(events: list[Event], now: float, policy_of: PolicyOf) -> Plan:
    """Decide what becomes of a batch's events. `now` is on the database's clock.

    An event that has expired, died or was discarded is not sent any more. Its channels that have not accepted it are
    told, where its type has gaps. Behind a dead one whose aggregate waits for a person nothing is sent.
    """
    policies = {name: policy_of(name) for name in {event.aggregate_type for event in events}}
    lasting = all(policy.max_age == math.inf for policy in policies.values())
    covered: Covered = {}
    if any(policy.conflate for policy in policies.values()):
        events = _conflate(events, now, policies, covered)
    if lasting and all(event.ending is None and event.expires_at is None for event in events):
        return Plan(events, [], covered)
    sent: list[Event] = []
    ends: list[Settlement] = []
    stopped: set[tuple[str, str]] = set()
    for event in events:
        policy = policies[event.aggregate_type]
        if event.aggregate in stopped:
            continue
        if event.ending == "dead" and policy.wait_after_dead:
            stopped.add(event.aggregate)
        if event.ending is None and not expired(event, now, policy):
            sent.append(event)
            continue
        gap = event._replace(kind="gap", payload="{}", base_version=None, ending=event.ending or "expired")
        if policy.gap and gap.unsent:
            sent.append(gap)
        else:
            ends.append(end(gap, policy))
    return Plan(sent, ends, covered)


def _conflate(events: Sequence[Event], now: float, policies: Mapping[str, Policy], covered: Covered) -> list[Event]:
    """The events that no later one makes needless; the others are noted in `covered`.

    A later one does that if it is a snapshot or a tombstone, its version is not lower, and it is the next one that each
    channel of the earlier one hears of: what went out in between would overtake it, if the batch ended there.
    """
    kept: list[Event] = []
    next_of: dict[tuple[str, str], dict[str, Event]] = {}  # by aggregate, by channel
    for event in reversed(events):
        policy = policies[event.aggregate_type]
        if not policy.conflate:
            kept.append(event)
            continue
        if event.ending == "dead" and policy.wait_after_dead:
            next_of.pop(event.aggregate, None)  # nothing behind it is sent
        following = next_of.setdefault(event.aggregate, {})
        later = following.get(event.channels[0])
        if (
            later is not None
            and later.kind in {"snapshot", "tombstone"}
            and later.version >= event.version
            and later.ending is None
            and not expired(later, now, policy)
            and all(following.get(channel) is later for channel in event.channels)
        ):
            covered.setdefault(later.id, []).append(event)
        else:
            kept.append(event)
            following.update(dict.fromkeys(event.channels, event))
    kept.reverse()
    return kept


def superseded(
    covered: Covered,
    delivered: Sequence[Event],
    refused: Sequence[Settlement],
    now: float,
    policy_of: PolicyOf,
) -> list[Settlement]:
    """What becomes of the covered events: over, once all their channels have accepted the one in their place.

    Else the channels that did are remembered: they are not sent the older event any more. And if the one in their
    place puts the aggregate on hold, they wait with it: else they might be met too late, when it has been sent again.
    """
    found: list[Settlement] = []
    for later in delivered:
        found += [Settlement(event, _covered_end(event, now, policy_of), ()) for event in covered.get(later.id, ())]
    for later, outcome, accepted_now in refused:
        took = {*accepted_now, *(later.accepted or ())}
        waits = isinstance(outcome, Held | Owed) or (isinstance(outcome, GivenUp) and outcome.wait)
        for event in covered.get(later.id, ()):
            accepted = tuple(channel for channel in event.unsent if channel in took)
            if len(accepted) == len(event.unsent):
                found.append(Settlement(event, _covered_end(event, now, policy_of), ()))
            elif waits or accepted:
                found.append(Settlement(event, BEHIND if waits else UNSETTLED, accepted))
    return found


def _covered_end(event: Event, now: float, policy_of: PolicyOf) -> GivenUp:
    """Superseded, unless it was to end otherwise: then it owes no gap any more."""
    if event.ending is not None:
        return given_up(event.ending, policy_of(event.aggregate_type))
    return GivenUp("expired") if expired(event, now, policy_of(event.aggregate_type)) else SUPERSEDED


def expired(event: Event, now: float, policy: Policy) -> bool:
    """Whether an event is too old to be sent. One that a person replays is not."""
    if event.replay is not None:
        return False
    return now >= event.created_at + policy.max_age or (event.expires_at is not None and now >= event.expires_at)


def end(gap: Event, policy: Policy) -> Settlement:
    """The end of an event whose gap all its channels have accepted, or that owes none."""
    assert gap.ending is not None  # noqa: S101 - that makes it a gap
    return Settlement(gap, given_up(gap.ending, policy), ())
