"""Which crate may know which: the rule of the design, read off the workspace."""

from typing import Any

import pytest

# Crate: workspace crates that it may depend on, for its own code. testkit may
# be used in anybody's tests.
MAY_KNOW = {
    "wire": set(),
    "text": set(),
    "output-parser": set(),
    "attention": set(),
    "sim-content": set(),
    "kv-index": set(),
    "scheduler": {"kv-index"},
    "simulator": {"kv-index", "scheduler"},
    "session": {"wire"},
    "rpc": {"wire"},
    "trust": set(),
    "registry": {"wire", "trust"},
    "transfer": {"wire"},
    "worker-port": {"wire", "trust"},
    "testkit": {"wire", "rpc", "session", "registry", "kv-index", "text"},
    "gateway": {
        "wire", "rpc", "kv-index", "scheduler", "session", "text", "registry", "trust",
        "output-parser",
    },
    "router": {"gateway", "rpc"},
    "python": {
        "wire", "kv-index", "scheduler", "session", "text", "registry", "transfer", "gateway",
        "simulator", "attention", "worker-port", "sim-content", "trust",
    },
}  # fmt: skip

PURE = ("kv-index", "scheduler", "session", "text", "output-parser", "simulator")

FORBIDDEN_IN_PURE = {"tokio", "rand", "getrandom", "mio", "socket2", "chrono", "time"}

# Crates that pure ones may take although they pull something of the above, and
# why that reaches nobody: feature-gated code that is never called.
KNOWN_PULLS = {"text": {"rand", "getrandom"}}


def own(metadata: dict[str, Any]) -> dict[str, Any]:
    members = set(metadata["workspace_members"])
    return {
        package["name"].removeprefix("kvmesh-"): package
        for package in metadata["packages"]
        if package["id"] in members
    }


def depends_on(package: dict[str, Any], kinds: set[str | None]) -> set[str]:
    return {
        dependency["name"].removeprefix("kvmesh-")
        for dependency in package["dependencies"]
        if dependency["name"].startswith("kvmesh-") and dependency["kind"] in kinds
    }


def test_every_crate_has_a_rule_and_keeps_it(metadata):
    packages = own(metadata)
    assert set(packages) <= set(MAY_KNOW), "a new crate needs a line in MAY_KNOW"
    broken = {
        name: sorted(depends_on(package, {None, "build"}) - MAY_KNOW[name])
        for name, package in packages.items()
    }
    assert {name: more for name, more in broken.items() if more} == {}


def test_tests_may_use_testkit_besides(metadata):
    for name, package in own(metadata).items():
        allowed = MAY_KNOW[name] | {"testkit", "wire", "rpc"}
        assert depends_on(package, {"dev"}) <= allowed, name


def test_nothing_knows_python(metadata):
    for name, package in own(metadata).items():
        assert "python" not in depends_on(package, {None, "build", "dev"}), name


@pytest.mark.parametrize("crate", PURE)
def test_pure_crates_have_no_runtime_clock_or_randomness(metadata, cargo, crate):
    if crate not in own(metadata):
        pytest.skip(f"{crate} is not there yet")
    tree = cargo("cargo", "tree", "--locked", "-p", f"kvmesh-{crate}", "-e", "normal",
                 "--prefix", "none", "--format", "{p}")  # fmt: skip
    found = {line.split()[0] for line in tree.splitlines() if line.strip()}
    assert (found & FORBIDDEN_IN_PURE) - KNOWN_PULLS.get(crate, set()) == set()


def test_only_transfer_and_python_may_be_unsafe(metadata, root):
    allowed = {"transfer", "python", "attention"}
    for name in own(metadata):
        folder = root / "router_rs" / name
        entry = next(
            path for path in (folder / "src/lib.rs", folder / "src/main.rs") if path.exists()
        )
        text = entry.read_text(encoding="utf-8")
        if name not in allowed and name != "router":
            assert "#![forbid(unsafe_code)]" in text, f"{entry} does not forbid unsafe code"


@pytest.mark.parametrize(
    "crate", ["tonic", "prost", "rustls", "hyper", "h2", "ring", "tokio-rustls", "pyo3"]
)
def test_one_version_of_what_must_be_one(metadata, crate):
    versions = {p["version"] for p in metadata["packages"] if p["name"] == crate}
    assert len(versions) <= 1, f"{crate}: {versions}"


# Small crates that pyo3's build script has with other features: built twice, in seconds.
BUILT_TWICE = {"libc", "getrandom", "once_cell"}


def test_wheel_tests_and_tools_share_one_build_of_each_crate(cargo):
    """A crate with other features is another build, and so is all that stands on it."""

    def features(*selection: str) -> dict[str, set[str]]:
        tree = cargo("cargo", "tree", "--locked", *selection, "--prefix", "none",
                     "--format", "{p}|{f}")  # fmt: skip
        found: dict[str, set[str]] = {}
        for line in tree.replace(" (*)", "").splitlines():
            crate, bar, enabled = line.replace(" (proc-macro)", "").partition("|")
            if bar and "kvmesh" not in crate:
                found.setdefault(crate, set()).add(enabled)
        return found

    tools = ("--workspace", "--exclude", "kvmesh-python")
    tests = features(*tools, "--edges", "normal,build,dev")
    for other in (
        features("--package", "kvmesh-python", "--edges", "normal,build"),
        features(*tools, "--edges", "normal,build"),
    ):
        differ = {c for c in tests.keys() & other.keys() if tests[c] != other[c]}
        assert {crate.split()[0] for crate in differ} <= BUILT_TWICE


def test_one_tls_provider(cargo):
    tree = cargo("cargo", "tree", "--locked", "--workspace", "-e", "normal,build",
                 "--prefix", "none", "--format", "{p}")  # fmt: skip
    found = {line.split()[0] for line in tree.splitlines() if line.strip()}
    assert found.isdisjoint({"aws-lc-rs", "aws-lc-sys", "openssl", "openssl-sys", "native-tls"})


def test_no_build_needs_a_system_protoc(metadata):
    # etcd-client and others run protoc in their build scripts.
    names = {p["name"] for p in metadata["packages"]}
    assert names.isdisjoint({"etcd-client", "protoc-bin-vendored", "protobuf-src"})
