"""What an event becomes on the wire: itself, or the gap that its channels are told of in its place; or nothing.

Pure: the relay asks once per batch, before it publishes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from outbox_relay.event import Event
from outbox_relay.outcome import Policy, Settlement, given_up

PolicyOf = Callable[[str], Policy]


class Plan(NamedTuple):
    """A batch's events to send, in order, gaps among them; and the ends of those of which nothing is said."""

    events: list[Event]
    ends: list[Settlement]


def plan(events: list[Event], now: float, policy_of: PolicyOf) -> Plan:
    """Decide what becomes of a batch's events. `now` is on the database's clock.

    An event that has expired, died or was discarded is not sent any more. Its channels that have not accepted it are
    told, where its type has gaps. Behind a dead one whose aggregate waits for a person nothing is sent.
    """
    policies = {name: policy_of(name) for name in {event.aggregate_type for event in events}}
    lasting = all(policy.max_age == math.inf for policy in policies.values())
    if lasting and all(event.ending is None and event.expires_at is None for event in events):
        return Plan(events, [])
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
        gap = replace(event, kind="gap", payload="{}", base_version=None, ending=event.ending or "expired")
        if policy.gap and gap.unsent:
            sent.append(gap)
        else:
            ends.append(end(gap, policy))
    return Plan(sent, ends)


def expired(event: Event, now: float, policy: Policy) -> bool:
    """Whether an event is too old to be sent. One that a person replays is not."""
    if event.replay is not None:
        return False
    return now >= event.created_at + policy.max_age or (event.expires_at is not None and now >= event.expires_at)


def end(gap: Event, policy: Policy) -> Settlement:
    """The end of an event whose gap all its channels have accepted, or that owes none."""
    assert gap.ending is not None  # noqa: S101 - that makes it a gap
    return Settlement(gap, given_up(gap.ending, policy), ())
