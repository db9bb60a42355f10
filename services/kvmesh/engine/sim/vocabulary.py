"""A small, real tokeniser for the simulated engine.

Byte-level: each byte is a token, so any text can be encoded and any ids make
text; words of letters fill the vocabulary up to the wanted size. Routers load
it as they load any model's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

END_OF_TEXT = "<|endoftext|>"
TURN_BEGIN = "<|im_start|>"
TURN_END = "<|im_end|>"
_SPECIAL = (END_OF_TEXT, TURN_BEGIN, TURN_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, the form that many small models use."""


def end_of_text_ids() -> tuple[int, ...]:
    """Ids that end a text."""
    return (_SPECIAL.index(END_OF_TEXT), _SPECIAL.index(TURN_END))


def tokenizer_files(size: int, chat_template: str = "") -> Mapping[str, bytes]:
    """Files of a tokeniser with `size` ids, at least 259, by name. Without a
    template of its own it has ChatML."""
    if size < len(_SPECIAL) + 256:
        raise ValueError(f"vocabulary size is {size}; allowed is 259 or more")
    vocabulary = {token: i for i, token in enumerate(_SPECIAL)}
    for character in _byte_alphabet():
        vocabulary[character] = len(vocabulary)
    number = 0
    while len(vocabulary) < size:
        vocabulary[_word(number)] = len(vocabulary)
        number += 1
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i, "content": token, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True,
            }
            for i, token in enumerate(_SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": vocabulary, "merges": [],
        },
    }  # fmt: skip
    config = {
        "eos_token": TURN_END,
        "chat_template": chat_template or CHAT_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte.

    Source: the byte-to-character table of GPT-2's encoder: printable bytes
    stand for themselves, the others for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def _word(number: int) -> str:
    """A word of letters, another for each number, with a space before it."""
    letters = ""
    number += 26
    while True:
        letters = chr(ord("a") + number % 26) + letters
        number = number // 26 - 1
        if number < 0:
            return "\u0120" + letters
