"""A router that stood still for a while holds nobody but itself guilty of it."""

from __future__ import annotations

import os
import signal
import time

from figures import figures, wait_quiet
from many_streams import Streams, prompts

STEPS = ("--engine-arguments", "profile=step-10ms")
WORKERS = ("b1", "b2", "b3")
COUNT = 12
PAUSE_S = 4.0
"""Longer than the silence after which a worker is lost."""
PAUSES = 2


def test_a_paused_router_gives_up_no_worker_and_loses_no_stream(fresh) -> None:
    endpoint = fresh.start_router()
    for name in WORKERS:
        fresh.begin_worker(name, "both", *STEPS)
    fresh.wait_live(endpoint, *WORKERS)
    streams = Streams(endpoint, prompts(COUNT), 1_200)
    router = fresh.routers[endpoint]
    for pause in range(PAUSES):
        streams.wait(20 + 450 * pause)
        os.kill(router.process.pid, signal.SIGSTOP)
        # The pause itself: its length is the fault.
        time.sleep(PAUSE_S)
        os.kill(router.process.pid, signal.SIGCONT)
    streams.assert_undisturbed()
    assert set(streams.attempts()) == {1}
    now = figures(endpoint)
    assert now.total("migrations_total") == now["failed_total"] == now["violations_total"] == 0
    log = "".join(path.read_text() for path in (fresh.folder / "logs").glob("router-0*"))
    assert "worker lost" not in log
    assert log.count("stood still") >= PAUSES, log
    wait_quiet(fresh, endpoint, *WORKERS)
