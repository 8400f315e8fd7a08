"""How a relay works: what may be set, and what it is where nobody says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from outbox_relay.outcome import Policy
from outbox_relay.packing import Limits, Wires


@dataclass(frozen=True, slots=True)
class Options:
    """How a relay works; times in seconds."""

    workers: int = 2
    lanes: int = 64
    events_per_lane: int = 16
    batch_events: int = 1_000
    batch_bytes: int = 1024 * 1024
    batch_time: float = 1.0
    poll_min: float = 0.002
    poll_max: float = 0.1
    pause_min: float = 0.1
    pause_max: float = 0.5
    stop_timeout: float = 10.0
    frozen_after: float = 60.0
    """Without a sign of life for so long a worker counts as frozen."""
    keep: float = 7 * 86_400.0
    keep_dead: float = 90 * 86_400.0
    limits: Limits = field(default_factory=Limits)
    policy: Policy = field(default_factory=Policy)
    policies: Mapping[str, Policy] = field(default_factory=dict)
    """By aggregate type, where it differs from `policy`."""
    wires: Wires = field(default_factory=dict)

    @property
    def conflated(self) -> Mapping[str, Policy]:
        """The policies of the types of which only what no later event makes needless is sent."""
        return {name: policy for name, policy in self.policies.items() if policy.conflate}

    def policy_of(self, aggregate_type: str) -> Policy:
        return self.policies.get(aggregate_type, self.policy)
