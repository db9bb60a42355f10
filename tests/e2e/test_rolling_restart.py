"""Workers are replaced one by one under a busy cluster, and no stream fails."""

from __future__ import annotations

from figures import figures, wait_quiet
from many_streams import Streams, prompts

STEPS = ("--grace", "200ms", "--engine-arguments", "profile=step-10ms")
COUNT = 24
ROLES = {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode"}


def test_every_worker_is_replaced_and_no_stream_fails(fresh) -> None:
    endpoint = fresh.start_router()
    for name, role in ROLES.items():
        fresh.begin_worker(name, role, *STEPS)
    fresh.wait_live(endpoint, *ROLES)
    streams = Streams(endpoint, prompts(COUNT), 1_000)
    streams.wait(10)
    for name, role in ROLES.items():
        # As rolling updates do it: the new one first, then the old one goes.
        fresh.start_worker(f"{name}-new", role, *STEPS)
        fresh.wait_live(endpoint, f"{name}-new")
        fresh.stop(name)
    streams.assert_undisturbed()
    now = figures(endpoint)
    assert now["finished_total"] == COUNT
    assert now["failed_total"] == now["violations_total"] == 0
    # What was still running when its grace ended was given back, and nothing died.
    assert now['migrations_total{cause="returned"}'] > 0
    assert now['migrations_total{cause="died"}'] == 0
    wait_quiet(fresh, endpoint, *fresh.workers)
