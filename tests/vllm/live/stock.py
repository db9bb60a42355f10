"""Stock vLLM servers, as real processes."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import grpc
from workers import MODEL

from kvmesh.cli.etcd import free_ports

START_S = 400
MODULES = {
    "smg": "vllm.entrypoints.launchers.grpc_server",
    "openai": "vllm.entrypoints.openai.api_server",
}


class Stock:
    """One server. vLLM's engine core is a process of its own: both are of one group."""

    def __init__(self, wire, folder, logs) -> None:
        self.wire = wire
        (self.port,) = free_ports([0])
        self.address = f"{'vllm' if wire == 'smg' else 'http'}://127.0.0.1:{self.port}"
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
        command = [
            sys.executable, "-m", MODULES[wire],
            "--model", str(folder), "--served-model-name", MODEL,
            "--host", "127.0.0.1", "--port", str(self.port),
            "--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "256",
            "--enforce-eager", "--dtype", "float32", "--block-size", "32",
            "--generation-config", "vllm", "--kv-events-config", events % logs,
        ]  # fmt: skip
        if wire == "openai":
            command.append("--enable-prompt-tokens-details")
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

    def _answers(self) -> bool:
        if self.wire == "smg":
            with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
                ready = grpc.channel_ready_future(channel)
                try:
                    ready.result(timeout=1)
                except grpc.FutureTimeoutError:
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
