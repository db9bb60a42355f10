"""Benchmarks can be run all at once, whatever one of them lacks, and the docs list them."""

import os
import subprocess
import sys
from textwrap import dedent

import pytest


def run(root, *arguments, **variables):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root / "benchmarks",
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_the_page_lists_every_benchmark(root):
    page = (root / "docs" / "benchmarks.md").read_text()
    listed = run(root, "-c", "import run_all; print(*[b.name for b in run_all.benchmarks()])")
    names = listed.stdout.split()
    assert len(names) > 5, listed.stderr
    assert [name for name in names if name not in page] == []


def test_figures_are_printed_by_their_names(root):
    code = """
        from alternating import Figure, print_figures
        print_figures([Figure("shm_over_memcpy", 0.875, "ratio", "higher")])
    """
    assert "shm_over_memcpy  0.875  ratio  higher" in run(root, "-c", dedent(code)).stdout


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        pytest.param("session.py", ["itl_p99_ratio_snapshot", "itl_p99_ratio_prompts",
                                    "itl_p99_ratio_tokenizer"], marks=pytest.mark.slow),
        ("kv_transfer.py", ["shm_over_memcpy", "tcp_over_socket"]),
        pytest.param("engine.py", ["prefill_over_transformers", "decode8_over_transformers",
                                   "kvmesh tok/s"], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_run_prints_its_figures_and_whether_it_is_evidence(root, name, figures):
    arguments = ["--without-model"] if name == "kv_transfer.py" else []
    done = run(root, name, "--quick", *arguments)
    assert done.returncode == 0, done.stderr
    for figure in [*figures, "Not evidence: a quick run."]:
        assert figure in done.stdout


@pytest.mark.parametrize("name", ["routing_quality.py", "simulate_speed.py"])
def test_one_without_its_traces_says_what_it_needs_and_how_to_give_it(root, name, tmp_path):
    done = run(root, name, "--quick", KVMESH_TRACES=str(tmp_path))
    assert done.returncode == 77
    assert f"needs mooncake_conversation_part1.jsonl, which {tmp_path} has not" in done.stderr
    assert "--traces DIR or KVMESH_TRACES" in done.stderr


def test_one_that_fails_or_lacks_its_input_stops_no_other(root, tmp_path):
    programs = {"breaks": "exit(3)", "lacks": "exit(77)", "works": "print('reached')"}
    for name, code in programs.items():
        (tmp_path / f"{name}.py").write_text(code)
    files = [str(tmp_path / f"{name}.py") for name in programs]
    done = run(root, "run_all.py", "--results", str(tmp_path / "results"), *files)
    assert done.returncode == 1
    assert "reached" in done.stdout
    assert "skipped, their input is missing (see above): lacks" in done.stdout
    assert "FAILED: breaks (status 3)" in done.stderr

    done = run(root, "run_all.py", "--results", str(tmp_path / "results"), *files[1:])
    assert done.returncode == 0, done.stderr
