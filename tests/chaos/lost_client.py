"""A client is gone without a word: its packets are dropped, both ways, in the middle of a stream.

    python tests/chaos/lost_client.py [--report FILE]

Nothing resets its connection, so that only pings of HTTP/2 without an answer tell of it
(`keep_alive_interval`, `keep_alive_timeout`). All else that could end the stream, in the router or
the kernel, takes far longer here than is waited for. Another client streams on beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

import network
from fault_proxy import testkit
from faults import EVERYTHING
from figures import QUIET, Figures, figures
from many_streams import Streams, prompts
from mesh import ROUTERS, STEPS, Mesh, folder_of_run
from reader import ENDED, RUNS

from kvmesh.v1 import worker_pb2

CLIENT, TABLE = "c", "lost_client"
ROUTER = ROUTERS[0]
WORKERS = ("p2", "d2")
READER = Path(__file__).with_name("reader.py")
ENDLESS = 20_000
"""Tokens of the lost stream: over eight minutes of steps."""
BESIDE = 1_200
"""Tokens of the other one: half a minute."""
IMPATIENT = (
    # Long enough for a client on a busy machine to answer.
    *("--keep-alive-interval", "1s", "--keep-alive-timeout", "10s"),
    # As shipped it would end the stream after a minute; it bounds how long the kernel tries, too.
    *("--slow-client-timeout", "1h"),
)


def lose(folder: Path) -> dict[str, object]:
    """A client is lost; what the router made of it."""
    mesh = Mesh(folder, STEPS, router=IMPATIENT, clients=[CLIENT])
    try:
        mesh.start(WORKERS)
        host = mesh.network.hosts[CLIENT]
        command = [sys.executable, str(READER), mesh.address(ROUTER), str(ENDLESS)]
        client = mesh.children.spawn("client", host.within(*command), announce=True)
        mesh.children.wait_for(client, RUNS)
        beside = Streams(mesh.target(ROUTER), prompts(1), BESIDE)
        beside.wait(10)

        def told() -> Figures:
            return figures(mesh.door(ROUTER))

        def connected() -> bool:
            router = mesh.network.hosts[ROUTER]
            return any(ends[2] == host.address for ends in mesh.network.connections(router))

        if told()["open_streams"] != 2 or not connected():
            raise AssertionError("both streams run before one is lost")
        mesh.network.drop(TABLE, host, leaving=EVERYTHING, arriving=EVERYTHING)
        mesh.wait(lambda: told()["cancelled_total"] == 1, "the router lets go of the stream")
        mesh.wait(lambda: not connected(), "the router lets go of the connection")
        beside.assert_undisturbed()
        for worker in WORKERS:
            mesh.wait(
                lambda worker=worker: mesh.residue(worker) == worker_pb2.Residue(),
                f"{worker} holds nothing of a request",
            )
        mesh.wait(lambda: all(told()[name] == 0 for name in QUIET), "nothing is in the router")
        now = told()
        lives = client.process.poll() is None and ENDED not in client.said
        return {
            # Until then nobody told it, so that it could not have told the router.
            "client_waits": lives,
            "dropped": mesh.network.pass_on(TABLE, host),
            "attempts_beside": beside.attempts(),
            **{
                name: now.total(f"{name}_total")
                for name in ("cancelled", "finished", "failed", "slow_clients", "violations")
            },
        }
    finally:
        mesh.close()


def main() -> None:
    """Runs it in a network of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, help="file for the results, JSON")
    options = parser.parse_args()
    testkit()
    network.enter()
    with folder_of_run() as folder:
        results = lose(folder)
    print(results)
    if options.report is not None:
        options.report.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
