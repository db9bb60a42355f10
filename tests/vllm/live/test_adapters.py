"""LoRA adapters by name: their own output, their own cached prefixes."""

import json
import shutil

import pytest
from engine_harness import until
from in_process import Engine, ended, place

from kvmesh._router import chain_root
from kvmesh.engine.contract import STORED
from kvmesh.worker.settings import SettingError

RANK = 32


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Random ones for queries and values: an answer that nobody else gives. Their rank is more
    than vLLM has room for by itself."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("poet")
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(30):
        for name, rows in (("q_proj", 576), ("v_proj", 192)):
            base = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{base}.lora_A.weight"] = torch.randn(RANK, 576, generator=generator) / 8
            tensors[f"{base}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) / 8
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "base_model_name_or_path": "smollm2-135m",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# The first one: until here no engine has been started.
def test_an_adapter_that_vllm_cannot_load_is_told_before_anything_is_served(
    adapter, tmp_path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "poet")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(SettingError, match=r"adapter 'poet'.*DoRA.*lora\.poet"):
        Engine(engine_arguments={"lora.poet": str(folder)})


@pytest.fixture(scope="module")
def one(adapter):
    engine = Engine(engine_arguments={"lora.poet": str(adapter)})
    yield engine
    engine.close()


async def test_an_adapter_has_its_own_output_and_its_own_prefixes(driver, one) -> None:
    ids = [(at * 37) % 40_000 + 100 for at in range(100)]
    plain = await ended(place(driver, ids, max_tokens=8))
    poet = await ended(place(driver, ids, max_tokens=8, adapter="poet"))
    again = await ended(place(driver, ids, max_tokens=8, adapter="poet"))
    assert poet.tokens != plain.tokens
    assert poet.end.timings.cached_tokens == 0
    assert again.tokens == poet.tokens
    assert again.end.timings.cached_tokens == 96
    record = one.built.model
    assert list(record.adapters) == ["poet"]
    root = chain_root(record.digest, record.adapters["poet"], "")
    await until(
        lambda: any(
            change.kind == STORED and change.parent == root
            for batch in driver.batches
            for change in batch.changes
        )
    )
    await driver.idle()


async def test_an_adapter_that_is_not_there_is_refused_by_name(driver) -> None:
    attempt = place(driver, [5, 6, 7], adapter="painter")
    assert await attempt.ended() == "refused"
    assert "painter" in attempt.opening.refused.message
