"""One batch after another: what a request that fails means for the rest of its batch, and when the next one comes."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace

import pytest

from outbox_relay import runner
from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.event import Event, Refusal, Reply
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from outbox_relay.packing import Limits
from outbox_relay.relay import Sent
from outbox_relay.runner import Ended, Relay
from outbox_relay.store import Store
from tests.conftest import Connect
from tests.support.gateway import Exchange, Gateway, refuse
from tests.support.relays import drain
from tests.support.stepping import Hold, Journal, Stepper
from tests.support.writing import neighbours, states, write

PATIENT = Policy(backoff_base=3600.0, backoff_max=3600.0)
ONE_BY_ONE = Options(limits=Limits(events=1), policy=PATIENT)


@pytest.fixture
def publisher(gateway: Gateway, centrifugo: Centrifugo) -> Publisher:
    """Through a window that may make it fail; it never tries what is faster."""
    return Publisher(gateway.url, centrifugo.api_key, parallel=True)


@pytest.mark.parametrize(("code", "sound"), [(-1, False), (0, False), (100, False), (102, True)])
def test_a_refusal_for_the_events_own_sake_shows_that_centrifugo_works(code: int, sound: bool) -> None:
    """A request that failed whole does not, nor does an internal error."""
    event = Event(1, "e", "order", "1", 0, 1, "change", ["a"], "{}", None, None, 0.0)
    assert Sent(refused=[(event, Reply((Refusal("a", code, "no"),)))]).sound is sound


def test_a_request_that_fails_ends_its_batch(
    connect: Connect, database_url: str, gateway: Gateway, publisher: Publisher
) -> None:
    """What was accepted before is settled, the rest is not even tried, and the relay pauses."""
    connection = connect()
    for name in "123":
        write(connection, name, 1, "plain:a")

    def once(exchange: Exchange) -> None:
        exchange.answer(*(exchange.forward() if len(gateway.requests) == 1 else (503, b"")))

    gateway.fault = once
    with Stepper(database_url, publisher, ONE_BY_ONE) as steps:
        assert steps.step()
        assert steps.pauses
        assert steps.journal.requests == [1, 1]
    assert states(connection) == {"delivered": 1, "pending": 2}


def test_a_batch_starts_no_request_when_its_time_is_over(
    connect: Connect, database_url: str, publisher: Publisher
) -> None:
    """But always one. What was sent is settled, and the rest waits for the next batch: no lane is locked for longer."""
    connection = connect()
    for name in "123":
        write(connection, name, 1, "plain:a")
    with Stepper(database_url, publisher, replace(ONE_BY_ONE, batch_time=0.0)) as steps:
        for delivered in (1, 2, 3):
            assert steps.step()
            assert states(connection)["delivered"] == delivered
        assert steps.journal.requests == [1, 1, 1]


def test_suspects_that_fail_while_others_pass_stop_nobody(
    connect: Connect, database_url: str, gateway: Gateway, publisher: Publisher
) -> None:
    """The other half of them is tried in the same batch."""
    connection = connect()
    guilty, *fellows, other = neighbours(connection, 5)

    def dislike(exchange: Exchange) -> None:
        bad = any(command.aggregate[1] == guilty for command in exchange.commands)
        exchange.answer(*((400, b"") if bad else exchange.forward()))

    gateway.fault = dislike
    with Stepper(database_url, publisher, Options(policy=PATIENT)) as steps:
        for name in (guilty, *fellows):
            write(connection, name, 1, "plain:a")
        steps.step()
        write(connection, other, 1, "plain:a")
        steps.step()
        assert steps.journal.requests == [4, 1, 2, 2]
    assert states(connection) == {"pending": 2, "delivered": 3}


def test_nothing_follows_an_event_that_another_worker_found_to_be_bad_meanwhile(
    connect: Connect, database_url: str, gateway: Gateway, publisher: Publisher
) -> None:
    """That one's session was ended with its request on the way, and the lane is ours. Here the event was free."""
    connection = connect()
    for version in (1, 2):
        write(connection, "1", version, "plain:a")
    with Stepper(database_url, publisher, ONE_BY_ONE) as steps:

        def meanwhile(exchange: Exchange) -> None:
            [(first,)] = connection.execute("SELECT min(id) FROM outbox").fetchall()
            event = Event(first, "e", "order", "1", 0, 1, "change", ["plain:a"], "{}", None, None, 0.0)
            steps._shared.suspects.failed([event], 1.0, accepted_at=0.0)
            steps._shared.accepted_at["plain"] = 2.0
            exchange.answer(*((400, b"") if len(gateway.requests) == 1 else exchange.forward()))

        gateway.fault = meanwhile
        steps.step()
        assert steps.journal.requests == [1]
    assert states(connection) == {"parked": 1, "pending": 1}


@pytest.mark.parametrize(("code", "over"), [(102, True), (100, False)])
def test_an_answer_for_an_events_own_sake_ends_a_pause(
    connect: Connect, database_url: str, gateway: Gateway, publisher: Publisher, code: int, over: bool
) -> None:
    """Centrifugo works where it refuses for a reason. An internal error is none."""
    connection = connect()
    gateway.fault = lambda exchange: exchange.answer(503, b"")
    with Stepper(database_url, publisher, Options(policy=PATIENT)) as steps:
        write(connection, "1", 1, "plain:a")
        steps.step()
        assert steps.pauses
        gateway.fault = refuse(code, lambda _command: True)
        steps.step()
        assert steps.pauses is not over


def test_one_channel_that_accepts_shows_that_centrifugo_works(
    connect: Connect, database_url: str, gateway: Gateway, publisher: Publisher
) -> None:
    """The internal error of an event's other channel is then no outage: the event waits alone."""

    def half(exchange: Exchange) -> None:
        status, body = exchange.forward()
        answer = json.loads(body)
        [reply] = answer["replies"]
        reply["broadcast"]["responses"][1] = {"error": {"code": 100, "message": "internal server error"}}
        exchange.answer(status, json.dumps(answer).encode())

    connection = connect()
    gateway.fault = half
    with Stepper(database_url, publisher, Options(policy=PATIENT)) as steps:
        write(connection, "1", 1, ["plain:a", "plain:b"])
        steps.step()
        assert not steps.pauses
        assert steps.holds == [Hold("1", 1, attempts=0)]


def test_evidence_is_what_came_after_the_last_refusal(
    connect: Connect, database_url: str, gateway: Gateway, publisher: Publisher
) -> None:
    """What was accepted after an earlier one has counted already."""
    connection = connect()
    gateway.fault = refuse(102, lambda command: command.aggregate[1] == "bad")
    with Stepper(database_url, publisher, Options(policy=PATIENT)) as steps:
        write(connection, "bad", 1, "plain:a")
        steps.step()
        write(connection, "good", 1, "plain:a")
        steps.step()
        for tries in (2, 3, 4):
            steps.make_due()
            steps.step()
            assert steps.holds == [Hold("bad", tries, attempts=1)]


def test_parking_is_work(connect: Connect, database_url: str, gateway: Gateway, publisher: Publisher) -> None:
    """A batch that brings nothing but what waits behind a hold: there may be more, so the next one comes at once."""
    connection = connect()
    gateway.fault = refuse(102, lambda command: command.aggregate[1] == "held")
    with Stepper(database_url, publisher, Options(policy=PATIENT)) as steps:
        write(connection, "held", 1, "plain:a")
        steps.step()
        write(connection, "held", 2, "plain:a")
        assert steps.step()
        assert steps.states("held") == ["parked", "parked"]
        assert not steps.step()


def test_what_crowds_a_lane_is_parked_at_once(
    connect: Connect, database_url: str, gateway: Gateway, publisher: Publisher
) -> None:
    """Not only the one event that the batch may read; what is on hold, and nothing else of the lane."""
    connection = connect()
    held, free = neighbours(connection, 2)
    gateway.fault = refuse(102, lambda command: command.aggregate[1] == held)
    with Stepper(database_url, publisher, Options(events_per_lane=1, lanes=1, policy=PATIENT)) as steps:
        write(connection, held, 1, "plain:a")
        steps.step()
        for version in range(2, 6):
            write(connection, held, version, "plain:a")
        write(connection, free, 1, "plain:a")
        steps.step()
        assert steps.states(held) == ["parked"] * 5
        assert steps.states(free) == ["pending"]


def test_what_expires_on_hold_keeps_the_reason_why_it_was(
    connect: Connect, database_url: str, gateway: Gateway, publisher: Publisher
) -> None:
    connection = connect()
    gateway.fault = refuse(102, lambda _: True)
    with Stepper(database_url, publisher, Options(policy=replace(PATIENT, gap=False))) as steps:
        write(connection, "1", 1, "plain:a")
        steps.step()
        [(reason,)] = connection.execute("SELECT error FROM outbox").fetchall()
        assert "102" in reason
        connection.execute("UPDATE outbox SET expires_at = clock_timestamp()")
        steps.make_due()
        steps.step()
    assert connection.execute("SELECT state::text, error FROM outbox").fetchall() == [("expired", reason)]


def test_nothing_of_a_lane_that_others_have_is_parked(
    connect: Connect, database_url: str, gateway: Gateway, publisher: Publisher
) -> None:
    """Where another lane is crowded with what is on hold: the fence of an event is its own lane."""
    connection = connect()
    gateway.fault = refuse(102, lambda _: True)
    [(held, _), (elsewhere, lane)] = connection.execute(
        "SELECT DISTINCT ON (lane) n::text, lane FROM ("
        "SELECT n, hashtextextended('order/' || n, 0) & 255 AS lane FROM generate_series(1, 20) n) AS x LIMIT 2"
    ).fetchall()
    with Stepper(database_url, publisher, Options(events_per_lane=1, lanes=1, policy=PATIENT)) as steps:
        for name in (held, elsewhere):
            write(connection, name, 1, "plain:a")
            steps.step()
        assert [steps.states(name) for name in (held, elsewhere)] == [["parked"]] * 2
        for version in range(2, 6):
            write(connection, held, version, "plain:a")
            write(connection, elsewhere, version, "plain:a")
        with connect(autocommit=False) as other:
            other.execute("SELECT FROM outbox_lane WHERE lane = %s FOR UPDATE", (lane,))
            steps.step()
            assert steps.states(held) == ["parked"] * 5
            assert steps.states(elsewhere) == ["parked"] + ["pending"] * 4


def test_the_next_head_starts_anew(connect: Connect, database_url: str, gateway: Gateway, publisher: Publisher) -> None:
    """Nothing of what its predecessor met counts for it, and nothing of that is shown."""
    connection = connect()
    gateway.fault = refuse(102, lambda command: command.version == 1)
    with Stepper(database_url, publisher, Options(events_per_lane=1, lanes=1, policy=PATIENT)) as steps:
        for version in (1, 2, 3):
            write(connection, "1", version, "plain:a")
        for _ in range(3):
            steps.step()
        assert steps.states("1") == ["parked"] * 3
        connection.execute("UPDATE outbox_hold SET alone = true")
        gateway.fault = None
        steps.make_due()
        steps.step()
        assert steps.states("1") == ["delivered", "parked", "parked"]
    [hold] = connection.execute(
        "SELECT o.version, tries, attempts, alone, h.error, due_at <= clock_timestamp(), "
        "first_refused_at > first.settled_at, refused_at > first.settled_at "
        "FROM outbox_hold AS h JOIN outbox AS o ON o.id = head_id JOIN outbox AS first ON first.version = 1"
    ).fetchall()
    assert hold == (2, 0, 0, False, None, True, True, True)


def test_while_there_is_work_nobody_rests(connect: Connect, database_url: str, centrifugo: Centrifugo) -> None:
    """Ten batches of one event each, where a rest would take an hour."""
    connection = connect()
    for name in neighbours(connection, 10):
        write(connection, name, 1, "plain:a")
    options = Options(workers=1, lanes=1, events_per_lane=1, poll_min=3600.0, poll_max=3600.0)
    journal = Journal()

    def open_store() -> Store:
        return Store(database_url, wake_up=False)

    drain(Relay(open_store, lambda: Publisher(centrifugo.api_url, centrifugo.api_key), options, journal))
    assert states(connection) == {"delivered": 10}
    assert journal.requests == [1] * 10


def test_a_batch_is_filled_to_its_bound(connect: Connect, database_url: str) -> None:
    """To the last byte that it may read; one more is too many."""
    connection = connect()
    for name in neighbours(connection, 3):
        write(connection, name, 1, "plain:a", '"some payload"')
    [(size,)] = connection.execute("SELECT DISTINCT pg_column_size(payload) FROM outbox").fetchall()
    with closing(Store(database_url)) as store, store.batch():
        lanes = store.claim(after=0, lanes=1).lanes
        for bound, read in ((3 * size, 3), (3 * size - 1, 2), (0, 1)):
            assert len(store.read(lanes, events=10, per_lane=10, max_bytes=bound).events) == read


def test_several_due_holds_are_work(connect: Connect, database_url: str) -> None:
    """Where nothing is pending."""
    with closing(Store(database_url)) as store:
        assert not store.anything_to_do()
        connect().execute(
            "INSERT INTO outbox_hold (aggregate_type, aggregate_id, head_id, due_at, tries, attempts, "
            "first_refused_at, refused_at) "
            "SELECT 'order', n, n, now(), 1, 0, now(), now() FROM generate_series(1, 3) n"
        )
        assert store.anything_to_do()


def test_a_database_that_is_away_is_asked_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, publisher: Publisher
) -> None:
    """And it is said once."""
    tries: list[int] = []

    def no_store() -> Store:
        raise DatabaseUnavailableError("it is away")

    def at_once(failures: int, _shortest: float, _longest: float) -> float:
        tries.append(failures)
        if len(tries) == 5:
            lost.stop()
        return 0.0

    monkeypatch.setattr(runner, "backoff", at_once)
    lost = Relay(no_store, lambda: publisher, Options(workers=1))
    assert lost.run() is Ended.STOPPED
    assert tries == [1, 2, 3, 4, 5]
    assert caplog.text.count("database lost") == 1
