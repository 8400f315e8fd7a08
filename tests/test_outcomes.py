"""Every row of the tables in docs/outcomes.md: what becomes of an event, its aggregate and the relay.

The tables are the parameters: a row that is not true fails, and so does one that nothing here can provoke.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import DEFAULT_CONFIG, Centrifugo
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from tests.conftest import Connect
from tests.support.authority import Certificate, centrifugo_with
from tests.support.gateway import Command, Exchange, Fault, Gateway, drip, refuse
from tests.support.oracle import violations
from tests.support.stepping import Stepper
from tests.support.subscriber import Subscriber
from tests.support.tables import Row, split, table
from tests.support.writing import fact, write

Subscribe = Callable[..., Subscriber]

DOCUMENT = "outcomes.md"
TIMEOUT = 3.0
SHORT = 0.25
"""For requests that have to meet it."""
NOT_BY_ITSELF = Options(policy=Policy(backoff_base=3600.0, backoff_max=3600.0))
"""No hold is due before the test says so."""


class Result(NamedTuple):
    """What the tables say of an event and of the relay."""

    event: str
    attempts: str
    relay: str


def expected(row: Row) -> Result:
    return Result(row["Event"], row["Attempts"], row.get("Relay", "goes on"))


def result(steps: Stepper, aggregate_id: str) -> Result:
    """What has become of an order's first event. Its aggregate is on hold exactly while that is parked."""
    state = steps.states(aggregate_id)[0]
    holds = [hold for hold in steps.holds if hold.aggregate_id == aggregate_id]
    assert bool(holds) == (state == "parked")
    attempts = str(holds[0].attempts) if holds else "0" if state == "pending" else ""
    return Result(state, attempts, "pauses" if steps.pauses else "goes on")


def names(*columns: str) -> Callable[[Row], str]:
    return lambda row: "; ".join(row[column] for column in columns)


# A request that fails whole


@dataclass(frozen=True)
class Stage:
    """What a provocation may use."""

    centrifugo: Centrifugo
    gateway: Gateway
    start_centrifugo: Callable[..., Centrifugo]
    binary: Path
    folder: Path


Provocation = Callable[[Stage], AbstractContextManager[Publisher]]


def publisher(url: str, key: str = "key", timeout: float = TIMEOUT) -> Publisher:
    return Publisher(url, key, timeout=timeout)


@contextmanager
def a_listener_that_accepts_nobody(stage: Stage) -> Iterator[Publisher]:
    """Its queue is full, so that the kernel lets the next one knock in vain."""
    with ExitStack() as stack:
        listener = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0), backlog=0)))
        for _ in range(3):
            waiting = stack.enter_context(closing(socket.socket()))
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield publisher(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=SHORT)


@contextmanager
def a_frozen_server(stage: Stage) -> Iterator[Publisher]:
    server = stage.start_centrifugo()
    server.pause()
    yield publisher(server.api_url, server.api_key, SHORT)
    server.resume()


@contextmanager
def a_killed_server(stage: Stage) -> Iterator[Publisher]:
    server = stage.start_centrifugo()
    server.kill()
    yield publisher(server.api_url, server.api_key)


@contextmanager
def no_such_name(stage: Stage) -> Iterator[Publisher]:
    yield publisher("http://no-such-host.invalid")


@contextmanager
def a_wrong_key(stage: Stage) -> Iterator[Publisher]:
    yield publisher(stage.centrifugo.api_url, "wrong")


@contextmanager
def the_port_of_clients(stage: Stage) -> Iterator[Publisher]:
    yield publisher(f"http://127.0.0.1:{stage.centrifugo.ports[0]}/api", stage.centrifugo.api_key)


@contextmanager
def https_to_a_plain_port(stage: Stage) -> Iterator[Publisher]:
    yield publisher(stage.centrifugo.api_url.replace("http://", "https://"), stage.centrifugo.api_key)


@contextmanager
def http_to_a_tls_port(stage: Stage) -> Iterator[Publisher]:
    with tls_server(stage) as address:
        yield publisher(f"http://{address}")


@contextmanager
def an_unsigned_certificate(stage: Stage) -> Iterator[Publisher]:
    with tls_server(stage) as address:
        yield publisher(f"https://{address}")


@contextmanager
def tls_server(stage: Stage) -> Iterator[str]:
    """A Centrifugo whose only port speaks TLS, and its address."""
    pem = Path(__file__).with_name("support") / "localhost.pem"
    with centrifugo_with(Certificate(pem, pem), stage.binary, stage.folder) as address:
        yield address


def stand_in(fault: Fault, timeout: float = TIMEOUT) -> Provocation:
    """A stand-in, because no Centrifugo answers this on demand."""

    @contextmanager
    def provoke(stage: Stage) -> Iterator[Publisher]:
        stage.gateway.fault = fault
        yield publisher(stage.gateway.url, timeout=timeout)

    return provoke


def answer(status: int, body: bytes = b"", **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda exchange: exchange.answer(status, body, named)


def elsewhere(status: int) -> Provocation:
    """A redirect to a server that would take the request, and must hear nothing."""

    @contextmanager
    def provoke(stage: Stage) -> Iterator[Publisher]:
        with Gateway(stage.centrifugo.api_url) as other:
            stage.gateway.fault = answer(status, Location=f"{other.url}/api/batch")
            yield publisher(stage.gateway.url, stage.centrifugo.api_key)
            assert other.requests == []

    return provoke


def cut_short(exchange: Exchange) -> None:
    exchange.answer(200, b'{"replies":', {"Content-Length": "100"})
    exchange.hang_up()


def no_http(exchange: Exchange) -> None:
    exchange.write(b"SSH-2.0-OpenSSH_9.2\r\n")
    exchange.hang_up()


def replies(reply: str, more: int = 0) -> Fault:
    """As many replies as there are commands, and some more or less."""
    return lambda exchange: exchange.answer(
        200, b'{"replies":[%b]}' % ",".join([reply] * (len(exchange.commands) + more)).encode()
    )


PROVOCATIONS: Mapping[str, Provocation] = {
    "connecting takes too long": a_listener_that_accepts_nobody,
    "no answer in time": a_frozen_server,
    "an answer drop by drop": stand_in(drip, SHORT),
    "nobody listens": a_killed_server,
    "the name does not resolve": no_such_name,
    "reset after the request was sent": stand_in(Exchange.reset),
    "closed after the request was sent": stand_in(Exchange.hang_up),
    "http:// to a TLS port": http_to_a_tls_port,
    "https:// to a plain port": https_to_a_plain_port,
    "a certificate that nobody has signed": an_unsigned_certificate,
    "401": a_wrong_key,
    "404": the_port_of_clients,
    "429 with Retry-After: 7": stand_in(answer(429, Retry_After="7")),
    "429 with Retry-After: 86400": stand_in(answer(429, Retry_After="86400")),
    "429 with a date in Retry-After": stand_in(answer(429, Retry_After="Fri, 31 Dec 2100 23:59:59 GMT")),
    "no HTTP": stand_in(no_http),
    "not JSON": stand_in(answer(200, b"<html>welcome</html>")),
    "compressed": stand_in(answer(200, b"\x1f\x8b\x08\x00", Content_Encoding="gzip")),
    "JSON, but no batch reply": stand_in(answer(200, b"[1]")),
    "an error for the whole batch": stand_in(answer(200, b'{"error":{"code":100,"message":"internal"}}')),
    "cut short": stand_in(cut_short),
    "too few replies": stand_in(replies('{"publish":{}}', -1)),
    "too many replies": stand_in(replies('{"publish":{}}', 1)),
    "replies to other commands": stand_in(replies('{"history":{}}')),
    "a reply without end": stand_in(answer(200, b" " * 10_000_000)),
}
REDIRECTS = range(300, 400)


def provocation(what: str) -> Provocation:
    if what in PROVOCATIONS:
        return PROVOCATIONS[what]
    assert re.fullmatch(r"\d{3}", what), f"nothing here provokes {what!r}"
    return elsewhere(int(what)) if int(what) in REDIRECTS else stand_in(answer(int(what)))


def whole_requests() -> list[Row]:
    rows = table(DOCUMENT, "A request that fails whole")
    lists = [row for row in rows if re.fullmatch(r"\d{3}(, \d{3})*", row["What happens"])]
    return [row for row in rows if row not in lists] + split(lists, "What happens")


@pytest.mark.parametrize("row", whole_requests(), ids=names("What happens"))
def test_a_request_that_fails_whole(
    row: Row,
    connect: Connect,
    database_url: str,
    centrifugo: Centrifugo,
    gateway: Gateway,
    start_centrifugo: Callable[..., Centrifugo],
    centrifugo_binary: Path,
    tmp_path: Path,
    subscribe: Subscribe,
    channel: str,
) -> None:
    """Hazards 32, 33 and 41. Four batches fail; nothing is held against anybody. Then Centrifugo answers, and
    everything arrives in order."""
    subscriber = subscribe(channel)
    connection = connect()
    committed = [write(connection, name, version, channel) for name, version in (("1", 1), ("2", 1), ("1", 2))]
    stage = Stage(centrifugo, gateway, start_centrifugo, centrifugo_binary, tmp_path)
    with provocation(row["What happens"])(stage) as publisher, Stepper(database_url, publisher) as steps:
        for _ in range(4):
            steps.step()
        outages = steps.journal.outages
        assert len(outages) == len(steps.journal.requests) >= 4
        assert {outage.reason for outage in outages if row["The relay says"] not in outage.reason} == set()
        assert steps.journal.longest < publisher.timeout + 0.5
        relay, _, seconds = row["Relay"].partition(" for ")
        assert result(steps, "1") == expected(row)._replace(relay=relay)
        assert steps.states("1") + steps.states("2") == ["pending"] * 3
        asked = float(seconds.removesuffix(" s") or 0)
        assert max(0.0, asked - 1) < steps.pause_left <= max(asked, Options().pause_max)

        steps.connect_to(Publisher(centrifugo.api_url, centrifugo.api_key))
        steps.drain()
        assert steps.states("1") + steps.states("2") == ["delivered"] * 3
        assert (steps.pauses, steps.holds) == (False, [])
    assert violations(committed, map(fact, subscriber.wait_for(3))) == []


# A command that is refused


@pytest.fixture(scope="module")
def particular(centrifugo_binary: Path) -> Iterator[Centrifugo]:
    """A Centrifugo with a namespace that takes only JSON objects: it refuses single events, with 107."""
    namespaces = [
        *DEFAULT_CONFIG["channel"]["namespaces"],
        {"name": "objects", "publication_data_format": "json_object"},
    ]
    with Centrifugo(centrifugo_binary, config={"channel": {"namespaces": namespaces}}) as server:
        yield server


@pytest.fixture
def window(particular: Centrifugo) -> Iterator[Gateway]:
    with Gateway(particular.api_url) as gateway:
        yield gateway


def the_guilty(command: Command) -> bool:
    return (command.aggregate[1], command.version) == ("guilty", 1) and command.kind != "gap"


@pytest.mark.parametrize(
    "row",
    split(table(DOCUMENT, "A command that is refused"), "Code"),
    ids=names("Code", "Refused by", "Others accepted"),
)
def test_a_command_that_is_refused(
    row: Row, connect: Connect, database_url: str, particular: Centrifugo, window: Gateway
) -> None:
    """Hazards 28 and 29. The event is refused whenever it is sent, its successor would be accepted: it is sent
    only once the first one has ended. Real refusals: an undefined namespace, and data that is no object."""
    connection = connect()
    real = row["Refused by"] == "Centrifugo"
    namespace = "unknown" if real and row["Code"] == "102" else "objects"
    if not real:
        window.fault = refuse(int(row["Code"]), the_guilty)
    others = row["Others accepted"]
    with Stepper(database_url, Publisher(window.url, particular.api_key), NOT_BY_ITSELF) as steps:
        write(connection, "guilty", 1, f"{namespace}:guilty", "1" if real else "{}")
        write(connection, "guilty", 2, "objects:guilty")
        if others == "in the same request":
            write(connection, "neighbour", 1, "objects:neighbour")
        if others.startswith("later"):
            write(connection, "company", 1, "plain:company")  # else 100 is an outage
        steps.step()
        if others.startswith("later"):
            write(connection, "neighbour", 1, "objects:neighbour" if others.endswith("its namespace") else "hist:other")
            steps.step()
        for _ in range(1 if others.startswith("later") else 3):
            steps.make_due()
            steps.step()
        if row["Event"] == "dead":
            steps.drain()
        assert steps.states("guilty") == [row["Event"], "delivered" if row["Event"] == "dead" else row["Event"]]
        assert result(steps, "guilty") == expected(row)
        if others != "nothing":
            assert steps.states("neighbour") == ["delivered"]
    sent = [c.version for c in window.commands if c.aggregate[1] == "guilty" and c.kind != "gap"]
    assert len(sent) >= 2
    assert [c.version for c in window.commands if c.kind == "gap"] == ([1] if row["Event"] == "dead" else [])
    assert set(sent[:-1]) == {1}
    assert sent[-1] == (2 if row["Event"] == "dead" else 1)


@pytest.mark.parametrize(
    "row", table(DOCUMENT, "An event of several channels"), ids=names("Accepted by", "Refused by", "Others accepted")
)
def test_an_event_of_several_channels(
    row: Row, connect: Connect, database_url: str, particular: Centrifugo, window: Gateway
) -> None:
    """Centrifugo's own answers, one per channel: an undefined namespace, and data that is no object."""
    connection = connect()
    accepted = row["Accepted by"].split(", ")
    refused = dict(re.findall(r"(\S+) \((\d+)\)", row["Refused by"]))
    with Stepper(database_url, Publisher(window.url, particular.api_key), NOT_BY_ITSELF) as steps:
        write(connection, "guilty", 1, [*refused, *accepted], "1")
        steps.step()
        if row["Others accepted"] != "nothing":
            namespace = row["Others accepted"].rpartition(" ")[2]
            write(connection, "neighbour", 1, f"{namespace}:neighbour")
            steps.step()
        steps.make_due()
        steps.step()
        if row["Event"] == "dead":
            steps.drain()
            assert [command.channels for command in window.commands if command.kind == "gap"] == [tuple(refused)]
        assert result(steps, "guilty") == expected(row)
        [(kept, error)] = connection.execute("SELECT accepted, error FROM outbox WHERE aggregate_id = 'guilty'")
        assert kept == (accepted if refused else None)
        assert all(code in error for code in [*refused.values()][:1])
        before = len(window.commands)
        steps.make_due()
        steps.step()
        assert [", ".join(command.channels) for command in window.commands[before:]] == (
            [row["Sent again to"]] if row["Sent again to"] else []
        )


def test_a_first_refusal_never_counts(
    connect: Connect, database_url: str, particular: Centrifugo, window: Gateway
) -> None:
    """Also that of the event which heads the hold since the one before it ended: a neighbour that is accepted in the
    same request is no evidence."""
    connection = connect()
    with Stepper(database_url, Publisher(window.url, particular.api_key), NOT_BY_ITSELF) as steps:
        for version in (1, 2):
            write(connection, "guilty", version, "objects:guilty", "1")
        steps.step()
        write(connection, "neighbour", 1, "objects:neighbour")
        steps.step()
        steps.make_due()
        steps.step()
        steps.step()
        assert steps.states("guilty") == ["dead", "parked"]
        write(connection, "neighbour", 2, "objects:neighbour")
        steps.step()
        sent = [(command.version, command.kind) for command in window.commands if command.aggregate[1] == "guilty"]
        assert sent == [(1, "change"), (1, "change"), (1, "gap"), (2, "change")]
        assert steps.states("guilty") == ["dead", "parked"]


# An event that makes every request with it fail

WHOLE: Mapping[str, Fault] = {
    "a reset": Exchange.reset,
    "a hang": Exchange.wait_for_client_to_leave,
}


@pytest.mark.parametrize(
    "row",
    split(table(DOCUMENT, "An event that makes every request with it fail"), "Whenever it is in a request"),
    ids=names("Whenever it is in a request", "Others accepted", "Event"),
)
def test_an_event_that_makes_every_request_with_it_fail(
    row: Row, connect: Connect, database_url: str, centrifugo: Centrifugo, gateway: Gateway, channel: str
) -> None:
    """Hazards 30 and 34. A stand-in for a proxy that dislikes one payload; it forwards everything else."""
    connection = connect()
    kind = row["Whenever it is in a request"]
    fault = WHOLE.get(kind) or answer(int(kind))

    def dislike(exchange: Exchange) -> None:
        if any(map(the_guilty, exchange.commands)):
            fault(exchange)
        else:
            exchange.answer(*exchange.forward())

    gateway.fault = dislike
    others = row["Others accepted"]
    fellows = 0 if others == "nothing" else 20
    # Others have to be answered meanwhile, on a machine that may be busy.
    timeout = 0.5 if kind == "a hang" else TIMEOUT
    with Stepper(database_url, publisher(gateway.url, centrifugo.api_key, timeout), NOT_BY_ITSELF) as steps:
        for version in (1, 2):
            for name in ("guilty", *map(str, range(fellows))):
                write(connection, name, version, channel)
        if fellows:
            steps.drain()
        else:
            for _ in range(4):
                steps.step()
        every = others.startswith("after every refusal")
        for round_ in range(10 if every else 1 if others == "after its refusal" else 0):
            if round_ == 9 and others.endswith("for 900 s"):
                steps.age(900.0)
            write(connection, "0", 3 + round_, channel)
            steps.make_due()
            steps.step()
        if row["Event"] == "dead":
            steps.drain()
            assert steps.states("guilty") == ["dead", "delivered"]
        assert result(steps, "guilty") == expected(row)
        for name in map(str, range(fellows)):
            assert set(steps.states(name)) == {"delivered"}
    sent = [c.version for c in gateway.commands if c.aggregate[1] == "guilty" and c.kind != "gap"]
    assert set(sent) == ({1, 2} if row["Event"] == "dead" else {1})
    assert sent == sorted(sent)
