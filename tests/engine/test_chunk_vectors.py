"""Chunks are those of the router's: both are held to the same vectors.

The scheduler predicts with the chunks that engines take
(router_rs/scheduler/src/chunk.rs).
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmesh.engine.core.queue import PromptQueue
from kvmesh.engine.core.settings import CoreSettings, OutputBehaviour
from kvmesh.engine.core.step_model import StepLoad
from kvmesh.v1 import worker_pb2 as wire

_VECTORS = Path(__file__).parents[2] / "router_rs/scheduler/tests/data/chunks.json"


@pytest.mark.parametrize("case", json.loads(_VECTORS.read_text())["cases"])
def test_a_chunk_is_that_of_the_vector(case: dict) -> None:
    a, b, c, d, e = case["coefficients"]
    model = wire.StepModel(
        a_ms=a, b_ms=b, c_ms=c, d_ms=d, e_ms=e, saturating_chunk=case["saturating_chunk"]
    )
    behaviour = OutputBehaviour(layer_preemption=case["layer_preemption"])
    settings = CoreSettings(pool_blocks=1, context_length=1, output_behaviour=behaviour)
    pool = SimpleNamespace(block_tokens=case["block_tokens"])
    queue = PromptQueue(pool, settings, begin=lambda _: None, taken_apart=lambda _: True)
    decode = StepLoad(decode_batch=case["decode_batch"], decode_context=case["decode_context"])
    budget = queue._chunk_budget(model, decode, case["itl_target_ms"])
    prompt = SimpleNamespace(computed=case["start"], length=case["length"])
    assert budget.take(prompt, at_least_a_block=True) == case["tokens"]
