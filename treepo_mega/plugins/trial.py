"""Plug-ins at the start, before any engine is built: imported, their parameters compared, called on an example tree.

    check_plugins(cfg)

The example has a shared segment, three leaves and rewards of 1, 0 and 1. Each plug-in is called twice with it: one that
answers otherwise the second time would let ranks disagree. Sinks are imported and not called: they would write.
Rewards run in worker processes, so that `data/rewards/trial.py` tries them there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from treepo_mega.config import Config
from treepo_mega.plugins.calls import PluginError, load, plugin_advantages, plugin_keeps, plugin_split
from treepo_mega.text.function_path import is_function_path
from treepo_mega.tree.descent import leaf_shares
from treepo_mega.tree.node import Tree

MIXED = (1.0, 0.0, 1.0)
EQUAL = (1.0, 1.0, 1.0)
"""Rewards of the example's leaves."""

PATHS = 3
TOTAL = 5


def plugins_of(cfg: Config) -> dict[str, tuple[str, str]]:
    """Key to (kind, name) of the plug-ins that run in the trainer's own process."""
    named = {
        "algo.advantage_estimator": ("advantage", cfg.algo.advantage_estimator),
        "rollout.filter_metric": ("filter", cfg.rollout.filter_metric),
        "rollout.branching.budget.kind": ("budget", cfg.rollout.branching.budget.kind),
    }
    named |= {f"logging.sinks.{index}": ("logger", name) for index, name in enumerate(cfg.logging.sinks)}
    return {key: (kind, name) for key, (kind, name) in named.items() if is_function_path(name)}


def check_plugins(cfg: Config) -> list[str]:
    """One problem for every plug-in of `cfg` that cannot be used; an empty list when all can."""
    problems = []
    for kind, name in plugins_of(cfg).values():
        try:
            _try(kind, name, cfg)
        except PluginError as error:
            problems.append(str(error))
    return problems


def require_plugins(cfg: Config) -> None:
    """Raise PluginError with all that `check_plugins` finds."""
    if problems := check_plugins(cfg):
        raise PluginError("\n  ".join(problems))


def example_tree(rewards: tuple[float, float, float] = MIXED) -> Tree:
    """A graded tree with a shared segment: the prompt, node 1 with the leaves 2 and 3 below it, and the leaf 4.

    >>> tree = example_tree()
    >>> tree.leaves, tree.rewards, [node.parent for node in tree.nodes]
    ([2, 3, 4], [1.0, 0.0, 1.0], [-1, 0, 1, 1, 0])
    """
    tree = Tree.start("the example tree", [10, 11])
    for parent, tokens in ((0, [20, 21]), (1, [30]), (1, [40, 41]), (0, [50])):
        child = tree.add_child(parent)
        child.tokens = tokens
        child.logprobs = [-0.5 - token / 100 for token in tokens]
    tree.leaves = [2, 3, 4]
    tree.rewards = list(rewards)
    tree.verdicts = list(rewards)
    for leaf in tree.leaves:
        tree.nodes[leaf].stop = "eos"
    if rewards == EQUAL:
        tree.prompt_id = "the example tree whose rewards are all equal"
    return tree


def _try(kind: str, name: str, cfg: Config) -> None:
    """Raise PluginError unless the plug-in can be used as far as an example shows."""
    if kind == "logger":
        load(kind, name)
        return
    rollout = cfg.rollout
    # Dynamic sampling by rewards lets no tree without signal through; else an advantage has to cope with one.
    reaches = kind == "filter" or not rollout.dynamic_sampling or rollout.filter_metric != "reward"
    for rewards in (MIXED, EQUAL) if reaches and kind != "budget" else (MIXED,):
        call = _call_of(kind, name, cfg, rewards)
        if call() != call():
            raise load(kind, name).wrong(
                "the example tree", "gave another answer when called again, so that ranks would disagree"
            )


def _call_of(kind: str, name: str, cfg: Config, rewards: tuple[float, float, float]) -> Callable[[], Any]:
    """A call on a new example each time."""
    if kind == "advantage":
        shares = leaf_shares(example_tree(rewards), cfg.algo.leaf_weight)
        return lambda: plugin_advantages(name, example_tree(rewards), shares=shares, algo=cfg.algo)
    if kind == "filter":
        return lambda: plugin_keeps(name, example_tree(rewards), step=0)
    return functools.partial(_split_example, name, cfg)


def _split_example(name: str, cfg: Config) -> list[int]:
    tree = Tree.start("the example tree", [10, 11])
    paths = [tree.add_child(0) for _ in range(PATHS)]
    for index, node in enumerate(paths):
        node.tokens = [20 + index]
        node.logprobs = [-0.5 * (index + 1)]
        node.peek = [-0.1 - index - place for place in range(cfg.rollout.peek)]
    temperature = cfg.rollout.branching.budget.temperature
    return plugin_split(name, TOTAL, paths, temperature=temperature, prompt_id=tree.prompt_id)
