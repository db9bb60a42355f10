"""How many blocks of tokens vLLM's pool holds, as routers are told."""

from types import SimpleNamespace

import pytest

from kvmesh.engine.vllm.served import _geometry


def config(context_length, **cache):
    """As vLLM's, once its core has started."""
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=context_length, get_vocab_size=lambda: 2000),
        cache_config=SimpleNamespace(block_size=16, **cache),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
    )


@pytest.mark.parametrize("context_length", [4096, 4100, 77])
def test_with_one_group_they_are_all_but_vllms_own(context_length) -> None:
    blocks = 10_007
    fit = blocks / -(-context_length // 16)
    told = config(context_length, num_gpu_blocks=blocks, kv_cache_max_concurrency=fit)
    assert _geometry(told).pool_blocks == blocks - 1


def test_with_several_groups_they_are_what_whole_requests_leave() -> None:
    # 256 blocks of full attention, and 6 groups with windows of 32 blocks, from one pool.
    fit = 10_000 / (256 + 6 * 32)
    told = config(4096, num_gpu_blocks=10_000, kv_cache_max_concurrency=fit)
    assert _geometry(told).pool_blocks == round(fit * 256) - 1 == 5713


def test_what_windows_spare_is_not_counted_on() -> None:
    told = config(4096, num_gpu_blocks=10_000, kv_cache_max_concurrency=10_000 / 64)
    assert _geometry(told).pool_blocks == 9_999


@pytest.mark.parametrize("more", [{}, {"kv_cache_max_concurrency": None}])
def test_where_vllm_does_not_say_they_are_all_but_its_own(more) -> None:
    assert _geometry(config(4096, num_gpu_blocks=300, **more)).pool_blocks == 299
