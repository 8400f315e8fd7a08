"""The benchmark's own honesty: a wrong run is found out, and the report says what was measured."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
import socket
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import harness, load, report, witness
from bench.charts import number
from bench.harness import FULL, QUICK, SHORT, Mode, Result, Row, Sample, WrongRunError
from bench.ratios import RATIOS, Of, Ratio, judged
from bench.report_text import NOTES
from outbox_relay.embedded.centrifugo import Centrifugo
from tests.conftest import RunRelay
from tests.support.gateway import Exchange, Gateway

unhurried = settings(deadline=None)

# The witness: histories, as the bytes of a WebSocket

Event = tuple[str, int]
"""An aggregate, and a version of it."""
SOUND: list[Event] = [("a", 1), ("b", 1), ("a", 2), ("c", 1), ("b", 2), ("a", 3)]


def push(event: Event, **data: object) -> bytes:
    """A line as Centrifugo writes it to a subscriber."""
    name, version = event
    tags = {"ob_id": name, "ob_version": str(version)}
    publication = {"data": {"n": version, **data}, "offset": 1, "tags": tags}
    return json.dumps({"push": {"channel": "plain:1", "pub": publication}}, separators=(",", ":")).encode()


def message(payload: bytes, fragments: int = 1) -> bytes:
    """A WebSocket message of text, unmasked as a server's are."""
    size = -(-len(payload) // fragments)
    parts = [payload[at : at + size] for at in range(0, len(payload), size)]
    frames = []
    for place, part in enumerate(parts):
        head = (0x00 if place else 0x01) | (0x80 if place == len(parts) - 1 else 0x00)
        if len(part) < 126:
            length = bytes([len(part)])
        elif len(part) < 1 << 16:
            length = b"\x7e" + len(part).to_bytes(2, "big")
        else:
            length = b"\x7f" + len(part).to_bytes(8, "big")
        frames.append(bytes([head]) + length + part)
    return b"".join(frames)


def judge(history: Sequence[Event], events: int = len(SOUND), *, mid_stream: bool = False) -> witness.Seen:
    """What the witness makes of a history, one message and one chunk for each publication."""
    chunks = [(float(at), message(push(event))) for at, event in enumerate(history)]
    return witness._judge(chunks, events, mid_stream=mid_stream)


def test_a_sound_history_is_sound() -> None:
    seen = judge(SOUND)
    assert (seen.received, seen.lost, seen.inverted, seen.duplicates) == (6, 0, 0, 0)
    assert (seen.first_at, seen.last_at, seen.first_burst) == (0.0, 5.0, 1)
    assert seen.rate == 1.0


def test_aggregates_need_not_wait_for_each_other() -> None:
    assert judge(sorted(SOUND)).inverted == 0


@pytest.mark.parametrize("missing", range(len(SOUND)))
def test_a_lost_publication_is_found(missing: int) -> None:
    history = SOUND[:missing] + SOUND[missing + 1 :]
    assert judge(history).lost == 1


@pytest.mark.parametrize(("one", "other"), [(0, 2), (2, 5), (0, 5), (1, 4)])
def test_an_inversion_is_found(one: int, other: int) -> None:
    history = list(SOUND)
    history[one], history[other] = history[other], history[one]
    seen = judge(history)
    assert seen.inverted
    assert not seen.lost


@pytest.mark.parametrize("doubled", SOUND)
def test_a_duplicate_is_counted(doubled: Event) -> None:
    seen = judge([*SOUND, doubled])
    assert (seen.received, seen.duplicates, seen.lost, seen.inverted) == (7, 1, 0, 0)


@pytest.mark.parametrize("missing", range(1, len(SOUND)))
def test_a_duplicate_stands_in_for_nothing(missing: int) -> None:
    seen = judge([*SOUND[:missing], SOUND[0], *SOUND[missing + 1 :]])
    assert (seen.received, seen.duplicates, seen.lost) == (6, 1, 1)


def test_a_bundle_is_its_events() -> None:
    entries = [{"data": {}, "tags": {"ob_id": name, "ob_version": str(version)}} for name, version in SOUND]
    bundle = {"data": {"ob": entries}, "tags": {"ob": "1", "ob_bundle": str(len(entries))}}
    text = json.dumps({"push": {"channel": "c", "pub": bundle}}, separators=(",", ":")).encode()
    assert text.count(witness._MARK) == len(SOUND)
    chunks = [(1.0, message(text))]
    seen = witness._judge(chunks, len(SOUND), mid_stream=False)
    assert (seen.received, seen.lost, seen.inverted, seen.duplicates) == (len(SOUND), 0, 0, 0)


@pytest.mark.parametrize(
    ("versions", "lost", "inverted", "duplicates"),
    [((1, 2, 3), 0, 0, 0), ((3,), 0, 0, 0), ((1, 2), 1, 0, 0), ((1, 3, 2), 0, 1, 0), ((2, 2, 3), 0, 0, 1)],
)
def test_where_the_newest_alone_count_versions_rise_all_the_same(
    versions: Sequence[int], lost: int, inverted: int, duplicates: int
) -> None:
    chunks = [(1.0, message(push(("a", version)))) for version in versions]
    seen = witness._judge_newest(chunks, 1, 3)
    assert (seen.lost, seen.inverted, seen.duplicates) == (lost, inverted, duplicates)


def test_mid_stream_aggregates_go_on_from_where_they_are() -> None:
    later = [(name, version + 7) for name, version in SOUND]
    assert judge(later, mid_stream=True).inverted == 0
    assert judge(later).inverted
    assert judge([*later[:2], *later[3:]], mid_stream=True).inverted


def test_latency_counts_to_the_arrival() -> None:
    chunks = [(10.0, message(push(("a", 1), sent_at=9.5))), (11.0, message(push(("a", 2))))]
    seen = witness._judge(chunks, 2, mid_stream=False)
    assert (seen.lags, seen.arrivals) == ([0.5], [10.0])


histories = st.lists(st.sampled_from("abc"), min_size=1, max_size=30).map(
    lambda names: [(name, names[: number + 1].count(name)) for number, name in enumerate(names)]
)


@unhurried
@given(history=histories, data=st.data())
def test_the_cuts_of_messages_and_chunks_change_nothing(history: list[Event], data: st.DataObject) -> None:
    """Centrifugo packs lines into messages, a proxy cuts messages into frames, TCP cuts wherever it likes."""
    stream = b""
    ends: list[int] = []
    left = list(history)
    while left:
        packed = [left.pop(0) for _ in range(data.draw(st.integers(1, len(left))))]
        text = b"\n".join(push(event, text="x" * data.draw(st.sampled_from((0, 50, 70_000)))) for event in packed)
        stream += message(text, data.draw(st.integers(1, 3)))
        ends += [len(stream)] * len(packed)
    # Centrifugo's ping is a message as well.
    stream += message(b"{}")
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=20)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    arrivals = [float(sum(cut < end for cut in cuts)) for end in ends]

    chunks = [(float(at), piece) for at, piece in enumerate(pieces)]
    assert [at for at, _ in witness._publications(chunks)] == arrivals
    seen = witness._judge(chunks, len(history), mid_stream=False)
    assert (seen.received, seen.lost, seen.inverted, seen.duplicates) == (len(history), 0, 0, 0)
    assert seen.first_burst == arrivals.count(arrivals[0])

    near, far = socket.socketpair()
    with near, far:
        record = witness._Record(near, b"", 10.0, witness._MARK)
        for number, piece in enumerate(pieces):
            record._keep(piece)
            assert record.received == sum(at <= number for at in arrivals)


@pytest.mark.parametrize(
    ("versions", "wrong"),
    [((1, 2, 3), None), ((1, 3, 2), "0 lost, 2 out of order"), ((1, 2), "1 lost"), ((1, 2, 2), "1 lost")],
    ids=["sound", "inverted", "lost", "doubled in its place"],
)
def test_the_real_witness_refuses_wrong_runs(
    centrifugo: Centrifugo, channel: str, versions: Sequence[int], wrong: str | None
) -> None:
    with witness.Witness(centrifugo.ws_url, [channel], 3, seconds=1.0) as watching:
        for version in versions:
            tags = {"ob_id": "a", "ob_version": str(version)}
            httpx.post(
                f"{centrifugo.api_url}/publish",
                headers={"X-API-Key": centrifugo.api_key},
                json={"channel": channel, "data": {}, "tags": tags},
                trust_env=False,
            ).raise_for_status()
        if wrong is None:
            assert watching.wait().received == 3
        else:
            with pytest.raises(WrongRunError, match=wrong):
                watching.wait()


# What the sides are given


def test_all_sides_publish_the_same(empty_database_url: str, gateway: Gateway, run_relay: RunRelay) -> None:
    events, aggregates = 60, 20
    load.fill_ours(empty_database_url, events, "plain", aggregates)
    bodies: list[bytes] = []

    def keep(exchange: Exchange) -> None:
        bodies.append(exchange.body)
        exchange.answer(*exchange.forward())

    gateway.fault = keep
    run_relay(database_url=empty_database_url, api_url=gateway.url)
    ours = [command["publish"] for body in bodies for command in json.loads(body)["commands"]]

    load.fill_centrifugo(empty_database_url, events, "plain", 8, index=True, aggregates=aggregates)
    with psycopg.connect(empty_database_url) as connection:
        rows = connection.execute("SELECT method, payload, partition FROM centrifugo_outbox ORDER BY id").fetchall()
    assert {method for method, _, _ in rows} == {"publish"}
    partitions = {payload["tags"]["ob_id"]: partition for _, payload, partition in rows}
    assert all(partitions[payload["tags"]["ob_id"]] == partition for _, payload, partition in rows)
    assert set(partitions.values()) <= set(range(8))

    theirs = [payload for _, payload, _ in rows]
    listed = [json.loads(text) for text in load.requests(empty_database_url, events, "plain", aggregates)]
    assert len(ours) == len(theirs) == len(listed) == events
    assert comparable(ours) == comparable(theirs) == comparable(listed)
    assert all(len(json.dumps(request["data"], separators=(",", ":"))) == load.PAYLOAD_BYTES for request in ours)
    assert {request["channel"] for request in ours} <= set(load.channels("plain"))


def comparable(requests: Sequence[dict[str, Any]]) -> dict[Event, dict[str, Any]]:
    """Requests by aggregate and version, without what is each event's own; its key is checked here."""
    found = {}
    for request in requests:
        tags = dict(request["tags"])
        uuid = tags.pop("ob_event")
        assert re.fullmatch(r"[0-9a-f]{16}", tags.pop("ob_epoch"))
        assert re.fullmatch(rf"{uuid}:\d+", request["idempotency_key"])
        without_key = {name: value for name, value in request.items() if name not in {"idempotency_key", "tags"}}
        found[tags["ob_id"], int(tags["ob_version"])] = without_key | {"tags": tags}
    assert len({request["idempotency_key"] for request in requests}) == len(requests) == len(found)
    return found


# The harness


@dataclasses.dataclass
class Scripted:
    """A scenario whose samples are known, and a diary of who was measured when."""

    samples: Mapping[str, Sequence[float]]
    groups_of: Sequence[Sequence[str]]
    repetitions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    diary: list[str] = dataclasses.field(default_factory=list)
    name: str = "drain"
    title: str = "Drain"

    def groups(self, mode: Mode, stack: ExitStack) -> Iterator[list[Row]]:
        for keys in self.groups_of:
            yield [self.row(key) for key in keys]

    def row(self, key: str) -> Row:
        values = iter(self.samples[key])

        def measure() -> Sample:
            self.diary.append(key)
            value = next(values)
            return Sample(value, {"double": 2 * value})

        return Row(key, key.upper(), "events/s", measure, {"workers": 2}, self.repetitions.get(key))


def quiet(_: str) -> None:
    """Say nothing."""


def test_rows_of_a_group_take_turns() -> None:
    scenario = Scripted({key: range(5) for key in "abcd"}, ["abc", "d"], {"b": 2})
    results = harness.measure(scenario, FULL, say=quiet)
    assert "".join(scenario.diary) == "abcabcacacac" + "ddddd"
    assert [len(result.samples) for result in results] == [5, 2, 5, 5]


def test_a_median_is_one_of_all_samples() -> None:
    [result] = harness.measure(Scripted({"a": [5, 1, 100, 2, 3]}, ["a"]), FULL, say=quiet)
    assert result.median == 3
    assert result.samples == [5, 1, 100, 2, 3]
    assert result.figures == {"double": [10, 2, 200, 4, 6]}


def test_a_pattern_chooses_rows() -> None:
    scenario = Scripted({key: [1] for key in ("x/a", "x/b", "y/a")}, [["x/a", "x/b"], ["y/a"]])
    assert [result.key for result in harness.measure(scenario, QUICK, "x/*", quiet)] == ["x/a", "x/b"]
    assert scenario.diary == ["x/a", "x/b"]


def test_a_form_leaves_out_rows() -> None:
    scenario = Scripted({key: [1] for key in ("x/a", "x/b", "y/a")}, [["x/a", "x/b"], ["y/a"]])
    mode = dataclasses.replace(QUICK, left_out=("*/a",))
    assert [result.key for result in harness.measure(scenario, mode, say=quiet)] == ["x/b"]
    assert harness.measure(scenario, mode, "y/*", quiet) == []
    assert scenario.diary == ["x/b"]


@pytest.mark.parametrize("mode", [QUICK, SHORT, FULL], ids=lambda mode: mode.name)
def test_what_a_form_leaves_out_is_there_in_the_full_one(mode: Mode) -> None:
    """A row under another name would be measured after all. Something of every scenario is left."""
    keys = [
        row["key"]
        for path in (report.DOCUMENT.with_suffix("") / "raw").glob("*.json")
        for row in json.loads(path.read_text())["rows"]
    ]
    assert {key.partition("/")[0] for key in keys if mode.has(key)} == set(report.ORDER)
    for pattern in mode.left_out:
        assert fnmatch.filter(keys, pattern), pattern


def test_a_wrong_run_has_no_result() -> None:
    class Wrong(Scripted):
        def row(self, key: str) -> Row:
            def measure() -> Sample:
                raise WrongRunError("1 lost")

            return dataclasses.replace(super().row(key), measure=measure)

    with pytest.raises(WrongRunError):
        harness.measure(Wrong({"a": [1]}, ["a"]), QUICK, say=quiet)


FACTS = {
    "commit": "abc1234",
    "machine": {"cores": 2, "cpu": "a CPU"},
    "versions": {"PostgreSQL": "18.6"},
    "date": "2026-11-24T05:00:00+00:00",
}


def test_results_come_back_as_they_were_saved(tmp_path: Path) -> None:
    scenario = Scripted({"drain/us": [1.5, 2.5, 3.5, 4.5, 5.5]}, [["drain/us"]])
    results = harness.measure(scenario, FULL, say=quiet)
    harness.save(tmp_path / "drain.json", scenario, FULL, results, FACTS)
    run = report.read(tmp_path)
    assert run.scenarios == [report.Scenario("drain", "Drain", results)]
    assert (run.commit, run.mode, run.repetitions) == ("abc1234", "full", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["drain.json"]


# Ratios


def result(key: str, samples: Sequence[float], figures: Mapping[str, Sequence[float]] | None = None) -> Result:
    own = {name: list(values) for name, values in (figures or {}).items()}
    return Result(key, key.upper(), "events/s", {"workers": 2}, list(samples), own)


def by_key(*results: Result) -> dict[str, Result]:
    return {each.key: each for each in results}


HIGHER = Ratio("higher", "ours ÷ theirs", Of(("us",)), Of(("them",)), 2.0, 3.5, "higher")
LOWER = Ratio("lower", "ours ÷ theirs", Of(("us",)), Of(("them",)), 1.5, 1.2, "lower")


@pytest.mark.parametrize(
    ("ratio", "ours", "verdict"),
    [
        (HIGHER, 3.5, "holds"),
        (HIGHER, 3.499, "misses the aim"),
        (HIGHER, 2.0, "misses the aim"),
        (HIGHER, 1.999, "MISSED"),
        (LOWER, 1.2, "holds"),
        (LOWER, 1.201, "misses the aim"),
        (LOWER, 1.5, "misses the aim"),
        (LOWER, 1.501, "MISSED"),
    ],
)
def test_verdicts_at_the_bounds(ratio: Ratio, ours: float, verdict: str) -> None:
    assert judged(ratio, by_key(result("us", [ours]), result("them", [1.0]))).verdict == verdict


def test_a_ratio_is_of_medians_and_its_spread_of_neighbours() -> None:
    score = judged(HIGHER, by_key(result("us", [30, 20, 90]), result("them", [10, 20, 15])))
    assert (score.value, score.low, score.high) == (2.0, 1.0, 6.0)


def test_a_rival_is_taken_at_its_best() -> None:
    several = dataclasses.replace(HIGHER, to=Of(("slow", "fast")))
    results = by_key(result("us", [20, 20, 20]), result("slow", [1, 30, 1]), result("fast", [10, 10, 10]))
    assert judged(several, results).keys == ("us", "fast")
    quick = dataclasses.replace(LOWER, to=Of(("slow", "fast")))
    assert judged(quick, results).keys == ("us", "slow")


def test_a_figure_is_judged_in_the_place_of_the_value() -> None:
    alone = Ratio("p99", "p99", Of(("us",), "p99"), None, 5, 3, "lower", " ms")
    score = judged(alone, by_key(result("us", [1, 1, 1], {"p99": [2, 4, 9]})))
    assert (score.value, score.low, score.high, score.verdict) == (4, 2, 9, "misses the aim")
    assert judged(alone, by_key(result("us", [1]))).verdict == "not measured"


def test_what_was_not_measured_does_not_hold() -> None:
    assert judged(HIGHER, by_key(result("us", [9]))).verdict == "not measured"
    assert judged(HIGHER, by_key(result("them", [9]))).verdict == "not measured"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.04567, "0.0457"),
        (0.9999, "1.00"),
        (1.5, "1.50"),
        (99.96, "100"),
        (1234.5, "1,234"),
        (1e6, "1,000,000"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_the_table_is_sound() -> None:
    assert len({ratio.id for ratio in RATIOS}) == len({ratio.title for ratio in RATIOS}) == len(RATIOS)
    for ratio in RATIOS:
        assert ratio.verdict(ratio.aim) == "holds"
        assert ratio.verdict(ratio.at_least) == "misses the aim"
        keys = (*ratio.of.keys, *(ratio.to.keys if ratio.to else ()))
        assert {key.partition("/")[0] for key in keys} <= set(report.ORDER)
    assert set(NOTES) == set(report.ORDER)


# The report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of a run in which all is well but for one ratio that misses its aim and one that is owed."""
    folder = tmp_path / "results"
    group = "drain/redis/plain"
    rates = {"us": 20, "centrifugo-8": 10, "centrifugo-64": 9}
    drain = [result(f"{group}/{side}", [rate, rate + 1, rate + 2]) for side, rate in rates.items()]
    floor = [
        result("floor/us", [10, 10, 10], {"relay_us": [6], "postgresql_us": [14], "centrifugo_us": [12]}),
        result("floor/both", [12, 12, 12]),
    ]
    scale = [result(f"scale/5ms/us-{count}", [count]) for count in (1, 2, 4)]
    for name, results in {"scale": scale, "floor": floor, "drain": drain}.items():
        save(folder, name, results)
    return folder


def save(folder: Path, name: str, results: Sequence[Result], mode: Mode = FULL, **facts: Any) -> None:
    scenario = Scripted({}, [], name=name, title=f"<{name.title()}> & more")
    harness.save(folder / f"{name}.json", scenario, mode, results, FACTS | facts)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks").mkdir()
    return tmp_path / "benchmarks.md"


def test_the_report_is_complete(folder: Path, document: Path) -> None:
    report.write(folder, document)
    text = document.read_text()
    assert re.findall(r"^## .*", text, re.MULTILINE)[3:] == [
        f"## <{name}> & more" for name in ("Drain", "Scale", "Floor")
    ]
    for fact in ("abc1234", "a CPU", "18.6", "full; ", *(ratio.title for ratio in RATIOS)):
        assert fact in text
    assert "| DRAIN/REDIS/PLAIN/US (`us`) | events/s | 21.0 | 20.0 to 22.0 | 3 |" in text
    assert "1.91 | 1.83 to 2.00 | **MISSED** | `drain/redis/plain/us` ÷ `centrifugo-8` |" in text
    assert "make bench FULL=1 ARGS=\"--only 'drain/redis/plain/us'\"" in text
    assert "| 1 | postgresql, 142,857 events/s |" in text
    for target in re.findall(r"\]\((?!\.\./)([^)]+)\)", text):
        assert (document.parent / target).is_file(), target
    for target in re.findall(r"\]\(\.\./([^)]+)\)", text):
        assert (report.DOCUMENT.parents[1] / target).is_file(), target


def test_raw_data_is_what_was_measured(folder: Path, document: Path) -> None:
    (document.parent / "benchmarks" / "raw").mkdir()
    (document.parent / "benchmarks" / "raw" / "gone.json").touch()
    report.write(folder, document)
    raw = document.parent / "benchmarks" / "raw"
    assert {path.name for path in raw.iterdir()} == {"drain.json", "floor.json", "scale.json"}
    for path in raw.iterdir():
        assert json.loads(path.read_text()) == json.loads((folder / path.name).read_text())


def test_charts_are_svg_that_asks_nobody(folder: Path, document: Path) -> None:
    report.write(folder, document)
    text = (document.parent / "benchmarks" / "drain.svg").read_text()
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert root.attrib["role"] == "img"
    assert root.findtext(f"{space}title") == "<Drain> & more"
    assert "DRAIN/REDIS/PLAIN/US 21.0" in (root.findtext(f"{space}desc") or "")
    labels = [element.text for element in root.iter(f"{space}text")]
    assert {"DRAIN/REDIS/PLAIN/CENTRIFUGO-64", "10.0", "redis/plain, events/s"} <= set(labels)
    assert len([bar for bar in root.iter(f"{space}rect") if bar.attrib["class"] in {"ours", "theirs"}]) == 3
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r"https?://[^\"]*|url\(|@import|@font-face|<script", text) == ["http://www.w3.org/2000/svg"]


def test_what_is_missed_comes_first(folder: Path, document: Path) -> None:
    report.write(folder, document)
    first = document.read_text().split("\n\n")[1]
    assert first.startswith("**MISSED")
    assert "drain, Redis engine, no history, rows kept ÷ Centrifugo's best tuning" in first
    assert "CPU of the relay's process per event" in first
    assert "were not measured in this run.**" in document.read_text().split("\n\n")[2]


def test_reasons_stand_where_something_stands_between(folder: Path, document: Path) -> None:
    reasons = document.parent / "benchmarks" / report.REASONS
    reasons.write_text("# Reasons\n\n## python\n\nThe interpreter takes 4 µs.\n\n## floor\n\nIt holds.\n")
    report.write(folder, document)
    between = document.read_text().partition("## What stands between")[2].partition("\n## ")[0]
    assert (
        "**CPU of the relay's process per event, full batches**: 6.00 µs; the aim is 3 µs. The interpreter" in between
    )
    assert f"the aim is 3.5. *{report.NO_REASON}* (`drain-redis-plain-us-best`)" in between
    assert "It holds." not in between
    reasons.write_text("## flor\n\nA typing error.\n")
    with pytest.raises(ValueError, match="flor"):
        report.write(folder, document)


@pytest.mark.parametrize(
    ("name", "mode", "facts"),
    [
        ("commit", FULL, {"commit": "def5678"}),
        ("commit", FULL, {"commit": "abc1234+changes"}),
        ("mode", QUICK, {}),
        ("machine", FULL, {"machine": {"cores": 64}}),
        ("versions", FULL, {"versions": {"PostgreSQL": "14"}}),
    ],
)
def test_files_of_two_runs_are_refused(
    folder: Path, document: Path, name: str, mode: Mode, facts: Mapping[str, Any]
) -> None:
    save(folder, "hot", [result("hot/us", [1])], mode, **facts)
    with pytest.raises(report.MixedFilesError, match=f"more than one {name}"):
        report.write(folder, document)
    assert not document.exists()


def test_nothing_measured_is_no_report(tmp_path: Path, document: Path) -> None:
    with pytest.raises(report.MixedFilesError, match="no results"):
        report.write(tmp_path / "nowhere", document)


def test_changes_in_no_commit_are_said(folder: Path, document: Path) -> None:
    for path in folder.iterdir():
        path.write_text(path.read_text().replace("abc1234", "abc1234+changes"))
    report.write(folder, document)
    assert "**Measured with changes that are in no commit.**" in document.read_text()


@pytest.mark.parametrize("strict", [False, True])
def test_strict_is_an_exit_status(folder: Path, document: Path, monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    write: Callable[[Path, Path], Any] = report.write
    monkeypatch.setattr(report, "write", lambda chosen: write(chosen, document))
    assert report.main([str(folder), *(["--strict"] if strict else [])]) == strict
    assert document.exists()
