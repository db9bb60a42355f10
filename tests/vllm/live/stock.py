"""Stock vLLM servers, as real processes."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import grpc
from authority import Authority
from workers import MODEL

from kvmesh.cli.etcd import free_ports
from kvmesh.vllm_wire import control_pb2 as control
from kvmesh.vllm_wire import control_pb2_grpc as control_rpc

START_S = 400
SCHEMES = {"smg": "vllm", "first_party": "vllms", "openai": "http"}
RUST_FRONT_END = Path(sys.prefix) / "bin" / "vllm-rs"
"""Of vLLM's wheel for GPUs, which alone has it; make test-vllm puts it here. It computes nothing:
the engine is the one for CPUs."""


class Stock:
    """One server. vLLM's engine core is a process of its own: both are of one group."""

    def __init__(self, wire, folder, logs) -> None:
        self.wire = wire
        self.port, http_port = free_ports([0, 0])
        self.address = f"{SCHEMES[wire]}://127.0.0.1:{self.port}"
        events = '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "ipc://%s/e"}'
        self.log = logs / f"{wire}.log"
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "HF_HUB_OFFLINE": "1",
        }
        launch = {
            "smg": ["vllm.entrypoints.launchers.grpc_server", "--model", str(folder),
                    "--port", str(self.port)],
            "openai": ["vllm.entrypoints.openai.api_server", "--model", str(folder),
                       "--port", str(self.port), "--enable-prompt-tokens-details"],
            "first_party": ["vllm.entrypoints.cli.main", "serve", str(folder),
                            "--port", str(http_port), "--grpc-port", str(self.port)],
        }  # fmt: skip
        self.ca = b""
        if wire == "first_party":
            authority = Authority(logs / "authority")
            issued = authority.issue("server", "IP:127.0.0.1")
            self.ca_file, self.ca = authority.ca, authority.ca.read_bytes()
            launch[wire] += ["--ssl-certfile", str(issued.certificate)]
            launch[wire] += ["--ssl-keyfile", str(issued.key)]
            # The command looks for a distribution of this name, which the one for CPUs is not.
            named = logs / f"vllm-{version('vllm-cpu')}.dist-info"
            named.mkdir()
            (named / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n"
            )
            environment |= {
                "PYTHONPATH": str(logs),
                "VLLM_USE_RUST_FRONTEND": "1",
                "VLLM_RUST_FRONTEND_PATH": str(RUST_FRONT_END),
            }
        command = [
            sys.executable, "-m", *launch[wire],
            "--served-model-name", MODEL, "--host", "127.0.0.1",
            "--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "256",
            "--enforce-eager", "--dtype", "float32", "--block-size", "32",
            "--generation-config", "vllm", "--kv-events-config", events % logs,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_S
        while not self._answers():
            ended = self.process.poll() is not None or time.monotonic() > deadline
            assert not ended, self.log.read_text()[-4000:]
            time.sleep(0.2)

    def _channel(self) -> grpc.Channel:
        address = f"127.0.0.1:{self.port}"
        if self.ca:
            return grpc.secure_channel(address, grpc.ssl_channel_credentials(self.ca))
        return grpc.insecure_channel(address)

    def _answers(self) -> bool:
        if self.wire != "openai":
            with self._channel() as channel:
                try:
                    grpc.channel_ready_future(channel).result(timeout=1)
                    if self.wire == "first_party":
                        info = control.GetServerInfoRequest()
                        control_rpc.ControlStub(channel).GetServerInfo(info, timeout=1)
                except (grpc.FutureTimeoutError, grpc.RpcError):
                    return False
                return True
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as told:
                return told.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """kill -9, with all that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            # It was killed before.
            return
        self.process.wait()


@contextmanager
def stock(wire, folder, logs):
    server = Stock(wire, folder, logs)
    try:
        server.wait()
        yield server
    finally:
        server.kill()
