"""Builds the relay's parts from settings: for the command line, and for a relay inside an application."""

from __future__ import annotations

import math
import ssl
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial

from outbox_relay import config
from outbox_relay.centrifugo import Centrifugo
from outbox_relay.config import ConfigError, Settings, TypeSettings
from outbox_relay.metrics import BacklogCollector, HealthCollector, Metrics, registry
from outbox_relay.monitor import Monitor
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from outbox_relay.packing import Limits, Wire, Wires
from outbox_relay.runner import Relay
from outbox_relay.shared import Observer
from outbox_relay.start_hint import SharedHint
from outbox_relay.store import Store


@contextmanager
def monitored_relay(settings: Settings) -> Iterator[Relay]:
    """A relay that has not been started, and beside it, if `metrics_port` is set, its metrics and health checks.

    Raises `ConfigError`, also when that port cannot be had.
    """
    if settings.metrics_port is None:
        yield build_relay(settings)
        return
    metrics = Metrics()
    relay = build_relay(settings, metrics)
    backlog = BacklogCollector(partial(_backlog, settings))
    try:
        monitor = Monitor(
            settings.metrics_host,
            settings.metrics_port,
            registry(metrics, HealthCollector(relay.health), backlog),
            relay.health,
        )
    except OSError as error:
        where = f"{settings.metrics_host}, port {settings.metrics_port}"
        raise ConfigError(f"metrics_port: cannot listen on {where}: {error.strerror}") from None
    with monitor:
        yield relay


def _backlog(settings: Settings) -> Mapping[str, float | None]:
    # A session for every question: they are seconds apart, and nothing is left open where nobody asks any more.
    with closing(build_store(settings)) as store:
        return store.backlog()._asdict()


def build_relay(settings: Settings, observer: Observer | None = None) -> Relay:
    """A relay that has not been started. Raises `ConfigError`."""
    return Relay(
        partial(build_store, settings, SharedHint()), partial(build_publisher, settings), options(settings), observer
    )


def build_store(settings: Settings, share: SharedHint | None = None) -> Store:
    """Connect to the database, as one of those that `share`. Raises `ConfigError` and `DatabaseUnavailableError`."""
    config.need(settings, "database_url")
    return Store(
        settings.database_url.get_secret_value() if settings.database_url else "",
        schema=settings.schema,
        request_timeout=settings.request_timeout,
        batch_time=settings.batch_time,
        keep_delivered=settings.keep > 0,
        wake_up=settings.wake_up,
        share=share,
    )


def build_publisher(settings: Settings) -> Centrifugo:
    """Raises `ConfigError`; connects when it publishes."""
    config.need(settings, "centrifugo_url", "centrifugo_api_key")
    key = settings.centrifugo_api_key.get_secret_value() if settings.centrifugo_api_key else ""
    if not _fits_a_header(key):
        raise ConfigError("centrifugo_api_key: no HTTP header can hold it, give printable ASCII characters")
    try:
        return Centrifugo(
            settings.centrifugo_url or "",
            key,
            timeout=settings.request_timeout,
            parallel=None if settings.parallel == "auto" else settings.parallel,
            verify=_authorities(settings),
            new_key=partial(_new_key, settings),
            wires=wires(settings),
        )
    except ValueError as error:
        raise ConfigError(f"centrifugo_url: {error}") from None


def _fits_a_header(key: str) -> bool:
    return key.isascii() and key.isprintable()


def _new_key(settings: Settings) -> str | None:
    key = config.api_key_now(settings)
    return key if key is not None and _fits_a_header(key) else None


def _authorities(settings: Settings) -> ssl.SSLContext | bool:
    """Who may sign Centrifugo's certificate."""
    if settings.centrifugo_ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=settings.centrifugo_ca_file)
    except ssl.SSLError:
        raise ConfigError("centrifugo_ca_file: it holds no certificates in PEM form") from None
    except OSError as error:
        raise ConfigError(f"centrifugo_ca_file: it cannot be read: {error.strerror}") from None


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
        frozen_after=_frozen_after(settings),
        limits=Limits(
            events=settings.request_events, bytes=settings.request_bytes, channel_bytes=settings.channel_bytes
        ),
        policy=policy(settings),
        policies={name: policy(settings, own) for name, own in settings.types.items()},
        wires=wires(settings),
        keep=settings.keep,
        keep_dead=settings.keep_dead,
    )


def wires(settings: Settings) -> Wires:
    return {name: Wire(own.channels, own.bundle_events) for name, own in settings.namespaces.items()}


def _frozen_after(settings: Settings) -> float:
    """Longer than a turn can take: its longest waits, and several statements that end just before their time-out."""
    statement = settings.request_timeout + settings.batch_time + 1.0
    return 30.0 + 4 * statement + max(settings.poll_max, settings.pause_max)


def policy(settings: Settings, own: TypeSettings | None = None) -> Policy:
    """The policy of one aggregate type: its own settings where it has some, else the relay's."""
    own = own or TypeSettings()
    return Policy(
        max_attempts=settings.max_attempts if own.max_attempts is None else own.max_attempts,
        min_age=settings.min_age if own.min_age is None else own.min_age,
        backoff_base=settings.backoff_base if own.backoff_base is None else own.backoff_base,
        backoff_max=settings.backoff_max if own.backoff_max is None else own.backoff_max,
        wait_after_dead=own.after_dead == "wait",
        max_age=(settings.max_age if own.max_age is None else own.max_age) or math.inf,
        conflate=own.conflate,
        gap=settings.gap if own.gap is None else own.gap,
    )
