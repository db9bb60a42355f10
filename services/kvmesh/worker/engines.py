"""Which engine a worker runs. The only place that knows their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvmesh.engine.contract import Engine
from kvmesh.models import Cancellation
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.settings import SettingError, WorkerSettings
from kvmesh.worker.tokenizer_files import TokenizerFiles

_EXTRAS = {"sim": "worker", "remote": "attach"}
"""Of engines whose extra has another name."""


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine that has its model and is ready to start."""

    engine: Engine
    model: wire.ModelRecord
    tokenizer: TokenizerFiles


def build_engine(
    settings: WorkerSettings,
    worker_id: str,
    incarnation: int,
    progress: Callable[[str], None],
    cancellation: Cancellation,
) -> BuiltEngine:
    """Loads a model and builds its engine. Takes seconds to minutes. Where it is given up and
    can be it raises `LoadCancelledError`.

    Imports an engine's packages only when it is asked for: they are extras.
    """
    try:
        if settings.engine == "sim":
            from kvmesh.engine.sim.build import build
        elif settings.engine == "vllm":
            from kvmesh.engine.vllm import served as vllm

            build = partial(vllm.build, cancellation=cancellation)
        elif settings.engine == "remote":
            from kvmesh.engine.remote.served import build
        else:
            from kvmesh.engine.torch import served as torch

            build = partial(torch.build, cancellation=cancellation)
    except ModuleNotFoundError as error:
        raise SettingError(
            f"engine is {settings.engine!r}, which needs the package {error.name}: "
            f"pip install 'kvmesh[{_EXTRAS.get(settings.engine, settings.engine)}]'"
        ) from error
    return build(settings, worker_id, incarnation, progress)
