"""Chromium: Debian's program, driven by Playwright. See `debian_program` for where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

from tests.support.programs import debian_program


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window, in which nothing but the loopback address is reached."""
    program = debian_program("chromium", "chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program,
            # There is no sandbox for root. Nothing is fetched from outside, by the browser itself neither.
            args=[
                "--no-sandbox",
                "--disable-background-networking",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
        )
        try:
            yield browser
        finally:
            browser.close()
