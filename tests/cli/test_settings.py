"""Where settings come from, and what a wrong one says."""

import argparse
import io
import socket
import threading

import pytest

from kvmesh.cli import worker
from kvmesh.cli.commands import main
from kvmesh.cli.settings import Setting, UsageError, add_settings, merged
from kvmesh.worker.settings import SettingError, WorkerSettings

SETTINGS = (
    Setting("role", "what it takes"),
    Setting("kv_pool_tokens", "size"),
    Setting("insecure", "plain text", is_switch=True),
    Setting("etcd", "endpoints", flag_only=True),
)


def values(arguments=(), environment=None, config=None, tmp_path=None):
    parser = argparse.ArgumentParser()
    add_settings(parser, SETTINGS)
    arguments = list(arguments)
    if config is not None:
        file = tmp_path / "kvmesh.toml"
        file.write_text(config)
        arguments += ["--config", str(file)]
    return merged("worker", SETTINGS, parser.parse_args(arguments), environment or {})


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path):
    config = '[worker]\nrole = "a"\nkv_pool_tokens = 1\n[router]\nlisten = "x"\n'
    environment = {"KVMESH_ROLE": "b"}
    assert values(config=config, tmp_path=tmp_path)["role"] == "a"
    found = values(config=config, tmp_path=tmp_path, environment=environment)
    assert found == {"role": "b", "kv_pool_tokens": 1}
    found = values(["--role", "c"], environment, config, tmp_path)
    assert found["role"] == "c"


@pytest.mark.parametrize(
    ("text", "means"),
    [("true", True), ("1", True), ("Yes", True), ("on", True),
     ("false", False), ("0", False), ("no", False), ("OFF", False)],
)  # fmt: skip
def test_switches_are_read_the_same_everywhere(text, means, tmp_path):
    assert values(environment={"KVMESH_INSECURE": text}) == {"insecure": means}
    found = values(config=f'[worker]\ninsecure = "{text}"', tmp_path=tmp_path)
    assert found == {"insecure": means}
    assert WorkerSettings.from_mapping({"insecure": text}).insecure is means


@pytest.mark.parametrize("text", ["jes", "2", "enable", "truee"])
def test_a_switch_that_is_neither_on_nor_off_is_refused(text):
    said = f"insecure is '{text}'; allowed is true or false"
    with pytest.raises(UsageError, match=said):
        values(environment={"KVMESH_INSECURE": text})
    with pytest.raises(SettingError, match=said):
        WorkerSettings.from_mapping({"insecure": text})


@pytest.mark.parametrize("text", ["yes", "on"])
def test_a_token_is_sent_in_no_plain_text_where_tls_is_asked_for(text, monkeypatch, capsys):
    """The listener sees a TLS hello first, whose record type is 22."""
    monkeypatch.setenv("KVMESH_TLS", text)
    with socket.create_server(("127.0.0.1", 0)) as server:
        begins = []

        def take():
            connection, _ = server.accept()
            with connection:
                begins.append(connection.recv(1))

        taking = threading.Thread(target=take)
        taking.start()
        where = f"127.0.0.1:{server.getsockname()[1]}"
        assert main(["models", "--endpoint", where, "--token", "t"]) == 1
        taking.join()
    assert begins == [b"\x16"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30.0), ("500ms", 0.5), ("1.5m", 90.0), ("1h", 3600.0), ("2", 2.0), ("0.25", 0.25)],
)
def test_times_are_read_with_their_units(text, seconds):
    assert WorkerSettings.from_mapping({"grace": text}).grace == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "5 days", "-1s", "1e3s", "inf", "nan", True])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(SettingError, match=r"orphan_ttl is .*; allowed is a time with its unit"):
        WorkerSettings.from_mapping({"orphan_ttl": text})


@pytest.mark.parametrize("name", ["grace", "etcd_ttl", "offer_timeout", "orphan_ttl"])
def test_a_time_is_said_as_it_is_given(name):
    shown = {setting.name: setting.default for setting in worker.settings()}
    default = WorkerSettings.from_mapping({name: shown[name]})
    assert getattr(default, name) == getattr(WorkerSettings(), name)
    assert shown[name].endswith("s")


def test_a_drain_takes_a_time_with_its_unit(capsys):
    assert main(["drain", "w", "--grace", "soon"]) == 2
    assert "--grace is 'soon'; allowed is a time with its unit" in capsys.readouterr().err


def test_what_is_not_given_is_not_there():
    assert values() == {}
    assert values(["--insecure"]) == {"insecure": True}
    assert values(["--no-insecure"]) == {"insecure": False}
    assert values(environment={"KVMESH_ETCD": "a:1"}) == {}
    assert values(["--etcd", "a:1"]) == {"etcd": "a:1"}


def test_a_wrong_key_is_named_with_the_nearest_and_the_allowed(tmp_path):
    with pytest.raises(UsageError, match=r"rolle is no setting of \[worker\] \(meant role\?\)"):
        values(config='[worker]\nrolle = "a"', tmp_path=tmp_path)


CLIENT = """
[client]
endpoint = "127.0.0.1:1"
max_tokens = 5
etcd_server_name = "etcd"
cluster = "other"
"""


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "x"], ["chat"], ["workers"], ["drain", "w"], ["role", "w", "both"],
        ["explain", "0" * 32], ["planner", "--once"], ["models"],
    ],
)  # fmt: skip
def test_all_commands_of_a_client_share_its_section(command, tmp_path, capsys, monkeypatch):
    """Each takes from it what it has: all ask the router that it names, and find none."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    file = tmp_path / "kvmesh.toml"
    file.write_text(CLIENT)
    assert main([*command, "--config", str(file)]) == 1
    assert "no router answers at 127.0.0.1:1" in capsys.readouterr().err

    file.write_text(CLIENT + "max_token = 5\n")
    assert main([*command, "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert "max_token is no setting of [client] (meant max_tokens?); allowed are ca_file," in said


def test_a_registry_is_asked_with_the_section_of_the_clients(tmp_path, capsys):
    file = tmp_path / "kvmesh.toml"
    file.write_text(CLIENT.replace('etcd_server_name = "etcd"', ""))
    assert main(["workers", "--etcd", "127.0.0.1:1", "--config", str(file)]) == 2
    assert "etcd is 127.0.0.1:1: etcd cannot be reached" in capsys.readouterr().err


def test_a_section_that_nobody_has_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"\[wroker\] is no section \(meant worker\?\)"):
        values(config='[wroker]\nrole = "a"', tmp_path=tmp_path)
    with pytest.raises(UsageError, match="role stands in no section"):
        values(config='role = "a"', tmp_path=tmp_path)


def test_a_variable_that_nobody_has_is_warned_of(capsys):
    environment = {
        "KVMESH_KV_POOL_TOKEN": "1",
        # Of this command, of others, of none.
        "KVMESH_ROLE": "a", "KVMESH_QUEUE_LENGTH": "1", "KVMESH_VENV": "x", "KVMESH_ENDPOINT": "y",
    }  # fmt: skip
    assert values(environment=environment) == {"role": "a"}
    (warning,) = capsys.readouterr().err.splitlines()
    assert "KVMESH_KV_POOL_TOKEN is no setting" in warning
    assert "meant KVMESH_KV_POOL_TOKENS?" in warning


def test_a_broken_or_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="not TOML"):
        values(config="[worker", tmp_path=tmp_path)
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        values(["--config", "nowhere.toml"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["worker", "--role", "cook"], "role is 'cook'; allowed are prefill, decode, both"),
        (["worker", "--listen", "0.0.0.0:1"], "not loopback"),
        (["worker", "--threads", "many"], "threads is 'many'"),
        (["worker", "--log-level", "loud"], "log_level is 'loud'; allowed are error, warn"),
        (["worker", "--offer-timeout", "0"], "offer_timeout is 0s; allowed is more than 0s"),
        (["worker", "--etcd-user", "me"], "etcd_user and etcd_password go together"),
        (["worker", "--etcd-cert", "a"], "etcd_cert and etcd_key go together"),
        (["workers", "--etcd", "a:1", "--etcd-server-name", "a"], "need etcd_ca"),
        (["workers", "--etcd", "a:1", "--etcd-ca", "/nowhere"], "etcd_ca is '/nowhere', which"),
        (["up", "--prefill", "-1"], "prefill is '-1'; allowed is 0 or more"),
        (["up", "--decode", "0"], "somebody has to decode"),
        (["up", "--engine", "steam"], "engine is 'steam'; allowed are torch, sim"),
        (["up", "--", "true"], "needs --once"),
        (["up", "--once"], "--ask TEXT or -- COMMAND"),
        (["generate"], "one of PROMPT and --token-ids"),
        (["generate", "--token-ids", "1,x"], "allowed are numbers"),
        (["generate", "x", "--max-tokens", "x"], "max_tokens is 'x'; allowed is a whole number"),
        (["models", "pull"], "needs the name"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_sentence(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["up", "router", "worker", "chat", "generate", "workers", "models", "version"]
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"kvmesh {command}" in capsys.readouterr().out
