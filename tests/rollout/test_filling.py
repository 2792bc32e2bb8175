"""Dynamic sampling fills the batch: which prompts a step draws, keeps and trains on, with sampling replaced by a table.

A prompt's digit says how many of its four answers are right: 0 and 4 have no signal.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from treepo_mega.config import Config, ConfigError, check, parse_config
from treepo_mega.data.prompts import Prompt
from treepo_mega.monitor.explain import why_nothing
from treepo_mega.monitor.timers import Timers
from treepo_mega.rollout.collect import BatchNotFilled, Collector, Forest, draws
from treepo_mega.rollout.jobs import Job
from treepo_mega.rollout.round import SampledRound
from treepo_mega.tree.advantage import set_rewards
from treepo_mega.tree.node import ROOT, Tree

WIDTH = 4


MINIMAL = {"model": {"hf_checkpoint": "none"}, "data": {"train": [{"reasoning_gym": "chain_sum"}]}}


def config(**rollout: Any) -> Config:
    return parse_config({**MINIMAL, "rollout": {"rollout_batch_size": 3, "n_samples_per_prompt": WIDTH, **rollout}})


class Table(Collector):
    """A collector whose sampling and grading is the digit of the prompt's id; `x` is not finished in this step."""

    def __init__(self, cfg: Config, digits: str) -> None:
        self.asked: list[str] = []
        ids = iter([f"{index}-{digit}" for index, digit in enumerate(digits)])
        take = lambda count: [Prompt(next(ids), "", [1], "", "exact", "test") for _ in range(count)]  # noqa: E731
        tally = {"total": 8, "lost": {}, "reasons": {}}
        pool = SimpleNamespace(take_tally=lambda: tally)
        super().__init__(cfg, None, pool, SimpleNamespace(take=take), Timers())  # type: ignore[arg-type]

    def sample(self, jobs: list[Job], step: int) -> tuple[list[Tree], dict[str, float]]:
        self.asked.append(" ".join(job.prompt.id for job in jobs))
        trees = []
        for job in jobs:
            digit = job.prompt.id[-1]
            if digit == "x" and job.state is None:
                self.carried.append({"prompt": asdict(job.prompt), "state": {"begun": True}})
                continue
            trees.append(graded(job.prompt.id, 2 if digit == "x" else int(digit)))
        sums = ("engine_steps", "running", "idle_s", "engine_s", "stolen", "gradings", "gradings_early")
        counts = dict.fromkeys(("lost", "idle_share_max", *sums), 0.0)
        return trees, counts


def graded(name: str, right: int, width: int = WIDTH) -> Tree:
    tree = Tree.start(name, [1])
    for _ in range(width):
        node = tree.add_child(ROOT)
        node.tokens, node.logprobs, node.stop = [5, 6], [0.0, 0.0], "eos"
        tree.leaves.append(node.id)
    set_rewards(tree, [float(index < right) for index in range(width)])
    return tree


def names(forest: Forest) -> list[str]:
    return [tree.prompt_id for tree in forest.trees]


def test_draws_what_is_missing_until_the_batch_is_full():
    collector = Table(config(), "020413")
    forest = collector.collect(0)
    assert collector.asked == ["0-0 1-2 2-0", "3-4 4-1", "5-3"]
    assert names(forest) == ["1-2", "4-1", "5-3"]
    assert forest.metrics["rollout/prompts_trained"] == 3
    assert forest.metrics["rollout/prompts_dropped_zero_std"] == 3
    assert forest.metrics["rollout/refills"] == 2


def test_oversampling_saves_refills_and_says_what_was_left_over():
    collector = Table(config(oversample=2.0), "0204131")
    forest = collector.collect(0)
    assert collector.asked == ["0-0 1-2 2-0 3-4 4-1 5-3"]
    assert names(forest) == ["1-2", "4-1", "5-3"]
    collector = Table(config(oversample=2.0), "1213310")
    forest = collector.collect(0)
    assert names(forest) == ["0-1", "1-2", "2-1"], "the first in the order of drawing"
    assert (forest.metrics["rollout/prompts_surplus"], forest.metrics["rollout/prompts_dropped_zero_std"]) == (3, 0)


def test_a_step_that_is_not_full_says_so_and_goes_on(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        forest = Table(config(max_refills=1), "00100").collect(7)
    assert names(forest) == ["2-1"]
    assert forest.metrics["rollout/prompts_trained"] == 1
    said = caplog.text
    assert "step 7: 1 of 3 prompts (rollout.rollout_batch_size) have rewards that differ, after 1 refills" in said
    assert "rollout.max_refills 1, rollout.oversample 1)" in said and "The step goes on with 1" in said


def test_or_it_ends_the_run_where_a_smaller_batch_is_not_allowed():
    cfg = config(max_refills=1, allow_smaller_batch=False, filter_metric="acc")
    with pytest.raises(
        BatchNotFilled, match=r"1 of 3 prompts .* have verdicts \(rollout.filter_metric acc\) that differ"
    ):
        Table(cfg, "00100").collect(0)
    with pytest.raises(BatchNotFilled, match=r"or set rollout\.allow_smaller_batch=true"):
        Table(cfg, "00100").collect(0)


def test_the_filter_looks_at_verdicts_before_penalties():
    class Shaped(Table):
        def sample(self, jobs: list[Job], step: int) -> tuple[list[Tree], dict[str, float]]:
            trees, counts = super().sample(jobs, step)
            for tree in trees:
                tree.rewards[0] -= 0.5
            return trees, counts

    assert names(Shaped(config(), "0412").collect(0)) == ["0-0", "1-4", "2-1"]
    assert names(Shaped(config(filter_metric="acc"), "041213").collect(0)) == ["2-1", "3-2", "4-1"]


def test_a_filter_plugin_says_which_trees_train(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("def few(tree, step): return sum(tree.verdicts) == step\n")
    cfg = config(filter_metric=f"{file}:few", max_refills=2)
    forest = Table(cfg, "10201112").collect(1)
    assert names(forest) == ["0-1", "4-1", "5-1"]
    cfg = config(filter_metric=f"{file}:few", max_refills=1, allow_smaller_batch=False)
    with pytest.raises(BatchNotFilled, match=rf"step 3: 1 of 3 prompts .* were kept by {file}:few \(rollout.filter_m"):
        Table(cfg, "30000").collect(3)
    odd = {"rollout": {"dynamic_sampling": False, "filter_metric": f"{file}:few", "segment": {"length": 64}}}
    with pytest.raises(ConfigError, match=r"filter_metric .*few needs rollout\.dynamic_sampling"):
        check(parse_config({**MINIMAL, **odd}), 1)


def test_a_step_whose_trees_are_all_carried_over_is_no_shortage(caplog: pytest.LogCaptureFixture):
    collector = Table(config(segment={"length": 64}, partial_rollout=64, allow_smaller_batch=False), "xxx1")
    with caplog.at_level(logging.WARNING):
        forest = collector.collect(0)
    assert forest.trees == [] and caplog.text == ""
    assert why_nothing(forest.metrics) == "no tree was finished, 3 go on in the next step (rollout.partial_rollout)"
    assert names(collector.collect(1)) == ["0-x", "1-x", "2-x"], "they are the next step's batch"
    assert collector.asked == ["0-x 1-x 2-x", "0-x 1-x 2-x"]


class Handfuls(Table):
    """A digit says how many of the first two leaves are right; of the later ones, every second one."""

    def sample(self, jobs: list[Job], step: int) -> tuple[list[Tree], dict[str, float]]:
        trees, counts = super().sample(jobs, step)
        self.asked[-1] = " ".join(f"{job.prompt.id}:{job.leaves}" for job in jobs)
        out = []
        for job, tree in zip(jobs, trees, strict=True):
            assert job.begun is None or job.begun.rewards, "its first leaves are graded"
            first = int(job.prompt.id[-1])
            rewards = [float(index < first if index < 2 else index % 2) for index in range(job.leaves)]
            out.append(graded(tree.prompt_id, 0, width=job.leaves))
            set_rewards(out[-1], rewards)
        return out, counts


def adaptive(**rollout: Any) -> Config:
    return config(leaves="adaptive", first_leaves=2, **rollout)


def leaves(forest: Forest) -> list[tuple[str, int]]:
    return [(tree.prompt_id, len(tree.leaves)) for tree in forest.trees]


def test_settled_prompts_leave_their_leaves_to_mixed_ones():
    """Three prompts of four leaves are twelve: three handfuls of two, and the rest for the two that are mixed."""
    collector = Handfuls(adaptive(dynamic_sampling=False), "1021")
    forest = collector.collect(0)
    assert collector.asked == ["0-1:2 1-0:2 2-2:2", "0-1:8"]
    assert leaves(forest) == [("0-1", 8), ("1-0", 2), ("2-2", 2)]
    metrics = forest.metrics
    assert [metrics[f"tree/leaves_per_prompt_{name}"] for name in ("min", "mean", "max")] == [2, 4, 8]
    assert metrics["tree/leaves"] == 12 and metrics["tree/shortfall"] == 0 and metrics["rollout/leaves_unspent"] == 0


def test_new_prompts_begin_while_the_mixed_ones_cannot_take_all(caplog: pytest.LogCaptureFixture):
    collector = Handfuls(adaptive(most_leaves=4), "0010112")
    with caplog.at_level(logging.WARNING):
        forest = collector.collect(0)
    # 12 - 6 left, one mixed prompt may take 2: two more begin. Then 2 are left, which the mixed ones take.
    assert collector.asked == ["0-0:2 1-0:2 2-1:2", "3-0:2 4-1:2", "2-1:3 4-1:3"]
    assert leaves(forest) == [("2-1", 3), ("4-1", 3)]
    assert caplog.text == "", "the step has spent its leaves: nothing is missing"
    assert forest.metrics["rollout/refills"] == 1 and forest.metrics["rollout/prompts_dropped_zero_std"] == 3


def test_leaves_that_nobody_can_take_are_said(caplog: pytest.LogCaptureFixture):
    collector = Handfuls(adaptive(most_leaves=4, max_refills=0), "001")
    with caplog.at_level(logging.WARNING):
        forest = collector.collect(0)
    assert leaves(forest) == [("2-1", 4)] and "1 of 3 prompts" in caplog.text
    assert forest.metrics["rollout/leaves_unspent"] == 4


def test_a_tree_grows_on_where_it_began_whichever_round_that_was(monkeypatch: pytest.MonkeyPatch):
    """Its first leaves lie in the prefix cache of that engine."""
    collector = Handfuls(adaptive(most_leaves=4), "0010112")
    dealt: list[dict[str, int] | None] = []

    def sample_and_grade(generator, pool, jobs, make_row, *, engines, **_) -> SampledRound:
        ids = [job.prompt.id for job in jobs]
        dealt.append(None if engines is None else dict(zip(ids, engines, strict=True)))
        trees, counts = Handfuls.sample(collector, jobs, 0)
        rows = {index: {"tree": tree.to_dict(), "lost": 0, "numbers": {}} for index, tree in enumerate(trees)}
        # A prompt's number names the engine that takes it.
        return SampledRound(rows=rows, counts=counts, engines={index: int(name[0]) for index, name in enumerate(ids)})

    monkeypatch.setattr("treepo_mega.rollout.collect.sample_and_grade", sample_and_grade)
    monkeypatch.setattr("treepo_mega.rollout.collect.with_earlier_grades", lambda job, row: Tree.from_dict(row["tree"]))
    costs = SimpleNamespace(expected=lambda prompt: 1.0, update=lambda prompts, trees: None)
    collector.generator = SimpleNamespace(costs=costs)  # type: ignore[assignment]
    monkeypatch.setattr(collector, "sample", lambda jobs, step: Collector.sample(collector, jobs, step))
    collector.collect(0)
    *rounds, last = dealt
    assert rounds == [None, None], "by cost, and a refill"
    assert last == {"2-1": 2, "4-1": 4}


def test_a_step_of_settled_prompts_grows_nothing():
    collector = Handfuls(adaptive(max_refills=0), "020")
    assert collector.collect(0).trees == [] and len(collector.asked) == 1


def test_draws():
    assert [draws(missing, 1.0) for missing in (-1, 0, 5)] == [0, 0, 5]
    assert [draws(10, 1.1), draws(1, 1.01), draws(7, 3.0)] == [11, 2, 21]
