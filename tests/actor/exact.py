"""Packed against flat in fp64 on one rank: odd shapes, and forests that hypothesis draws, cut and whole, to 1e-10.

The examples are drawn the same way in every run (`derandomize`); a failure is shrunk, and its forest printed.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.actor.oracle import VOCAB
from tests.actor.tree_oracle import fill_in, flat_step, forest, prefixes_of_rows
from tests.tree.forests import contexts
from treepo_mega.actor.batch import lesson_of, plan_batch
from treepo_mega.actor.forward import run_schedule
from treepo_mega.actor.losses import PolicyLoss
from treepo_mega.actor.passes import correct_leaves
from treepo_mega.actor.update import Policy
from treepo_mega.config import Config
from treepo_mega.loss.stats import Stats
from treepo_mega.tree.merge import merge
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


def even(levels: int) -> Tree:
    """Binary branching behind each of `levels` segments: 2 ** levels leaves."""
    rng, tree, ends = random.Random(levels), Tree.start("p", [7] * 4), [0]
    for level in range(levels):
        made = []
        for end in ends:
            for _ in range(2):
                node = tree.add_child(end)
                node.tokens = [rng.randrange(VOCAB) for _ in range(1 + level % 2)]
                node.logprobs = [0.0] * len(node.tokens)
                made.append(node.id)
        ends = made
    tree.leaves, tree.rewards = ends, [0.0] * len(ends)
    return tree


def alike(leaves: int) -> Tree:
    """Paths of two segments over two symbols: many begin alike, some are copies."""
    rng, tree = random.Random(leaves), Tree.start("p", [3, 1])
    for _ in range(leaves):
        at = 0
        for size in (rng.randrange(1, 4), rng.randrange(4)):
            node = tree.add_child(at)
            node.tokens, at = [rng.randrange(2) for _ in range(size)], node.id
            node.logprobs = [0.0] * size
        tree.leaves.append(at)
    tree.rewards = [0.0] * leaves
    return tree


def rewritten(leaves: int) -> Tree:
    """Turns of which later ones see less: each observation hides the end of its path, and restates two tokens of it."""
    rng, tree = random.Random(leaves), Tree.start("p", [3, 1, 4, 1, 5])
    ends = [0]
    while len(ends) < leaves:
        at = ends.pop(0)
        for hidden in (0, 3, 7):
            turn = tree.add_child(at)
            turn.tokens, turn.logprobs = [rng.randrange(VOCAB) for _ in range(4)], [0.0] * 4
            ends.append(tree.observe(turn.id, [rng.randrange(2) for _ in range(3)], hidden=hidden, restated=2).id)
    for at in ends:
        last = tree.add_child(at)
        last.tokens, last.logprobs = [rng.randrange(VOCAB) for _ in range(2)], [0.0] * 2
        tree.leaves.append(last.id)
    tree.rewards = [0.0] * len(ends)
    return tree


SHAPES: dict[str, list[Tree]] = {
    "a single path": [chain(1, 9)],
    "one leaf, 28 segments": [chain(28, 3)],
    "64 leaves, some empty": [star(64)],
    "64 leaves, 6 levels": [even(6)],
    "depth 28, a leaf at each": [comb(28)],
    "a long prompt": [forest(2, 7)[0], star(3), comb(5)],
    "siblings alike": [alike(24), alike(9)],
    "history rewritten": [rewritten(7), rewritten(2)],
}
EXAMPLES = 20
CORRECTIONS: dict[str, dict[str, Any]] = {
    "weighed": {"leaf_weight": "descent", "rollout_is": "sequence", "policy_loss": "cispo"},
    "rejected": {
        "rollout_rs": "sequence", "rollout_rs_threshold": 30.0, "rollout_token_veto_threshold": 0.01,
        "loss_agg_mode": "seq-mean-token-sum-norm",
    },
}  # fmt: skip
"""Keys of `algo` under which trajectories are weighed and rejected."""


@st.composite
def forests(draw: st.DrawFn) -> list[Tree]:
    """One to three trees of up to 20 segments of 0 to 9 tokens anywhere below each other; every end is a leaf."""
    trees = []
    for i in range(draw(st.integers(1, 3))):
        rng = random.Random(draw(st.integers(0, 1 << 16)))
        tree = Tree.start(f"p{i}", [rng.randrange(VOCAB) for _ in range(draw(st.integers(1, 9)))])
        for _ in range(draw(st.integers(1, 20))):
            node = tree.add_child(draw(st.integers(0, len(tree.nodes) - 1)))
            node.tokens = [rng.randrange(VOCAB) for _ in range(draw(st.sampled_from([0, 1, 2, 5, 9])))]
            node.logprobs = [0.0] * len(node.tokens)
        tree.leaves = [n.id for n in tree.nodes if not n.children]
        tree.rewards = [0.0] * len(tree.leaves)
        trees.append(tree)
    return trees


def double(policy: Policy) -> None:
    """Turn the policy into fp64, with plain gradients on the parameters."""
    for model in policy.models:
        model.double()
        model.config.params_dtype = model.config.pipeline_dtype = torch.float64
        model.config.finalize_model_grads_func = None


def step(policy: Policy, cfg: Config, trees: list[Tree], sharing: str, most: int) -> dict[str, Any]:
    """Loss, gradients and logprobs of one pass in the given layout, in fp64."""
    s = Segments.from_trees(trees, range(len(trees)), "tree" if sharing == "content" else sharing)
    g = np.random.default_rng(s.leaf_count)
    lesson = lesson_of(s, [g.normal(size=len(tree.leaves)) for tree in trees], trees, cfg)
    if sharing == "content":
        lesson = replace(lesson, merged=merge(s))
    batch = Batch(lesson.laid_out, lesson.row_credit())
    cfg = cfg.model_copy(deep=True)
    cfg.train.max_tokens_per_gpu = most
    plan = replace(plan_batch(batch, cfg), lesson=lesson)
    packs = plan.packs
    logprobs: dict[tuple[int, ...], float] = {}

    class Keep:
        """A loss of nothing that writes the logprobs down."""

        needs_whole_packs = False

        def __call__(self, logp: torch.Tensor, entropy: torch.Tensor, pack: Any) -> Any:
            logprobs.update(zip(prefixes_of_rows(pack), logp.tolist(), strict=True))
            return logp.sum() * 0, Stats()

    run_schedule(policy.chunks, packs, policy.head, loss=Keep())
    fill_in(packs, logprobs)
    _, corrections = correct_leaves([plan], cfg.algo)
    for model in policy.models:
        model.zero_grad()
    data = run_schedule(policy.chunks, packs, policy.head, loss=PolicyLoss(cfg.algo))
    grads = torch.cat([p.grad.flatten() for m in policy.models for p in m.parameters()])
    loss = sum(float(d.sums["loss"]) for d in data)
    tokens = sum(b - a for p in packs for a, b in p.blocks)
    entropy = sum(float(d.sums["entropy"]) for d in data)
    found = {"loss": loss, "grads": grads, "logprobs": logprobs, "entropy": entropy, "tokens": tokens}
    return found | {"corrections": corrections}


def compare(policy: Policy, cfg: Config, trees: list[Tree], room: int = 9) -> dict[str, float]:
    """Worst differences from flat of trees whole, cut to `room` tokens above their longest trajectory, and cut after
    equal tokens were merged; and the tokens of each."""
    longest = max(len(context) for t in trees for leaf in t.leaves for context in contexts(t, leaf))
    flat = step(policy, cfg, trees, "none", 4 * longest)
    out = {"loss": 0.0, "grads": 0.0, "logprobs": 0.0, "entropy": 0.0}
    packs = []
    layouts = [(4096, "tree"), (longest + room, "tree"), (longest + room, "content")]
    for most, sharing in layouts:
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
        packs.append(got["tokens"])
    return out | dict(zip(("whole", "cut", "merged"), packs, strict=False)) | flat["corrections"]


def check(apart: dict[str, float]) -> None:
    """fp64: packed is flat up to rounding."""
    assert apart["logprobs"] <= 1e-10 and apart["grads"] <= 1e-10, apart
    # Sums over (trajectory, token) pairs, of which there are up to thousands.
    assert apart["loss"] <= 1e-10 * 1e3 and apart["entropy"] <= 1e-10 * 1e3, apart


def measure_drawn(policy: Policy, cfg: Config) -> Counter[str]:
    """Hypothesis looks for a forest on which packed is not flat; what it looked at. AssertionError with the forest."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(forests(), st.integers(0, 20))
    def packed_is_flat(trees: list[Tree], room: int) -> None:
        assume(any(n.tokens for t in trees for n in t.nodes[1:]))
        apart = compare(policy, cfg, trees, room)
        seen.update(
            examples=1,
            cut=apart["cut"] > apart["whole"],
            empty_segment=any(not n.tokens for t in trees for n in t.nodes[1:]),
            single_path=any(len(t.leaves) == 1 for t in trees),
            several_trees=len(trees) > 1,
        )
        check(apart)

    packed_is_flat()
    return seen


def measure_exact(cfg: Config, hf_dir: Path) -> dict[str, Any]:
    """What fp64 shows: worst differences of each of SHAPES ("shapes") and CORRECTIONS ("corrected"), what hypothesis
    looked at ("drawn"), and the distance to transformers."""
    policy = Policy(cfg, hf_dir)
    double(policy)
    shapes = {name: compare(policy, cfg, trees) for name, trees in SHAPES.items()}
    trees = forest(3, 3, trees=1)
    want = flat_step(hf_dir, cfg, trees, torch.float64)
    got = step(policy, cfg, trees, "tree", 4096)
    far = max(abs(got["logprobs"][k] - v) for k, v in want["logprobs"].items())
    corrected = {}
    for name, keys in CORRECTIONS.items():
        other = cfg.model_copy(update={"algo": cfg.algo.model_copy(update=keys)})
        corrected[name] = compare(policy, other, [*SHAPES["a long prompt"], *SHAPES["siblings alike"]])
    return {"shapes": shapes, "corrected": corrected, "drawn": measure_drawn(policy, cfg), "transformers": far}
