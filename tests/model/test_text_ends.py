"""Which tokens end a text: by a model's configurations and by its tokeniser."""

from __future__ import annotations

import json

import pytest

from kvmesh.models import UnsupportedModelError, end_of_text_ids

ADDED = {"added_tokens": [{"id": 32_000, "content": "<|im_end|>"}], "model": {"vocab": {"</s>": 2}}}
UNIGRAM = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["a", -1.5]]}}


def ends(told=(), **files):
    """Of files by their names' beginnings."""
    given = {f"{name}.json": json.dumps(content).encode() for name, content in files.items()}
    return end_of_text_ids(given, told)


def test_the_tokenisers_own_end_stands_beside_the_configurations() -> None:
    chat = {"eos_token": "<|im_end|>"}
    # A fine-tune that names the end of a turn in its tokeniser alone.
    assert ends(config={"eos_token_id": 2}, tokenizer_config=chat, tokenizer=ADDED) == (2, 32_000)
    both = {"eos_token_id": [32_000, 2]}
    assert ends(generation_config=both, tokenizer_config=chat, tokenizer=ADDED) == (32_000, 2)
    assert ends(tokenizer_config=chat, tokenizer=ADDED) == (32_000,)


@pytest.mark.parametrize(
    ("eos", "tokenizer", "wanted"),
    [
        ("</s>", ADDED, (2,)),
        ({"content": "<|im_end|>", "special": True}, ADDED, (32_000,)),
        ("</s>", UNIGRAM, (1,)),
        # An added token stands over the vocabulary.
        ("</s>", {**ADDED, "added_tokens": [{"id": 7, "content": "</s>"}]}, (7,)),
        ("not there", ADDED, ()),
        ("not there", UNIGRAM, ()),
        (None, ADDED, ()),
        ("</s>", {}, ()),
    ],
)
def test_it_is_looked_up_in_the_tokeniser(eos, tokenizer, wanted) -> None:
    assert ends(tokenizer_config={"eos_token": eos}, tokenizer=tokenizer) == wanted


def test_the_configurations_come_one_after_the_other() -> None:
    config = {"eos_token_id": 7}
    # As in vLLM: what was left behind in the older of the two ends nothing.
    assert ends(config=config, generation_config={"eos_token_id": [9, 11]}) == (9, 11)
    assert ends(config=config, generation_config={"eos_token_id": None}) == (7,)
    assert ends(config={"text_config": {"eos_token_id": [1, 106]}}) == (1, 106)
    assert ends((5,), config=config) == (7,)
    # What a server tells is for want of both.
    assert ends((5,), tokenizer_config={"eos_token": "</s>"}, tokenizer=ADDED) == (5, 2)
    assert ends() == ()


def test_what_the_model_cannot_draw_ends_nothing() -> None:
    chat = {"eos_token": "<|im_end|>"}
    for config in ({"vocab_size": 32_000}, {"text_config": {"vocab_size": 32_000}}):
        given = config | {"eos_token_id": [2, -1]}
        assert ends(config=given, tokenizer_config=chat, tokenizer=ADDED) == (2,)


def test_files_that_cannot_be_read_say_so() -> None:
    with pytest.raises(UnsupportedModelError, match=r"tokenizer_config\.json is not JSON"):
        end_of_text_ids({"tokenizer_config.json": b"{"})
    with pytest.raises(UnsupportedModelError, match="allowed is a token id or a list"):
        ends(config={"eos_token_id": "</s>"})
