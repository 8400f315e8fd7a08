"""Builds the relay's parts from settings: for the command line, and for a relay inside an application."""

from __future__ import annotations

from functools import partial

from outbox_relay import config
from outbox_relay.centrifugo import Centrifugo
from outbox_relay.config import ConfigError, Settings, TypeSettings
from outbox_relay.outcome import Policy
from outbox_relay.relay import Limits, Options, Relay
from outbox_relay.store import Store


def build_relay(settings: Settings) -> Relay:
    """A relay that has not been started. Raises `ConfigError`."""
    return Relay(partial(build_store, settings), partial(build_publisher, settings), options(settings))


def build_store(settings: Settings) -> Store:
    """Connect to the database. Raises `ConfigError` and `DatabaseUnavailableError`."""
    config.need(settings, "database_url")
    return Store(
        settings.database_url.get_secret_value() if settings.database_url else "",
        schema=settings.schema,
        request_timeout=settings.request_timeout,
        batch_time=settings.batch_time,
        keep_delivered=settings.keep > 0,
    )


def build_publisher(settings: Settings) -> Centrifugo:
    """Raises `ConfigError`; connects when it publishes."""
    config.need(settings, "centrifugo_url", "centrifugo_api_key")
    try:
        return Centrifugo(
            settings.centrifugo_url or "",
            settings.centrifugo_api_key.get_secret_value() if settings.centrifugo_api_key else "",
            timeout=settings.request_timeout,
            parallel=settings.parallel,
        )
    except ValueError as error:
        raise ConfigError(f"centrifugo_url: {error}") from None


def options(settings: Settings) -> Options:
    return Options(
        workers=settings.workers,
        lanes=settings.lanes,
        batch_events=settings.batch_events,
        batch_bytes=settings.batch_bytes,
        batch_time=settings.batch_time,
        poll_max=settings.poll_max,
        pause_max=settings.pause_max,
        stop_timeout=settings.stop_timeout,
        limits=Limits(
            events=settings.request_events, bytes=settings.request_bytes, channel_bytes=settings.channel_bytes
        ),
        policy=policy(settings),
        policies={name: policy(settings, own) for name, own in settings.types.items()},
        keep=settings.keep,
        keep_dead=settings.keep_dead,
    )


def policy(settings: Settings, own: TypeSettings | None = None) -> Policy:
    """The policy of one aggregate type: its own settings where it has some, else the relay's."""
    own = own or TypeSettings()
    return Policy(
        max_attempts=settings.max_attempts if own.max_attempts is None else own.max_attempts,
        min_age=settings.min_age if own.min_age is None else own.min_age,
        backoff_base=settings.backoff_base if own.backoff_base is None else own.backoff_base,
        backoff_max=settings.backoff_max if own.backoff_max is None else own.backoff_max,
        wait_after_dead=own.after_dead == "wait",
    )
