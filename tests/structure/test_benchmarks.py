"""Benchmarks can be run all at once, whatever one of them lacks, and the docs list them."""

import os
import subprocess
import sys

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
