"""Pools that hold little more than one prompt: everybody waits, and all finish."""

from __future__ import annotations

import pytest
from figures import figures, wait_quiet
from many_streams import Streams, prompts

LENGTHS = (20, 100, 250, 400)
OUTPUT = 40
BLOCK = 16
BLOCKS = int(1.2 * max(LENGTHS) / BLOCK)


def mixed(count: int) -> list[list[int]]:
    """Prompts of all lengths in turn that share nothing."""
    each = [prompts(count // len(LENGTHS), tokens, seed=tokens) for tokens in LENGTHS]
    return [prompt for of_each_length in zip(*each, strict=True) for prompt in of_each_length]


@pytest.mark.parametrize("like", ["kvmesh", "vllm"])
def test_pools_of_1_2_prompts_on_both_sides_finish_32_mixed_requests(fresh, like) -> None:
    endpoint = fresh.start_router()
    pool = ("--kv-pool-tokens", str(BLOCKS * BLOCK))
    for name, role in {"p": "prefill", "d": "decode"}.items():
        fresh.begin_worker(name, role, *pool, "--engine-arguments", f"like={like}")
    fresh.wait_live(endpoint, "p", "d")
    for name in ("p", "d"):
        assert fresh.info(name).record.capabilities.pool_blocks == BLOCKS

    streams = Streams(endpoint, mixed(32), OUTPUT)
    streams.assert_undisturbed()
    now = figures(endpoint)
    assert now["finished_total"] == 32
    assert now["failed_total"] == now["violations_total"] == 0
    # Want of room is no failure: nobody's attempts were spent on it.
    assert now.total("migrations_total", cause="failed") == 0
    assert now["transfers_failed_total"] == 0
    wait_quiet(fresh, endpoint, "p", "d")
