"""Breaks a mesh under traffic by a seeded schedule, and says what became of its streams.

    python tests/chaos/chaos.py [--seed N] [--seconds S | --faults N] [--attempt-tokens] ...

Ends with status 1 where a stream is bad or somebody was accused falsely. Runs itself in a
network of its own (network.py), so nothing of this machine is touched.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

import network
from fault_proxy import testkit
from faults import KINDS, RouterKilled, RouterPaused
from mesh import LIVE, ROLES, ROUTERS, STEP_MS, STEPS, Mesh, folder_of_run
from player import Played, Player
from schedule import schedule
from traffic import Shape, Stream, Traffic
from verdict import Verdict, falsely_lost, figures

from kvmesh.v1 import worker_pb2

FAULTS_AT_MOST = 1_000_000


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=7, help="the schedule and all prompts")
    parser.add_argument("--seconds", type=float, default=60.0, help="inject faults for so long")
    parser.add_argument("--faults", type=int, default=FAULTS_AT_MOST, help="and at most so many")
    parser.add_argument("--first", type=int, default=0, help="number of the first in the schedule")
    parser.add_argument(
        "--kinds", default="", help=f"only these: {','.join(kind.__name__ for kind in KINDS)}"
    )
    parser.add_argument("--streams", type=int, default=Shape.streams, help="at the same time")
    parser.add_argument(
        "--attempt-tokens", action="store_true", help="tokens depend on the attempt as well"
    )
    parser.add_argument("--report", type=Path, help="file for the figures, JSON")
    parser.add_argument("--folder", type=Path, help="for logs; kept. Else only kept if it failed")
    return parser.parse_args()


def leaves(one: Played, began: float) -> bool:
    """Whether a stream that began then may have been taken over by the other router for it."""
    match one.fault:
        case RouterKilled():
            return one.injected >= began
        case RouterPaused():
            # Also one that was asked of a router that stood still already: its client waits.
            return not one.healed or one.healed >= began
    return False


def play(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """A whole run; its figures."""
    named = options.kinds.split(",") if options.kinds else [kind.__name__ for kind in KINDS]
    kinds = [kind for kind in KINDS if kind.__name__ in named]
    if len(kinds) != len(named):
        raise SystemExit(f"--kinds: allowed are {', '.join(kind.__name__ for kind in KINDS)}")
    mesh = Mesh(folder, {**STEPS, "attempt_tokens": str(options.attempt_tokens).lower()})
    try:
        mesh.start()
        player = Player(mesh, schedule(options.seed, kinds, options.first))
        verdict = Verdict(options.attempt_tokens)

        def ended(stream: Stream) -> None:
            # On the thread of the traffic; it only reads what the player writes.
            played = (*player.played, *player.active)
            verdict.take(stream, sum(leaves(one, stream.began) for one in played))

        shape = Shape(streams=options.streams)
        targets = [mesh.target(*ROUTERS), mesh.target(*reversed(ROUTERS))]
        traffic = Traffic(targets, shape, options.seed, 1.5 * STEP_MS / 1000, ended)
        until = time.monotonic() + options.seconds
        while (
            going := time.monotonic() < until and player.begun < options.faults
        ) or player.active:
            player.step(inject=going)
            if traffic.is_over:
                raise AssertionError("the traffic ended before the faults")
            mesh.children.wait(0.02)
        for router in ROUTERS:
            # Streams go on, so that there is a request for whoever is on probation. One whose
            # probe was forgotten would stay there.
            mesh.wait(
                lambda router=router: mesh.is_live(router, ROLES, LIVE),
                f"{router} has no worker on probation",
            )
        traffic.stop()
        mesh.wait(lambda: traffic.is_over, "every stream ended")
        for name in ROLES:
            mesh.wait(
                lambda name=name: mesh.residue(name) == worker_pb2.Residue(),
                f"{name} holds nothing of a request",
            )
        false = falsely_lost({router: mesh.logged(router) for router in ROUTERS}, player.played)
        return {
            "seed": options.seed,
            "attempt_tokens": options.attempt_tokens,
            **figures(verdict, player.played, false),
            "asked_again": traffic.asked_again,
        }
    finally:
        mesh.close()


def main() -> None:
    """Runs it in a network of its own."""
    options = arguments()
    # Built while there is a way to what a build may need.
    testkit()
    network.enter()
    # Told to end, it takes its children with it in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with folder_of_run(options.folder) as folder:
        report = play(options, folder)
        print(json.dumps(report, indent=2))
        if options.report is not None:
            options.report.write_text(json.dumps(report) + "\n")
        if report["bad_streams"] or report["falsely_lost"]:
            sys.exit(1)


if __name__ == "__main__":
    main()
