"""`python -m tests.chaos`: strike the relay with everything, and judge. Exit code 1: a promise was broken."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.chaos import report
from tests.chaos.runner import IN_CI, STAGES, Result, run

RATE = 2_000.0


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    arguments.add_argument("--minutes", type=float, default=2.0, help="of faults, over all stages")
    arguments.add_argument("--seed", default="1", help="decides the schedule of faults")
    arguments.add_argument("--rate", type=float, default=RATE, help="events per second that the writers aim at")
    arguments.add_argument("--stage", choices=[stage.name for stage in STAGES], help="this one alone")
    arguments.add_argument("--record", action="store_true", help="write the run into docs/faults and docs/faults.md")
    chosen = arguments.parse_args()
    # What was started and mounted is to be ended by whoever started it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    stages = [stage for stage in STAGES if chosen.stage in (None, stage.name)]
    if shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin") is None and not IN_CI:
        print("LEFT OUT, because there is no pgbouncer: what goes through it", file=sys.stderr)
        stages = [stage for stage in stages if not stage.pooler]
    folder = Path(tempfile.mkdtemp(prefix="outbox-relay-chaos-"))
    folder.chmod(0o755)
    whole = sum(stage.part for stage in stages)
    results: list[Result] = []
    for number, stage in enumerate(stages):
        seconds = chosen.minutes * 60 * stage.part / whole
        print(f"== {stage.name}: {seconds:.0f} s, seed {chosen.seed}", file=sys.stderr)
        results.append(run(stage, seconds, f"{chosen.seed}/{stage.name}", chosen.rate, folder / str(number)))
        _print(results[-1])
    broken = [text for result in results for text in result.violations]
    # No promise depends on a time; the figures of recorded runs do.
    for text in report.too_slow(results):
        print(text)
    if chosen.record:
        report.save(results, chosen.seed, chosen.minutes, chosen.rate, report.RUNS)
        report.main()
        broken += report.missed(report.recorded())
        print(report.summary(report.recorded()))
    if broken:
        print(f"FAILED with seed {chosen.seed}; the logs are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


def _print(result: Result) -> None:
    print(
        f"{result.events} events, {len(result.injections)} faults, {result.repeated} repeated, "
        f"{len(result.violations)} violations, all ended after {result.left.seconds:.1f} s"
    )
    if result.left_out:
        print(f"  LEFT OUT, because this machine cannot do it: {', '.join(result.left_out)}")
    for text in result.violations[:20]:
        print(f"  {text}")


if __name__ == "__main__":
    sys.exit(main())
