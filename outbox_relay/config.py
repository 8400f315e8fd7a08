"""Settings: from flags, the environment (`OUTBOX_RELAY_…`, or `…_FILE` for secrets) and a TOML file, in that order."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_type_hints
from urllib.parse import unquote

from pydantic import ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

PREFIX: Final = "OUTBOX_RELAY_"
CONFIG_FILE: Final = "outbox-relay.toml"

Count = Annotated[int, Field(ge=1, le=100_000)]
Bytes = Annotated[int, Field(ge=1)]
Age = Annotated[float, Field(ge=0, le=100 * 366 * 86_400)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ConfigError(Exception):
    """A setting is missing or wrong. The text is one line that says which, and what to do."""


class Doc(NamedTuple):
    """What a setting is, and in which unit."""

    text: str


@dataclass(frozen=True, kw_only=True)
class TypeSettings:
    """What may differ from the relay's settings for one aggregate type."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    max_attempts: Annotated[Count | None, Doc("refusals that are an event's own fault before it may be dead")] = None
    min_age: Annotated[Age | None, Doc("seconds of refusals before an event may be dead")] = None
    backoff_base: Annotated[Seconds | None, Doc("seconds that an aggregate waits after its first refusal")] = None
    backoff_max: Annotated[Seconds | None, Doc("seconds that an aggregate waits between two tries, at most")] = None
    after_dead: Annotated[
        Literal["go_on", "wait"], Doc("go_on, or wait until a person has requeued or discarded the dead event")
    ] = "go_on"
    max_age: Annotated[Age | None, Doc("seconds after which an event is not sent any more; 0: it never expires")] = None
    conflate: Annotated[
        bool, Doc("send only the newest of an object's waiting snapshots and tombstones; the rest is superseded")
    ] = False
    gap: Annotated[bool | None, Doc("tell channels of an event that they will not get (ob_kind=gap)")] = None


@dataclass(frozen=True, kw_only=True)
class NamespaceSettings:
    """How the channels of one namespace are published to."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    channels: Annotated[
        Literal["stream", "map", "exclusive"],
        Doc("stream; map, as in Centrifugo's configuration; exclusive: one object per channel, under its version"),
    ] = "stream"
    bundle_events: Annotated[Count, Doc("events of a stream channel in one publication, a bundle; 1 makes none")] = 1

    def __post_init__(self) -> None:
        if self.channels != "stream" and self.bundle_events > 1:
            raise ValueError(f"{self.channels} channels take no bundles: leave bundle_events out")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting, its bounds, its default and its unit."""

    __pydantic_config__ = ConfigDict(extra="forbid", str_strip_whitespace=True)

    database_url: Annotated[SecretStr | None, Doc("PostgreSQL URL: postgresql://user:password@host/database")] = None
    centrifugo_url: Annotated[str | None, Doc("Centrifugo's server API, with or without /api")] = None
    centrifugo_api_key: Annotated[SecretStr | None, Doc("Centrifugo's http_api.key")] = None
    centrifugo_api_key_file: Annotated[
        str | None, Doc("file that holds the key instead; read again whenever Centrifugo refuses the key")
    ] = None
    centrifugo_ca_file: Annotated[
        str | None, Doc("PEM file of who may sign Centrifugo's certificate, in place of the public authorities")
    ] = None
    schema: Annotated[str, Field(min_length=1, max_length=63), Doc("schema that holds the outbox")] = "public"
    workers: Annotated[int, Field(ge=1, le=64), Doc("threads, each with its own database session")] = 2
    parallel: Annotated[
        bool | Literal["auto"],
        Doc("let Centrifugo publish a request's events side by side; auto finds out what is faster"),
    ] = "auto"
    lanes: Annotated[int, Field(ge=1, le=256), Doc("lanes that a batch may lock, of 256")] = 64
    batch_events: Annotated[Count, Doc("events that a batch reads")] = 1_000
    batch_bytes: Annotated[Bytes, Doc("bytes of payload that a batch reads")] = 1024 * 1024
    request_events: Annotated[Count, Doc("events in one request to Centrifugo")] = 1_000
    request_bytes: Annotated[Bytes, Doc("bytes of payload in one request")] = 1024 * 1024
    channel_bytes: Annotated[Bytes, Doc("bytes of payload to one channel in one request")] = 256 * 1024
    request_timeout: Annotated[
        float, Field(gt=0, le=8), Doc("seconds for a whole request; Centrifugo cuts its own replies at 10")
    ] = 3.0
    batch_time: Annotated[float, Field(gt=0, le=60), Doc("seconds in which a batch starts requests")] = 1.0
    wake_up: Annotated[bool, Doc("hear of commits at once by LISTEN; through a pooler the relay only polls")] = True
    poll_max: Annotated[Seconds, Doc("seconds between two looks at an empty outbox, at most")] = 0.1
    pause_max: Annotated[Seconds, Doc("seconds between two tries during an outage, at most")] = 0.5
    stop_timeout: Annotated[Seconds, Doc("seconds to finish after SIGTERM")] = 10.0
    max_attempts: Annotated[Count, Doc("refusals that are an event's own fault before it may be dead")] = 10
    min_age: Annotated[Age, Doc("seconds of refusals before an event may be dead")] = 900.0
    backoff_base: Annotated[Seconds, Doc("seconds that an aggregate waits after its first refusal")] = 1.0
    backoff_max: Annotated[Seconds, Doc("seconds that an aggregate waits between two tries, at most")] = 60.0
    max_age: Annotated[Age, Doc("seconds after which an event is not sent any more; 0: it never expires")] = 0.0
    gap: Annotated[bool, Doc("tell channels of an event that they will not get (ob_kind=gap)")] = True
    keep: Annotated[Age, Doc("seconds that delivered events are kept; 0 deletes them at delivery")] = 7 * 86_400.0
    keep_dead: Annotated[Age, Doc("seconds that dead, expired and discarded events are kept")] = 90 * 86_400.0
    types: Annotated[
        dict[str, TypeSettings], Doc("what differs for an aggregate type: a table [types.NAME] in the TOML file")
    ] = field(default_factory=dict)
    namespaces: Annotated[
        dict[str, NamespaceSettings], Doc("what a namespace's channels get: a table [namespaces.NAME] in the TOML file")
    ] = field(default_factory=dict)
    metrics_port: Annotated[
        int | None, Field(ge=1, le=65_535), Doc("port of /metrics, /live and /ready; without one there are none")
    ] = None
    metrics_host: Annotated[
        str, Field(min_length=1), Doc("address on which that port listens; it asks nobody for a password")
    ] = "127.0.0.1"
    log_format: Annotated[Literal["console", "json"], Doc("console or json")] = "console"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Doc("debug, info, warning or error")] = "info"

    def secrets(self) -> list[str]:
        """Whatever must never be written anywhere, in every form in which it may turn up."""
        found = [self.centrifugo_api_key.get_secret_value()] if self.centrifugo_api_key else []
        if self.database_url:
            found += _passwords(self.database_url.get_secret_value())
        return found


SECRETS: Final = ("database_url", "centrifugo_api_key")
_FILES: Final = ("database_url", "centrifugo_url")
_KEY, _KEY_FILE = "centrifugo_api_key", "centrifugo_api_key_file"
_RANKS: Final = ("default", "file", "environment", "flag")
_PASSWORD: Final = re.compile(r"password\s*=\s*(?:'((?:[^'\\]|\\.)*)'|([^\s&]+))")
_ADAPTER: Final = TypeAdapter(Settings)


def load(flags: Mapping[str, Any], *, environ: Mapping[str, str] | None = None, file: Path | None = None) -> Settings:
    """Read the settings. `flags` that are None were not given. Raises `ConfigError`."""
    return load_with_sources(flags, environ=environ, file=file)[0]


def load_with_sources(
    flags: Mapping[str, Any], *, environ: Mapping[str, str] | None = None, file: Path | None = None
) -> tuple[Settings, dict[str, str]]:
    """As `load`, and for each setting where its value comes from, such as `environment OUTBOX_RELAY_WORKERS`."""
    environ = os.environ if environ is None else environ
    path, values = _from_file(file, environ)
    sources = {setting.name: f"file {path}" if setting.name in values else "default" for setting in fields(Settings)}
    for setting in fields(Settings):
        name = PREFIX + setting.name.upper()
        if setting.name in _FILES and environ.get(f"{name}_FILE"):
            if environ.get(name):
                raise ConfigError(f"both {name} and {name}_FILE are set: keep one of them")
            values[setting.name] = _secret_file(f"{name}_FILE", environ[f"{name}_FILE"])
            sources[setting.name] = f"environment {name}_FILE"
        elif environ.get(name):
            values[setting.name] = environ[name]
            sources[setting.name] = f"environment {name}"
        if flags.get(setting.name) is not None:
            values[setting.name] = flags[setting.name]
            sources[setting.name] = "flag"
    _choose_key(values, sources)
    return _validated(values), sources


def api_key_now(settings: Settings) -> str | None:
    """The API key as its file has it by now. None where it is in no file, or the file cannot be read."""
    if settings.centrifugo_api_key_file is None:
        return None
    try:
        return _secret_file(_KEY_FILE, settings.centrifugo_api_key_file)
    except ConfigError:
        return None


def docs(of: type[Settings | TypeSettings | NamespaceSettings]) -> dict[str, str]:
    """What each setting is, and its unit."""
    hints = get_type_hints(of, include_extras=True)
    return {
        setting.name: next(doc.text for doc in hints[setting.name].__metadata__ if isinstance(doc, Doc))
        for setting in fields(of)
    }


def _choose_key(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Read the API key from its file, unless the key itself comes from a place of a higher rank."""
    if not isinstance(values.get(_KEY_FILE), str):
        return
    key, file = (_RANKS.index(sources[name].partition(" ")[0]) for name in (_KEY, _KEY_FILE))
    named = PREFIX + _KEY_FILE.upper() if sources[_KEY_FILE].startswith("environment") else _KEY_FILE
    if key == file:
        raise ConfigError(f"both {named[: -len('_FILE')]} and {named} are set: keep one of them")
    if key > file:
        del values[_KEY_FILE]
        sources[_KEY_FILE] = "default"
    else:
        values[_KEY] = _secret_file(named, values[_KEY_FILE])
        sources[_KEY] = sources[_KEY_FILE]


def _validated(values: Mapping[str, Any]) -> Settings:
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        # Never the value: it may be a secret, or hold one.
        problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
            raise ConfigError(f"there is no setting {name!r}: outbox-relay config show lists them") from None
        raise ConfigError(f"{name} ({PREFIX}{name.upper()}): {problem['msg'].lower()}") from None


def need(settings: Settings, *names: str) -> None:
    """Raise `ConfigError` unless every one of these settings has a value."""
    for name in names:
        if getattr(settings, name) is None:
            variable = PREFIX + name.upper()
            raise ConfigError(f"{name} is missing: set {variable} or {variable}_FILE, or {name} in {CONFIG_FILE}")


def _from_file(file: Path | None, environ: Mapping[str, str]) -> tuple[Path, dict[str, Any]]:
    named = file or (Path(environ[PREFIX + "CONFIG"]) if environ.get(PREFIX + "CONFIG") else None)
    path = named or Path(CONFIG_FILE)
    if named is None and not path.is_file():
        return path, {}
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise ConfigError(f"{path} is not TOML: check it with a TOML editor") from None


def _secret_file(variable: str, name: str) -> str:
    try:
        value = Path(name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"the file that {variable} names cannot be read: {reason}") from None
    if not value:
        raise ConfigError(f"the file that {variable} names is empty")
    return value


def _passwords(url: str) -> list[str]:
    """The password of a database URL or of a keyword string, as written and decoded; also of one that is malformed."""
    found = [part for match in _PASSWORD.finditer(url) for part in match.groups() if part]
    credentials, at, _ = url.partition("://")[2].rpartition("@")
    if at:
        found.append(credentials.partition(":")[2])
    return [form for value in found if value for form in (value, unquote(value))]
