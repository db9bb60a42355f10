"""Draws follow the distribution they promise, and are functions of what they are said to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.core.runner import SampleSpec
from kvmesh.engine.torch.noise import gumbel
from kvmesh.engine.torch.sampling import draw
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

VOCABULARY = 3000
FIXED_NOISE = [-2.0406414933429358, 6.078674900891643, 1.4708358478241348]
"""By a second implementation in plain integers: seed 42, position 7, tokens 0, 1, 49151."""


def sampling(**fields) -> wire.ResolvedSampling:
    defaults = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 1}
    return wire.ResolvedSampling(**(defaults | fields))


def spec(prompt=(), output=(), logprobs=None, banned=(), **fields) -> SampleSpec:
    return SampleSpec(sampling(**fields), list(prompt), list(output), logprobs, banned)


def one(logits, **fields) -> int:
    row = torch.from_numpy(np.asarray(logits, dtype=np.float32))[None]
    return draw(row, [spec(**fields)])[0].token_id


def drawn_set(logits, draws=300, **fields) -> set[int]:
    return {one(logits, seed=seed, **fields) for seed in range(draws)}


def random_logits(seed=0, spread=3.0):
    return (np.random.default_rng(seed).normal(size=VOCABULARY) * spread).astype(np.float32)


# --- noise --------------------------------------------------------------------


def test_noise_is_fixed_for_all_time():
    """Another value would change every seeded stream of every user."""
    found = gumbel(42, 7, np.array([0, 1, 49_151]))
    again = gumbel(42, 7, np.array([49_151]))
    assert found[2] == again[0]
    assert found.tolist() == pytest.approx(FIXED_NOISE, rel=1e-12)


def test_noise_depends_on_seed_position_and_token():
    ids = np.arange(100)
    base = gumbel(1, 1, ids)
    assert (gumbel(2, 1, ids) != base).all()
    assert (gumbel(1, 2, ids) != base).all()
    assert len(np.unique(base)) == 100
    assert np.isfinite(gumbel(2**64 - 1, 2**31, np.array([2**32 - 1]))).all()


def test_noise_is_gumbel():
    """Kolmogorov-Smirnov against exp(-exp(-x)), over tokens and over positions."""
    over_tokens = gumbel(9, 0, np.arange(100_000))
    over_positions = np.array([gumbel(9, i, np.array([5]))[0] for i in range(20_000)])
    for sample in (over_tokens, over_positions):
        cumulative = np.exp(-np.exp(-np.sort(sample)))
        distance = np.abs(cumulative - (np.arange(len(sample)) + 0.5) / len(sample)).max()
        assert distance < 1.95 / math.sqrt(len(sample))  # p = 0.001


# --- distribution ---------------------------------------------------------------


def test_draws_follow_the_softmax():
    logits = [2.0, 1.0, 0.0, -1.0, 0.5, float("-inf")]
    draws = 6000
    counts = np.zeros(6)
    for position in range(draws):
        counts[one(logits, output=[0] * (position % 50), seed=position // 50)] += 1
    weights = np.exp(np.array(logits))
    expected = draws * weights / weights.sum()
    kept = expected > 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001
    assert counts[5] == 0


def test_temperature_sharpens():
    logits = random_logits()
    cold = drawn_set(logits, draws=60, temperature=0.1)
    hot = drawn_set(logits, draws=60, temperature=3.0)
    assert len(cold) < len(hot)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40))
def test_top_k_keeps_the_k_largest(seed, k):
    logits = random_logits(seed, spread=0.5)
    allowed = set(np.argsort(-logits, kind="stable")[:k].tolist())
    assert drawn_set(logits, draws=20, top_k=k) <= allowed


@pytest.mark.parametrize("spread", [0.01, 3.0])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.95])
def test_top_p_keeps_the_smallest_set_that_reaches_p(spread, p):
    """With a spread of 0.01 the set is longer than what is ranked at first."""
    logits = random_logits(3, spread)
    order = np.argsort(-logits, kind="stable")
    scaled = logits[order].astype(np.float64)
    shares = np.exp(scaled - scaled.max())
    count = int((np.cumsum(shares) >= p * shares.sum()).argmax()) + 1
    found = drawn_set(logits, draws=200, top_p=p)
    assert found <= set(order[:count].tolist())
    assert len(found) > min(count, 100) // 4


def test_top_p_counts_within_top_k():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    # Of the two kept by top-k, the first has 4/7 of the weight.
    assert drawn_set(logits, top_k=2, top_p=0.5) == {0}
    assert drawn_set(logits, top_k=2, top_p=0.6) == {0, 1}
    assert drawn_set(logits, top_p=0.7) == {0, 1}


def test_min_p_cuts_by_share_of_the_largest():
    logits = np.log(np.array([0.5, 0.26, 0.24]))
    assert drawn_set(logits, min_p=0.5) == {0, 1}


def test_equal_values_are_cut_by_token_id():
    assert drawn_set([1.0] * 8, top_k=3) == {0, 1, 2}
    assert drawn_set([1.0] * 8, top_p=0.5) == {0, 1, 2, 3}
    assert one([0.0, 5.0, 5.0], temperature=0.0) == 1


# --- corrections ----------------------------------------------------------------


def test_bias_and_bans():
    bias = [inference.LogitBias(token_id=3, bias=50.0)]
    assert one([1.0, 0.0, 0.0, 0.0], temperature=0.0, logit_bias=bias) == 3
    assert one([1.0, 0.5, 0.0], temperature=0.0, banned=[0]) == 1
    assert drawn_set([9.0, 0.5, 0.0], banned=[0]) == {1, 2}


def test_ids_beyond_the_vocabulary_are_nothing():
    bias = [inference.LogitBias(token_id=4_000_000, bias=1.0)]
    assert one([1.0, 0.5, 0.0], temperature=0.0, banned=[0, 4_000_000], logit_bias=bias) == 1


def test_repetition_penalty_weighs_prompt_and_output():
    fields = {"temperature": 0.0, "repetition_penalty": 2.0}
    assert one([3.0, 2.0, 1.0], prompt=[0], **fields) == 1
    assert one([3.0, 2.0, 1.9], prompt=[0], output=[1], **fields) == 2
    assert one([-1.0, -1.5], output=[0], **fields) == 1


def test_frequency_counts_and_presence_does_not():
    assert one([2.0, 1.0], temperature=0.0, output=[0], frequency_penalty=0.6) == 0
    assert one([2.0, 1.0], temperature=0.0, output=[0, 0], frequency_penalty=0.6) == 1
    assert one([2.0, 1.0], temperature=0.0, output=[0, 0], presence_penalty=0.6) == 0
    assert one([2.0, 1.0], temperature=0.0, prompt=[0, 0], presence_penalty=2.0) == 0


def test_logprobs_are_of_the_model_before_all_else():
    logits = random_logits(4)
    fields = {"temperature": 0.3, "top_k": 5, "repetition_penalty": 3.0, "prompt": range(100)}
    (sampled,) = draw(torch.from_numpy(logits)[None], [spec(logprobs=4, **fields)])
    wanted = torch.log_softmax(torch.from_numpy(logits).double(), 0)
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == pytest.approx(wanted[sampled.token_id].item(), abs=1e-5)
    top = wanted.topk(4)
    assert list(sampled.logprobs.top_ids) == top.indices.tolist()
    assert list(sampled.logprobs.top_logprobs) == pytest.approx(top.values.tolist(), abs=1e-5)


def test_rows_of_a_batch_do_not_see_each_other():
    rows = torch.from_numpy(np.stack([random_logits(seed) for seed in range(6)]))
    specs = [
        spec(temperature=0.0),
        spec(seed=5),
        spec(seed=5, top_p=0.4),
        spec(temperature=0.0, logprobs=2),
        spec(seed=8, top_k=10),
        spec(temperature=0.0, banned=[1]),
    ]
    together = [sampled.token_id for sampled in draw(rows, specs)]
    alone = [draw(rows[i : i + 1], [specs[i]])[0].token_id for i in range(6)]
    assert together == alone
