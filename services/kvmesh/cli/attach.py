"""`kvmesh attach`."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from kvmesh.cli import worker
from kvmesh.cli.announce import add_announce, announcer
from kvmesh.cli.settings import Setting, UsageError, add_settings, merged

if TYPE_CHECKING:
    from kvmesh.worker.settings import WorkerSettings

_EPILOG = """\
examples:
  kvmesh attach vllm://10.0.0.5:50051 --etcd 10.0.0.1:2379
  kvmesh attach http://10.0.0.6:8000 --tokenizer /models/Llama-3.1-8B-Instruct --etcd 10.0.0.1:2379

It waits for the server, also after the server has ended; SIGTERM drains.
"""

_AGAIN_S = 1.0
"""Between two tries to reach a server."""
_CONNECT_S = 3.0

_NOT_A_SERVERS = frozenset(
    {
        "engine", "model", "transfer_listen", "transfer_tcp", "transfer_lease", "offer_timeout",
        "huge_pages", "populate_kv_pool", "threads", "dtype", "device", "like", "engine_arguments",
        "vllm_arg",
    }
)  # fmt: skip
"""Settings of a worker that are of its own engine."""

_OWN = (
    Setting("server", "Address of the server: vllm://host:port for its gRPC, vllms:// for the same "
            "with TLS, http://host:port or https:// for one that speaks OpenAI's HTTP alone. The "
            "command's argument as well."),
    Setting("model", "Which of the server's models, where it has several. Empty: its first."),
    Setting("tokenizer", "Folder with the model's tokenizer.json, in Hugging Face's form, where "
            "the server does not send it. config.json and generation_config.json are read, too."),
    Setting("model_digest", "Digest of the model, 64 hexadecimal digits, where other workers "
            "serve it by the same name. Empty: made of the server's name for it."),
    Setting("context_length", "In tokens, where the server does not tell it."),
    Setting("server_key", "Sent to the server as a bearer token; over gRPC with TLS alone. Best "
            "given by its variable: flags can be read by everyone on the machine."),
    Setting("server_ca", "File with the certificates, PEM, of the authorities that vouch for a "
            "server with TLS. Empty: the usual ones."),
    Setting("data_parallel_rank", "Rank to use, of a server that has several. Empty: it chooses, "
            "and its cache is not followed."),
    Setting("seeded", "Requests carry their seeds. Off for vLLM on a CPU, which dies of them: "
            "a seed that a client gives is refused then.",
            is_switch=True, default="true"),
    Setting("priorities", "Requests carry priorities, by their deadlines. For servers that order "
            "their queue by them (--scheduling-policy priority); others refuse such requests.",
            is_switch=True),
    Setting("salted_prompts", "What becomes of prompts with a cache salt, as routers with keys "
            "send, where the server's API has none. refuse: routers send it no such prompt. "
            "uncached: no prompt finds anything in its cache (llama.cpp). shared: the salt is "
            "left out, so that tenants share its cache and can tell by times what others asked.",
            default="refuse"),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server, and a flag for each setting."""
    parser.epilog = _EPILOG
    parser.add_argument("address", metavar="SERVER", nargs="?", help="as the setting server")
    add_settings(parser, settings())
    add_announce(parser)


def run(args: argparse.Namespace) -> int:
    """Keeps a server in the mesh until it is told to stop."""
    values = merged("attach", settings(), args)
    if args.address:
        values["server"] = args.address
    try:
        from kvmesh._router import WorkerIdTakenError
        from kvmesh.worker.log import start_logging
        from kvmesh.worker.settings import SettingError

        chosen = _chosen(values)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"attach needs the package {error.name}: pip install 'kvmesh[attach]'"
        ) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    start_logging(chosen.log_level)
    try:
        return _serve(chosen, announcer(args.announce_fd))
    except SettingError as error:
        raise UsageError(str(error)) from error
    except WorkerIdTakenError as error:
        raise UsageError(f"worker_id: {error}; allowed is a name that no worker has") from error


def _chosen(values: dict[str, Any]) -> WorkerSettings:
    """The settings of the worker that stands for the server. Raises SettingError."""
    from kvmesh.engine.remote.arguments import Arguments
    from kvmesh.worker.settings import SettingError, WorkerSettings

    own = {setting.name for setting in _OWN}
    given = {name: str(value) for name, value in values.items() if name in own}
    if not given.get("server"):
        raise SettingError("server is not given; allowed is vllm://host:port or http://host:port")
    address = Arguments.of(given).server
    rest = {name: value for name, value in values.items() if name not in own}
    chosen = WorkerSettings.from_mapping(
        {**rest, "engine": "remote", "engine_arguments": given, "model": given["server"]}
    )
    return replace(
        chosen,
        # One name over all of the server's lives.
        worker_id=chosen.resolved_worker_id(),
        labels={"attached": str(address), **chosen.labels},
    )


def _serve(settings: WorkerSettings, announce: Callable[[str], None]) -> int:
    """One life after the other: with the server the worker's record goes, and comes again."""
    from kvmesh.engine.remote.server import LostError
    from kvmesh.worker.serve import EngineEndedError, main

    pause_s = 0.0
    while asyncio.run(_listens(settings, announce, pause_s)):
        try:
            return main(settings, announce)
        except (LostError, EngineEndedError) as error:
            announce(f"worker {settings.worker_id}: lost {settings.model}: {error}")
        # It may listen and not be ready.
        pause_s = _AGAIN_S
    return 0


async def _listens(
    settings: WorkerSettings, announce: Callable[[str], None], pause_s: float
) -> bool:
    """Waits, first for so long, until something listens at the server's address. False: told
    to stop before."""
    from kvmesh.engine.remote.arguments import Arguments

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    address, said = Arguments.of(settings.engine_arguments).server, False
    while True:
        try:
            async with asyncio.timeout(pause_s):
                await stop.wait()
            return False
        except TimeoutError:
            pause_s = _AGAIN_S
        try:
            async with asyncio.timeout(_CONNECT_S):
                _, writer = await asyncio.open_connection(address.host, address.port)
            writer.close()
            return True
        except OSError as error:
            # A time that has passed is one, too.
            if not said:
                announce(f"worker {settings.worker_id}: waits for {settings.model}: {error}")
            said = True


@cache
def settings() -> tuple[Setting, ...]:
    """The command's own, and those of the worker that stands for the server."""
    rest = (setting for setting in worker.settings() if setting.name not in _NOT_A_SERVERS)
    return (*_OWN, *rest)
