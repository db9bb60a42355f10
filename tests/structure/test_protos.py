"""The wire contract: commented, compiled as committed, compatible with the last tag."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from proto_compatibility import differences


def compile_protos(folder: Path, target: Path) -> FileDescriptorSet:
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(folder),
               "--include_source_info", f"--descriptor_set_out={target}", *files]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return FileDescriptorSet.FromString(target.read_bytes())


@pytest.fixture(scope="session")
def protos(root, tmp_path_factory) -> FileDescriptorSet:
    return compile_protos(root / "proto", tmp_path_factory.mktemp("protos") / "set.bin")


MEASURES = re.compile(
    r"""
    \b(?:range|default|unset|empty)\b
    | \b(?:ms|milliseconds|microseconds|seconds|bytes|elements)\b
    | (?:\bin|,)\ tokens\b
    # What is counted comes first: "Prompt tokens computed."
    | ^(?:number\ of|(?:most\ |(?:kv|prompt|output|prefill)\ )?
         (?:tokens|blocks|requests|workers|attempts|plans))\b
    # A bound: "from 1", "at most 64"; or what a value means: "0: none".
    | \b(?:from|to|at\ least|at\ most|above|now|number)\ \d
    | [.,:;]\ \d+(?:\.\d+)?\b
    | \b0\ (?:where|for|if|when|before|to|or)\b
    # Any value at all.
    | \bany\ 64\ bits\b | \(64\ bits\) | \brandom\ number\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""What a number's comment names: its unit, its range or what is meant without it. A
digit somewhere, or a word that could be a unit, is not enough."""

NUMBERS = frozenset(
    getattr(FieldDescriptorProto, f"TYPE_{name}")
    for name in (
        "DOUBLE", "FLOAT", "INT32", "INT64", "UINT32", "UINT64", "SINT32", "SINT64",
        "FIXED32", "FIXED64", "SFIXED32", "SFIXED64",
    )
)  # fmt: skip


def unmeasured(file: FileDescriptorProto) -> Iterator[str]:
    """Numbers whose comment says nothing that a caller could check, by full name."""
    comments = {
        tuple(location.path): location.leading_comments + location.trailing_comments
        for location in file.source_code_info.location
    }

    def in_message(message: DescriptorProto, path: tuple[int, ...], scope: str) -> Iterator[str]:
        name = f"{scope}.{message.name}"
        if message.options.map_entry:
            return
        for number, field in enumerate(message.field):
            comment = " ".join(comments.get((*path, 2, number), "").split())
            if field.type in NUMBERS and not MEASURES.search(comment):
                yield f"{name}.{field.name}"
        for number, nested in enumerate(message.nested_type):
            yield from in_message(nested, (*path, 3, number), name)

    for number, message in enumerate(file.message_type):
        yield from in_message(message, (4, number), file.package)


def uncommented(file: FileDescriptorProto) -> Iterator[str]:
    """Elements without a comment, by full name."""
    comments = {
        tuple(location.path): location.leading_comments or location.trailing_comments
        for location in file.source_code_info.location
    }

    def said(path: tuple[int, ...]) -> bool:
        return bool(comments.get(path, "").strip())

    def in_enum(enum: EnumDescriptorProto, path: tuple[int, ...], scope: str) -> Iterator[str]:
        if not said(path):
            yield f"{scope}.{enum.name}"
        for number, value in enumerate(enum.value):
            if not said((*path, 2, number)):
                yield f"{scope}.{enum.name}.{value.name}"

    def in_message(message: DescriptorProto, path: tuple[int, ...], scope: str) -> Iterator[str]:
        name = f"{scope}.{message.name}"
        if message.options.map_entry:
            return
        if not said(path):
            yield name
        for number, field in enumerate(message.field):
            if not said((*path, 2, number)):
                yield f"{name}.{field.name}"
        for number, nested in enumerate(message.nested_type):
            yield from in_message(nested, (*path, 3, number), name)
        for number, enum in enumerate(message.enum_type):
            yield from in_enum(enum, (*path, 4, number), name)

    for number, message in enumerate(file.message_type):
        yield from in_message(message, (4, number), file.package)
    for number, enum in enumerate(file.enum_type):
        yield from in_enum(enum, (5, number), file.package)
    for number, service in enumerate(file.service):
        if not said((6, number)):
            yield f"{file.package}.{service.name}"
        for method_number, method in enumerate(service.method):
            if not said((6, number, 2, method_number)):
                yield f"{file.package}.{service.name}.{method.name}"


def test_everything_has_a_comment(protos):
    missing = [name for file in protos.file for name in uncommented(file)]
    assert missing == []


@pytest.mark.parametrize(
    ("comment", "measured"),
    [
        ("Prompt tokens computed.", True),
        ("The attempt, from 1.", True),
        ("Bytes of KV moved.", True),
        ("Its weight. 0: none.", True),
        ("How often it was tried with other workers.", False),
        ("By hash scheme 1, or another one.", False),
        ("Weight of its layers.", False),
    ],
)
def test_a_comment_is_held_to_what_a_caller_can_check(comment, measured):
    assert bool(MEASURES.search(comment)) == measured


def test_every_number_has_a_unit_a_range_or_a_default(protos):
    missing = [name for file in protos.file for name in unmeasured(file)]
    assert missing == []


def test_the_registrys_subset_of_etcd_has_comments_too(root, tmp_path):
    found = compile_protos(root / "router_rs/registry/proto", tmp_path / "set.bin")
    assert [name for file in found.file for name in uncommented(file)] == []


def test_the_python_wire_code_is_what_the_protos_give(root, tmp_path):
    files = sorted(str(p.relative_to(root / "proto")) for p in (root / "proto").rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", f"--python_out={tmp_path}",
               f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}", *files]  # fmt: skip
    subprocess.run(command, cwd=root, check=True)
    made = {path.name: path.read_bytes() for path in (tmp_path / "kvmesh/v1").iterdir()}
    folder = root / "services/kvmesh/v1"
    committed = {path.name: path.read_bytes() for path in folder.glob("*_pb2*.py*")}
    assert sorted(made) == sorted(committed), "make wire, and commit what is new"
    differing = [name for name in made if made[name] != committed[name]]
    assert differing == [], "make wire"
    # Of vLLM's APIs; there in another package than their own, which is vLLM's.
    others = {
        path.name: re.sub(
            "^from vllm import ", "from kvmesh.vllm_wire import ", path.read_text(), flags=re.M
        )
        for path in (tmp_path / "vllm").iterdir()
    }
    folder = root / "services/kvmesh/vllm_wire"
    assert others == {path.name: path.read_text() for path in folder.glob("*_pb2*.py*")}, (
        "make wire"
    )


def test_nothing_that_is_released_changes_its_meaning(root, protos, tmp_path):
    tag = last_tag(root)
    if tag is None:
        pytest.skip("no tag yet: nothing is promised")
    old = tmp_path / "old"
    listed = subprocess.run(["git", "ls-tree", "-r", "--name-only", tag, "proto/"],
                            cwd=root, check=True, capture_output=True, text=True)  # fmt: skip
    for name in listed.stdout.split():
        target = old / Path(name).relative_to("proto")
        target.parent.mkdir(parents=True, exist_ok=True)
        shown = subprocess.run(["git", "show", f"{tag}:{name}"], cwd=root, check=True,
                               capture_output=True)  # fmt: skip
        target.write_bytes(shown.stdout)
    assert differences(compile_protos(old, tmp_path / "old.bin"), protos) == []


def last_tag(root: Path) -> str | None:
    command = ["git", "describe", "--tags", "--abbrev=0", "--match", "v*"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def test_the_stub_of_the_go_client_has_every_field(root, protos):
    (public,) = (file for file in protos.file if file.name == "kvmesh/v1/inference.proto")
    stub = (root / "tests/interop/go/kvmeshv1/inference.pb.go").read_text()
    known: dict[str, set[str]] = {}
    for line in stub.splitlines():
        if begun := re.match(r"type (\w+) struct \{$", line):
            fields = known.setdefault(begun[1], set())
        elif named := re.search(r'protobuf:"[^"]*\bname=(\w+)', line):
            fields.add(named[1])
    for message in public.message_type:
        # A oneof's fields are each a struct of their own, Message_Field.
        own = known[message.name] | {
            name for key in known if key.startswith(f"{message.name}_") for name in known[key]
        }
        assert {field.name for field in message.field} - own == set(), message.name
