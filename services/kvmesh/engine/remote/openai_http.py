"""The border to servers that speak OpenAI's HTTP alone: /v1/completions with token ids.

A stream that goes on elsewhere needs the tokens' ids, so a server that does not tell them
cannot be attached. vLLM and SGLang do where `return_token_ids` asks for it, llama.cpp with
its log-probabilities.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from kvmesh.engine.remote import dialects, metrics
from kvmesh.engine.remote.server import (
    CacheBatch,
    Description,
    FailedError,
    Load,
    LostError,
    Part,
    RejectedError,
    Request,
    Sampling,
    ServerError,
    UnreachableError,
    UnusableError,
)

_log = logging.getLogger(__name__)

_CALL_S = 3.0
_CONNECT_S = 3.0
_FIRST_S = 600.0
"""A stream may be silent for as long as its prompt takes; the router has deadlines of its own."""
_KEPT_S = 2.0
"""How long an idle connection is kept. Servers close theirs after 5 s, and a request that crosses
that is lost."""
_REST_S = 1.0
"""Most that the end of an answer may take to come behind its last event."""
_MOST_LINE_BYTES = 1 << 20
_MOST_TEXT = 300
_REFUSED = range(400, 500)
_BUSY = (408, 425, 429)
_NO_CALL = (401, 403, 404, 405, 501)
_INVALID_ARGUMENT, _UNAUTHENTICATED = 3, 16


@dataclass(frozen=True, slots=True)
class Access:
    """How a server is reached."""

    url: str
    model: str = ""
    """Which of its models; empty: its first."""
    key: str = ""
    """Sent as a bearer token."""
    priorities: bool = False
    """It orders its queue by the priorities that requests have."""
    ca: bytes = b""
    """Authorities that vouch for it, PEM; empty: the usual ones."""


class OpenAiServer:
    """One server. To be used in one event loop."""

    ends_dropped = True

    def __init__(self, access: Access) -> None:
        self._access = access
        headers = {"authorization": f"Bearer {access.key}"} if access.key else {}
        self._http = httpx.AsyncClient(
            base_url=access.url,
            headers=headers,
            timeout=httpx.Timeout(_FIRST_S, connect=_CONNECT_S, pool=None),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=256, keepalive_expiry=_KEPT_S
            ),
            verify=ssl.create_default_context(cadata=access.ca.decode()) if access.ca else True,
            # A proxy of the environment is for other things.
            trust_env=False,
        )
        self._model: Mapping[str, Any] = {}
        self._dialect = dialects.PLAIN
        self._can_abort = True
        self._rests: set[asyncio.Task[None]] = set()
        """Read the ends of answers that nobody waits for any more."""

    # -- who it is -----------------------------------------------------------

    async def describe(self) -> Description:
        """Raises UnreachableError, UnusableError."""
        self._model = model = await self._chosen()
        self._dialect = dialect = dialects.of(str(model.get("owned_by", "")))
        props = await self._json("/props") if dialect is dialects.LLAMA_CPP else {}
        found = Description(
            engine=dialect.name,
            model=str(model["id"]),
            path=str(model.get("root") or model["id"]),
            context_length=_context_length(model, props),
            # Its slots.
            max_batch=int(props.get("total_slots") or 0),
            max_logprobs=dialect.max_logprobs,
            lacks=dialect.lacks | await self._lacks(),
            skips_cache=dialect.skips_cache,
        )
        size, pool = metrics.pool(await self._metrics())
        await self._try()
        return replace(found, block_tokens=size, pool_tokens=pool)

    async def _lacks(self) -> frozenset[str]:
        """What this one lacks beside its kind. Raises UnreachableError, UnusableError."""
        lacks = set() if self._access.priorities else {"priority"}
        if self._dialect is dialects.SGLANG:
            # It takes seeds in any case, and draws by them in this mode alone.
            info = await self._json("/server_info")
            if not info.get("enable_deterministic_inference"):
                lacks.add("seed")
        return frozenset(lacks)

    async def _chosen(self) -> Mapping[str, Any]:
        listed = await self._json("/v1/models")
        models = [each for each in listed.get("data") or () if isinstance(each, dict)]
        wanted = self._access.model
        for model in models:
            if model.get("id") and wanted in ("", model["id"]):
                return model
        known = ", ".join(str(model.get("id")) for model in models) or "none"
        raise UnusableError(f"model is {wanted!r}; the server's are {known}")

    async def _json(self, path: str) -> dict[str, Any]:
        try:
            answer = await self._http.get(path, timeout=_CALL_S)
        except httpx.HTTPError as error:
            raise _unreachable(error) from error
        if answer.status_code in (401, 403):
            raise UnusableError(
                f"the server answers {path} by {answer.status_code}; set server_key to a key of it"
            )
        if answer.status_code != 200:
            raise UnreachableError(f"the server answers {path} by {answer.status_code}")
        try:
            found = answer.json()
        except ValueError as error:
            raise UnusableError(f"the server answers {path} by what is no JSON") from error
        return found if isinstance(found, dict) else {}

    async def _metrics(self) -> str:
        """As Prometheus' text; empty: it has none."""
        try:
            answer = await self._http.get("/metrics", timeout=_CALL_S)
        except httpx.HTTPError as error:
            raise _unreachable(error) from error
        return answer.text if answer.status_code == 200 else ""

    async def _try(self) -> None:
        """Asks for a token, whose id has to come. Raises UnusableError."""
        sampling = Sampling(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 1, 0, [])
        request = Request("kvmesh-attach", [1], sampling)
        try:
            ids = [id async for part in self.generate(request) for id in part.ids]
        except UnreachableError:
            raise
        except ServerError as error:
            raise UnusableError(f"the server takes no prompt of token ids: {error}") from error
        if not ids:
            raise UnusableError(
                "the server tells no token ids (return_token_ids, or log-probabilities with "
                "ids); a stream could not go on elsewhere. Use its gRPC, or kvmesh worker"
            )

    async def check(self) -> None:
        """Raises UnreachableError, LostError."""
        try:
            listed = await self._json("/v1/models")
        except UnusableError as error:
            raise LostError(str(error)) from error
        name = self._model["id"]
        if not any(
            model.get("id") == name and model.get("root") == self._model.get("root")
            for model in listed.get("data") or ()
        ):
            raise LostError(f"the server does not have {name} any more")

    # -- requests ------------------------------------------------------------

    async def generate(self, request: Request) -> AsyncGenerator[Part, None]:
        """Raises ServerError."""
        dialect, model = self._dialect, str(self._model["id"])
        body = dialect.body(request, model, priorities=self._access.priorities)
        reader = dialects.Reader(dialect, request)
        try:
            post = self._http.build_request("POST", "/v1/completions", json=body)
            answer = await self._http.send(post, stream=True)
            lines = _lines(answer.aiter_bytes())
            try:
                if answer.status_code != 200:
                    raise _refusal(answer.status_code, await answer.aread())
                async for line in lines:
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        break
                    part = reader.take(_event(data))
                    if part is None:
                        continue
                    if reader.spelt:
                        reader.complete(part, await self._tokens(reader.spelt))
                    yield part
                if (part := reader.rest()) is not None:
                    yield part
            finally:
                if reader.ended_there:
                    # Whoever reads the parts goes with the last one: the end comes behind it.
                    rest = asyncio.create_task(_read_out(answer, lines), name="rest")
                    self._rests.add(rest)
                    rest.add_done_callback(self._rests.discard)
                else:
                    await answer.aclose()
        except httpx.HTTPError as error:
            # An answer that has ended is whole, though its usage never came.
            if (part := reader.rest()) is None:
                raise _unreachable(error) from error
            yield part

    async def _tokens(self, text: str) -> list[int]:
        """Ids of a text, by llama.cpp's own call. Raises FailedError."""
        asked = {"content": text, "add_special": False, "parse_special": False}
        answer = await self._http.post("/tokenize", json=asked, timeout=_CALL_S)
        try:
            if answer.status_code != 200:
                raise ValueError(f"status {answer.status_code}")
            return [int(id) for id in answer.json()["tokens"]]
        except (ValueError, KeyError, TypeError) as error:
            raise FailedError(
                f"the server's answer of /tokenize cannot be read: {error}"
            ) from error

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Where the server has no call for it, dropping its stream has to do: see `dialects`."""
        for name in request_ids:
            call = self._dialect.abort(name)
            if call is None or not self._can_abort:
                return
            path, body = call
            try:
                answer = await self._http.post(path, json=body, timeout=_CALL_S)
            except httpx.HTTPError as error:
                raise _unreachable(error) from error
            if answer.status_code in _NO_CALL:
                # As vLLM does without --enable-scale-out: the dropped stream has to do.
                _log.info("the server has no call to abort path=%s", path)
                self._can_abort = False
            elif answer.status_code != 200:
                raise FailedError(f"the server answers {path} by {answer.status_code}")

    # -- load and cache ------------------------------------------------------

    async def load(self) -> Load | None:
        """None: it does not say. Raises UnreachableError."""
        return metrics.load(await self._metrics())

    async def cache_batches(self) -> AsyncGenerator[CacheBatch, None]:
        """Nothing: HTTP tells of no cache."""
        raise UnusableError("HTTP tells of no cache")
        yield CacheBatch(None)

    async def close(self) -> None:
        """Drops the connections."""
        rests = [*self._rests]
        for rest in rests:
            rest.cancel()
        await asyncio.gather(*rests, return_exceptions=True)
        await self._http.aclose()


def _context_length(model: Mapping[str, Any], props: Mapping[str, Any]) -> int:
    if model.get("max_model_len"):
        return int(model["max_model_len"])
    return int((props.get("default_generation_settings") or {}).get("n_ctx") or 0)


async def _lines(parts: AsyncIterable[bytes]) -> AsyncGenerator[str, None]:
    """Lines of a stream of events. They end with line feeds alone: other characters that some
    take for the end of a line (U+2028, say) may be in a text. Raises FailedError."""
    rest = b""
    async for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        if len(rest) > _MOST_LINE_BYTES:
            raise FailedError("the server sends a line of more than 1 MiB")
        for line in whole:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


async def _read_out(answer: httpx.Response, lines: AsyncIterable[str]) -> None:
    """Reads what comes behind the last event of an answer: a connection that is left within a
    body serves no other request."""
    try:
        async with asyncio.timeout(_REST_S):
            async for _ in lines:
                pass
    except (TimeoutError, httpx.HTTPError, FailedError) as error:
        # The answer is whole; what is lost is a connection.
        _log.debug("the end of an answer did not come: %s", type(error).__name__)
    finally:
        await answer.aclose()


def _unreachable(error: httpx.HTTPError) -> UnreachableError:
    return UnreachableError(f"{type(error).__name__}: {str(error)[:_MOST_TEXT]}")


def _refusal(status: int, body: bytes) -> ServerError:
    text = body[:_MOST_TEXT].decode("utf-8", "replace")
    message = f"the server answers {status}: {text}"
    if status in (401, 403):
        return RejectedError(message, _UNAUTHENTICATED)
    if status in _REFUSED and status not in _BUSY:
        return RejectedError(message, _INVALID_ARGUMENT)
    return FailedError(message)


def _event(data: str) -> Mapping[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise FailedError("the server sends an event that is no JSON") from error
    if not isinstance(found, dict):
        raise FailedError("the server sends an event that is no object")
    if (problem := found.get("error")) is not None:
        raise FailedError(f"the server ended the request: {str(problem)[:_MOST_TEXT]}")
    return found
