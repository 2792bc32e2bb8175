"""Packed against flat in fp64 on one rank: random forests and odd shapes, cut and whole, all sums to 1e-10."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.actor.oracle import VOCAB
from tests.actor.tree_oracle import fill_in, flat_step, forest, prefixes_of_rows
from treepo_mega.actor.batch import plan_batch
from treepo_mega.actor.forward import run_schedule
from treepo_mega.actor.update import Policy, policy_gradient
from treepo_mega.config import Config
from treepo_mega.tree.credit import fold, leaf_weights
from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import Batch
from treepo_mega.tree.segments import Segments


def chain(depth: int, size: int) -> Tree:
    """One leaf at the end of `depth` segments."""
    rng, tree, at = random.Random(depth), Tree.start("p", [1, 2, 3]), 0
    for _ in range(depth):
        node = tree.add_child(at)
        node.tokens, at = [rng.randrange(VOCAB) for _ in range(size)], node.id
        node.logprobs = [0.0] * size
    tree.leaves, tree.rewards = [at], [1.0]
    return tree


def star(leaves: int) -> Tree:
    """`leaves` segments of 0 to 4 tokens below the prompt."""
    rng, tree = random.Random(leaves), Tree.start("p", [4] * 5)
    for i in range(leaves):
        node = tree.add_child(0)
        node.tokens = [rng.randrange(VOCAB) for _ in range(i % 5)]
        node.logprobs = [0.0] * (i % 5)
    tree.leaves, tree.rewards = list(range(1, leaves + 1)), [0.0] * leaves
    return tree


def comb(depth: int) -> Tree:
    """A spine of `depth` segments with a leaf beside each: the deepest sharing."""
    tree = chain(depth, 2)
    for up in range(depth):
        node = tree.add_child(up)
        node.tokens, node.logprobs = [up % VOCAB], [0.0]
        tree.leaves.append(node.id)
        tree.rewards.append(0.0)
    return tree


def grown(seed: int) -> list[Tree]:
    """One to three random trees."""
    return forest(seed % 4, seed, trees=1 + seed % 3)


SHAPES: dict[str, list[Tree]] = {
    **{f"random {seed}": grown(seed) for seed in range(10)},
    "a single path": [chain(1, 9)],
    "one leaf, 28 segments": [chain(28, 3)],
    "64 leaves, some empty": [star(64)],
    "depth 28, a leaf at each": [comb(28)],
    "a long prompt": [forest(2, 7)[0], star(3), comb(5)],
}


def double(policy: Policy) -> None:
    """Turn the policy into fp64, with plain gradients on the parameters."""
    for model in policy.models:
        model.double()
        model.config.params_dtype = model.config.pipeline_dtype = torch.float64
        model.config.finalize_model_grads_func = None


def step(policy: Policy, cfg: Config, trees: list[Tree], sharing: str, most: int) -> dict[str, Any]:
    """Loss, gradients and logprobs of one pass in the given layout, in fp64."""
    s = Segments.from_trees(trees, range(len(trees)), sharing)
    g = np.random.default_rng(len(s.leaf_number))
    advantages = g.normal(size=len(s.leaf_number))
    batch = Batch(s, fold(s, advantages, leaf_weights(cfg.algo.loss_agg_mode, s.flat_lengths())))
    cfg = cfg.model_copy(deep=True)
    cfg.train.max_tokens_per_gpu = most
    packs = plan_batch(batch, cfg).packs
    logprobs: dict[tuple[int, ...], float] = {}

    def keep(logp: torch.Tensor, entropy: torch.Tensor, pack: Any) -> Any:
        logprobs.update(zip(prefixes_of_rows(pack), logp.tolist(), strict=True))
        return logp.sum() * 0, {}

    run_schedule(policy.chunks, packs, policy.head(), loss=keep)
    fill_in(packs, logprobs)
    for model in policy.models:
        model.zero_grad()
    data = run_schedule(policy.chunks, packs, policy.head(), loss=policy_gradient(cfg.algo))
    grads = torch.cat([p.grad.flatten() for m in policy.models for p in m.parameters()])
    loss = sum(float(d["loss"]) for d in data)
    return {"loss": loss, "grads": grads, "logprobs": logprobs, "entropy": sum(float(d["entropy"]) for d in data)}


def compare(policy: Policy, cfg: Config, trees: list[Tree]) -> dict[str, float]:
    """Worst differences of trees (whole and cut) from flat."""
    longest = max(len(t.prefix(leaf)) for t in trees for leaf in t.leaves)
    flat = step(policy, cfg, trees, "none", longest)
    out = {"loss": 0.0, "grads": 0.0, "logprobs": 0.0, "entropy": 0.0}
    for sharing, most in (("tree", 4096), ("tree", longest + 9)):
        got = step(policy, cfg, trees, sharing, most)
        apart = {
            "loss": abs(got["loss"] - flat["loss"]),
            "entropy": abs(got["entropy"] - flat["entropy"]),
            "grads": float((got["grads"] - flat["grads"]).norm() / flat["grads"].norm()),
            "logprobs": max(abs(got["logprobs"][k] - v) for k, v in flat["logprobs"].items()),
        }
        if got["logprobs"].keys() != flat["logprobs"].keys():
            raise AssertionError("packed and flat ask for different tokens")
        out = {k: max(v, apart[k]) for k, v in out.items()}
    return out


def measure_exact(cfg: Config, hf_dir: Path) -> dict[str, Any]:
    """{shape: worst differences}, and how far fp64 is from transformers' fp64."""
    policy = Policy(cfg, hf_dir)
    double(policy)
    out: dict[str, Any] = {name: compare(policy, cfg, trees) for name, trees in SHAPES.items()}
    trees = grown(3)
    want = flat_step(hf_dir, cfg, trees, torch.float64)
    got = step(policy, cfg, trees, "tree", 4096)
    out["transformers"] = max(abs(got["logprobs"][k] - v) for k, v in want["logprobs"].items())
    return out
