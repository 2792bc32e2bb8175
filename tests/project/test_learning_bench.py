"""The learning bench's figures: where a curve reaches a goal, what a step costs, and what it says of arms and names."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench" / "learning.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("learning_bench", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(accuracies: list[float], tokens: float, cpu_s: float, seed: int = 1) -> dict:
    curve = [
        {"step": 10 * index, "tokens": tokens * index, "cpu_s": cpu_s * index, "accuracy": accuracy}
        for index, accuracy in enumerate(accuracies)
    ]
    return {"seed": seed, "accuracy": accuracies[-1], "curve": curve}


def test_a_step_costs_its_sampling_and_four_forward_passes(bench):
    rows = [
        {"step": 0, "eval/accuracy": 0.5},
        {
            "step": 1,
            "rollout/forwarded_tokens": 100.0,
            "perf/packed_tokens": 10.0,
            "cpu_s/step": 2.0,
            "timing_s/step": 3.0,
        },
        {
            "step": 2,
            "rollout/forwarded_tokens": 50.0,
            "perf/packed_tokens": 5.0,
            "cpu_s/step": 1.0,
            "eval/accuracy": 0.6,
        },
    ]
    first, last = bench.curve(rows)
    assert first == {"step": 0, "tokens": 0.0, "cpu_s": 0.0, "wall_s": 0.0, "accuracy": 0.5}
    assert last == {"step": 2, "tokens": 210.0, "cpu_s": 3.0, "wall_s": 3.0, "accuracy": 0.6}


def test_reaching_a_goal_is_interpolated_on_the_mean_curve(bench):
    runs = [result([0.0, 0.4, 0.8], 100, 1), result([0.0, 0.6, 0.8], 100, 1)]
    assert bench.reach(runs, 0.65, "tokens") == pytest.approx(150)
    assert bench.reach(runs, 0.9, "tokens") == float("inf")
    assert bench.reach([result([0.5, 0.3, 0.8], 100, 1)], 0.4, "tokens") == 0, "it has been there from the start"


def test_an_arm_at_half_the_price_reaches_the_baseline_at_half_of_its_tokens(bench):
    baseline = [result([0.4, 0.6, 0.8], 100, 10, seed) for seed in (1, 2)]
    arm = [result([0.4, 0.6, 0.8], 50, 8, seed) for seed in (1, 2)]
    found = bench.compare(baseline, arm, np.random.default_rng(0))
    assert found["tokens_ratio_at_equal_accuracy"] == 0.5 and found["cpu_ratio_at_equal_accuracy"] == 0.8
    assert found["tokens_ci95"] == [0.5, 0.5] and found["accuracy_difference_at_equal_steps"] == 0
    worse = bench.compare(baseline, [result([0.4, 0.5, 0.7], 50, 8)], np.random.default_rng(0))
    assert worse["tokens_ratio_at_equal_accuracy"] is None and worse["accuracy_sd"] is None


def test_every_arm_is_a_configuration_and_every_stored_run_one_of_them(bench):
    import yaml

    from treepo_mega.config import ConfigError, check, load_config

    plan = yaml.safe_load(bench.ARMS.read_text())
    root = BENCH.parents[2]
    fits: dict[str, set[str]] = {name: set() for name in plan["arms"]}
    refused: dict[tuple[str, str], str] = {}
    for task_name, task in plan["tasks"].items():
        for name, arm in plan["arms"].items():
            try:
                check(load_config(root / task["config"], [*task["overrides"], *arm]), 1)
            except ConfigError as error:
                refused[task_name, name] = str(error)
            else:
                fits[name].add(task_name)
    # Shapes of trees are for answers of a certain length; a key that is none fits nowhere.
    assert all("out of reach" in message for message in refused.values()), refused
    assert all(fits.values()), fits
    for task_name, task in plan["tasks"].items():
        ran = {path.name.partition(".seed")[0] for path in (bench.RESULTS / task_name).glob("*.json")}
        needed = {task["baseline"], task["claim"], *(ran - set(plan["elsewhere"]))}
        assert all(task_name in fits[name] for name in needed), task_name
    assert all((root / script).is_file() for script in plan["elsewhere"].values())
    for path in bench.RESULTS.glob("*/*.json"):
        arm, _, seed = path.name.removesuffix(".json").partition(".seed")
        assert arm in (plan["arms"] | plan["elsewhere"]) and json.loads(path.read_text())["seed"] == int(seed)


def test_an_unknown_arm_is_answered_with_the_nearest(bench, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["learning.py", "run", "--arms", "flat-gpro"])
    with pytest.raises(SystemExit, match=r"no arm 'flat-gpro' in learning\.yaml.*flat-grpo"):
        bench.main()


def test_trl_gets_the_recipe_s_batch_and_its_prompts(monkeypatch, capsys):
    import yaml

    from treepo_mega.config import load_config

    monkeypatch.syspath_prepend(str(BENCH.parent / "against_trl"))
    side_by_side = importlib.import_module("side_by_side")
    cfg = load_config(BENCH.parents[2] / "examples" / "tiny_cpu.yaml")
    settings = side_by_side.settings_of(cfg, 7, micro_batch=16)
    assert settings["micro_batch"] == 16 and settings["rows"][0]["extra"] == "{}"
    assert (settings["prompts"] * settings["samples"], settings["updates"], settings["seed"]) == (256, 2, 7)
    assert len(settings["rows"]) == 3072
    first = settings["rows"][0]
    assert first["verifier"] == "boxed" and first["prompt_tokens"] == len(first["prompt"]) + 1
    assert side_by_side.ARM in yaml.safe_load((BENCH.with_suffix(".yaml")).read_text())["elsewhere"]
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", "--trl-python", "/nowhere/python"])
    assert side_by_side.main() == 2
    assert "requirements.txt says how to make it" in capsys.readouterr().err


def test_steps_against_trl_are_as_many(bench):
    """Later steps may cost less: a run that ended early is compared with as many steps of the other."""
    theirs = [result([0.0, 0.5], 1, 10.0)]
    ours = [result([0.0, 0.6, 0.7, 0.7], 1, 4.0)]
    ours[0]["curve"][2]["cpu_s"] = ours[0]["curve"][3]["cpu_s"] = 4.5
    found = bench.against_trl(theirs, ours)
    assert found["step_ratio"] == 0.4 and found["cpu_ratio_at_equal_accuracy"] == pytest.approx(
        4 * 5 / 6 / 10, abs=1e-3
    )


def test_differences_are_of_the_same_seeds(bench):
    baseline = [result([0.0, accuracy], 1, 1, seed) for seed, accuracy in ((1, 0.5), (2, 0.7))]
    arm = [result([0.0, accuracy], 1, 1, seed) for seed, accuracy in ((2, 0.8), (1, 0.6), (9, 0.0))]
    rng = np.random.default_rng(0)
    found = bench.learning_curves.paired(baseline, arm, rng, 200)
    assert found == {"paired_difference": 0.1, "paired_ci95": [0.1, 0.1]}, "seed 9 has no partner"
    assert bench.learning_curves.paired(baseline, arm[2:], rng, 200)["paired_difference"] is None
    assert bench.learning_curves.paired(baseline, arm[:1], rng, 200)["paired_ci95"] is None


def test_a_fit_gives_the_compute_to_equal_accuracy_or_says_why_not(bench):
    from treepo_mega.monitor.scaling_fit import value_at

    def runs(price: float) -> list[dict]:
        shares = value_at(np.arange(12) * 10.0, 0.4, 0.9, 1.5, 30.0)
        return [result(list(shares + 0.002 * seed), price, price, seed) for seed in (1, 2, 3)]

    found = bench.learning_curves.fitted(runs(2.0), runs(1.0), "cpu_s")
    assert found["ratio"] == pytest.approx(0.5, abs=0.02) and found["asymptote"] == pytest.approx(0.9, abs=0.02)
    short = [result([0.4, 0.5], 1, 1)]
    assert "four parameters need" in bench.learning_curves.fitted(short, short, "tokens")["problem"]


def test_an_arm_is_held_against_trl_on_common_seeds(bench):
    trl = [result([0.4, 0.6, 0.8], 1, 4, seed) for seed in (1, 2)]
    found = bench.against_trl(trl, [result([0.4, 0.8, 0.9], 1, 2, 1)])
    assert found == {"seeds": [1], "step_ratio": 0.5, "cpu_ratio_at_equal_accuracy": 0.25}
    assert bench.against_trl(trl, [result([0.4, 0.8], 1, 2, 7)]) is None


def test_a_plot_is_small_and_the_same_each_time(bench, tmp_path):
    pytest.importorskip("matplotlib")
    arms = {"flat-grpo": [result([0.4, 0.6, 0.8], 1e6, 4, seed) for seed in (1, 2)]}
    for name in ("one", "two"):
        bench.learning_curves.plot("carry", arms, tmp_path / f"{name}.svg")
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text() and "<svg" in text and len(text) < 200_000


def test_the_report_has_a_headline_of_every_task_and_of_trl(bench, monkeypatch, tmp_path, capsys):
    """The last line is what the claims quote: the claimed arm's ratios with their intervals."""
    import yaml

    plan = yaml.safe_load(bench.ARMS.read_text())
    folder = tmp_path / "carry"
    folder.mkdir()
    for arm, price in (("flat-grpo", 100), (plan["tasks"]["carry"]["claim"], 50), (bench.TRL, 80)):
        for seed in (1, 2):
            target = folder / f"{arm}.seed{seed}.json"
            target.write_text(json.dumps(result([0.4, 0.6, 0.8], price, price / 10, seed)))
    monkeypatch.setattr(sys, "argv", ["learning.py", "--report", "--results", str(tmp_path)])
    assert bench.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (task,) = found["tasks"]
    assert (task["name"], task["seeds"], task["claim"]) == ("carry", [1, 2], plan["tasks"]["carry"]["claim"])
    assert (task["tokens_ratio_at_equal_accuracy"], task["cpu_ratio_at_equal_accuracy"]) == (0.5, 0.5)
    assert task["accuracy_difference_at_equal_steps"] == 0
    assert task["ci95"] == {"tokens": [0.5, 0.5], "cpu": [0.5, 0.5], "accuracy": [0, 0]}
    assert found["vs_trl"]["step_ratio"] == 0.625 and found["vs_trl"]["cpu_ratio_at_equal_accuracy"] == 0.625
    for path in folder.glob("*-*.seed*"):
        if not path.name.startswith("flat-grpo"):
            path.unlink()
    assert bench.main() == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert alone["vs_trl"] is None and alone["tasks"][0]["claim"] is None and alone["tasks"][0]["ci95"] is None


def test_every_task_claims_an_arm_that_there_is(bench):
    import yaml

    plan = yaml.safe_load(bench.ARMS.read_text())
    assert {task["claim"] for task in plan["tasks"].values()} <= set(plan["arms"])
