"""Runs one server and outlives neither it nor the process that asked for it. A program, not a module.

Started by `_process.Process` as `python -I -S _supervisor.py SPEC`. SPEC is a JSON object: `command`
(strings), `user` ([uid, gid] to run it as, or null), `orphan_signal` (what the server gets once our parent
has gone) and `remove` (a folder to delete in that case, or null). Standard output carries one line, the
server's process id; the server's own output goes to our standard error. Ends with the server's exit status,
128 + N for signal N.

Standard input is a pipe that only the parent holds, so its end means that the parent has gone, however it
died and whichever of its threads started us. PR_SET_PDEATHSIG on the server itself covers our own sudden
death; it is safe here and would not be in the parent, because it fires when the *thread* that forked ends.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 10


def main() -> int:
    """Run SPEC to its end and return the exit status."""
    spec = json.loads(sys.argv[1])
    supervisor = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_supervisor() -> None:
        # Runs after setuid, which would clear the setting.
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, spec["orphan_signal"], 0, 0, 0)
            if os.getppid() != supervisor:
                os.kill(os.getpid(), signal.SIGKILL)

    uid, gid = spec["user"] or (None, None)
    server = subprocess.Popen(
        spec["command"],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        user=uid,
        group=gid,
        extra_groups=None if uid is None else [],
        preexec_fn=die_with_supervisor,  # noqa: PLW1509 - no other thread runs yet
    )
    orphaned = threading.Event()

    def follow_parent() -> None:
        os.read(0, 1)
        orphaned.set()
        server.send_signal(spec["orphan_signal"])
        try:
            server.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()

    threading.Thread(target=follow_parent, daemon=True).start()
    sys.stdout.write(f"{server.pid}\n")
    sys.stdout.flush()
    status = server.wait()
    if orphaned.is_set() and spec["remove"]:
        shutil.rmtree(spec["remove"], ignore_errors=True)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
