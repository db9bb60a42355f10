"""A server with vLLM's own `vllm.Inference` and `vllm.Control`, over a real socket.

python fake_first_party.py PORT STEP_MS SLOW_WHILE
"""

import asyncio
import sys
from pathlib import Path

import grpc.aio

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "vllm")]

from fake_model import BLOCK, BLOCKS, CONTEXT, MODEL, FakeModel, Running
from google.protobuf import json_format, struct_pb2

from kvmesh.vllm_wire import control_pb2 as control
from kvmesh.vllm_wire import control_pb2_grpc as control_rpc
from kvmesh.vllm_wire import inference_pb2 as inference
from kvmesh.vllm_wire import inference_pb2_grpc as inference_rpc

REASONS = {
    "stop": inference.FinishInfo.STOP,
    "length": inference.FinishInfo.LENGTH,
    "abort": inference.FinishInfo.ABORTED,
}


class FakeControl(control_rpc.ControlServicer):
    def __init__(self, model: FakeModel) -> None:
        self.model = model
        self.instance = "first"
        self.sources: list[control.KvEventSource] = []

    async def GetServerInfo(self, request, context):
        return control.ServerInfo(
            engine_version="0.32.0",
            instance_id=self.instance,
            parallelism=control.ParallelismInfo(data_parallel_size=1),
            max_model_len=CONTEXT,
            kv_block_size=BLOCK,
            total_kv_blocks=BLOCKS,
            max_running_requests=64,
        )

    async def GetModelInfo(self, request, context):
        return control.ModelInfo(
            model_id=f"/models/{MODEL}",
            served_model_name=MODEL,
            supports_token_ids_input=True,
            supports_lora=True,
        )

    async def ListLoras(self, request, context):
        poet = control.LoraAdapter(lora_id=1, lora_name="poet", source_path="/adapters/poet")
        return control.ListLorasResponse(adapters=[poet])

    async def GetKvEventSources(self, request, context):
        return control.GetKvEventSourcesResponse(sources=self.sources)

    async def Abort(self, request, context):
        for name in request.request_ids:
            self.model.abort(name)
        return control.AbortResponse()


class FakeInference(inference_rpc.InferenceServicer):
    def __init__(self, model: FakeModel) -> None:
        self.model = model

    async def GenerateStream(self, request, context):
        self.model.requests.append(request)
        if self.model.fail is not None:
            await context.abort(*self.model.fail.args)
        stopping, transfer = request.stopping, None
        if request.kv.HasField("kv_transfer_params"):
            transfer = json_format.MessageToDict(request.kv.kv_transfer_params)
        running = Running(
            [*request.token_ids.ids],
            stopping.max_new_tokens,
            stopping.min_new_tokens,
            tuple(stopping.stop_token_ids),
            transfer,
        )
        told = False
        async for made in self.model.run(request.request_id, running):
            answer = inference.GenerateResponse()
            if not told:
                answer.prompt_info.num_prompt_tokens = len(running.prompt)
                told = True
            answer.outputs.token_ids.extend(made.ids)
            if request.response.output_logprobs:
                for _ in made.ids:
                    answer.outputs.logprobs.append(-2.5)
                    candidates = answer.outputs.candidate_tokens.add()
                    for at in range(request.response.output_candidates.top_n):
                        candidates.tokens.add(id=10 + at, logprob=-1.0 - at, rank=at + 1)
            if made.finish is not None:
                info = answer.outputs.finish_info
                info.finish_reason = REASONS[made.finish]
                if self.model.cached:
                    info.num_cached_tokens = self.model.cached
                if made.stop is not None:
                    info.stop_token_id = made.stop
                if made.transfer:
                    json_format.ParseDict(made.transfer, struct_pb2.Struct())
                    info.kv_transfer_params.update(made.transfer)
            yield answer


async def serve(model: FakeModel, port=0):
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    control_service = FakeControl(model)
    control_rpc.add_ControlServicer_to_server(control_service, server)
    inference_rpc.add_InferenceServicer_to_server(FakeInference(model), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, bound, control_service


async def _main() -> None:
    model = FakeModel(float(sys.argv[2]) / 1000, slow_while=sys.argv[3])
    server, bound, _ = await serve(model, int(sys.argv[1]))
    print(f"listening on 127.0.0.1:{bound}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_main())
