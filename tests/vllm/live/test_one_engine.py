"""The engine contract (engine/contract.py), kept by vLLM."""

import json

import pytest
from engine_harness import apply, chains_of, until
from in_process import ended, place
from seeded_prompts import seeded_prompts
from streams import MARGIN, first_difference
from tokenizers import Tokenizer

from kvmesh.engine.contract import CLEARED, STORED
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire


@pytest.fixture
def prompts(folder):
    return seeded_prompts(folder, 6, 20, 200)


@pytest.fixture
def text(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


async def test_batched_prompts_give_the_tokens_of_transformers(driver, prompts, reference) -> None:
    attempts = [place(driver, prompt.ids, max_tokens=12) for prompt in prompts]
    for prompt, attempt in zip(prompts, attempts, strict=True):
        await ended(attempt)
        assert attempt.end.finished.reason == inference.FINISH_REASON_LENGTH
        expected, _ = reference.expected(prompt, 12)
        index = first_difference(expected.ids, attempt.tokens)
        assert index is None or expected.margins[index] < MARGIN
    await driver.idle()


async def test_a_continuation_goes_on_where_it_was(driver, prompts) -> None:
    ids = prompts[2].ids
    whole = (await ended(place(driver, ids, max_tokens=12))).tokens
    rest = await ended(place(driver, ids, output=whole[:5], max_tokens=12))
    assert rest.tokens == whole[5:]
    await driver.idle()


async def test_a_cached_prefix_is_used_told_and_changes_nothing(driver, prompts) -> None:
    ids = prompts[4].ids
    first = await ended(place(driver, ids, max_tokens=4))
    # vLLM's events come beside its outputs.
    await until(lambda: driver.engine.load().kv.evictable > 0)
    again = await ended(place(driver, ids, max_tokens=4))
    shared = (len(ids) - 1) // 32 * 32
    assert shared
    assert first.end.timings.cached_tokens == 0
    assert again.end.timings.cached_tokens == shared
    assert again.opening.reserved.tokens_held == shared
    assert again.end.timings.computed_tokens == len(ids) - shared
    assert again.tokens == first.tokens
    salted = await ended(place(driver, ids, max_tokens=4, cache_salt="other"))
    assert salted.end.timings.cached_tokens == 0
    assert salted.tokens == first.tokens
    await driver.idle()


async def test_events_and_snapshot_tell_the_same_cache(driver, prompts) -> None:
    for prompt in prompts:
        await ended(place(driver, prompt.ids, max_tokens=1))
    whole = sum((len(prompt.ids)) // 32 for prompt in prompts)
    await until(lambda: len(driver.engine._cache) >= whole)
    parts = list(driver.engine.snapshot())
    told: set[int] = set()
    for batch in driver.batches:
        for change in batch.changes:
            if change.kind == CLEARED:
                told.clear()
        apply(told, batch) if all(c.kind != CLEARED for c in batch.changes) else _apply(told, batch)
    assert {change.kind for part in parts for change in part} == {STORED}
    assert set(chains_of(parts)) == told
    assert len(told) == whole


def _apply(told, batch) -> None:
    for change in batch.changes:
        if change.kind == CLEARED:
            told.clear()
        elif change.kind == STORED:
            told |= set(change.chain)
        else:
            told -= set(change.chain)


async def test_a_full_pool_evicts_and_says_so(driver) -> None:
    """Twelve prompts of 400 tokens do not fit a pool of 4,096."""
    for at in range(12):
        ids = [(at * 991 + i * 17) % 40_000 + 100 for i in range(400)]
        await ended(place(driver, ids, max_tokens=1))
    removed = sum(c.kind == 1 for batch in driver.batches for c in batch.changes)
    assert removed
    assert len(driver.engine._cache) <= 128
    await driver.idle()


async def test_a_stop_id_ends_the_output_after_min_tokens(driver, prompts) -> None:
    ids = prompts[2].ids
    said = (await ended(place(driver, ids, max_tokens=12))).tokens
    attempt = await ended(place(driver, ids, max_tokens=12, stop_token_ids=[said[4]]))
    assert attempt.tokens == said[: said.index(said[4]) + 1]
    assert attempt.end.finished.reason == inference.FINISH_REASON_STOP
    assert attempt.end.finished.stop_token_id == said[4]
    later = await ended(place(driver, ids, max_tokens=12, min_tokens=8, stop_token_ids=[said[4]]))
    assert len(later.tokens) >= 8
    assert said[4] not in later.tokens[:7]


async def test_log_probabilities_are_those_of_the_model(driver, prompts) -> None:
    attempt = await ended(place(driver, prompts[2].ids, max_tokens=3, logprobs=2))
    assert len(attempt.logprobs) == 3
    for token, entry in zip(attempt.tokens, attempt.logprobs, strict=True):
        assert entry.top_ids[0] == token, "greedy takes the likeliest"
        assert entry.logprob == entry.top_logprobs[0] > entry.top_logprobs[1]


async def test_a_sampled_prompt_of_several_chunks_kills_nobody(driver) -> None:
    """vLLM's CPU build would die of it if it had a seed of its own."""
    warm = wire.ResolvedSampling(temperature=1.0, top_p=0.9, repetition_penalty=1.0, seed=7)
    attempts = [
        place(driver, [(at * 37 + i * 11) % 40_000 + 9 for i in range(400)], sampling=warm)
        for at in range(2)
    ]
    for attempt in attempts:
        assert len((await ended(attempt)).tokens) == 16
    await driver.idle()


async def test_a_biased_logit_is_taken(driver, prompts) -> None:
    biased = wire.ResolvedSampling(
        top_p=1.0,
        repetition_penalty=1.0,
        logit_bias=[inference.LogitBias(token_id=4321, bias=100)],
    )
    attempt = await ended(place(driver, prompts[2].ids, max_tokens=3, sampling=biased))
    assert attempt.tokens == [4321] * 3


async def test_a_grammar_is_followed(driver, text) -> None:
    prompt = text.encode("Tell me the capital of France as JSON: ").ids
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 8}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    grammar = inference.Grammar(json_schema=json.dumps(schema))
    ends = [0, 2]
    attempt = await ended(
        place(driver, prompt, max_tokens=60, grammar=grammar, stop_token_ids=ends)
    )
    made = json.loads(text.decode([id for id in attempt.tokens if id not in ends]))
    assert list(made) == ["capital"]
    await driver.idle()


async def test_a_grammar_that_is_none_is_refused_by_name(driver) -> None:
    bad = inference.Grammar(json_schema='{"type": "no such type"}')
    attempt = place(driver, [5, 6, 7], grammar=bad)
    await attempt.until(lambda a: a.refused or a.end is not None)
    assert attempt.refused
    assert attempt.opening.refused.field == "grammar"


@pytest.mark.parametrize("at", ["placed", "decoding"])
async def test_a_cancel_leaves_nothing(driver, at) -> None:
    attempt = place(driver, range(100, 400), max_tokens=200)
    if at == "decoding":
        await attempt.until(lambda a: len(a.tokens) > 2)
    driver.engine.cancel([attempt.id])
    assert await attempt.ended() == "cancelled"
    await driver.idle()
    assert driver.engine.load().shares == {}


async def test_samples_tell_what_steps_held(driver, prompts) -> None:
    ids = prompts[5].ids
    await ended(place(driver, ids, max_tokens=6))
    await driver.idle()
    assert sum(s.prefill_tokens for s in driver.samples) == len(ids)
    assert sum(s.prefill_context for s in driver.samples) == sum(range(1, len(ids) + 1))
    assert sum(s.decode_batch for s in driver.samples) == 5
    assert all(s.duration_us > 0 for s in driver.samples)


async def test_what_cannot_fit_is_refused_with_the_limit(driver) -> None:
    attempt = place(driver, range(100, 700))
    assert await attempt.ended() == "refused"
    assert "512" in attempt.opening.refused.message


async def test_the_context_ends_the_output(driver) -> None:
    attempt = await ended(place(driver, range(100, 604), max_tokens=100))
    assert len(attempt.tokens) == 8
    assert attempt.end.finished.reason == inference.FINISH_REASON_LENGTH


def test_it_says_what_it_can_do(one) -> None:
    can, record = one.engine.capabilities(), one.built.model
    assert (can.engine, can.block_tokens, can.hash_scheme) == ("vllm", 32, 1)
    assert can.pool_blocks == 4096 // 32
    assert can.cache_events
    assert can.grammars
    assert not can.reproducible
    assert not can.penalties_over_continuation
    assert not can.grammars_over_continuation
    assert not can.prefill_emits_first_token
    assert not can.streamed_hand_off
    assert can.engine_connector == ""
    assert (record.context_length, record.vocabulary_size) == (512, 49_152)
    assert one.engine.step_model().a_ms + one.engine.step_model().b_ms > 0
