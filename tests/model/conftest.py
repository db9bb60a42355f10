"""Models for these tests: SmolLM2 as `make demo` gets it, and tiny ones with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from driver import DEVICE, Driver

from kvmesh import models
from kvmesh.engine.torch import TorchSettings, build

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    return models.pull("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2(smollm2_folder) -> Driver:
    settings = TorchSettings("smollm2-135m", device=DEVICE, dtype="float32", threads=1)
    return Driver(build(settings).runner, blocks=700)


@pytest.fixture(scope="session")
def reference(smollm2_folder):
    """SmolLM2 in transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval()
