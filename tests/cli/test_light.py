"""A client needs grpcio and protobuf only, and the command line loads no engine."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "gguf")


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import kvmesh; kvmesh.Client, kvmesh.AsyncClient",
        "import kvmesh.cli.generate, kvmesh.cli.chat, kvmesh.cli.workers, kvmesh.cli.models",
        "import kvmesh.cli.up, kvmesh.cli.router, kvmesh.cli.cluster, kvmesh.cli.client",
        "from kvmesh.cli import main\ntry: main(['generate', '--help'])\nexcept SystemExit: pass",
        "from kvmesh.cli import main\ntry: main(['up', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_imported(code):
    assert modules_after(code).isdisjoint(HEAVY)
