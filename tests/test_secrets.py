"""Hazard 49: the API key and the database password never leave the process, whatever goes wrong."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.cli import app
from outbox_relay.embedded._process import free_port
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.store import Store
from tests.conftest import Connect, MakeRelay, StartRelay
from tests.support.gateway import Exchange, Gateway, refuse
from tests.support.monitoring import Site
from tests.support.waiting import wait_until
from tests.support.writing import states, write

KEY = "canary-key-7f3a"
PASSWORD = "canary p@ss/w:rd%"
# As it is, as a URL writes it, and the pieces in which a parser may leave it.
CANARIES = (KEY, PASSWORD, "canary%20p", "canary+p", "canary p", "ss/w:rd", "ss%2Fw")


def leaked(text: str) -> list[str]:
    return [canary for canary in CANARIES if canary in text]


def with_password(database_url: str) -> str:
    # SQLAlchemy leaves a space as it is, which libpq refuses.
    url = sa.make_url(database_url).set(password="PASSWORD").render_as_string(hide_password=False)
    return url.replace("PASSWORD", quote(PASSWORD, safe=""))


BAD_DATABASES = {
    "nobody listens": with_password("postgresql://u@127.0.0.1:1/x"),
    "no such host": with_password("postgresql://u@nowhere.invalid/x"),
    "a port that is none": with_password("postgresql://u@127.0.0.1:1/x").replace(":1/", ":port/"),
    "an unescaped password": f"postgresql://u:{PASSWORD}@127.0.0.1:1/x",
    "an unescaped password with a space in a parameter": f"postgresql://u@127.0.0.1:1/x?password={PASSWORD}",
    "a keyword string": f"host=127.0.0.1 port=1 user=u password='{PASSWORD}'",
    "a keyword string without its last quote": f"host=127.0.0.1 port=1 password='{PASSWORD}",
    "a keyword that is none": f"host=127.0.0.1 pass='{PASSWORD}'",
}


@pytest.mark.parametrize("url", BAD_DATABASES.values(), ids=BAD_DATABASES)
def test_hazard_49_connecting_to_a_bad_database(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Error, traceback and the drivers' own logs, for every way in which a URL is wrong."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(Exception) as error:  # noqa: PT011 - whatever it is, it must not tell
        Store(url)
    assert leaked("".join(traceback.format_exception(error.value)) + repr(error.value) + caplog.text) == []


@pytest.mark.parametrize(
    ("url", "key"),
    [
        (f"http://127.0.0.1:1/api?api_key={KEY}", "k"),
        (f"http://user:{KEY}@127.0.0.1:1/api", "k"),
        (f"{KEY}:8000", "k"),
        ("http://127.0.0.1:1", f"{KEY}\nX-Other: 1"),
        ("http://127.0.0.1:1", f"{KEY}\u2603"),
        ("http://127.0.0.1:1", f"{KEY} "),
    ],
    ids=["in the query", "in the user", "in place of the host", "two headers", "beyond ASCII", "nobody listens"],
)
def test_hazard_49_a_key_in_the_wrong_place_or_form(url: str, key: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is refused is refused without being repeated."""
    caplog.set_level(logging.DEBUG)
    try:
        publisher = Publisher(url, key)
    except ValueError as error:
        said = "".join(traceback.format_exception(error))
    else:
        try:
            said = repr(publisher.probe()) + repr(publisher)
        finally:
            publisher.close()
    assert leaked(said + caplog.text) == []


def test_hazard_49_a_relay_inside_an_application_that_logs_everything(
    connect: Connect,
    database_url: str,
    make_relay: MakeRelay,
    gateway: Gateway,
    channel: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A wrong key, then trouble of every kind with an answer that repeats the key, with all loggers at DEBUG."""
    caplog.set_level(logging.DEBUG)
    write(connect(), "1", 1, channel)
    faults: list[Callable[[Exchange], None]] = [
        lambda exchange: exchange.answer(*exchange.forward()),
        lambda exchange: exchange.answer(500, KEY.encode()),
        lambda exchange: exchange.answer(307, headers={"Location": f"http://127.0.0.1:1/?api_key={KEY}"}),
        lambda exchange: exchange.answer(200, b'{"error":{"code":100,"message":"%b"}}' % KEY.encode()),
        Exchange.reset,
    ]

    def next_fault(exchange: Exchange) -> None:
        faults[(len(gateway.requests) - 1) % len(faults)](exchange)

    gateway.fault = next_fault
    with make_relay(database_url=with_password(database_url), api_url=gateway.url, api_key=KEY):
        gateway.wait_for_requests(2 * len(faults))
    assert "outage" in caplog.text
    ours = [record.getMessage() + str(record.__dict__) for record in caplog.records if record.name == "outbox_relay"]
    assert leaked("".join(ours)) == []
    assert leaked(caplog.text.replace(f"Location', b'http://127.0.0.1:1/?api_key={KEY}", "")) == []


@pytest.mark.parametrize("form", ["console", "json"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"database_url": BAD_DATABASES["nobody listens"]}, "database lost"),
        ({"database_url": BAD_DATABASES["a keyword string without its last quote"]}, "database"),
        ({"schema": "none"}, "database lost"),
        ({}, "outage"),
        ({"centrifugo_api_key": f"{KEY}\u2603"}, ""),
        ({"centrifugo_api_key": KEY, "workers": "many"}, "workers"),
    ],
    ids=["no database", "no database URL", "no tables", "a wrong key", "no key at all", "a wrong setting"],
)
def test_hazard_49_a_process_that_fails(
    settings: dict[str, object],
    said: str,
    form: str,
    connect: Connect,
    database_url: str,
    start_relay: StartRelay,
    channel: str,
) -> None:
    """Everything that `outbox-relay run` writes, tracebacks included, until it has said what is wrong or has ended."""
    write(connect(), "1", 1, channel)
    secrets = {
        "database_url": with_password(database_url),
        "centrifugo_api_key": KEY,
        "log_level": "debug",
        "log_format": form,
    }
    relay = start_relay(secrets | settings, wait=False)
    wait_until(lambda: (said and said in relay.output) or not relay.alive(), "the relay says what is wrong")
    if relay.alive():
        relay.terminate()
    assert said in relay.output
    assert relay.output.strip()
    assert leaked(relay.output) == []


def test_hazard_49_a_refusal_that_repeats_the_secrets(
    connect: Connect, database_url: str, start_relay: StartRelay, gateway: Gateway, channel: str
) -> None:
    """Centrifugo's words are logged, masked: the last line of defence. (A stand-in: the real one is not that rude.)"""
    write(connect(), "1", 1, channel)
    words = json.dumps({"replies": [{"error": {"code": 107, "message": f"bad {KEY} {PASSWORD}"}}]})
    gateway.fault = lambda exchange: exchange.answer(200, words.encode())
    secrets = {"database_url": with_password(database_url), "centrifugo_api_key": KEY}
    relay = start_relay(secrets | {"centrifugo_url": gateway.url}, wait=False)
    relay.wait_for("event refused, its aggregate waits")
    relay.terminate()
    assert "107: bad *** ***" in relay.output
    assert leaked(relay.output) == []


def test_hazard_49_a_relay_at_work(
    connect: Connect, database_url: str, start_relay: StartRelay, centrifugo: Centrifugo, channel: str
) -> None:
    """Nothing is written of key, password or payload when all is well either."""
    relay = start_relay(
        {"database_url": with_password(database_url), "log_level": "debug", "log_format": "console"}, wait=False
    )
    connection = connect()
    write(connection, "1", 1, channel, f'"{KEY}"')
    wait_until(lambda: states(connection) == {"delivered": 1}, "the event is delivered")
    relay.terminate()
    assert leaked(relay.output) == []
    assert centrifugo.api_key not in relay.output


VERBS = [
    "check",
    "check --json",
    "status",
    "migrate",
    "migrate --current",
    "events list",
    "events show 1 --json",
    "dead list",
    "dead requeue 1",
    "prune --yes",
    "epoch show",
    "config show",
    "config show --json",
    "run --until-empty",
]


@pytest.mark.parametrize("verb", VERBS)
def test_hazard_49_every_verb_with_every_bad_database(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever it prints, and whatever Python would print of an error that it lets through."""
    monkeypatch.chdir(tmp_path)
    said = []
    for url in BAD_DATABASES.values() if not verb.startswith("run") else ["", "?"]:
        environment = {
            "OUTBOX_RELAY_DATABASE_URL": url,
            "OUTBOX_RELAY_CENTRIFUGO_URL": f"http://user:{KEY}@127.0.0.1:1" if url == "?" else "http://127.0.0.1:1",
            "OUTBOX_RELAY_CENTRIFUGO_API_KEY": KEY,
        }
        result = CliRunner().invoke(app, verb.split(), env=environment)
        said.append(result.output + "".join(traceback.format_exception(result.exception)))
    assert all(said)
    assert leaked("".join(said)) == []


def test_hazard_49_the_settings_that_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file, in both forms; a message about a wrong setting beside them shows none either."""
    monkeypatch.chdir(tmp_path)
    database = with_password("postgresql://u@127.0.0.1:1/x")
    Path("outbox-relay.toml").write_text(f'database_url = "{database}"\ncentrifugo_api_key = "{KEY}"\n')
    for arguments in ("config show", "config show --json"):
        result = CliRunner().invoke(app, arguments.split())
        assert result.exit_code == 0
        assert "***" in result.output
        assert leaked(result.output) == []
    result = CliRunner().invoke(app, ["config", "show"], env={"OUTBOX_RELAY_WORKERS": KEY})
    assert result.exit_code == 2
    assert leaked(result.output) == []


@pytest.mark.parametrize("form", ["console", "json"])
def test_hazard_49_a_traceback(form: str) -> None:
    """Of an error that nobody foresaw, with a secret in its text, in a field, and in the name of another logger."""
    program = f"""
import logging
from outbox_relay import log
log.configure({form!r}, "debug", [{KEY!r}, {PASSWORD!r}])
try:
    raise RuntimeError("connecting with " + {PASSWORD!r})
except RuntimeError:
    log.get_logger().exception("worker failed", url="http://" + {KEY!r}, nested={{"key": [{KEY!r}]}})
    logging.getLogger("another").warning("says %s", {KEY!r})
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "RuntimeError: connecting with ***" in ended.stderr
    assert leaked(ended.stderr) == []


def test_hazard_49_what_is_stored_of_a_refusal(
    connect: Connect, database_url: str, make_relay: MakeRelay, gateway: Gateway, channel: str
) -> None:
    """A server that repeats the key does not have it written into the outbox, where operators would read it."""
    connection = connect()
    write(connection, "1", 1, channel)
    words = json.dumps({"replies": [{"error": {"code": 107, "message": f"bad {KEY}"}}]})
    gateway.fault = lambda exchange: exchange.answer(200, words.encode())
    with make_relay(api_url=gateway.url, api_key=KEY):
        wait_until(lambda: states(connection) == {"parked": 1}, "the refused event is parked")
    stored = connection.execute("SELECT o.error, h.error FROM outbox AS o, outbox_hold AS h").fetchone()
    assert stored is not None
    assert all("bad ***" in error for error in stored)
    assert leaked(str(stored)) == []


def test_hazard_49_metrics_and_health(
    connect: Connect, database_url: str, start_relay: StartRelay, gateway: Gateway, channel: str
) -> None:
    """Neither secrets nor anything of an event, while all is well, in an outage and with a refused event."""
    connection = connect()
    port = free_port()
    secrets = {"database_url": with_password(database_url), "metrics_port": port, "centrifugo_url": gateway.url}
    relay = start_relay(secrets)
    site = Site(port)
    said = []
    for number, fault in enumerate((None, refuse(102, lambda _: True), lambda exchange: exchange.answer(503))):
        gateway.fault = fault
        write(connection, f"{KEY}-{number}", 1, channel, json.dumps(KEY))
        gateway.wait_for_requests(len(gateway.requests) + 1)
        wait_until(lambda: relay.alive() and site.get("/metrics")[0] == 200, "the metrics are served")
        said += [site.get(path)[1] for path in ("/metrics", "/live", "/ready", f"/{KEY}")]
    assert "outbox_relay_events_total" in said[0]
    assert leaked("".join(said)) == []
    assert channel not in "".join(said)
    assert "order" not in "".join(said)
