"""`pip install .` alone gives a client, a router and the command line.

An environment of its own with nothing in it, built from this checkout as pip
builds it. What the project's own environment has cannot help here.
"""

import json
import os
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
# What pip brings for `pip install .`, with what a new environment holds.
CLIENT = {"kvmesh", "grpcio", "protobuf", "typing-extensions", "pip", "setuptools"}


def run(*command: str | Path) -> str:
    """Runs in an environment that knows no checkout and no other packages."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=clean, cwd="/"
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of executables of an environment with `pip install .` and no more."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    run(folder / "bin/python", "-m", "pip", "install", "--disable-pip-version-check", ROOT)
    return folder / "bin"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory) -> Iterator[str]:
    cluster = Cluster(tmp_path_factory.mktemp("mesh"))
    try:
        endpoint = cluster.start_router()
        cluster.start_worker("w", "both")
        cluster.wait_live(endpoint, "w")
        yield endpoint
    finally:
        cluster.close()


def test_it_brings_grpcio_and_protobuf_only(installed):
    packages = json.loads(run(installed / "python", "-m", "pip", "list", "--format=json"))
    names = {package["name"].lower().replace("_", "-") for package in packages}
    assert {"kvmesh", "grpcio", "protobuf"} <= names <= CLIENT


def test_the_command_line_asks_a_mesh(installed, mesh):
    answer = run(
        installed / "kvmesh", "generate", "--endpoint", mesh, "--json", "--max-tokens", "4", "hello"
    )
    assert len(json.loads(answer)["token_ids"]) == 4


def test_the_python_client_asks_a_mesh(installed, mesh):
    code = (
        "import kvmesh, sys\n"
        "with kvmesh.Client(sys.argv[1]) as client:\n"
        "    print(len(client.complete(token_ids=[1, 2, 3], max_tokens=4).token_ids))\n"
    )
    assert run(installed / "python", "-c", code, mesh).strip() == "4"


def test_the_router_is_in_it(installed):
    assert "--listen" in run(installed / "kvmesh", "router", "--help")


def test_an_engine_says_which_extra_it_needs(installed):
    done = subprocess.run(
        [installed / "kvmesh", "worker", "--engine", "torch", "--role", "both", "--model", "m"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        cwd="/",
    )
    assert done.returncode != 0
    assert "kvmesh[torch]" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
