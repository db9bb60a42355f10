"""Servers with TLS, and with keys, over both wires."""

import asyncio
import ssl
from contextlib import asynccontextmanager

import grpc
import pytest
from authority import Authority
from engine_harness import running
from fake_core import tokens_after
from fake_loop import do, there
from fake_model import FakeModel
from fake_openai import FakeOpenAi
from fake_openai import serve as serve_http
from fake_smg import FakeSmg
from fake_smg import serve as serve_grpc

from kvmesh.engine.remote.served import build
from kvmesh.engine.remote.server import LostError
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.settings import SettingError, WorkerSettings

PROMPT = [(at * 7) % 1899 + 51 for at in range(40)]
SCHEMES = ("vllms", "https")


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def issued(authority):
    return authority.issue("server", "IP:127.0.0.1")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Whom nobody knows."""
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@asynccontextmanager
async def serving(scheme, issued, key=""):
    """A server with TLS; its address."""
    if scheme == "https":
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(issued.certificate, issued.key)
        service = FakeOpenAi(FakeModel(), key=key)
        server, port = await there(serve_http(service, tls=context))
    else:
        pair = issued.key.read_bytes(), issued.certificate.read_bytes()
        credentials = grpc.ssl_server_credentials([pair])
        server, port = await there(serve_grpc(FakeSmg(FakeModel()), 0, credentials, key))
    try:
        yield f"{scheme}://127.0.0.1:{port}"
    finally:
        if scheme == "https":
            do(server.close)
        else:
            await there(server.stop(None))


async def attach(address, folder, ca, **arguments):
    given = {"server": address, "tokenizer": str(folder), "server_ca": str(ca), **arguments}
    settings = WorkerSettings(engine="remote", engine_arguments=given)
    return await asyncio.to_thread(build, settings, "w", 1, lambda line: None)


@pytest.mark.parametrize("key", ["", "a key"])
@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_stream_comes_by_tls(authority, issued, folder, scheme, key) -> None:
    async with serving(scheme, issued, key) as address:
        built = await attach(address, folder, authority.ca, server_key=key)
        async with running(built.engine) as driver:
            greedy = wire.ResolvedSampling(top_p=1.0, repetition_penalty=1.0)
            attempt = driver.place(PROMPT, sampling=greedy, stop_token_ids=[2], max_tokens=8)
            assert await attempt.ended() == "finished"
            assert attempt.tokens == tokens_after(PROMPT, 8)


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_server_that_nobody_vouches_for_is_sent_nothing(
    issued, stranger, folder, scheme
) -> None:
    async with serving(scheme, issued) as address:
        for ca in (stranger.ca, ""):
            with pytest.raises(LostError, match=r"(?i)certificate.verify.failed"):
                await attach(address, folder, ca)


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_key_that_is_wrong_is_told(authority, issued, folder, scheme) -> None:
    async with serving(scheme, issued, "a key") as address:
        for key in ("", "another key"):
            with pytest.raises(SettingError, match="set server_key to a key of it"):
                await attach(address, folder, authority.ca, server_key=key)


async def test_what_does_not_go_together_is_refused(authority, folder, tmp_path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    for address, arguments, text in (
        ("vllm://127.0.0.1:1", {"server_key": "a key", "server_ca": ""}, "server_key is given"),
        ("vllm://127.0.0.1:1", {}, "server_ca is given"),
        ("http://127.0.0.1:1", {}, "server_ca is given"),
        ("vllms://127.0.0.1:1", {"server_ca": str(bad)}, "no certificate can be read"),
        ("https://127.0.0.1:1", {"server_ca": str(tmp_path / "none")}, "no certificate can be"),
    ):
        with pytest.raises(SettingError, match=text):
            await attach(address, folder, **{"ca": authority.ca, **arguments})
