"""Metrics, liveness and readiness, on real servers."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import promql_parser
import psycopg
import pytest
import yaml

from outbox_relay import upkeep
from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded._process import free_port
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.embedded.postgres import Postgres
from outbox_relay.event import Event, Outage, Reply
from outbox_relay.health import Health
from outbox_relay.metrics import BacklogCollector, HealthCollector, Histogram, Metrics, registry
from outbox_relay.migrations import migrate
from outbox_relay.monitor import CLIENTS, Monitor
from outbox_relay.options import Options
from outbox_relay.outcome import SUPERSEDED, UNSETTLED, GivenUp, Held, Outcome, Owed, Policy, Settlement
from outbox_relay.runner import Relay
from outbox_relay.store import Store
from outbox_relay.upkeep import COUNT_LIMIT
from tests.conftest import Connect, StartRelay, sqlalchemy_engine
from tests.support.monitoring import Sample, Site
from tests.support.proxy import TcpProxy
from tests.support.waiting import PATIENCE, wait_until
from tests.support.writing import Connection, Traffic, states, write

DEPLOY = Path(__file__).parents[1] / "deploy"
NO_BACKLOG = dict.fromkeys(("pending", "parked", "holds", "dead"), 0) | {
    "oldest_pending_seconds": None,
    "oldest_pending_commit_seconds": None,
}
HEALTHY = Health(silent=(0.0, 1.0), has_database=(True, True), outage=False, stopping=False, patience=60.0)


@pytest.fixture
def quick() -> Options:
    return Options(
        workers=2,
        pause_min=0.02,
        pause_max=0.2,
        frozen_after=2.0,
        policy=Policy(max_attempts=3, min_age=0.0, backoff_base=0.02, backoff_max=0.1),
    )


@pytest.fixture
def tracking_url() -> Iterator[str]:
    """A database of its own, on a server that remembers when transactions were committed."""
    with Postgres(settings={"track_commit_timestamp": "on"}) as server:
        migrate(sqlalchemy_engine(server.url()))
        yield server.url()


@contextlib.contextmanager
def watched(
    database_url: str,
    server: Centrifugo,
    options: Options,
    open_publisher: Callable[[], Any] | None = None,
) -> Iterator[Site]:
    """A relay that runs, and what its monitor says."""
    metrics = Metrics()
    relay = Relay(
        lambda: Store(database_url),
        open_publisher or (lambda: Publisher(server.api_url, server.api_key)),
        options,
        metrics,
    )

    def backlog() -> Mapping[str, float | None]:
        with closing(Store(database_url)) as store:
            return store.backlog()._asdict()

    numbers = registry(metrics, HealthCollector(relay.health), BacklogCollector(backlog, every=0.0))
    with Monitor("127.0.0.1", 0, numbers, relay.health) as monitor, relay:
        yield Site(monitor.address[1])


def fill(connection: Connection, count: int, aggregate: str) -> None:
    """Write events of as many aggregates as the SQL expression over `n` makes."""
    connection.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload) "
        f"SELECT 'order', {aggregate}, n, '{{plain:a}}', '{{}}' FROM generate_series(1, {count}) AS n"
    )


# Counts


def test_deliveries_and_requests_are_counted(
    connect: Connect, database_url: str, centrifugo: Centrifugo, quick: Options, channel: str
) -> None:
    connection = connect()
    for n in range(50):
        write(connection, str(n % 10), n // 10 + 1, channel)
    with watched(database_url, centrifugo, quick) as site:
        wait_until(lambda: site.value("events_total", outcome="delivered") == 50, "all are counted as delivered")
        wait_until(lambda: site.value("pending") == 0, "nothing waits any more")
        wait_until(lambda: site.value("ready") == 1, "the other worker has its session too")
        samples = {(s.name.removeprefix("outbox_relay_"), *s.labels.values()): s.value for s in site.scrape()}
    assert samples["events_total", "held"] == samples["events_total", "dead"] == 0
    assert samples["lag_seconds_count",] == samples["lag_seconds_bucket", "+Inf"] == 50
    assert 0 < samples["lag_seconds_sum",] < 50 * 20
    assert samples["batch_events_sum",] == samples["request_events_sum",] == 50
    # Five events of one aggregate take five requests.
    assert samples["requests_total", "answered"] == samples["request_seconds_count",] >= 5
    assert samples["requests_total", "failed"] == 0
    assert samples["pending",] == samples["dead",] == samples["oldest_pending_seconds",] == 0
    assert samples["backlog_up",] == samples["ready",] == 1


def test_holds_and_deaths_are_counted(
    connect: Connect, database_url: str, centrifugo: Centrifugo, quick: Options, channel: str
) -> None:
    """Centrifugo's decoder refuses 11,000 levels of JSON, alone or in company: a real poison event."""
    connection = connect()
    write(connection, "deep", 1, channel, "[" * 11_000 + "]" * 11_000)
    write(connection, "unheard", 1, "no_such_namespace:1")
    traffic = Traffic(connection, "other", channel)
    with watched(database_url, centrifugo, quick) as site:
        traffic.until(lambda: states(connection).get("dead") == 1, "the poison event is dead")
        wait_until(lambda: site.value("events_total", outcome="dead") == 1, "its death is counted")
        wait_until(lambda: site.value("dead") == 1, "it is among the dead")
        assert site.value("holds") == 1
        assert site.value("parked") == 1
        held = site.value("events_total", outcome="held")
        assert held is not None
        assert held >= 2
        wait_until(lambda: site.verdict("/ready") == (200, {"ready": True}), "the second worker is up, too")


def test_the_age_of_the_oldest_event_counts_from_insert_and_from_commit(tracking_url: str) -> None:
    """A writer that commits late makes an event old that nobody could have sent earlier."""
    with psycopg.connect(tracking_url) as writer, closing(Store(tracking_url)) as store:
        write(writer, "1", 1, "plain:a")
        time.sleep(0.6)
        assert store.backlog() == (0, 0, 0, 0, None, None)
        writer.commit()
        backlog = store.backlog()
    assert backlog.pending == 1
    assert backlog.oldest_pending_seconds is not None
    assert backlog.oldest_pending_seconds > 0.6
    assert backlog.oldest_pending_commit_seconds is not None
    assert backlog.oldest_pending_commit_seconds < 0.5


def test_without_commit_timestamps_there_is_no_age_from_commit(connect: Connect, database_url: str) -> None:
    write(connect(), "1", 1, "plain:a")
    with closing(Store(database_url)) as store:
        assert store.backlog().oldest_pending_seconds is not None
        assert store.backlog().oldest_pending_commit_seconds is None


def test_a_histogram_counts_as_prometheus_defines_it() -> None:
    histogram = Histogram("x", "", (1, 2.5, 10))
    histogram.add([10.5, 1, 2, 2.5])
    histogram.add([0.25])
    samples = {sample.labels.get("le", sample.name): sample.value for sample in histogram.family().samples}
    assert samples == {
        "1.0": 2.0,
        "2.5": 4.0,
        "10.0": 4.0,
        "+Inf": 5.0,
        "outbox_relay_x_count": 5.0,
        "outbox_relay_x_sum": 16.25,
    }


def test_an_observer_costs_little_per_event() -> None:
    """The budget is 0.2 µs; ten times as much is tolerated on a busy machine, and still tells a loop of calls."""
    event = Event(1, "e", "order", "1", 1, 1, "change", ["a"], "{}", None, None, 1e9)
    events = [replace(event, created_at=1e9 + n / 1e4) for n in range(1_000)]
    metrics = Metrics()
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        metrics.batch(events, (), 1e9 + 1)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) / len(events) < 2e-6


def test_outcomes_have_a_series_each() -> None:
    event = Event(1, "e", "order", "1", 1, 1, "change", ["a"], "{}", None, None, 1e9)
    metrics = Metrics()
    held, owed = Held(tries=1, attempts=0, delay=1.0, error=""), Owed("dead", "")
    outcomes: list[Outcome] = [
        held,
        owed,
        GivenUp("dead"),
        GivenUp("expired"),
        GivenUp("discarded"),
        SUPERSEDED,
        UNSETTLED,
    ]
    metrics.batch([event], [Settlement(event, outcome, ()) for outcome in outcomes], 1e9)
    metrics.request(3, 0.1, Outage("down"))
    samples = {tuple(s.labels.values()): s.value for f in metrics.collect() for s in f.samples if "total" in s.name}
    events = {("delivered",): 1, ("held",): 2, ("dead",): 1, ("expired",): 1, ("discarded",): 1, ("superseded",): 1}
    assert samples == events | {("answered",): 0, ("failed",): 1, (): 0}


# What a scrape costs


@pytest.mark.parametrize(
    "aggregate",
    ["(n % 20000)::text", "CASE WHEN n % 10 = 0 THEN n::text ELSE 'hot' END", "(n / 1000)::text"],
    ids=["many aggregates", "one has 90 %", "one after the other"],
)
def test_pending_is_estimated_cheaply_beyond_ten_thousand(connect: Connect, database_url: str, aggregate: str) -> None:
    """200,000 pending events without statistics, then half of them delivered without a VACUUM."""
    connection = connect()
    # The snapshot of an autovacuum worker's ANALYZE would keep delivered entries of the index from being marked.
    connection.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")
    fill(connection, 200_000, aggregate)
    with closing(Store(database_url)) as store:
        assert 0.7 < store.backlog().pending / 200_000 < 1.3
        assert buffers(store) < 25_000
        connection.execute("UPDATE outbox SET state = 'delivered' WHERE id <= (SELECT min(id) + 99999 FROM outbox)")
        store.backlog()  # the first to meet delivered entries of the index marks them
        assert 0.7 < store.backlog().pending / 100_000 < 1.3
        assert buffers(store) < 25_000
        connection.execute("UPDATE outbox SET state = 'delivered' WHERE id <= (SELECT max(id) - 9999 FROM outbox)")
        assert store.backlog().pending == COUNT_LIMIT - 1


def buffers(store: Store) -> int:
    """How many pages the statements of a backlog touch."""
    total = 0
    with store.batch():
        for query, parameters in (
            (upkeep._BACKLOG, {"limit": COUNT_LIMIT}),
            (upkeep._ESTIMATE, {"sample": upkeep.LANE_SAMPLE}),
        ):
            [[[plan]]] = store.execute("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + query, **parameters).fetchall()
            total += plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
    return total


def test_the_database_is_asked_once_in_a_while() -> None:
    asked = []

    def read() -> Mapping[str, float | None]:
        asked.append(1)
        return NO_BACKLOG

    collector = BacklogCollector(read, every=0.3)
    for _ in range(5):
        list(collector.collect())
    assert len(asked) == 1
    time.sleep(0.35)
    list(collector.collect())
    assert len(asked) == 2


def test_a_slow_database_is_asked_less_often() -> None:
    """A stand-in: what makes the real one slow is hours of a snapshot held open, over a million delivered events."""
    asked = []

    def read() -> Mapping[str, float | None]:
        asked.append(1)
        time.sleep(0.1)
        return NO_BACKLOG

    collector = BacklogCollector(read, every=0.0)
    ends_at = time.monotonic() + 0.8
    while time.monotonic() < ends_at:
        list(collector.collect())
    assert len(asked) == 1


def test_a_database_that_does_not_answer_takes_no_other_metric_with_it() -> None:
    """A stand-in for a server that is frozen: it would take the suite's own down with it."""
    blocked = threading.Event()

    def read() -> Mapping[str, float | None]:
        blocked.wait()
        return NO_BACKLOG

    backlog = BacklogCollector(read, every=0.0, patience=0.1)
    numbers = registry(Metrics(), HealthCollector(lambda: HEALTHY), backlog)
    with Monitor("127.0.0.1", 0, numbers, lambda: HEALTHY) as monitor:
        site = Site(monitor.address[1])
        started = time.monotonic()
        for _ in range(3):
            assert site.value("backlog_up") == 0
        assert time.monotonic() - started < 5.0
        assert site.value("pending") is None
        assert site.value("ready") == 1
        assert sum(thread.name == "outbox-relay-backlog" for thread in threading.enumerate()) == 1
        blocked.set()
        wait_until(lambda: site.value("backlog_up") == 1, "the database answers again")
        assert site.value("pending") == 0


# Liveness and readiness


def test_an_outage_is_told_and_ends(
    connect: Connect, database_url: str, start_centrifugo: Callable[..., Centrifugo], quick: Options, channel: str
) -> None:
    server = start_centrifugo()
    connection = connect()
    write(connection, "1", 1, channel)
    with watched(database_url, server, quick) as site:
        wait_until(lambda: states(connection) == {"delivered": 1}, "the first event is delivered")
        site.wait_for("/ready", 200, {"ready": True})
        assert site.value("outage") == 0
        server.kill()
        write(connection, "1", 2, channel)
        site.wait_for("/ready", 503, {"ready": False, "reason": "outage"})
        assert site.value("outage") == 1
        assert site.value("ready") == 0
        wait_until(lambda: site.value("pending") == 1, "the second event waits")
        failed = site.value("requests_total", result="failed")
        assert failed is not None
        assert failed >= 1
        assert site.verdict("/live") == (200, {"live": True})
        server.start()
        site.wait_for("/ready", 200, {"ready": True})
        assert site.value("outage") == 0
        wait_until(lambda: site.value("events_total", outcome="delivered") == 2, "both events are delivered")


def test_workers_that_wait_out_an_outage_are_alive(
    connect: Connect, database_url: str, start_centrifugo: Callable[..., Centrifugo], channel: str
) -> None:
    """The pause between two tries may be longer than a worker may be silent."""
    server = start_centrifugo()
    server.kill()
    write(connect(), "1", 1, channel)
    options = Options(workers=2, pause_min=30.0, pause_max=30.0, frozen_after=1.8)
    with watched(database_url, server, options) as site:
        site.wait_for("/ready", 503, {"ready": False, "reason": "outage"})
        watched_until = time.monotonic() + 3.0
        while time.monotonic() < watched_until:
            assert site.verdict("/live") == (200, {"live": True})
            time.sleep(0.05)


def test_a_lost_database_is_told_and_comes_back(
    connect: Connect, database_url: str, centrifugo: Centrifugo, quick: Options, channel: str
) -> None:
    info = psycopg.conninfo.conninfo_to_dict(database_url)
    with TcpProxy(str(info["host"]), int(str(info["port"]))) as proxy:
        through = psycopg.conninfo.make_conninfo(database_url, host="127.0.0.1", port=proxy.port)
        with watched(through, centrifugo, quick) as site:
            site.wait_for("/ready", 200, {"ready": True})
            proxy.cut()
            site.wait_for("/ready", 503, {"ready": False, "reason": "database", "workers": [0, 1]})
            assert site.value("workers_without_database") == 2
            assert site.value("backlog_up") == 0
            assert site.value("pending") is None
            assert site.value("outage") == 0
            # It waits for the database: a restart would not help it.
            time.sleep(quick.frozen_after + 0.3)
            assert site.verdict("/live") == (200, {"live": True})
            proxy.mend()
            site.wait_for("/ready", 200, {"ready": True})
            write(connect(), "1", 1, channel)
            wait_until(lambda: site.value("events_total", outcome="delivered") == 1, "it delivers again")
            wait_until(lambda: site.value("backlog_up") == 1, "it knows the backlog again")


class Blocking:
    """A publisher that does not come back. The real one has a deadline, so that only a bug or a stopped thread
    looks like this."""

    def __init__(self, publisher: Publisher, blocks: threading.Event, released: threading.Event) -> None:
        self._publisher = publisher
        self._blocks = blocks
        self._released = released

    def room(self, limit: int) -> int:
        return limit

    def publish(self, events: Sequence[Event], deadline: float) -> list[Reply] | Outage:
        if self._blocks.is_set():
            self._blocks.clear()
            self._released.wait()
        return self._publisher.publish(events)

    def close(self) -> None:
        self._publisher.close()


def test_a_frozen_worker_is_told_by_its_number(
    connect: Connect, database_url: str, centrifugo: Centrifugo, quick: Options, channel: str
) -> None:
    blocks, released = threading.Event(), threading.Event()
    blocks.set()

    def publisher() -> Blocking:
        return Blocking(Publisher(centrifugo.api_url, centrifugo.api_key), blocks, released)

    with watched(database_url, centrifugo, quick, publisher) as site:
        try:
            site.wait_for("/ready", 200, {"ready": True})
            write(connect(), "1", 1, channel)
            wait_until(lambda: site.verdict("/live")[0] == 503, "it is told")
            status, verdict = site.verdict("/live")
            [number] = verdict.pop("workers")
            assert (status, verdict) == (503, {"live": False, "reason": "frozen"})
            assert site.verdict("/ready") == (503, {"ready": False, "reason": "frozen", "workers": [number]})
            assert site.value("workers_frozen") == 1
            frozen = site.value("worker_seen_timestamp_seconds", worker=str(number))
            other = site.value("worker_seen_timestamp_seconds", worker=str(1 - number))
            assert frozen is not None
            assert other is not None
            assert other - frozen > quick.frozen_after - 0.5
        finally:
            released.set()
        site.wait_for("/live", 200, {"live": True})


@pytest.mark.parametrize(
    ("health", "live", "obstacle"),
    [
        (HEALTHY, True, None),
        (HEALTHY._replace(silent=(), has_database=()), True, "starting"),
        (HEALTHY._replace(has_database=(True, None)), True, "starting"),
        (HEALTHY._replace(outage=True), True, "outage"),
        (HEALTHY._replace(outage=True, has_database=(True, None)), True, "outage"),
        (HEALTHY._replace(outage=True, has_database=(True, False)), True, "database"),
        (HEALTHY._replace(has_database=(False, True), silent=(61.0, 0.0)), False, "frozen"),
        (HEALTHY._replace(silent=(59.9, 0.0)), True, None),
        (HEALTHY._replace(stopping=True, silent=(61.0, 0.0)), True, "stopping"),
    ],
)
def test_health_names_the_nearest_cause(health: Health, live: bool, obstacle: str | None) -> None:
    assert (health.live, health.obstacle) == (live, obstacle)


def test_other_pages_do_not_exist_and_openmetrics_is_spoken() -> None:
    with Monitor("127.0.0.1", 0, registry(Metrics()), lambda: HEALTHY) as monitor:
        site = Site(monitor.address[1])
        assert site.get("/")[0] == 404
        assert site.get("/metrics/../etc/passwd")[0] == 404
        assert site.get("/ready?verbose")[0] == 200
        status, body = site.get("/metrics", accept="application/openmetrics-text; version=1.0.0")
        assert (status, body.endswith("# EOF\n")) == (200, True)


@pytest.mark.parametrize(
    "request_line",
    [
        "GET //[ HTTP/1.1",
        "GET http://[x/metrics HTTP/1.1",
        "GET /%00 HTTP/1.1",
        "DELETE /live HTTP/1.1",
        "\x00\xff",
        "GET",
    ],
)
def test_a_request_that_is_none_is_no_news(request_line: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever reaches the port writes nothing into the log, and the pages are there for the next one."""
    with Monitor("127.0.0.1", 0, registry(Metrics()), lambda: HEALTHY) as monitor:
        with socket.create_connection(monitor.address, PATIENCE) as client:
            client.sendall(f"{request_line}\r\nAccept: \x1b;q=x,;;,*\r\n\r\n".encode("latin-1"))
            client.shutdown(socket.SHUT_WR)
            while client.recv(65_536):
                pass
        assert Site(monitor.address[1]).get("/live")[0] == 200
    assert caplog.text == ""


def test_so_many_clients_and_no_more() -> None:
    """Each costs a thread. One too many is turned away at once, and a place is free when one has left."""
    with contextlib.ExitStack() as stack, Monitor("127.0.0.1", 0, registry(Metrics()), lambda: HEALTHY) as monitor:
        clients = [stack.enter_context(socket.create_connection(monitor.address, PATIENCE)) for _ in range(CLIENTS)]
        one_more = stack.enter_context(socket.create_connection(monitor.address, PATIENCE))
        assert one_more.recv(1) == b""
        clients[0].setblocking(False)
        with pytest.raises(BlockingIOError):  # it was not the others' time that was over
            clients[0].recv(1)
        clients[0].close()

        def served() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return Site(monitor.address[1]).get("/live")[0] == 200
            return False

        wait_until(served, "there is a place again")


# The command line


def test_run_serves_them_on_loopback_and_gives_no_secret_away(
    connect: Connect, database_url: str, start_relay: StartRelay, channel: str
) -> None:
    port = free_port()
    settings = {
        "database_url": psycopg.conninfo.make_conninfo(database_url, password="canary-password"),
        "metrics_port": port,
    }
    connection = connect()
    fact = write(connection, "canary-aggregate", 1, channel, '{"a": "canary-payload"}')
    write(connection, "canary-held", 1, "canary-namespace:1")
    process = start_relay(settings)
    site = Site(port)
    site.wait_for("/ready", 200, {"ready": True})
    wait_until(lambda: (site.value("events_total", outcome="held") or 0) >= 1, "an event is held")
    wait_until(lambda: site.value("events_total", outcome="delivered") == 1, "the other one is delivered")
    assert listening(process.pid) == [f"0100007F:{port:04X}"]
    said = "".join(site.get(page)[1] for page in ("/metrics", "/live", "/ready", "/canary"))
    api_key = re.search(rb"OUTBOX_RELAY_CENTRIFUGO_API_KEY=([^\0]+)", Path(f"/proc/{process.pid}/environ").read_bytes())
    assert api_key is not None
    for secret in ("canary", api_key[1].decode(), channel, fact.key, "order", "127.0.0.1"):
        assert secret not in said
    assert process.terminate() == 0


def test_run_opens_no_port_unasked(start_relay: StartRelay) -> None:
    assert listening(start_relay().pid) == []


def test_run_refuses_a_port_that_is_taken(start_relay: StartRelay) -> None:
    first = start_relay({"metrics_port": free_port()})
    [address] = listening(first.pid)
    second = start_relay({"metrics_port": int(address.partition(":")[2], 16)}, wait=False)
    assert second.wait() == 2
    assert "metrics_port: cannot listen on 127.0.0.1" in second.output


def listening(pid: int) -> list[str]:
    """Addresses on which a process listens, as in /proc/net/tcp and tcp6."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(descriptor))
    return [
        fields[1]
        for table in ("tcp", "tcp6")
        for fields in map(str.split, Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:])
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets
    ]


# Alerts and board


def selectors(node: object) -> Iterator[promql_parser.VectorSelector]:
    """Every selector in a PromQL expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
        return
    for part in ("expr", "lhs", "rhs", "param", "args", "vector_selector"):
        child = getattr(node, part, None)
        for each in child if isinstance(child, list) else [child]:
            if each is not None:
                yield from selectors(each)


def alerts() -> dict[str, str]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def board() -> dict[str, str]:
    panels = json.loads((DEPLOY / "grafana" / "outbox-relay.json").read_text())["panels"]
    found = {f"{panel['title']} {target['refId']}": target["expr"] for panel in panels for target in panel["targets"]}
    return {name: expression.replace("$__rate_interval", "5m") for name, expression in found.items()}


def labels(node: object) -> Iterator[str]:
    """Every label that an expression groups by."""
    modifier = getattr(node, "modifier", None)
    if isinstance(node, promql_parser.AggregateExpr) and modifier is not None:
        yield from modifier.labels
    for part in ("expr", "lhs", "rhs", "param", "args", "vector_selector"):
        child = getattr(node, part, None)
        for each in child if isinstance(child, list) else [child]:
            if each is not None:
                yield from labels(each)


@pytest.fixture
def samples(tracking_url: str, centrifugo: Centrifugo, quick: Options) -> list[Sample]:
    """A scrape of a relay that has worked; what waits is written after it, so that every gauge is there."""
    with watched(tracking_url, centrifugo, quick) as site, psycopg.connect(tracking_url, autocommit=True) as connection:
        write(connection, "1", 1, "plain:a")
        wait_until(lambda: site.value("events_total", outcome="delivered") == 1, "it has delivered")
        # In a lane that a writer of ours keeps locked, the event waits.
        with connection.transaction():
            connection.execute("SELECT FROM outbox_lane FOR UPDATE")
            with psycopg.connect(tracking_url, autocommit=True) as other:
                write(other, "1", 2, "plain:a")
            wait_until(lambda: site.value("pending") == 1, "it waits")
            return site.scrape()


@pytest.mark.parametrize("source", [alerts, board], ids=["alerts", "board"])
def test_expressions_name_only_what_exists(source: Callable[[], dict[str, str]], samples: list[Sample]) -> None:
    """PromQL that parses, of series with these names and label values. `job` and `instance` are Prometheus's own."""
    added = {"job", "instance"}
    for name, expression in source().items():
        tree = promql_parser.parse(expression)
        named = list(selectors(tree))
        assert named, name
        known = set(added)
        for selector in named:
            series = [sample.labels for sample in samples if sample.name == selector.name]
            assert series or selector.name == "up", f"{name}: there is no {selector.name}"
            known.update(*series)
            for matcher in selector.matchers.matchers:
                assert matcher.name in added or {matcher.name: matcher.value}.items() <= {
                    pair for one in series for pair in one.items()
                }, f"{name}: no {selector.name} has {matcher.name}={matcher.value}"
        assert set(labels(tree)) <= known, name


def test_the_board_names_series_by_labels_that_exist(samples: list[Sample]) -> None:
    text = (DEPLOY / "grafana" / "outbox-relay.json").read_text()
    exist = {"instance"} | {label for sample in samples for label in sample.labels}
    assert set(re.findall(r"\{\{(\w+)\}\}", text)) <= exist
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_documentation_has_every_metric_and_every_alert(samples: list[Sample]) -> None:
    text = (DEPLOY.parent / "docs" / "monitoring.md").read_text()
    own = {re.sub(r"_(bucket|sum|count)$", "", s.name) for s in samples if s.name.startswith("outbox_relay_")}
    documented = set(re.findall(r"^\| `(outbox_relay_\w+)", text, re.MULTILINE))
    assert documented == own
    assert set(re.findall(r"^### (\w+)", text, re.MULTILINE)) == alerts().keys()
    for name in alerts():
        assert f"docs/monitoring.md#{name.lower()}\n" in (DEPLOY / "prometheus" / "alerts.yml").read_text()
