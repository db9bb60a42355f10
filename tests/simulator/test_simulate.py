"""`kvmesh simulate`, as people use it."""

import json
import re

import pytest

from kvmesh.cli import main
from kvmesh.simulate import ProfileError, load_profile, profile_names
from kvmesh.simulate.replay import Policy, TraceFile, sweep

MOONCAKE = "\n".join(
    json.dumps(
        {
            "timestamp": 3000 * (at // 10),
            "input_length": 1500 + 37 * (at % 11),
            "output_length": 20 + at % 30,
            "hash_ids": [0, at % 7 + 1, 100 + at],
        }
    )
    for at in range(200)
)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(MOONCAKE)
    return path


def test_equal_seeds_give_equal_bytes(trace, tmp_path):
    texts = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        out = tmp_path / name
        command = ["simulate", "--trace", str(trace), "--workers", "2", "--seed", str(seed)]
        assert main([*command, "--json", str(out), "--html", f"{out}.html"]) == 0
        texts.append((out.read_bytes(), out.with_name(f"{name}.html").read_bytes()))
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[2][0]


def test_a_sweep_prints_a_row_a_ratio(trace, capsys):
    assert main(["simulate", "--trace", str(trace), "--sweep", "1P3D..3P1D"]) == 0
    out = capsys.readouterr().out
    firsts = [line.split()[0] for line in out.splitlines() if re.match(r"\dP\dD", line)]
    assert firsts[:3] == ["1P3D", "2P2D", "3P1D"]
    assert "TTFT MS p50" in out
    assert "GOODPUT" in out


def test_the_report_needs_no_network_and_shows_every_run(trace, tmp_path):
    html = tmp_path / "report.html"
    command = ["simulate", "--trace", str(trace), "--workers", "2", "--html", str(html)]
    assert main([*command, "--policy", "cost", "--policy", "overlap-load:overlap-weight=4"]) == 0
    text = html.read_text()
    assert text.count("<figure>") == 12
    assert "overlap-load" in text
    assert not re.search(r"https?://|<script|<link|src=", text)


def test_a_report_of_a_sweep_tells_its_lines_apart_in_plot_and_legend(trace, tmp_path):
    html = tmp_path / "sweep.html"
    command = ["simulate", "--trace", str(trace), "--sweep", "1P5D..5P1D", "--html", str(html)]
    assert main(command) == 0
    (busy,) = re.findall(r"<figure><figcaption>workers busy.*?</figure>", html.read_text())
    looks = re.compile(r" (stroke='.*?)(?: points=.*?)?/>")
    drawn = looks.findall("".join(re.findall(r"<polyline .*?/>", busy)))
    named = looks.findall(busy.split("<br>")[1])
    assert len(drawn) == len(set(drawn)) == 10
    assert drawn == named


def test_without_noise_waits_are_as_predicted(trace, tmp_path):
    out = tmp_path / "out.json"
    command = ["simulate", "--trace", str(trace), "--workers", "4", "--perfect"]
    assert main([*command, "--json", str(out)]) == 0
    (run,) = json.loads(out.read_text())["runs"]
    assert run["summary"]["prediction"]["median"] < 0.1


def test_failures_are_survived(trace, tmp_path):
    out = tmp_path / "out.json"
    command = ["simulate", "--trace", str(trace), "--workers", "3", "--fail", "20:0:5"]
    assert main([*command, "--fail", "30:2", "--rows", "--json", str(out)]) == 0
    (run,) = json.loads(out.read_text())["runs"]
    assert run["summary"]["unfinished"] == 0
    late = [row for row in run["rows"] if row["arrival_ms"] > 31_000]
    assert late
    assert all(row["decode"] != 2 for row in late)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trace", "/no/such/file"], "cannot be read"),
        ([], "--trace FILE is needed"),
        (["--requests", "10", "--profile", "z80"], "h100-70b-tp4"),
        (["--requests", "10", "--sweep", "1P2D..2P2D"], "1P7D..7P1D"),
        (["--requests", "10", "--fail", "soon"], "SECOND:WORKER"),
        (["--requests", "10", "--fail", "1:9", "--workers", "2"], "cannot fail"),
        (["--requests", "10", "--policy", "oracle"], "oracle"),
    ],
)
def test_what_is_wrong_is_said(arguments, said, capsys):
    assert main(["simulate", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_every_figure_of_a_profile_has_a_source():
    for name in profile_names():
        profile = load_profile(name)
        sources = set(profile["sources"])
        for key in profile["step"]:
            assert key in sources or "step" in sources, f"{name}: {key}"
        assert {"kv_bytes_per_token", "pool_tokens", "transfer"} <= sources
    with pytest.raises(ProfileError):
        load_profile("none")


def test_ratios_and_policies_are_read():
    assert sweep("1P3D..3P1D") == [(1, 3), (2, 2), (3, 1)]
    assert sweep("2P1D") == [(2, 1)]
    policy = Policy.parse("overlap-load:overlap-weight=4,temperature=0.5")
    assert policy.numbers == {"overlap_weight": 4.0, "temperature": 0.5}
    with pytest.raises(ValueError, match="name=value"):
        Policy.parse("cost:stretch")


def test_formats_are_known_by_their_files(tmp_path):
    csv = tmp_path / "trace.csv"
    csv.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,4808,10\n")
    assert TraceFile.read(csv).source["format"] == "azure"
    assert TraceFile.read(csv, prefixes=False).source["prefixes"] is None
    simple = tmp_path / "trace.jsonl"
    simple.write_text('{"arrival_ms": 0, "prompt_tokens": 5, "output_tokens": 5}\n')
    assert TraceFile.read(simple).source["format"] == "simple"
