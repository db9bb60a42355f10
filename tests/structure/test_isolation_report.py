"""What `benchmarks/isolation.py` writes, from measurements that are made up."""

import importlib
import importlib.util
import json
import re
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def report(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("isolation_report")


def phase(report, began_s, documents, gaps_ms, **more):
    """One turn with these gaps, and a document where there are some in flight."""
    tokens = [1.0]
    for gap in gaps_ms:
        tokens.append(tokens[-1] + gap / 1e3)
    turn = report.Answer(0.5, tokens, tokens[-1])
    read = [report.Answer(0.0, [20.0], 30.0)] * documents
    return report.Phase(began_s, 60.0, documents, [turn], read, took_s=60.0, **more)


@pytest.fixture
def two(report):
    """Of one a row of gaps alone and a longer one in the storm; of the other no answer at all."""
    alone = phase(report, 100.0, 0, [50.0] * 10, roles={"a": "prefill", "b": "decode"}, flips=[])
    storm = phase(
        report, 160.0, 1, [80.0] * 400, roles={"a": "prefill", "b": "both"},
        flips=["b from decode to both"],
    )  # fmt: skip
    silent = report.Phase(0.0, 60.0, 1, [report.Answer(0.0)], [], took_s=60.0)
    return [
        report.Measured("e", "with <the> planner", [alone], [storm]),
        report.Measured("x", "silent", [], [silent]),
    ]


def test_the_page_has_tables_and_a_drawing_of_each_and_loads_nothing(report, two, tmp_path):
    path = tmp_path / "isolation.html"
    table = (("", "a & b"), [["e", 1234.5], ["x", None]])
    report.write_html(path, "made up", two, {"Chat, ms": table})
    page = path.read_text()
    assert not re.search(r"https?://|<script|<link|src=", page)
    assert "<the>" not in page
    assert "with &lt;the&gt; planner" in page
    assert "<td>1,234</td>" in page
    assert "<td>-</td>" in page
    full, silent = page.split("<svg ")[1:]
    # A dot for each gap; a storm is shaded, and a phase alone is not.
    assert len(re.findall(r"M[\d.]+ [\d.]+h", full)) == 410
    assert "M" not in re.search(r"<path d='([^']*)'", silent)[1]
    assert (full.count("<rect"), silent.count("<rect")) == (1, 1)
    begin, width = (float(n) for n in re.search(r"<rect x='(.*?)' width='(.*?)'", full).groups())
    # The storm is the second half of two minutes.
    assert begin - 60 == pytest.approx(width, abs=0.2)


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib (requirements/bench)"
)
def test_the_plot_is_a_picture_of_all_where_matplotlib_is_installed(report, two, tmp_path):
    path = tmp_path / "isolation.png"
    assert report.write_png(path, two)
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:]) == (1210, 2 * 264)


def test_without_matplotlib_there_is_no_plot_and_the_caller_is_told(
    report, two, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "isolation.png"
    assert not report.write_png(path, two)
    assert not path.exists()


def test_nobody_is_best_by_a_p99_of_few(report):
    def of(key, count):
        return report.Measured(key, "", [], [phase(report, 0.0, 1, [10.0 + count] * count)])

    few, enough = of("few", 299), of("enough", 300)
    rows = {name: key for name, key, _ in report.winners([few, enough])}
    assert rows["chat ITL p95, ms"] == "(few)"
    assert rows["chat ITL p99, ms"] == "(enough)"
    assert "chat ITL p99, ms" not in {name for name, *_ in report.winners([few])}


def test_flips_and_roles_are_in_the_table_and_in_the_raw_data(report, two, tmp_path):
    planned, silent = two
    row = dict(zip(report.DOCUMENT_HEAD, report.document_row(planned, 1 / 30), strict=True))
    assert row["flips"] == 1
    assert row["roles at the ends of phases"] == "prefill+decode x1, prefill+both x1"
    assert report.document_row(silent, 1 / 30)[-2:] == [None, ""]
    path = tmp_path / "raw.json"
    report.write_raw(path, "", {"e": planned})
    phases = json.loads(path.read_text())["arrangements"]["e"]["phases"]
    assert [one["flips"] for one in phases] == [[], ["b from decode to both"]]
    assert [one["roles"]["b"] for one in phases] == ["decode", "both"]


def test_flips_are_read_from_what_the_planner_printed(root, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    clusters = importlib.import_module("isolation_clusters")
    cluster = SimpleNamespace(folder=tmp_path)
    assert clusters.flips_of(cluster) is None
    monkeypatch.setattr("kvmesh.cli.planner.print", logged(tmp_path), raising=False)
    from kvmesh.cli.planner import _Planner
    from kvmesh.v1 import admin_pb2 as admin
    from kvmesh.v1 import worker_pb2 as worker

    flip = admin.RoleFlip(worker_id="d-1", from_role=worker.ROLE_DECODE, to_role=worker.ROLE_BOTH)
    advice = [
        admin.PoolAdvice(model="m", hold="each pool is within its targets"),
        admin.PoolAdvice(model="m", flip=flip),
        admin.PoolAdvice(model="m", hold="a flip is under way"),
    ]
    for apply in (False, True):
        planner = _Planner(Answering(advice), {"timeout_s": 1.0}, apply=apply)
        assert all(planner.look() for _ in advice)
    assert clusters.flips_of(cluster) == ["d-1 from decode to both"]


class Answering:
    """A channel to a router that gives one piece of advice after the other."""

    def __init__(self, advice):
        self._advice = iter(advice)

    def unary_unary(self, method, **_):
        if method.endswith("/AdvisePools"):
            return lambda *_, **__: SimpleNamespace(models=[next(self._advice)])
        return lambda *_, **__: None

    def unary_stream(self, *_, **__):
        return None


def logged(folder: Path):
    """A `print` into the log of a cluster's planner."""
    (folder / "logs").mkdir()
    log = folder / "logs" / "planner.log"

    def write(text, **_):
        with log.open("a") as out:
            out.write(f"{text}\n")

    return write
