"""Drawing the next token from logits.

In this order: logit bias, bans, repetition, frequency and presence penalties,
then argmax (temperature 0), or: temperature, top-k, top-p of what top-k kept,
min-p, Gumbel-max over what is left. Cuts are by value, equal values by token
id, so the result is a function of logits, history, settings and seed alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.engine.core.runner import Sampled, SampleSpec
from kvmesh.engine.torch.noise import gumbel
from kvmesh.v1 import inference_pb2 as inference
from kvmesh.v1 import worker_pb2 as wire

_FIRST_CANDIDATES = 1024
"""Tokens that are ranked at first for top-p; nearly always enough of them."""

Logits = npt.NDArray[np.float64]


def draw(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[Sampled]:
    """Draws one token from each row of `logits` [s, vocabulary] float32."""
    # One pass over all rows for the common case; ties go to the lowest id.
    largest = logits.argmax(dim=1).tolist()
    drawn: list[Sampled] = []
    for row, spec in enumerate(specs):
        if _is_plain(spec):
            drawn.append(Sampled(int(largest[row])))
        else:
            drawn.append(_draw_row(logits[row], spec))
    return drawn


def _is_plain(spec: SampleSpec) -> bool:
    """Greedy with nothing that changes or reports logits."""
    sampling = spec.sampling
    return (
        sampling.temperature == 0
        and spec.logprobs is None
        and not spec.banned_ids
        and not sampling.logit_bias
        and not _has_penalty(sampling)
    )


def _has_penalty(sampling: wire.ResolvedSampling) -> bool:
    return (
        sampling.repetition_penalty not in (0, 1)
        or sampling.frequency_penalty != 0
        or sampling.presence_penalty != 0
    )


def _draw_row(row: torch.Tensor, spec: SampleSpec) -> Sampled:
    model_logits = row.cpu().numpy().astype(np.float64)
    ids, scores = perturbed(model_logits, spec)
    token_id = int(ids[scores.argmax()])
    if spec.logprobs is None:
        return Sampled(token_id)
    return Sampled(token_id, _logprobs(model_logits, token_id, spec.logprobs))


def perturbed(model_logits: Logits, spec: SampleSpec) -> tuple[npt.NDArray[np.int64], Logits]:
    """Ids that can be drawn, rising or by rank, and what the draw is the argmax of.

    At temperature 0 these are the corrected logits of all ids.
    """
    logits = _corrected(model_logits.copy(), spec)
    sampling = spec.sampling
    if sampling.temperature == 0:
        return np.arange(len(logits)), logits
    kept, scaled = _kept(logits / sampling.temperature, sampling)
    return kept, scaled + gumbel(sampling.seed, len(spec.output_ids), kept)


def _corrected(logits: Logits, spec: SampleSpec) -> Logits:
    """Bias, bans and penalties, in place; ids that the model does not have are nothing."""
    sampling = spec.sampling
    for entry in sampling.logit_bias:
        if entry.token_id < len(logits):
            logits[entry.token_id] += entry.bias
    if len(spec.banned_ids):
        banned = np.asarray(spec.banned_ids, dtype=np.int64)
        logits[banned[banned < len(logits)]] = -np.inf
    if not _has_penalty(sampling):
        return logits
    penalty = sampling.repetition_penalty
    if penalty not in (0, 1):
        seen = np.unique(np.array([*spec.prompt_ids, *spec.output_ids], dtype=np.int64))
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    counts = Counter(spec.output_ids)
    if counts and (sampling.frequency_penalty or sampling.presence_penalty):
        ids = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
        times = np.fromiter(counts.values(), dtype=np.float64, count=len(counts))
        logits[ids] -= sampling.frequency_penalty * times + sampling.presence_penalty
    return logits


def _kept(scaled: Logits, sampling: wire.ResolvedSampling) -> tuple[npt.NDArray[np.int64], Logits]:
    """Ids left by the cuts, with their logits; `scaled` is by temperature already."""
    largest = scaled.max()
    cut_p = 0 < sampling.top_p < 1
    cut_k = 0 < sampling.top_k < len(scaled)
    kept: npt.NDArray[np.int64]
    if cut_k or cut_p:
        kept = _ranked(scaled, sampling.top_k if cut_k else len(scaled), cut_p)
        if cut_p:
            # Weights of what top-k kept; without top-k, of all tokens.
            weights = np.exp(scaled[kept] - largest)
            total = weights.sum() if cut_k else np.exp(scaled - largest).sum()
            reached = np.cumsum(weights) >= sampling.top_p * total
            if not reached.any() and not cut_k:
                kept = _ranked(scaled, len(scaled), False)
                reached = np.cumsum(np.exp(scaled[kept] - largest)) >= sampling.top_p * total
            if reached.any():
                kept = kept[: int(reached.argmax()) + 1]
    else:
        kept = np.flatnonzero(scaled > -np.inf)
    if sampling.min_p > 0:
        kept = kept[scaled[kept] >= largest + np.log(sampling.min_p)]
    return kept, scaled[kept]


def _ranked(scaled: Logits, count: int, first_only: bool) -> npt.NDArray[np.int64]:
    """The `count` largest, in falling order, equal ones by id.

    `first_only`: at most `_FIRST_CANDIDATES`, since a sum over few is likely
    to do.
    """
    count = min(count, _FIRST_CANDIDATES) if first_only and count == len(scaled) else count
    if count < len(scaled):
        border = np.partition(scaled, len(scaled) - count)[len(scaled) - count]
        candidates = np.flatnonzero(scaled >= border)
    else:
        candidates = np.arange(len(scaled))
    order = np.argsort(-scaled[candidates], kind="stable")[:count]
    ranked: npt.NDArray[np.int64] = candidates[order]
    return ranked


def _logprobs(logits: Logits, token_id: int, count: int) -> inference.TokenLogprobs:
    """Of the model's own distribution, before anything was changed."""
    largest = logits.max()
    normal = largest + np.log(np.exp(logits - largest).sum())
    top = _ranked(logits, count, False) if count else np.empty(0, dtype=np.int64)
    return inference.TokenLogprobs(
        logprob=min(0.0, float(logits[token_id] - normal)),
        top_ids=top.tolist(),
        top_logprobs=np.minimum(logits[top] - normal, 0.0).tolist(),
    )
