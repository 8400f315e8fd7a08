"""PostgreSQL's own load generator: how many transactions per second so many sessions get through."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from bench.harness import WrongRunError
from outbox_relay.embedded.postgres import find_binaries

PROTOCOL: Final = "prepared"
"""Prepared on first use, parameters apart: what psycopg, asyncpg, pgx and JDBC do with a statement that returns."""
THREADS: Final = 2
GRACE_SECONDS: Final = 30


@dataclass(frozen=True, slots=True)
class Throughput:
    """What came of one run."""

    rate: float
    """Transactions per second, the time to connect apart."""
    transactions: int


def run(url: str, script: str, *, clients: int, seconds: int, variables: Mapping[str, str]) -> Throughput:
    """Repeat `script`, one transaction, from `clients` sessions. Raises WrongRunError if one failed."""
    options = [f"--client={clients}", f"--jobs={min(clients, THREADS)}", f"--time={seconds}", f"--protocol={PROTOCOL}"]
    defines = [f"--define={name}={value}" for name, value in variables.items()]
    done = subprocess.run(
        [find_binaries() / "pgbench", "--no-vacuum", "--file=-", *options, *defines, url],
        input=script,
        capture_output=True,
        text=True,
        timeout=seconds + GRACE_SECONDS,
        check=False,
    )
    if done.returncode or "ERROR" in done.stderr or _number("number of failed transactions: ", done.stdout):
        raise WrongRunError(f"pgbench failed: {done.stderr or done.stdout}")
    return Throughput(
        rate=_number("tps = ", done.stdout),
        transactions=round(_number("number of transactions actually processed: ", done.stdout)),
    )


def _number(label: str, report: str) -> float:
    found = re.search(re.escape(label) + r"([\d.]+)", report)
    if found is None:
        raise WrongRunError(f"pgbench does not say {label!r}: {report}")
    return float(found[1])
