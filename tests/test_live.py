"""The client helpers over real servers: a page shows what the database has, whatever happens in between."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from outbox_relay.centrifugo import Centrifugo as Publisher
from outbox_relay.embedded.centrifugo import Centrifugo
from outbox_relay.options import Options
from outbox_relay.packing import Wire
from tests.conftest import Connect, RunRelay
from tests.support.pages import NodePage, OpenPage, Page, PythonPage, let_close
from tests.support.proxy import TcpProxy
from tests.support.shop import Order, Shop, Website
from tests.support.subscriber import Subscriber
from tests.support.waiting import PATIENCE, wait_until
from tests.test_readme import examples

MAP = Options(wires={"map": Wire("map")})
ON_MAPS = {"MAP": "1"}
LIVE_PAGES = examples(Path(__file__).parent.parent / "docs" / "live-pages.md")


@pytest.fixture
def website(shop: Shop) -> Iterator[Website]:
    with Website(shop) as website:
        yield website


@pytest.fixture(params=[PythonPage, NodePage], ids=["python", "javascript"])
def open_page(request: pytest.FixtureRequest) -> OpenPage:
    opens: OpenPage = request.param
    return opens


def wait_for_truth(page: Page, shop: Shop) -> None:
    """The page shows what the database has, and says that it does."""
    wait_until(lambda: page.views and page.views[-1].shown == shop.rows() and not page.views[-1].old, "the truth")


def never_went_back(page: Page) -> bool:
    highest: dict[str, int] = {}
    for view in page.views:
        for key, order in view.shown.items():
            if order.version < highest.get(key, 0):
                return False
            highest[key] = order.version
    return True


def test_shows_what_the_database_has(
    shop: Shop, website: Website, open_page: OpenPage, centrifugo: Centrifugo, run_relay: RunRelay
) -> None:
    shop.save("1", "placed")
    shop.save("2", "placed")
    with open_page(centrifugo.ws_url, shop, website) as page:
        wait_for_truth(page, shop)
        run_relay()  # late: the page has loaded what these events tell
        shop.save("1", "paid")
        shop.delete("2")
        shop.save("3", "placed")
        run_relay()
        wait_for_truth(page, shop)
        shop.save("2", "placed again")
        run_relay()
        wait_for_truth(page, shop)
        assert website.requests == [None, ["3"]]
    assert never_went_back(page)


def test_bundles_are_unpacked(
    shop: Shop,
    website: Website,
    open_page: OpenPage,
    centrifugo: Centrifugo,
    run_relay: RunRelay,
    relay_options: Options,
    subscribe: Callable[..., Subscriber],
) -> None:
    """What the relay packs, the helpers unpack."""
    shop.save("1", "placed")
    shop.save("2", "placed")
    run_relay()
    subscriber = subscribe(shop.channel)
    with open_page(centrifugo.ws_url, shop, website) as page:
        wait_for_truth(page, shop)
        shop.save("3", "placed")
        run_relay()
        wait_for_truth(page, shop)  # so it is subscribed, and has loaded what it was too late for
        applied = page.views[-1].counters["applied"]
        for status in ("paid", "packed", "shipped"):
            shop.save("1", status)
        shop.delete("2")
        run_relay(replace(relay_options, wires={"hist": Wire(bundle_events=10)}))
        wait_for_truth(page, shop)
        assert page.views[-1].shown["1"] == Order(4, "shipped")
        assert page.views[-1].counters["applied"] > applied, "a page that cannot read it loads everything instead"
    assert subscriber.wait_for(4)[-1].tags["ob_bundle"] == "4"
    assert never_went_back(page)


def test_a_gap_has_its_object_loaded(
    shop: Shop, website: Website, open_page: OpenPage, centrifugo: Centrifugo, run_relay: RunRelay, connect: Connect
) -> None:
    """The event has expired before it was sent. The page hears of it nevertheless, and asks for that order alone."""
    shop.save("1", "placed")
    shop.save("2", "placed")
    run_relay()
    with open_page(centrifugo.ws_url, shop, website) as page:
        wait_for_truth(page, shop)
        shop.save("1", "paid")
        connect().execute("UPDATE outbox SET expires_at = now() WHERE state = 'pending'")
        run_relay()
        wait_for_truth(page, shop)
        assert page.views[-1].counters["gaps"] == 1
        assert website.requests == [None, ["1"]]
    assert never_went_back(page)


def test_after_an_outage_that_forgot_everything(
    shop: Shop,
    website: Website,
    open_page: OpenPage,
    start_centrifugo: Callable[..., Centrifugo],
    run_relay: RunRelay,
) -> None:
    server = start_centrifugo()
    shop.save("1", "placed")
    shop.save("2", "placed")
    with open_page(server.ws_url, shop, website) as page:
        wait_for_truth(page, shop)
        server.kill()
        wait_until(lambda: page.views[-1].old, "the page says that it is old")
        shop.save("1", "paid")
        shop.delete("2")
        shop.save("3", "placed")
        server.start()
        wait_for_truth(page, shop)
        run_relay(server=server)  # all of it late
        shop.save("1", "shipped")
        run_relay(server=server)
        wait_for_truth(page, shop)
        assert page.views[-1].counters["reloads"] >= 1
    assert never_went_back(page)


def test_a_state_that_is_not_to_be_had(
    shop: Shop,
    website: Website,
    open_page: OpenPage,
    start_centrifugo: Callable[..., Centrifugo],
    run_relay: RunRelay,
) -> None:
    server = start_centrifugo()
    shop.save("1", "placed")
    with open_page(server.ws_url, shop, website) as page:
        wait_for_truth(page, shop)
        website.failing = True
        server.restart()
        wait_until(lambda: len(website.requests) >= 3, "the page tries again")
        assert page.views[-1].shown == shop.rows(), "the last truth stays"
        assert page.views[-1].old, "and is marked as old"
        shop.save("1", "paid")
        website.failing = False
        wait_for_truth(page, shop)
    assert never_went_back(page)


@pytest.fixture
def map_shop(database_url: str) -> Shop:
    """A shop whose pages follow a map channel."""
    return Shop(database_url, f"map:{uuid.uuid4().hex}")


@pytest.fixture
def map_website(map_shop: Shop) -> Iterator[Website]:
    with Website(map_shop) as website:
        yield website


@pytest.fixture
def map_server(start_centrifugo: Callable[..., Centrifugo]) -> Centrifugo:
    """It keeps a map's last four publications."""
    mapped = {
        "name": "map",
        "subscription_type": "map",
        "map": {"mode": "recoverable", "key_ttl": "60s", "stream_size": 4},
        "allow_subscribe_for_client": True,
        "allow_subscribe_for_anonymous": True,
    }
    return start_centrifugo({"channel": {"namespaces": [mapped]}})


def write_again(shop: Shop, id_: str, version: int) -> None:
    """The event of an older version, as a writer leaves it who breaks the contract."""
    with psycopg.connect(shop.database_url) as connection:
        connection.execute(
            "INSERT INTO outbox (aggregate_type, aggregate_id, version, channels, payload, kind)"
            " VALUES ('order', %s, %s, %s, '{}', 'snapshot')",
            (id_, version, [shop.channel]),
        )


def forget(server: Centrifugo, channel: str, *keys: str) -> None:
    """Let a map forget its entries, as it does by itself when they are older than `key_ttl`."""
    with closing(Publisher(server.api_url, server.api_key)) as publisher:
        answers = publisher.ask([json.dumps({"map_remove": {"channel": channel, "key": key}}) for key in keys])
    assert isinstance(answers, list), answers
    assert all("suppressed" not in answer["map_remove"] for answer in answers), answers


def test_a_map_channel(
    map_shop: Shop, map_website: Website, map_server: Centrifugo, run_relay: RunRelay, connect: Connect
) -> None:
    """Snapshots and a tombstone arrive. What is stale does not: Centrifugo drops it. When the map forgets its entries,
    that is no news of the objects; then it lets stale ones through, and the page drops them."""
    shop, server = map_shop, map_server
    shop.save("1", "placed")
    shop.save("2", "placed")
    run_relay(MAP, server=server)
    with NodePage(server.ws_url, shop, map_website, environment=ON_MAPS) as page:
        wait_for_truth(page, shop)
        shop.save("1", "paid")
        shop.delete("2")
        write_again(shop, "1", 1)
        shop.save("3", "placed")
        run_relay(MAP, server=server)
        wait_for_truth(page, shop)
        assert page.views[-1].counters == {"applied": 2, "stale": 0, "duplicate": 0, "gaps": 0, "reloads": 1}
        forget(server, shop.channel, "order/1", "order/2", "order/3")
        write_again(shop, "1", 1)
        run_relay(MAP, server=server)
        shop.save("1", "shipped")
        run_relay(MAP, server=server)
        wait_for_truth(page, shop)
        assert page.views[-1].counters == {"applied": 3, "stale": 1, "duplicate": 0, "gaps": 0, "reloads": 1}
        assert map_website.requests == [None, ["3"]]
    assert never_went_back(page)
    [superseded] = connect().execute("SELECT version FROM outbox WHERE state = 'superseded'").fetchall()
    assert superseded == (1,)


@pytest.mark.parametrize("missed", [3, 9], ids=["recovered", "more than the stream holds"])
def test_a_map_channel_after_missed_publications(
    map_shop: Shop, map_website: Website, map_server: Centrifugo, run_relay: RunRelay, missed: int
) -> None:
    """What the stream still has comes by itself; else everything is loaded."""
    shop, server = map_shop, map_server
    for name in ("1", "2"):
        shop.save(name, "placed")
    run_relay(MAP, server=server)
    address = urlsplit(server.ws_url)
    assert address.hostname is not None
    assert address.port is not None
    with (
        TcpProxy(address.hostname, address.port) as proxy,
        NodePage(
            urlunsplit(address._replace(netloc=f"127.0.0.1:{proxy.port}")), shop, map_website, environment=ON_MAPS
        ) as page,
    ):
        wait_for_truth(page, shop)
        proxy.cut()
        wait_until(lambda: page.views[-1].old, "the page says that it is old")
        for n in range(missed - 1):
            shop.save("1", str(n))
        shop.delete("2")
        run_relay(MAP, server=server)
        proxy.mend()
        wait_for_truth(page, shop)
        assert map_website.requests == ([None] if missed == 3 else [None, None])
    assert never_went_back(page)


def test_a_page_that_cannot_subscribe_says_why(
    map_shop: Shop,
    map_website: Website,
    map_server: Centrifugo,
    open_page: OpenPage,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A stream's subscription to a map channel, the only one that centrifuge-python has: what is shown was loaded, and
    stays marked as old."""
    map_shop.save("1", "placed")
    why = f"no subscription to {map_shop.channel}: permission denied"
    with open_page(map_server.ws_url, map_shop, map_website) as page:
        wait_until(lambda: bool(page.views) and page.views[-1].shown == map_shop.rows(), "the state is loaded")
        assert page.views[-1].old
        wait_until(lambda: why in (page.errors if isinstance(page, NodePage) else caplog.text), "it says why")
    assert all(view.old for view in page.views)


def test_the_example_for_python(shop: Shop, centrifugo: Centrifugo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    names: dict[str, Any] = {}
    code = LIVE_PAGES["live"].code
    code = code.replace("ws://localhost:8000/connection/websocket", centrifugo.ws_url)
    exec(code.replace("shop:orders", shop.channel), names)
    shop.save("1", "placed")

    async def load(keys: tuple[str, ...] | None) -> list[dict[str, Any]]:
        objects: list[dict[str, Any]] = shop.state(None if keys is None else list(keys))["objects"]
        return objects

    async def see() -> dict[str, Any]:
        seen: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        def show(live: Any) -> None:
            if not live.old and not seen.done():
                seen.set_result({key: shown.data for key, shown in live.objects.items()})

        async with asyncio.TaskGroup() as group:
            following = group.create_task(names["follow"](load, show))
            objects = await asyncio.wait_for(seen, PATIENCE)
            following.cancel()
        await let_close()
        return objects

    assert asyncio.run(see()) == {"1": {"id": "1", "version": 1, "status": "placed"}}
