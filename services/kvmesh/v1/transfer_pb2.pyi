from kvmesh.v1 import inference_pb2 as _inference_pb2
from kvmesh.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AbortReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ABORT_REASON_UNSPECIFIED: _ClassVar[AbortReason]
    ABORT_REASON_UNKNOWN: _ClassVar[AbortReason]
    ABORT_REASON_CANCELLED: _ClassVar[AbortReason]
    ABORT_REASON_LEASE_EXPIRED: _ClassVar[AbortReason]
    ABORT_REASON_INCOMPATIBLE: _ClassVar[AbortReason]
    ABORT_REASON_MISMATCH: _ClassVar[AbortReason]
    ABORT_REASON_FINISHED: _ClassVar[AbortReason]
    ABORT_REASON_FAILED: _ClassVar[AbortReason]
    ABORT_REASON_UNTRUSTED: _ClassVar[AbortReason]
ABORT_REASON_UNSPECIFIED: AbortReason
ABORT_REASON_UNKNOWN: AbortReason
ABORT_REASON_CANCELLED: AbortReason
ABORT_REASON_LEASE_EXPIRED: AbortReason
ABORT_REASON_INCOMPATIBLE: AbortReason
ABORT_REASON_MISMATCH: AbortReason
ABORT_REASON_FINISHED: AbortReason
ABORT_REASON_FAILED: AbortReason
ABORT_REASON_UNTRUSTED: AbortReason

class TransferFrame(_message.Message):
    __slots__ = ("hello", "pull", "prefix_found", "ready", "fetch", "data", "commit", "released", "abort", "heartbeat", "progress")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FOUND_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    hello: TransferHello
    pull: Pull
    prefix_found: PrefixFound
    ready: BlocksReady
    fetch: FetchBlocks
    data: BlockData
    commit: Commit
    released: Released
    abort: Abort
    heartbeat: Heartbeat
    progress: Progress
    def __init__(self, hello: _Optional[_Union[TransferHello, _Mapping]] = ..., pull: _Optional[_Union[Pull, _Mapping]] = ..., prefix_found: _Optional[_Union[PrefixFound, _Mapping]] = ..., ready: _Optional[_Union[BlocksReady, _Mapping]] = ..., fetch: _Optional[_Union[FetchBlocks, _Mapping]] = ..., data: _Optional[_Union[BlockData, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., released: _Optional[_Union[Released, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ...) -> None: ...

class TransferHello(_message.Message):
    __slots__ = ("version", "worker_id", "incarnation", "kv", "block_tokens", "block_bytes", "shared_memory_name", "pool_blocks", "token")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_NAME_FIELD_NUMBER: _ClassVar[int]
    POOL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    version: _worker_pb2.ProtocolVersion
    worker_id: str
    incarnation: int
    kv: _worker_pb2.KvCompatibility
    block_tokens: int
    block_bytes: int
    shared_memory_name: str
    pool_blocks: int
    token: bytes
    def __init__(self, version: _Optional[_Union[_worker_pb2.ProtocolVersion, _Mapping]] = ..., worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., kv: _Optional[_Union[_worker_pb2.KvCompatibility, _Mapping]] = ..., block_tokens: _Optional[int] = ..., block_bytes: _Optional[int] = ..., shared_memory_name: _Optional[str] = ..., pool_blocks: _Optional[int] = ..., token: _Optional[bytes] = ...) -> None: ...

class Pull(_message.Message):
    __slots__ = ("transfer_id", "from_token", "prefix", "first_layer", "layer_count", "first_kv_head", "kv_head_count", "traceparent", "request_id")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    FIRST_KV_HEAD_FIELD_NUMBER: _ClassVar[int]
    KV_HEAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    from_token: int
    prefix: PrefixKey
    first_layer: int
    layer_count: int
    first_kv_head: int
    kv_head_count: int
    traceparent: str
    request_id: str
    def __init__(self, transfer_id: _Optional[bytes] = ..., from_token: _Optional[int] = ..., prefix: _Optional[_Union[PrefixKey, _Mapping]] = ..., first_layer: _Optional[int] = ..., layer_count: _Optional[int] = ..., first_kv_head: _Optional[int] = ..., kv_head_count: _Optional[int] = ..., traceparent: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class PrefixKey(_message.Message):
    __slots__ = ("adapter", "cache_salt", "token_ids", "adapter_digest")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    cache_salt: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    adapter_digest: str
    def __init__(self, adapter: _Optional[str] = ..., cache_salt: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., adapter_digest: _Optional[str] = ...) -> None: ...

class PrefixFound(_message.Message):
    __slots__ = ("transfer_id", "tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    tokens: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., tokens: _Optional[int] = ...) -> None: ...

class BlocksReady(_message.Message):
    __slots__ = ("transfer_id", "first_block", "slots", "slot_versions", "checksums")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    first_block: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    slot_versions: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, transfer_id: _Optional[bytes] = ..., first_block: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., slot_versions: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class FetchBlocks(_message.Message):
    __slots__ = ("transfer_id", "first_block", "count")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    first_block: int
    count: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., first_block: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class BlockData(_message.Message):
    __slots__ = ("transfer_id", "first_block", "count")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    first_block: int
    count: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., first_block: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("transfer_id", "kv_tokens", "partial", "output_ids", "logprobs")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    kv_tokens: int
    partial: PartialBlock
    output_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    def __init__(self, transfer_id: _Optional[bytes] = ..., kv_tokens: _Optional[int] = ..., partial: _Optional[_Union[PartialBlock, _Mapping]] = ..., output_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class PartialBlock(_message.Message):
    __slots__ = ("block", "slot", "slot_version", "checksum")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SLOT_VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    block: int
    slot: int
    slot_version: int
    checksum: int
    def __init__(self, block: _Optional[int] = ..., slot: _Optional[int] = ..., slot_version: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Released(_message.Message):
    __slots__ = ("transfer_id",)
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    def __init__(self, transfer_id: _Optional[bytes] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("transfer_id", "reason", "message")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    reason: AbortReason
    message: str
    def __init__(self, transfer_id: _Optional[bytes] = ..., reason: _Optional[_Union[AbortReason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("transfer_id", "upto_block")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    UPTO_BLOCK_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    upto_block: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., upto_block: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("transfer_ids",)
    TRANSFER_IDS_FIELD_NUMBER: _ClassVar[int]
    transfer_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, transfer_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...
