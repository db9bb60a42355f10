"""From a worker's settings to the torch engine, ready to start."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from kvmesh import models
from kvmesh.engine.core.engine import CoreEngine, TransferSettings
from kvmesh.engine.core.settings import CoreSettings
from kvmesh.engine.torch.build import TorchSettings
from kvmesh.engine.torch.build import build as build_runner
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.engines import BuiltEngine
from kvmesh.worker.settings import SettingError, WorkerSettings
from kvmesh.worker.tokenizer_files import TokenizerFiles
from kvmesh.worker.trust import cluster_token, peer_tls

MAX_LOGPROBS = 20
"""Most alternatives with log-probability, as inference.proto allows."""

_SHOW_EVERY_S = 3.0

_ARGUMENTS = ("block_tokens", "max_batch", "chunk_tokens")


def build(
    settings: WorkerSettings,
    worker_id: str,
    incarnation: int,
    progress: Callable[[str], None],
    cancellation: models.Cancellation | None = None,
) -> BuiltEngine:
    """Loads the model and builds its engine. Raises SettingError; where it is given up
    `models.LoadCancelledError`, between two pieces of whatever it reads."""
    cancellation = cancellation or models.Cancellation()
    arguments = settings.engine_arguments
    unknown = set(arguments) - set(_ARGUMENTS)
    if unknown:
        raise SettingError(
            f"engine_arguments: {', '.join(sorted(unknown))} is no argument of torch; "
            f"allowed are {', '.join(_ARGUMENTS)}"
        )
    try:
        block_tokens = int(arguments.get("block_tokens", 16))
        max_batch = int(arguments.get("max_batch", 256))
        chunk_tokens = _chunk_tokens(arguments, block_tokens)
        steps = cancellation.checked(_Steps(progress))
        folder = models.pull(settings.model, steps, cancellation)
        if not models.end_of_text_ids_of(folder):
            raise models.UnsupportedModelError(models.NO_END)
        built = build_runner(
            TorchSettings(
                model=settings.model,
                served_name=settings.served_name,
                device=settings.device,
                dtype=settings.dtype,
                threads=settings.threads,
                block_tokens=block_tokens,
            ),
            steps,
        )
    except (models.ModelError, ValueError) as error:
        raise SettingError(f"model {settings.model}: {error}") from error
    progress(f"model: {built.record.name}, {built.record.context_length} tokens of context")
    exact = settings.dtype == "float32"
    engine = CoreEngine(
        built.runner,
        CoreSettings(
            pool_blocks=max(1, settings.kv_pool_tokens // block_tokens),
            context_length=built.record.context_length,
            vocabulary_size=built.record.vocabulary_size,
            adapters=dict(built.record.adapters),
            worker_id=worker_id,
            incarnation=incarnation,
            max_batch=max_batch,
            chunk_tokens=chunk_tokens,
            huge_pages=settings.huge_pages,
        ),
        wire.Capabilities(
            engine="torch",
            # Batch-mates change the last bits only; in float32 no token hangs on them.
            reproducible=exact,
            penalties_over_continuation=True,
            max_logprobs=MAX_LOGPROBS,
        ),
        TransferSettings(
            listen=settings.transfer_listen,
            advertise=settings.advertise_host,
            shared_memory=not settings.transfer_tcp,
            lease_s=settings.transfer_lease,
            offer_timeout_s=settings.offer_timeout,
            token=cluster_token(settings),
            tls=peer_tls(settings, worker_id),
        ),
    )
    if settings.populate_kv_pool:
        taking = cancellation.checked(_Steps(progress, what="KV pool"))
        try:
            engine.take_memory(lambda done, total: taking("taking its memory,", done, total))
        except OSError as error:
            raise SettingError(
                f"kv_pool_tokens: {settings.kv_pool_tokens} tokens find no memory ({error}); give "
                "the pool fewer"
            ) from error
    progress(engine.describe_memory())
    return BuiltEngine(engine, built.record, TokenizerFiles.read(built.folder))


def _chunk_tokens(arguments: Mapping[str, str], block_tokens: int) -> int:
    """Fixed size of chunks; chunks end where blocks do."""
    tokens = int(arguments.get("chunk_tokens", 0))
    if tokens < 0 or tokens % block_tokens:
        raise SettingError(
            f"engine_arguments: chunk_tokens is {tokens}; allowed are multiples of "
            f"block_tokens ({block_tokens}), and 0 for as many as fit the targets in milliseconds"
        )
    return tokens


class _Steps:
    """A line at the start of a step, then one every few seconds: a worker's log is no
    terminal."""

    def __init__(
        self,
        progress: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
        what: str = "model",
    ) -> None:
        self._progress = progress
        self._what = what
        self._now = now
        self._step = ""
        self._shown = 0.0

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """See kvmesh.models.Progress."""
        now = self._now()
        if step == self._step and now - self._shown < _SHOW_EVERY_S:
            return
        self._step, self._shown = step, now
        share = f" {100 * done / total:.0f} % of {total / 1e6:.0f} MB" if total and done else ""
        self._progress(f"{self._what}: {step}{share}")
