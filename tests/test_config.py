"""Settings: where they come from, which ones are refused, and what of them is secret."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from outbox_relay.build import options
from outbox_relay.config import ConfigError, api_key_now, load, load_with_sources, need
from outbox_relay.options import Options

CANARY = "c4nary"


def test_flags_then_environment_then_file(tmp_path: Path) -> None:
    """The nearest one counts, setting by setting; a flag that was not given is no value."""
    file = tmp_path / "relay.toml"
    file.write_text('schema = "file"\nworkers = 3\nlanes = 5\n', encoding="utf-8")
    environ = {"OUTBOX_RELAY_SCHEMA": "environment", "OUTBOX_RELAY_WORKERS": "4"}
    settings = load({"schema": "flag", "workers": None}, environ=environ, file=file)
    assert (settings.schema, settings.workers, settings.lanes, settings.batch_events) == ("flag", 4, 5, 1_000)


def test_the_file_is_named_or_lies_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By flag, by OUTBOX_RELAY_CONFIG, else ./outbox-relay.toml; without any there are the defaults."""
    monkeypatch.chdir(tmp_path)
    assert load({}, environ={}).workers == 2
    for workers, name in ((3, "outbox-relay.toml"), (4, "environment.toml"), (5, "flag.toml")):
        Path(name).write_text(f"workers = {workers}\n", encoding="utf-8")
    assert load({}, environ={}).workers == 3
    environ = {"OUTBOX_RELAY_CONFIG": "environment.toml"}
    assert load({}, environ=environ).workers == 4
    assert load({}, environ=environ, file=Path("flag.toml")).workers == 5


@pytest.mark.parametrize("name", ["database_url", "centrifugo_url", "centrifugo_api_key"])
def test_secrets_may_be_in_files(tmp_path: Path, name: str) -> None:
    """As container platforms mount them, with a newline at the end."""
    file = tmp_path / "secret"
    file.write_text("http://value\n", encoding="utf-8")
    value = getattr(load({}, environ={f"OUTBOX_RELAY_{name.upper()}_FILE": str(file)}), name)
    assert (value if isinstance(value, str) else value.get_secret_value()) == "http://value"


@pytest.mark.parametrize(
    ("environ", "toml", "key", "source", "reads"),
    [
        ({}, "centrifugo_api_key_file = 'key'", "from the file", "file", True),
        ({"API_KEY_FILE": "key"}, "centrifugo_api_key = 'in toml'", "from the file", "environment", True),
        ({"API_KEY": "given"}, "centrifugo_api_key_file = 'no such file'", "given", "environment", False),
    ],
    ids=["in TOML", "a file of the environment", "a key of the environment"],
)
def test_the_api_key_and_its_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    toml: str,
    key: str,
    source: str,
    reads: bool,
) -> None:
    """Of a key and a file that holds it the one from the higher place counts; only from a file is it read again."""
    monkeypatch.chdir(tmp_path)
    Path("key").write_text("from the file\n")
    Path("outbox-relay.toml").write_text(toml)
    variables = {f"OUTBOX_RELAY_CENTRIFUGO_{name}": value for name, value in environ.items()}
    settings, sources = load_with_sources({}, environ=variables)
    assert settings.centrifugo_api_key is not None
    assert settings.centrifugo_api_key.get_secret_value() == key
    assert sources["centrifugo_api_key"].startswith(source)
    Path("key").write_text("another")
    assert api_key_now(settings) == ("another" if reads else None)
    Path("key").unlink()
    assert api_key_now(settings) is None


def test_an_empty_variable_is_no_value() -> None:
    """As a template leaves it that had nothing to put there."""
    assert load({}, environ={"OUTBOX_RELAY_WORKERS": "", "OUTBOX_RELAY_DATABASE_URL_FILE": ""}).workers == 2


WRONG: dict[str, tuple[dict[str, str], str, str]] = {
    # name: environment, TOML, message
    "not a number": ({"WORKERS": "many"}, "", r"^workers \(OUTBOX_RELAY_WORKERS\): .*integer"),
    "too small": ({"WORKERS": "0"}, "", r"^workers \(OUTBOX_RELAY_WORKERS\): .*greater than or equal to 1"),
    "too large": ({"LANES": "257"}, "", "^lanes .*less than or equal to 256"),
    "not finite": ({"POLL_MAX": "inf"}, "", "^poll_max "),
    "not a number either": ({"MIN_AGE": "nan"}, "", "^min_age "),
    "longer than a database can count": ({"KEEP": "1e12"}, "", "^keep "),
    "for ever": ({"KEEP_DEAD": "inf"}, "", "^keep_dead "),
    "a time-out that Centrifugo cuts": ({"REQUEST_TIMEOUT": "9"}, "", "^request_timeout "),
    "no such choice": ({"LOG_FORMAT": "xml"}, "", "^log_format .*'console' or 'json'"),
    "an empty schema": ({}, 'schema = ""', "^schema "),
    "an unknown key": ({}, "worker = 3", "^there is no setting 'worker'"),
    "an unknown table": ({}, "[relay]\nworkers = 3", "^there is no setting 'relay'"),
    "a wrong type": ({}, "workers = [3]", "^workers .*integer"),
    "no TOML": ({}, f"database_url = {CANARY}", "is not TOML"),
    "a secret of a wrong type": ({}, f'centrifugo_api_key = ["{CANARY}"]', "^centrifugo_api_key "),
    "an unknown key of a type": ({}, "[types.order]\nattempts = 3", r"^there is no setting 'types\.order\.attempts'"),
    "bundles in a map": (
        {},
        '[namespaces.m]\nchannels = "map"\nbundle_events = 2',
        r"^namespaces\.m .*take no bundles",
    ),
    "a wrong value of a type": ({}, "[types.order]\nmax_attempts = 0", r"^types\.order\.max_attempts "),
    "a file and a value": (
        {"DATABASE_URL": CANARY, "DATABASE_URL_FILE": "x"},
        "",
        "^both OUTBOX_RELAY_DATABASE_URL and OUTBOX_RELAY_DATABASE_URL_FILE are set",
    ),
    "a file and a key, both in the environment": (
        {"CENTRIFUGO_API_KEY": CANARY, "CENTRIFUGO_API_KEY_FILE": "x"},
        "",
        "^both OUTBOX_RELAY_CENTRIFUGO_API_KEY and OUTBOX_RELAY_CENTRIFUGO_API_KEY_FILE are set",
    ),
    "a file and a key, both in the settings file": (
        {},
        f'centrifugo_api_key = "{CANARY}"\ncentrifugo_api_key_file = "x"',
        "^both centrifugo_api_key and centrifugo_api_key_file are set",
    ),
    "a key file of a wrong type": ({}, "centrifugo_api_key_file = 3", "^centrifugo_api_key_file .*string"),
    "no such secret file": (
        {"CENTRIFUGO_API_KEY_FILE": "/does/not/exist"},
        "",
        "^the file that OUTBOX_RELAY_CENTRIFUGO_API_KEY_FILE names cannot be read: No such file",
    ),
    "an empty secret file": ({"CENTRIFUGO_API_KEY_FILE": "/dev/null"}, "", "names is empty"),
    "no such settings file": ({"CONFIG": "/does/not/exist"}, "", "^/does/not/exist cannot be read: No such file"),
}


@pytest.mark.parametrize(("environ", "toml", "says"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_setting_is_named_in_one_line(tmp_path: Path, environ: dict[str, str], toml: str, says: str) -> None:
    """Which one and why; never its value, which may be a secret."""
    file = tmp_path / "outbox-relay.toml"
    file.write_text(toml, encoding="utf-8")
    with pytest.raises(ConfigError, match=says) as caught:
        load(
            {}, environ={f"OUTBOX_RELAY_{name}": value for name, value in environ.items()}, file=file if toml else None
        )
    assert "\n" not in str(caught.value)
    assert CANARY not in str(caught.value)


def test_what_is_not_set_is_the_relays_own_default() -> None:
    """An application that runs a relay by itself gets the documented values, too."""
    assert replace(options(load({}, environ={})), frozen_after=Options().frozen_after) == Options()


def test_a_missing_setting_says_where_it_may_be_set() -> None:
    """All three places."""
    with pytest.raises(ConfigError, match=r"set OUTBOX_RELAY_DATABASE_URL or \S+_FILE, or database_url in outbox-"):
        need(load({}, environ={}), "database_url")


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{CANARY}@host/db",
        f"postgresql+psycopg://user:{CANARY}@host:5432/db?sslmode=require",
        f"postgresql://host/db?user=me&password={CANARY}",
        f"host=h password={CANARY} user=u",
        f"host=h password='{CANARY}'",
        f"host=h password = '{CANARY}'",
        f"postgresql://user:{CANARY}@[bad",
    ],
)
def test_the_password_of_every_kind_of_url_is_a_secret(url: str) -> None:
    """Whatever is written anywhere is searched for it."""
    settings = load({"database_url": url, "centrifugo_api_key": "the-key"}, environ={})
    assert CANARY in settings.secrets()
    assert "the-key" in settings.secrets()
    assert CANARY not in repr(settings)
    assert "the-key" not in repr(settings)


def test_an_encoded_password_is_a_secret_in_both_forms() -> None:
    """As it is written and as the server's messages may have it."""
    secrets = load({"database_url": "postgresql://user:p%40ss%2Fw@host/db"}, environ={}).secrets()
    assert {"p%40ss%2Fw", "p@ss/w"} <= set(secrets)
