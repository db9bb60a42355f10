"""A vLLM engine core without vLLM: takes requests, gives tokens a step at a time.

As vLLM's own: it answers in order, says nothing of what was aborted, holds a
prefill's blocks after its end until somebody takes them, and tells how many blocks
requests hold. The next token is a function of the tokens before it.
"""

import asyncio
import time
import zlib
from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace

from kvmesh.engine.core.chain import Chain
from kvmesh.engine.vllm import border
from kvmesh.engine.vllm.cache import VllmCache
from kvmesh.engine.vllm.engine import VllmEngine
from kvmesh.engine.vllm.loop import CoreLoop
from kvmesh.engine.vllm.placements import Adapters, Placements
from kvmesh.engine.vllm.state import Geometry, State
from kvmesh.v1 import worker_pb2 as wire

BLOCK = 32
CONNECTOR = "FakeConnector"


def next_token(ids):
    """What the model says after these."""
    return zlib.crc32(array("I", ids).tobytes()) % 1900 + 50


def tokens_after(ids, count):
    said = list(ids)
    for _ in range(count):
        said.append(next_token(said))
    return said[len(ids) :]


@dataclass
class Request:
    """As EngineCoreRequest."""

    request_id: str
    prompt: list
    sampling_params: SimpleNamespace
    priority: int
    abort_immediately: bool = False
    output: list = field(default_factory=list)
    computed: int = 0


def make_request(request_id, prompt, sampling, *, arrival_time, priority, cache_salt, adapter):
    """As the InputProcessor."""
    if sampling.get("top_k", 0) > 1000:
        raise border.RefusedError("top_k is too large", "top_k")
    params = SimpleNamespace(logprobs=None, structured_outputs=None, extra_args=None)
    params.__dict__.update(sampling)
    return Request(request_id, list(prompt), params, priority)


class FakeCore:
    """The client of it, and the core itself."""

    def __init__(self, blocks=100, step_tokens=64, step_s=0.0) -> None:
        self.blocks = blocks
        self.step_tokens = step_tokens
        self.step_s = step_s
        self.running = {}
        self.kept = {}
        """Blocks of finished prefills, by request."""
        self.seen = []
        """Names of what came, in order."""
        self.batches = []
        """Names of the requests of each step."""
        self.released = []
        self.bad_adapters = {}
        """What is said of them, by name; None: it dies of it."""
        self.broken = None
        self.stopped = False
        self.wake = asyncio.Event()
        self.loop = None

    def start_core(self, config):
        return self

    # -- as vllm.v1.engine.core_client.AsyncMPClient --

    async def get_supported_tasks_async(self):
        await asyncio.sleep(0)
        return ("generate",)

    async def add_lora_async(self, adapter):
        await asyncio.sleep(0)
        self.seen.append(("adapter", adapter))
        problem = self.bad_adapters.get(adapter, "")
        if problem is None:
            self.broken = RuntimeError("EngineCore encountered an issue")
            self.wake.set()
            await asyncio.Event().wait()
        if problem:
            raise Exception(f"Call to add_lora method failed: {problem}")
        return True

    async def reset_prefix_cache_async(self):
        await asyncio.sleep(0)
        return True

    async def add_request_async(self, request):
        await asyncio.sleep(0)
        self.seen.append(("add", request.request_id))
        self.running[request.request_id] = request
        if request.abort_immediately:
            self._drop(request.request_id)
        self.wake.set()

    async def abort_requests_async(self, ids):
        await asyncio.sleep(0)
        self.seen.append(("abort", *ids))
        for id in ids:
            self._drop(id)
        self.wake.set()

    def _drop(self, id):
        request = self.running.pop(id, None)
        params = request and (request.sampling_params.extra_args or {}).get("kv_transfer_params")
        if params and params.get("do_remote_prefill") and not request.output:
            self.released.append(params["remote_request_id"])

    async def get_output_async(self):
        self.loop = asyncio.get_running_loop()
        while not self.running and self.broken is None:
            self.wake.clear()
            await self.wake.wait()
            if not self.running and self.broken is None:
                return self._outputs([], None)
        if self.step_s:
            await asyncio.sleep(self.step_s)
        else:
            await asyncio.sleep(0)
        if self.broken is not None:
            raise self.broken
        return self._step()

    def shutdown(self, timeout=None):
        self.stopped = True

    # -- the core --

    def _step(self):
        room, outputs, decoding, prompt_tokens = self.step_tokens, [], 0, 0
        self.batches.append(sorted(self.running))
        for request in sorted(self.running.values(), key=lambda r: r.priority):
            first = not request.output
            if first:
                tokens = min(room, len(request.prompt) - request.computed)
                request.computed += tokens
                prompt_tokens += tokens
                room -= tokens
                if request.computed < len(request.prompt):
                    continue
            else:
                decoding += 1
            token = next_token([*request.prompt, *request.output])
            request.output.append(token)
            outputs.append(self._output(request, token, first))
        details = SimpleNamespace(
            num_ctx_tokens=prompt_tokens, num_generation_requests=decoding, elapsed_ms=1.0
        )
        return self._outputs(outputs, details if prompt_tokens or decoding else None)

    def _output(self, request, token, first):
        params, finish, stop, transfer = request.sampling_params, None, None, None
        if token in params.stop_token_ids and len(request.output) >= params.min_tokens:
            finish, stop = border.STOP, token
        elif len(request.output) >= params.max_tokens:
            finish = border.LENGTH
        if finish is not None:
            del self.running[request.request_id]
            transfer = self._finished(request)
        logprobs = None
        if params.logprobs is not None:
            row = [token, *range(params.logprobs)]
            logprobs = SimpleNamespace(
                logprob_token_ids=[row], logprobs=[[-float(at) for at in range(len(row))]]
            )
        stats = SimpleNamespace(
            num_computed_tokens=len(request.prompt),
            num_local_cached_tokens=0,
            num_external_cached_tokens=0,
        )
        return SimpleNamespace(
            request_id=request.request_id,
            new_token_ids=[token],
            new_logprobs=logprobs,
            finish_reason=finish,
            stop_reason=stop,
            events=[SimpleNamespace(type=border.SCHEDULED, timestamp=time.monotonic())]
            if first
            else None,
            kv_transfer_params=transfer,
            prefill_stats=stats if first else None,
        )

    def _finished(self, request):
        params = (request.sampling_params.extra_args or {}).get("kv_transfer_params")
        if params is None:
            return None
        if params.get("do_remote_prefill"):
            self.released.append(params["remote_request_id"])
            return None
        self.kept[request.request_id] = -(-len(request.prompt) // BLOCK)
        return {"do_remote_prefill": True, "remote_request_id": request.request_id}

    def let_go(self):
        """Finished prefills were taken, or their lease has ended."""
        self.kept.clear()
        self.loop.call_soon_threadsafe(self.wake.set)

    def _outputs(self, outputs, details):
        held = sum(-(-(r.computed + len(r.output)) // BLOCK) for r in self.running.values())
        held += sum(self.kept.values())
        stats = SimpleNamespace(
            num_running_reqs=len(self.running),
            num_waiting_reqs=0,
            num_skipped_waiting_reqs=0,
            kv_cache_usage=held / self.blocks,
            iteration_details=details,
        )
        return SimpleNamespace(outputs=outputs, scheduler_stats=stats, timestamp=time.monotonic())


class FakeVllmEngine(VllmEngine):
    """An engine whose core is a fake: it needs no warm-up."""

    def __init__(self, core, *parts) -> None:
        super().__init__(*parts)
        self.core = core

    def start(self, sink) -> None:
        self._model.CopyFrom(wire.StepModel(a_ms=1.0, saturating_chunk=128))
        self._loop.post(lambda core: core.serve(sink))


def engine(
    connector="", context_length=4096, lease_ms=0.0, clock=time.monotonic, endpoints=None,
    **core_settings,
):  # fmt: skip
    """An engine that has started its core."""
    core = FakeCore(**core_settings)
    geometry = Geometry(core.blocks, BLOCK, core.step_tokens, context_length, 2000)
    loop = CoreLoop(core, None, endpoints)
    loop.start_core()
    chain = Chain("ab" * 32, {})
    cache = VllmCache(chain.root, core.blocks)
    model = wire.StepModel()
    state = State(geometry, model)
    placements = Placements(
        geometry, make_request, cache, chain,
        connector=connector, adapters=Adapters(), max_logprobs=20, lease_ms=lease_ms,
        clock=clock,
    )  # fmt: skip
    loop.attach(state, cache, placements)
    capabilities = wire.Capabilities(engine="vllm", pool_blocks=core.blocks, block_tokens=BLOCK)
    return FakeVllmEngine(core, loop, state, cache, capabilities, model)
