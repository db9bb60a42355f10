"""From settings to an engine that is a server."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import cast

from kvmesh.engine.core.chain import Chain
from kvmesh.engine.remote import tokenizer
from kvmesh.engine.remote.arguments import Arguments
from kvmesh.engine.remote.core import Starter
from kvmesh.engine.remote.engine import RemoteEngine
from kvmesh.engine.remote.loop import RemoteLoop
from kvmesh.engine.remote.probe import connect
from kvmesh.engine.remote.requests import RequestMaker
from kvmesh.engine.remote.server import (
    Description,
    LostError,
    SaltedPrompts,
    ServerError,
    UnreachableError,
)
from kvmesh.engine.remote.state import RemoteState
from kvmesh.engine.vllm import border, hand_off
from kvmesh.engine.vllm.cache import VllmCache
from kvmesh.engine.vllm.placements import Adapters, Placements
from kvmesh.engine.vllm.state import Geometry
from kvmesh.models import NO_END, ModelError, end_of_text_ids
from kvmesh.v1 import worker_pb2 as wire
from kvmesh.worker.engines import BuiltEngine
from kvmesh.worker.settings import SettingError, WorkerSettings
from kvmesh.worker.tokenizer_files import NAMES, TokenizerFiles

_BLOCK_TOKENS = 16
"""Where a server does not say: what its index counts in."""
_LEASING = ("Nixl", "Multi")
"""How connectors are called that have a lease; of a MultiConnector nobody tells what is in it."""


def build(
    settings: WorkerSettings, worker_id: str, incarnation: int, progress: Callable[[str], None]
) -> BuiltEngine:
    """Asks a server who it is. Raises SettingError, LostError."""
    arguments = Arguments.of(settings.engine_arguments)
    if not arguments.server.speaks_grpc and importlib.util.find_spec("httpx") is None:
        raise SettingError(
            f"server is {arguments.server.wire}://…, which needs the package httpx: "
            "pip install 'kvmesh[attach]'"
        )
    starter = Starter(lambda: connect(arguments))
    loop = RemoteLoop(starter)
    with ExitStack() as stack:
        stack.callback(loop.stop)
        try:
            loop.start_core()
            facts = _facts(loop.description, arguments, settings)
        except UnreachableError as error:
            raise LostError(f"server {arguments.server}: {error}") from error
        except ServerError as error:
            raise SettingError(str(error)) from error
        built = _built(facts, arguments, settings, loop)
        progress(_described(facts))
        # It is the engine's to close it from here on.
        stack.pop_all()
        return built


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is known of a server, gaps filled."""

    said: Description
    files: Mapping[str, bytes]
    tokenizer: TokenizerFiles
    geometry: Geometry
    end_of_text_ids: tuple[int, ...]
    digest: str
    salts: SaltedPrompts | None
    """None: its API has salts."""


def _facts(said: Description, arguments: Arguments, settings: WorkerSettings) -> _Facts:
    if settings.role != "both" and not said.connector:
        raise SettingError(
            f"role is {settings.role!r}; allowed is both: the server has no KV connector that its "
            "API tells of"
        )
    salts = _salts(said, arguments)
    if salts is SaltedPrompts.SHARED:
        # By what it tells of its cache no salted prompt would be found there.
        said = replace(said, cache_events=False)
    folder = arguments.tokenizer
    files = said.files if folder is None else tokenizer.in_folder(folder)
    if NAMES[0] not in files:
        raise SettingError(
            f"the server does not send its tokeniser ({NAMES[0]}); give tokenizer: the model's "
            "folder in Hugging Face's form"
        )
    context_length = arguments.context_length or said.context_length
    if not context_length:
        raise SettingError("the server does not tell its context length; give context_length")
    ids = _end_of_text_ids(said, files)
    found = TokenizerFiles.of(files)
    # Another than a multiple of 16 tells nothing that an index could use.
    size = said.block_tokens
    size = size if size and not size % _BLOCK_TOKENS else _BLOCK_TOKENS
    pool = said.pool_tokens or max(settings.kv_pool_tokens, context_length)
    vocabulary = said.vocabulary_size or tokenizer.vocabulary_size(files)
    geometry = Geometry(
        pool_blocks=max(1, pool // size),
        block_tokens=size,
        # How it cuts prompts is its own affair: a prediction is of all that waits.
        step_tokens=context_length,
        context_length=context_length,
        vocabulary_size=vocabulary,
    )
    digest = arguments.model_digest or _digest(said, found.digest, vocabulary)
    return _Facts(said, files, found, geometry, ids, digest, salts)


def _end_of_text_ids(said: Description, files: Mapping[str, bytes]) -> tuple[int, ...]:
    """Raises SettingError where nothing would end a text."""
    try:
        ids = end_of_text_ids(files, said.end_of_text_ids)
    except ModelError as error:
        raise SettingError(f"tokenizer: {error}") from error
    if not ids and "ignore_eos" not in said.lacks:
        raise SettingError(f"tokenizer: {NO_END}")
    return ids


def _salts(said: Description, arguments: Arguments) -> SaltedPrompts | None:
    if "cache_salt" not in said.lacks:
        return None
    if arguments.salted_prompts is SaltedPrompts.UNCACHED and not said.skips_cache:
        raise SettingError(
            "salted_prompts is 'uncached'; allowed are refuse and shared: the API of "
            f"{said.engine} has no field that keeps a request from its cache"
        )
    return arguments.salted_prompts


def _digest(said: Description, tokenizer_digest: str, vocabulary: int) -> str:
    """Of a model of which nothing but its names is known here."""
    text = f"attached model\0{said.path}\0{tokenizer_digest}\0{vocabulary}"
    return hashlib.sha256(text.encode()).hexdigest()


def _built(
    facts: _Facts, arguments: Arguments, settings: WorkerSettings, loop: RemoteLoop
) -> BuiltEngine:
    said, geometry = facts.said, facts.geometry
    chain = Chain(facts.digest, said.adapters)
    cache = VllmCache(chain.root, geometry.pool_blocks)
    step_model = wire.StepModel()
    state = RemoteState(geometry, step_model)
    lease_ms = hand_off.NIXL_LEASE_S * 1000 if said.connector.startswith(_LEASING) else 0.0
    placements = Placements(
        geometry,
        cast("border.RequestMaker", RequestMaker(said.lacks, facts.end_of_text_ids, facts.salts)),
        cache,
        chain,
        connector=said.connector,
        adapters=Adapters(said.adapters, {name: name for name in said.adapters}),
        max_logprobs=said.max_logprobs,
        lease_ms=lease_ms,
        seeded=arguments.seeded and "seed" not in said.lacks,
    )
    loop.attach(state, cache, placements)
    record = wire.ModelRecord(
        name=settings.served_name or said.model,
        digest=facts.digest,
        context_length=geometry.context_length,
        vocabulary_size=geometry.vocabulary_size,
        end_of_text_ids=facts.end_of_text_ids,
        adapters=said.adapters,
    )
    kinds = {f"grammar.{kind}" for kind in ("json", "json_object", "regex", "grammar")}
    capabilities = wire.Capabilities(
        engine=said.engine,
        engine_connector=said.connector,
        grammars=not kinds <= said.lacks,
        max_logprobs=said.max_logprobs,
        # Of prompts that find nothing in its cache an index without entries is exact.
        cache_events=said.cache_events or facts.salts is SaltedPrompts.UNCACHED,
        no_cache_salt=facts.salts is SaltedPrompts.REFUSE,
        block_tokens=geometry.block_tokens,
        pool_blocks=geometry.pool_blocks,
        hash_scheme=Chain.SCHEME,
        kv=wire.KvCompatibility(model_digest=facts.digest, dtype=said.kv_dtype),
        max_batch=said.max_batch,
    )
    engine = RemoteEngine(loop, state, cache, capabilities, step_model)
    if "ignore_eos" in said.lacks:
        engine.ends_of_text = facts.end_of_text_ids
    return BuiltEngine(engine, record, facts.tokenizer)


def _described(facts: _Facts) -> str:
    said, geometry = facts.said, facts.geometry
    index = "exact, by its cache events" if said.cache_events else "approximate"
    match facts.salts:
        case None:
            salts = "sent"
        case SaltedPrompts.REFUSE:
            salts = "refused: routers with keys send it nothing, see salted_prompts"
        case SaltedPrompts.UNCACHED:
            salts, index = "not needed: no prompt finds another one's cache", "empty"
        case SaltedPrompts.SHARED:
            salts = "left out: tenants share its cache"
    pool = "KV pool" if said.pool_tokens else "KV pool, by kv_pool_tokens"
    return (
        f"server: {said.engine} with {said.path}, context {geometry.context_length} tokens, "
        f"{pool}: {geometry.pool_blocks} blocks of {geometry.block_tokens} tokens, index {index}, "
        + (f"connector {said.connector}" if said.connector else "no connector")
        + f", cache salts {salts}"
    )
