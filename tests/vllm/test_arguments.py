"""--vllm-arg, versions, and the connector that a role brings."""

import pytest

from kvmesh.engine.vllm import border
from kvmesh.engine.vllm.arguments import ArgumentError, kv_transfer, parse
from kvmesh.models.cancellation import Cancellation
from kvmesh.worker.settings import SettingError, WorkerSettings

KNOWN = ("max_model_len", "kv_transfer_config", "enforce_eager", "quantization", "model",
         "data_parallel_size", "hf_overrides")  # fmt: skip


def test_values_are_json_where_they_can_be_and_text_otherwise() -> None:
    given = {
        "max_model_len": "4096",
        "enforce-eager": "true",
        "--quantization": "fp8",
        "hf_overrides": '{"rope": {"factor": 2.5}}',
    }
    assert parse(given, KNOWN) == {
        "max_model_len": 4096,
        "enforce_eager": True,
        "quantization": "fp8",
        "hf_overrides": {"rope": {"factor": 2.5}},
    }


def test_pythons_own_spellings_are_understood() -> None:
    assert parse({"enforce_eager": "False", "quantization": "None"}, KNOWN) == {
        "enforce_eager": False,
        "quantization": None,
    }


def test_an_argument_that_vllm_does_not_have_is_named_with_the_nearest() -> None:
    with pytest.raises(ArgumentError, match=r"max_model_length.*meant max_model_len"):
        parse({"max_model_length": "1"}, KNOWN)


def test_what_kvmesh_sets_cannot_be_given() -> None:
    with pytest.raises(ArgumentError, match="model cannot be given: set model"):
        parse({"model": "x"}, KNOWN)
    with pytest.raises(ArgumentError, match="a worker for each replica"):
        parse({"data_parallel_size": "2"}, KNOWN)


def test_a_role_that_hands_off_gets_nixl() -> None:
    config = kv_transfer(None, on_cpu=True, hands_off=True)
    assert config == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_buffer_device": "cpu",
    }
    assert "kv_buffer_device" not in kv_transfer(None, on_cpu=False, hands_off=True)
    assert kv_transfer(None, on_cpu=True, hands_off=False) is None


def test_a_connector_that_is_given_keeps_what_it_says() -> None:
    given = {"kv_connector": "ExampleConnector", "kv_load_failure_policy": "fail"}
    config = kv_transfer(given, on_cpu=False, hands_off=False)
    assert config == {**given, "kv_role": "kv_both"}
    assert given == {"kv_connector": "ExampleConnector", "kv_load_failure_policy": "fail"}
    with pytest.raises(ArgumentError, match="lacks kv_connector"):
        kv_transfer({"kv_role": "kv_both"}, on_cpu=False, hands_off=True)
    with pytest.raises(ArgumentError, match="a JSON object"):
        kv_transfer("NixlConnector", on_cpu=False, hands_off=True)


def test_a_version_that_nobody_tried_is_refused_by_name() -> None:
    border.check_version(border.TESTED[0], allow_untested=False)
    border.check_version(border.TESTED[0] + "+cu130", allow_untested=False)
    with pytest.raises(border.VllmError, match=r"vLLM is 0\.1\.2; tested are"):
        border.check_version("0.1.2", allow_untested=False)
    border.check_version("0.1.2", allow_untested=True)


def settings(**values):
    return WorkerSettings.from_mapping({"engine": "vllm", **values})


def test_a_flag_that_is_repeated_keeps_commas_and_equals_signs() -> None:
    given = ['kv_transfer_config={"a":1,"b":"c=d"}', "max_model_len=9"]
    assert settings(vllm_arg=given).vllm_arg == {
        "kv_transfer_config": '{"a":1,"b":"c=d"}',
        "max_model_len": "9",
    }


def test_a_table_of_the_file_and_an_object_of_the_environment_are_the_same() -> None:
    table = settings(vllm_arg={"max_model_len": 9, "hf_overrides": {"a": True}})
    variable = settings(vllm_arg='{"max_model_len": 9, "hf_overrides": {"a": true}}')
    assert table.vllm_arg == variable.vllm_arg
    assert table.vllm_arg["hf_overrides"] == '{"a": true}'
    assert settings(vllm_arg="max_model_len=9").vllm_arg == {"max_model_len": "9"}


def test_what_is_no_pair_or_for_another_engine_is_refused() -> None:
    with pytest.raises(SettingError, match="allowed is KEY=VALUE"):
        settings(vllm_arg=["max_model_len"])
    with pytest.raises(SettingError, match="no JSON object"):
        settings(vllm_arg="{max_model_len: 9}")
    with pytest.raises(SettingError, match="none but with engine vllm"):
        WorkerSettings.from_mapping({"engine": "sim", "vllm_arg": ["a=1"]})


def test_the_command_line_takes_the_flag_again_and_again() -> None:
    import argparse

    from kvmesh.cli.settings import merged
    from kvmesh.cli.worker import add_arguments
    from kvmesh.cli.worker import settings as known

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--vllm-arg", "a=1,2", "--vllm-arg", "b={}"])
    assert merged("worker", known(), args, {})["vllm_arg"] == ["a=1,2", "b={}"]


def test_a_worker_without_vllm_says_what_to_install(monkeypatch) -> None:
    from kvmesh.worker.engines import build_engine

    monkeypatch.setattr(border, "DISTRIBUTIONS", ("no-such-distribution",))
    with pytest.raises(SettingError, match=r"pip install 'kvmesh\[vllm\]'"):
        build_engine(settings(), "w", 1, lambda line: None, Cancellation())
