"""From a worker's settings to a vLLM engine, ready to start."""

from __future__ import annotations

import ipaddress
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmesh.engine.core.chain import Chain
from kvmesh.engine.vllm import adapters, border, hand_off
from kvmesh.engine.vllm.arguments import ArgumentError, kv_transfer, parse
from kvmesh.engine.vllm.cache import VllmCache
from kvmesh.engine.vllm.engine import Guard, VllmEngine
from kvmesh.engine.vllm.loop import CoreLoop, Endpoints
from kvmesh.engine.vllm.model import ServedModel, find
from kvmesh.engine.vllm.placements import Adapters, Placements
from kvmesh.engine.vllm.state import Geometry, State
from kvmesh.models import NO_END, Cancellation, ModelError
from kvmesh.setting_values import ValueNotAllowedError, boolean
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.engines import BuiltEngine
from kvmesh.worker.settings import SettingError, WorkerSettings, split_address
from kvmesh.worker.tokenizer_files import TokenizerFiles

MAX_LOGPROBS = 20
"""Most alternatives with log-probability, as inference.proto allows."""

_CPU_BLOCK_TOKENS = 32
"""What vLLM's CPU attention wants a multiple of; its own default of 128 caches coarsely."""

_MEMORY = ("kv_cache_memory_bytes", "num_gpu_blocks_override", "gpu_memory_utilization")
_LORA = "lora."


@dataclass(frozen=True, slots=True)
class OwnArguments:
    """What engine_arguments says to kvmesh's side of vLLM."""

    allow_untested: bool
    adapters: Mapping[str, Path]
    """Folders of LoRA adapters by name."""

    @classmethod
    def of(cls, given: Mapping[str, str]) -> OwnArguments:
        """From text. Raises SettingError."""
        allow, folders = False, {}
        for key, text in given.items():
            if key == "allow_untested":
                try:
                    allow = boolean(key, text)
                except ValueNotAllowedError as error:
                    raise SettingError(f"engine_arguments: {error}") from error
            elif key.startswith(_LORA) and len(key) > len(_LORA):
                folder = Path(text).expanduser()
                if not (folder / adapters.CONFIG).is_file():
                    raise SettingError(
                        f"engine_arguments: {key} is {text!r}; allowed is the folder of a LoRA "
                        f"adapter, with {adapters.CONFIG}"
                    )
                folders[key.removeprefix(_LORA)] = folder.resolve()
            else:
                raise SettingError(
                    f"engine_arguments: {key} is no argument of kvmesh's vllm engine; allowed are "
                    "allow_untested, lora.NAME. vLLM's own go by vllm_arg"
                )
        return cls(allow, folders)


def build(
    settings: WorkerSettings,
    worker_id: str,
    incarnation: int,
    progress: Callable[[str], None],
    cancellation: Cancellation | None = None,
) -> BuiltEngine:
    """Starts vLLM's engine core, which loads the model. Raises SettingError; where it is given
    up before the core starts `LoadCancelledError`."""
    cancellation = cancellation or Cancellation()
    own = OwnArguments.of(settings.engine_arguments)
    try:
        version = border.installed_version()
        border.check_version(version, own.allow_untested)
        served = find(settings.model, progress, cancellation)
        if not served.end_of_text_ids:
            raise SettingError(f"model {served.folder}: {NO_END}")
        progress(f"vllm: {version}, importing")
        host = settings.advertise_host or split_address("listen", settings.listen)[0]
        with reserved_port(host) as port, ExitStack() as stack:
            border.set_environment(_environment(settings, host, port))
            vllm = border.load()
            # A folder that only this user can enter.
            folder = Path(tempfile.mkdtemp(prefix="kvmesh-vllm-"))
            guard = Guard(folder)
            stack.callback(guard.close)
            endpoints = _endpoints(folder)
            arguments = _arguments(settings, vllm, own, served, endpoints)
            config = vllm.configure(arguments)
            if vllm.on_cpu and not set(_MEMORY) & set(arguments):
                _size_pool(config, settings.kv_pool_tokens)
            progress(f"vllm: {_described(arguments)}")
            caches = bool(config.cache_config.enable_prefix_caching)
            loras = _adapters(vllm, own)
            cancellation.check()
            loop = CoreLoop(vllm, config, endpoints if caches else None, loras.requests)
            stack.callback(loop.stop)
            tasks = loop.start_core().tasks
            parts = _Parts(vllm, config, served, loras, tasks)
            built = _built(parts, settings.served_name, loop, guard, progress)
            # It is the engine's to close them from here on.
            stack.pop_all()
            return built
    except (border.VllmError, ArgumentError, ModelError) as error:
        raise SettingError(str(error)) from error


def _environment(settings: WorkerSettings, host: str, nixl_port: int) -> dict[str, str]:
    """What vLLM and its connectors read from the environment."""
    return {
        # Threads run here: a forked child could lock up.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        # Standard output is the worker's.
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": {"warn": "WARNING"}.get(
            settings.log_level, settings.log_level.upper()
        ),
        "OMP_NUM_THREADS": str(settings.threads),
        # Else it binds to all cores it sees, whoever else is on them.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # NIXL's first contact, and the host that it tells peers. Ports are told with each hand-off.
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(nixl_port),
    }


@contextmanager
def reserved_port(host: str) -> Iterator[int]:
    """A port that nobody else is given while this is open.

    vLLM listens there a minute later, and waits for ever where somebody else has it by then. A
    second socket may bind it that says SO_REUSEADDR, as vLLM's does, since this one does not
    listen; one that asks for any port, or goes out, does not get it.
    """
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        version = 4
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    with socket.socket(family) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", 0))
        yield int(held.getsockname()[1])


def _endpoints(folder: Path) -> Endpoints:
    return Endpoints(f"ipc://{folder}/events", f"ipc://{folder}/replay")


def _arguments(
    settings: WorkerSettings,
    vllm: border.Vllm,
    own: OwnArguments,
    served: ServedModel,
    endpoints: Endpoints,
) -> dict[str, Any]:
    given = parse(settings.vllm_arg, vllm.argument_names)
    arguments: dict[str, Any] = {
        "model": str(served.folder),
        # The virtual deadline orders the engine's queue as it does the router's.
        "scheduling_policy": "priority",
        "enable_prefix_caching": True,
        "max_logprobs": MAX_LOGPROBS,
        # Draws go by what the request says, not by the model's own defaults.
        "generation_config": "vllm",
    }
    if vllm.on_cpu:
        arguments |= {"dtype": settings.dtype, "block_size": _CPU_BLOCK_TOKENS}
    elif settings.dtype != "float32":
        # The setting's default is right for CPUs only; here the model's own type is.
        arguments["dtype"] = settings.dtype
    if own.adapters:
        arguments |= adapters.arguments(own.adapters, given, border.lora_ranks())
    arguments |= given
    transfer = kv_transfer(
        arguments.get("kv_transfer_config"),
        on_cpu=vllm.on_cpu,
        hands_off=settings.role != "both",
    )
    if transfer is not None:
        arguments["kv_transfer_config"] = transfer
        if vllm.on_cpu:
            border.set_environment({"UCX_TLS": "tcp,sm,self"})
    return arguments | {
        "enable_logging_iteration_details": True,
        "disable_log_stats": False,
        "kv_events_config": {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": endpoints.events,
            "replay_endpoint": endpoints.replay,
        },
    }


def _described(arguments: Mapping[str, Any]) -> str:
    left_out = ("kv_events_config", "enable_logging_iteration_details", "disable_log_stats")
    return " ".join(f"{k}={v}" for k, v in sorted(arguments.items()) if k not in left_out)


def _size_pool(config: border.CoreConfig, tokens: int) -> None:
    """Memory of the KV pool by the worker's setting; vLLM would take most of the machine's."""
    model, cache = config.model_config, config.cache_config
    parallel = config.parallel_config
    heads = model.get_num_kv_heads(parallel)
    layers = model.get_num_layers(parallel)
    size = 2 * heads * model.get_head_size() * layers * model.dtype.itemsize
    # One block is vLLM's own.
    blocks = -(-tokens // cache.block_size) + 1
    cache.kv_cache_memory_bytes = blocks * cache.block_size * size


@dataclass(frozen=True, slots=True)
class _Parts:
    """What an engine is made of, once its core has started."""

    vllm: border.Vllm
    config: border.CoreConfig
    served: ServedModel
    adapters: Adapters
    tasks: tuple[str, ...]

    @property
    def connector(self) -> str:
        """Name of the KV connector; empty: there is none."""
        return str(getattr(self.config.kv_transfer_config, "kv_connector", None) or "")


def _built(
    parts: _Parts,
    served_name: str,
    loop: CoreLoop,
    guard: Guard,
    progress: Callable[[str], None],
) -> BuiltEngine:
    geometry, served = _geometry(parts.config), parts.served
    chain = Chain(served.digest, parts.adapters.digests)
    # What is cached are blocks of one group: as many as there are at all.
    cache = VllmCache(chain.root, int(parts.config.cache_config.num_gpu_blocks))
    step_model = wire.StepModel()
    state = State(geometry, step_model)
    loop.attach(state, cache, _placements(parts, geometry, cache, chain))
    progress(
        f"KV pool: {geometry.pool_blocks} blocks of {geometry.block_tokens} tokens, "
        + (f"connector {parts.connector}" if parts.connector else "no connector")
    )
    record = wire.ModelRecord(
        name=served_name or served.name,
        digest=served.digest,
        context_length=geometry.context_length,
        vocabulary_size=geometry.vocabulary_size,
        end_of_text_ids=served.end_of_text_ids,
        adapters=parts.adapters.digests,
    )
    capabilities = _capabilities(parts.config, geometry, served.digest, parts.connector)
    engine = VllmEngine(loop, state, cache, capabilities, step_model, guard)
    return BuiltEngine(engine, record, TokenizerFiles.read(served.folder))


def _geometry(config: border.CoreConfig) -> Geometry:
    model, cache = config.model_config, config.cache_config
    geometry = Geometry(
        pool_blocks=_pool_blocks(cache, int(model.max_model_len)),
        block_tokens=int(cache.block_size),
        step_tokens=int(config.scheduler_config.max_num_batched_tokens),
        context_length=int(model.max_model_len),
        vocabulary_size=int(model.get_vocab_size()),
    )
    if geometry.block_tokens % 16:
        raise ArgumentError(
            f"vllm_arg block_size is {geometry.block_tokens}; allowed are multiples of 16"
        )
    return geometry


def _pool_blocks(cache: Any, context_length: int) -> int:
    """Blocks of tokens that the pool holds.

    A model with several groups of layers (full attention beside sliding windows or states) has
    one pool for all of them, and a token takes a block in more than one. vLLM itself says how
    many requests of the whole context fit.
    """
    blocks = int(cache.num_gpu_blocks)
    fit = getattr(cache, "kv_cache_max_concurrency", None)
    if fit:
        # Never more: blocks that windows spare are not counted on.
        blocks = min(blocks, round(fit * -(-context_length // int(cache.block_size))))
    # One block is vLLM's own.
    return max(1, blocks - 1)


def _adapters(vllm: border.Vllm, own: OwnArguments) -> Adapters:
    numbered = enumerate(sorted(own.adapters.items()), start=1)
    return Adapters(
        {name: adapters.digest(folder) for name, folder in own.adapters.items()},
        {name: vllm.adapter(name, number, str(folder)) for number, (name, folder) in numbered},
    )


def _placements(parts: _Parts, geometry: Geometry, cache: VllmCache, chain: Chain) -> Placements:
    return Placements(
        geometry,
        parts.vllm.request_maker(parts.config, parts.tasks),
        cache,
        chain,
        connector=parts.connector,
        adapters=parts.adapters,
        max_logprobs=MAX_LOGPROBS,
        lease_ms=lease_ms(parts.config.kv_transfer_config, parts.connector),
        # vLLM's CPU build dies of a seeded prompt that it computes in more than one chunk
        # (0.32: a generator of the CPU cannot be set back).
        seeded=not parts.vllm.on_cpu,
    )


def lease_ms(config: Any, connector: str) -> float:
    """How long a connector keeps a prompt's blocks for decode. 0: not known."""
    extra = getattr(config, "kv_connector_extra_config", None) or {}
    return 1000 * min(_leases_s(connector, extra), default=0.0)


def _leases_s(connector: str, extra: Mapping[str, Any]) -> Iterator[float]:
    if connector.startswith("Nixl"):
        yield float(extra.get("kv_lease_duration", hand_off.NIXL_LEASE_S))
    # MultiConnector's, each configured as it would be by itself.
    for part in extra.get("connectors", ()):
        yield from _leases_s(
            str(part.get("kv_connector")), part.get("kv_connector_extra_config") or {}
        )


def _capabilities(
    config: border.CoreConfig, geometry: Geometry, digest: str, connector: str
) -> wire.Capabilities:
    cache = config.cache_config
    named = str(cache.cache_dtype)
    dtype = str(config.model_config.dtype).removeprefix("torch.") if named == "auto" else named
    return wire.Capabilities(
        engine="vllm",
        engine_connector=connector,
        grammars=True,
        max_logprobs=MAX_LOGPROBS,
        cache_events=bool(cache.enable_prefix_caching),
        block_tokens=geometry.block_tokens,
        pool_blocks=geometry.pool_blocks,
        hash_scheme=Chain.SCHEME,
        # Its blocks are its connector's: no layout of ours.
        kv=wire.KvCompatibility(model_digest=digest, dtype=dtype),
        max_batch=int(config.scheduler_config.max_num_seqs),
    )
