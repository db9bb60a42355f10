"""What servers with OpenAI's HTTP have besides it: fields, abort calls, ids of tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmesh.engine.remote.server import (
    FINISHED,
    FailedError,
    Logprobs,
    Part,
    RejectedError,
    Request,
)
from kvmesh.engine.vllm import border

_SEED_MASK = (1 << 31) - 1
_ID = "token_id:"
_UNREADABLE = "\ufffd"
"""Stands in a text for bytes that are no character."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one kind of server differs."""

    name: str
    lacks: frozenset[str]
    """As Description.lacks."""
    max_logprobs: int = 0
    stops: bool = True
    """It ends at token ids of the request. Else the reader does, and the model's own ends hold
    as well."""
    skips_cache: bool = False
    """As Description.skips_cache."""

    def body(self, request: Request, model: str, *, priorities: bool) -> dict[str, Any]:
        """Of a request to /v1/completions. `priorities`: its queue goes by them."""
        given = request.sampling_params
        body: dict[str, Any] = {
            "model": model,
            "prompt": request.prompt,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "max_tokens": given.max_tokens,
            "temperature": given.temperature,
            "top_p": given.top_p,
            "frequency_penalty": given.frequency_penalty,
            "presence_penalty": given.presence_penalty,
        }
        if given.seed is not None:
            body["seed"] = given.seed & _SEED_MASK
        if given.logit_bias:
            body["logit_bias"] = {str(id): bias for id, bias in given.logit_bias.items()}
        if given.logprobs is not None:
            body |= {"logprobs": given.logprobs, "return_tokens_as_token_ids": True}
        if self.stops:
            body |= {
                "top_k": given.top_k,
                "min_p": given.min_p,
                "repetition_penalty": given.repetition_penalty,
                "min_tokens": given.min_tokens,
                "stop_token_ids": given.stop_token_ids,
                # The router says what ends a text.
                "ignore_eos": True,
                "skip_special_tokens": False,
            }
            if request.cache_salt:
                body["cache_salt"] = request.cache_salt
            if priorities and request.priority:
                body["priority"] = request.priority
        return body | self._own(request)

    def _own(self, request: Request) -> dict[str, Any]:
        given = request.sampling_params
        kind, text = given.grammar or ("", "")
        own: dict[str, Any]
        if self is VLLM:
            if not kind:
                return {"request_id": request.request_id}
            content: Any = True if kind == "json_object" else text
            return {"request_id": request.request_id, "structured_outputs": {kind: content}}
        if self is SGLANG:
            own = {"rid": request.request_id, "no_stop_trim": True}
            # 0 would keep none.
            own["top_k"] = given.top_k or -1
            match kind:
                case "json_object":
                    own["response_format"] = {"type": "json_object"}
                case "json":
                    own["json_schema"] = text
                case "regex":
                    own["regex"] = text
                case "grammar":
                    own["ebnf"] = text
            return own
        if self is LLAMA_CPP:
            # Ids come with log-probabilities only.
            own = {
                "logprobs": max(1, given.logprobs or 0),
                "top_k": given.top_k,
                "min_p": given.min_p,
                "cache_prompt": not request.uncached,
                # How many tokens it has made comes with each that it tells.
                "timings_per_token": True,
            }
            if kind:
                own["json_schema"] = {"type": "object"} if kind == "json_object" else _schema(text)
            return own
        return {}

    def abort(self, name: str) -> tuple[str, dict[str, Any]] | None:
        """Path and body of the call that ends a request; None: it ends with its stream."""
        if self is VLLM:
            # As its front end names what it has of the request.
            return "/inference/v1/abort_requests", {"request_ids": [f"cmpl-{name}-0"]}
        if self is SGLANG:
            return "/abort_request", {"rid": name}
        return None


VLLM = Dialect("vllm", frozenset(), max_logprobs=20)
SGLANG = Dialect("sglang", frozenset())
LLAMA_CPP = Dialect(
    "llama.cpp",
    frozenset(
        {
            # Its penalties count the prompt, too.
            "repetition_penalty", "frequency_penalty", "presence_penalty",
            # Of grammars it takes JSON schemas, and others in a form of its own.
            "min_tokens", "cache_salt", "grammar.regex", "grammar.grammar", "ignore_eos",
        }
    ),
    max_logprobs=20,
    stops=False,
    skips_cache=True,
)  # fmt: skip
PLAIN = Dialect(
    "openai",
    frozenset(
        {
            "top_k", "min_p", "repetition_penalty", "min_tokens", "cache_salt", "grammar.json",
            "grammar.json_object", "grammar.regex", "grammar.grammar", "ignore_eos",
        }
    ),
    stops=False,
)  # fmt: skip

_BY_OWNER = {"vllm": VLLM, "sglang": SGLANG, "llamacpp": LLAMA_CPP}


def of(owner: str) -> Dialect:
    """By `owned_by` of the server's models."""
    return _BY_OWNER.get(owner, PLAIN)


@dataclass(slots=True)
class Reader:
    """Reads the events of one stream."""

    dialect: Dialect
    request: Request
    spelt: str = ""
    """Text of the part that was taken last, where ids before its own were kept back: llama.cpp
    tells of a character that is several tokens the last one alone."""
    ended_there: bool = field(default=False)
    """The server has said that its answer is over; else only we take no more of it."""
    _over: bool = field(default=False)
    _made: int = 0
    """Tokens that the server says it has made."""
    _missing: int = 0
    """Those of them that were kept back before the part that was taken last."""
    _last: Part | None = None
    """The end, of which the usage is still to come."""

    def take(self, event: Mapping[str, Any]) -> Part | None:
        """What an event brought; None: nothing. Raises FailedError."""
        choices = event.get("choices") or ()
        if self._last is not None and (event.get("usage") or choices):
            if event.get("usage"):
                self._last.cached_tokens = _cached(event)
                self.ended_there = True
            # Else it goes on behind a token that ends the output for us alone.
            return self.rest()
        if not choices or self._over:
            return None
        choice = choices[0]
        given = self.request.sampling_params
        ids, logprobs = _tokens(choice, given.logprobs)
        part = Part(ids, logprobs, _cached(event))
        self._count(event, choice, part)
        finish = choice.get("finish_reason")
        if finish is not None:
            part.finish_reason = FINISHED.get(finish, border.ERROR)
            if part.finish_reason == border.ERROR:
                raise FailedError(f"the server ended the request: {finish}")
            stop = choice.get("stop_reason", choice.get("matched_stop"))
            part.stop_token_id = stop if isinstance(stop, int) else None
        said = self.ended_there = part.finish_reason is not None
        if not self.dialect.stops:
            self._stop(part, given.stop_token_ids or [])
        self._over = part.finish_reason is not None
        # Of a token that ends the output the server may think the same: its usage comes next.
        if not event.get("usage") and (said or (self._over and not self.spelt)):
            self._last = part
            return None
        return part if part.ids or self._over else None

    def _count(self, event: Mapping[str, Any], choice: Mapping[str, Any], part: Part) -> None:
        made = (event.get("timings") or {}).get("predicted_n")
        self.spelt, self._missing = "", 0
        if made is None:
            return
        missing, self._made = int(made) - self._made - len(part.ids), int(made)
        # Of a character that the end cut off nothing is told, and nothing can be shown.
        if missing > 0 and part.ids:
            self.spelt, self._missing = str(choice.get("text") or ""), missing

    def complete(self, part: Part, ids: Sequence[int]) -> None:
        """Puts in what was kept back: `ids` are those of its text, `spelt`. The model may have
        made it of others; what they spell is the same. Raises ServerError."""
        if part.stop_token_id is not None and part.stop_token_id not in ids[-1:]:
            # What it ends with has to stay.
            raise FailedError("the server kept back tokens before the one that ended the output")
        if len(ids) > len(part.ids) + self._missing:
            if _UNREADABLE in self.spelt:
                # Bytes that are no character: nothing of them could be shown.
                return
            raise FailedError(
                f"the server kept back {self._missing} tokens, of a text that is {len(ids)}"
            )
        if part.logprobs is not None:
            raise RejectedError(
                "llama.cpp tells no log-probabilities of characters that are several tokens"
            )
        part.ids = [*ids]

    def rest(self) -> Part | None:
        """The end, where it is to come without a usage."""
        last, self._last = self._last, None
        return last

    def _stop(self, part: Part, stops: list[int]) -> None:
        """Ends at a token that ends the output, where the server does not."""
        for at, id in enumerate(part.ids):
            if id in stops:
                del part.ids[at + 1 :]
                if part.logprobs is not None:
                    del part.logprobs.logprob_token_ids[at + 1 :]
                    del part.logprobs.logprobs[at + 1 :]
                part.finish_reason, part.stop_token_id = border.STOP, id
                return


def _schema(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RejectedError(f"grammar: the schema is no JSON: {error}") from error


def _cached(event: Mapping[str, Any]) -> int | None:
    details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens")
    return None if cached is None else int(cached)


def _tokens(choice: Mapping[str, Any], wanted: int | None) -> tuple[list[int], Logprobs | None]:
    """Ids and log-probabilities of a choice. Raises FailedError."""
    try:
        said = choice.get("logprobs") or {}
        if content := said.get("content"):
            ids = [int(token["id"]) for token in content]
            return ids, _from_content(content) if wanted is not None else None
        told = choice.get("token_ids")
        ids = [_id(name) for name in said.get("tokens") or ()] if told is None else [*told]
        if wanted is None or not ids:
            return [int(id) for id in ids], None
        found = Logprobs()
        tops = said.get("top_logprobs") or ()
        for at, (id, value) in enumerate(zip(ids, said["token_logprobs"], strict=True)):
            top = tops[at] if at < len(tops) and wanted else None
            found.add(int(id), float(value), [(_id(n), float(v)) for n, v in (top or {}).items()])
        return [int(id) for id in ids], found
    except (KeyError, TypeError, ValueError) as error:
        raise FailedError(f"the server's tokens cannot be read: {error}") from error


def _id(name: str) -> int:
    if not name.startswith(_ID):
        raise ValueError("a token has no id")
    return int(name.removeprefix(_ID))


def _from_content(content: Any) -> Logprobs:
    found = Logprobs()
    for token in content:
        tops = token.get("top_logprobs") or ()
        others = [(int(top["id"]), float(top["logprob"])) for top in tops]
        found.add(int(token["id"]), float(token["logprob"]), others)
    return found
