"""The border to vLLM's own gRPC: `vllm.Inference` and `vllm.Control`.

Its Rust front end serves them (`--grpc-port`). Dropping a stream does not end a request
there: `Control.Abort` does. It tells no load and has no tokeniser; changes of the cache go
by ZMQ, at an address that it tells.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

import grpc.aio
from google.protobuf import json_format, struct_pb2

from kvmesh.engine.remote.grpc_calls import CALL_S, answer, known, messages
from kvmesh.engine.remote.server import (
    CacheBatch,
    Description,
    FailedError,
    Load,
    Logprobs,
    LostError,
    Part,
    Request,
    ServerError,
    UnreachableError,
    UnusableError,
)
from kvmesh.engine.vllm import border
from kvmesh.vllm_wire import control_pb2 as control
from kvmesh.vllm_wire import control_pb2_grpc as control_rpc
from kvmesh.vllm_wire import inference_pb2 as inference
from kvmesh.vllm_wire import inference_pb2_grpc as inference_rpc

_MAX_LOGPROBS = 20
"""As vLLM allows as shipped."""
_HIGH_WATER = 100_000
_ANY_HOST = ("*", "0.0.0.0", "[::]")


class FirstPartyServer:
    """One server."""

    ends_dropped = False

    def __init__(self, channel: grpc.aio.Channel, host: str, *, priorities: bool = False) -> None:
        """`host`: of the server, where its publisher is. `priorities`: it orders its queue by
        the priorities that requests have."""
        self._channel = channel
        self._host = host
        self._priorities = priorities
        self._control = control_rpc.ControlStub(channel)
        self._inference = inference_rpc.InferenceStub(channel)
        self._model: control.ModelInfo | None = None
        self._instance = ""
        self._source: control.KvEventSource | None = None
        self._first_priority: int | None = None

    # -- who it is -----------------------------------------------------------

    async def describe(self) -> Description:
        """Raises UnreachableError, UnusableError."""
        info, model = await self._server_info(), await self._model_info()
        if not model.supports_token_ids_input:
            raise UnusableError("the server takes no token ids")
        self._model, self._instance = model, info.instance_id
        ranks = max(1, info.parallelism.data_parallel_size)
        self._source = await self._publisher(info.parallelism.data_parallel_rank)
        block = int(info.effective_attention_block_size) or info.kv_block_size
        return Description(
            engine="vllm",
            model=model.served_model_name or model.model_id,
            path=model.model_id,
            context_length=info.max_model_len,
            block_tokens=block,
            pool_tokens=info.total_kv_blocks * info.kv_block_size,
            max_batch=min(info.max_running_requests, (1 << 32) - 1),
            cache_events=self._source is not None and ranks == 1,
            max_logprobs=_MAX_LOGPROBS,
            lacks=frozenset() if self._priorities else frozenset({"priority"}),
            adapters=await self._adapters() if model.supports_lora else {},
        )

    async def _server_info(self) -> control.ServerInfo:
        return await answer(
            self._control.GetServerInfo(control.GetServerInfoRequest(), timeout=CALL_S)
        )

    async def _model_info(self) -> control.ModelInfo:
        return await answer(
            self._control.GetModelInfo(control.GetModelInfoRequest(), timeout=CALL_S)
        )

    async def _adapters(self) -> Mapping[str, str]:
        asked = control.ListLorasRequest()
        listed = await answer(self._control.ListLoras(asked, timeout=CALL_S))
        # Named by where they come from: the wire has no digest of what is in them.
        return {
            adapter.lora_name: hashlib.sha256(
                f"{adapter.lora_name}\0{adapter.source_path}".encode()
            ).hexdigest()
            for adapter in listed.adapters
        }

    async def _publisher(self, rank: int) -> control.KvEventSource | None:
        """Where changes of the cache are published, if they can be read here."""
        asked = control.GetKvEventSourcesRequest()
        try:
            told = await answer(self._control.GetKvEventSources(asked, timeout=CALL_S))
        except UnreachableError:
            raise
        except ServerError:
            return None
        packages = all(importlib.util.find_spec(name) for name in ("zmq", "msgspec"))
        sources: list[control.KvEventSource] = [*told.sources]
        for source in sources:
            if source.transport == "zmq" and packages and source.data_parallel_rank == rank:
                return source
        return None

    async def check(self) -> None:
        """Raises UnreachableError, LostError."""
        info, model = await known(self._server_info()), await known(self._model_info())
        if self._model is not None and (model, info.instance_id) != (self._model, self._instance):
            raise LostError("the server has started anew, or has another model")

    # -- requests ------------------------------------------------------------

    async def generate(self, request: Request) -> AsyncGenerator[Part, None]:
        """Raises ServerError."""
        wanted = request.sampling_params.logprobs
        call = self._inference.GenerateStream(self._asked(request))
        async with aclosing(messages(call)) as answers:
            async for message in answers:
                said = message.outputs
                part = Part([*said.token_ids], _logprobs(said, wanted))
                if said.HasField("finish_info"):
                    _finish(part, said.finish_info)
                    yield part
                    return
                if part.ids:
                    yield part

    def _asked(self, request: Request) -> inference.GenerateRequest:
        given = request.sampling_params
        made = inference.GenerateRequest(
            request_id=request.request_id,
            token_ids=inference.TokenIds(ids=request.prompt),
            temperature=given.temperature,
            sampling=inference.RandomSampling(
                top_k=given.top_k, top_p=given.top_p, min_p=given.min_p, seed=given.seed
            ),
            decoding=inference.DecodingParameters(
                presence_penalty=given.presence_penalty,
                frequency_penalty=given.frequency_penalty,
                repetition_penalty=given.repetition_penalty,
                logit_bias=given.logit_bias,
            ),
            stopping=inference.StoppingCriteria(
                max_new_tokens=given.max_tokens or 0,
                min_new_tokens=given.min_tokens,
                stop_token_ids=given.stop_token_ids,
                # The router says what ends a text.
                ignore_eos=True,
            ),
            response=inference.ResponseOptions(
                output_text=False,
                output_token_ids=True,
                output_logprobs=given.logprobs is not None,
            ),
            kv=inference.KVCacheParameters(cache_salt=request.cache_salt),
            lora_name=request.adapter,
            # Else draws would go by the server's own settings.
            watermarking=False,
        )
        if given.logprobs:
            made.response.output_candidates.top_n = given.logprobs
        if self._priorities:
            if self._first_priority is None:
                self._first_priority = request.priority
            made.priority = max(-(1 << 31), min(request.priority - self._first_priority, 1 << 30))
        if given.grammar is not None:
            kind, text = given.grammar
            if kind == "json_object":
                made.decoding.json_object = True
            else:
                setattr(made.decoding, kind, text)
        if given.transfer is not None:
            made.kv.kv_transfer_params.CopyFrom(
                json_format.ParseDict(given.transfer, struct_pb2.Struct())
            )
        return made

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Raises ServerError."""
        await answer(
            self._control.Abort(control.AbortRequest(request_ids=request_ids), timeout=CALL_S)
        )

    # -- load and cache ------------------------------------------------------

    async def load(self) -> Load | None:
        """None: it does not say."""
        return None

    async def cache_batches(self) -> AsyncGenerator[CacheBatch, None]:
        """What its publisher says, from now on."""
        if self._source is None:
            raise UnusableError("the server publishes no cache events")
        zmq, decode = border.zmq_names(), border.event_decoder()
        context = border.zmq_asyncio().Context()
        socket = context.socket(zmq.SUB)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
            socket.connect(endpoint(self._source.endpoint, self._host))
            socket.subscribe(self._source.topic.encode())
            while True:
                frames = await socket.recv_multipart()
                if len(frames) != 3:
                    raise FailedError(f"cache events come in {len(frames)} frames, not in 3")
                _, number, payload = frames
                yield CacheBatch(int.from_bytes(number, "big"), _events(decode, payload))
        finally:
            socket.close()
            context.term()

    async def close(self) -> None:
        """Drops the connection."""
        await self._channel.close()


def endpoint(told: str, host: str) -> str:
    """A publisher's address as others reach it: of any address of its own it is its host's."""
    parts = urlsplit(told)
    name, colon, port = parts.netloc.rpartition(":")
    if parts.scheme == "tcp" and colon and name in _ANY_HOST:
        return f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
    return told


def _events(decode: Any, payload: bytes) -> Sequence[Mapping[str, Any]]:
    try:
        events = decode(payload)[1]
    except (ValueError, IndexError, TypeError) as error:
        raise FailedError(f"a batch of cache events cannot be read: {error}") from error
    return [event for event in events if isinstance(event, dict)]


def _logprobs(said: inference.SequenceOutput, wanted: int | None) -> Logprobs | None:
    if wanted is None or not said.token_ids:
        return None
    found = Logprobs()
    for at, (id, value) in enumerate(zip(said.token_ids, said.logprobs, strict=True)):
        others: list[tuple[int, float]] = []
        if at < len(said.candidate_tokens):
            others = [(token.id, token.logprob) for token in said.candidate_tokens[at].tokens]
        # Candidates are other tokens than the one that was drawn.
        if wanted and all(token != id for token, _ in others):
            others.append((id, value))
        found.add(id, value, others)
    return found


def _finish(part: Part, said: inference.FinishInfo) -> None:
    reasons = inference.FinishInfo.FinishReason
    match said.finish_reason:
        case reasons.STOP:
            part.finish_reason = border.STOP
        case reasons.LENGTH:
            part.finish_reason = border.LENGTH
        case reasons.ABORTED:
            part.finish_reason = border.ABORT
        case _:
            raise FailedError("the server ended the request without a reason")
    match said.WhichOneof("stop_reason"):
        case "stop_token_id":
            part.stop_token_id = said.stop_token_id
        case "eos_token_id":
            part.stop_token_id = said.eos_token_id
    if said.HasField("num_cached_tokens"):
        part.cached_tokens = said.num_cached_tokens
    if said.HasField("kv_transfer_params"):
        part.transfer = json_format.MessageToDict(said.kv_transfer_params)
