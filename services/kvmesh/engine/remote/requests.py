"""Placements as requests of a server: what its wire cannot carry is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvmesh.engine.remote.server import Request, SaltedPrompts, Sampling
from kvmesh.engine.vllm.sampling import FIELDS, UnsupportedError

_NEUTRAL: Mapping[str, Any] = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "min_tokens": 0,
}
"""Values that ask for nothing."""


class RequestMaker:
    """As border.RequestMaker."""

    def __init__(
        self,
        lacks: frozenset[str],
        end_of_text_ids: tuple[int, ...],
        salts: SaltedPrompts | None,
    ) -> None:
        """`lacks`: as Description.lacks. `salts`: what becomes of them; None: they are sent."""
        self._lacks = lacks
        self._ends = frozenset(end_of_text_ids)
        self._salts = salts

    def __call__(
        self,
        request_id: str,
        prompt: list[int],
        sampling: Mapping[str, Any],
        *,
        arrival_time: float,
        priority: int,
        cache_salt: str,
        adapter: object | None,
    ) -> Request:
        """Raises UnsupportedError."""
        grammar = sampling.get("grammar")
        self._check(sampling, cache_salt, grammar)
        made = Sampling(
            temperature=sampling.get("temperature", 0.0),
            top_k=sampling.get("top_k", 0),
            top_p=sampling.get("top_p", 1.0),
            min_p=sampling.get("min_p", 0.0),
            repetition_penalty=sampling.get("repetition_penalty", 1.0),
            frequency_penalty=sampling.get("frequency_penalty", 0.0),
            presence_penalty=sampling.get("presence_penalty", 0.0),
            max_tokens=sampling["max_tokens"],
            min_tokens=sampling.get("min_tokens", 0),
            stop_token_ids=list(sampling.get("stop_token_ids", ())),
            seed=sampling.get("seed"),
            logprobs=sampling.get("logprobs"),
            logit_bias=sampling.get("logit_bias", {}),
            structured_outputs=dict(grammar) if grammar else None,
            extra_args=sampling.get("extra_args"),
        )
        name = adapter if isinstance(adapter, str) else ""
        return Request(
            request_id,
            prompt,
            made,
            priority,
            cache_salt if self._salts is None else "",
            name,
            # Also without a salt: it would find what a salted one has left there.
            uncached=self._salts is SaltedPrompts.UNCACHED,
        )

    def _check(self, sampling: Mapping[str, Any], salt: str, grammar: Any) -> None:
        for name, neutral in _NEUTRAL.items():
            if name in self._lacks and sampling.get(name, neutral) != neutral:
                raise UnsupportedError(FIELDS[name], f"the server's API has no {name}")
        if salt and self._salts is SaltedPrompts.REFUSE:
            raise UnsupportedError(
                "hints.cache_salt", "the server's API has no cache salt, see salted_prompts"
            )
        if grammar and any(f"grammar.{kind}" in self._lacks for kind in grammar):
            raise UnsupportedError("grammar", "the server's API has no such grammar")
        # A server that ends by itself at the model's own ends cannot go on after them.
        if "ignore_eos" in self._lacks and not self._ends <= set(
            sampling.get("stop_token_ids", ())
        ):
            raise UnsupportedError(
                "stopping.ignore_end_of_text", "the server ends at the model's end-of-text tokens"
            )
