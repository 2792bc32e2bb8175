"""From a verifier's results to the rewards that are trained on: lost answers, and DAPO's overlong penalty. Pure.

    row = reward_leaves(tree, results, cfg)      # the tree with rewards and verdicts, and what is logged of them

A *verdict* is what the verifier said of the answer: the number `acc` of its dict, else its score. Penalties change the
reward and not the verdict, so that accuracy and `rollout.filter_metric: acc` mean the same with and without them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from treepo_mega.config import Config, RewardConfig
from treepo_mega.data.rewards import RewardResult
from treepo_mega.data.rewards.weighted import VERDICT
from treepo_mega.tree.advantage import set_rewards
from treepo_mega.tree.node import Tree

CUT = ("length", "depth", "context")
"""Reasons of paths that ended because they may not be longer, in the middle of what they said."""


def reward_leaves(tree: Tree, results: Sequence[RewardResult], cfg: Config) -> dict[str, Any]:
    """Write rewards and verdicts into the tree; a row of it.

    `lost`: answers that could not be graded. Under `reward.on_lost: drop` their leaves are out of the tree, else they
    have its number, without a penalty. `numbers`: name -> [sum, count] of what the verifier's dicts hold beside
    `score`, and of the penalty.
    """
    on_lost = None if cfg.reward.on_lost == "drop" else float(cfg.reward.on_lost)
    rewards: list[float | None] = []
    verdicts: list[float | None] = []
    numbers: dict[str, list[float]] = {}
    for leaf, result in zip(tree.leaves, results, strict=True):
        if result.score is None:
            rewards.append(on_lost)
            verdicts.append(on_lost)
            continue
        found = {metric_name(key): value for key, value in result.extra.items() if isinstance(value, float)}
        penalty = 0.0
        if cfg.reward.overlong.buffer_len:
            penalty = overlong_penalty(tree.response_length(leaf), cfg.rollout.max_response_len, cfg.reward)
            found["overlong_penalty"] = penalty
        rewards.append(result.score + penalty)
        verdicts.append(float(result.extra.get(VERDICT, result.score)))
        for name, value in found.items():
            total = numbers.setdefault(name, [0.0, 0])
            total[0] += value
            total[1] += 1
    set_rewards(tree, rewards, verdicts=verdicts)
    lost = sum(result.score is None for result in results)
    return {"tree": tree, "lost": lost, "numbers": numbers}


def overlong_penalty(length: int, max_response_len: int, reward: RewardConfig) -> float:
    """DAPO's soft penalty (Yu et al., 2025, eq. 13) of a response of `length` tokens; 0 or less.

    0 up to `max_response_len - buffer_len` tokens; from there it falls linearly, to `-penalty` at `max_response_len`.

    >>> reward = RewardConfig.model_validate({"overlong": {"buffer_len": 4, "penalty": 2.0}})
    >>> [overlong_penalty(length, 16, reward) for length in (3, 12, 13, 16)]
    [0.0, 0.0, -0.5, -2.0]
    """
    buffer = reward.overlong.buffer_len
    exceeding = length - (max_response_len - buffer)
    return -max(exceeding, 0) / buffer * reward.overlong.penalty + 0.0


def without_cut(tree: Tree) -> Tree:
    """The tree with the leaves alone that ended by themselves; their baselines then know nothing of the others."""
    return tree.only([index for index, leaf in enumerate(tree.leaves) if tree.nodes[leaf].stop not in CUT])


def metric_name(key: str) -> str:
    """A verifier's key as the end of a metric's name.

    >>> metric_name("format ok/strict")
    'format_ok_strict'
    """
    return re.sub(r"[^\w.@-]", "_", key)
