"""docs/dependencies.md lists what the manifests ask for, and nothing else."""

import re
import tomllib

KINDS = ("dependencies", "dev-dependencies", "build-dependencies")


def listed(root, language) -> set[str]:
    """Names in the first column of a language's table, without what is in parentheses."""
    page = (root / "docs" / "dependencies.md").read_text()
    section = page.split(f"\n## {language}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")][1:]
    names = (
        re.sub(r"\(.*?\)|\s[\d.]+\s*$", "", name).strip() for c in cells for name in c.split(",")
    )
    return {name for name in names if name}


def test_every_crate_has_its_line(root):
    asked = set()
    apart = ("benchmarks/peers/index", "fuzz")
    manifests = [
        *root.glob("router_rs/*/Cargo.toml"),
        *(root / part / "Cargo.toml" for part in apart),
    ]
    for manifest in manifests:
        content = tomllib.loads(manifest.read_text())
        for table in (content, *content.get("target", {}).values()):
            asked |= {name for kind in KINDS for name in table.get(kind, {})}
    asked = {name for name in asked if not name.startswith("kvmesh-")}
    assert listed(root, "Rust") == asked


def test_the_workspace_names_no_crate_that_nobody_uses(root):
    workspace = tomllib.loads((root / "Cargo.toml").read_text())["workspace"]["dependencies"]
    used = "\n".join(file.read_text() for file in root.glob("router_rs/*/Cargo.toml"))
    assert [name for name in workspace if not re.search(rf"^{name}\b", used, re.MULTILINE)] == []


def test_every_python_package_has_its_line(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())
    lines = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        lines += extra
    for file in root.glob("requirements/*.txt"):
        lines += file.read_text().splitlines()
    names = {re.split(r"[\[=<>~! ]", line)[0] for line in lines if re.match(r"[A-Za-z]", line)}
    assert listed(root, "Python") == names - {"kvmesh"}
