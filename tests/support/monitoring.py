"""What a relay's monitor says, as Prometheus and a probe read it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from tests.support.waiting import PATIENCE, wait_until


class Sample(NamedTuple):
    name: str
    labels: Mapping[str, str]
    value: float


class Site:
    """A monitor at `http://127.0.0.1:port`."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"

    def get(self, path: str, accept: str = "*/*") -> tuple[int, str]:
        """Status and body."""
        request = urllib.request.Request(self._base + path, headers={"Accept": accept})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def verdict(self, path: str) -> tuple[int, Any]:
        """Status and decoded JSON of `/live` or `/ready`."""
        status, body = self.get(path)
        return status, json.loads(body)

    def wait_for(self, path: str, status: int, verdict: object) -> None:
        """Until it says so; fails with what it says instead."""
        try:
            wait_until(lambda: self.verdict(path) == (status, verdict), f"{path} says {verdict}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it says {self.verdict(path)}") from None

    def scrape(self) -> list[Sample]:
        status, body = self.get("/metrics")
        assert status == 200
        families = text_string_to_metric_families(body)
        return [Sample(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]

    def value(self, name: str, **labels: str) -> float | None:
        """The value of one series of `outbox_relay_…`, None if it is absent."""
        found = [s.value for s in self.scrape() if s.name == f"outbox_relay_{name}" and s.labels == labels]
        assert len(found) <= 1
        return found[0] if found else None
