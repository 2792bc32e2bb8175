"""Plug-ins by path: what is found at the start, what is found in a call, and that good ones decide."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treepo_mega.actor.batch import advantages, lesson_of
from treepo_mega.cli import main
from treepo_mega.config import Config, ConfigError, load_config
from treepo_mega.data.rewards.verifiers import OPTIONAL_PARAMETERS, PARAMETERS, VerifierError, check_verifier
from treepo_mega.monitor.metrics import MetricsLogger
from treepo_mega.plugins import CONTRACTS, PluginError, check_plugins, open_sinks, plugin_advantages, split_of
from treepo_mega.plugins.record import record_plugins
from treepo_mega.plugins.trial import example_tree
from treepo_mega.tree.node import Tree
from treepo_mega.tree.search import Segment, TreeSearch
from treepo_mega.tree.segments import Segments
from treepo_mega.tree.stop import StopRules

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "plugins"
KEYS = {
    "advantage": "algo.advantage_estimator={}",
    "filter": "rollout.filter_metric={}",
    "budget": "rollout.branching.budget.kind={}",
    "logger": "logging.sinks=[{}]",
}


def config(*overrides: str) -> Config:
    return load_config(None, ["model.hf_checkpoint=unused", "data.train=[{path: unused.jsonl}]", *overrides])


def written(folder: Path, text: str, function: str = "f") -> str:
    file = folder / "mine.py"
    file.write_text(text)
    return f"{file}:{function}"


def problem(kind: str, name: str, *more: str) -> str:
    """The one problem that the start finds with this plug-in."""
    (found,) = check_plugins(config(KEYS[kind].format(name), *more))
    assert name in found and KEYS[kind].partition("=")[0] in found, found
    return found


GOOD = {
    "advantage": "advantage.py:against_siblings",
    "filter": "filter.py:neither_easy_nor_hopeless",
    "budget": "budget.py:most_surprised",
    "logger": "logger.py:append_csv",
}


@pytest.mark.parametrize("kind", GOOD)
def test_every_example_passes_the_start(kind):
    assert check_plugins(config(KEYS[kind].format(EXAMPLES / GOOD[kind]))) == []


def test_the_example_reward_passes_too_and_the_contract_is_what_workers_pass():
    check_verifier(f"{EXAMPLES}/reward.py:form")
    assert (CONTRACTS["reward"].required, CONTRACTS["reward"].optional) == (PARAMETERS, OPTIONAL_PARAMETERS)


@pytest.mark.parametrize(
    "kind, text, says",
    [
        ("advantage", "def f(trees): return []", "nothing is passed for its parameter 'trees' (did you mean 'tree'?)"),
        ("advantage", "def f(tree, step): return []", "nothing is passed for its parameter 'step'"),
        ("advantage", "def f(*, shares=None): return []", "it has no parameter 'tree' (did you mean 'shares'?)"),
        ("advantage", "def f(tree, /): return []", "'tree' is positional-only"),
        ("budget", "def f(total): return [total]", "it has no parameter 'paths'; expected the parameters total, paths"),
        ("filter", "async def f(tree): return True", "'f' is async, expected a plain function"),
        ("filter", "f = 3", "'f' is int, expected a function"),
        ("filter", "def g(tree): return True", "mine.py defines no 'f'; it defines: g"),
        ("logger", "def f(step): pass", "it has no parameter 'metrics'"),
        ("logger", "import nowhere_to_be_found\ndef f(step, metrics): pass", "cannot be imported: ModuleNotFoundError"),
        ("logger", "def f(step, metrics:", "mine.py is not valid Python"),
        (
            "advantage",
            "def f(tree): return [float('nan')] * 3",
            "returned nan at [0] (node 2); expected a finite number",
        ),
        ("advantage", "def f(tree): return [1.0, 2.0]", "returned 2 values; expected one for each of the 3 leaves, or"),
        ("advantage", "def f(tree): return ['1'] * 5", "returned str '1' at [0] (node 0); expected a number"),
        ("advantage", "def f(tree): return None", "returned NoneType None; expected a list of numbers"),
        ("advantage", "def f(tree): return [1 / (tree.rewards[0] - 1)]", "raised ZeroDivisionError: "),
        ("advantage", "def f(tree): tree.rewards[0] = 9; return tree.rewards", "changed the tree that it was given"),
        ("advantage", "import random\ndef f(tree): return [random.random()] * 3", "another answer when called again"),
        ("filter", "def f(tree): return 1", "returned int 1; expected True or False"),
        ("budget", "def f(total, paths): return [total] * len(paths)", "[5, 5, 5], which add up to 15; expected 5"),
        ("budget", "def f(total, paths): return [0, 2, 3]", "returned [0] = 0; expected a whole number of at least 1"),
        ("budget", "def f(total, paths): return [1.5, 1.5, 2]", "returned [0] = 1.5; expected a whole number"),
        ("budget", "def f(total, paths): return [5]", "returned 1 numbers; expected one for each of the 3 paths"),
    ],
)
def test_a_bad_one_is_named_at_the_start(tmp_path, kind, text, says):
    name = written(tmp_path, text + "\n")
    assert says in problem(kind, name)


def test_a_raise_names_prompt_and_line(tmp_path):
    name = written(tmp_path, "def f(tree):\n    return tree.scores\n")
    found = problem("advantage", name)
    assert "raised AttributeError: " in found and "(mine.py:2) for prompt 'the example tree'" in found


def test_the_command_stops_before_anything_heavy(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    name = written(tmp_path, "def f(trees): return []\n")
    status = main(["train", "examples/tiny_cpu.yaml", "--dry-run", KEYS["advantage"].format(name)])
    said = capsys.readouterr().err
    assert status == 2 and f"advantage plug-in {name!r} (algo.advantage_estimator): nothing is passed" in said


def test_a_missing_file_or_function_comes_with_the_nearest(tmp_path):
    written(tmp_path, "def advantage(tree): return tree.rewards\n")
    assert "cannot read" in problem("advantage", f"{tmp_path}/mien.py:advantage")
    assert "(did you mean 'mine.py'?)" in problem("advantage", f"{tmp_path}/mien.py:advantage")
    assert "(did you mean 'advantage'?)" in problem("advantage", f"{tmp_path}/mine.py:advantges")


def test_a_word_that_is_neither_ours_nor_a_path_names_both():
    with pytest.raises(ConfigError, match=r"kind: Input should be path/to/file.py:function, or 'equal'.*'entropy'\?"):
        config("rollout.branching.budget.kind=entropie")
    with pytest.raises(ConfigError, match=r"sinks\.0: Input should be path/to/file\.py:function, or 'tensorboard'"):
        config("logging.sinks=[csv]")


def test_trees_without_signal_are_tried_where_they_can_reach_an_advantage(tmp_path):
    name = written(
        tmp_path,
        "def f(tree):\n    mean = sum(tree.rewards) / len(tree.rewards)\n"
        "    std = sum((r - mean) ** 2 for r in tree.rewards) ** 0.5\n"
        "    return [(r - mean) / std for r in tree.rewards]\n",
    )
    assert check_plugins(config(KEYS["advantage"].format(name))) == [], "dynamic sampling lets none through"
    found = problem("advantage", name, "rollout.dynamic_sampling=false")
    assert "ZeroDivisionError" in found and "for prompt 'the example tree whose rewards are all equal'" in found


@pytest.mark.parametrize(
    "text, says",
    [
        ("async def f({}, threshold): return 1.0", "nothing is passed for its parameter 'threshold'"),
        (
            "def f(source, solution_str, ground_truth, extra_info=None): return 1.0",
            "'source' (did you mean 'data_source'?)",
        ),
        ("def f(data_source, solution_str, ground_truth): return 1.0", "no parameter 'extra_info'"),
        ("def f({}, threshold): return 1.0", "nothing is passed for its parameter 'threshold'"),
    ],
)
def test_a_reward_is_looked_at_without_being_run(tmp_path, text, says):
    name = written(tmp_path, text.format(", ".join(PARAMETERS)) + "\nraise SystemExit('ran')\n")
    with pytest.raises(VerifierError) as error:
        check_verifier(name)
    assert says in str(error.value)


def two_trees() -> list[Tree]:
    trees = [example_tree(), example_tree((0.0, 0.0, 1.0))]
    trees[1].prompt_id = "another"
    return trees


def test_advantages_per_leaf_or_per_node_fold_as_ours_do(tmp_path):
    """A plug-in that copies an estimator of ours gives its masses, token by token."""
    text = """
from treepo_mega.tree.advantage import leaf_advantages
from treepo_mega.tree.node_advantage import node_advantages
def leaf(tree, shares, algo):
    return tuple(leaf_advantages(tree, "grpo", shares=shares, divide_by_std=algo.norm_adv_by_std))
def node(tree, shares=None): return __import__("numpy").array(node_advantages(tree, "rloo", shares=shares))
"""
    file = tmp_path / "mine.py"
    file.write_text(text)
    for function, ours in (("leaf", "grpo"), ("node", "rloo")):
        for more in ([], ["algo.whiten_advantages=true"], ["algo.leaf_weight=descent"]):
            masses = []
            for estimator in (f"{file}:{function}", ours):
                cfg = config(f"algo.advantage_estimator={estimator}", *more)
                values = advantages(two_trees(), cfg)
                credit = lesson_of(Segments.from_trees(two_trees(), [0, 1]), values, two_trees(), cfg).credit()
                masses.append(np.stack([credit.A_pos, credit.A_neg, credit.n]))
            assert np.abs(masses[0]).max() > 0
            np.testing.assert_allclose(masses[0], masses[1], rtol=0, atol=1e-12)


def test_an_advantage_that_cannot_decide_between_leaf_and_node_is_named(tmp_path):
    name = written(tmp_path, "def f(tree): return [1.0] * (5 if tree.prompt_id == 'another' else 3)\n")
    wanted = "one value a node for prompt 'another' and one a leaf for prompt 'the example tree'"
    with pytest.raises(PluginError, match=wanted):
        advantages(two_trees(), config(KEYS["advantage"].format(name)))


def test_the_example_advantage_by_hand():
    name = str(EXAMPLES / GOOD["advantage"])
    # Node 1 has the leaves 1 and 0 below it, its sibling 4 the leaf 1; below it 1 stands against 0.
    assert plugin_advantages(name, example_tree(), shares=None, algo=config().algo) == [0, -0.5, 1, -1, 0.5]


def grow(kind: str, transfer: str) -> list[int]:
    """Leaves below each of the root's two children. The first child's tokens surprise more than the second's."""
    shape = ("rollout.n_samples_per_prompt=8", "rollout.segment.length=2", "rollout.max_response_len=16")
    quiet = ("rollout.stop.answer_box=false", "rollout.stop.repetition_window=0", "rollout.branching.factor=2")
    rollout = config(KEYS["budget"].format(kind), f"rollout.branching.transfer={transfer}", *shape, *quiet).rollout
    stop = StopRules.from_config(rollout, [99], lambda ids: "")
    search = TreeSearch("p", [7], rollout, seed=3, stop=stop, split=split_of(rollout, "p"))
    while not search.done:
        for want in search.wants():
            logprob = -2.0 if search.tree.nodes[want.node_id].path[0] == 0 else -1.0
            search.take(want.node_id, Segment([5] * want.max_tokens, [logprob] * want.max_tokens, "length"))
    below = search.tree.leaves_below()
    return [len(below[child]) for child in search.tree.nodes[0].children]


@pytest.mark.parametrize("transfer", ["level", "quota"])
def test_a_budget_plugin_says_who_branches(tmp_path, transfer):
    assert grow("equal", transfer) == [4, 4]
    first = written(tmp_path, "def f(total, paths): return [total - len(paths) + 1] + [1] * (len(paths) - 1)\n")
    assert grow(first, transfer) == [7, 1]
    example = grow(str(EXAMPLES / GOOD["budget"]), transfer)
    assert example == [4, 4], "what is left over is dealt in turn"
    second = written(tmp_path, "def g(total, paths): return [len(path.path) for path in paths]\n", "g")
    with pytest.raises(PluginError, match=r"returned \[1, 1\], which add up to 2; expected ., for prompt 'p' \(total"):
        grow(second, transfer)


def test_a_budget_plugin_sees_the_next_tokens_when_it_asks():
    kind = KEYS["budget"].format(EXAMPLES / GOOD["budget"])
    assert config(kind).rollout.peek == 0
    asks = config(kind, "rollout.branching.budget.signal=branch_point", "rollout.branching.budget.top_k=7")
    assert asks.rollout.peek == 7


def test_a_sink_gets_what_is_written_and_stops_the_run_when_it_raises(tmp_path, monkeypatch):
    monkeypatch.setenv("METRICS_CSV", str(tmp_path / "all.csv"))
    with MetricsLogger(tmp_path, tensorboard=False, sinks=open_sinks([str(EXAMPLES / GOOD["logger"])])) as log:
        log.log(1, {"train/loss": 0.5, "grad-norm": math.inf})
        log.log(1, {"eval/accuracy": 0.25})
    rows = (tmp_path / "all.csv").read_text().splitlines()
    assert rows == [
        "1,train/loss,0.5",
        "1,train/nonfinite_metrics,1",
        "1,eval/accuracy,0.25",
        "1,train/nonfinite_metrics,1",
    ]
    name = written(tmp_path, "def f(step, metrics): raise OSError('the tracker is down')\n")
    with (
        MetricsLogger(tmp_path / "b", tensorboard=False, sinks=open_sinks([name])) as log,
        pytest.raises(PluginError, match=r"raised OSError: the tracker is down \(mine.py:1\) for step 3"),
    ):
        log.log(3, {"train/loss": 1.0})
    assert json.loads((tmp_path / "b" / "metrics.jsonl").read_text())["step"] == 3, "the run's own record has the step"


def test_the_source_travels_with_the_run_and_a_change_is_said(tmp_path):
    name = written(tmp_path, "def f(tree): return tree.rewards\n")
    cfg = config(KEYS["advantage"].format(name), f"data.verifier={EXAMPLES}/reward.py:form")
    run = tmp_path / "run"
    assert record_plugins(cfg, run, resumed=False) == []
    index: dict[str, Any] = json.loads((run / "plugins" / "plugins.json").read_text())
    assert sorted(index) == ["algo.advantage_estimator", "data.verifier"]
    first = run / "plugins" / index["algo.advantage_estimator"]["copy"]
    assert first.read_text() == Path(name.partition(":")[0]).read_text()
    assert record_plugins(cfg, run, resumed=True) == [], "nothing has changed"
    written(tmp_path, "def f(tree): return [0.0 for _ in tree.rewards]\n")
    (said,) = record_plugins(cfg, run, resumed=True)
    assert said.startswith(f"algo.advantage_estimator: {name} has changed since this run began: sha256 ")
    assert first.exists() and len(list((run / "plugins").glob("*.py"))) == 3
    assert not (tmp_path / "none").exists() and record_plugins(config(), tmp_path / "none", resumed=False) == []
    assert not (tmp_path / "none").exists(), "a run without plug-ins has no such folder"
