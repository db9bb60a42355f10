"""Adapters are loaded before the first request, with room for their ranks."""

import json

import pytest
from fake_core import FakeCore

from kvmesh.engine.vllm.adapters import arguments
from kvmesh.engine.vllm.arguments import ArgumentError
from kvmesh.engine.vllm.border import VllmError
from kvmesh.engine.vllm.loop import CoreLoop

RANKS = (1, 8, 16, 32, 64, 512)


@pytest.fixture
def made(tmp_path):
    """Makes adapters' folders, of which only the configuration is there."""

    def make(**configs):
        for name, config in configs.items():
            (tmp_path / name).mkdir()
            text = config if isinstance(config, str) else json.dumps(config)
            (tmp_path / name / "adapter_config.json").write_text(text)
        return {name: tmp_path / name for name in configs}

    return make


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        ({"r": 8}, 16),
        ({"r": 16, "rank_pattern": None}, 16),
        ({"r": 17}, 32),
        ({"r": 64}, 64),
        ({"r": 8, "rank_pattern": {"q_proj": 33}}, 64),
    ],
)
def test_there_is_room_for_the_highest_rank(made, config, rank) -> None:
    folders = made(small={"r": 4}, poet=config)
    assert arguments(folders, {}, RANKS) == {
        "enable_lora": True,
        "max_loras": 2,
        "max_lora_rank": rank,
    }


def test_all_stay_loaded_where_fewer_share_a_step(made) -> None:
    folders = made(poet={"r": 8}, painter={"r": 8})
    assert arguments(folders, {"max_loras": 1}, RANKS)["max_cpu_loras"] == 2
    assert arguments(folders, {"max_loras": 5}, RANKS)["max_cpu_loras"] == 5


def test_without_adapters_nothing_is_asked_of_vllm() -> None:
    assert arguments({}, {"max_loras": 3}, RANKS) == {}


def test_a_rank_beyond_what_may_be_is_told_before_vllm_starts(made) -> None:
    folders = made(small={"r": 4}, poet={"r": 600})
    with pytest.raises(ArgumentError, match=r"lora\.poet has rank 600; allowed are up to 512"):
        arguments(folders, {}, RANKS)
    with pytest.raises(ArgumentError, match=r"allowed are up to 32 \(vllm_arg max_lora_rank\)"):
        arguments(folders, {"max_lora_rank": 32}, RANKS)


@pytest.mark.parametrize(
    "config", ["{", "[]", "7", {}, {"r": 0}, {"r": "8"}, {"r": 8, "rank_pattern": {"q": -1}},
               {"r": 8, "rank_pattern": [3]}]
)  # fmt: skip
def test_a_configuration_that_is_none_is_told_by_name(made, config) -> None:
    with pytest.raises(ArgumentError, match=r"lora\.poet.*adapter_config\.json"):
        arguments(made(poet=config), {}, RANKS)


def started(core):
    loop = CoreLoop(core, None, None, {"painter": "painter", "poet": "poet"})
    try:
        loop.start_core()
    finally:
        loop.stop()


def test_adapters_are_loaded_one_after_the_other() -> None:
    core = FakeCore()
    started(core)
    assert core.seen == [("adapter", "painter"), ("adapter", "poet")]


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        ("LoRA rank 32 is greater than max_lora_rank 16.", "LoRA rank 32 is greater"),
        (None, "encountered an issue"),
    ],
    ids=["refused", "it dies of it"],
)
def test_a_core_that_cannot_load_one_does_not_start(problem, text) -> None:
    core = FakeCore()
    core.bad_adapters = {"poet": problem}
    with pytest.raises(VllmError, match=rf"adapter 'poet': .*{text}.*lora\.poet"):
        started(core)
    assert core.stopped
