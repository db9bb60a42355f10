from kvmesh.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_BOTH: _ClassVar[Role]

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_WHOLE: _ClassVar[Stage]
    STAGE_PREFILL: _ClassVar[Stage]
    STAGE_DECODE: _ClassVar[Stage]

class RefusalReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_REASON_UNSPECIFIED: _ClassVar[RefusalReason]
    REFUSAL_REASON_NO_ROOM: _ClassVar[RefusalReason]
    REFUSAL_REASON_DRAINING: _ClassVar[RefusalReason]
    REFUSAL_REASON_UNKNOWN_TRANSFER: _ClassVar[RefusalReason]
    REFUSAL_REASON_TAKEN_OVER: _ClassVar[RefusalReason]
    REFUSAL_REASON_UNSUPPORTED: _ClassVar[RefusalReason]

class WorkerPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_PHASE_UNSPECIFIED: _ClassVar[WorkerPhase]
    WORKER_PHASE_LOADING: _ClassVar[WorkerPhase]
    WORKER_PHASE_WARMING_UP: _ClassVar[WorkerPhase]
    WORKER_PHASE_SERVING: _ClassVar[WorkerPhase]
    WORKER_PHASE_STOPPING: _ClassVar[WorkerPhase]

class CacheTier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_TIER_DEVICE: _ClassVar[CacheTier]
    CACHE_TIER_HOST: _ClassVar[CacheTier]
    CACHE_TIER_DISK: _ClassVar[CacheTier]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_BOTH: Role
STAGE_UNSPECIFIED: Stage
STAGE_WHOLE: Stage
STAGE_PREFILL: Stage
STAGE_DECODE: Stage
REFUSAL_REASON_UNSPECIFIED: RefusalReason
REFUSAL_REASON_NO_ROOM: RefusalReason
REFUSAL_REASON_DRAINING: RefusalReason
REFUSAL_REASON_UNKNOWN_TRANSFER: RefusalReason
REFUSAL_REASON_TAKEN_OVER: RefusalReason
REFUSAL_REASON_UNSUPPORTED: RefusalReason
WORKER_PHASE_UNSPECIFIED: WorkerPhase
WORKER_PHASE_LOADING: WorkerPhase
WORKER_PHASE_WARMING_UP: WorkerPhase
WORKER_PHASE_SERVING: WorkerPhase
WORKER_PHASE_STOPPING: WorkerPhase
CACHE_TIER_DEVICE: CacheTier
CACHE_TIER_HOST: CacheTier
CACHE_TIER_DISK: CacheTier

class RouterFrame(_message.Message):
    __slots__ = ("number", "hello", "place", "cancel", "hand_over", "find", "claim")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_FIELD_NUMBER: _ClassVar[int]
    FIND_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    number: int
    hello: RouterHello
    place: Place
    cancel: Cancel
    hand_over: HandOver
    find: Find
    claim: Claim
    def __init__(self, number: _Optional[int] = ..., hello: _Optional[_Union[RouterHello, _Mapping]] = ..., place: _Optional[_Union[Place, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., hand_over: _Optional[_Union[HandOver, _Mapping]] = ..., find: _Optional[_Union[Find, _Mapping]] = ..., claim: _Optional[_Union[Claim, _Mapping]] = ...) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("version", "router_id", "router_incarnation", "known_worker_incarnation", "known_event", "reattach")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    KNOWN_WORKER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    KNOWN_EVENT_FIELD_NUMBER: _ClassVar[int]
    REATTACH_FIELD_NUMBER: _ClassVar[int]
    version: ProtocolVersion
    router_id: str
    router_incarnation: int
    known_worker_incarnation: int
    known_event: int
    reattach: _containers.RepeatedCompositeFieldContainer[Reattach]
    def __init__(self, version: _Optional[_Union[ProtocolVersion, _Mapping]] = ..., router_id: _Optional[str] = ..., router_incarnation: _Optional[int] = ..., known_worker_incarnation: _Optional[int] = ..., known_event: _Optional[int] = ..., reattach: _Optional[_Iterable[_Union[Reattach, _Mapping]]] = ...) -> None: ...

class ProtocolVersion(_message.Message):
    __slots__ = ("major", "minor")
    MAJOR_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    major: int
    minor: int
    def __init__(self, major: _Optional[int] = ..., minor: _Optional[int] = ...) -> None: ...

class Reattach(_message.Message):
    __slots__ = ("generation", "owner", "attempt", "next_index")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    generation: bytes
    owner: int
    attempt: int
    next_index: int
    def __init__(self, generation: _Optional[bytes] = ..., owner: _Optional[int] = ..., attempt: _Optional[int] = ..., next_index: _Optional[int] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("generation", "owner", "attempt", "continuation", "stage", "hand_off", "prefix_from", "traceparent", "tracestate", "request_id", "alone", "resume_state", "tenant", "predicted_start_ms", "trace", "baggage")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CONTINUATION_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FROM_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    RESUME_STATE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_START_MS_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    BAGGAGE_FIELD_NUMBER: _ClassVar[int]
    generation: bytes
    owner: int
    attempt: int
    continuation: Continuation
    stage: Stage
    hand_off: HandOff
    prefix_from: PrefixSource
    traceparent: str
    tracestate: str
    request_id: str
    alone: bool
    resume_state: bytes
    tenant: str
    predicted_start_ms: float
    trace: bool
    baggage: str
    def __init__(self, generation: _Optional[bytes] = ..., owner: _Optional[int] = ..., attempt: _Optional[int] = ..., continuation: _Optional[_Union[Continuation, _Mapping]] = ..., stage: _Optional[_Union[Stage, str]] = ..., hand_off: _Optional[_Union[HandOff, _Mapping]] = ..., prefix_from: _Optional[_Union[PrefixSource, _Mapping]] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ..., request_id: _Optional[str] = ..., alone: bool = ..., resume_state: _Optional[bytes] = ..., tenant: _Optional[str] = ..., predicted_start_ms: _Optional[float] = ..., trace: bool = ..., baggage: _Optional[str] = ...) -> None: ...

class Continuation(_message.Message):
    __slots__ = ("model", "prompt_ids", "output_ids", "sampling", "max_tokens", "min_tokens", "stop_token_ids", "logprobs", "grammar", "request_class", "virtual_deadline_ms", "deadline_ms", "waited_ms", "cache_salt", "adapter", "itl_target_ms")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    REQUEST_CLASS_FIELD_NUMBER: _ClassVar[int]
    VIRTUAL_DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    WAITED_MS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ITL_TARGET_MS_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    output_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: ResolvedSampling
    max_tokens: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: int
    grammar: _inference_pb2.Grammar
    request_class: _inference_pb2.RequestClass
    virtual_deadline_ms: float
    deadline_ms: float
    waited_ms: float
    cache_salt: str
    adapter: str
    itl_target_ms: float
    def __init__(self, model: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., output_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[ResolvedSampling, _Mapping]] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[int] = ..., grammar: _Optional[_Union[_inference_pb2.Grammar, _Mapping]] = ..., request_class: _Optional[_Union[_inference_pb2.RequestClass, str]] = ..., virtual_deadline_ms: _Optional[float] = ..., deadline_ms: _Optional[float] = ..., waited_ms: _Optional[float] = ..., cache_salt: _Optional[str] = ..., adapter: _Optional[str] = ..., itl_target_ms: _Optional[float] = ...) -> None: ...

class ResumeState(_message.Message):
    __slots__ = ("continuation", "text", "request_id", "ttft_target_ms", "expected_output_tokens", "placements", "trace", "traceparent")
    CONTINUATION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TTFT_TARGET_MS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    continuation: Continuation
    text: ResumeText
    request_id: str
    ttft_target_ms: float
    expected_output_tokens: int
    placements: bool
    trace: bool
    traceparent: str
    def __init__(self, continuation: _Optional[_Union[Continuation, _Mapping]] = ..., text: _Optional[_Union[ResumeText, _Mapping]] = ..., request_id: _Optional[str] = ..., ttft_target_ms: _Optional[float] = ..., expected_output_tokens: _Optional[int] = ..., placements: bool = ..., trace: bool = ..., traceparent: _Optional[str] = ...) -> None: ...

class ResumeText(_message.Message):
    __slots__ = ("special_tokens", "stop", "include_stop", "kept_special_tokens")
    SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_FIELD_NUMBER: _ClassVar[int]
    KEPT_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    special_tokens: bool
    stop: _containers.RepeatedScalarFieldContainer[str]
    include_stop: bool
    kept_special_tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, special_tokens: bool = ..., stop: _Optional[_Iterable[str]] = ..., include_stop: bool = ..., kept_special_tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class ResolvedSampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "seed", "seed_given")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SEED_GIVEN_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[_inference_pb2.LogitBias]
    seed: int
    seed_given: bool
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[_inference_pb2.LogitBias, _Mapping]]] = ..., seed: _Optional[int] = ..., seed_given: bool = ...) -> None: ...

class HandOff(_message.Message):
    __slots__ = ("mesh", "engine")
    MESH_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    mesh: MeshHandOff
    engine: EngineHandOff
    def __init__(self, mesh: _Optional[_Union[MeshHandOff, _Mapping]] = ..., engine: _Optional[_Union[EngineHandOff, _Mapping]] = ...) -> None: ...

class MeshHandOff(_message.Message):
    __slots__ = ("transfer_id", "sender_worker", "sender_incarnation", "sender_address")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    SENDER_WORKER_FIELD_NUMBER: _ClassVar[int]
    SENDER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SENDER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    sender_worker: str
    sender_incarnation: int
    sender_address: str
    def __init__(self, transfer_id: _Optional[bytes] = ..., sender_worker: _Optional[str] = ..., sender_incarnation: _Optional[int] = ..., sender_address: _Optional[str] = ...) -> None: ...

class EngineHandOff(_message.Message):
    __slots__ = ("connector", "payload")
    CONNECTOR_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    connector: str
    payload: bytes
    def __init__(self, connector: _Optional[str] = ..., payload: _Optional[bytes] = ...) -> None: ...

class PrefixSource(_message.Message):
    __slots__ = ("worker", "incarnation", "address", "tokens")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: int
    address: str
    tokens: int
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("generation", "owner", "attempt")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    generation: bytes
    owner: int
    attempt: int
    def __init__(self, generation: _Optional[bytes] = ..., owner: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class HandOver(_message.Message):
    __slots__ = ("generation", "owner", "attempt", "next_attempt", "hand_off", "next_index")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NEXT_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    generation: bytes
    owner: int
    attempt: int
    next_attempt: int
    hand_off: HandOff
    next_index: int
    def __init__(self, generation: _Optional[bytes] = ..., owner: _Optional[int] = ..., attempt: _Optional[int] = ..., next_attempt: _Optional[int] = ..., hand_off: _Optional[_Union[HandOff, _Mapping]] = ..., next_index: _Optional[int] = ...) -> None: ...

class Find(_message.Message):
    __slots__ = ("generation", "tenant", "next_index")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    generation: bytes
    tenant: str
    next_index: int
    def __init__(self, generation: _Optional[bytes] = ..., tenant: _Optional[str] = ..., next_index: _Optional[int] = ...) -> None: ...

class Claim(_message.Message):
    __slots__ = ("generation", "owner", "tenant", "next_index")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    generation: bytes
    owner: int
    tenant: str
    next_index: int
    def __init__(self, generation: _Optional[bytes] = ..., owner: _Optional[int] = ..., tenant: _Optional[str] = ..., next_index: _Optional[int] = ...) -> None: ...

class WorkerFrame(_message.Message):
    __slots__ = ("hello", "step", "load", "cache")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    step: StepOutput
    load: Load
    cache: CacheEvents
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., step: _Optional[_Union[StepOutput, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., cache: _Optional[_Union[CacheEvents, _Mapping]] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("version", "record", "last_event", "resume_event", "step_model", "reattached")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    LAST_EVENT_FIELD_NUMBER: _ClassVar[int]
    RESUME_EVENT_FIELD_NUMBER: _ClassVar[int]
    STEP_MODEL_FIELD_NUMBER: _ClassVar[int]
    REATTACHED_FIELD_NUMBER: _ClassVar[int]
    version: ProtocolVersion
    record: WorkerRecord
    last_event: int
    resume_event: int
    step_model: StepModel
    reattached: _containers.RepeatedCompositeFieldContainer[Reattach]
    def __init__(self, version: _Optional[_Union[ProtocolVersion, _Mapping]] = ..., record: _Optional[_Union[WorkerRecord, _Mapping]] = ..., last_event: _Optional[int] = ..., resume_event: _Optional[int] = ..., step_model: _Optional[_Union[StepModel, _Mapping]] = ..., reattached: _Optional[_Iterable[_Union[Reattach, _Mapping]]] = ...) -> None: ...

class WorkerRecord(_message.Message):
    __slots__ = ("worker_id", "incarnation", "address", "transfer_address", "role", "model", "capabilities", "step_model", "version", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    STEP_MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    address: str
    transfer_address: str
    role: Role
    model: ModelRecord
    capabilities: Capabilities
    step_model: StepModel
    version: str
    labels: _containers.ScalarMap[str, str]
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., transfer_address: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., model: _Optional[_Union[ModelRecord, _Mapping]] = ..., capabilities: _Optional[_Union[Capabilities, _Mapping]] = ..., step_model: _Optional[_Union[StepModel, _Mapping]] = ..., version: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ModelRecord(_message.Message):
    __slots__ = ("name", "digest", "tokenizer_digest", "context_length", "vocabulary_size", "end_of_text_ids", "adapters")
    class AdaptersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    END_OF_TEXT_IDS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    tokenizer_digest: str
    context_length: int
    vocabulary_size: int
    end_of_text_ids: _containers.RepeatedScalarFieldContainer[int]
    adapters: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., context_length: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., end_of_text_ids: _Optional[_Iterable[int]] = ..., adapters: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("engine", "streamed_hand_off", "engine_connector", "prefill_emits_first_token", "reproducible", "penalties_over_continuation", "grammars", "grammars_over_continuation", "max_logprobs", "layer_preemption", "prefix_pull", "cache_events", "block_tokens", "pool_blocks", "block_bytes", "hash_scheme", "kv", "max_batch", "no_cache_salt")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    STREAMED_HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    ENGINE_CONNECTOR_FIELD_NUMBER: _ClassVar[int]
    PREFILL_EMITS_FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REPRODUCIBLE_FIELD_NUMBER: _ClassVar[int]
    PENALTIES_OVER_CONTINUATION_FIELD_NUMBER: _ClassVar[int]
    GRAMMARS_FIELD_NUMBER: _ClassVar[int]
    GRAMMARS_OVER_CONTINUATION_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LAYER_PREEMPTION_FIELD_NUMBER: _ClassVar[int]
    PREFIX_PULL_FIELD_NUMBER: _ClassVar[int]
    CACHE_EVENTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POOL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    HASH_SCHEME_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    NO_CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    engine: str
    streamed_hand_off: bool
    engine_connector: str
    prefill_emits_first_token: bool
    reproducible: bool
    penalties_over_continuation: bool
    grammars: bool
    grammars_over_continuation: bool
    max_logprobs: int
    layer_preemption: bool
    prefix_pull: bool
    cache_events: bool
    block_tokens: int
    pool_blocks: int
    block_bytes: int
    hash_scheme: int
    kv: KvCompatibility
    max_batch: int
    no_cache_salt: bool
    def __init__(self, engine: _Optional[str] = ..., streamed_hand_off: bool = ..., engine_connector: _Optional[str] = ..., prefill_emits_first_token: bool = ..., reproducible: bool = ..., penalties_over_continuation: bool = ..., grammars: bool = ..., grammars_over_continuation: bool = ..., max_logprobs: _Optional[int] = ..., layer_preemption: bool = ..., prefix_pull: bool = ..., cache_events: bool = ..., block_tokens: _Optional[int] = ..., pool_blocks: _Optional[int] = ..., block_bytes: _Optional[int] = ..., hash_scheme: _Optional[int] = ..., kv: _Optional[_Union[KvCompatibility, _Mapping]] = ..., max_batch: _Optional[int] = ..., no_cache_salt: bool = ...) -> None: ...

class KvCompatibility(_message.Message):
    __slots__ = ("model_digest", "dtype", "format", "layers", "kv_heads", "head_size", "scales_digest")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    SCALES_DIGEST_FIELD_NUMBER: _ClassVar[int]
    model_digest: str
    dtype: str
    format: int
    layers: int
    kv_heads: int
    head_size: int
    scales_digest: str
    def __init__(self, model_digest: _Optional[str] = ..., dtype: _Optional[str] = ..., format: _Optional[int] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_size: _Optional[int] = ..., scales_digest: _Optional[str] = ...) -> None: ...

class StepModel(_message.Message):
    __slots__ = ("a_ms", "b_ms", "c_ms", "d_ms", "e_ms", "relative_error", "saturating_chunk")
    A_MS_FIELD_NUMBER: _ClassVar[int]
    B_MS_FIELD_NUMBER: _ClassVar[int]
    C_MS_FIELD_NUMBER: _ClassVar[int]
    D_MS_FIELD_NUMBER: _ClassVar[int]
    E_MS_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    SATURATING_CHUNK_FIELD_NUMBER: _ClassVar[int]
    a_ms: float
    b_ms: float
    c_ms: float
    d_ms: float
    e_ms: float
    relative_error: float
    saturating_chunk: int
    def __init__(self, a_ms: _Optional[float] = ..., b_ms: _Optional[float] = ..., c_ms: _Optional[float] = ..., d_ms: _Optional[float] = ..., e_ms: _Optional[float] = ..., relative_error: _Optional[float] = ..., saturating_chunk: _Optional[int] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("step", "last", "openings", "tokens", "ends", "found", "sample", "load")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    OPENINGS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    step: int
    last: bool
    openings: _containers.RepeatedCompositeFieldContainer[Opening]
    tokens: TokenRows
    ends: _containers.RepeatedCompositeFieldContainer[StageEnd]
    found: _containers.RepeatedCompositeFieldContainer[Found]
    sample: StepSample
    load: Load
    def __init__(self, step: _Optional[int] = ..., last: bool = ..., openings: _Optional[_Iterable[_Union[Opening, _Mapping]]] = ..., tokens: _Optional[_Union[TokenRows, _Mapping]] = ..., ends: _Optional[_Iterable[_Union[StageEnd, _Mapping]]] = ..., found: _Optional[_Iterable[_Union[Found, _Mapping]]] = ..., sample: _Optional[_Union[StepSample, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class TokenRows(_message.Message):
    __slots__ = ("generations", "owners", "attempts", "first_indices", "counts", "ids", "logprobs")
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDICES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    generations: bytes
    owners: _containers.RepeatedScalarFieldContainer[int]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    first_indices: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[RowLogprobs]
    def __init__(self, generations: _Optional[bytes] = ..., owners: _Optional[_Iterable[int]] = ..., attempts: _Optional[_Iterable[int]] = ..., first_indices: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[RowLogprobs, _Mapping]]] = ...) -> None: ...

class RowLogprobs(_message.Message):
    __slots__ = ("row", "tokens")
    ROW_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    row: int
    tokens: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    def __init__(self, row: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class Opening(_message.Message):
    __slots__ = ("generation", "owner", "attempt", "stage", "reserved", "refused")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    generation: bytes
    owner: int
    attempt: int
    stage: Stage
    reserved: Reserved
    refused: Refused
    def __init__(self, generation: _Optional[bytes] = ..., owner: _Optional[int] = ..., attempt: _Optional[int] = ..., stage: _Optional[_Union[Stage, str]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("tokens_held", "tokens_reserved")
    TOKENS_HELD_FIELD_NUMBER: _ClassVar[int]
    TOKENS_RESERVED_FIELD_NUMBER: _ClassVar[int]
    tokens_held: int
    tokens_reserved: int
    def __init__(self, tokens_held: _Optional[int] = ..., tokens_reserved: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason", "message", "field")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    reason: RefusalReason
    message: str
    field: str
    def __init__(self, reason: _Optional[_Union[RefusalReason, str]] = ..., message: _Optional[str] = ..., field: _Optional[str] = ...) -> None: ...

class StageEnd(_message.Message):
    __slots__ = ("generation", "owner", "attempt", "stage", "timings", "finished", "handed_off", "returned", "transfer_failed", "cancelled", "failed")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    HANDED_OFF_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FAILED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    generation: bytes
    owner: int
    attempt: int
    stage: Stage
    timings: StageTimings
    finished: StageFinished
    handed_off: HandedOff
    returned: Returned
    transfer_failed: TransferFailed
    cancelled: Cancelled
    failed: StageFailed
    def __init__(self, generation: _Optional[bytes] = ..., owner: _Optional[int] = ..., attempt: _Optional[int] = ..., stage: _Optional[_Union[Stage, str]] = ..., timings: _Optional[_Union[StageTimings, _Mapping]] = ..., finished: _Optional[_Union[StageFinished, _Mapping]] = ..., handed_off: _Optional[_Union[HandedOff, _Mapping]] = ..., returned: _Optional[_Union[Returned, _Mapping]] = ..., transfer_failed: _Optional[_Union[TransferFailed, _Mapping]] = ..., cancelled: _Optional[_Union[Cancelled, _Mapping]] = ..., failed: _Optional[_Union[StageFailed, _Mapping]] = ...) -> None: ...

class StageFinished(_message.Message):
    __slots__ = ("reason", "stop_token_id")
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    reason: _inference_pb2.FinishReason
    stop_token_id: int
    def __init__(self, reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., stop_token_id: _Optional[int] = ...) -> None: ...

class HandedOff(_message.Message):
    __slots__ = ("engine", "tokens_committed")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    engine: EngineHandOff
    tokens_committed: int
    def __init__(self, engine: _Optional[_Union[EngineHandOff, _Mapping]] = ..., tokens_committed: _Optional[int] = ...) -> None: ...

class Returned(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: RefusalReason
    message: str
    def __init__(self, reason: _Optional[_Union[RefusalReason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class TransferFailed(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...

class Cancelled(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StageFailed(_message.Message):
    __slots__ = ("code", "reason", "message", "retryable")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    retryable: bool
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., retryable: bool = ...) -> None: ...

class StageTimings(_message.Message):
    __slots__ = ("queue_ms", "prefill_ms", "transfer_ms", "transferred_bytes", "cached_tokens", "pulled_tokens", "computed_tokens", "trace", "urgent_start_ms", "transfer_tail_ms", "decode_wait_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERRED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    URGENT_START_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_TAIL_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    prefill_ms: float
    transfer_ms: float
    transferred_bytes: int
    cached_tokens: int
    pulled_tokens: int
    computed_tokens: int
    trace: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TraceSpan]
    urgent_start_ms: float
    transfer_tail_ms: float
    decode_wait_ms: float
    def __init__(self, queue_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., transfer_ms: _Optional[float] = ..., transferred_bytes: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., pulled_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., trace: _Optional[_Iterable[_Union[_inference_pb2.TraceSpan, _Mapping]]] = ..., urgent_start_ms: _Optional[float] = ..., transfer_tail_ms: _Optional[float] = ..., decode_wait_ms: _Optional[float] = ...) -> None: ...

class Found(_message.Message):
    __slots__ = ("generation", "known", "owner", "attempt", "next_index", "stage", "output_ids", "resume_state", "refused", "model", "output_digest")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    RESUME_STATE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    generation: bytes
    known: bool
    owner: int
    attempt: int
    next_index: int
    stage: Stage
    output_ids: _containers.RepeatedScalarFieldContainer[int]
    resume_state: bytes
    refused: bool
    model: str
    output_digest: int
    def __init__(self, generation: _Optional[bytes] = ..., known: bool = ..., owner: _Optional[int] = ..., attempt: _Optional[int] = ..., next_index: _Optional[int] = ..., stage: _Optional[_Union[Stage, str]] = ..., output_ids: _Optional[_Iterable[int]] = ..., resume_state: _Optional[bytes] = ..., refused: bool = ..., model: _Optional[str] = ..., output_digest: _Optional[int] = ...) -> None: ...

class StepSample(_message.Message):
    __slots__ = ("prefill_tokens", "prefill_context", "decode_batch", "decode_context", "duration_us")
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    DECODE_BATCH_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    DURATION_US_FIELD_NUMBER: _ClassVar[int]
    prefill_tokens: int
    prefill_context: int
    decode_batch: int
    decode_context: int
    duration_us: int
    def __init__(self, prefill_tokens: _Optional[int] = ..., prefill_context: _Optional[int] = ..., decode_batch: _Optional[int] = ..., decode_context: _Optional[int] = ..., duration_us: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("last_command", "role", "phase", "draining", "kv", "own", "others", "step", "step_age_ms", "step_predicted_ms", "engine_silent")
    LAST_COMMAND_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    OWN_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    STEP_PREDICTED_MS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_SILENT_FIELD_NUMBER: _ClassVar[int]
    last_command: int
    role: Role
    phase: WorkerPhase
    draining: bool
    kv: KvRoom
    own: LoadShare
    others: LoadShare
    step: int
    step_age_ms: float
    step_predicted_ms: float
    engine_silent: bool
    def __init__(self, last_command: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., phase: _Optional[_Union[WorkerPhase, str]] = ..., draining: bool = ..., kv: _Optional[_Union[KvRoom, _Mapping]] = ..., own: _Optional[_Union[LoadShare, _Mapping]] = ..., others: _Optional[_Union[LoadShare, _Mapping]] = ..., step: _Optional[int] = ..., step_age_ms: _Optional[float] = ..., step_predicted_ms: _Optional[float] = ..., engine_silent: bool = ...) -> None: ...

class KvRoom(_message.Message):
    __slots__ = ("free", "evictable", "running", "pinned", "reserved")
    FREE_FIELD_NUMBER: _ClassVar[int]
    EVICTABLE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    free: int
    evictable: int
    running: int
    pinned: int
    reserved: int
    def __init__(self, free: _Optional[int] = ..., evictable: _Optional[int] = ..., running: _Optional[int] = ..., pinned: _Optional[int] = ..., reserved: _Optional[int] = ...) -> None: ...

class LoadShare(_message.Message):
    __slots__ = ("queued", "queued_prefill_tokens", "running_prefill_tokens", "decoding", "decode_context", "receiving", "interactive", "standard", "batch")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODING_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    RECEIVING_FIELD_NUMBER: _ClassVar[int]
    INTERACTIVE_FIELD_NUMBER: _ClassVar[int]
    STANDARD_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    queued: int
    queued_prefill_tokens: int
    running_prefill_tokens: int
    decoding: int
    decode_context: int
    receiving: int
    interactive: ClassShare
    standard: ClassShare
    batch: ClassShare
    def __init__(self, queued: _Optional[int] = ..., queued_prefill_tokens: _Optional[int] = ..., running_prefill_tokens: _Optional[int] = ..., decoding: _Optional[int] = ..., decode_context: _Optional[int] = ..., receiving: _Optional[int] = ..., interactive: _Optional[_Union[ClassShare, _Mapping]] = ..., standard: _Optional[_Union[ClassShare, _Mapping]] = ..., batch: _Optional[_Union[ClassShare, _Mapping]] = ...) -> None: ...

class ClassShare(_message.Message):
    __slots__ = ("waiting", "waiting_tokens", "decoding")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODING_FIELD_NUMBER: _ClassVar[int]
    waiting: int
    waiting_tokens: int
    decoding: int
    def __init__(self, waiting: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., decoding: _Optional[int] = ...) -> None: ...

class CacheEvents(_message.Message):
    __slots__ = ("first_event", "events", "snapshot")
    FIRST_EVENT_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    first_event: int
    events: _containers.RepeatedCompositeFieldContainer[CacheEvent]
    snapshot: SnapshotPart
    def __init__(self, first_event: _Optional[int] = ..., events: _Optional[_Iterable[_Union[CacheEvent, _Mapping]]] = ..., snapshot: _Optional[_Union[SnapshotPart, _Mapping]] = ...) -> None: ...

class SnapshotPart(_message.Message):
    __slots__ = ("first", "last", "as_of_event")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    AS_OF_EVENT_FIELD_NUMBER: _ClassVar[int]
    first: bool
    last: bool
    as_of_event: int
    def __init__(self, first: bool = ..., last: bool = ..., as_of_event: _Optional[int] = ...) -> None: ...

class CacheEvent(_message.Message):
    __slots__ = ("stored", "removed", "cleared")
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    stored: BlocksStored
    removed: BlocksRemoved
    cleared: CacheCleared
    def __init__(self, stored: _Optional[_Union[BlocksStored, _Mapping]] = ..., removed: _Optional[_Union[BlocksRemoved, _Mapping]] = ..., cleared: _Optional[_Union[CacheCleared, _Mapping]] = ...) -> None: ...

class BlocksStored(_message.Message):
    __slots__ = ("parent", "chain", "tier")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    parent: int
    chain: _containers.RepeatedScalarFieldContainer[int]
    tier: CacheTier
    def __init__(self, parent: _Optional[int] = ..., chain: _Optional[_Iterable[int]] = ..., tier: _Optional[_Union[CacheTier, str]] = ...) -> None: ...

class BlocksRemoved(_message.Message):
    __slots__ = ("chain", "tier")
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    chain: _containers.RepeatedScalarFieldContainer[int]
    tier: CacheTier
    def __init__(self, chain: _Optional[_Iterable[int]] = ..., tier: _Optional[_Union[CacheTier, str]] = ...) -> None: ...

class CacheCleared(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("record", "load", "routers", "residue")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    RESIDUE_FIELD_NUMBER: _ClassVar[int]
    record: WorkerRecord
    load: Load
    routers: _containers.RepeatedScalarFieldContainer[str]
    residue: Residue
    def __init__(self, record: _Optional[_Union[WorkerRecord, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., routers: _Optional[_Iterable[str]] = ..., residue: _Optional[_Union[Residue, _Mapping]] = ...) -> None: ...

class Residue(_message.Message):
    __slots__ = ("requests", "transfers", "held_blocks", "orphans")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ORPHANS_FIELD_NUMBER: _ClassVar[int]
    requests: int
    transfers: int
    held_blocks: int
    orphans: int
    def __init__(self, requests: _Optional[int] = ..., transfers: _Optional[int] = ..., held_blocks: _Optional[int] = ..., orphans: _Optional[int] = ...) -> None: ...

class GetTokenizerRequest(_message.Message):
    __slots__ = ("known_digest",)
    KNOWN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    known_digest: str
    def __init__(self, known_digest: _Optional[str] = ...) -> None: ...

class GetTokenizerResponse(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: TokenizerHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[TokenizerHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class TokenizerHeader(_message.Message):
    __slots__ = ("digest", "files")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    files: _containers.RepeatedCompositeFieldContainer[TokenizerFile]
    def __init__(self, digest: _Optional[str] = ..., files: _Optional[_Iterable[_Union[TokenizerFile, _Mapping]]] = ...) -> None: ...

class TokenizerFile(_message.Message):
    __slots__ = ("name", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace_ms", "stop")
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    grace_ms: int
    stop: bool
    def __init__(self, grace_ms: _Optional[int] = ..., stop: bool = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("running",)
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    running: int
    def __init__(self, running: _Optional[int] = ...) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: Role
    def __init__(self, role: _Optional[_Union[Role, str]] = ...) -> None: ...

class SetRoleResponse(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: Role
    def __init__(self, role: _Optional[_Union[Role, str]] = ...) -> None: ...
