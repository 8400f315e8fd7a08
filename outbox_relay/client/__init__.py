"""Objects in memory as the database has them: the subscriber's side, for Python. Needs the extra `client`."""

from outbox_relay.client.live import Live, Loaded

__all__ = ["Live", "Loaded"]
