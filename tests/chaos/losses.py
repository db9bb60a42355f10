"""Many streams lost at once: how long they stand still, and what is computed again.

    python tests/chaos/losses.py [--streams N] [--report FILE]

All of them decode on one worker, which is killed (-9); another one stands by. Steps take the
times of an 8B model on one H100, four times slower (two cores have to keep up with them).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

import network
from fault_proxy import testkit
from many_streams import Streams, prompts
from mesh import ROUTERS, Mesh, folder_of_run

ENGINE = {"profile": "h100-8b", "speed": "0.25"}
PROMPT_TOKENS, TOKENS = 500, 240
VICTIM, SPARE = "d2", "d1"


def lose(folder: Path, count: int) -> dict[str, float]:
    """So many streams lose their worker."""
    mesh = Mesh(folder, ENGINE)
    try:
        mesh.start(["p1", "p2", VICTIM])
        asked = prompts(count, tokens=PROMPT_TOKENS)
        streams = Streams(mesh.target(ROUTERS[0]), asked, TOKENS)
        streams.wait(10)
        mesh.start_worker(SPARE)
        mesh.wait(lambda: mesh.is_live(ROUTERS[0], [SPARE]), f"{SPARE} is live")
        streams.wait(TOKENS // 3)
        if not streams.running:
            raise AssertionError("they ended before they were lost")
        mesh.kill(VICTIM)
        streams.assert_undisturbed()
        last = [finished for finished in streams.finished if finished is not None]
        return {
            "streams": count,
            "moved": sum(finished.usage.attempts > 1 for finished in last),
            "longest_gap_s": max(finished.timings.longest_gap_ms for finished in last) / 1000,
            "recomputed_tokens": sum(finished.usage.recomputed_tokens for finished in last),
        }
    finally:
        mesh.close()


def main() -> None:
    """Runs it in a network of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=16, help="streams at once")
    parser.add_argument("--report", type=Path, help="file for the results, JSON")
    options = parser.parse_args()
    testkit()
    network.enter()
    with folder_of_run() as folder:
        results = lose(folder, options.streams)
    print(results)
    if options.report is not None:
        options.report.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
