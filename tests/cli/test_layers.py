"""File, environment, flags: the later wins, and what is wrong is named."""

import argparse

import pytest

from kvmesh.cli import build_parser, main
from kvmesh.cli.errors import CommandError
from kvmesh.cli.layers import merge, read_table
from kvmesh.worker.settings import SettingError, WorkerSettings


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path, monkeypatch) -> None:
    file = tmp_path / "kvmesh.toml"
    file.write_text('[worker]\nrole = "prefill"\nthreads = 3\ncluster = "file"\n')
    monkeypatch.setenv("KVMESH_WORKER_THREADS", "5")
    monkeypatch.setenv("KVMESH_WORKER_CLUSTER", "env")
    options = argparse.Namespace(config=str(file), cluster="flag")
    merged = merge("worker", "KVMESH_WORKER_", ["role", "threads", "cluster"], options)
    settings = WorkerSettings.from_mapping(merged)
    assert (settings.role, settings.threads, settings.cluster) == ("prefill", 5, "flag")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rolle": "both"}, "rolle is no setting of a worker; allowed are advertise_host"),
        ({"role": "x"}, "role is 'x'; allowed are prefill, decode, both"),
        ({"threads": "many"}, "threads is 'many'; allowed is int"),
        ({"threads": "0"}, "threads is 0; allowed is more than 0"),
        ({"insecure": "maybe"}, "insecure is 'maybe'; allowed is true or false"),
        ({"listen": "8000"}, '"host:port"'),
        ({"listen": "0.0.0.0:1"}, "not loopback"),
        ({"worker_id": "a b"}, "allowed are 1 to 128 characters"),
    ],
)
def test_a_wrong_setting_names_the_key_and_what_is_allowed(values, says) -> None:
    with pytest.raises(SettingError) as caught:
        WorkerSettings.from_mapping(values)
    assert says in str(caught.value)


def test_an_open_address_needs_a_word() -> None:
    settings = WorkerSettings.from_mapping({"listen": "0.0.0.0:1", "insecure": "true"})
    assert settings.listen == "0.0.0.0:1"


def test_a_broken_file_is_told(tmp_path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[worker\n")
    with pytest.raises(CommandError, match=r"broken\.toml"):
        read_table(str(broken), "worker")
    with pytest.raises(CommandError, match="No such file"):
        read_table(str(tmp_path / "none.toml"), "worker")


def test_every_setting_is_described_in_the_help(capsys) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["worker", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in WorkerSettings.__dataclass_fields__:
        flag = "--" + name.replace("_", "-")
        assert flag in text
        assert f"KVMESH_WORKER_{name.upper()}" in text.replace(" ", "")


def test_a_wrong_use_exits_with_2(capsys) -> None:
    assert main(["worker", "--role", "x"]) == 2
    assert "allowed are prefill, decode, both" in capsys.readouterr().err
    assert main(["up", "--once"]) == 2
    assert main(["generate"]) == 2
