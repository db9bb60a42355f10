"""A request of which workers die ends after a few; the others beside it do not."""

from __future__ import annotations

import grpc
import pytest
from figures import figures, wait_quiet
from many_streams import Streams, prompts

import kvmesh
from kvmesh.engine.sim.vocabulary import end_of_text_ids

DEADLY = end_of_text_ids()[-1]
"""No prompt of the innocent holds this id, and no output does."""
DEATHS = 4
"""Two beside others, two alone."""


def test_it_is_quarantined_and_all_others_finish(fresh) -> None:
    endpoint = fresh.start_router()
    names = [f"b{number}" for number in range(DEATHS + 2)]
    for name in names:
        fresh.begin_worker(
            name, "both", "--engine-arguments", f"profile=step-10ms,dies_of={DEADLY}"
        )
    fresh.wait_live(endpoint, *names)
    streams = Streams(endpoint, prompts(12), 500)
    streams.wait(5)
    with kvmesh.Client(endpoint) as client:
        deadly = {"token_ids": [500, DEADLY, 501], "max_tokens": 5}
        for again in (False, True):
            with pytest.raises(kvmesh.MeshError) as caught:
                client.complete(**deadly)
            assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
            assert caught.value.reason == "QUARANTINED"
            dead = [name for name in names if fresh.workers[name].process.poll() is not None]
            # The second time nobody was asked.
            assert len(dead) == DEATHS, again
    for name in dead:
        fresh.forget(name)
    streams.assert_undisturbed()
    now = figures(endpoint)
    assert now["quarantined_total"] == 1
    assert now["failed_total"] == 1
    wait_quiet(fresh, endpoint, *fresh.workers)
