"""The operator's functions on a real PostgreSQL, with relays and a real Centrifugo at work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay import operator as operator_room
from outbox_relay.database import DatabaseUnavailableError
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.operator import EventRow, Filter, Operator, OperatorError
from outbox_relay.options import Options
from outbox_relay.outcome import Policy
from outbox_relay.runner import Ended
from tests.conftest import Connect, MakeRelay, RunRelay
from tests.support.gateway import Command, Gateway, refuse
from tests.support.subscriber import Subscriber
from tests.support.waiting import in_background, wait_until
from tests.support.writing import LANE, Connection, backend_waits, fact, states, write

Subscribe = Callable[..., Subscriber]
ORDER = ("order", "1")


@pytest.fixture
def operator(database_url: str) -> Operator:
    return Operator(database_url)


@pytest.fixture
def gateway(centrifugo: Centrifugo) -> Iterator[Gateway]:
    with Gateway(centrifugo.api_url) as gateway:
        yield gateway


def add(
    connection: Connection,
    version: int,
    state: str = "pending",
    *,
    aggregate: str = "1",
    ended: str | None = None,
    **columns: Any,
) -> int:
    """Insert an event of an order as it is after some time, and return its id. `ended` is an interval ago."""
    values = {
        "aggregate_type": "order",
        "aggregate_id": aggregate,
        "version": version,
        "channels": ["plain:a"],
        "payload": "{}",
        "error": "refused" if state == "dead" else None,
    } | columns
    row = connection.execute(
        f"INSERT INTO outbox (state, settled_at, {', '.join(values)}) "
        f"VALUES (%s, now() - %s::interval, {', '.join(['%s'] * len(values))}) RETURNING id",
        (state, ended or ("0" if state not in {"pending", "parked"} else None), *values.values()),
    ).fetchone()
    assert row is not None
    id_: int = row[0]
    return id_


def hold(connection: Connection, head: int, due: str = "1 hour", *, tries: int = 5, aggregate: str = "1") -> None:
    """Let an order wait for `due`, an interval or infinity."""
    connection.execute(
        "INSERT INTO outbox_hold (aggregate_type, aggregate_id, head_id, due_at, tries, attempts, alone, "
        "                         first_refused_at, refused_at, error) "
        "SELECT aggregate_type, aggregate_id, id, "
        "       CASE WHEN %(due)s = 'infinity' THEN 'infinity' ELSE now() + nullif(%(due)s, 'infinity')::interval END, "
        "       %(tries)s, 2, true, now(), now(), 'refused' FROM outbox WHERE id = %(head)s",
        {"due": due, "tries": tries, "head": head},
    )


def holds(connection: Connection) -> list[tuple[Any, ...]]:
    """(head, tries, attempts, alone, due) of each hold; due is now, later or never."""
    return connection.execute(
        "SELECT head_id, tries, attempts, alone, CASE WHEN due_at = 'infinity' THEN 'never' "
        "WHEN due_at <= now() THEN 'now' ELSE 'later' END FROM outbox_hold ORDER BY head_id"
    ).fetchall()


def states_of(connection: Connection, *ids: int) -> list[str]:
    rows = connection.execute("SELECT state::text FROM outbox WHERE id = ANY(%s) ORDER BY id", (list(ids),))
    return [row[0] for row in rows]


def everything(connection: Connection) -> list[tuple[Any, ...]]:
    """All rows of all tables, their places on disk included."""
    return [
        row
        for table in ("outbox", "outbox_hold", "outbox_lane")
        for row in connection.execute(f"SELECT ctid::text, xmin::text, t::text FROM {table} AS t ORDER BY 1").fetchall()
    ]


def is_order_1(command: Command) -> bool:
    return command.aggregate == ORDER and command.kind != "gap"


def is_first(command: Command) -> bool:
    return is_order_1(command) and command.version == 1


class Others:
    """Other orders on the same channel, one a time: that they are accepted is the evidence against a refused one."""

    def __init__(self, connection: Connection, channel: str) -> None:
        self._connection, self._channel, self._count = connection, channel, 0

    def write_until(self, condition: Callable[[], bool], what: str) -> None:
        def done() -> bool:
            if condition():
                return True
            self._count += 1
            write(self._connection, f"other {self._count}", 1, self._channel)
            return False

        wait_until(done, what)


def heard(subscriber: Subscriber) -> list[int]:
    """The versions of order 1 heard so far."""
    return [publication.version for publication in subscriber.received if publication.aggregate == ORDER]


# End to end


def test_a_dead_event_is_requeued_and_delivered(
    connect: Connect, make_relay: MakeRelay, operator: Operator, gateway: Gateway, subscribe: Subscribe, channel: str
) -> None:
    connection, subscriber = connect(), subscribe(channel)
    gateway.fault = refuse(107, is_order_1)
    committed = write(connection, "1", 1, channel)
    with make_relay(api_url=gateway.url):
        Others(connection, channel).write_until(lambda: "dead" in states(connection), "the event is dead")
        [event] = operator.dead()
        assert event.error == f"Centrifugo refused channel {channel!r} with 107: refused by the stand-in"
        gateway.fault = None
        assert operator.requeue([event.id]).events == 1
        wait_until(lambda: heard(subscriber) == [1, 1], "the event is heard after its gap")
    assert operator.dead() == []
    received = [publication for publication in subscriber.received if publication.aggregate == ORDER]
    assert [publication.tags["ob_kind"] for publication in received] == ["gap", "change"]
    assert [fact(publication) for publication in received] == [committed, committed]
    keys = {command.key for command in gateway.commands if command.aggregate == ORDER}
    assert keys == {f"{committed.key}:{event.id}", f"{committed.key}:{event.id}:gap"}


@pytest.mark.parametrize(("verb", "versions"), [("requeue", [1, 1, 2, 3]), ("discard", [1, 2, 3])])
def test_what_waits_behind_a_dead_event_goes_out_in_order_once_a_person_has_decided(
    connect: Connect,
    make_relay: MakeRelay,
    relay_options: Options,
    operator: Operator,
    gateway: Gateway,
    subscribe: Subscribe,
    channel: str,
    verb: str,
    versions: list[int],
) -> None:
    connection, subscriber = connect(), subscribe(channel)
    gateway.fault = refuse(107, is_first)
    for version in (1, 2, 3):
        write(connection, "1", version, channel)
    waiting = replace(relay_options, policy=replace(relay_options.policy, wait_after_dead=True))
    with make_relay(waiting, api_url=gateway.url):
        Others(connection, channel).write_until(lambda: "dead" in states(connection), "the event is dead")
        [event] = operator.dead()
        assert (event.tries, event.due_at) == (0, None)
        gateway.fault = None
        changed = getattr(operator, verb)([event.id])
        assert (changed.events, changed.refused) == (1, [])
        wait_until(lambda: len(heard(subscriber)) == len(versions), "the order goes on")
    assert heard(subscriber) == versions
    assert holds(connection) == []


def test_a_held_head_that_is_never_accepted_is_given_up(
    connect: Connect, make_relay: MakeRelay, operator: Operator, gateway: Gateway, subscribe: Subscribe, channel: str
) -> None:
    """Error 100 says nothing about the event, so it never dies: a person decides."""
    connection, subscriber = connect(), subscribe(channel)
    gateway.fault = refuse(100, is_first)
    for version in (1, 2):
        write(connection, "1", version, channel)
    patient = Options(policy=Policy(backoff_base=3600, backoff_max=3600))
    with make_relay(patient, api_url=gateway.url):
        Others(connection, channel).write_until(lambda: operator.dead() != [], "the event is held")
        [event] = operator.dead()
        assert (event.state, event.version, event.tries, event.attempts) == ("parked", 1, 1, 0)
        assert event.due_at is not None
        assert event.due_at > datetime.now(UTC) + timedelta(minutes=20)
        assert operator.discard([event.id]).events == 1
        wait_until(lambda: heard(subscriber) == [1, 2], "its gap and its successor are heard")
    [gap, _] = [publication for publication in subscriber.received if publication.aggregate == ORDER]
    assert gap.tags["ob_kind"] == "gap"
    assert operator.event(event.id).state == "discarded"
    assert holds(connection) == []


def test_a_replay_is_heard_again_in_order_under_new_keys(
    connect: Connect, run_relay: RunRelay, operator: Operator, gateway: Gateway, subscribe: Subscribe, channel: str
) -> None:
    connection, subscriber = connect(), subscribe(channel)
    ids = [write(connection, "1", version, channel).key for version in (1, 2, 3)]
    write(connection, "2", 1, channel)
    assert run_relay(api_url=gateway.url) is Ended.EMPTY
    for _ in range(2):
        assert operator.replay(Filter(aggregate_type="order", aggregate_id="1")).events == 3
        assert run_relay(api_url=gateway.url) is Ended.EMPTY
    subscriber.wait_for(10)
    assert heard(subscriber) == [1, 2, 3] * 3
    rounds = [command.key.removeprefix(f"{key}:") for key in ids for command in gateway.commands if key in command.key]
    assert rounds == ["1", "1:r1", "1:r2", "2", "2:r1", "2:r2", "3", "3:r1", "3:r2"]


# Locks


@pytest.mark.parametrize("isolation", [r"read\ committed", r"repeatable\ read"])
def test_a_change_waits_for_the_relay_that_has_the_lane_and_sees_what_it_did(
    connect: Connect, database_url: str, make_relay: MakeRelay, gateway: Gateway, channel: str, isolation: str
) -> None:
    """While version 2 is on its way, the dead version 1 is requeued: that waits, and then knows that 2 has gone out.

    A requeue that decides by what it read before it waited would send 1 after 2. A role's own isolation level
    must not bring that back.
    """
    connection = connect()
    operator = Operator(make_conninfo(database_url, options=f"-c default_transaction_isolation={isolation}"))
    dead = add(connection, 1, "dead", channels=[channel])
    on_its_way, go_on = threading.Event(), threading.Event()

    def fault(exchange: Any) -> None:
        on_its_way.set()
        assert go_on.wait(20)
        exchange.answer(*exchange.forward())

    gateway.fault = fault
    with make_relay(api_url=gateway.url):
        write(connection, "1", 2, channel)
        assert on_its_way.wait(20)
        with in_background(lambda: operator.requeue([dead])) as changed:
            wait_until(lambda: backend_waits(connection, "Lock"), "the requeue waits for the lane")
            assert states_of(connection, dead) == ["dead"]
            go_on.set()
            assert [refused.id for refused in changed().refused] == [dead]
        wait_until(lambda: states(connection).get("delivered") == 1, "version 2 is delivered")
    assert states_of(connection, dead) == ["dead"]


@pytest.mark.parametrize(("verb", "state"), [("requeue", "dead"), ("discard", "dead"), ("replay", "delivered")])
def test_a_lane_that_stays_locked_is_an_error_that_says_what_to_do(
    connect: Connect, database_url: str, verb: str, state: str
) -> None:
    """So every changing verb takes the lane's lock, and a dry run takes none."""
    connection, relay = connect(), connect(autocommit=False)
    event = add(connection, 1, state)
    relay.execute("SELECT FROM outbox_lane FOR NO KEY UPDATE")
    operator = Operator(database_url, lock_timeout=0.1)
    assert getattr(operator, verb)([event], dry_run=True).events == 1
    with pytest.raises(
        OperatorError, match=r"no lock within 0\.1 s: a relay is at work on the event's lane, or a migration"
    ):
        getattr(operator, verb)([event])
    assert states_of(connection, event) == [state]


def test_a_change_that_is_broken_off_says_how_much_is_done(connect: Connect, database_url: str) -> None:
    connection, relay = connect(), connect(autocommit=False)
    for n in range(40):
        add(connection, 1, "dead", aggregate=str(n))
    lanes = [row[0] for row in connection.execute(f"SELECT DISTINCT {LANE} FROM outbox ORDER BY 1")]
    relay.execute("SELECT FROM outbox_lane WHERE lane = %s FOR NO KEY UPDATE", (lanes[20],))
    with pytest.raises(OperatorError, match="events were done before that") as caught:
        Operator(database_url, lock_timeout=0.1).requeue(Filter())
    requeued = states(connection)["pending"]
    assert f"; {requeued} events were done" in str(caught.value)
    assert 20 <= requeued < 40


def test_a_lane_without_a_row_is_refused(connect: Connect, operator: Operator) -> None:
    """What cannot be locked is not changed."""
    connection = connect()
    dead = add(connection, 1, "dead")
    connection.execute("DELETE FROM outbox_lane")
    with pytest.raises(OperatorError, match="outbox_lane has no row"):
        operator.requeue([dead])
    assert states_of(connection, dead) == ["dead"]


# Requeue


def test_a_requeued_event_goes_before_those_that_wait(connect: Connect, operator: Operator) -> None:
    """It is parked as the hold's new head, due now, with counts of its own; accepted channels are not sent again."""
    connection = connect()
    dead = add(connection, 1, "dead", channels=["plain:a", "plain:b"], accepted=["plain:b"])
    waiting = [add(connection, version, "parked") for version in (2, 3)]
    hold(connection, waiting[0])
    assert operator.requeue([dead]).events == 1
    assert states_of(connection, dead, *waiting) == ["parked"] * 3
    assert holds(connection) == [(dead, 0, 0, False, "now")]
    event = operator.event(dead)
    assert (event.error, event.settled_at, event.accepted, event.replay) == (None, None, ["plain:b"], None)


def test_a_requeued_event_that_is_not_the_first_leaves_the_head_its_counts(
    connect: Connect, operator: Operator
) -> None:
    connection = connect()
    head, dead = add(connection, 1, "parked"), add(connection, 2, "dead")
    hold(connection, head)
    assert operator.requeue([dead]).events == 1
    assert states_of(connection, dead) == ["parked"]
    assert holds(connection) == [(head, 5, 2, True, "later")]


def test_a_wait_for_a_person_ends_only_with_its_own_dead_event(connect: Connect, operator: Operator) -> None:
    connection = connect()
    early, awaited = add(connection, 1, "dead"), add(connection, 2, "dead")
    waiting = add(connection, 3, "parked")
    hold(connection, awaited, "infinity", tries=0)
    assert operator.requeue([early]).events == 1
    assert holds(connection) == [(awaited, 0, 2, True, "never")]
    assert operator.requeue([awaited]).events == 1
    assert states_of(connection, early, awaited, waiting) == ["parked"] * 3
    assert holds(connection) == [(early, 0, 0, False, "now")]


@pytest.mark.parametrize(
    ("state", "columns"),
    [
        ("delivered", {}),
        ("superseded", {}),
        ("parked", {"accepted": ["plain:a"]}),
        ("dead", {"accepted": ["plain:a"]}),
        ("pending", {"replay": 1}),
    ],
)
def test_late_is_needed_once_a_successor_has_gone_out(
    connect: Connect, operator: Operator, state: str, columns: dict[str, Any]
) -> None:
    """Delivered or superseded; or accepted by one of its channels; or delivered, and to be replayed."""
    connection = connect()
    dead = add(connection, 1, "dead")
    successor = add(connection, 2, state, **columns)
    for dry_run in (True, False):
        changed = operator.requeue([dead], dry_run=dry_run)
        assert (changed.events, [refused.id for refused in changed.refused]) == (0, [dead])
        assert f"a later event of its aggregate, {successor}, has gone out already" in changed.refused[0].reason
        assert "--late" in changed.refused[0].reason
    assert states_of(connection, dead) == ["dead"]
    assert operator.requeue([dead], late=True).events == 1
    assert states_of(connection, dead) == ["pending"]


def test_late_is_not_needed_for_what_has_not_gone_out_or_is_another_order(connect: Connect, operator: Operator) -> None:
    connection = connect()
    add(connection, 1, "delivered")
    dead = add(connection, 2, "dead")
    add(connection, 3, "pending")
    add(connection, 4, "discarded")
    add(connection, 1, "delivered", aggregate="2")
    assert operator.requeue([dead]).refused == []


@pytest.mark.parametrize(
    ("keep", "ended", "reason"),
    [
        (0.0, "0", "keep is 0, so delivered events leave no trace"),
        (3600.0, "61 minutes", "it died longer ago than keep"),
        (3600.0, "59 minutes", None),
    ],
)
def test_late_is_needed_where_a_successor_may_have_been_deleted(
    connect: Connect, database_url: str, keep: float, ended: str, reason: str | None
) -> None:
    connection = connect()
    operator = Operator(database_url, keep=keep)
    dead = add(connection, 1, "dead", ended=ended)
    refused = operator.requeue([dead]).refused
    if reason is None:
        assert refused == []
    else:
        assert [event.id for event in refused] == [dead]
        assert reason in refused[0].reason
        assert operator.requeue([dead], late=True).events == 1


def test_what_waits_for_a_person_has_no_successor_that_was_deleted(connect: Connect, database_url: str) -> None:
    connection = connect()
    dead = add(connection, 1, "dead", ended="61 minutes")
    hold(connection, dead, "infinity")
    assert Operator(database_url, keep=3600.0).requeue([dead]).events == 1
    assert holds(connection) == [(dead, 0, 0, False, "now")]


# Discard


def test_a_discarded_head_makes_room_for_the_next(connect: Connect, operator: Operator) -> None:
    """It stays in its place, due now, until its channels were told of the gap; discarded again it ends untold."""
    connection = connect()
    head, second = add(connection, 1, "parked"), add(connection, 2, "parked")
    hold(connection, head)
    assert operator.discard([head]).events == 1
    assert states_of(connection, head, second) == ["parked", "parked"]
    assert operator.event(head).ending == "discarded"
    assert holds(connection) == [(head, 0, 0, False, "now")]
    assert operator.discard([head]).events == 1
    assert states_of(connection, head, second) == ["discarded", "parked"]
    assert (operator.event(head).ending, operator.event(head).settled_at is None) == (None, False)
    assert holds(connection) == [(second, 0, 0, False, "now")]
    for _ in range(2):
        assert operator.discard([second]).events == 1
    assert holds(connection) == []


def test_a_discarded_dead_event_leaves_the_hold_of_another_alone(connect: Connect, operator: Operator) -> None:
    connection = connect()
    dead, head = add(connection, 1, "dead"), add(connection, 2, "parked")
    hold(connection, head)
    assert operator.discard([dead]).events == 1
    assert states_of(connection, dead, head) == ["discarded", "parked"]
    assert holds(connection) == [(head, 5, 2, True, "later")]
    assert operator.event(dead).error == "refused"


def test_a_filter_discards_dead_events_and_never_a_head(connect: Connect, operator: Operator) -> None:
    connection = connect()
    dead, head = add(connection, 1, "dead"), add(connection, 1, "parked", aggregate="2")
    hold(connection, head)
    assert operator.discard(Filter()).events == 1
    assert states_of(connection, dead, head) == ["discarded", "parked"]


# Replay


def test_a_replay_behind_a_hold_is_parked_in_its_place(connect: Connect, operator: Operator) -> None:
    connection = connect()
    delivered, head = add(connection, 1, "delivered"), add(connection, 2, "parked")
    hold(connection, head)
    assert operator.replay(Filter()).events == 1
    assert states_of(connection, delivered, head) == ["parked", "parked"]
    assert holds(connection) == [(delivered, 0, 0, False, "now")]


def test_a_replay_chooses_by_time_type_aggregate_and_channel_among_the_delivered(
    connect: Connect, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_room, "CHUNK", 3)
    connection = connect()
    now = datetime.now(UTC)
    ids = [
        add(connection, n + 1, "delivered", created_at=now - timedelta(hours=10 - n), channels=[f"plain:{n % 2}"])
        for n in range(10)
    ]
    for state in ("dead", "superseded", "discarded", "expired", "pending"):
        add(connection, 1, state, aggregate="2", created_at=now - timedelta(hours=5))
    chosen = Filter(
        aggregate_type="order",
        aggregate_id="1",
        channel="plain:1",
        created_after=now - timedelta(hours=8),
        created_before=now - timedelta(hours=3),
    )
    assert operator.replay(chosen, dry_run=True).events == 2
    assert operator.replay(chosen).events == 2
    assert [event.id for event in operator.events(Filter(aggregate_id="1", state="pending"))] == ids[3:7:2]
    for others in (Filter(aggregate_type="user"), Filter(aggregate_id="2"), Filter(channel="plain:2")):
        assert operator.replay(others).events == 0


def test_there_is_nothing_to_replay_where_nothing_is_kept(database_url: str) -> None:
    with pytest.raises(OperatorError, match="keep is 0, so events are deleted when they are delivered"):
        Operator(database_url, keep=0).replay(Filter())


# Refusals and dry runs


def test_events_in_other_states_are_refused_with_a_reason(connect: Connect, operator: Operator) -> None:
    connection = connect()
    head, parked = add(connection, 1, "parked"), add(connection, 2, "parked")
    hold(connection, head)
    ids = {state: add(connection, 1, state, aggregate=state) for state in ("pending", "delivered", "expired", "dead")}
    asked = [head, parked, ids["pending"], ids["delivered"], ids["expired"], 999]
    before = everything(connection)

    def reasons(changed: Any) -> dict[int, str]:
        assert changed.events == 0
        return dict(changed.refused)

    missing = "there is no such event: it was never committed, or deleted after its time"
    assert reasons(operator.requeue(asked)) == {
        head: "it is parked, not dead: it goes out when its hold is due, or discard the hold's head",
        parked: "it is parked, not dead: it goes out when its hold is due, or discard the hold's head",
        ids["pending"]: "it is pending, not dead",
        ids["delivered"]: "it is delivered, not dead: replay it",
        ids["expired"]: "it is expired, not dead",
        999: missing,
    }
    assert reasons(operator.discard(asked[1:])) == {
        parked: f"it waits behind event {head}: discard or requeue that one",
        ids["pending"]: "it is pending: only dead events and heads of holds are discarded",
        ids["delivered"]: "it is delivered: only dead events and heads of holds are discarded",
        ids["expired"]: "it is expired: only dead events and heads of holds are discarded",
        999: missing,
    }
    assert reasons(operator.replay([ids["dead"], head, 999])) == {
        ids["dead"]: "it is dead: only delivered events are replayed",
        head: "it is parked: only delivered events are replayed",
        999: missing,
    }
    assert everything(connection) == before


def test_a_dry_run_counts_and_changes_nothing(connect: Connect, operator: Operator) -> None:
    connection = connect()
    for n in range(10):
        add(connection, 1, "dead", aggregate=f"dead {n}")
        add(connection, 1, "delivered", aggregate=f"delivered {n}")
    head = add(connection, 1, "parked")
    hold(connection, head)
    before = everything(connection)
    assert operator.requeue(Filter(), dry_run=True).events == 10
    assert operator.discard(Filter(), dry_run=True).events == 10
    assert operator.discard([head], dry_run=True).events == 1
    assert operator.replay(Filter(), dry_run=True).events == 10
    assert operator.prune(keep=0, keep_dead=0, dry_run=True) == 20
    assert everything(connection) == before


def test_a_filter_on_another_state_contradicts_the_verb(operator: Operator) -> None:
    with pytest.raises(OperatorError, match="this is for dead events: leave the state out"):
        operator.requeue(Filter(state="delivered"))
    with pytest.raises(OperatorError, match="there is no state 'lost': choose one of pending, parked, "):
        operator.events(Filter(state="lost"))


def test_a_database_without_an_outbox_or_without_a_server(empty_database_url: str) -> None:
    with pytest.raises(OperatorError, match="there is no outbox in schema 'public': name its schema, or run"):
        Operator(empty_database_url).events()
    with pytest.raises(DatabaseUnavailableError):
        Operator("postgresql://127.0.0.1:1/nothing").events()


def test_a_statement_that_takes_too_long_is_given_up(connect: Connect, database_url: str) -> None:
    blocker = connect(autocommit=False)
    blocker.execute("LOCK outbox")
    with pytest.raises(OperatorError, match=r"the database took longer than 0\.1 s\. Choose fewer events"):
        Operator(database_url, statement_timeout=0.1).events()


# Looking


def ids_of(events: Sequence[EventRow]) -> list[int]:
    return [event.id for event in events]


@pytest.mark.parametrize("chunk", [3, 10_000])
def test_events_are_listed_by_filter_in_pages(
    connect: Connect, operator: Operator, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(operator_room, "CHUNK", chunk)
    connection = connect()
    now = datetime.now(UTC)
    ids = [
        add(connection, 1, aggregate=str(n % 5), channels=[f"plain:{n % 2}", "plain:x"], created_at=now - timedelta(n))
        for n in range(1, 21)
    ]
    user = add(connection, 7, "dead", aggregate_type="user")
    assert ids_of(operator.events()) == [*ids, user]
    assert ids_of(operator.events(limit=7)) == ids[:7]
    assert ids_of(operator.events(after_id=ids[6], limit=7)) == ids[7:14]
    assert ids_of(operator.events(Filter(aggregate_type="user"))) == [user]
    assert ids_of(operator.events(Filter(state="dead"))) == [user]
    assert ids_of(operator.events(Filter(aggregate_id="2"), limit=2)) == [ids[1], ids[6]]
    assert ids_of(operator.events(Filter(channel="plain:0"), after_id=ids[15])) == [ids[17], ids[19]]
    window = Filter(created_after=now - timedelta(4), created_before=now - timedelta(2))
    assert ids_of(operator.events(window)) == ids[2:4]
    [event] = operator.events(Filter(state="dead"))
    assert (event.aggregate_type, event.aggregate_id, event.version, event.kind) == ("user", "1", 7, "change")
    assert (event.channels, event.error, event.tries) == (["plain:a"], "refused", None)


def test_an_event_is_shown_with_the_hold_of_its_aggregate(connect: Connect, operator: Operator) -> None:
    connection = connect()
    payload = '{"n": 12345678901234567890.10}'
    head = add(connection, 1, "parked", payload=payload, tags='{"a": "b"}', accepted=["plain:b"], traceparent="00-1")
    second = add(connection, 2, "parked")
    hold(connection, head)
    event = operator.event(head)
    assert (event.payload, event.tags, event.accepted, event.traceparent) == (
        payload,
        '{"a": "b"}',
        ["plain:b"],
        "00-1",
    )
    assert event.hold is not None
    assert (event.hold.head_id, event.hold.parked, event.hold.tries, event.hold.alone) == (head, 2, 5, True)
    assert event.due_at == event.hold.due_at
    behind = operator.event(second)
    assert behind.hold == event.hold
    assert (behind.tries, behind.due_at) == (None, None)
    with pytest.raises(OperatorError, match="there is no event 99: it was never committed, or deleted"):
        operator.event(99)


def test_what_needs_a_person_is_listed(connect: Connect, operator: Operator) -> None:
    connection = connect()
    dead = add(connection, 1, "dead")
    head, behind = add(connection, 1, "parked", aggregate="2"), add(connection, 2, "parked", aggregate="2")
    hold(connection, head)
    awaited = add(connection, 1, "dead", aggregate="3")
    hold(connection, awaited, "infinity", tries=0)
    assert [(event.id, event.tries, event.due_at is None) for event in operator.dead()] == [
        (dead, None, True),
        (head, 5, False),
        (awaited, 0, True),
    ]
    assert behind not in ids_of(operator.dead())
    assert ids_of(operator.dead(Filter(aggregate_id="2"))) == [head]
    assert ids_of(operator.dead(after_id=dead, limit=1)) == [head]


def test_the_outbox_may_be_in_a_schema_of_any_name(connect: Connect, database_url: str) -> None:
    connection = connect()
    connection.execute('ALTER SCHEMA public RENAME TO "Out %s box"')
    connection.execute('SET search_path = "Out %s box"')
    dead = add(connection, 1, "dead")
    hold(connection, dead, "infinity")
    operator = Operator(database_url, schema="Out %s box")
    assert ids_of(operator.dead()) == [dead]
    assert operator.requeue([dead]).events == 1
    for _ in range(2):
        assert operator.discard([dead]).events == 1
    assert operator.prune(keep_dead=0) == 1
