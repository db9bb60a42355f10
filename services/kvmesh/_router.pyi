"""The native module: what Python code of kvmesh asks of Rust.

Checked against the built module by stubtest.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, final

import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

from kvmesh.engine.contract import CacheChange, StepOutput

# --- Names of prompt prefixes ---------------------------------------------------

def chain_root(model_digest: str, adapter: str, cache_salt: str) -> int:
    """Chain value that first blocks of a namespace have as parent (hash scheme 1)."""

def chain_values(parent: int, ids: bytes) -> list[int]:
    """Chain value after each whole unit of 16 ids; a rest of fewer has none.

    `ids` are u32, little-endian. ValueError where a part of an id is left.
    """

def chain_values_to(parent: int, ids: npt.NDArray[np.uint32], out: npt.NDArray[np.uint64]) -> None:
    """As `chain_values`, array to array, without the GIL. `out`: a value for each unit."""

@final
class ForeignNames:
    """Own names of the blocks of an engine that names them by hashes of its own.

    Such an engine tells the token ids with each block. Blocks whose parent is not known
    are dropped and counted, never guessed. Tiers as in `KvIndex`.
    """

    def __new__(cls, most: int, group: int = 0) -> ForeignNames:
        """Keeps at most `most` names, and follows one attention group."""

    def hear(self, sequence: int) -> tuple[Literal["next", "again", "missed"], int]:
        """What an event's sequence number says: "next", apply it; "again", ignore it;
        "missed", events from the number that is returned on are missing."""

    def stored(
        self,
        root: int,
        parent: int | None,
        hashes: Sequence[int],
        ids: Sequence[int],
        block_tokens: int,
        *,
        group: int = 0,
        tier: int = 0,
        extra_keys: bool = False,
    ) -> tuple[int, list[int], list[tuple[int, int]]] | None:
        """Parent value, a value each block, and (value, tier) of blocks that can no longer
        be removed by name. None: dropped and counted. `parent` None: a prompt's first
        block, whose parent value is `root` (`chain_root`). ValueError for another tier."""

    def removed(self, hashes: Sequence[int], *, group: int = 0, tier: int = 0) -> list[int]:
        """Values of blocks that are gone from a tier. ValueError for another tier."""

    def cleared(self, next: int | None = None) -> None:
        """Everything is gone. `next`: number of the next event, where that is known."""

    def stats(self) -> tuple[int, int, int, int, int]:
        """Names, their bytes, blocks dropped for an unknown parent, for another reason,
        and gaps."""

# --- Index --------------------------------------------------------------------

@disjoint_base
class KvIndex:
    """What `kvmesh.KvIndex` is made of: that one inherits all of these.

    A tier is 0 (device), 1 (host) or 2 (disk); a change (kind, parent, chain, tier) with kind 0
    (stored), 1 (removed) or 2 (cleared). Chain values are an array of uint64, or another sequence
    of integers, which is converted. KeyError for a worker that is not there.
    """

    def __new__(cls, *, max_bytes: int = 1073741824, max_workers: int = 4096) -> Self:
        """`max_bytes` bounds what blocks take; above it the coldest go. `max_workers` at a time."""

    def add_worker(
        self, block_tokens: int = 16, *, ttl_ms: int | None = None, max_units: int = 1048576
    ) -> int:
        """Takes a worker in and returns its number, the lowest that is free.

        `block_tokens`: its block size, a multiple of 16. With `ttl_ms` it is a worker without
        cache events: it is taken to hold what was sent there (`record_sent`) until that is older
        than this or more than `max_units` units of 16 tokens. ValueError for another block size,
        RuntimeError where `max_workers` are there.
        """

    def remove_worker(self, worker: int) -> None:
        """Takes a worker and all its blocks out."""

    def stored(
        self,
        worker: int,
        chain: npt.NDArray[np.uint64] | Sequence[int],
        *,
        parent: int | None = None,
        tier: int = 0,
    ) -> None:
        """Blocks of a worker can be shared now; see `kvmesh.index.Stored`.

        One value a block, in any order.
        """

    def stored_many(
        self,
        workers: npt.NDArray[np.uint32],
        parents: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        chain: npt.NDArray[np.uint64],
        *,
        tier: int = 0,
    ) -> None:
        """Many `stored` in one call, also of several workers: faster, and seen whole.

        Event i is of `workers[i]`, comes after `parents[i]` and has the values from `offsets[i]` to
        `offsets[i + 1]` of `chain`. Shapes (n,), (n,), (n + 1,) and (offsets[n],); ValueError where
        they do not fit. Where a worker is not there, nothing is changed.
        """

    def removed(
        self, worker: int, chain: npt.NDArray[np.uint64] | Sequence[int], *, tier: int = 0
    ) -> None:
        """Blocks of a worker are gone. Values that it does not hold are ignored."""

    def cleared(self, worker: int) -> None:
        """All blocks of a worker are gone."""

    def apply_parts(
        self,
        worker: int,
        changes: Sequence[
            tuple[int, int | None, npt.NDArray[np.uint64] | Sequence[int] | None, int]
        ],
    ) -> None:
        """Makes several changes, in order, seen whole."""

    def snapshot_parts(
        self,
        worker: int,
        changes: Sequence[
            tuple[int, int | None, npt.NDArray[np.uint64] | Sequence[int] | None, int]
        ],
        first: bool,
        last: bool,
    ) -> None:
        """What a worker holds becomes what the parts from `first` to `last` store."""

    def record_sent(
        self, worker: int, chain: npt.NDArray[np.uint64] | Sequence[int], now_ms: int
    ) -> None:
        """Notes that a prompt (its whole chain) was sent to a worker without cache events.

        `now_ms` is a clock of the caller's, as in `expire`. Nothing for a worker with events.
        """

    def expire(self, now_ms: int) -> None:
        """Forgets what was sent too long ago. To be called from time to time."""

    def lookup_to(
        self,
        chain: npt.NDArray[np.uint64] | Sequence[int],
        tokens: npt.NDArray[np.uint32],
        host: npt.NDArray[np.uint32] | None = None,
        disk: npt.NDArray[np.uint32] | None = None,
    ) -> None:
        """Writes tokens by worker, and of these what lies on the host and on disk."""

    @property
    def slots(self) -> int:
        """Length of a look-up's answer: one more than the highest worker number so far."""

    def held(self, worker: int) -> int:
        """Blocks of a worker that are here, in any tier; 0 for one that is not there. Not fast."""

    def counts(self) -> tuple[int, int, int, int, int, int]:
        """The fields of `kvmesh.index.IndexStats`."""

# --- Simulator ----------------------------------------------------------------

def simulate(replay: str, trace: str) -> str:
    """Replays a trace over the index and the scheduler that serve.

    `replay` is a JSON object (docs/simulator.md), `trace` the text of the trace
    file; the results are JSON. Equal arguments give equal text. ValueError for
    settings or a trace that cannot be used. Other threads run meanwhile.
    """

# --- KV pool and transfer -----------------------------------------------------

Reason = Literal[
    "unknown",
    "cancelled",
    "lease_expired",
    "incompatible",
    "mismatch",
    "finished",
    "failed",
    "untrusted",
    "lost",
]
"""Why a transfer ended without success (AbortReason in transfer.proto).

`lost`: the connection to the peer broke or could not be made.
"""

class TransferError(Exception):
    """A call about a transfer was refused; `args` is (reason, message)."""

@final
class KvPool:
    """Block slots of one size in a sealed shared mapping (memfd).

    Offers the buffer protocol (writable, bytes, `blocks * block_bytes`), so
    `torch.frombuffer(pool, dtype=...)` and `numpy.frombuffer(pool, ...)` see
    its blocks: block-major, slot i at byte `i * block_bytes`. Fresh memory is
    zero. The memory lives while this object, a view, a tensor made from it or
    a transfer holds it.
    """

    def __new__(
        cls, blocks: int, block_bytes: int, *, populate: bool = False, huge_pages: bool = True
    ) -> KvPool:
        """Maps a pool. `populate`: take all memory now rather than on first use.

        `huge_pages`: ask the kernel for huge pages (`madvise(MADV_COLLAPSE)`, Linux
        6.1); where it refuses, the memory comes in small ones.

        Raises ValueError where a size is zero or does not fit, OSError where
        the kernel refuses.
        """

    @property
    def blocks(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """`blocks * block_bytes`."""

    def huge_use(self) -> tuple[int, int, str]:
        """Bytes in huge pages by now, bytes that the kernel refused to make huge, and why.

        Grows as blocks come into use. The reason is empty where nothing was refused.
        """

    @property
    def closed(self) -> bool: ...
    def slot_version(self, slot: int) -> int:
        """Version of a slot; IndexError where there is no such slot."""

    def populate(self, first: int, count: int) -> None:
        """Takes the memory of slots now, which their first use would take.

        Some 0.1 to 2 ms a MiB without the GIL: call it for a part at a time. IndexError
        where there is no such slot, OSError where the kernel has no memory.
        """

    def raise_versions(self, slots: Sequence[int]) -> None:
        """Raises the version of slots that are about to be written anew.

        Call it *before* the first write: from then on a peer that still copies
        the old content discards it. IndexError, and nothing raised, where there
        is no such slot.
        """

    def checksum(self, slot: int) -> int:
        """XXH3-64 of a slot's bytes, as announced to peers. Without the GIL."""

    def close(self) -> None:
        """No new views and transfers. Memory goes with its last holder."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, buffer: memoryview, /) -> None: ...

@final
class Pulled:
    """Sender: the receiver has come. Blocks before `from_token` are not sent."""

    @property
    def transfer_id(self) -> bytes: ...
    @property
    def worker_id(self) -> str: ...
    @property
    def from_token(self) -> int: ...
    @property
    def traceparent(self) -> str: ...
    @property
    def request_id(self) -> str: ...

@final
class Reached:
    """Sender: the receiver has the blocks before `upto_block`, which is all it was told of.

    Only for transfers that were offered with `grows`.
    """

    @property
    def transfer_id(self) -> bytes: ...
    @property
    def upto_block(self) -> int: ...

@final
class PrefixWanted:
    """Sender: a peer asks for a prefix. Answer with `offer_prefix`."""

    @property
    def transfer_id(self) -> bytes: ...
    @property
    def worker_id(self) -> str: ...
    @property
    def adapter(self) -> str: ...
    @property
    def adapter_digest(self) -> str:
        """The peer's digest of that adapter; empty: it does not say."""

    @property
    def cache_salt(self) -> str: ...
    @property
    def token_ids(self) -> list[int]:
        """The whole prefix, from its first token."""

    @property
    def from_token(self) -> int:
        """Tokens that the peer has already; a multiple of the block size."""

    @property
    def traceparent(self) -> str: ...
    @property
    def request_id(self) -> str: ...

@final
class SenderReleased:
    """Sender: the receiver has everything. The offered blocks may be unpinned."""

    @property
    def transfer_id(self) -> bytes: ...
    @property
    def blocks(self) -> int:
        """Blocks that were announced to the receiver."""

    @property
    def bytes(self) -> int: ...
    @property
    def seconds(self) -> float:
        """From the pull to the release."""

@final
class SenderAborted:
    """Sender: over without success. The offered blocks may be unpinned."""

    @property
    def transfer_id(self) -> bytes: ...
    @property
    def reason(self) -> Reason: ...
    @property
    def message(self) -> str: ...
    @property
    def commit_sent(self) -> bool:
        """True: the receiver may own the sequence; do not go on with it here."""

@final
class PrefixFound:
    """Receiver: what the holder of a prefix has."""

    @property
    def transfer_id(self) -> bytes: ...
    @property
    def tokens(self) -> int:
        """0: nothing; `ReceiveFailed` ("unknown") follows."""

@final
class Verified:
    """Receiver: blocks before `upto_block` of the sequence are in the pool."""

    @property
    def transfer_id(self) -> bytes: ...
    @property
    def upto_block(self) -> int: ...

@final
class Committed:
    """Receiver: all is copied and verified, and the sender was told so.

    The transfer is over on this side; the destination blocks are the caller's.
    """

    @property
    def transfer_id(self) -> bytes: ...
    @property
    def kv_tokens(self) -> int:
        """Tokens of the sequence that have KV in the destination blocks."""

    @property
    def output_ids(self) -> list[int]:
        """Output tokens after the border of the receiver's continuation."""

    @property
    def logprobs(self) -> list[bytes]:
        """Serialised kvmesh.v1.TokenLogprobs, one an output id, or empty."""

    @property
    def blocks(self) -> int:
        """Blocks that were moved."""

    @property
    def bytes(self) -> int: ...
    @property
    def seconds(self) -> float:
        """From the pull to here."""

    @property
    def tail_seconds(self) -> float:
        """From the arrival of the commit to here: what the transfer itself cost."""

    @property
    def shared_memory(self) -> bool:
        """Whether blocks were copied from the sender's mapping, not by TCP."""

    @property
    def waited_seconds(self) -> float:
        """From here to when the engine took this event (`TransferNode.poll`)."""

@final
class ReceiveFailed:
    """Receiver: over without success, and no write to the blocks can come now.

    Only from here on may the destination blocks be freed or used. Blocks
    before `verified_blocks` of the sequence are right and may be kept as prefix.
    """

    @property
    def transfer_id(self) -> bytes: ...
    @property
    def reason(self) -> Reason: ...
    @property
    def message(self) -> str: ...
    @property
    def verified_blocks(self) -> int:
        """Index in the sequence, so `from_token / block_tokens` where none came."""

    @property
    def seconds(self) -> float: ...
    @property
    def waited_seconds(self) -> float:
        """From here to when the engine took this event (`TransferNode.poll`)."""

TransferEvent = (
    Pulled
    | Reached
    | PrefixWanted
    | SenderReleased
    | SenderAborted
    | PrefixFound
    | Verified
    | Committed
    | ReceiveFailed
)

@final
class ClusterToken:
    """The token that routers and workers of a cluster show each other.

    The port that it is given to reads its file again when that changes, for all that
    have it.
    """

    def __new__(cls, file: str) -> ClusterToken:
        """Reads it. Raises ValueError naming the setting, the file and what is allowed."""

@final
class PeerTls:
    """A worker's TLS: of its ports, and of its calls to other workers.

    The port that it is given to reads the files again when they change.
    """

    def __new__(cls, certificate: str, key: str, ca: str, cluster: str, worker_id: str) -> PeerTls:
        """Reads the files: PEM, of settings tls_cert, tls_key and tls_ca.

        Raises ValueError naming the setting, the file and what is allowed: the
        certificate has to be this worker's.
        """

@final
class TransferNode:
    """Moves KV blocks between this worker's pool and its peers'.

    Nothing here blocks but `wait` and `close`, and nothing big runs under the
    GIL. Threads start with the object and end with `close`. A transfer id is 16
    bytes; a wrong length raises ValueError.
    """

    def __new__(
        cls,
        pool: KvPool,
        *,
        worker_id: str,
        incarnation: int,
        compatibility: bytes,
        block_tokens: int,
        listen: str = "127.0.0.1:0",
        advertise: str = "",
        shared_memory: bool = True,
        lease_s: float = 10.0,
        offer_timeout_s: float = 2.0,
        aborted_memory_s: float = 10.0,
        connect_timeout_s: float = 2.0,
        idle_timeout_s: float = 30.0,
        max_transfers: int = 4096,
        max_connections: int = 1024,
        copy_threads: int = 0,
        token: ClusterToken | None = None,
        tls: PeerTls | None = None,
    ) -> TransferNode:
        """Binds `listen` and, with `shared_memory`, an abstract unix socket.

        `compatibility` is a serialised kvmesh.v1.KvCompatibility. `advertise`
        is the host told in `address` where `listen` is a wildcard.
        `copy_threads` 0: half of the cores, 1 to 4. Raises OSError, ValueError.
        """

    @property
    def address(self) -> str:
        """ "host:port" for MeshHandOff.sender_address."""

    # Sender.
    def offer(self, transfer_id: bytes, pins: int = 0, *, grows: bool = False) -> None:
        """Opens a transfer; a pull that waits for it goes on at once.

        `grows`: more is announced while it goes, so `Reached` is told. `pins`
        counts in `residue`. Raises TransferError: the id is known, or was aborted
        in the last `aborted_memory_s`, or there are too many.
        """

    def ready(self, transfer_id: bytes, first_block: int, slots: Sequence[int]) -> None:
        """Announces full blocks `first_block` and following of the sequence.

        Calls go in order and without holes, from block 0 or a later one that
        the receiver is known to have. Versions are read here; checksums are
        computed, in order, by the node's threads once the receiver has pulled.
        Raises TransferError: no such transfer now (aborted, or after commit).
        """

    def commit(
        self,
        transfer_id: bytes,
        kv_tokens: int,
        partial: tuple[int, int] | None = None,
        output_ids: Sequence[int] = ...,
        logprobs: Sequence[bytes] = ...,
    ) -> None:
        """The last word, sent behind all blocks that were announced.

        `partial` is (block of the sequence, slot) of the last block where
        `kv_tokens` is no whole number of blocks. Ends with `SenderReleased` or
        `SenderAborted`. Raises TransferError as `ready`.
        """

    def offer_prefix(self, transfer_id: bytes, tokens: int, slots: Sequence[int]) -> None:
        """Answers `PrefixWanted`: `tokens` held (whole blocks; 0: none) in `slots`.

        `slots[i]` holds block i of the prefix, from block 0. Pinned until
        `SenderReleased` or `SenderAborted`; with 0 tokens no event follows.
        Raises TransferError: the peer has gone.
        """

    # Receiver.
    def pull(
        self,
        transfer_id: bytes,
        address: str,
        worker: str,
        incarnation: int,
        from_token: int,
        slots: Sequence[int],
        traceparent: str = "",
        request_id: str = "",
    ) -> None:
        """Pulls a named transfer into `slots`: block `from_token / block_tokens`
        goes to slots[0], and so on. Ends with `Committed` or `ReceiveFailed`.

        Raise the versions of `slots` before. Raises TransferError: the id is
        pulled already, or there are too many; ValueError: slots out of range.
        """

    def pull_prefix(
        self,
        transfer_id: bytes,
        address: str,
        worker: str,
        incarnation: int,
        from_token: int,
        slots: Sequence[int],
        token_ids: Sequence[int],
        adapter: str = "",
        cache_salt: str = "",
        traceparent: str = "",
        request_id: str = "",
        adapter_digest: str = "",
    ) -> None:
        """Pulls a prefix from any holder; `transfer_id` is made up by the caller.

        A holder whose adapter of that name has another `adapter_digest` holds
        nothing of it; empty: it is not compared.
        Brings at most the whole blocks of `token_ids`. Ends as `pull`, with no
        output ids; `Committed.kv_tokens` says how many tokens came to be there.
        """

    # Either side.
    def abort(self, transfer_id: bytes, reason: Reason = "cancelled", message: str = "") -> bool:
        """Ends a transfer and tells the peer. False: none is known by that id.

        Sending: over on return, no event follows, blocks may be unpinned.
        Receiving: `ReceiveFailed` follows; only then are its blocks free.
        """

    def poll(self) -> list[TransferEvent]:
        """All events that have come, in order. Never blocks."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits without the GIL for an event or a `wake`. False: timed out."""

    def wake(self) -> None:
        """Ends a `wait`, or the next one. From any thread; coalesces."""

    def residue(self) -> dict[str, int]:
        """What is held: `sending`, `receiving`, `awaited` (pulls before their
        offer), `pins`, `connections`, `mappings`, `jobs`, `remembered`."""

    def figures(self) -> dict[str, int]:
        """Totals since the start: `sent_blocks`, `sent_bytes`, `sent_tcp_bytes`,
        `received_blocks`, `received_bytes`, `copied_bytes` (shared memory),
        `mismatches`, `sends_released`, `sends_aborted`, `receives_committed`,
        `receives_failed`, `untrusted` (connections)."""

    def close(self) -> None:
        """Ends all transfers, connections and threads. No event follows. Idempotent."""

    def __enter__(self) -> TransferNode: ...
    def __exit__(self, *exc: Any) -> None: ...

# --- Registry -----------------------------------------------------------------

RegistrationStateName = Literal["registering", "registered", "refused", "away", "closed"]

class RegistryUnreachableError(Exception):
    """etcd cannot be reached, or refuses what was asked."""

class WorkerIdTakenError(Exception):
    """Another live worker is registered under this id; the text names it."""

@final
class WorkerRegistration:
    """Keeps a worker's record in etcd, from threads of its own, until closed.

    Losing etcd or the lease is healed by itself: the record is written again
    under the same key.
    """

    def __new__(
        cls,
        endpoints: Sequence[str],
        cluster: str,
        record: bytes,
        ttl_s: float = 10.0,
        *,
        wait_s: float = 5.0,
        ca_file: str | None = None,
        certificate_file: str | None = None,
        key_file: str | None = None,
        server_name: str = "",
        user: str = "",
        password: str = "",
        token: ClusterToken | None = None,
        tls: PeerTls | None = None,
    ) -> WorkerRegistration:
        """Registers `record`, a serialised kvmesh.v1.WorkerRecord.

        The PEM files are those of etcd_ca, etcd_cert and etcd_key, and are read again when
        they change. Waits up to `wait_s` for the outcome; where etcd is away by then it goes
        on in the background. Raises WorkerIdTakenError, ValueError.
        """

    def state(self) -> RegistrationStateName: ...
    def reason(self) -> str:
        """Why it is refused or away; else empty."""

    def wait_change(self, known_state: str, known_reason: str) -> tuple[RegistrationStateName, str]:
        """Waits without the GIL until state or reason are others than these, or it is
        closed; both as they are then.
        """

    def update(self, record: bytes) -> None:
        """Writes another record of the same worker and incarnation.

        At once, or as soon as etcd can be reached. Raises ValueError.
        """

    def wait_registered(self, timeout_s: float) -> bool:
        """Waits without the GIL until registered. False: not in time."""

    def close(self) -> None:
        """Revokes the lease and waits for that, for seconds at most. Idempotent."""

def list_workers(
    endpoints: Sequence[str],
    cluster: str,
    *,
    ca_file: str | None = None,
    certificate_file: str | None = None,
    key_file: str | None = None,
    server_name: str = "",
    user: str = "",
    password: str = "",
) -> list[bytes]:
    """Serialised WorkerRecords of a cluster. Raises RegistryUnreachableError."""

def list_routers(
    endpoints: Sequence[str],
    cluster: str,
    *,
    ca_file: str | None = None,
    certificate_file: str | None = None,
    key_file: str | None = None,
    server_name: str = "",
    user: str = "",
    password: str = "",
) -> list[tuple[str, str]]:
    """Routers of a cluster as (id, "host:port"). Raises RegistryUnreachableError."""

# --- Worker port --------------------------------------------------------------

@final
class Placed:
    """A placement that the engine answers.

    `place` is a serialised kvmesh.v1.Place without the prompt; `prompt_ids` are its
    token ids, packed as u32.
    """

    @property
    def session(self) -> str: ...
    @property
    def place(self) -> bytes: ...
    @property
    def prompt_ids(self) -> bytes: ...
    @property
    def age_s(self) -> float:
        """Seconds since it was read."""

@final
class Ended:
    """Attempts to end: a router cancelled them, or its session is gone."""

    @property
    def attempts(self) -> list[tuple[bytes, int, int]]:
        """Each (generation, owner, attempt)."""

@final
class HandOverAsked:
    """A serialised kvmesh.v1.HandOver."""

    @property
    def command(self) -> bytes: ...

@final
class SnapshotWanted:
    """A router needs the cache's content: answer with `begin_snapshot`."""

    @property
    def session(self) -> str: ...

@final
class InfoWanted:
    """GetInfo waits: answer with `answer_info`."""

    @property
    def call(self) -> int: ...

@final
class StopAsked:
    """Drain with `stop`."""

    @property
    def grace_s(self) -> float | None:
        """Time for running work, seconds. None: the worker's own setting."""

@final
class RoleChanged:
    """SetRole was called; load reports and GetInfo have the role already."""

    @property
    def role(self) -> int: ...

@final
class EndsTold:
    """Attempts have ended: for the log. Nothing is to be done."""

    @property
    def ends(self) -> list[tuple[str, bytes, int, int, str, str, str]]:
        """Each (session, generation, owner, attempt, stage, end, why)."""

@final
class EngineEnded:
    """The engine called `ended`."""

PortEvent = (
    Placed
    | Ended
    | HandOverAsked
    | SnapshotWanted
    | InfoWanted
    | StopAsked
    | RoleChanged
    | EndsTold
    | EngineEnded
)

@final
class WorkerPort:
    """A worker's gRPC port: kvmesh.v1.Worker, health and reflection.

    Sessions, lanes and encoding are native; nothing of Python runs on its
    thread. It is the `contract.OutputSink` of the worker's engine. Nothing
    blocks but `wait`, `wait_idle`, `add_snapshot` and `close`, which release
    the GIL.
    """

    def __new__(
        cls,
        listen: str,
        *,
        step_lane_bytes: int = 8_388_608,
        step_lane_age_s: float = 10.0,
        cache_ring_events: int = 65_536,
        cache_coalesce_ms: float = 20.0,
        snapshot_interval_ms: float = 5.0,
        load_interval_ms: float = 250.0,
        load_coalesce_ms: float = 5.0,
        keep_alive_interval_s: float = 10.0,
        keep_alive_timeout_s: float = 10.0,
        grace_s: float = 30.0,
        tell_all_ends: bool = False,
        load_delay_ms: float = 0.0,
        replay_bytes: int = 4_194_304,
        orphan_ttl_s: float = 10.0,
        resume_bytes: int = 67_108_864,
        token: ClusterToken | None = None,
        tls: PeerTls | None = None,
    ) -> WorkerPort:
        """Binds "host:port", port 0 a free one. Raises OSError, ValueError."""

    @property
    def port(self) -> int:
        """The bound port."""

    def load(self, record: bytes) -> None:
        """Begins to answer while the model is loaded: not serving yet, routers
        are told to come back. Raises as `serve`.
        """

    def warm_up(
        self, record: bytes, tokenizer: Sequence[tuple[str, bytes]], tokenizer_digest: str
    ) -> None:
        """The first steps are timed: routers may attach, what they place waits.
        Raises as `serve`.
        """

    def serve(
        self, record: bytes, tokenizer: Sequence[tuple[str, bytes]], tokenizer_digest: str
    ) -> None:
        """Begins to serve, once. `record` is a serialised kvmesh.v1.WorkerRecord,
        `tokenizer` names and contents in the order of the digest. `load` and
        `warm_up` need not come before.

        Raises ValueError, RuntimeError (a second time, or after `close`).
        """

    # contract.OutputSink.
    def begin_step(self, predicted_ms: float) -> None:
        """A step begins."""

    def step(self, output: StepOutput) -> None:
        """Hands what a step brought to the sessions. Raises ValueError."""

    def ended(self) -> None:
        """The engine says nothing more: `EngineEnded` follows."""

    # Snapshots.
    def begin_snapshot(self, session: str) -> bool:
        """To be called before the cache is read. False: nobody wants it now."""

    def add_snapshot(self, session: str, changes: Sequence[CacheChange] | None) -> bool:
        """Adds a part, stores only; None ends it. Waits while the router has
        enough. False: its session is gone."""

    def fail_snapshot(self, session: str) -> None:
        """Ends the session: the cache cannot be read."""

    # The worker's process.
    def wait(self, timeout_s: float) -> list[PortEvent] | None:
        """Waits for events. Empty: none came in time. None: the port is closed."""

    def answer_info(self, call: int, residue: bytes) -> None:
        """Answers `InfoWanted` with a serialised kvmesh.v1.Residue. Raises ValueError."""

    def running(self) -> int:
        """Attempts that have not ended."""

    def begin_stop(self) -> None:
        """Takes no new work; health and load say so."""

    def wait_idle(self, timeout_s: float) -> bool:
        """Waits until nothing runs. False: it still does."""

    def give_back(self, grace_s: float) -> None:
        """Ends what runs with `returned`, which names the grace that has ended;
        `Ended` follows for the engine. Raises ValueError."""

    def close(self, linger_s: float = 1.0) -> None:
        """Ends the sessions once their step output has gone, within
        `linger_s`, and the thread. Idempotent."""

    def __enter__(self) -> WorkerPort: ...
    def __exit__(self, *exc: Any) -> None: ...

# --- Attention ----------------------------------------------------------------

@final
class PagedKv:
    """float32 K and V in a pool's blocks: kernels that read them where they lie.

    Layout as KvCompatibility.format 1. All arguments offer the buffer protocol,
    are contiguous and of the type said; ValueError and IndexError where they do
    not fit. The GIL is released. One thread at a time.
    """

    def __new__(
        cls,
        pool: KvPool | bytearray,
        *,
        layers: int,
        heads: int,
        kv_heads: int,
        block_tokens: int,
        head_size: int,
    ) -> PagedKv:
        """`pool`: bytes, writable; held as long as this object."""

    def write(
        self,
        layer: int,
        qkv: npt.NDArray[np.float32],
        cos: npt.NDArray[np.float32],
        sin: npt.NDArray[np.float32],
        slots: npt.NDArray[np.int64],
        q_out: npt.NDArray[np.float32],
    ) -> None:
        """Rotates q and k of n tokens; q goes to `q_out`, k and v into blocks.

        `qkv` float32 [n, (heads + 2 * kv_heads) * head_size], `cos` and `sin`
        float32 [n, head_size / 2], `slots` int64 [n] (block * block_tokens +
        place in the block), `q_out` float32 [n, heads * head_size].
        """

    def attend(
        self,
        layer: int,
        q: npt.NDArray[np.float32],
        rows: npt.NDArray[np.uint32],
        begins: npt.NDArray[np.uint32],
        tables: npt.NDArray[np.uint32],
        lengths: npt.NDArray[np.uint32],
        out: npt.NDArray[np.float32],
        *,
        threads: int = 1,
    ) -> None:
        """Attention of single tokens over their sequences.

        Row `rows[i]` (rising) of `q` over `lengths[i]` tokens that lie in blocks
        `tables[begins[i]]` and following, into the same row of `out`. `q` and
        `out` float32 [n, heads * head_size], the others uint32.
        """

# --- Simulated engine ----------------------------------------------------------

@final
class SimStreams:
    """Streams of the simulated engine that decode together (sim/content.py).

    One thread at a time.
    """

    def __new__(
        cls,
        pool: KvPool | bytearray,
        *,
        state_factor: int,
        token_factor: int,
        spread: Sequence[int],
        gain: int,
        first_token: int,
        tokens: int,
        end_of_text: int,
        end_id: int,
        block_tokens: int,
    ) -> SimStreams:
        """`pool`: bytes, writable; held as long as this object. Raises ValueError."""

    def join(self, streams: Sequence[tuple[int, int, int, int]]) -> None:
        """Takes other streams: (position, state, reading, tag) each, of what is
        computed next."""

    def states(self) -> list[tuple[int, int, int]]:
        """(position, state, reading) of each stream now."""

    def step(self, ids: bytes, tables: npt.NDArray[np.uint32]) -> bytes:
        """Computes a token a stream; returns the tokens drawn.

        `ids` and the answer are packed u32, `tables` uint32 [streams, blocks].
        Raises ValueError, IndexError.
        """

@final
class DecodeLoop:
    """Steps of simulated streams that decode together, without Python.

    For one composition of streams. One thread at a time.
    """

    def __new__(
        cls,
        port: WorkerPort,
        node: TransferNode,
        streams: SimStreams,
        *,
        rows: Sequence[Sequence[int]],
        stop_ids: Sequence[int],
        predicted_ms: tuple[float, float],
        takes_s: tuple[float, float],
    ) -> DecodeLoop:
        """`rows`: those of each router, in the order of `StepOutput.routers`.

        `predicted_ms` and `takes_s`: of a step, and besides for each token of
        context. Raises ValueError where steps take no time.
        """

    def run(
        self,
        output: object,
        ids: bytes,
        tables: npt.NDArray[np.uint32],
        context: int,
        most: int,
        look: bool,
    ) -> tuple[list[bytes], bool, list[tuple[float, float]]]:
        """Makes steps until `most`, a wake or event of the node, or a stop id drawn.

        `look`: what the last of `most` steps brought is for somebody else to tell.

        `output`: the `StepOutput` of the step before, its rows with the indices of
        the first one to come; `context` is that of the first. Returns the tokens
        of each step, packed, whether the last step was told to the routers (not
        where it needs a `look` or drew a stop id), and when each began and ended,
        seconds since the call.
        Waits without the GIL. Raises ValueError, IndexError.
        """

def router_settings() -> list[tuple[str, str, str, str, bool]]:
    """Every setting of a router: (name, default, meaning, what is allowed, is a switch)."""

# --- Scoring plans ---------------------------------------------------------------

def measure_scorer(
    scorer: Callable[
        [dict[str, npt.NDArray[np.float64]]], Sequence[float] | npt.NDArray[np.float64]
    ],
    plans: int,
    calls: int,
) -> list[float]:
    """What a scorer costs a decision, seconds a call.

    It is called as a router calls it, with so many plans of made-up figures.
    ValueError where it fails.
    """

# --- Router -------------------------------------------------------------------

class InternalError(Exception):
    """A bug in kvmesh: Rust code panicked. Please report it with its text."""

def start_logging(level: str) -> None:
    """Sends log lines of Rust code to stderr, in the form of a router's.

    For processes without a router; the first call in a process counts. `level`: as the
    router's setting `log_level`. Raises ValueError.
    """

@final
class Router:
    """A router that serves until it is closed. No Python runs on its threads.

    But for a scorer, where one is given.
    """

    def __new__(
        cls,
        settings_json: str,
        scorer: Callable[
            [dict[str, npt.NDArray[np.float64]]], Sequence[float] | npt.NDArray[np.float64]
        ]
        | None = None,
    ) -> Router:
        """Starts a router.

        `settings_json` is an object with the keys of `router_settings`; it is
        stronger than KVMESH_* variables. Raises ValueError for a setting,
        OSError where it cannot start.

        `scorer` chooses instead of the setting `policy`: it gets the plans that
        the cost would weigh, a column a name (docs/scheduling.md), and gives a
        score a plan; the least is chosen. It runs under the GIL, once a
        decision. Where it fails the cost decides, and `kvmesh.scorer` logs it.
        """

    @property
    def address(self) -> str:
        """The bound address, "host:port"."""

    @property
    def admin_address(self) -> str | None:
        """The bound address of the port for operators, where they have one."""

    def wait(self) -> None:
        """Waits until it has ended. Signals are seen within 100 ms."""

    def close(self) -> None:
        """Ends it: NOT_SERVING, GOAWAY, the grace for what runs. Idempotent."""
