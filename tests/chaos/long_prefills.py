"""Long prompts without a fault: no worker is given up for the length of its steps.

    python tests/chaos/long_prefills.py [--seconds S] [--report FILE]

Prompts of 5,000 tokens one after the other on every prefill worker, with the times of a 135M
model on one core (a step of half a second and more).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

import network
from fault_proxy import testkit
from mesh import ROUTERS, Mesh, folder_of_run
from traffic import Shape, Stream, Traffic
from verdict import Verdict, falsely_lost

SHAPE = Shape(streams=3, heads=0, own=(5_000, 5_000), output=(8, 8))


def compute(folder: Path, seconds: float) -> dict[str, object]:
    """Long prompts for so long."""
    mesh = Mesh(folder, {"profile": "cpu-135m"})
    try:
        mesh.start()
        verdict = Verdict(attempt_tokens=False)
        computed = 0

        def ended(stream: Stream) -> None:
            nonlocal computed
            # Prompts wait for each other here: that is no stall.
            computed += not +stream.problems and stream.attempts == 1
            verdict.take(stream, routers_lost=0)

        traffic = Traffic([mesh.target(*ROUTERS)], SHAPE, 1, 1.0, ended)
        until = time.monotonic() + seconds
        mesh.wait(lambda: time.monotonic() >= until or traffic.is_over, "the time is over", 1e9)
        traffic.stop()
        mesh.wait(lambda: traffic.is_over, "every stream ended")
        false = falsely_lost({router: mesh.logged(router) for router in ROUTERS}, [])
        return {
            "prompts": verdict.streams,
            "bad": verdict.streams - computed,
            "falsely_lost": len(false),
            "details": [*verdict.details, *false],
        }
    finally:
        mesh.close()


def main() -> None:
    """Runs it in a network of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="how long prompts are asked")
    parser.add_argument("--report", type=Path, help="file for the results, JSON")
    options = parser.parse_args()
    testkit()
    network.enter()
    with folder_of_run() as folder:
        results = compute(folder, options.seconds)
        print(results)
        if options.report is not None:
            options.report.write_text(json.dumps(results) + "\n")
        if results["bad"] or results["falsely_lost"]:
            sys.exit(1)


if __name__ == "__main__":
    main()
