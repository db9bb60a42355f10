"""From a worker's settings to a simulated engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvmesh.engine.core.engine import CoreEngine, TransferSettings
from kvmesh.engine.core.settings import CoreSettings, OutputBehaviour
from kvmesh.engine.sim.runner import SimClock, SimRunner
from kvmesh.engine.sim.settings import PROFILES, SimSettingError, SimSettings
from kvmesh.engine.sim.vocabulary import end_of_text_ids, tokenizer_files
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.engines import BuiltEngine
from kvmesh.worker.settings import SettingError, WorkerSettings
from kvmesh.worker.tokenizer_files import TokenizerFiles
from kvmesh.worker.trust import cluster_token, peer_tls

CONNECTOR = "sim"
"""Name of the on_finish hand-off of `--like vllm`."""


def build(
    settings: WorkerSettings, worker_id: str, incarnation: int, progress: Callable[[str], None]
) -> BuiltEngine:
    """Builds the engine; there is nothing to load. Raises SettingError."""
    arguments = dict(settings.engine_arguments)
    if settings.like and arguments.setdefault("like", settings.like) != settings.like:
        raise SettingError("like is given twice, and differently; allowed is once")
    try:
        sim = SimSettings.from_arguments(arguments)
    except SimSettingError as error:
        raise SettingError(f"engine_arguments: {error}") from error
    engine = build_engine(
        sim,
        pool_blocks=max(1, settings.kv_pool_tokens // sim.block_tokens),
        worker_id=worker_id,
        incarnation=incarnation,
        transfer=TransferSettings(
            listen=settings.transfer_listen,
            advertise=settings.advertise_host,
            shared_memory=not settings.transfer_tcp,
            lease_s=settings.transfer_lease,
            offer_timeout_s=settings.offer_timeout,
            token=cluster_token(settings),
            tls=peer_tls(settings, worker_id),
        ),
        huge_pages=settings.huge_pages,
    )
    progress(f"sim: times of {sim.profile}, {PROFILES[sim.profile].source}")
    progress(engine.describe_memory())
    model = wire.ModelRecord(
        name=settings.model,
        digest=engine.capabilities().kv.model_digest,
        context_length=sim.context_length,
        vocabulary_size=sim.vocabulary,
        end_of_text_ids=end_of_text_ids(),
    )
    return BuiltEngine(
        engine, model, TokenizerFiles.of(tokenizer_files(sim.vocabulary, sim.chat_template))
    )


def build_engine(
    sim: SimSettings,
    *,
    pool_blocks: int,
    worker_id: str = "sim",
    incarnation: int = 1,
    transfer: TransferSettings | None = None,
    clock: SimClock | None = None,
    huge_pages: bool = True,
    adapters: Mapping[str, str] | None = None,
) -> CoreEngine:
    """A simulated engine by itself. `adapters`: digests by name; what it computes is
    the same with all of them."""
    behaviour = OutputBehaviour()
    if sim.like == "vllm":
        behaviour = OutputBehaviour(
            streamed_hand_off=False,
            engine_connector=CONNECTOR,
            prefill_emits_first_token=False,
            layer_preemption=False,
        )
    profile = PROFILES[sim.profile].model
    model = wire.StepModel()
    model.CopyFrom(profile)
    if sim.instant:
        model = wire.StepModel(saturating_chunk=profile.saturating_chunk)
    else:
        for name in ("a_ms", "b_ms", "c_ms", "d_ms", "e_ms"):
            setattr(model, name, getattr(profile, name) / sim.speed)
    return CoreEngine(
        SimRunner(sim, clock),
        CoreSettings(
            pool_blocks=pool_blocks,
            context_length=sim.context_length,
            vocabulary_size=sim.vocabulary,
            worker_id=worker_id,
            incarnation=incarnation,
            max_batch=sim.max_batch,
            output_behaviour=behaviour,
            step_model=model,
            huge_pages=huge_pages,
            adapters=adapters or {},
        ),
        wire.Capabilities(engine="sim", reproducible=True, penalties_over_continuation=True),
        transfer,
        clock,
    )
