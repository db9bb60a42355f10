"""Every variant that config.json can ask for, on tiny random weights, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from driver import DEVICE, Driver, logits_of

from kvmesh import models
from kvmesh.engine.torch import TorchSettings, build
from kvmesh.engine.torch.decode_graph import cuda_capture
from kvmesh.engine.torch.paged_kv import KvShape
from kvmesh.engine.torch.torch_kv import TorchKv
from kvmesh.models import UnsupportedModelError

BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
STRETCHED = {"factor": 4.0, "rope_theta": 10000.0}
VARIANTS = {
    "gqa, tied": {},
    "one KV head a query head": {"num_key_value_heads": 8},
    "one KV head": {"num_key_value_heads": 1},
    "untied head": {"tie_word_embeddings": False},
    "head size of its own": {"head_dim": 24},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "other epsilon": {"rms_norm_eps": 1e-3},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "rope linear": {"rope_parameters": {"rope_type": "linear", **STRETCHED}},
    "rope dynamic": {"rope_parameters": {"rope_type": "dynamic", **STRETCHED}},
    "rope llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
            **STRETCHED,
        }
    },
    "rope yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "original_max_position_embeddings": 128,
            **STRETCHED,
        }
    },
    "rope yarn, own amplitude": {
        "rope_parameters": {
            "rope_type": "yarn",
            "original_max_position_embeddings": 128,
            "beta_fast": 16,
            "beta_slow": 2,
            "attention_factor": 0.8,
            **STRETCHED,
        }
    },
}


def make(kind, folder, shard_size="5GB", **changes):
    """A model with random weights, saved in `folder`; biases are not zero."""
    config = transformers.AutoConfig.for_model(kind, **(BASE | changes))
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.mul_(3)
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text("{}")
    return model


def compare(model, driver, length=300):
    prompt = np.random.default_rng(2).integers(0, 320, length).tolist()
    with logits_of() as seen:
        stream = driver.stream(prompt, 6)
        driver.generate([stream], 6, 128)
    with torch.inference_mode():
        wanted = model(torch.tensor([prompt + stream.output[:-1]])).logits[0, length - 1 :]
    assert (torch.cat(seen) - wanted).abs().max() < 2e-4 * wanted.abs().max()


def driven(folder: Path, device: str = DEVICE, block_tokens: int = 16) -> Driver:
    """The model in a folder, with a small pool."""
    settings = TorchSettings(
        str(folder), device=device, dtype="float32", threads=1, block_tokens=block_tokens
    )
    return Driver(build(settings).runner, 64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMESH_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_variant(variant, tmp_path):
    model = make("llama", tmp_path, **VARIANTS[variant])
    compare(model, driven(tmp_path))


def test_mistral(tmp_path):
    model = make("mistral", tmp_path, sliding_window=None)
    compare(model, driven(tmp_path))


def test_qwen2(tmp_path):
    model = make("qwen2", tmp_path, use_sliding_window=False)
    compare(model, driven(tmp_path))


def test_larger_blocks(tmp_path):
    model = make("llama", tmp_path)
    compare(model, driven(tmp_path, block_tokens=32))


def test_several_shards_are_the_same_model(tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    model = make("llama", one)
    make("llama", many, shard_size="50KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    compare(model, driven(many))
    cache = models.cache_folder()
    assert models.model_digest(one, cache) == models.model_digest(many, cache)


@pytest.mark.parametrize("mirror", [False, True])
def test_torch_attention_equals_the_kernels(tmp_path, mirror):
    """The path of other devices and dtypes, run on the CPU in float32."""
    model = make("llama", tmp_path)
    driver = driven(tmp_path, "cpu")
    runner = driver.runner
    config = models.load_config(tmp_path)
    device = torch.device("cpu")
    shape = KvShape.of(config, 16)
    runner._kv = TorchKv(shape, driver.pool, torch.float32, device, mirror=mirror)
    compare(model, driver)


def with_graphs(driver, folder):
    """Steps of decoding streams alone at once, as on a GPU; on a CPU each is made anew."""
    runner = driver.runner
    shape = KvShape.of(models.load_config(folder), 16)
    device = torch.device(DEVICE)
    kv = TorchKv(shape, driver.pool, torch.float32, device, mirror=True)
    runner._kv = kv
    runner.use_graphs(kv, cuda_capture() if device.type == "cuda" else lambda step: step)
    return driver


def test_steps_at_once_equal_the_model(tmp_path):
    model = make("llama", tmp_path)
    compare(model, with_graphs(driven(tmp_path), tmp_path))


def test_steps_at_once_of_streams_of_any_length_equal_steps_by_layers(tmp_path):
    """One to five rows, of one to thirteen blocks: filled up to other shapes as they grow."""
    make("llama", tmp_path)
    lengths, tokens = (3, 200, 31, 32, 127), (40, 9, 20, 3, 30)

    def outputs(driver):
        streams = [driver.stream(range(length), 40) for length in lengths]
        for stream, wanted in zip(streams, tokens, strict=True):
            driver.generate([stream], 1, 64)
            stream.wanted = wanted
        while running := [s for s in streams if len(s.output) < s.wanted]:
            driver.step(running, 1)
        blocks = np.frombuffer(driver.pool, dtype=np.float32).reshape(64, -1)
        computed = [blocks[stream.blocks[: (stream.done - 1) // 16]] for stream in streams]
        return [stream.output for stream in streams], np.concatenate(computed)

    expected, kv = outputs(driven(tmp_path, "cpu"))
    got, kv_at_once = outputs(with_graphs(driven(tmp_path), tmp_path))
    assert got == expected
    # What was computed is in the pool, where transfers take it from.
    assert np.abs(kv_at_once - kv).max() < 1e-3 * np.abs(kv).max()


def test_a_mirror_sees_blocks_that_came_from_elsewhere(tmp_path):
    make("llama", tmp_path)
    driver = driven(tmp_path, "cpu")
    runner = driver.runner
    shape = KvShape.of(models.load_config(tmp_path), 16)
    kv = TorchKv(shape, driver.pool, torch.float32, torch.device("cpu"), mirror=True)
    prompt = list(range(50))
    here, there = driver.stream(prompt, 9), driver.stream(prompt, 9)
    driver.generate([here], 1, 64)
    runner._kv = kv
    # The other stream's slots were mirrored with old content before.
    driver.generate([driver_stream_at(there, prompt[::-1])], 1, 64)
    driver.pool.raise_versions(there.blocks.tolist())
    blocks = np.frombuffer(driver.pool, dtype=np.uint8).reshape(-1, runner.block_bytes)
    blocks[there.blocks] = blocks[here.blocks]
    there.done, there.output = here.done, list(here.output)
    driver.generate([there], 9, 64)
    driver.generate([here], 9, 64)
    assert there.output == here.output


def test_blocks_whose_copy_failed_are_copied_again(tmp_path, monkeypatch):
    make("llama", tmp_path)
    driver = driven(tmp_path, "cpu")
    runner = driver.runner
    shape = KvShape.of(models.load_config(tmp_path), 16)
    kv = TorchKv(shape, driver.pool, torch.float32, torch.device("cpu"), mirror=True)
    stream = driver.stream(list(range(50)), 9)
    driver.generate([stream], 4, 64)
    done, output = stream.done, list(stream.output)
    (expected,) = driver.generate([stream], 9, 64)
    stream.done, stream.output = done, output
    runner._kv = kv

    def fails(*_):
        raise torch.cuda.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(kv._mirror, "_parts", fails)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            driver.step([stream], 64)
    stream.done = done
    assert driver.generate([stream], 9, 64) == [expected]


def driver_stream_at(stream, prompt):
    """Another sequence in the same blocks."""
    return type(stream)(prompt, stream.blocks)


def test_half_precision_runs(tmp_path):
    make("llama", tmp_path)
    built = build(TorchSettings(str(tmp_path), device=DEVICE, threads=1, dtype="bfloat16"))
    assert built.runner.compatibility().dtype == "bfloat16"
    driver = Driver(built.runner, 64)
    (output,) = driver.generate([driver.stream(list(range(40)), 5)], 5, 16)
    assert len(output) == 5


@pytest.mark.parametrize("layers", [{1}, {2}, {3}, {1, 2, 3}])
def test_what_runs_between_two_layers_changes_no_bit(tmp_path, layers):
    """A prompt whose chunks are paused, after these layers, has the logits and the KV of one that
    was computed in one go; a chunk and decode steps of another run meanwhile."""
    make("llama", tmp_path)
    rng = np.random.default_rng(4)
    ids, others = rng.integers(0, 320, 192).tolist(), rng.integers(0, 320, 150).tolist()
    outcomes = []
    for paused in (set(), layers):
        driver = driven(tmp_path)
        stream, other = driver.stream(ids, 2), driver.stream(others, 30)
        with logits_of() as seen:
            for _ in range(2):
                forward = driver.runner.forward([stream.next_slice(96)])
                for layer in range(1, driver.runner.layers + 1):
                    next(forward)
                    if layer in paused:
                        driver.step([other], 60)
                with pytest.raises(StopIteration):
                    next(forward)
        blocks = np.frombuffer(driver.pool, dtype=np.uint8).reshape(-1, driver.runner.block_bytes)
        outcomes.append((seen[-1], blocks[stream.blocks].tobytes()))
        assert other.done >= (60 if paused else 0)
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rope_scaling": {"type": "longrope"}, "rope_parameters": None}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path, change, said):
    make("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=said):
        models.pull(str(tmp_path))


def test_weights_of_unknown_use_are_refused(tmp_path):
    make("qwen2", tmp_path, use_sliding_window=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="bias"):
        build(TorchSettings(str(tmp_path), device=DEVICE, dtype="float32", threads=1))
