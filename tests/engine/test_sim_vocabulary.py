"""The simulated model's tokeniser is a real one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.sim.vocabulary import end_of_text_ids, tokenizer_files

tokenizers = pytest.importorskip("tokenizers")
_TOKENIZER = tokenizers.Tokenizer.from_buffer(tokenizer_files(2_000)["tokenizer.json"])


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(text) -> None:
    ids = _TOKENIZER.encode(text, add_special_tokens=False).ids
    assert _TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_every_id_is_a_token() -> None:
    assert _TOKENIZER.get_vocab_size() == 2_000
    assert all(_TOKENIZER.id_to_token(i) for i in range(2_000))
    assert [_TOKENIZER.id_to_token(i) for i in end_of_text_ids()] == [
        "<|endoftext|>",
        "<|im_end|>",
    ]


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="259 or more"):
        tokenizer_files(100)
