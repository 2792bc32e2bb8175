"""The report: every second and every token of a recorded run, what is said of broken ones, and the page itself."""

import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models

from tests.monitor.browser import NAMES, Browser, find_browser
from treepo_mega.cli import main
from treepo_mega.monitor.metrics import MetricsLogger
from treepo_mega.monitor.report import Asked, ReportError, comparison, page, write_live, write_report
from treepo_mega.monitor.report.charts import MOST_POINTS, lines
from treepo_mega.monitor.report.comparison import compare, to_dict
from treepo_mega.monitor.report.hours import AGAIN, BETWEEN, OTHER, RESTARTS, account, waterfall
from treepo_mega.monitor.report.numbers import percentile, short
from treepo_mega.monitor.report.read import load_run
from treepo_mega.monitor.report.slurm import charged
from treepo_mega.monitor.report.stragglers import find_stragglers
from treepo_mega.monitor.report.summary import summarise
from treepo_mega.monitor.scaling_fit import value_at
from treepo_mega.tree.node import Node, Tree

RECORDED = Path(__file__).parent / "demo_run"
"""The first 20 steps of a demo run on two ranks, with evaluations at 0, 10 and 20 and a checkpoint at 20."""
ATTACK = "</script><script>window.owned=1</script><img src=x onerror='window.owned=2'>"
NOW = 2e9


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(comparison, "DRAWS", 30)


@pytest.fixture
def short_plotly(few_draws, monkeypatch):
    """A page without the 5 MB that are plotly's own, and intervals of few draws."""
    monkeypatch.setattr(page, "plotly_script", lambda: "/* plotly */")


@pytest.fixture
def run(tmp_path):
    """A run of 10 steps: rollout 3 s and update 1 s of 5 s, then 4 s and 2 s of 7 s; two GPUs."""
    rows = []
    for step in range(10):
        late = step >= 5
        rows.append(
            {
                "step": step,
                "time": 1000.0 + 5 * step + (2 * (step - 4) if late else 0),
                "timing_s/rollout": 4.0 if late else 3.0,
                "timing_s/update": 2.0 if late else 1.0,
                "timing_s/step": 7.0 if late else 5.0,
                "perf/step_s": 7.0 if late else 5.0,
                "perf/packed_tokens": 700.0,
                "perf/unique_tokens_per_s_per_gpu": 50.0 if late else 70.0,
                "perf/packed_token_ratio": 0.5,
                "rollout/reward_mean": step / 10,
                "rollout/engine_idle_share": 0.25,
                "rollout/idle_share/tail": 0.5 if late else 0.25,
                "rollout/prompts_trained": 12.0,
                "rollout/prompts_dropped_zero_std": 4.0,
                "tree/unique_tokens": 400 if late else 100,
                "tree/flat_tokens": 800 if late else 400,
                "tree/leaves": 100,
                "gpu/energy_kj": 360.0,
                "reward/lost": step % 2,
            }
        )
    return write_run(tmp_path / "run", rows, train={"num_rollouts": 9})


def write_run(path, rows, **config):
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def seen(path, **options):
    return summarise(load_run(path), now=NOW, **options)


def test_phases_of_a_recorded_run_are_its_wall_time_and_tokens_its_counters():
    rows = [json.loads(line) for line in (RECORDED / "metrics.jsonl").read_text().splitlines()]
    figures = seen(RECORDED).figures
    clock = rows[-1]["time"] - rows[0]["time"]
    named = sum(p["total"] for p in figures["phases"] if p["name"] not in (BETWEEN, RESTARTS))
    assert named == pytest.approx(clock, rel=0.02), "the phases' own clocks against the lines' time stamps"
    assert figures["wall_s"] == pytest.approx(clock, abs=0.05)
    assert sum(p["total"] for p in figures["phases"]) == pytest.approx(figures["wall_s"])
    assert sum(p["share"] for p in figures["phases"]) == pytest.approx(1)
    for name, metric in (("generated", "rollout/generated_tokens"), ("unique", "tree/unique_tokens")):
        assert figures["tokens"][name] == sum(row.get(metric, 0) for row in rows) > 0
    assert figures["tokens"]["flat"] == sum(row.get("tree/flat_tokens", 0) for row in rows)
    # Rates by phase, times seconds and ranks, are the tokens again.
    step_s = sum(row.get("timing_s/step", 0) for row in rows)
    rate = figures["throughput"]["step"]["unique_tokens_per_s_per_gpu"]
    assert rate * step_s * 2 == pytest.approx(sum(row.get("perf/packed_tokens", 0) for row in rows), rel=1e-5)
    assert (figures["gpus"], figures["unit"]) == (2, "core-hours")
    assert figures["hours"] == pytest.approx(2 * figures["wall_s"] / 3600)
    assert figures["status"] == "stopped at step 20 of 40"


def test_figures(run):
    found = seen(run, price=3.0)
    figures = found.figures
    assert (figures["steps"], figures["first_step"], figures["last_step"]) == (10, 0, 9)
    assert figures["status"] == "finished" and figures["notes"] == []
    assert (figures["tokens"]["unique"], figures["tokens"]["flat"], figures["tokens"]["cached"]) == (2500, 6000, None)
    assert figures["token_ratio"] == pytest.approx(2500 / 6000)
    assert figures["trends"]["rollout/reward_mean"] == {"first": 0.0, "last": 0.9, "best": 0.9, "count": 10}
    assert figures["totals"] == {"reward/lost": 5, "restarts": 0}
    assert (figures["wall_s"], figures["gpus"], figures["unit"]) == (60, 2, "GPU-hours")
    # Of the whole run: 7,000 tokens in 60 s on two GPUs, not the mean of 70 and 50.
    assert figures["throughput"]["step"]["unique_tokens_per_s_per_gpu"] == pytest.approx(7000 / 120)
    assert [p["name"] for p in figures["phases"]] == ["rollout", "update", OTHER]
    assert [p["hours"] for p in figures["phases"]] == pytest.approx([35 / 1800, 15 / 1800, 10 / 1800])
    assert figures["idle"] == {"tail": pytest.approx((0.25 * 15 + 0.5 * 20) / 35)}
    cost = figures["cost"]
    assert cost["energy_kwh"] == pytest.approx(1) and cost["energy_kwh_per_1000"] == pytest.approx(1)
    assert cost["cost"] == pytest.approx(0.1) and cost["reward_gain_per_hour"] == pytest.approx(0.9 * 30)


def test_a_wait_for_graders_amid_sampling_is_grading(run):
    loaded = load_run(run)
    loaded.columns["rollout/engine_grader_wait_share"] = np.full(len(loaded.steps), 0.2)
    bars = {bar.name: bar.hours * 1800 for bar in waterfall(loaded, account(loaded))}
    assert bars["grading"] == pytest.approx(35 * 0.2) and bars["engines idle"] == pytest.approx(35 / 4)
    assert bars["refills"] == pytest.approx(35 * 0.55 / 4) and bars["useful work"] == pytest.approx(
        35 * 0.55 * 0.75 + 15
    )


def test_a_waterfall_adds_up(run):
    found = account(load_run(run))
    bars = {bar.name: bar.hours * 1800 for bar in waterfall(load_run(run), found)}
    assert bars["engines idle"] == pytest.approx(35 / 4)
    assert bars["refills"] == pytest.approx(35 * 0.75 / 4)
    useful = 35 * 0.75 * 0.75 + 15
    assert bars["useful work"] == pytest.approx(useful) and bars[OTHER] == pytest.approx(10)
    assert bars["trees: training"] == pytest.approx(-15)
    assert bars["trees: sampling"] == pytest.approx(-(15 * 3 + 20) * 0.75 * 0.75)
    flat = bars["flat, without losses"]
    assert flat + bars["trees: sampling"] + bars["trees: training"] == pytest.approx(useful)
    totals = ("flat, without losses", "useful work", "measured")
    losses = sum(hours for name, hours in bars.items() if name not in totals and not name.startswith("trees"))
    assert useful + losses == pytest.approx(bars["measured"]) and bars["measured"] == pytest.approx(60)


def test_a_plan_stands_beside_the_run_and_gives_the_bubble(run, tmp_path, short_plotly, capsys):
    plan = {
        "seconds": {"rollout": 2.0, "update": 1.0, "reshard": 0.5, "step": 6.0},
        "bubble": 0.25,
        "update_mfu": 0.4,
        "tokens_per_s_per_gpu": {"unique": 60.0, "flat": 90.0},
        "memory": {"phases": [{"phase": "update", "items": [["x", 2.0**30], ["y", 2.0**31]]}]},
        "refit": None,
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert main(["report", str(run), "--plan", str(tmp_path / "plan.json"), "--output", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "report.json").read_text())["runs"][0]
    rows = {row["what"]: (row["measured"], row["planned"]) for row in figures["plan"]}
    assert rows["rollout, s"] == (3, 2) and rows["reshard, s"] == (None, 0.5) and rows["step, s"] == (5, 6)
    assert rows["unique tokens/s per GPU"] == (pytest.approx(7000 / 120), 60) and rows["memory in update, GiB"] == (
        None,
        3,
    )
    bars = {bar["name"]: bar["hours"] * 1800 for bar in figures["waterfall"]}
    assert bars["pipeline bubble"] == pytest.approx(15 * 0.25 / 1.25)
    assert bars["useful work"] == pytest.approx(35 * 0.75 * 0.75 + 12) and bars["measured"] == pytest.approx(60)
    assert "Against the plan" in (tmp_path / "report.html").read_text()
    (tmp_path / "plan.json").write_text("{}")
    assert main(["report", str(run), "--plan", str(tmp_path / "plan.json")]) == 2
    assert "expected the output of treepo-mega plan CONFIG --json" in capsys.readouterr().err


@pytest.fixture
def machine(run):
    """The run on two ranks, with what it logs of its ranks, memory, refits and surplus."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, row in enumerate(rows):
        late = step >= 5
        row |= {
            "memory/rollout_peak_gib": 3.0,
            "memory/update_peak_gib": 6.0 if step == 7 else 4.0,
            "ranks/update_busy_s_p50": 1.0,
            "ranks/update_busy_s_p95": 2.0,
            "ranks/update_busy_s_max": 3.0 if late else 2.0,
            # Rank 1 is the slowest more often, rank 0 by more seconds.
            "ranks/slowest": 0 if step in (2, 3) else 1,
            "ranks/slowest_s": 4.0 if step in (2, 3) else 0.5,
            "ranks/idle_share": 0.5 if late else 0.1,
            "ranks/idle_share_max": 0.6,
            "reshard/bytes_moved": 4e9,
            "reshard/bytes_over_bound": 1.25,
            "reshard/seconds": 0.75 if late else 0.25,
            "rollout/idle_share/memory": 0.125,
            "rollout/prompts_surplus": 4.0,
            "rollout/wasted_tokens": 2000.0,
        }
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def planned_refit(**changes):
    refit = {
        "world_size": 2,
        "traffic": {"by_link": {"local": 9e9, "node": 3e9, "network": 1e9}},
        "speeds": {"local": 1340.0, "node": 360.0, "network": 40.0},
        "seconds": {"local": 0.01, "node": 0.0625, "network": 0.1},
    }
    return {
        "seconds": {"step": 6.0},
        "bubble": 0.0,
        "update_mfu": None,
        "tokens_per_s_per_gpu": {"unique": 60.0, "flat": 90.0},
        "memory": {"phases": [{"phase": "update", "items": [["x", 2.0**32]]}, {"phase": "reshard", "items": []}]},
        "refit": refit | changes,
    }


def reported(run, out, plan=None):
    """(figures of report.json, tables of report.html, those of report.md); a table by its title, as rows of cells."""
    path = None
    if plan is not None:
        path = out.parent / "plan.json"
        path.write_text(json.dumps(plan))
    html, data, text = (written.read_text() for written in write_report([run], out, Asked(plan=path)))
    sections = re.findall(r"<h3>([^<]*)</h3>(?:<p[^>]*>[^<]*</p>)?<div class=.scroll.>(.*?)</table>", html)
    pages = {
        title: [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall("<tr.*?</tr>", body)[1:]]
        for title, body in sections
    }
    marks = {}
    for part in text.split("\n### ")[1:]:
        title, *lines = part.split("\n\n")[0:3]
        rows = next(block for block in lines if block.startswith("|")).splitlines()[2:]
        marks[title] = [row.strip("| ").replace("\\", "").split(" | ") for row in rows]
    return json.loads(data)["runs"][0], pages, marks


def test_memory_by_phase_stands_beside_its_plan(machine, tmp_path, short_plotly):
    figures, page_tables, marks = reported(machine, tmp_path / "out", planned_refit())
    assert figures["memory_by_phase"] == [
        {"phase": "rollout", "p50": 3, "max": 3, "planned": None},
        {"phase": "update", "p50": 4, "max": 6, "planned": 4},
        {"phase": "reshard", "p50": None, "max": None, "planned": 0},
    ]
    rows = {row["what"]: (row["measured"], row["planned"]) for row in figures["plan"]}
    assert rows["memory in update, GiB"] == (6, 4)
    expected = [["rollout", "3", "3", "-"], ["update", "4", "6", "4"], ["reshard", "-", "-", "0"]]
    assert page_tables["Memory by phase, GiB"] == marks["Memory by phase, GiB"] == expected
    assert not any(row["name"].startswith("memory/") for row in figures["memory"])
    assert seen(RECORDED).figures["memory_by_phase"] == []


def test_ranks_are_named_without_a_timeline(machine, tmp_path, short_plotly):
    figures, page_tables, marks = reported(machine, tmp_path / "out")
    ranks = figures["ranks"]
    assert ranks["slowest"] == [
        {"rank": 0, "steps": 2, "seconds": 8, "largest": 4},
        {"rank": 1, "steps": 8, "seconds": 4, "largest": 0.5},
    ]
    assert ranks["phases"] == {"update": {"p50": 1, "p95": 2, "max": 2.5}}
    # By the steps' seconds: 25 s and 35 s.
    assert ranks["idle_share"] == pytest.approx((0.1 * 25 + 0.5 * 35) / 60) and ranks["steps"] == 10
    expected = [["rank 0", "2", "20%", "8 s", "4 s"], ["rank 1", "8", "80%", "4 s", "0.5 s"]]
    assert page_tables["Stragglers"] == marks["Stragglers"] == expected
    title = "Busy by phase, over ranks"
    assert page_tables[title] == marks[title] == [["update", "1 s", "2 s", "2.5 s"]]
    html, _, text = (path.read_text() for path in sorted((tmp_path / "out").iterdir()))
    for found in (html, text):
        assert "waited for 33.3% of the steps" in found and "waited most for 60.0%" in found
    assert "no timeline by rank" not in html
    alone = seen(RECORDED)
    assert alone.figures["ranks"] is None and "no timeline by rank" in page_of(RECORDED)


def test_a_refit_stands_beside_its_bound(machine, tmp_path, short_plotly):
    figures, page_tables, marks = reported(machine, tmp_path / "out", planned_refit())
    rows = {row["what"]: (row["measured"], row["bound"], row["ratio"]) for row in figures["refit"]}
    assert rows == {
        "moved between ranks, GB": (4, pytest.approx(3.2), 1.25),
        "seconds of a refit": (0.25, 0.1, 2.5),
        # 40 GB in 5 s against 4 GB in the 0.1 s of the slowest link, and half of both for each of two ranks.
        "GB/s, all ranks": (8, 40, pytest.approx(0.2)),
        "GB/s of a rank": (4, 20, pytest.approx(0.2)),
    }
    title = "Refit against its bound"
    assert page_tables[title] == marks[title]
    assert page_tables[title][2] == ["GB/s, all ranks", "8", "40", "0.2"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "local 1340, node 360, network 40" in text and figures["links"]["gb_per_s"]["network"] == 40


def test_a_refit_without_a_plan_has_the_bound_of_its_bytes_alone(machine, tmp_path, short_plotly, capsys):
    figures, page_tables, marks = reported(machine, tmp_path / "out")
    title = "Refit against its bound"
    assert page_tables[title] == marks[title] == [
        ["moved between ranks, GB", "4", "3.2", "1.25"],
        ["seconds of a refit", "0.25", "-", "-"],
        ["GB/s, all ranks", "8", "-", "-"],
        ["GB/s of a rank", "4", "-", "-"],
    ]  # fmt: skip
    assert figures["links"] is None and "needs --plan" in (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "plan.json").write_text(json.dumps(planned_refit(traffic={"by_link": {"node": 1}})))
    assert main(["report", str(machine), "--plan", str(tmp_path / "plan.json")]) == 2
    assert "expected the output of treepo-mega plan CONFIG --json (KeyError: 'network')" in capsys.readouterr().err


def test_empty_room_and_dropped_surplus_are_among_the_losses(machine, tmp_path, short_plotly):
    figures, page_tables, marks = reported(machine, tmp_path / "out")
    title = "Empty room of the engines"
    expected = [["nothing left to begin", "39.3%"], ["no free KV blocks", "12.5%"]]
    assert page_tables[title] == marks[title] == expected
    assert figures["tokens"]["wasted"] == 20_000
    notes = {bar["name"]: bar["note"] for bar in figures["waterfall"]}
    assert notes["refills"].endswith("20k tokens of dropped surplus (rollout/wasted_tokens)")
    assert "20k tokens of dropped surplus" in (tmp_path / "out" / "report.md").read_text().replace("\\", "")


def test_a_resumed_run_counts_what_it_did_twice(tmp_path):
    rows = [{"step": n, "time": 100.0 * n, "timing_s/step": 100.0, "timing_s/rollout": 100.0} for n in (1, 2, 3)]
    rows += [{"step": n, "time": 1000 + 100.0 * n, "timing_s/step": 100.0, "tree/leaves": 5} for n in (3, 4)]
    path = write_run(tmp_path / "run", rows)
    found = seen(path, gpus=4)
    assert found.figures["steps"] == 4 and found.figures["totals"]["restarts"] == 1
    # 300 s to the first step 3, whose 100 s were lost; then 900 s of queue and start-up.
    assert {p["name"]: p["total"] for p in found.figures["phases"]} == {
        RESTARTS: 900, "rollout": 200, OTHER: 200, AGAIN: 100
    }  # fmt: skip
    assert found.figures["hours"] == pytest.approx(1400 * 4 / 3600)
    assert "1 lines are of steps that were done again" in found.figures["notes"][0]


def test_evaluation_and_checkpoints_lie_outside_the_step(run):
    with (run / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": 10, "timing_s/eval": 30.0, "timing_s/checkpoint": 10.0}) + "\n")
    total = {p["name"]: p["total"] for p in seen(run).figures["phases"]}
    assert total == pytest.approx({"rollout": 35, "update": 15, OTHER: 10, "eval": 30, "checkpoint": 10})


def test_broken_files_are_said_and_the_rest_is_made(run, tmp_path, short_plotly, capsys):
    good = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"step": 0, "a": "text"}\n{nonsense\n' + good + '{"step": 10, "ti')
    (run / "config.yaml").write_text("a: [1")
    (run / "summary.json").write_text("[1]")
    (run / "metrics.1.jsonl").write_text("")
    empty = write_run(tmp_path / "empty", [])
    written = write_report([run, empty], tmp_path / "out")
    notes = "\n".join(json.loads(written[1].read_text())["runs"][0]["notes"])
    for message in (
        r"metrics\.jsonl:1: left out, 'a' is 'text'; expected a number",
        r"metrics\.jsonl:2: left out, not valid JSON",
        r"metrics\.jsonl:13: left out, the last line is torn",
        r"config\.yaml: cannot be read",
        r"summary\.json: expected a mapping",
        r"older runs, which are not counted: metrics\.1\.jsonl",
    ):
        assert re.search(message, notes), message
    html = written[0].read_text()
    assert "no step was logged yet" in html and "the last line is torn" in html
    figures = json.loads(written[1].read_text())["runs"]
    assert [one["steps"] for one in figures] == [10, 0] and figures[1]["status"] == "empty"
    assert "10 steps" not in capsys.readouterr().err


def test_numbers_that_no_float_holds_are_left_out(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "metrics.jsonl").write_text(
        '{"step": 1, "time": NaN, "timing_s/step": 1e999, "grad-norm": null}\n{"step": 2, "grad-norm": 1'
        + "0" * 400
        + "}\n"
    )
    (path / "summary.json").write_text('{"x": NaN}')
    figures = seen(path).figures
    assert json.dumps(figures, allow_nan=False) and figures["wall_s"] == 0
    assert "3 values were not finite" in "".join(figures["notes"])


def test_what_is_no_run_is_named(run, tmp_path, capsys):
    for path, message in (
        (tmp_path / "rnu", "did you mean"),
        (run / "nothing", "no such run"),
        (tmp_path / "x", "holds no"),
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ReportError, match=message):
            write_report([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main(["report", str(tmp_path / "x")]) == 2
    assert main(["report", str(run), "--baseline", str(run)]) == 2
    assert "is among the runs" in capsys.readouterr().err
    assert main(["report", str(run), "--slurm-job", "12;rm"]) == 2
    assert "expected a job id" in capsys.readouterr().err


def test_a_directory_of_runs_stands_for_all_of_them(run, tmp_path, short_plotly, capsys):
    for task in ("2", "1"):
        shutil.copytree(run, tmp_path / "array" / task)
    assert main(["report", str(tmp_path / "array"), "--price", "2"]) == 0
    data = json.loads((tmp_path / "array" / "report.json").read_text())
    assert [Path(one["run"]).name for one in data["runs"]] == ["1", "2"]
    assert len(data["comparison"]["arms"]) == 1, "equal configurations are one arm"
    assert "report.md" in capsys.readouterr().out


def learner(path, seed, midpoint, *, checkpoint="m", steps=30):
    noise = np.random.default_rng(seed).normal(0, 0.01, steps)
    accuracy = value_at(np.arange(1, steps + 1) / 3600, 0.2, 0.8, 1.5, midpoint / 3600) + noise
    rows = [
        {
            "step": n,
            "time": float(n),
            "timing_s/step": 1.0,
            "eval/accuracy": float(accuracy[n - 1]),
            "rollout/forwarded_tokens": 1000,
            "rollout/generated_tokens": 800,
        }
        for n in range(1, steps + 1)
    ]
    return write_run(
        path, rows, model={"hf_checkpoint": str(checkpoint)}, train={"seed": seed}, logging={"run_dir": str(path)}
    )


def tokenizer(folder, words):
    folder.mkdir()
    Tokenizer(models.WordLevel(vocab={word: n for n, word in enumerate(words)}, unk_token=words[0])).save(
        str(folder / "tokenizer.json")
    )
    return folder


def test_against_a_baseline_the_saving_is_that_of_equal_accuracy(tmp_path, short_plotly):
    ours = [learner(tmp_path / "ours" / str(seed), seed, 4.0) for seed in (1, 2)]
    learner(tmp_path / "base", 9, 8.0)
    written = write_report([tmp_path / "ours"], tmp_path / "out", Asked(baselines=(tmp_path / "base",), gpus=1))
    data = json.loads(written[1].read_text())["comparison"]
    assert [(arm["baseline"], len(arm["runs"])) for arm in data["arms"]] == [(False, len(ours)), (True, 1)]
    hours = next(one for one in data["savings"] if one["axis"] == "hours")
    assert hours["problem"] is None and hours["ratio"] == pytest.approx(0.5, abs=0.08)
    assert hours["ci95"][0] < 0.5 < hours["ci95"][1] + 0.05
    fit = data["arms"][0]["fits"]["hours"]
    assert fit["asymptote"] == pytest.approx(0.8, abs=0.05) and len(fit["ci95"]["asymptote"]) == 2
    for text in (written[0].read_text(), written[2].read_text()):
        assert re.search(r"\d\d% saved \(95 % interval", text)


def test_a_fit_that_is_not_identified_shows_no_figure(tmp_path, short_plotly):
    learner(tmp_path / "ours", 1, 4.0, steps=4)
    learner(tmp_path / "base", 2, 8.0)
    written = write_report([tmp_path / "ours"], tmp_path / "out", Asked(baselines=(tmp_path / "base",)))
    data = json.loads(written[1].read_text())["comparison"]
    assert all(set(one) == {"arm", "axis", "problem"} and "4 points" in one["problem"] for one in data["savings"])
    assert set(data["arms"][0]["fits"]["hours"]) == {"problem", "points"}
    html = written[0].read_text()
    assert "not identifiable: 4 points" in html and "saved (" not in html


def test_tokens_of_different_tokenizers_are_not_compared(tmp_path, few_draws):
    paths = [
        learner(tmp_path / name, 1, 4.0, checkpoint=tokenizer(tmp_path / f"m{name}", words))
        for name, words in (("a", ["x", "y"]), ("b", ["x", "z"]), ("c", ["x", "y"]))
    ]
    one, other, same = [seen(path) for path in paths]
    different = compare([one], [other])
    assert "different tokenizers" in different.notes[0] and not different.same_tokens
    assert {axis for _, axis in different.savings} == {"hours"} == set(to_dict(different)["arms"][0]["fits"])
    alike = compare([one], [same])
    assert alike.same_tokens and alike.notes == []
    lost = replace(same, run=replace(same.run, config={}))
    assert "was not found" in compare([one], [lost]).notes[0]


def test_the_rank_that_the_others_wait_for_is_named(run):
    assert "logging.trace_steps" in find_stragglers(run).notes[0]
    (run / "trace").mkdir()
    for rank, waits in enumerate(([1.0, 1.0], [0.0, 0.0], [2.0, 0.5])):
        events = [{"name": "waiting for other engines", "ph": "X", "dur": wait * 1e6, "ts": 0} for wait in waits]
        events += [{"name": "sampling", "ph": "X", "dur": (5 - wait) * 1e6, "ts": 0} for wait in waits]
        (run / "trace" / f"rank_{rank}.json").write_text(json.dumps({"traceEvents": events}))
    (run / "trace" / "rank_3.json").write_text("{")
    found = find_stragglers(run)
    assert [(one.rank, one.last) for one in found.ranks] == [(1, 2), (0, 0), (2, 0)]
    assert found.phases["sampling"] == (8.0, 10.0, 10.0) and found.rounds == 2
    assert "rank_3.json: cannot be read" in found.notes[0]
    assert "came last" in page_of(run)


def page_of(*paths):
    from treepo_mega.monitor.report.sections import render

    everyone = [seen(path) for path in paths]
    return render(everyone, [], compare(everyone, []), charged([]), now=NOW)


def test_what_slurm_charged_is_shown_and_its_absence_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert charged([]).problems == [] and "no sacct" in charged([]).notes[0]
    assert "there is no sacct on this machine" in charged(["12"]).problems[0]
    stub = tmp_path / "sacct"
    lines = "12_1|tr<b>|TIMEOUT|3600|2|billing=1,gres/gpu=16,node=2|7200000\\n12_2|t|PENDING|0|0||\\nshort|line"
    stub.write_text(f"#!{shutil.which('sh', path=os.defpath)}\nprintf '{lines}'\n")
    stub.chmod(0o755)
    found = charged(["12"])
    assert [(job.gpu_hours, job.energy_kj) for job in found.jobs] == [(16.0, 7200.0), (None, None)]
    assert "left out: expected 7 fields" in found.problems[0]
    stub.write_text(f"#!{shutil.which('sh', path=os.defpath)}\necho no accounting >&2; exit 1\n")
    assert "sacct failed with status 1: no accounting" in charged(["12"]).problems[0]


def test_a_live_report_ends_with_the_run(run, tmp_path, short_plotly):
    (run / "config.yaml").write_text(yaml.safe_dump({"train": {"num_rollouts": 10}}))
    waited = []

    def one_more_step(seconds):
        assert 'data-refresh="5"' in (tmp_path / "report.html").read_text()
        waited.append(seconds)
        with (run / "metrics.jsonl").open("a") as f:
            f.write(json.dumps({"step": 10, "time": 1070.0, "timing_s/step": 5.0}) + "\n")

    write_live([run], tmp_path, Asked(), period_s=5.0, wait=one_more_step)
    assert waited == [5.0] and "data-refresh" not in (tmp_path / "report.html").read_text()
    assert main(["report", str(run), "--live", "--every", "0"]) == 2


class Markup(HTMLParser):
    """Collects what could load or run something, and checks that every tag is closed."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def hostile(run, tmp_path):
    """The run with an attack in every place that a text can come from."""
    evil = run.parent / "<img src=x onerror=window.owned=3>[b]"
    run.rename(evil)
    vocabulary = {"Q:": 0, "fine": 1, ATTACK: 2, "?": 3}
    Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    config = {"model": {"hf_checkpoint": str(tmp_path)}, ATTACK: ATTACK}
    (evil / "config.yaml").write_text(yaml.safe_dump(config))
    (evil / "summary.json").write_text(json.dumps({"note": ATTACK}))
    with (evil / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": 10, f"timing_s/{ATTACK}": 1.0, f"host/{ATTACK}_gib": 1.0}) + "\n")
        f.write(json.dumps({"step": 11, ATTACK: ATTACK}) + "\n")
    tree = Tree("train:2", [Node(0, -1, (), [0]), *(Node(n, 0, (n - 1,), [n]) for n in (1, 2, 3))], [1, 2, 3])
    tree.rewards, tree.advantages = [1.0, 0.0, 0.5], [0.5, -0.75, 0.25]
    (evil / "trees").mkdir()
    (evil / "trees" / "step_000001.jsonl").write_text(json.dumps(tree.to_dict()) + "\n")
    (evil / "trees" / "step_000002.jsonl").write_text('{"prompt_id"')
    (evil / "trace").mkdir()
    events = [{"name": ATTACK, "ph": "X", "dur": 1.0}, {"name": "sampling", "ph": "X", "dur": 1.0}]
    (evil / "trace" / "rank_0.json").write_text(json.dumps({"traceEvents": events}))
    return evil


def test_hostile_text_stays_text(run, tmp_path, short_plotly):
    html, data, text = write_report([hostile(run, tmp_path)], tmp_path / "out")
    found = html.read_text()
    markup = Markup(found)
    assert ATTACK not in found and "&lt;script&gt;window.owned=1" in found
    assert not set(markup.tags) & {"img", "link", "iframe", "object", "a"}
    assert not {one for one in markup.attributes if one.startswith("on") or one in ("src", "href")}
    assert "http" not in re.sub(r"http-equiv", "", found) and "width=device-width" in found
    # Two scripts are the page's own, whose hashes its policy names; all others are data.
    assert len(re.findall("<script>", found)) == len(re.findall("'sha256-", found)) == 2
    assert json.loads(data.read_text())["runs"][0]["steps"] == 11
    assert "<script" not in text.read_text() and "<img" not in text.read_text()


def test_what_the_model_wrote_stands_in_the_report(run, tmp_path, short_plotly):
    html = write_report([hostile(run, tmp_path)], tmp_path / "out")[0].read_text()
    rows = re.findall(r"<td>(1)</td><td[^>]*>([^<]*)</td><td[^>]*>([^<]*)</td><td><div class=.words.>", html)
    assert rows == [("1", "1", "+0.500"), ("1", "0", "-0.750")], "the best, then the worst"
    assert "step_000002.jsonl: cannot be read" in html


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    command = find_browser()
    if command is None:
        pytest.skip(f"no browser: install one of {', '.join(NAMES)} to try the report in it")
    with Browser(command, tmp_path_factory.mktemp("profile")) as started:
        yield started


def test_the_page_in_a_browser(browser, run, tmp_path):
    """Charts are drawn under the page's own policy, nothing hostile runs, and a phone scrolls one way alone."""
    html, *_ = write_report([hostile(run, tmp_path), RECORDED], tmp_path / "out")
    browser.size(1200, 900)
    browser.open(html)
    browser.evaluate("drawAll().then(() => true)")
    charts = browser.evaluate("document.querySelectorAll('.chart').length")
    drawn = "[...document.querySelectorAll('.chart')].filter(one => one.querySelector('.main-svg')).length"
    assert browser.evaluate(drawn) == charts >= 20
    names = "[...document.querySelectorAll('.legendtext')].map(one => one.textContent).join()"
    assert "<img src=x onerror" in browser.evaluate(names), "shown as text"
    light = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    browser.size(390, 800, dark=True)
    browser.wait("document.documentElement.scrollWidth <= 390")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") != light
    assert browser.evaluate("document.images.length") == 0 and browser.evaluate("window.owned") is None
    assert browser.problems == []


def test_a_long_series_is_averaged_and_keeps_its_mean():
    values = np.random.default_rng(0).normal(size=5 * MOST_POINTS)
    line = lines([("a<b", range(len(values)), values)], "step")["data"][0]
    assert len(line["x"]) == len(line["y"]) == MOST_POINTS and line["name"] == "a&lt;b"
    assert np.mean(line["y"]) == pytest.approx(values.mean(), abs=1e-5)


def test_a_logger_of_this_version_writes_what_the_report_reads(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"grad-norm": float("nan"), "timing_s/step": 2.0})
        logger.log(1, {"timing_s/eval": 1.0})
    figures = seen(tmp_path).figures
    assert figures["wall_s"] == 3 and figures["totals"]["train/nonfinite_metrics"] == 1


def test_percentile_is_nearest_rank():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [percentile(values, s) for s in (0.0, 0.5, 0.95, 1.0)] == [1.0, 3.0, 5.0, 5.0]
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_short_numbers():
    found = [short(x) for x in (0, 0.5, 1234, 12345, 1234567, 2.5e9, 0.00012, -20000)]
    assert found == ["0", "0.5", "1234", "12.3k", "1.23M", "2.5G", "1.2e-04", "-20k"]
