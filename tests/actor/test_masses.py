"""Trees folded into masses, cut, and dealt to ranks, against the loss written out a trajectory at a time, in fp64.

Every token of a drawn forest has its own logprob and entropy as parameters, so the gradient is compared token by token.
What the loss, the weights and the corrections mean is written in flat_loss.py, by definition and without masses.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.actor.flat_loss import aggregate, is_kept, shares, trajectory_loss
from tests.properties import examples
from tests.tree.forests import forests, is_sampled
from treepo_mega.actor.batch import lesson_of
from treepo_mega.actor.losses import PolicyLoss
from treepo_mega.config import AlgoConfig, Config, load_config
from treepo_mega.tree.correction import Verdict, gather_evidence, judge
from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import Batch, Pack, own_part, plan_step
from treepo_mega.tree.segments import Segments

LONGEST = 90
DESCENT, CISPO = "algo.leaf_weight=descent", "algo.policy_loss=cispo"
SEQUENCE, GEOMETRIC = "algo.rollout_is=sequence", "algo.rollout_is=geometric"
REJECT = ("algo.rollout_rs=sequence", "algo.rollout_rs_threshold=30")
REJECT_MEAN = ("algo.rollout_rs=geometric", "algo.rollout_rs_threshold=1.4", "algo.rollout_rs_threshold_lower=0.8")
VETO, PER_NODE = "algo.rollout_token_veto_threshold=0.02", "algo.advantage_estimator=segment"
FLAT = ("algo.ratio_level=sequence", "train.prefix_sharing=none")
MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
CASES: tuple[tuple[str, ...], ...] = (
    (),
    (DESCENT, PER_NODE),
    *(("algo.tree_weight=prompt", *REJECT, f"algo.loss_agg_mode={mode}") for mode in MODES[:2]),
    ("algo.tree_weight=leaves", DESCENT, SEQUENCE),
    (CISPO, "algo.use_tis=true", "algo.tis_clip_low=0.7"),
    ("algo.kl_loss_type=low_var_kl", "algo.icepop_range=[0.6, 1.8]"),
    *((DESCENT, SEQUENCE, CISPO, f"algo.loss_agg_mode={mode}") for mode in MODES),
    *((*REJECT, f"algo.loss_agg_mode={mode}") for mode in MODES),
    *((*REJECT_MEAN, VETO, DESCENT, GEOMETRIC, "algo.tis_clip=1.1", f"algo.loss_agg_mode={mode}") for mode in MODES),
    (*REJECT, SEQUENCE, PER_NODE, "algo.tis_clip_low=0.5", "algo.icepop_range=[0.3, 3.0]"),
    (VETO, "algo.use_tis=true", PER_NODE),
    (*FLAT, "algo.use_tis=true", "algo.loss_agg_mode=seq-mean-token-mean"),
    (*FLAT, *REJECT_MEAN, SEQUENCE, DESCENT, "algo.icepop_range=[0.6, 1.8]"),
)


def config(*overrides: str) -> Config:
    return load_config(
        None,
        [
            *("model.hf_checkpoint=unused", "data.train=[{path: unused.jsonl}]", "algo.use_tis=false"),
            *(
                "algo.kl_loss_coef=0.1",
                "algo.entropy_coef=0.02",
                "algo.eps_clip_c=3",
                f"rollout.max_response_len={LONGEST}",
            ),
            *(["algo.use_tis=true"] if {SEQUENCE, GEOMETRIC} & set(overrides) else []),
            *overrides,
        ],
    )


@dataclass
class Tokens:
    """What is known of each token, by its id; ids are unique in a forest."""

    logp: Tensor
    entropy: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor

    @classmethod
    def draw(cls, count: int, seed: int) -> Tokens:
        """Ratios in every regime of the clip; the engine is now and then far away."""
        g = torch.Generator().manual_seed(seed)
        old = -3 * torch.rand(count, generator=g, dtype=torch.float64)

        def near(scale: float) -> Tensor:
            return old + scale * torch.randn(count, generator=g, dtype=torch.float64)

        far = torch.where(torch.rand(count, generator=g) < 0.03, 5.0, 0.0)
        return cls(
            logp=near(0.5).requires_grad_(), entropy=near(0.1).requires_grad_(), old=old, ref=near(0.3),
            rollout=near(0.4) + far,
        )  # fmt: skip

    def gradients(self) -> Tensor:
        """[2, count] of logprobs and entropies, which are forgotten."""
        found = [torch.zeros_like(x) if x.grad is None else x.grad for x in (self.logp, self.entropy)]
        self.logp.grad = self.entropy.grad = None
        return torch.stack(found)


def flat_loss(trees: list[Tree], values: list[np.ndarray], known: Tokens, algo: AlgoConfig) -> Tensor | None:
    """The loss of the step by the definition of each `loss_agg_mode`; None when nothing is left to train on."""
    losses, counts = [], []
    for tree, of_tree in zip(trees, values, strict=True):
        for index, (leaf, count) in enumerate(zip(tree.leaves, shares(tree, algo), strict=True)):
            path = [node for node in tree.ancestry(leaf) if is_sampled(tree.nodes[node])]
            owner = [node for node in path for _ in tree.nodes[node].tokens]
            ids = [token for node in path for token in tree.nodes[node].tokens]
            per_node = algo.advantage_estimator == "segment"
            advantages = torch.tensor([of_tree[node if per_node else index] for node in owner], dtype=torch.float64)
            if ids and is_kept(known.old[ids] - known.rollout[ids], algo):
                noted = {name: getattr(known, name)[ids] for name in ("old", "ref", "rollout")}
                losses.append(trajectory_loss(known.logp[ids], known.entropy[ids], noted, advantages, algo))
                counts.append(count)
    if not losses:
        return None
    return aggregate(losses, counts, algo.loss_agg_mode, LONGEST)


def packs_of(batch: Batch, dp_size: int, cp_size: int, room: int) -> list[Pack]:
    """The packs of every rank of a layout; trees that do not fit are cut."""
    longest = int((batch.segments.position + batch.segments.length).max())
    packs = []
    for dp_rank in range(dp_size):
        plan = plan_step(batch, dp_size=dp_size, dp_rank=dp_rank, max_tokens=longest + room, multiple=4 * cp_size)
        packs += [own_part(pack, cp_size, cp_rank) for pack in plan.packs for cp_rank in range(cp_size)]
    return packs


def packed_loss(
    trees: list[Tree], values: list[np.ndarray], known: Tokens, cfg: Config, layout: dict[str, int]
) -> tuple[Tensor | None, Verdict]:
    """The same through segments, masses, packs and corrections."""
    segments = Segments.from_trees(trees, range(len(trees)), cfg.train.prefix_sharing)
    lesson = lesson_of(segments, values, trees, cfg)
    packs = packs_of(Batch(segments, lesson.credit()), **layout)
    for pack in packs:
        pack.old_logprobs, pack.ref_logprobs = known.old[pack.target].numpy(), known.ref[pack.target].numpy()
        pack.rollout_logprobs = known.rollout[pack.target].numpy()
    # What each rank would say, added up as the ranks would.
    evidence = sum(gather_evidence([pack], len(segments), cfg.algo) for pack in packs)
    verdict = judge(segments, evidence, cfg.algo)
    credit = lesson.credit(verdict.factors, verdict.kept)
    for pack in packs:
        pack.relearn(credit)
    pairs = sum(pack.pairs for pack in packs)
    if not pairs:
        return None, verdict
    loss = PolicyLoss(cfg.algo)
    sums = [loss(known.logp[pack.target], known.entropy[pack.target], pack)[0] for pack in packs]
    return sum(sums) / pairs, verdict


def name(case: tuple[str, ...]) -> str:
    """For the test's id."""
    return "-".join(part.removeprefix("algo.") for part in case) or "plain"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_packed_is_flat(case):
    cfg = config(*case)
    seen: dict[str, int] = dict.fromkeys(("cut by the bound", "rejected", "kept", "all rejected"), 0)

    @examples(15)
    @given(forests(), st.integers(0, 1 << 16), st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]), st.integers(0, 20))
    def holds(trees: list[Tree], seed: int, ranks: tuple[int, int], room: int) -> None:
        flat_layout = cfg.algo.ratio_level == "sequence"
        layout = {"dp_size": ranks[0], "cp_size": 1 if flat_layout else ranks[1], "room": room}
        count = 1 + max(itertools.chain.from_iterable([*t.prompt_tokens, *n.tokens] for t in trees for n in t.nodes))
        known = Tokens.draw(count, seed)
        g = np.random.default_rng(seed)
        per_node = cfg.algo.advantage_estimator == "segment"
        values = [g.normal(size=len(t.nodes if per_node else t.leaves)) for t in trees]
        want = flat_loss(trees, values, known, cfg.algo)
        got, verdict = packed_loss(trees, values, known, cfg, layout)
        note(seen, verdict, cfg.algo)
        assert (want is None) == (got is None)
        if want is None or got is None:
            seen["all rejected"] += 1
            return
        assert float(got) == pytest.approx(float(want), rel=1e-10, abs=1e-12)
        want.backward()
        want_gradients = known.gradients()
        got.backward()
        apart = (known.gradients() - want_gradients).norm() / want_gradients.norm()
        assert float(apart) <= 1e-10

    holds()
    if cfg.algo.weighs_leaves:
        assert seen["cut by the bound"] > 0
    if cfg.algo.rejects_leaves:
        assert seen["rejected"] > 0 < seen["kept"]


def note(seen: dict[str, int], verdict: Verdict, algo: AlgoConfig) -> None:
    """Count what the corrections did: a case in which they do nothing shows nothing."""
    if verdict.ratios is not None:
        seen["cut by the bound"] += int((verdict.ratios > algo.tis_clip).sum())
    if verdict.kept is not None:
        seen["rejected"] += int((~verdict.kept).sum())
        seen["kept"] += int(verdict.kept.sum())


def test_a_trajectorys_ratio_is_the_product_of_its_tokens_or_their_geometric_mean():
    """Two leaves behind two shared tokens; the log ratios of the segments are 0.4, -0.1 and 2.0."""
    tree = Tree.start("p", [1])
    for parent, size in ((0, 2), (1, 1), (1, 2)):
        node = tree.add_child(parent)
        node.tokens, node.logprobs = [3] * size, [-1.0] * size
    tree.leaves, tree.rewards = [3, 2], [1.0, 0.0]
    segments = Segments.from_trees([tree], [0])
    evidence = np.array([[0.0, 0.4, -0.1, 2.0], [0, 0, 1, 0]])
    product = judge(segments, evidence, config(SEQUENCE).algo)
    assert product.ratios == pytest.approx(np.exp([2.4, 0.3])) and product.factors == pytest.approx(
        [2.0, math.exp(0.3)]
    )
    assert product.kept is None
    mean = judge(segments, evidence, config(GEOMETRIC, VETO, *REJECT_MEAN).algo)
    assert mean.factors == pytest.approx(np.exp([2.4 / 4, 0.3 / 3]))
    assert mean.kept.tolist() == [False, False], "one is out of range, the other has a token with a veto"
    far = judge(segments, evidence * [[1000], [1]], config(SEQUENCE).algo)
    assert np.isfinite(far.ratios).all(), "beyond the bound, exp would overflow"


def test_rejected_leaves_are_as_if_never_sampled():
    """Folded without them, masses, weights and counts are those of the smaller forest."""
    tree = Tree.start("p", [1])
    for parent, size in ((0, 2), (1, 1), (1, 3), (0, 4)):
        node = tree.add_child(parent)
        node.tokens, node.logprobs = [3] * size, [-1.0] * size
    tree.leaves, tree.rewards = [2, 3, 4], [1.0, 0.0, 0.0]
    values = [np.array([1.0, -2.0, 0.5])]
    for mode in MODES:
        cfg = config(f"algo.loss_agg_mode={mode}")
        whole = lesson_of(Segments.from_trees([tree], [0]), values, [tree], cfg)
        fewer = lesson_of(Segments.from_trees([tree.only([0, 2])], [0]), [values[0][[0, 2]]], [tree.only([0, 2])], cfg)
        got: Any = whole.credit(kept=np.array([True, False, True]))
        want: Any = fewer.credit()
        # Segment 3 alone has only the rejected leaf.
        for field in ("A_pos", "A_neg", "n", "count"):
            array = getattr(got, field)
            assert array[3] == 0
            assert np.delete(array, 3) == pytest.approx(getattr(want, field)), (mode, field)
