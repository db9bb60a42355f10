"""Keys from `kvmesh key` to a client's calls, with real processes."""

import tomllib

import grpc
import pytest

import kvmesh
from kvmesh.cli import main


def made(capsys, *arguments: str) -> tuple[str, str]:
    """A new key, and the lines for the file."""
    assert main(["key", *arguments]) == 0
    said = capsys.readouterr()
    key = said.err.split()[-1]
    assert key not in said.out
    return key, said.out


def test_a_key_opens_what_is_its_tenants_and_nothing_else(fresh, tmp_path, capsys) -> None:
    (shop, shop_lines), (batch, batch_lines) = made(capsys, "shop"), made(capsys, "night jobs")
    operator, operator_lines = made(capsys, "--operator")
    file = tmp_path / "keys.toml"
    file.write_text(shop_lines + batch_lines + "concurrency = 1\n" + operator_lines)
    assert shop not in file.read_text()
    assert set(tomllib.loads(file.read_text())["tenants"]) == {"shop", "night jobs"}

    endpoint = fresh.start_router("--api-keys", str(file))
    fresh.start_worker("w", "both")
    with kvmesh.Client(endpoint, token=shop) as client:
        while not any(model.ready for model in client.models()):
            fresh.children.wait(0.02)
        assert len(client.complete(prompt="Open", max_tokens=4).token_ids) == 4

    for token in (None, "kvmesh-wrong"):
        with kvmesh.Client(endpoint, token=token) as client:
            with pytest.raises(kvmesh.MeshError) as refused:
                client.complete(prompt="Open", max_tokens=4)
            assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED
            assert refused.value.reason == "UNAUTHENTICATED"

    with kvmesh.Client(endpoint, token=batch) as client:
        running = client.generate(prompt="On and on", max_tokens=3_000, ignore_end_of_text=True)
        next(running)
        with pytest.raises(kvmesh.OverloadedError) as over:
            client.complete(prompt="And another", max_tokens=4)
        assert over.value.reason == "TENANT_LIMIT"
        assert over.value.retry_after_s
        running.close()

    assert main(["workers", "--endpoint", endpoint]) == 1
    assert "a valid key is needed" in capsys.readouterr().err
    assert main(["workers", "--endpoint", endpoint, "--token", shop]) == 1
    assert "permission denied" in capsys.readouterr().err
    assert main(["workers", "--endpoint", endpoint, "--token", operator]) == 0
    assert "both" in capsys.readouterr().out


def test_a_tenant_without_a_name_gets_no_key(capsys) -> None:
    for name in ("", "a\nb", "x" * 129):
        assert main(["key", name]) == 2
        assert "1 to 128 bytes" in capsys.readouterr().err
