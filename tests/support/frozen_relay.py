"""`python -m tests.support.frozen_relay POINT`: a relay that stops itself (SIGSTOP), once, at a point of its path.

Everything else is the real thing, configured as `outbox-relay run` is. A signal from outside cannot hit these
points on purpose.
"""

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from outbox_relay import build, config, log
from outbox_relay.centrifugo import Centrifugo
from outbox_relay.relay import Relay
from outbox_relay.store import Store

POINTS = {
    "before it looks at its lock": (Store, "request_deadline"),
    "before it sends": (Centrifugo, "publish"),
    "before it settles": (Store, "settle"),
    "before it commits": (Store, "_settle"),
}


def main(arguments: Sequence[str]) -> None:
    owner, name = POINTS[arguments[0]]
    _freeze_once(owner, name, after=arguments[0] == "before it commits")
    settings = config.load({})
    log.configure(settings.log_format, settings.log_level, settings.secrets())
    relay: Relay = build.build_relay(settings)
    signal.signal(signal.SIGTERM, lambda *_: relay.stop())
    relay.run()


def _freeze_once(owner: type, name: str, *, after: bool) -> None:
    original: Callable[..., Any] = getattr(owner, name)
    once = threading.Lock()

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs) if after else None
        if once.acquire(blocking=False):
            # To this thread: it takes the signal before it goes on. One to the process may be taken by another.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return result if after else original(*args, **kwargs)

    setattr(owner, name, wrapper)


if __name__ == "__main__":
    main(sys.argv[1:])
