"""`kvmesh up`: a whole cluster of the sim engine, real etcd, router and workers."""

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kvmesh.cli import main
from kvmesh.cli.etcd import free_ports

UP = [sys.executable, "-m", "kvmesh.cli", "up", "--engine", "sim"]

ASK = textwrap.dedent("""
    import subprocess, sys
    command = [sys.executable, "-m", "kvmesh.cli", "generate", "hello", "--max-tokens", "5"]
    print(subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout)
    table = subprocess.run([sys.executable, "-m", "kvmesh.cli", "workers"],
                           check=True, capture_output=True, text=True).stdout
    print(table.count("prefill-1"), table.count("decode-1"))
    sys.exit(7)
""")


def test_a_command_gets_the_cluster_and_its_status_is_ours():
    done = subprocess.run(
        [*UP, "--once", "--", sys.executable, "-c", ASK], capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    result, _, counts = done.stdout.strip().splitlines()
    answer = json.loads(result)
    assert len(answer["token_ids"]) == answer["usage"]["output_tokens"] == 5
    assert answer["finish_reason"] == "length"
    assert {"text", "timings"} <= set(answer)
    assert counts == "1 1"


LOOK = textwrap.dedent("""
    import json, os, subprocess, sys
    from kvmesh._router import list_routers
    ((router, _),) = list_routers([os.environ["KVMESH_ETCD"]], os.environ["KVMESH_CLUSTER"])
    command = [sys.executable, "-m", "kvmesh.cli", "workers", "--json"]
    workers = json.loads(subprocess.run(
        [*command, "--etcd", os.environ["KVMESH_ETCD"]], check=True, capture_output=True).stdout)
    print(json.dumps([router, os.environ["KVMESH_ENDPOINT"], [w["labels"] for w in workers]]))
""")


def test_its_file_holds_for_its_parts_and_its_variables_for_itself(tmp_path):
    (port,) = free_ports([0])
    file = tmp_path / "kvmesh.toml"
    file.write_text(
        '[router]\nrouter_id = "named"\nlisten = "127.0.0.1:1"\n'
        '[worker]\nlabels = {zone = "a"}\nlisten = "127.0.0.1:1"\ntransfer_listen = "127.0.0.1:1"\n'
    )
    done = subprocess.run(
        [*UP, "--config", str(file), "--once", "--", sys.executable, "-c", LOOK],
        capture_output=True,
        text=True,
        # Each means another thing to a router and to a worker.
        env={**os.environ, "KVMESH_LISTEN": f"127.0.0.1:{port}", "KVMESH_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == ["named", f"127.0.0.1:{port}", [{"zone": "a"}, {"zone": "a"}]]


def test_trust_that_its_file_asks_for_holds_for_all_its_parts(tmp_path):
    """A token between them, and operators on a port of their own, where it looks, too."""
    token, file = tmp_path / "token", tmp_path / "kvmesh.toml"
    token.write_text("of-this-cluster-alone\n")
    own = f"cluster_token_file = '{token}'\n"
    file.write_text(f"[router]\n{own}admin_listen = '127.0.0.1:0'\n[worker]\n{own}")
    command = [sys.executable, "-m", "kvmesh.cli", "workers"]
    done = subprocess.run(
        [*UP, "--config", str(file), "--once", "--", *command], capture_output=True, text=True
    )
    # That it began says that its workers were found; a client's port tells nobody of them.
    assert done.returncode == 1
    assert "permission denied" in done.stderr
    assert "operators are answered on 127.0.0.1:" in done.stderr


KILL = textwrap.dedent("""
    import os, pathlib, signal, sys
    up = os.getppid()
    for pid in pathlib.Path(f"/proc/{up}/task/{up}/children").read_text().split():
        command = pathlib.Path(f"/proc/{pid}/cmdline").read_text()
        if f"\\0{sys.argv[1]}\\0" in command and int(pid) != os.getpid():
            os.kill(int(pid), signal.SIGKILL)
    if sys.argv[2] == "wait":
        signal.pause()
""")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_router_that_dies_under_a_command_ends_it_and_is_told():
    command = [*UP, "--once", "--", sys.executable, "-c", KILL, "router", "wait"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "kvmesh up: router was ended by SIGKILL" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_command_goes_on_without_a_worker():
    code = KILL.replace("signal.pause()", "sys.stdin.readline(); sys.exit(3)")
    command = [*UP, "--once", "--", sys.executable, "-c", code, "decode-1", "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as up:
        assert any("kvmesh up: decode-1 was ended by SIGKILL" in line for line in up.stderr)
        up.stdin.write("\n")
        up.stdin.close()
        up.stderr.read()
        assert up.wait() == 3


TIMINGS = re.compile(
    r"queue [\d.]+ ms · prefill \d+ ms · transfer [\d.]+ ms · first token \d+ ms · "
    r"[\d.]+ tokens/s · \d+ of \d+ prompt tokens cached"
)


@pytest.mark.parametrize("engine", ["sim", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_question_gets_its_answer_the_timings_and_how_to_ask_more(engine):
    question = "What is the capital of France?"
    command = [*UP[:-1], engine, "--listen", "127.0.0.1:0", "--etcd-port", "0", "--ask", question]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as up:
        said = []
        for line in up.stdout:
            said.append(line.rstrip("\n"))
            if line.startswith("Ctrl-C ends it."):
                break
        up.send_signal(signal.SIGINT)
        assert up.wait() == 0
    text = "\n".join(said)
    question_at = said.index(f"> {question}")
    timings_at = next(at for at, line in enumerate(said) if TIMINGS.fullmatch(line))
    answer = "\n".join(said[question_at + 1 : timings_at])
    assert answer.strip(), text
    assert engine == "sim" or "Paris" in answer
    serves = next(line for line in said[timings_at:] if line.startswith("The cluster serves at "))
    endpoint = serves.split()[4]
    (more,) = [line for line in said[timings_at:] if line.startswith("Ask more")]
    assert more.endswith(f" chat --endpoint {endpoint}"), more


def test_a_question_with_once_ends_after_the_answer():
    done = subprocess.run([*UP, "--ask", "Hello?", "--once"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert TIMINGS.fullmatch(last)


def test_a_start_that_takes_too_long_is_given_up(tmp_path):
    """By the bound, whoever it is that does not come: here a router that has no etcd at all."""
    command = [*UP, "--data", str(tmp_path), "--ready-timeout-s", "1", "--etcd", "127.0.0.1:1"]
    done = subprocess.run([*command, "--once", "--", "true"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "not ready after 1 s: " in done.stderr
    assert f"logs are in {tmp_path}/logs" in done.stderr


def test_a_command_that_is_not_there():
    done = subprocess.run([*UP, "--once", "--", "/nowhere/x"], capture_output=True, text=True)
    assert done.returncode == 127
    assert "/nowhere/x" in done.stderr


def test_a_part_that_cannot_start_is_told_with_its_log(tmp_path):
    environment = {**os.environ, "KVMESH_ETCD_BIN": "/bin/false"}
    command = [*UP, "--data", str(tmp_path), "--once", "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "etcd ended with status 1" in done.stderr


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_no_child_outlives_it(number, status, tmp_path):
    command = [*UP, "--listen", "127.0.0.1:0", "--etcd-port", "0", "--data", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as up:
        assert any("The cluster serves at" in line for line in up.stdout)
        pids = children_of(up.pid)
        assert len(pids) == 4, "etcd, a router, two workers"
        descriptors = [os.pidfd_open(pid) for pid in pids]
        up.send_signal(number)
        assert up.wait() == status
    with selectors.DefaultSelector() as ended:
        for descriptor in descriptors:
            ended.register(descriptor, selectors.EVENT_READ)
        left = len(descriptors)
        while left:
            # A generous bound that only a failure reaches.
            ready = ended.select(timeout=30)
            assert ready, "a child outlived it"
            for key, _ in ready:
                ended.unregister(key.fd)
                os.close(key.fd)
                left -= 1


@pytest.mark.parametrize("name", ["api_keys", "tls_cert"])
def test_what_up_could_not_ask_it_does_not_start(name, monkeypatch, tmp_path, capsys):
    begin = ["up", "--once", "--engine", "sim", "--ask", "Anybody there?"]
    monkeypatch.setenv(f"KVMESH_{name.upper()}", "a-file")
    assert main(begin) == 2
    assert f"{name} is 'a-file'" in capsys.readouterr().err
    monkeypatch.delenv(f"KVMESH_{name.upper()}")
    file = tmp_path / "kvmesh.toml"
    file.write_text(f"[router]\n{name} = 'a-file'\n")
    assert main([*begin, "--config", str(file)]) == 2
    assert f"{name} is 'a-file'" in capsys.readouterr().err
