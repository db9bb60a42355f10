"""Models that only vLLM knows: their digest, and the ids that end a text."""

import json

import pytest

from kvmesh.engine.vllm import border
from kvmesh.engine.vllm.model import find
from kvmesh.engine.vllm.served import build
from kvmesh.models import ModelError
from kvmesh.worker.settings import SettingError, WorkerSettings


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An architecture that kvmesh's own engine does not compute."""
    monkeypatch.setenv("KVMESH_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "gpt-oss"
    model.mkdir()
    config = {"architectures": ["GptOssForCausalLM"], "eos_token_id": 7}
    (model / "config.json").write_text(json.dumps(config))
    (model / "model-00001.safetensors").write_bytes(b"weights, part 1")
    (model / "model-00002.safetensors").write_bytes(b"weights, part 2")
    return model


def found(folder):
    lines = []
    return find(str(folder), lines.append), lines


def test_it_is_found_by_its_folder(folder) -> None:
    model, lines = found(folder)
    assert (model.folder, model.name, model.end_of_text_ids) == (folder, "gpt-oss", (7,))
    assert len(model.digest) == 64
    assert lines == ["model: taking its digest"]


def test_its_digest_is_of_its_content_and_is_kept(folder) -> None:
    digest = found(folder)[0].digest
    assert found(folder)[0].digest == digest
    second = folder / "model-00002.safetensors"
    second.write_bytes(b"weights, Part 2, longer")
    changed = found(folder)[0].digest
    assert changed != digest
    (folder / "config.json").write_text('{"architectures": ["GptOssForCausalLM"]}')
    assert found(folder)[0].digest not in (digest, changed)


def test_generation_config_comes_first(folder) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    assert found(folder)[0].end_of_text_ids == (9, 11)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        found(folder)


def test_the_tokenisers_own_end_is_one_of_them(folder) -> None:
    token = {"id": 32_000, "content": "<|im_end|>"}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [token]}))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert found(folder)[0].end_of_text_ids == (7, 32_000)


def test_a_model_without_an_end_is_refused_at_start(folder, monkeypatch) -> None:
    monkeypatch.setattr(border, "installed_version", lambda: "0.32.0")
    (folder / "config.json").write_text('{"architectures": ["GptOssForCausalLM"]}')
    given = WorkerSettings(engine="vllm", model=str(folder))
    with pytest.raises(SettingError, match="add eos_token_id to generation_config"):
        build(given, "w", 1, lambda line: None)


def test_a_folder_without_a_model_says_so(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find(str(tmp_path), lambda line: None)
