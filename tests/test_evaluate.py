"""`treepo-mega eval`: the command on the tiny reasoner, its figures, its page, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks import CLI, REPO, run_ranks
from treepo_mega.cli import main
from treepo_mega.evaluate import Plan, Point, best_within, page
from treepo_mega.monitor.report.page import plotly_script


def point(sampler: str, k: int, tokens: float, majority: float) -> Point:
    return Point(sampler, k, tokens, 0.5, 0.75, majority, 30.0, 0.0, 0, 1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """One start of the engine: both samplers, three numbers of samples, cut by a compute budget."""
    output = tmp_path_factory.mktemp("eval")
    options = ["--samples", "1,4,2,32", "--branch-factor", "2,4", "--compute-budget", "700", "--output", str(output)]
    return output, run_ranks(1, CLI, "eval", "examples/tiny_cpu.yaml", "eval.max_prompts=24", *options)


def test_every_sampler_has_its_series_up_to_the_compute_budget(run):
    output, said = run
    data = json.loads((output / "eval.json").read_text())
    series: dict[str, list[dict]] = {}
    for p in data["points"]:
        series.setdefault(p["sampler"], []).append(p)
    assert list(series) == ["sequential", "tree b=2", "tree b=4"]
    for name, points in series.items():
        assert [p["k"] for p in points] == [1, 2, 4], "32 samples would cost more than the budget"
        assert f"{name:>12}  stopped before 32 samples: over 700 tokens a prompt" in said
        for p in points:
            assert 0 <= p["avg"] <= p["passed"] <= 1 and p["majority"] <= p["passed"]
            assert p["tokens"] <= 700 and p["lost"] == 0
        assert points[0]["passed"] == points[0]["avg"] == points[0]["majority"]
        assert [p["tokens"] for p in points] == sorted(p["tokens"] for p in points)
    one = series["sequential"][0]
    assert one["tokens"] == pytest.approx(one["response_len"] + 15.5, abs=4), "the prompt and the response, once each"
    assert series["tree b=2"][0]["tokens"] == one["tokens"], "a tree with one leaf is a sample"
    assert set(data["best"]) == set(series)


def test_the_page_is_self_contained_and_shows_the_curves(run):
    html = (run[0] / "eval.html").read_text()
    assert html.count('class="chart"') == 3 and "default-src 'none'" in html and plotly_script() in html
    assert "tokens a prompt" in html and "tree b=4" in html and "(best)" in html


def test_the_best_within_a_budget_is_the_cheapest_of_equals():
    points = [point("a", 1, 10, 0.5), point("a", 2, 20, 0.6), point("a", 4, 40, 0.6), point("a", 8, 80, 0.9)]
    assert best_within(points, 50)["a"].k == 2 and best_within(points, None)["a"].k == 8
    assert best_within(points, 5) == {}


def test_names_are_escaped():
    plan = Plan(("tree",), (1,), (2,), 1.0, None, Path("."))
    html = page([point("<b>", 1, 10, 0.5)], {}, plan, "<img src=x>")
    html = html.replace(plotly_script(), "")
    assert "<b>" not in html and "<img" not in html and "&lt;b&gt;" in html


@pytest.mark.parametrize(
    "options, says",
    [
        (["--temperature", "0"], "greedy"),
        (["--compute-budget", "0"], "--compute-budget must be positive"),
        (["rollout.branching.facto=2"], "did you mean 'factor'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_starts(options, says, capsys):
    assert main(["eval", str(REPO / "examples" / "tiny_cpu.yaml"), *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("samples", ["0", "1,a", ""])
def test_numbers_of_samples_are_positive(samples, capsys):
    with pytest.raises(SystemExit):
        main(["eval", "x.yaml", "--samples", samples])
    assert "expected positive numbers" in capsys.readouterr().err
