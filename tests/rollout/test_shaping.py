"""Rewards of a tree by hand: penalties, verdicts, lost and cut leaves; and what a verifier's function is told."""

from __future__ import annotations

from typing import Any

import pytest

from treepo_mega.config import Config, ConfigError, check, parse_config
from treepo_mega.data.rewards import RewardResult
from treepo_mega.data.rewards.lost import describe_lost
from treepo_mega.data.rewards.pool import RewardItem, RewardPool
from treepo_mega.data.rewards.worker import grade
from treepo_mega.monitor.registry import check_known
from treepo_mega.rollout.grading import trajectory_of
from treepo_mega.rollout.shaping import reward_leaves, without_cut
from treepo_mega.tree.node import ROOT, Tree

STOPS = ("eos", "length", "depth", "repetition")


def config(**sections: Any) -> Config:
    raw = {
        "model": {"hf_checkpoint": "none"},
        "data": {"train": [{"reasoning_gym": "chain_sum"}]},
        "rollout": {"max_response_len": 12, "n_samples_per_prompt": 4, "segment": {"length": 4}},
    }
    return parse_config(raw | sections)


def tree(lengths: tuple[int, ...] = (6, 12, 10, 8)) -> Tree:
    out = Tree.start("p", [1])
    for length, stop in zip(lengths, STOPS, strict=True):
        node = out.add_child(ROOT)
        node.tokens, node.logprobs, node.stop = [5] * length, [0.0] * length, stop
        out.leaves.append(node.id)
    return out


def test_the_overlong_penalty_changes_rewards_and_not_verdicts():
    cfg = config(reward={"overlong": {"buffer_len": 4, "penalty": 1.0}})
    graded = tree()
    row = reward_leaves(graded, [RewardResult(1.0)] * 4, cfg)
    # min(-(length - (12 - 4)) / 4, 0) of 6, 12, 10 and 8 tokens.
    assert graded.rewards == [1.0, 0.0, 0.5, 1.0]
    assert graded.verdicts == [1.0] * 4
    assert row["numbers"] == {"overlong_penalty": [-1.5, 4]}
    assert row["tree"] is graded, "verdicts travel to the other ranks"


def test_numbers_are_summed_and_acc_is_the_verdict():
    graded = tree()
    results = [
        RewardResult(0.3, None, {"acc": 0.0, "format": 1.0, "pred": "4"}),
        RewardResult(1.2, None, {"acc": 1.0, "format": 0.5}),
        RewardResult(0.25),
        RewardResult(0.0, None, {"a/b c": 2.0}),
    ]
    row = reward_leaves(graded, results, config())
    assert graded.rewards == [0.3, 1.2, 0.25, 0.0]
    assert graded.verdicts == [0.0, 1.0, 0.25, 0.0], "without acc the score is the verdict"
    assert row["numbers"] == {"acc": [1.0, 2], "format": [1.5, 2], "a_b_c": [2.0, 1]}
    assert check_known("reward/format").name == "reward/<name>"


def test_lost_answers_leave_the_tree_or_get_the_number_that_was_asked_for():
    results = [RewardResult(1.0), RewardResult(None, "hung"), RewardResult(0.0), RewardResult(1.0)]
    dropped = tree()
    assert reward_leaves(dropped, results, config())["lost"] == 1
    assert (dropped.leaves, dropped.rewards, dropped.verdicts) == ([1, 3, 4], [1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert dropped.shortfall == "1 of 4 rewards lost"
    punished = tree()
    cfg = config(reward={"on_lost": -1, "overlong": {"buffer_len": 4}})
    assert reward_leaves(punished, results, cfg)["lost"] == 1, "counted all the same"
    assert punished.rewards == [1.0, -1.0, -0.5, 1.0], "the number is not made smaller by its length"
    assert punished.verdicts == [1.0, -1.0, 0.0, 1.0] and punished.shortfall is None


def test_cut_leaves_leave_the_tree():
    graded = tree()
    reward_leaves(graded, [RewardResult(float(index)) for index in range(4)], config())
    left = without_cut(graded)
    assert (left.leaves, left.rewards, left.verdicts) == ([1, 4], [0.0, 3.0], [0.0, 3.0])
    assert len(graded.leaves) == 4, "the metrics of sampling still look at the whole tree"


def test_values_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match=r"reward\.on_lost.*should be a finite number"):
        config(reward={"on_lost": float("nan")})
    with pytest.raises(ConfigError, match=r"reward\.on_lost"):
        config(reward={"on_lost": "zero"})
    with pytest.raises(ConfigError, match=r"reward\.overlong\.buffer_len 13 exceeds rollout\.max_response_len 12"):
        check(config(reward={"overlong": {"buffer_len": 13}}), 1)
    sampling = {"max_response_len": 12, "segment": {"length": 4}, "dynamic_sampling": False, "oversample": 2}
    with pytest.raises(ConfigError, match=r"rollout\.oversample 2 needs rollout\.dynamic_sampling"):
        check(config(rollout=sampling), 1)


REQUEST = {"data_source": "x", "solution_str": "a", "ground_truth": "b", "extra_info": None}


def test_a_verifier_that_asks_is_told_how_the_response_came_about():
    def asks(data_source: str, solution_str: str, ground_truth: str, extra_info: Any, trajectory: Any) -> float:
        return float(trajectory["tokens"]) + (trajectory["stop"] == "length") / 2

    def takes_anything(**kwargs: Any) -> float:
        return float(len(kwargs))

    told = {**REQUEST, "trajectory": trajectory_of(tree(), 2)}
    shown = {"prompt_id": "p", "tokens": 12, "stop": "length", "turns": 0, "segments": 1, "fallback": False}
    assert told["trajectory"] == shown
    assert grade(asks, told) == {"score": 12.5, "extra": {}}
    assert grade(takes_anything, told)["score"] == 4.0, "verl's four arguments and no more"


@pytest.mark.parametrize(
    "returned, reason",
    [
        ({"acc": 1.0}, "a dict without 'score' (keys: acc)"),
        ({"score": 1.0, "acc": "yes"}, "the verifier's 'acc' is str; expected a number"),
        ({"score": 1.0, "format": float("inf")}, "returned inf as 'format'; expected a finite number"),
        ({"score": 1.0, "mean": 2.0}, "holds 'mean', a metric of the trainer"),
        ({"score": float("nan")}, "returned nan; expected a finite score"),
        ([1.0], "returned list; expected a float or a dict with 'score'"),
    ],
)
def test_what_is_no_reward_is_named_with_verifier_and_prompt(returned: Any, reason: str):
    reply = grade(lambda **_: returned, {**REQUEST, "trajectory": None})
    assert reason in reply["error"]
    pool = RewardPool(config().reward)
    item = RewardItem("my.py:f", "x", "a", "b", None, trajectory_of(tree(), 1))
    ticket, pending = pool._encode(0, item)
    pool._pending[ticket] = pending
    pool._finish(ticket, RewardResult(None, reply["error"]))
    _, _, said = describe_lost([pool.take_tally()], "step 2")
    assert "verifier 'my.py:f' lost 1, first: " in said and reason in said and "(prompt 'p')" in said
