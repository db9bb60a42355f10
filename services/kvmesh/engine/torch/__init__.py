"""The reference engine: Llama-family models in torch, written to be read.

Reading order is the order of the data: build → plan → model → paged_kv →
sampling; runner.py puts them together.
"""

from kvmesh.engine.torch.build import Built, TorchSettings, build
from kvmesh.engine.torch.runner import TorchRunner

__all__ = ["Built", "TorchRunner", "TorchSettings", "build"]
