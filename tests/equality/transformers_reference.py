"""What transformers says to a prompt, with the margins of every choice."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from seeded_prompts import Prompt

from kvmesh.engine.core.runner import SampleSpec
from kvmesh.engine.torch.sampling import perturbed
from kvmesh.v1 import worker_pb2 as wire

GREEDY = {"temperature": 0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Expected:
    ids: tuple[int, ...]
    margins: tuple[float, ...]
    """Best choice over the second best, at each position; of a sampled
    stream those are logits with the noise of the draw."""


class Reference:
    """SmolLM2 in transformers, one prompt at a time, without batches or chunks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self._known: dict[tuple[int, tuple[int, ...], int], tuple[Expected, Expected]] = {}

    @torch.inference_mode()
    def expected(self, prompt: Prompt, tokens: int) -> tuple[Expected, Expected]:
        """Greedy and sampled output; computed once."""
        key = (prompt.number, tuple(prompt.ids), tokens)
        if key not in self._known:
            begun = self._model(torch.tensor([prompt.ids]), logits_to_keep=1, use_cache=True)
            first, cache = begun.logits[0, -1], begun.past_key_values
            # Output goes on in a copy: the prompt is computed once for both.
            copied = copy.deepcopy(cache)
            self._known[key] = (
                self._run(prompt, GREEDY, first, cache, tokens),
                self._run(prompt, prompt.sampling, first, copied, tokens),
            )
        return self._known[key]

    def _run(self, prompt: Prompt, sampling: dict, logits, cache, tokens: int) -> Expected:
        output: list[int] = []
        margins: list[float] = []
        spec = SampleSpec(
            sampling=wire.ResolvedSampling(**sampling),
            prompt_ids=prompt.ids,
            output_ids=output,
            logprobs=None,
        )
        while True:
            ids, scores = perturbed(logits.numpy().astype(np.float64), spec)
            best = int(scores.argmax())
            others = np.delete(scores, best)
            margins.append(float(scores[best] - others.max()) if len(others) else float("inf"))
            output.append(int(ids[best]))
            if len(output) == tokens:
                return Expected(tuple(output), tuple(margins))
            step = self._model(torch.tensor([output[-1:]]), past_key_values=cache, use_cache=True)
            logits, cache = step.logits[0, -1], step.past_key_values
