"""Which tokens end a text, as a model's files say: one rule for all engines.

An engine is told of each request which ids end it, and ends at no other. The rule is that of
vLLM and of transformers: the ids of generation_config.json, or else of config.json, and beside
them the tokeniser's own `eos_token`. Chat fine-tunes often name the end of a turn there alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvmesh.models.errors import UnsupportedModelError

_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_CONFIGS = ("generation_config.json", "config.json")
END_FILES = (*_CONFIGS, _TOKENIZER_CONFIG, _TOKENIZER)
"""Files that say it."""
NO_END = (
    "nothing says which token ends a text, so that every answer would run on to its length limit; "
    "add eos_token_id to generation_config.json, or an eos_token that tokenizer.json knows to "
    "tokenizer_config.json"
)
"""What is told where no file names one."""


def end_of_text_ids(files: Mapping[str, bytes], told: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Ids that end a text, by contents of files; `told` stand in for those of the
    configurations where these name none. Empty: nobody says. Raises UnsupportedModelError."""
    configured = next(filter(None, (_configured(files, name) for name in _CONFIGS)), told)
    # One may be named twice; the model's own come first.
    ids = dict.fromkeys((*configured, *_eos_of_tokenizer(files)))
    size = next(filter(None, (held.get("vocab_size") for held in _holders(files, _CONFIGS[1]))), 0)
    # One beyond what the model can draw would index what is not there.
    return tuple(id for id in ids if id >= 0 and (not size or id < size))


def end_of_text_ids_of(folder: Path) -> tuple[int, ...]:
    """Ids that end a text, of a model's folder. Empty: its files do not say. Raises
    UnsupportedModelError."""
    found = {name: folder / name for name in END_FILES}
    return end_of_text_ids({n: path.read_bytes() for n, path in found.items() if path.is_file()})


def _configured(files: Mapping[str, bytes], name: str) -> tuple[int, ...]:
    for held in _holders(files, name):
        ids = held.get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(isinstance(id, int) for id in ids):
            raise UnsupportedModelError(
                f"{name}: eos_token_id is {ids!r}; allowed is a token id or a list of them"
            )
        return tuple(ids)
    return ()


def _holders(files: Mapping[str, bytes], name: str) -> Iterator[Mapping[str, Any]]:
    """A configuration, and the part of it that is its text model's."""
    config = _object(files, name)
    yield config
    if isinstance(text := config.get("text_config"), dict):
        yield text


def _eos_of_tokenizer(files: Mapping[str, bytes]) -> tuple[int, ...]:
    named = _object(files, _TOKENIZER_CONFIG).get("eos_token")
    token = named.get("content") if isinstance(named, dict) else named
    if not isinstance(token, str) or not token:
        return ()
    tokenizer = _object(files, _TOKENIZER)
    # What was added stands over the vocabulary.
    for known, id in (*_added(tokenizer), *_in_vocabulary(tokenizer, token)):
        if known == token:
            return (id,)
    # No text can hold it.
    return ()


def _added(tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for entry in tokenizer.get("added_tokens") or ():
        yield str(entry.get("content")), int(entry.get("id", -1))


def _in_vocabulary(tokenizer: Mapping[str, Any], token: str) -> Iterator[tuple[str, int]]:
    known = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(known, dict):
        if token in known:
            yield token, int(known[token])
    else:
        # Unigram has pairs of a piece and its score, in the order of ids.
        yield from ((str(piece), id) for id, (piece, *_) in enumerate(known))


def _object(files: Mapping[str, bytes], name: str) -> Mapping[str, Any]:
    if name not in files:
        return {}
    try:
        found = json.loads(files[name])
    except ValueError as error:
        raise UnsupportedModelError(f"{name} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}
