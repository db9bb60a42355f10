"""The border to SMG's servicer of a vLLM engine: `vllm.grpc.engine.VllmEngine`.

    python -m vllm.entrypoints.launchers.grpc_server

Its wire has no cache salt, no priority and no adapter. A stream's tokens come in chunks;
its last message repeats the last chunk's.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import grpc.aio

from kvmesh.engine.remote.grpc_calls import CALL_S, answer, known, messages, told
from kvmesh.engine.remote.server import (
    FINISHED,
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
from kvmesh.engine.remote.tokenizer import MOST_BYTES, unzipped
from kvmesh.engine.vllm import border
from kvmesh.vllm_wire import engine_pb2 as engine
from kvmesh.vllm_wire import engine_pb2_grpc as rpc
from kvmesh.vllm_wire import smg_common_pb2 as common

LACKS = frozenset({"cache_salt", "priority"})
_MAX_LOGPROBS = 19
"""vLLM allows 20 as shipped, and the servicer counts the token that was drawn among them."""
_SEED_MASK = (1 << 31) - 1
_HASH_MASK = (1 << 64) - 1
_PROBE_S = 1.0
"""A servicer without cache events says so at once."""
_TOKENIZER_S = 60.0


class SmgServer:
    """One server."""

    ends_dropped = False
    """With the servicer in Python it does; the one in Rust is another program."""

    def __init__(self, channel: grpc.aio.Channel, rank: int | None = None) -> None:
        """`rank`: of its data-parallel ranks the one to use; None: it has one, or chooses."""
        self._channel = channel
        self._stub = rpc.VllmEngineStub(channel)
        self._rank = rank
        self._model: engine.GetModelInfoResponse | None = None

    # -- who it is -----------------------------------------------------------

    async def describe(self) -> Description:
        """Raises UnreachableError, UnusableError."""
        model = self._model = await self._model_info()
        info = await answer(self._stub.GetServerInfo(engine.GetServerInfoRequest(), timeout=CALL_S))
        if not model.is_generation:
            raise UnusableError(f"the server's model {model.model_path} generates no text")
        load = self._of_rank(
            (await answer(self._stub.GetLoads(engine.GetLoadsRequest(), timeout=CALL_S))).loads
        )
        spread = info.data_parallel_size > 1 and self._rank is None
        dtype = info.kv_cache_dtype
        if dtype in ("", "auto"):
            dtype = info.model_dtype.removeprefix("torch.")
        return Description(
            engine="vllm",
            model=model.served_model_name or model.model_path,
            path=model.model_path,
            context_length=model.max_context_length,
            vocabulary_size=model.vocab_size,
            end_of_text_ids=tuple(id for id in model.eos_token_ids if id >= 0),
            block_tokens=max(0, info.block_size),
            pool_tokens=max(0, load.max_total_num_tokens),
            max_batch=max(0, info.max_num_seqs or load.max_running_requests),
            connector=info.kv_connector,
            kv_dtype=dtype,
            # Of several ranks each has a cache of its own.
            cache_events=not spread and await self._tells_of_cache(),
            max_logprobs=_MAX_LOGPROBS,
            lacks=LACKS,
            files=await self._files(),
        )

    async def _model_info(self) -> engine.GetModelInfoResponse:
        return await answer(self._stub.GetModelInfo(engine.GetModelInfoRequest(), timeout=CALL_S))

    async def _tells_of_cache(self) -> bool:
        call = self._subscription()
        try:
            await call.read()
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return True
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return False
            raise told(error) from error
        finally:
            call.cancel()
        return True

    def _subscription(self, timeout: float | None = _PROBE_S) -> Any:
        wanted = common.SubscribeKvEventsRequest(load_records_before_first_batch=True)
        return self._stub.SubscribeKvEvents(wanted, timeout=timeout)

    async def _files(self) -> Mapping[str, bytes]:
        archive = bytearray()
        asked = common.GetTokenizerRequest()
        try:
            async with aclosing(
                messages(self._stub.GetTokenizer(asked, timeout=_TOKENIZER_S))
            ) as chunks:
                async for chunk in chunks:
                    archive += chunk.data
                    if len(archive) > MOST_BYTES:
                        raise UnusableError("the server's tokeniser is larger than 256 MiB")
        except (UnreachableError, UnusableError):
            raise
        except ServerError:
            # It was started with a model's name in place of a folder, say.
            return {}
        return unzipped(bytes(archive))

    async def check(self) -> None:
        """Raises UnreachableError, LostError."""
        health = await known(
            answer(self._stub.HealthCheck(engine.HealthCheckRequest(), timeout=CALL_S))
        )
        if not health.healthy:
            raise LostError(f"the server is not well: {health.message}")
        if self._model is not None and await self._known_model() != self._model:
            raise LostError("the server has another model now")

    async def _known_model(self) -> Any:
        return await known(
            answer(self._stub.GetModelInfo(engine.GetModelInfoRequest(), timeout=CALL_S))
        )

    # -- requests ------------------------------------------------------------

    async def generate(self, request: Request) -> AsyncGenerator[Part, None]:
        """Raises ServerError."""
        wanted = request.sampling_params.logprobs
        came = False
        async with aclosing(messages(self._stub.Generate(asked(request, self._rank)))) as answers:
            async for message in answers:
                kind = message.WhichOneof("response")
                if kind == "chunk" and message.chunk.token_ids:
                    came = True
                    chunk = message.chunk
                    yield Part(
                        [*chunk.token_ids],
                        _logprobs(chunk.output_logprobs, chunk.token_ids, wanted),
                        chunk.cached_tokens,
                    )
                elif kind == "complete":
                    yield _completed(message.complete, wanted, tokens=not came)
                    return

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Raises ServerError."""
        await answer(self._stub.Abort(engine.AbortRequest(request_ids=request_ids), timeout=CALL_S))

    # -- load and cache ------------------------------------------------------

    async def load(self) -> Load | None:
        """Raises UnreachableError."""
        told_of = await known(answer(self._stub.GetLoads(engine.GetLoadsRequest(), timeout=CALL_S)))
        load = self._of_rank(told_of.loads)
        return Load(load.num_running_reqs, load.num_waiting_reqs, load.token_usage)

    def _of_rank(self, loads: Iterable[engine.SchedulerLoad]) -> engine.SchedulerLoad:
        """One rank's, or of all that there are the sums and the mean of their use."""
        found = [load for load in loads if self._rank is None or load.dp_rank == self._rank]
        if not found:
            return engine.SchedulerLoad()
        if len(found) == 1:
            return found[0]
        return engine.SchedulerLoad(
            num_running_reqs=sum(load.num_running_reqs for load in found),
            num_waiting_reqs=sum(load.num_waiting_reqs for load in found),
            max_total_num_tokens=sum(load.max_total_num_tokens for load in found),
            max_running_requests=sum(load.max_running_requests for load in found),
            token_usage=sum(load.token_usage for load in found) / len(found),
        )

    async def cache_batches(self) -> AsyncGenerator[CacheBatch, None]:
        """Raises ServerError."""
        async with aclosing(messages(self._subscription(timeout=None))) as batches:
            async for batch in batches:
                if self._rank is not None and batch.dp_rank != self._rank:
                    continue
                load = None
                if batch.HasField("load"):
                    said = batch.load
                    load = Load(said.running_requests, said.waiting_requests, said.token_usage)
                if load is not None and batch.load.load_only:
                    yield CacheBatch(None, load=load)
                else:
                    events = [event for each in batch.events for event in cache_event(each)]
                    yield CacheBatch(batch.sequence_number, events, load)

    async def close(self) -> None:
        """Drops the connection."""
        await self._channel.close()


def asked(request: Request, rank: int | None) -> engine.GenerateRequest:
    """A request as the wire has it."""
    given = request.sampling_params
    sampling = engine.SamplingParams(
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        min_p=given.min_p,
        frequency_penalty=given.frequency_penalty,
        presence_penalty=given.presence_penalty,
        repetition_penalty=given.repetition_penalty,
        max_tokens=given.max_tokens,
        min_tokens=given.min_tokens,
        stop_token_ids=given.stop_token_ids,
        # The router says what ends a text.
        ignore_eos=True,
        seed=None if given.seed is None else given.seed & _SEED_MASK,
        logit_bias=given.logit_bias,
    )
    if given.logprobs is not None:
        # The token that was drawn is one of those that are told.
        sampling.logprobs = given.logprobs + 1 if given.logprobs else 0
    if given.grammar is not None:
        kind, text = given.grammar
        match kind:
            case "json":
                sampling.json_schema = text
            case "json_object":
                sampling.json_object = True
            case "regex":
                sampling.regex = text
            case _:
                sampling.grammar = text
        sampling.grammar_from_first_token = True
    return engine.GenerateRequest(
        request_id=request.request_id,
        tokenized=engine.TokenizedInput(input_ids=request.prompt),
        sampling_params=sampling,
        stream=True,
        kv_transfer_params_json=json.dumps(given.transfer) if given.transfer else None,
        data_parallel_rank=rank,
    )


def _logprobs(
    said: engine.OutputLogProbs, ids: Sequence[int], wanted: int | None
) -> Logprobs | None:
    """Raises FailedError where they are not of these ids."""
    if wanted is None:
        return None
    if [*said.token_ids] != [*ids]:
        raise FailedError("the server leaves log-probabilities out that were asked for")
    found = Logprobs()
    for at, (id, value) in enumerate(zip(said.token_ids, said.token_logprobs, strict=True)):
        top = said.top_logprobs[at] if at < len(said.top_logprobs) else engine.TopLogProbs()
        found.add(id, value, [*zip(top.token_ids, top.values, strict=True)])
    return found


def _completed(said: engine.GenerateComplete, wanted: int | None, *, tokens: bool) -> Part:
    reason = FINISHED.get(said.finish_reason, border.ERROR)
    if reason == border.ERROR:
        raise FailedError(f"the server ended the request: {said.finish_reason}")
    stop = said.matched_token_id if said.WhichOneof("matched_stop") == "matched_token_id" else None
    transfer = None
    if said.HasField("kv_transfer_params_json"):
        try:
            transfer = json.loads(said.kv_transfer_params_json)
        except ValueError as error:
            raise FailedError(f"the hand-off is no JSON: {error}") from error
    return Part(
        [*said.output_ids] if tokens else [],
        _logprobs(said.output_logprobs, said.output_ids, wanted) if tokens else None,
        said.cached_tokens,
        reason,
        stop,
        transfer,
    )


def cache_event(event: common.KvCacheEvent) -> Iterable[Mapping[str, Any]]:
    """An event as vLLM's publisher has it; none of blocks that are not the device's."""
    match event.WhichOneof("data"):
        case "stored" if _on_device(event.stored):
            stored = event.stored
            yield {
                "type": "BlockStored",
                "block_hashes": [block.block_hash & _HASH_MASK for block in stored.blocks],
                "parent_block_hash": stored.parent_block_hash & _HASH_MASK
                if stored.HasField("parent_block_hash")
                else None,
                "token_ids": [id for block in stored.blocks for id in block.token_ids],
                "block_size": stored.blocks[0].block_size if stored.blocks else 0,
                "lora_name": stored.lora_name,
                "group_idx": stored.group_idx,
                "extra_keys": [[_key(key) for key in block.extra_keys] for block in stored.blocks],
            }
        case "removed" if _on_device(event.removed):
            yield {
                "type": "BlockRemoved",
                "block_hashes": [hash & _HASH_MASK for hash in event.removed.block_hashes],
                "group_idx": event.removed.group_idx,
            }
        case "cleared":
            yield {"type": "AllBlocksCleared"}


def _on_device(said: common.KvBlocksStored | common.KvBlocksRemoved) -> bool:
    local = said.locality in (
        common.KV_CACHE_LOCALITY_UNSPECIFIED,
        common.KV_CACHE_LOCALITY_LOCAL,
    )
    return local and said.tier in (
        common.KV_CACHE_TIER_UNSPECIFIED,
        common.KV_CACHE_TIER_DEVICE,
    )


def _key(key: common.KvBlockExtraKey) -> Any:
    match key.WhichOneof("key"):
        case "text":
            return key.text
        case "blob":
            return key.blob
        case "number":
            return key.number
        case _:
            return (key.multimodal.identifier, key.multimodal.offset)
