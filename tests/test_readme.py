"""The examples of README.md and docs/writing-events.md, run as they are printed; only addresses are replaced."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import sqlalchemy as sa
from alembic.config import Config
from playwright.sync_api import Browser, expect

import alembic
from alembic import command
from outbox_relay import InvalidEventError, direct, enqueue
from outbox_relay.embedded.centrifugo import DEFAULT_CONFIG, Centrifugo
from outbox_relay.embedded.postgres import find_binaries
from tests.conftest import Connect, RunRelay, StartRelay, sqlalchemy_engine
from tests.support.node import run_node
from tests.support.shop import Shop, Website
from tests.support.subscriber import Subscriber, as_json

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
WRITING = ROOT / "docs" / "writing-events.md"

_BLOCK = re.compile(
    r"^<!-- example: (?P<name>[a-z-]+) -->\n```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_ADDRESS = re.compile(r"postgresql(\+\w+)?://localhost/shop")


class Example(NamedTuple):
    language: str
    code: str


def examples(document: Path) -> dict[str, Example]:
    """The fenced blocks that follow a comment `<!-- example: NAME -->`, by name."""
    found = {
        match["name"]: Example(match["language"], match["code"]) for match in _BLOCK.finditer(document.read_text())
    }
    assert len(found) == document.read_text().count("<!-- example: "), f"a marker without a block in {document.name}"
    return found


EXAMPLES = {**examples(README), **examples(WRITING)}


class Row(NamedTuple):
    """A row of the outbox, as far as a writer says what is in it."""

    aggregate_type: str
    aggregate_id: str
    version: int
    kind: str
    channels: list[str]
    payload: Any
    tags: dict[str, str] | None


class Book:
    """Runs examples one after the other in one namespace, as a reader does."""

    def __init__(self, database_url: str) -> None:
        self.url = database_url
        self.names: dict[str, Any] = {"__name__": "example"}

    def run(self, name: str) -> None:
        language, code = EXAMPLES[name]
        assert language == "python"
        exec(compile(self.addressed(code), f"<example {name}>", "exec", dont_inherit=True), self.names)

    def addressed(self, text: str) -> str:
        """The text with the test's database in place of the example's."""
        return _ADDRESS.sub(
            lambda match: (
                sa.make_url(self.url)
                .set(drivername=f"postgresql{match[1] or ''}")
                .render_as_string(hide_password=False)
            ),
            text,
        )

    def rows(self) -> list[Row]:
        with psycopg.connect(self.url) as connection:
            rows = connection.execute(
                "SELECT aggregate_type::text, aggregate_id::text, version, kind::text, channels::text[], payload::json,"
                " tags::jsonb FROM outbox ORDER BY id"
            )
            return [Row(*row) for row in rows]


@pytest.fixture
def book(database_url: str) -> Iterator[Book]:
    """After the first example of the README: order 1 is placed, at version 1."""
    book = Book(database_url)
    book.run("quick-start")
    yield book
    book.names["engine"].dispose()


def paid(version: int = 2, payload: Any = None) -> Row:
    return Row("orders", "1", version, "change", ["shop:orders"], payload or {"status": "paid"}, None)


PLACED = paid(1, {"id": 1, "status": "placed"})


def test_every_example_is_run() -> None:
    run = {"centrifugo"} | {
        name
        for test in Path(__file__).read_text().split("\ndef test_")[1:]
        for name in re.findall(r'(?:run|EXAMPLES|psql)[\[(](?:book, )?"([a-z-]+)"', test)
    }
    assert run >= EXAMPLES.keys(), f"no test runs {sorted(EXAMPLES.keys() - run)}"


def test_the_code_comes_early_and_is_short() -> None:
    text = README.read_text()
    code = EXAMPLES["quick-start"].code
    assert text[: text.index(code)].count("\n") <= 30
    assert code.count("\n") <= 30


def test_quick_start(book: Book) -> None:
    assert book.rows() == [PLACED]


def test_session(book: Book) -> None:
    book.run("session")
    snapshot = Row(
        "orders", "1", 2, "snapshot", ["shop:orders", "shop:order-1"], {"id": 1, "status": "paid"}, {"status": "paid"}
    )
    assert book.rows() == [PLACED, snapshot]


def test_async(book: Book) -> None:
    book.run("async")

    async def pay() -> None:
        await book.names["pay"](1)
        await book.names["async_engine"].dispose()

    asyncio.run(pay())
    assert book.rows() == [PLACED, paid()]


def test_core(book: Book) -> None:
    book.run("core")
    assert book.rows() == [PLACED, paid()]


def test_psycopg(book: Book) -> None:
    book.run("psycopg")
    assert book.rows() == [PLACED, paid()]


def psql(book: Book, name: str) -> None:
    """Give an example to the real psql."""
    language, code = EXAMPLES[name]
    assert language == "sql"
    subprocess.run(
        [find_binaries() / "psql", "--no-psqlrc", "-v", "ON_ERROR_STOP=1", book.url],
        input=code,
        text=True,
        check=True,
        capture_output=True,
    )


def test_psql(book: Book) -> None:
    psql(book, "psql")
    assert book.rows() == [PLACED, paid()]


def test_plain_insert(book: Book) -> None:
    psql(book, "insert")
    assert book.rows()[1:] == [Row("orders", "7", 1, "change", ["shop:orders"], {"status": "placed"}, None)]


def test_the_trap_is_one(book: Book) -> None:
    book.names["enqueue"] = enqueue
    book.run("trap")
    with psycopg.connect(book.url) as connection:
        assert connection.execute("SELECT version FROM orders").fetchone() == (2,)
    assert book.rows()[1].version == 1
    new = book.names["Order"](status="placed")
    with pytest.raises(InvalidEventError, match="flush first"):
        enqueue("orders", 2, version=new.version, channels="shop:orders", payload={})


def test_the_cure(book: Book) -> None:
    book.run("cure")
    assert book.rows() == [PLACED, paid(2, {"status": "shipped"})]


def test_in_process(
    book: Book, centrifugo: Centrifugo, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTBOX_RELAY_DATABASE_URL", book.url)
    monkeypatch.setenv("OUTBOX_RELAY_CENTRIFUGO_URL", centrifugo.api_url)
    monkeypatch.setenv("OUTBOX_RELAY_CENTRIFUGO_API_KEY", centrifugo.api_key)
    book.run("in-process")


def test_lock_first(book: Book) -> None:
    book.run("lock-first")
    assert book.rows() == [PLACED, paid(2, {"status": "shipped"})]


def test_own_outbox(book: Book) -> None:
    book.run("own-outbox")
    assert book.rows()[1:] == [Row("orders", "2", 1, "change", ["shop:orders"], {"status": "placed"}, None)]


def test_tombstone(book: Book) -> None:
    book.names["enqueue"] = enqueue
    book.run("tombstone")
    assert book.rows() == [PLACED, Row("orders", "1", 2, "tombstone", ["shop:orders"], {}, None)]
    with psycopg.connect(book.url) as connection:
        assert connection.execute("SELECT count(*) FROM orders").fetchone() == (0,)


def test_versions_from_a_clock_survive_deletion(book: Book) -> None:
    book.run("clock")
    names = book.names
    names["Base"].metadata.create_all(names["engine"])
    seen = []
    for _ in range(2):
        with names["Session"](names["engine"]) as session, session.begin():
            cart = names["Cart"](id="c")
            session.add(cart)
            session.flush()
            seen.append(cart.version)
            session.delete(cart)
    assert 2**53 > seen[1] > seen[0] > 1_700_000_000_000_000


def test_a_class_that_publishes(book: Book) -> None:
    book.run("publishes")
    names = book.names
    names["Base"].metadata.create_all(names["engine"])
    with names["Session"](names["engine"]) as session:
        ticket = names["Ticket"](title="old")
        session.add(ticket)
        session.commit()
        book.run("bulk")
        session.delete(ticket)
        session.commit()
    ticket_row = Row("tickets", "1", 1, "snapshot", ["shop:tickets", "shop:ticket-1"], {"id": 1, "title": "old"}, None)
    assert book.rows()[1:] == [
        ticket_row,
        ticket_row._replace(version=2, payload={"id": 1, "title": "new"}),
        ticket_row._replace(version=3, kind="tombstone", payload={}),
    ]


def test_a_version_of_the_databases_own(book: Book) -> None:
    with psycopg.connect(book.url) as connection:
        connection.execute("CREATE TABLE stocks (id serial PRIMARY KEY, count int)")
    psql(book, "trigger")
    book.run("server-version")
    names = book.names
    with names["Session"](names["engine"]) as session:
        stock = names["Stock"](count=1)
        session.add(stock)
        session.commit()
        stock.count = 2
        session.commit()
    assert [(row.aggregate_type, row.version, row.payload) for row in book.rows()[1:]] == [
        ("stocks", 1, {"count": 1}),
        ("stocks", 2, {"count": 2}),
    ]


def test_direct(
    book: Book,
    start_centrifugo: Callable[..., Centrifugo],
    subscribe: Callable[..., Subscriber],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start_centrifugo(
        {
            "channel": {
                "namespaces": [
                    {"name": "shop", "allow_subscribe_for_client": True, "allow_subscribe_for_anonymous": True}
                ]
            }
        }
    )
    subscriber = subscribe("shop:order-1", server=server)
    monkeypatch.setenv("OUTBOX_RELAY_CENTRIFUGO_URL", server.api_url)
    monkeypatch.setenv("OUTBOX_RELAY_CENTRIFUGO_API_KEY", server.api_key)
    direct.default.cache_clear()
    book.run("direct")
    direct.default().close()
    direct.default.cache_clear()
    assert [publication.aggregate for publication in subscriber.wait_for(1)] == [("typing", "ann")]


def test_drift(book: Book) -> None:
    with psycopg.connect(book.url) as connection:
        connection.execute("ALTER TABLE orders ADD COLUMN updated_at timestamptz DEFAULT now()")
        connection.execute("INSERT INTO orders (version, status) VALUES (1, 'forgotten')")
    verb = shlex.split(EXAMPLES["drift"].code)
    ended = subprocess.run(
        [Path(sys.executable).parent / verb[0], *verb[1:]],
        env={**os.environ, "OUTBOX_RELAY_DATABASE_URL": book.url},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout.splitlines()[1].split(None, 3) == ["2", "1", "-", "it was changed without an event"]


def test_the_epoch_in_the_applications_state(book: Book) -> None:
    answers = []
    for _ in range(2):
        book.run("epoch")
        answers.append(book.names["answer"])
        verb = shlex.split(EXAMPLES["bump"].code)
        subprocess.run(
            [Path(sys.executable).parent / verb[0], *verb[1:]],
            env={**os.environ, "OUTBOX_RELAY_DATABASE_URL": book.url},
            check=True,
            capture_output=True,
        )
    assert [answer["objects"] for answer in answers] == [[{"id": 1, "version": 1}]] * 2
    assert answers[0]["epoch"] != answers[1]["epoch"]


def test_live_table(shop: Shop, centrifugo: Centrifugo, run_relay: RunRelay, browser: Browser, tmp_path: Path) -> None:
    """In a real browser, bundled as an application bundles it."""
    code = EXAMPLES["live-table"].code
    assert sum(bool(line) for line in code.splitlines()) <= 10
    (tmp_path / "page.js").write_text(
        code.replace("ws://localhost:8000/connection/websocket", centrifugo.ws_url).replace("shop:orders", shop.channel)
    )
    run_node("build.js", tmp_path / "page.js", tmp_path / "bundle.js")
    page = b'<!doctype html><table id="table"></table><script src="/bundle.js"></script>'
    shop.save("1", "placed")
    shop.save("2", "<b>placed</b>")
    with Website(shop, {"/": page, "/bundle.js": tmp_path / "bundle.js"}) as website:
        tab = browser.new_page()
        tab.goto(website.url)
        expect(tab.locator("tr")).to_have_text(["1 placed", "2 <b>placed</b>"])
        shop.save("1", "paid")
        shop.delete("2")
        shop.save("3", "placed")
        run_relay()
        expect(tab.locator("tr")).to_have_text(["1 paid", "3 placed"])
        tab.close()


# The verbs, with Centrifugo configured as the README says, from the first example to a subscriber.


def test_from_the_first_example_to_a_subscriber(
    empty_database_url: str,
    start_centrifugo: Callable[..., Centrifugo],
    subscribe: Callable[..., Subscriber],
    start_relay: StartRelay,
    tmp_path: Path,
) -> None:
    config = json.loads(EXAMPLES["centrifugo"].code)
    config["channel"]["namespaces"][0]["allow_subscribe_for_anonymous"] = True  # no tokens here
    server = start_centrifugo({"channel": config["channel"]})
    subscriber = subscribe("shop:orders", server=server)
    migrate, check, run = (shlex.split(line, comments=True) for line in EXAMPLES["verbs"].code.splitlines())
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OUTBOX_RELAY_DATABASE_URL": empty_database_url,
        "OUTBOX_RELAY_CENTRIFUGO_URL": server.api_url,
        "OUTBOX_RELAY_CENTRIFUGO_API_KEY": server.api_key,
    }
    for verb in (migrate, check):
        subprocess.run(verb, env=environment, cwd=tmp_path, check=True, capture_output=True)
    book = Book(empty_database_url)
    book.run("quick-start")
    book.names["engine"].dispose()
    program = Path(sys.executable).parent / run[0]
    relay = start_relay({"database_url": empty_database_url}, server=server, command=[str(program), *run[1:]])
    publication = subscriber.wait_for(1)[0]
    assert (publication.aggregate, publication.version) == (("orders", "1"), 1)
    assert as_json(publication) == {"id": 1, "status": "placed"}
    relay.signal(signal.SIGTERM)
    assert relay.wait() == 0
    assert DEFAULT_CONFIG["client"]["allow_anonymous_connect_without_token"]  # why the JSON above can do without


# Migrations in the application's own tree.


@contextmanager
def own_tree(folder: Path, url: str, env: str) -> Iterator[Config]:
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(env)
    template = Path(alembic.__file__).parent / "templates" / "generic" / "script.py.mako"
    (folder / "script.py.mako").write_text(template.read_text())
    config = Config(stdout=open(os.devnull, "w"))  # noqa: SIM115
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    try:
        yield config
    finally:
        config.stdout.close()


def env_py(url: str) -> str:
    """The example's `env.py` below an application's own lines."""
    return (
        "import sqlalchemy as sa\nfrom sqlalchemy.orm import DeclarativeBase\n"
        "class Base(DeclarativeBase): pass\n"
        f"engine = sa.create_engine({sqlalchemy_engine(url).url.render_as_string(hide_password=False)!r},"
        " poolclass=sa.NullPool)\n" + EXAMPLES["env"].code
    )


def has_outbox(url: str) -> bool:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT to_regclass('outbox') IS NOT NULL").fetchone()
    return row == (True,)


def test_a_revision_of_ones_own(empty_database_url: str, tmp_path: Path) -> None:
    with own_tree(tmp_path / "tree", empty_database_url, env_py(empty_database_url)) as config:
        (tmp_path / "tree" / "versions" / "add_outbox.py").write_text(EXAMPLES["revision"].code)
        command.upgrade(config, "head")
        assert has_outbox(empty_database_url)
        command.check(config)
        command.downgrade(config, "base")
        assert not has_outbox(empty_database_url)


def test_autogenerate(empty_database_url: str, tmp_path: Path) -> None:
    with own_tree(tmp_path / "tree", empty_database_url, env_py(empty_database_url)) as config:
        command.revision(config, "outbox", autogenerate=True)
        (revision,) = (tmp_path / "tree" / "versions").glob("*.py")
        assert "outbox_relay.migrations.upgrade(op, to=1)" in revision.read_text()
        command.upgrade(config, "head")
        assert has_outbox(empty_database_url)
        command.check(config)


def test_roles(book: Book, run_relay: RunRelay) -> None:
    language, code = EXAMPLES["roles"]
    assert language == "sh"
    program, *arguments = shlex.split(code)
    names = {f"{role}={name}": f"{role}={name}_{os.getpid()}" for role, name in ROLES.items()}
    with psycopg.connect(book.url, autocommit=True) as connection:
        try:
            subprocess.run(
                [find_binaries() / program, *(names.get(argument, argument) for argument in arguments), book.url],
                cwd=ROOT,
                check=True,
                capture_output=True,
            )
            relay, writer = (f"{ROLES[role]}_{os.getpid()}" for role in ("relay", "writer"))
            connection.execute(f"SET ROLE {writer}")
            connection.execute(EXAMPLES["insert"].code)
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("SELECT FROM outbox")
            connection.execute(f"SET ROLE {relay}")
            connection.execute("UPDATE outbox SET error = NULL")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(EXAMPLES["insert"].code)
        finally:
            connection.execute("RESET ROLE")
            for name in ROLES.values():
                connection.execute(f"DROP OWNED BY {name}_{os.getpid()}")
                connection.execute(f"DROP ROLE {name}_{os.getpid()}")


ROLES = {"owner": "outbox_owner", "writer": "app", "relay": "outbox_relay"}
