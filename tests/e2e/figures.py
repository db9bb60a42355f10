"""A router's /metrics, read as a scraper does."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Mapping

from cluster import Cluster

QUIET = ("open_streams", "queued_requests", "bookings", "request_bytes_held", "undelivered_ids")
"""What is zero where no request is in the router."""

_SERIES = re.compile(r"^kvmesh_(\w+)(?:\{([^}]*)\})? (\S+)$", re.MULTILINE)


class Figures(dict[str, float]):
    """Values by series: the name without its prefix, labels as they are printed."""

    def total(self, name: str, **labels: str) -> float:
        """Sum of a metric's series that have these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            value
            for series, value in self.items()
            if series.partition("{")[0] == name and all(part in series for part in wanted)
        )


def figures(endpoint: str) -> Figures:
    """All series of a router now."""
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found = Figures()
    for name, labels, value in _SERIES.findall(text):
        key = name
        found[f"{key}{{{labels}}}" if labels else key] = float(value)
    return found


def wait_figures(
    cluster: Cluster, endpoint: str, wanted: Mapping[str, float], seconds: float = 120
) -> Figures:
    """Looks until metrics have these values, summed over their labels."""
    deadline = time.monotonic() + seconds
    while True:
        now = figures(endpoint)
        seen = {name: now.total(name) for name in wanted}
        if seen == dict(wanted):
            return now
        assert time.monotonic() < deadline, f"wanted {dict(wanted)}, saw {seen}"
        cluster.children.wait(0.02)


def wait_quiet(cluster: Cluster, endpoint: str, *workers: str) -> None:
    """Nothing is left: by the workers' own counters and by the router's."""
    cluster.wait_empty(*workers)
    wait_figures(cluster, endpoint, dict.fromkeys(QUIET, 0))
