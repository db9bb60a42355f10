"""A server with `vllm.grpc.engine.VllmEngine`, over a real socket.

    python fake_smg.py PORT STEP_MS SLOW_WHILE

As SMG's servicer in Python: a chunk a step, then a last message that repeats the last
chunk's tokens; log-probabilities of the token that was drawn and the likeliest, as many as
were asked for in all; cache events from the subscription on.
"""

import asyncio
import json
import sys
from pathlib import Path

import grpc
import grpc.aio

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "vllm")]

from fake_model import (
    BLOCK,
    BLOCKS,
    CONTEXT,
    END,
    MODEL,
    VOCABULARY,
    FakeModel,
    Running,
    archive,
)

from kvmesh.vllm_wire import engine_pb2 as engine
from kvmesh.vllm_wire import engine_pb2_grpc as rpc
from kvmesh.vllm_wire import smg_common_pb2 as common


class FakeSmg(rpc.VllmEngineServicer):
    def __init__(self, model: FakeModel, *, events=True, tokenizer=True) -> None:
        self.model = model
        self.events = events
        self.tokenizer = tokenizer
        self.healthy = True
        self.name = MODEL
        self.tokens_told = 0

    async def HealthCheck(self, request, context):
        return engine.HealthCheckResponse(healthy=self.healthy, message="as told")

    async def GetModelInfo(self, request, context):
        return engine.GetModelInfoResponse(
            model_path=f"/models/{self.name}",
            served_model_name=self.name,
            is_generation=True,
            max_context_length=CONTEXT,
            vocab_size=VOCABULARY,
            eos_token_ids=[END],
        )

    async def GetServerInfo(self, request, context):
        return engine.GetServerInfoResponse(
            server_type="vllm-grpc",
            kv_connector=self.model.connector,
            data_parallel_size=1,
            kv_cache_dtype="auto",
            model_dtype="torch.float32",
            block_size=BLOCK,
            max_num_seqs=64,
        )

    async def GetLoads(self, request, context):
        load = engine.SchedulerLoad(
            num_running_reqs=len(self.model.running) - self.model.waiting,
            num_waiting_reqs=self.model.waiting,
            max_total_num_tokens=BLOCK * BLOCKS,
            token_usage=self.model.usage,
        )
        return engine.GetLoadsResponse(dp_rank_count=1, loads=[load])

    async def GetTokenizer(self, request, context):
        if not self.tokenizer:
            await context.abort(grpc.StatusCode.INTERNAL, "No tokenizer files found")
        packed = archive()
        for at in range(0, len(packed), 65536):
            yield common.GetTokenizerChunk(data=packed[at : at + 65536])

    async def Abort(self, request, context):
        for name in request.request_ids:
            self.model.abort(name)
        return engine.AbortResponse()

    async def Generate(self, request, context):
        self.model.requests.append(request)
        if self.model.fail is not None:
            code, text = self.model.fail.args
            await context.abort(code, text)
        given = request.sampling_params
        transfer = None
        if request.HasField("kv_transfer_params_json"):
            transfer = json.loads(request.kv_transfer_params_json)
        running = Running(
            [*request.tokenized.input_ids],
            given.max_tokens,
            given.min_tokens,
            tuple(given.stop_token_ids),
            transfer,
        )
        wanted = given.logprobs if given.HasField("logprobs") else None
        async for made in self.model.run(request.request_id, running):
            chunk = engine.GenerateStreamChunk(
                token_ids=made.ids,
                prompt_tokens=len(running.prompt),
                cached_tokens=self.model.cached,
            )
            if wanted is not None and made.ids:
                chunk.output_logprobs.CopyFrom(_logprobs(made.ids, wanted))
            self.tokens_told += len(made.ids)
            if made.ids:
                yield engine.GenerateResponse(chunk=chunk)
            if made.finish is not None:
                yield engine.GenerateResponse(complete=_complete(made, self.model.cached))

    async def SubscribeKvEvents(self, request, context):
        if not self.events:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not enabled")
        feed = asyncio.Queue()
        self.model.feeds.append(feed)
        number, hashes = 0, {}
        try:
            await context.send_initial_metadata(())
            while True:
                kind, ids = await feed.get()
                if kind == "end":
                    await context.abort(grpc.StatusCode.DATA_LOSS, "a gap")
                number += 1
                batch = common.KvEventBatch(sequence_number=number)
                if kind == "cleared":
                    batch.events.add().cleared.SetInParent()
                else:
                    _stored(batch, ids, hashes)
                yield batch
        finally:
            self.model.feeds.remove(feed)


def _stored(batch, ids, hashes) -> None:
    parent, event = None, None
    for at in range(0, len(ids), BLOCK):
        block = tuple(ids[at : at + BLOCK])
        # Negative, as half of all hashes are in a signed number.
        name = hashes.setdefault((parent, block), -1 - len(hashes))
        event = batch.events.add().stored
        if parent is not None:
            event.parent_block_hash = parent
        event.blocks.add(block_hash=name, token_ids=block, block_size=BLOCK)
        parent = name


def _logprobs(ids, wanted):
    # The token that was drawn, then the likeliest, as many in all as asked for.
    found = engine.OutputLogProbs(token_ids=ids, token_logprobs=[-2.5] * len(ids))
    for id in ids:
        if wanted:
            others = [(10 + at, -1.0 - at) for at in range(wanted - 1)]
            found.top_logprobs.add(
                token_ids=[id, *(other for other, _ in others)],
                values=[-2.5, *(value for _, value in others)],
            )
    return found


def _complete(made, cached):
    return engine.GenerateComplete(
        output_ids=made.ids,
        cached_tokens=cached,
        finish_reason=made.finish,
        matched_token_id=made.stop,
        kv_transfer_params_json=json.dumps(made.transfer) if made.transfer else None,
    )


class NeedsKey(grpc.aio.ServerInterceptor):
    """Refuses calls without it."""

    def __init__(self, key) -> None:
        self.key = key

    async def intercept_service(self, continuation, details):
        if ("authorization", f"Bearer {self.key}") in details.invocation_metadata:
            return await continuation(details)

        async def refuse(request, context):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such key")

        return grpc.unary_unary_rpc_method_handler(refuse)


async def serve(service, port=0, credentials=None, key=""):
    server = grpc.aio.server(
        options=[("grpc.so_reuseport", 0)], interceptors=[NeedsKey(key)] if key else []
    )
    rpc.add_VllmEngineServicer_to_server(service, server)
    address = f"127.0.0.1:{port}"
    if credentials is None:
        bound = server.add_insecure_port(address)
    else:
        bound = server.add_secure_port(address, credentials)
    await server.start()
    return server, bound


async def _main() -> None:
    port, step_ms = int(sys.argv[1]), float(sys.argv[2])
    model = FakeModel(step_ms / 1000, slow_while=sys.argv[3])
    server, bound = await serve(FakeSmg(model), port)
    print(f"listening on 127.0.0.1:{bound}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_main())
