"""The board on this machine: real servers, the application, its page. `python -m examples.board [--port N]`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn
from fastapi import FastAPI, HTTPException

from examples.board.app import create_app
from examples.board.harm import HARM, Playground

START_SECONDS: Final = 30


def create_board(playground: Playground) -> FastAPI:
    """The application, with the buttons that do harm beside it."""
    app = create_app(lambda: playground.engine, lambda: playground.stage.centrifugo.ws_url)

    @app.get("/harm")
    def harms() -> dict[str, str]:
        return {name: harm.label for name, harm in HARM.items()}

    @app.post("/harm/{name}", status_code=204)
    def do(name: str) -> None:
        if name not in HARM:
            raise HTTPException(404)
        playground.harm(name)

    return app


@contextmanager
def serve(app: FastAPI, port: int = 0) -> Iterator[str]:
    """Serve an application on 127.0.0.1 in a thread, and yield its address."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off", ws="none")
    )
    started = threading.Event()
    thread = threading.Thread(target=_run, args=(server, started), name="web server", daemon=True)
    thread.start()
    try:
        if not started.wait(START_SECONDS):
            raise RuntimeError("the web server does not start")
        [listening] = server.servers[0].sockets
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_SECONDS)


def _run(server: uvicorn.Server, started: threading.Event) -> None:
    startup = server.startup

    async def announced(*args: object, **named: object) -> None:
        await startup(*args, **named)  # type: ignore[arg-type]
        started.set()

    server.startup = announced  # type: ignore[method-assign]
    server.run()


def main(tell: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8080, help="port of the page; 0 takes a free one")
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with Playground(tell) as playground, serve(create_board(playground), arguments.port) as url:
        tell(f"the board: {url} (Ctrl-C ends it)")
        stop.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
