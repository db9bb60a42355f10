from kvmesh.v1 import inference_pb2 as _inference_pb2
from kvmesh.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SESSION_STATE_UNSPECIFIED: _ClassVar[SessionState]
    SESSION_STATE_CONNECTING: _ClassVar[SessionState]
    SESSION_STATE_LIVE: _ClassVar[SessionState]
    SESSION_STATE_SUSPECT: _ClassVar[SessionState]
    SESSION_STATE_LOST: _ClassVar[SessionState]
    SESSION_STATE_HALF_OPEN: _ClassVar[SessionState]
    SESSION_STATE_REFUSED: _ClassVar[SessionState]
SESSION_STATE_UNSPECIFIED: SessionState
SESSION_STATE_CONNECTING: SessionState
SESSION_STATE_LIVE: SessionState
SESSION_STATE_SUSPECT: SessionState
SESSION_STATE_LOST: SessionState
SESSION_STATE_HALF_OPEN: SessionState
SESSION_STATE_REFUSED: SessionState

class ListWorkersRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("record", "state", "state_detail", "registered", "load", "silent_ms", "indexed_blocks", "index_detail", "running", "step_model", "paths_to")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_DETAIL_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SILENT_MS_FIELD_NUMBER: _ClassVar[int]
    INDEXED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    INDEX_DETAIL_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    STEP_MODEL_FIELD_NUMBER: _ClassVar[int]
    PATHS_TO_FIELD_NUMBER: _ClassVar[int]
    record: _worker_pb2.WorkerRecord
    state: SessionState
    state_detail: str
    registered: bool
    load: _worker_pb2.Load
    silent_ms: float
    indexed_blocks: int
    index_detail: str
    running: int
    step_model: _worker_pb2.StepModel
    paths_to: _containers.RepeatedCompositeFieldContainer[PathRate]
    def __init__(self, record: _Optional[_Union[_worker_pb2.WorkerRecord, _Mapping]] = ..., state: _Optional[_Union[SessionState, str]] = ..., state_detail: _Optional[str] = ..., registered: bool = ..., load: _Optional[_Union[_worker_pb2.Load, _Mapping]] = ..., silent_ms: _Optional[float] = ..., indexed_blocks: _Optional[int] = ..., index_detail: _Optional[str] = ..., running: _Optional[int] = ..., step_model: _Optional[_Union[_worker_pb2.StepModel, _Mapping]] = ..., paths_to: _Optional[_Iterable[_Union[PathRate, _Mapping]]] = ...) -> None: ...

class PathRate(_message.Message):
    __slots__ = ("source", "fixed_ms", "bytes_per_ms")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    FIXED_MS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_MS_FIELD_NUMBER: _ClassVar[int]
    source: str
    fixed_ms: float
    bytes_per_ms: float
    def __init__(self, source: _Optional[str] = ..., fixed_ms: _Optional[float] = ..., bytes_per_ms: _Optional[float] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id", "grace_ms", "force", "stop")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    grace_ms: int
    force: bool
    stop: bool
    def __init__(self, worker_id: _Optional[str] = ..., grace_ms: _Optional[int] = ..., force: bool = ..., stop: bool = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ("running", "staying")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    STAYING_FIELD_NUMBER: _ClassVar[int]
    running: int
    staying: _containers.RepeatedCompositeFieldContainer[StayingStream]
    def __init__(self, running: _Optional[int] = ..., staying: _Optional[_Iterable[_Union[StayingStream, _Mapping]]] = ...) -> None: ...

class StayingStream(_message.Message):
    __slots__ = ("generation_id", "reason")
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    generation_id: str
    reason: str
    def __init__(self, generation_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class SetWorkerRoleRequest(_message.Message):
    __slots__ = ("worker_id", "role", "force")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: _worker_pb2.Role
    force: bool
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[_worker_pb2.Role, str]] = ..., force: bool = ...) -> None: ...

class SetWorkerRoleResponse(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: _worker_pb2.Role
    def __init__(self, role: _Optional[_Union[_worker_pb2.Role, str]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("generation_id",)
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    generation_id: str
    def __init__(self, generation_id: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("decisions", "finished", "predicted_wait_ms", "waiting")
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    finished: _inference_pb2.Finished
    predicted_wait_ms: float
    waiting: RouterWait
    def __init__(self, decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ..., finished: _Optional[_Union[_inference_pb2.Finished, _Mapping]] = ..., predicted_wait_ms: _Optional[float] = ..., waiting: _Optional[_Union[RouterWait, _Mapping]] = ...) -> None: ...

class RouterWait(_message.Message):
    __slots__ = ("ms", "tries", "reason")
    MS_FIELD_NUMBER: _ClassVar[int]
    TRIES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ms: float
    tries: int
    reason: str
    def __init__(self, ms: _Optional[float] = ..., tries: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("attempt", "at_ms", "policy", "plans", "chosen", "predicted_ttft_ms", "actual_ttft_ms", "predicted", "actual", "weighed", "tied", "waited")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    PLANS_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_FIELD_NUMBER: _ClassVar[int]
    WEIGHED_FIELD_NUMBER: _ClassVar[int]
    TIED_FIELD_NUMBER: _ClassVar[int]
    WAITED_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    at_ms: float
    policy: str
    plans: _containers.RepeatedCompositeFieldContainer[PlanCost]
    chosen: int
    predicted_ttft_ms: float
    actual_ttft_ms: float
    predicted: PhaseTimes
    actual: PhaseTimes
    weighed: int
    tied: int
    waited: RouterWait
    def __init__(self, attempt: _Optional[int] = ..., at_ms: _Optional[float] = ..., policy: _Optional[str] = ..., plans: _Optional[_Iterable[_Union[PlanCost, _Mapping]]] = ..., chosen: _Optional[int] = ..., predicted_ttft_ms: _Optional[float] = ..., actual_ttft_ms: _Optional[float] = ..., predicted: _Optional[_Union[PhaseTimes, _Mapping]] = ..., actual: _Optional[_Union[PhaseTimes, _Mapping]] = ..., weighed: _Optional[int] = ..., tied: _Optional[int] = ..., waited: _Optional[_Union[RouterWait, _Mapping]] = ...) -> None: ...

class PhaseTimes(_message.Message):
    __slots__ = ("wait_ms", "prefill_ms", "transfer_ms", "ttft_ms")
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    wait_ms: float
    prefill_ms: float
    transfer_ms: float
    ttft_ms: float
    def __init__(self, wait_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., transfer_ms: _Optional[float] = ..., ttft_ms: _Optional[float] = ...) -> None: ...

class PlanCost(_message.Message):
    __slots__ = ("prefill_worker", "decode_worker", "prefix_worker", "total_ms", "terms", "ttft_ms", "cached_tokens", "pulled_tokens")
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    PREFIX_WORKER_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prefill_worker: str
    decode_worker: str
    prefix_worker: str
    total_ms: float
    terms: _containers.RepeatedCompositeFieldContainer[CostTerm]
    ttft_ms: float
    cached_tokens: int
    pulled_tokens: int
    def __init__(self, prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ..., prefix_worker: _Optional[str] = ..., total_ms: _Optional[float] = ..., terms: _Optional[_Iterable[_Union[CostTerm, _Mapping]]] = ..., ttft_ms: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., pulled_tokens: _Optional[int] = ...) -> None: ...

class CostTerm(_message.Message):
    __slots__ = ("name", "ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    ms: float
    def __init__(self, name: _Optional[str] = ..., ms: _Optional[float] = ...) -> None: ...

class AdvisePoolsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AdvisePoolsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[PoolAdvice]
    def __init__(self, models: _Optional[_Iterable[_Union[PoolAdvice, _Mapping]]] = ...) -> None: ...

class PoolAdvice(_message.Message):
    __slots__ = ("model", "now", "flip", "hold")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    FLIP_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    model: str
    now: PoolOutlook
    flip: RoleFlip
    hold: str
    def __init__(self, model: _Optional[str] = ..., now: _Optional[_Union[PoolOutlook, _Mapping]] = ..., flip: _Optional[_Union[RoleFlip, _Mapping]] = ..., hold: _Optional[str] = ...) -> None: ...

class RoleFlip(_message.Message):
    __slots__ = ("worker_id", "from_role", "to_role", "after")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_ROLE_FIELD_NUMBER: _ClassVar[int]
    TO_ROLE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    from_role: _worker_pb2.Role
    to_role: _worker_pb2.Role
    after: PoolOutlook
    def __init__(self, worker_id: _Optional[str] = ..., from_role: _Optional[_Union[_worker_pb2.Role, str]] = ..., to_role: _Optional[_Union[_worker_pb2.Role, str]] = ..., after: _Optional[_Union[PoolOutlook, _Mapping]] = ...) -> None: ...

class PoolOutlook(_message.Message):
    __slots__ = ("prefill", "decode", "both", "interactive_ttft_ms", "standard_ttft_ms", "batch_ttft_ms", "itl_ms", "prefill_pressure", "decode_pressure")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    BOTH_FIELD_NUMBER: _ClassVar[int]
    INTERACTIVE_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    STANDARD_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    BATCH_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    ITL_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PRESSURE_FIELD_NUMBER: _ClassVar[int]
    DECODE_PRESSURE_FIELD_NUMBER: _ClassVar[int]
    prefill: int
    decode: int
    both: int
    interactive_ttft_ms: float
    standard_ttft_ms: float
    batch_ttft_ms: float
    itl_ms: float
    prefill_pressure: float
    decode_pressure: float
    def __init__(self, prefill: _Optional[int] = ..., decode: _Optional[int] = ..., both: _Optional[int] = ..., interactive_ttft_ms: _Optional[float] = ..., standard_ttft_ms: _Optional[float] = ..., batch_ttft_ms: _Optional[float] = ..., itl_ms: _Optional[float] = ..., prefill_pressure: _Optional[float] = ..., decode_pressure: _Optional[float] = ...) -> None: ...

class GetRouterInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRouterInfoResponse(_message.Message):
    __slots__ = ("version", "router_id", "incarnation", "cluster", "uptime_s", "etcd_connected", "generations", "queued", "undelivered_tokens")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    ETCD_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    UNDELIVERED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    version: str
    router_id: str
    incarnation: int
    cluster: str
    uptime_s: float
    etcd_connected: bool
    generations: int
    queued: int
    undelivered_tokens: int
    def __init__(self, version: _Optional[str] = ..., router_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., cluster: _Optional[str] = ..., uptime_s: _Optional[float] = ..., etcd_connected: bool = ..., generations: _Optional[int] = ..., queued: _Optional[int] = ..., undelivered_tokens: _Optional[int] = ...) -> None: ...
