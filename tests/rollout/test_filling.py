"""Dynamic sampling fills the batch: which prompts a step draws, keeps and trains on, with sampling replaced by a table.

A prompt's digit says how many of its four answers are right: 0 and 4 have no signal.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from treepo_mega.config import Config, ConfigError, check, parse_config
from treepo_mega.data.prompts import Prompt
from treepo_mega.monitor.explain import why_nothing
from treepo_mega.monitor.timers import Timers
from treepo_mega.rollout.collect import BatchNotFilled, Collector, Forest, Graded, draws
from treepo_mega.rollout.jobs import Job, carry
from treepo_mega.rollout.refill import RefillRule
from treepo_mega.rollout.round import SampledRound
from treepo_mega.rollout.teaching import Teaches, judge
from treepo_mega.tree.advantage import set_rewards
from treepo_mega.tree.node import ROOT, Tree

WIDTH = 4
GENERATED = 9
"""Tokens that sampling a tree cost."""


MINIMAL = {"model": {"hf_checkpoint": "none"}, "data": {"train": [{"reasoning_gym": "chain_sum"}]}}


def config(**rollout: Any) -> Config:
    return parse_config({**MINIMAL, "rollout": {"rollout_batch_size": 3, "n_samples_per_prompt": WIDTH, **rollout}})


class Cursor:
    """Prompts named `<position>-<digit>`."""

    def __init__(self, digits: str, position: int = 0) -> None:
        self.digits = digits
        self.position = position

    def take(self, count: int) -> list[Prompt]:
        first, self.position = self.position, self.position + count
        places = range(first, self.position)
        return [Prompt(f"{place}-{self.digits[place]}", "", [1], "", "exact", "test") for place in places]

    def lookahead(self) -> Cursor:
        return Cursor(self.digits, self.position)


class Table(Collector):
    """A collector whose sampling and grading is the digit of the prompt's id; `x` is not finished in this step.

    Trees end in the order that `rng` says; None: in the order in which they began.
    """

    def __init__(self, cfg: Config, digits: str, rng: random.Random | None = None) -> None:
        self.asked: list[str] = []
        self.rng = rng
        tally = {"total": 8, "lost": {}, "reasons": {}}
        pool = SimpleNamespace(take_tally=lambda: tally)
        super().__init__(cfg, None, pool, Cursor(digits), Timers())  # type: ignore[arg-type]

    def sample(
        self, jobs: Sequence[Job], step: int, rule: RefillRule | None = None
    ) -> tuple[list[Graded], dict[str, float]]:
        flying = list(range(len(jobs)))
        begun, empty = list(flying), 0
        ended: dict[int, Graded | None] = {}
        while flying:
            index = flying.pop(0 if self.rng is None else self.rng.randrange(len(flying)))
            tree = self.grown(jobs[index])
            # Of a tree that grows on, the first leaves have said it.
            grows = jobs[index].begun is not None
            teaches = Teaches(True, True) if tree is None or grows else judge(tree, self.cfg, step=step)
            ended[index] = None if tree is None else Graded(tree, teaches)
            empty += not teaches.trains
            position = None if rule is None or teaches.trains else rule.replaces(empty)
            if position is not None:
                flying.append(position)
                begun.append(position)
        assert begun == sorted(set(begun)), "in the order of the cursor, each once"
        self.asked.append(" ".join(self.name(jobs[index]) for index in begun))
        for index in begun:
            if ended[index] is None:
                self.carried.append(carry(jobs[index], {"begun": True}, None))
        names = ("engine_steps", "running", "idle_s", "engine_s", "grader_wait_s", "idle_share_max")
        counts = dict.fromkeys((*names, "lost", "stolen", "gradings", "gradings_early"), 0.0)
        counts["prompts_begun"] = float(len(begun))
        return [found for index in begun if (found := ended[index]) is not None], counts

    def name(self, job: Job) -> str:
        """What `asked` says of a job."""
        return job.prompt.id

    def grown(self, job: Job) -> Tree | None:
        """Its graded tree; None: it is not finished."""
        digit = job.prompt.id[-1]
        if digit == "x":
            return None if job.state is None else graded(job.prompt.id, 2)
        return graded(job.prompt.id, int(digit))


def graded(name: str, right: int, width: int = WIDTH) -> Tree:
    tree = Tree.start(name, [1])
    for _ in range(width):
        node = tree.add_child(ROOT)
        node.tokens, node.logprobs, node.stop = [5, 6], [0.0, 0.0], "eos"
        tree.leaves.append(node.id)
    tree.counts["generated_tokens"] = GENERATED
    set_rewards(tree, [float(index < right) for index in range(width)])
    return tree


def names(forest: Forest) -> list[str]:
    return [tree.prompt_id for tree in forest.trees]


def test_prompts_without_signal_are_replaced_until_the_batch_is_full():
    collector = Table(config(), "0204131")
    forest = collector.collect(0)
    assert collector.asked == ["0-0 1-2 2-0 3-4 4-1 5-3"] and collector.cursor.position == 6
    assert names(forest) == ["1-2", "4-1", "5-3"]
    assert forest.metrics["rollout/prompts_trained"] == 3
    assert forest.metrics["rollout/prompts_dropped_zero_std"] == 3
    assert forest.metrics["rollout/signal_share"] == 0.5
    assert forest.metrics["rollout/refills"] == 3


def test_oversampling_saves_refills_and_says_what_was_left_over():
    collector = Table(config(oversample=2.0), "0204131")
    forest = collector.collect(0)
    assert collector.asked == ["0-0 1-2 2-0 3-4 4-1 5-3"]
    assert names(forest) == ["1-2", "4-1", "5-3"] and forest.metrics["rollout/refills"] == 0
    collector = Table(config(oversample=2.0), "1213310")
    forest = collector.collect(0)
    assert forest.metrics["rollout/wasted_tokens"] == 3 * GENERATED
    assert names(forest) == ["0-1", "1-2", "2-1"], "the first in the order of drawing"
    assert (forest.metrics["rollout/prompts_surplus"], forest.metrics["rollout/prompts_dropped_zero_std"]) == (3, 0)
    assert forest.metrics["rollout/signal_share"] == 1, "a surplus has signal, too"


def test_a_step_that_is_not_full_says_so_and_goes_on(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        forest = Table(config(max_refills=1), "001000").collect(7)
    assert names(forest) == ["2-1"]
    assert forest.metrics["rollout/prompts_trained"] == 1
    said = caplog.text
    assert "step 7: 1 of 3 prompts (rollout.rollout_batch_size) have rewards that differ, after 3 refills" in said
    assert "rollout.max_refills 1, rollout.oversample 1)" in said and "The step goes on with 1" in said


def test_or_it_ends_the_run_where_a_smaller_batch_is_not_allowed():
    cfg = config(max_refills=1, allow_smaller_batch=False, filter_metric="acc")
    with pytest.raises(
        BatchNotFilled, match=r"1 of 3 prompts .* have verdicts \(rollout.filter_metric acc\) that differ"
    ):
        Table(cfg, "001000").collect(0)
    with pytest.raises(BatchNotFilled, match=r"or set rollout\.allow_smaller_batch=true"):
        Table(cfg, "001000").collect(0)


def test_the_filter_looks_at_verdicts_before_penalties():
    class Shaped(Table):
        def grown(self, job: Job) -> Tree | None:
            tree = super().grown(job)
            assert tree is not None
            tree.rewards[0] -= 0.5
            return tree

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
        Table(cfg, "300000").collect(3)
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
    """A digit says how many of the first two leaves are right; of the later ones, every second one.

    A handful `x` is not finished in its step, and a tree `y` not in the step in which it grows on. Both are mixed.
    """

    def name(self, job: Job) -> str:
        return f"{job.prompt.id}:{job.leaves}"

    def grown(self, job: Job) -> Tree | None:
        assert job.begun is None or len(job.begun.rewards) == 2, "its first leaves are graded"
        digit = job.prompt.id[-1]
        if job.state is None and digit == ("x" if job.begun is None else "y"):
            return None
        first = 1 if digit in "xy" else int(digit)
        tree = graded(job.prompt.id, 0, width=job.leaves)
        set_rewards(tree, [float(index < first if index < 2 else index % 2) for index in range(job.leaves)])
        return tree


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


def test_a_carried_handful_is_dealt_leaves_in_the_step_in_which_it_ends():
    collector = Handfuls(adaptive(dynamic_sampling=False, partial_rollout=64), "1x211")
    forest = collector.collect(0)
    assert collector.asked == ["0-1:2 1-x:2 2-2:2", "0-1:8"]
    assert leaves(forest) == [("0-1", 8), ("2-2", 2)] and forest.metrics["tree/shortfall"] == 0
    forest = collector.collect(1)
    assert collector.asked[2:] == ["1-x:2 3-1:2 4-1:2", "1-x:4 3-1:4 4-1:4"]
    assert leaves(forest) == [("1-x", 4), ("3-1", 4), ("4-1", 4)] and forest.metrics["tree/shortfall"] == 0


def test_a_tree_that_is_carried_while_it_grows_keeps_its_allotment():
    """It trains where it ends, with its first leaves, and that step deals out so much less."""
    collector = Handfuls(adaptive(dynamic_sampling=False, partial_rollout=64), "1y211")
    forest = collector.collect(0)
    assert collector.asked == ["0-1:2 1-y:2 2-2:2", "0-1:5 1-y:5"]
    assert leaves(forest) == [("0-1", 5), ("2-2", 2)] and forest.metrics["tree/shortfall"] == 0
    forest = collector.collect(1)
    assert collector.asked[2:] == ["1-y:5 3-1:2 4-1:2", "3-1:4 4-1:3"], "it grows no more"
    assert leaves(forest) == [("1-y", 5), ("3-1", 4), ("4-1", 3)], "twelve leaves, as in every step"
    assert forest.metrics["tree/shortfall"] == 0 and forest.metrics["rollout/leaves_unspent"] == 0


def test_a_carried_tree_is_no_prompt_that_could_take_leaves():
    """Of 12 leaves `y` has 3; the other two prompts are needed to take what is left, so a settled one is replaced."""
    collector = Handfuls(adaptive(partial_rollout=64, most_leaves=4), "1y1001")
    assert leaves(collector.collect(0)) == [("0-1", 4), ("2-1", 4)]
    forest = collector.collect(1)
    assert collector.asked[2:] == ["1-y:4 3-0:2 4-0:2 5-1:2", "5-1:4"]
    assert leaves(forest) == [("1-y", 4), ("5-1", 4)]


def test_new_prompts_begin_while_the_mixed_ones_cannot_take_all(caplog: pytest.LogCaptureFixture):
    collector = Handfuls(adaptive(most_leaves=4), "0010112")
    with caplog.at_level(logging.WARNING):
        forest = collector.collect(0)
    # 12 - 6 left, one mixed prompt may take 2: two more begin. Then 2 are left, which the mixed ones take.
    assert collector.asked == ["0-0:2 1-0:2 2-1:2 3-0:2 4-1:2", "2-1:3 4-1:3"]
    assert leaves(forest) == [("2-1", 3), ("4-1", 3)]
    assert caplog.text == "", "the step has spent its leaves: nothing is missing"
    assert forest.metrics["rollout/refills"] == 2 and forest.metrics["rollout/prompts_dropped_zero_std"] == 3


def test_leaves_that_nobody_can_take_are_said(caplog: pytest.LogCaptureFixture):
    collector = Handfuls(adaptive(most_leaves=4, max_refills=0), "001")
    with caplog.at_level(logging.WARNING):
        forest = collector.collect(0)
    assert leaves(forest) == [("2-1", 4)] and "1 of 3 prompts" in caplog.text
    assert forest.metrics["rollout/leaves_unspent"] == 4


def test_a_tree_grows_on_where_it_began_whomever_it_replaced(monkeypatch: pytest.MonkeyPatch):
    """Its first leaves lie in the prefix cache of that engine."""
    collector = Handfuls(adaptive(most_leaves=4), "0010112")
    dealt: list[dict[str, int] | None] = []

    def sample_and_grade(generator, pool, jobs, make_row, *, engines, rule, **_) -> SampledRound:
        found, counts = Handfuls.sample(collector, jobs, 0, rule)
        ids = [job.prompt.id for job in jobs]
        # What begins in place of others is dealt to nobody.
        dealt.append(dict(zip(ids, engines, strict=False)))
        rows = {
            index: {"tree": each.tree, "lost": 0, "numbers": {}} | asdict(each.teaches)
            for index, each in enumerate(found)
        }
        # A prompt's number names the engine that takes it.
        return SampledRound(rows=rows, counts=counts, engines={index: int(name[0]) for index, name in enumerate(ids)})

    monkeypatch.setattr("treepo_mega.rollout.collect.sample_and_grade", sample_and_grade)
    costs = SimpleNamespace(expected=lambda prompt: 1.0, update=lambda prompts, trees: None)
    collector.generator = SimpleNamespace(costs=costs)  # type: ignore[assignment]
    monkeypatch.setattr(collector, "sample", lambda *args: Collector.sample(collector, *args))
    collector.collect(0)
    *rounds, last = dealt
    assert [set(engines.values()) for engines in rounds] == [{None}], "by cost"
    assert last == {"2-1": 2, "4-1": 4}


def test_a_step_of_settled_prompts_grows_nothing():
    collector = Handfuls(adaptive(max_refills=0), "020")
    assert collector.collect(0).trees == [] and len(collector.asked) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"surplus": "carry"}, r"rollout\.surplus carry needs rollout\.oversample above 1"),
        ({"surplus": "carry", "oversample": 2.0, "leaves": "adaptive"}, r"leaves adaptive with rollout\.surplus carry"),
    ],
)
def test_surplus_is_carried_where_there_is_any_and_its_trees_are_whole(keys: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        check(parse_config({**MINIMAL, "rollout": {"segment": {"length": 64}, **keys}}), 1)


def test_settled_prompts_say_what_their_other_leaves_would_have_cost():
    metrics = Handfuls(adaptive(dynamic_sampling=False), "1021").collect(0).metrics
    # Two of three are settled: two leaves of two tokens each, where four were planned.
    assert (metrics["rollout/prompts_settled"], metrics["rollout/tokens_saved"]) == (2, 8)


@pytest.mark.parametrize("keys", [{}, {"oversample": 2.0}, {"leaves": "adaptive", "first_leaves": 2}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_step_does_not_depend_on_what_ends_first(keys: dict[str, Any], seed: int):
    table = Handfuls if "leaves" in keys else Table
    digits = "".join(random.Random(seed).choice("0012") for _ in range(200))
    first, other = (table(config(max_refills=3, **keys), digits, rng) for rng in (None, random.Random(seed)))
    for step in range(3):
        forest, same = first.collect(step), other.collect(step)
        assert [tree.to_dict() for tree in forest.trees] == [tree.to_dict() for tree in same.trees]
        assert forest.metrics == same.metrics
    assert first.asked == other.asked


def test_draws():
    assert [draws(missing, 1.0) for missing in (-1, 0, 5)] == [0, 0, 5]
    assert [draws(10, 1.1), draws(1, 1.01), draws(7, 3.0)] == [11, 2, 21]
