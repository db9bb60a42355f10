"""A worker that loads a model: how far it is, and what ends its texts."""

import json

import pytest
import torch
from tiny_torch import engine_of, write_model

from kvmesh import models
from kvmesh.engine.torch import TorchSettings, build, served
from kvmesh.engine.torch.served import _Steps
from kvmesh.engine.torch.weights import load_weights
from kvmesh.worker.settings import SettingError, WorkerSettings


def test_loading_weights_tells_bytes_up_to_the_whole():
    folder = models.pull("smollm2-135m")
    told = []

    def progress(step, done, total):
        told.append((step, done, total))

    config = models.load_config(folder)
    load_weights(folder, config, torch.float32, torch.device("cpu"), progress)
    steps, done, totals = map(list, zip(*told, strict=True))
    (total,) = set(totals)
    assert set(steps) == {"load weights"}
    assert total == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, total)
    assert len(done) > config.layers


def test_a_log_gets_a_line_at_the_start_of_a_step_and_then_one_every_few_seconds():
    lines, moments = [], iter([0.0, 1.0, 2.0, 3.0, 4.0, 4.5])
    steps = _Steps(lines.append, lambda: next(moments))
    for done in (0, 100_000_000, 150_000_000, 200_000_000, 250_000_000):
        steps("load weights", done, 400_000_000)
    steps("digest", 0, 5)
    assert lines == [
        "model: load weights", "model: load weights 50 % of 400 MB", "model: digest",
    ]  # fmt: skip


def test_a_pool_takes_all_of_its_memory_before_it_is_used(folder):
    engine = engine_of(folder, blocks=12_000)
    pool = engine._memory
    whole = pool.nbytes >> 21 << 21
    assert whole > 3 * (32 << 20)

    def known():
        huge, refused, _ = pool.huge_use()
        return huge + refused

    told = []
    before = known()
    engine.take_memory(lambda done, total: told.append((done, total)))
    assert before < whole <= known()
    done, totals = map(list, zip(*told, strict=True))
    assert done == sorted(done)
    assert (done[0], set(totals)) == (0, {pool.nbytes})
    assert len(done) > 3, "a part at a time, so that signals are seen"


def test_texts_end_by_configurations_and_tokeniser_or_nothing_starts(tmp_path, monkeypatch) -> None:
    write_model(tmp_path)
    monkeypatch.setenv("KVMESH_CACHE", str(tmp_path / "cache"))

    def edited(name, **fields) -> None:
        content = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(content | fields))

    def ends() -> list[int]:
        settings = TorchSettings(str(tmp_path), device="cpu", dtype="float32", threads=1)
        return [*build(settings).record.end_of_text_ids]

    edited("config.json", eos_token_id=1)
    edited("generation_config.json", eos_token_id=None)
    assert ends() == [1, 2]
    edited("config.json", eos_token_id=None)
    assert ends() == [2]
    edited("tokenizer_config.json", eos_token=None)
    assert ends() == []
    given = WorkerSettings(engine="torch", model=str(tmp_path))
    with pytest.raises(SettingError, match="add eos_token_id to generation_config"):
        served.build(given, "w", 1, lambda line: None)
