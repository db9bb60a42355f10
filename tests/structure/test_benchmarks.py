"""Benchmarks can be run all at once, whatever one of them lacks, and the docs list them."""

import json
import os
import re
import subprocess
import sys
from textwrap import dedent

import pytest


def run(root, *arguments, **variables):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root / "benchmarks",
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_the_page_lists_every_benchmark(root):
    page = (root / "docs" / "benchmarks.md").read_text()
    listed = run(root, "-c", "import run_all; print(*[b.name for b in run_all.benchmarks()])")
    names = listed.stdout.split()
    assert len(names) > 5, listed.stderr
    assert [name for name in names if name not in page] == []


def test_figures_are_printed_by_their_names(root):
    code = """
        from alternating import Figure, print_figures
        print_figures([Figure("shm_over_memcpy", 0.875, "ratio", "higher")])
    """
    assert "shm_over_memcpy  0.875  ratio  higher" in run(root, "-c", dedent(code)).stdout


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        pytest.param("session.py", ["itl_p99_ratio_snapshot", "itl_p99_ratio_prompts",
                                    "itl_p99_ratio_tokenizer"], marks=pytest.mark.slow),
        ("kv_transfer.py", ["shm_over_memcpy", "tcp_over_socket", "tls_over_tcp"]),
        pytest.param("churn.py", ["router_rss_growth_mib_h", "processes_not_flat", "left_over",
                                  "bad_requests"], marks=pytest.mark.slow),
        pytest.param("engine.py", ["prefill_over_transformers", "decode8_over_transformers",
                                   "kvmesh tok/s"], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_run_prints_its_figures_and_whether_it_is_evidence(root, name, figures):
    arguments = ["--without-model"] if name == "kv_transfer.py" else []
    done = run(root, name, "--quick", *arguments)
    assert done.returncode == 0, done.stderr
    for figure in [*figures, "Not evidence: a quick run."]:
        assert figure in done.stdout


@pytest.mark.parametrize(
    ("name", "trace"),
    [
        ("routing_quality.py", "mooncake_conversation_part1.jsonl"),
        ("simulate_speed.py", "mooncake_conversation_part1.jsonl"),
        ("slo_sweep.py", "azure_code_2023_part1.csv"),
        ("mixed_trace.py", "azure_conv_2023_part1.csv, azure_code_2023_part1.csv"),
        ("bench_serve.py", "azure_conv_2023_part1.csv"),
    ],
)
def test_one_without_its_traces_says_what_it_needs_and_how_to_give_it(root, name, trace, tmp_path):
    done = run(root, name, "--quick", KVMESH_TRACES=str(tmp_path))
    assert done.returncode == 77
    assert f"needs {trace}, which {tmp_path} has not" in done.stderr
    assert "--traces DIR or KVMESH_TRACES" in done.stderr


def azure_rows(path, count, prompt):
    """A trace of a row a second."""
    rows = [
        f"2023-11-16 18:{17 + at // 60}:{at % 60:02}.5000000,{prompt + 37 * (at % 50)},{5 + at % 30}"
        for at in range(count)
    ]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")


def test_a_sweep_prints_its_figures_and_its_plot_needs_no_network(root, tmp_path):
    azure_rows(tmp_path / "azure_code_2023_part1.csv", 1_000, 800)
    html, out = tmp_path / "sweep.html", tmp_path / "sweep.json"
    files = ["--html", str(html), "--json", str(out)]
    done = run(root, "slo_sweep.py", "--quick", *files, KVMESH_TRACES=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Not evidence: a quick run." in done.stdout
    for figure in ("split_over_unified_code", "split_over_whole_code"):
        assert figure in done.stdout
    page = html.read_text()
    assert not re.search(r"https?://|<script|<link|src=", page)
    curves = json.loads(out.read_text())["workloads"]["code"]["curves"]
    assert [curve["name"] for curve in curves] == ["split", "strict", "fitted", "unified", "whole"]
    # A knee is marked for each, and shares fall beyond it.
    assert page.count("<circle") == 5
    for curve in curves:
        assert curve["points"][0][1] > curve["points"][-1][1]


def test_a_sweep_judges_requests_as_the_simulator_does(root):
    code = """
        from slo_sweep import PROFILE, WARM_UP, Sweep, Workload, arrangements
        from trace_rows import Arrival
        from kvmesh.simulate.profiles import load_profile
        from kvmesh.simulate.replay import replay
        profile = load_profile(PROFILE)
        arrivals = [Arrival(30.0 * n, 300 + 97 * (n % 90), 10 + n % 40) for n in range(600)]
        sweep = Sweep(Workload("x", "x", "x", "interactive", 16), arrivals, profile, [1])
        for one in arrangements(profile, 9_000)[:3]:
            theirs = replay(sweep.trace, one.cluster, one.policy, speed=1.5,
                            seed=1, warm_up=WARM_UP)["summary"]["goodput_share"]
            print(one.name, theirs, sweep.run(one, 1.5, 1).within)
    """
    done = run(root, "-c", dedent(code))
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == ["split", "strict", "unified"]
    for name, theirs, ours in lines:
        assert float(ours) == pytest.approx(float(theirs), abs=1e-9), name


def test_a_policys_rate_is_read_between_two_runs_and_void_ones_do_not_count(root):
    code = """
        from mixed_trace import Run, Walk, figures_of
        def run(policy, rate, good, late=1.0, cpu=0.1):
            one = {"class": "interactive", "requests": 100, "good": good}
            return Run(policy, rate, {"classes": [one], "own_cpu": cpu,
                                      "late_ms": {"max": late}}, 0.5, 0)
        ours = Walk("cost", [run("cost", 10, 100), run("cost", 15, 0, late=5.1),
                             run("cost", 16, 0, cpu=0.51), run("cost", 20, 95),
                             run("cost", 30, 85)])
        theirs = Walk("round-robin", [run("round-robin", 10, 80)])
        others = Walk("random", [run("random", 10, 95), run("random", 20, 85)])
        beyond = Walk("least-loaded", [run("least-loaded", 10, 99)])
        for walk in (ours, theirs, others, beyond):
            rate, seen = walk.knee()
            print(round(rate, 6), seen)
        waits = "round-robin:arrival"
        first_come = Walk(waits, [run(waits, 5, 95), run(waits, 10, 85)])
        for figure in figures_of([ours, theirs, others, first_come]):
            print(figure.name, round(figure.value, 6))
        print(len(figures_of([ours, others, beyond])))
    """
    done = run(root, "-c", dedent(code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "25.0 True", "0.0 True", "15.0 True", "10 False",
        "goodput_over_round_robin 3.333333", "goodput_over_best_baseline 3.333333",
        "placement_over_best_baseline 1.666667", "0",
    ]  # fmt: skip


def test_a_policys_rate_is_looked_for_around_the_one_predicted(root):
    code = """
        from mixed_trace import Plan, Run, bracket
        from trace_rows import Arrival
        plan = Plan([], [], 2)
        rows = [Arrival(1_000 * n, 1, 1) for n in range(9)]
        def knee(true, first):
            asked = []
            def run_at(rate, arrivals):
                asked.append(rate)
                good = 95 if rate < true else 40
                one = {"class": "interactive", "requests": 100, "good": good}
                return Run("p", rate, {"classes": [one], "own_cpu": 0, "late_ms": {"max": 0}}, 0, 0)
            found = bracket("p", rows, plan, first, run_at).knee()
            return len(asked), min(asked) < found[0] < max(asked), asked[0] == first
        print(knee(10.5, 10), knee(9.5, 10), knee(14, 10), knee(7, 10))
    """
    done = run(root, "-c", dedent(code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == (
        "(2, True, True) (2, True, True) (4, True, True) (5, True, True)"
    )


def test_a_mixed_load_is_compared_in_the_simulator_too(root, tmp_path):
    for name, prompt in (("conv", 300), ("code", 1_500)):
        azure_rows(tmp_path / f"azure_{name}_2023_part1.csv", 1_200, prompt)
    out = tmp_path / "mixed.json"
    arguments = ["--quick", "--simulated", "--rates", "10,60", "--json", str(out)]
    done = run(root, "mixed_trace.py", *arguments, KVMESH_TRACES=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Not evidence: a quick run. In the simulator" in done.stdout
    runs = json.loads(out.read_text())["runs"]
    assert [(run["policy"], run["rate"]) for run in runs] == [
        (policy, rate)
        for policy in ("cost", "round-robin:arrival", "round-robin")
        for rate in (10, 60)
    ]
    for one in runs:
        classes = {of["class"]: of for of in one["figures"]["classes"]}
        assert set(classes) == {"interactive", "standard"}
        for of in classes.values():
            ends = ("good", "late_first_token", "slow_tokens", "failed")
            assert sum(of[end] for end in ends) == of["requests"] > 0


def test_a_mixed_load_has_its_rate_and_prefixes_that_repeat(root):
    code = """
        from itertools import takewhile
        from mixed_trace import at_rate
        from trace_rows import Arrival, with_prefixes
        rows = [Arrival(n * n, 100 + 40 * (n % 60), 5) for n in range(2_000)]
        scaled = at_rate(rows, 20, 600)
        print(len(scaled), scaled[0].at_ms, 29_000 < scaled[-1].at_ms < 30_000)
        given = with_prefixes(rows, 16, "seed")
        assert given == with_prefixes(rows, 16, "seed") != with_prefixes(rows, 16, "other")
        assert all(len(one.blocks) == one.prompt // 16 for one in given)
        seen, hits, blocks = set(), 0, 0
        for one in given:
            hits += sum(1 for _ in takewhile(seen.__contains__, one.blocks))
            blocks += len(one.blocks)
            seen |= set(one.blocks)
        print(0.2 < hits / blocks < 0.8)
    """
    done = run(root, "-c", dedent(code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["600 0.0 True", "True"]


def test_vllms_load_client_is_given_the_same_prompts_and_wrong_answers_count(root):
    code = """
        import json
        from bench_serve import BLOCK_TOKENS, read, trace_lines
        from trace_rows import Arrival
        arrivals = [Arrival(0.0, 200, 5, (7, 8, 9)), Arrival(20.0, 130, 6, (7, 8)),
                    Arrival(30.0, 64, 7, (7,)), Arrival(40.0, 3, 8)]
        lines = [json.loads(line) for line in trace_lines(arrivals).splitlines()]
        for line, one in zip(lines, arrivals, strict=True):
            # It makes a block's tokens for each, and of the last one what is left.
            hashes, length = line["hash_ids"], line["input_length"]
            assert len(hashes) == -(-length // BLOCK_TOKENS)
            assert hashes[:len(one.blocks)] == list(one.blocks)
            assert (length, line["output_length"]) == (one.prompt, one.output)
        own = [name for line in lines for name in line["hash_ids"] if name < 0]
        assert len(set(own)) == len(own) == 3
        told = {"errors": ["", "broke", "", ""], "input_lens": [200, 130, 64, 3],
                "output_lens": [5, 6, 7, 9], "start_times": [10.0, 10.02, 10.035, 10.04]}
        told |= {f"p{part}_{what}_ms": part / 10
                 for part in (50, 90, 99) for what in ("ttft", "tpot")}
        run = read(told, arrivals)
        print(run.requests, run.wrong, run.error, round(run.late_ms, 3), run.ttft_ms["p90"])
    """
    done = run(root, "-c", dedent(code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "2", "broke", "5.0", "9.0"]


def test_a_run_on_vllm_is_evidence_where_the_machine_was_its_own_and_all_of_it_ran(root):
    code = """
        from alternating import BUSY_LIMIT, is_evidence
        from isolation_load import Phase
        from vllm_pd import was_busy
        calm, busy = Phase(0.0, 1.0, 0), Phase(1.0, 1.0, 0, others_share=BUSY_LIMIT + 0.01)
        for phases, quick in (([calm], False), ([calm, busy], False), ([calm], True)):
            print(is_evidence(quick=quick, busy=was_busy(phases)))
    """
    done = run(root, "-c", dedent(code))
    assert done.returncode == 0, done.stderr
    told = ["Not evidence: the machine was busy.", "Not evidence: a quick run."]
    assert done.stdout.splitlines() == ["True", told[0], "False", told[1], "False"]


def test_full_load_is_that_of_the_best_baseline_and_who_is_worse_is_asked_once(root):
    code = """
        from routing_quality_cells import highest
        for loads in ([150, 90, 151, 149], [90, 150, 200, 3], [7, 0, 255]):
            best, asked = 0, []
            for load in loads:
                asked.append(0)
                def served(at):
                    asked[-1] += 1
                    return at <= load
                best = highest(best, 256, served)
            assert max(loads) * 0.98 < best <= max(loads), (loads, best)
            print(best, asked[1:])
    """
    done = run(root, "-c", dedent(code))
    assert done.returncode == 0, done.stderr
    asked = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines()]
    assert [asked[0], asked[1][-1], asked[2][0]] == [[1, 1, 1], 1, 1]
    assert min(asked[1][0], asked[2][1]) > 1


def test_one_that_fails_or_lacks_its_input_stops_no_other(root, tmp_path):
    programs = {"breaks": "exit(3)", "lacks": "exit(77)", "works": "print('reached')"}
    for name, code in programs.items():
        (tmp_path / f"{name}.py").write_text(code)
    files = [str(tmp_path / f"{name}.py") for name in programs]
    done = run(root, "run_all.py", "--results", str(tmp_path / "results"), *files)
    assert done.returncode == 1
    assert "reached" in done.stdout
    assert "skipped, their input is missing (see above): lacks" in done.stdout
    assert "FAILED: breaks (status 3)" in done.stderr

    done = run(root, "run_all.py", "--results", str(tmp_path / "results"), *files[1:])
    assert done.returncode == 0, done.stderr


def test_people_who_chat_take_turns_as_the_load_says(root):
    code = """
        from isolation_load import Answer, _Chat, arrivals
        chat = _Chat("seed")
        talking = [chat.take() for _ in range(5)]
        print(chat.extra, len({one.name for one in talking}))
        for at, one in enumerate(talking[::-1]):
            chat.answered(one, Answer(0.0, ended=1.0, ids=[7] * 64), float(at))
        # The longest idle one speaks next; the one that was opened beside them is gone.
        print(chat.take() is talking[3])
        seen = {}
        chat = _Chat("other")
        for turn in range(200):
            one = chat.take()
            seen[one.name] = seen.get(one.name, 0) + 1
            chat.answered(one, Answer(0.0, ended=1.0), float(turn))
        print(chat.extra, max(seen.values()), sum(seen.values()))
        alone, storm = arrivals(60.0, "a", 60.0), arrivals(120.0, "a", 60.0)
        print(storm == alone + [60.0 + at for at in alone], arrivals(60.0, "b", 60.0) != alone)
    """
    done = run(root, "-c", dedent(code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 5", "True", "0 5 200", "True True"]


def test_what_a_storm_costs_is_read_from_all_that_was_asked(root, tmp_path):
    code = f"""
        import json
        from math import isnan
        from pathlib import Path
        from isolation_load import Answer, Phase
        from isolation_report import Measured, Ratios, write_raw
        def phase(documents, gaps, *read):
            turn = Answer(0.0, [1.0 + gap for gap in gaps], 2.0)
            return Phase(0.0, 120.0, documents, [turn], list(read), took_s=120.0)
        def of(count):
            alone = phase(0, [0.1 * n for n in range(count)])
            storm = phase(1, [0.12 * n for n in range(count)],
                          Answer(0.0, [20.0], 30.0), Answer(30.0, [], None))
            return Measured("d", "", [alone], [storm])
        few, enough = (Ratios.of(of(count), 1 / 30, 30.0) for count in (300, 302))
        print(isnan(few.itl_p99), round(enough.itl_p99, 3), round(enough.itl_p95, 3))
        # The gap of 120 ms is one step of the stream's own, and 1.2 of one alone.
        print(round(enough.second_steps, 3), round(enough.second_company_steps, 3))
        # The second document was cut off after 90 s, and is the slowest.
        print(enough.slowest, round(enough.share_of_rate, 3))
        out = Path({str(tmp_path / "raw.json")!r})
        write_raw(out, "", {{"d": of(2), "d, two documents": of(3)}})
        raw = json.loads(out.read_text())["arrangements"]
        print(*(len(one["phases"][0]["turns"][0]["tokens"]) for one in raw.values()))
    """
    done = run(root, "-c", dedent(code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True 1.2 1.2", "1.2 1.0", "3.0 1.0", "2 3"]


def test_what_overload_costs_is_read_from_all_that_was_asked(root):
    code = """
        import random
        from overload import CASES, FULL, SHARES
        from overload_load import Asked, Phase, arrivals, honesty, recovery_s, row, rss_ratio
        # Of 10/s that can be served: 0.8, ten times and 0.8 again.
        for keep in CASES.values():
            for phase in FULL.phases(10.0, keep):
                print(*(round(phase.rates[name], 3) for name in SHARES), end="; ")
            print()
        found = arrivals([Phase(100.0, {"batch": 1.0}), Phase(10.0, {"batch": 80.0})],
                         random.Random(1))
        assert found == sorted(found) and 0 < found[0][0] and found[-1][0] < 110
        early = sum(at < 100 for at, _ in found)
        print(60 < early < 140, 600 < len(found) - early < 1_000)

        def answered(sent, ms, **more):
            return Asked("interactive", sent, sent + ms / 1e3, finished=True, **more)
        def shed(sent, **more):
            return Asked("interactive", sent, shed=sent + 0.002, told_s=1.0, **more)
        asked = [answered(at, 100 * (1 + at)) for at in range(4)]
        asked += [shed(2.5), shed(3.5, returns=True), answered(3.6, 1, returns=True),
                  Asked("interactive", 3.7, failed="gone"), Asked("batch", 1.0), answered(4, 1)]
        one = row(asked, "interactive", 0.0, 4.0)
        print(one.asked, one.answered, one.shed, one.failed, round(one.ttft_p50_ms),
              round(one.ttft_p95_ms), round(one.refusal_p95_ms, 3))
        print(row(asked, "standard", 0.0, 4.0).ttft_p50_ms, honesty(asked, 0.0, 4.0),
              honesty(asked, 0.0, 3.6))
        print(rss_ratio([(0.0, 50.0), (1.0, 40.0), (2.0, 60.0), (3.0, 45.0)], 2.0))

        # Slow ones up to 3 s after the overload's end at 10, and one that is shed at 14.
        after = [answered(10 + at / 4, 900 if at < 12 else 129) for at in range(80)]
        print(recovery_s(after, 100.0, 10.0, 30.0), recovery_s(after, 99.0, 10.0, 30.0),
              recovery_s([*after, shed(14.0)], 100.0, 10.0, 30.0),
              recovery_s([*after, Asked("interactive", 15.5)], 100.0, 10.0, 30.0),
              recovery_s([*after, shed(29.0)], 100.0, 25.5, 30.5),
              recovery_s(after[:4], 1e6, 10.0, 30.0))
    """
    done = run(root, "-c", dedent(code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "4.0 2.0 2.0; 50.0 25.0 25.0; 4.0 2.0 2.0; ",
        "4.0 2.0 2.0; 4.0 48.0 48.0; 4.0 2.0 2.0; ",
        "True True",
        "6 4 1 1 300 400 2.0",
        "None (2, 1) (1, 0)",
        "1.2",
        "1.0 None 5.0 6.0 None None",
    ]


def test_growth_is_read_after_the_warm_up_and_little_of_it_is_flat(root):
    code = """
        from collections import Counter
        from churn import Memory, Outcome, figures_of, growth
        from churn_load import Tally
        def of(name, role, resident):
            samples = [(100.0 + at, resident(at / 3_600)) for at in range(-50, 3_700)]
            return growth(Memory(name, role, samples), 100.0, 3_700.0)
        # Until the warm-up's end memory grows fast, and what comes before and after is not looked at.
        def filled(grown_h, base=40.0):
            return lambda h: (900.0 if h < 0 or h > 1 else
                              base - 60 * max(0.0, 1 / 6 - h) + grown_h * h)
        growths = [of("r0", "router", filled(0.9)), of("r1", "router", filled(1.1)),
                   of("p", "prefill", filled(1.1, 80.0)), of("d", "decode", filled(-5.0))]
        for one in growths:
            print(one.name, *(round(x, 2) for x in (one.warm, one.end, one.peak, one.grown_h,
                                                     one.allowed_h)), one.is_flat)
        tally = Tally(ends=Counter({"finished": 5, "given up": 2})) + Tally(ends=Counter(bad=1))
        left = {"p: blocks in use": 3.0, "router-0: fd": 1.0}
        told = {one.name: one.value
                for one in figures_of(Outcome(tally, 3_600.0, growths, left, 9, 9, {}))}
        print(*(round(told[name], 2) for name in
                ("router_rss_warm_mib", "router_rss_growth_mib_h", "prefill_rss_growth_mib_h",
                 "processes_not_flat", "left_over", "requests", "given_up_requests",
                 "bad_requests", "failed_requests")))
    """
    done = run(root, "-c", dedent(code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "r0 40.18 40.87 40.9 0.9 1.0 True",
        "r1 40.22 41.06 41.1 1.1 1.0 False",
        "p 80.22 81.06 81.1 1.1 1.6 True",
        "d 38.99 35.17 39.17 -5.0 1.0 True",
        "40.22 1.1 1.1 1 4.0 8 2 1 0",
    ]
