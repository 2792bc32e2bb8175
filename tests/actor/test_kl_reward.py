"""KL in the reward, on trees cut and dealt to ranks, against its definition on flat trajectories, in fp64.

A leaf's reward loses coef times the sum over its own tokens of old - reference. Advantages, whitening and loss follow.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.actor.test_masses import Tokens, config, flat_loss, packs_of
from tests.properties import examples
from tests.tree.forests import forests, is_sampled
from treepo_mega.actor import passes
from treepo_mega.actor.batch import advantages, charge_kl, lesson_of, sampled_sharing
from treepo_mega.actor.losses import PolicyLoss
from treepo_mega.config import Config, ConfigError, check
from treepo_mega.runtime import dist
from treepo_mega.tree.kl_reward import gather_kl
from treepo_mega.tree.merge import merge
from treepo_mega.tree.node import ROOT, Tree
from treepo_mega.tree.pack import Batch, StepPlan, split_steps
from treepo_mega.tree.segments import Segments

COEF = 0.25
REJECT = ("algo.rollout_rs=sequence", "algo.rollout_rs_threshold=30")
WEIGH = ("algo.rollout_is=geometric", "algo.use_tis=true")
BASE = ("algo.kl_loss_coef=0", f"reward.kl_coef={COEF}", "rollout.fallback.from=none")


def kl_by_definition(tree: Tree, known: Tokens) -> list[float]:
    """One number a leaf: over the sampled tokens of its response, one by one."""
    paths = [[tree.nodes[node] for node in tree.ancestry(leaf) if is_sampled(tree.nodes[node])] for leaf in tree.leaves]
    return [float(sum(known.old[token] - known.ref[token] for node in path for token in node.tokens)) for path in paths]


def plans_of(trees: list[Tree], known: Tokens, cfg: Config, layout: dict[str, int]) -> tuple[list, list[StepPlan]]:
    """The trees of each optimizer step, and its plan with the packs of all ranks."""
    values = advantages(trees, cfg)
    groups, plans = [], []
    for group in split_steps(range(len(trees)), cfg.train.num_steps_per_rollout):
        chosen = [i for i in group if trees[i].leaves]
        if not chosen:
            continue
        mine = [trees[i] for i in chosen]
        segments = Segments.from_trees(mine, range(len(mine)), sampled_sharing(cfg))
        lesson = lesson_of(segments, [values[i] for i in chosen], mine, cfg)
        if cfg.train.prefix_sharing == "content":
            lesson = replace(lesson, merged=merge(segments))
        packs = packs_of(Batch(lesson.laid_out, lesson.row_credit()), **layout)
        for pack in packs:
            pack.old_logprobs, pack.ref_logprobs = known.old[pack.target].numpy(), known.ref[pack.target].numpy()
            pack.rollout_logprobs = known.rollout[pack.target].numpy()
        groups.append(chosen)
        plans.append(StepPlan(packs, lesson=lesson))
    return groups, plans


@pytest.mark.parametrize(
    "overrides",
    [
        ("algo.advantage_estimator=grpo", "algo.norm_adv_by_std=false"),
        ("algo.advantage_estimator=treepo", "train.num_steps_per_rollout=2"),
        ("algo.advantage_estimator=segment", "algo.leaf_weight=descent"),
        (
            "algo.advantage_estimator=reinforce_pp_baseline",
            "train.prefix_sharing=none",
            "train.num_steps_per_rollout=2",
        ),
        ("algo.advantage_estimator=reinforce_pp", "train.prefix_sharing=prompt"),
        ("algo.advantage_estimator=treepo_size_weighted", *REJECT, *WEIGH),
        ("algo.advantage_estimator=treepo_size_weighted", "train.prefix_sharing=content", *REJECT, *WEIGH),
        ("algo.advantage_estimator=segment", "train.prefix_sharing=content"),
    ],
    ids=lambda overrides: overrides[0].partition("=")[2],
)
def test_packed_is_flat(overrides, monkeypatch):
    cfg = config(*BASE, *overrides)
    # The packs of all ranks are here: what each says is added up already.
    monkeypatch.setattr(dist, "sum_array_over_replicas", lambda values: values)
    monkeypatch.setattr(passes, "engine_mismatch", lambda plans: {})

    @examples(15)
    @given(forests(), st.integers(0, 1 << 16), st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]), st.integers(0, 20))
    def holds(trees: list[Tree], seed: int, ranks: tuple[int, int], room: int) -> None:
        if cfg.train.prefix_sharing == "content":
            # Over so few symbols siblings often begin alike, and some are copies.
            for node in itertools.chain.from_iterable(tree.nodes for tree in trees):
                node.tokens = [token % 2 for token in node.tokens]
        count = 1 + max(itertools.chain.from_iterable([*t.prompt_tokens, *n.tokens] for t in trees for n in t.nodes))
        known = Tokens.draw(count, seed)
        flat = copy.deepcopy(trees)
        layout = {"dp_size": ranks[0], "cp_size": ranks[1], "room": room}
        groups, plans = plans_of(trees, known, cfg, layout)
        metrics = charge_kl(plans, trees, cfg)
        # As in a step: trajectories are weighed and rejected after that, and keep their new advantages.
        passes.correct_leaves(plans, cfg.algo)
        every_kl = []
        for tree, charged in zip(flat, trees, strict=True):
            kl = kl_by_definition(tree, known)
            tree.rewards = [reward - COEF * one for reward, one in zip(tree.rewards, kl, strict=True)]
            assert charged.rewards == pytest.approx(tree.rewards, abs=1e-12)
            every_kl += kl
        assert metrics["reward/kl"] == pytest.approx(statistics.fmean(every_kl), abs=1e-12)
        assert metrics["reward/kl_penalty"] == -COEF * metrics["reward/kl"]
        values = advantages(flat, cfg)
        if "grpo" in overrides[0]:
            values = [np.array(tree.rewards) - statistics.fmean(tree.rewards) for tree in flat]
        for chosen, plan in zip(groups, plans, strict=True):
            pairs = sum(pack.pairs for pack in plan.packs)
            want = flat_loss([flat[i] for i in chosen], [values[i] for i in chosen], known, cfg.algo)
            if want is None:
                assert pairs == 0
                continue
            loss = PolicyLoss(cfg.algo)
            got = sum(loss(known.logp[p.target], known.entropy[p.target], p)[0] for p in plan.packs) / pairs
            assert float(got) == pytest.approx(float(want), rel=1e-10, abs=1e-12)
            want.backward()
            want_gradients = known.gradients()
            got.backward()
            apart = (known.gradients() - want_gradients).norm() / want_gradients.norm()
            assert float(apart) <= 1e-10

    holds()


def test_a_worked_example_and_a_stage_without_logprobs():
    tree = Tree.start("p", [0])
    for parent, tokens in ((ROOT, [1, 2]), (1, [3]), (1, [4])):
        node = tree.add_child(parent)
        node.tokens, node.logprobs = tokens, [0.0] * len(tokens)
    tree.leaves, tree.rewards = [2, 3], [1.0, 0.0]
    cfg = config(*BASE, "algo.advantage_estimator=grpo", "algo.norm_adv_by_std=false")
    known = Tokens.draw(5, 0)
    known.old[:] = -1.0
    known.ref[:] = known.old - np.array([9.0, 0.5, 0.25, 1.0, -2.0])
    _, (plan,) = plans_of([tree], known, cfg, {"dp_size": 1, "cp_size": 1, "room": 0})
    segments = plan.lesson.segments
    # The shared segment once: 0.75; then 1 below leaf 2 and -2 below leaf 3. The prompt has no part in it.
    assert gather_kl(plan.packs, len(segments)).tolist() == [0, 0.75, 1.0, -2.0]
    assert segments.leaf_sums(gather_kl(plan.packs, len(segments))).tolist() == [1.75, -1.25]
    for pack in plan.packs:
        pack.old_logprobs = pack.ref_logprobs = None
    assert not gather_kl(plan.packs, len(segments)).any()


@pytest.mark.parametrize(
    "override, says",
    [
        ("algo.kl_loss_coef=0.1", "the distance from the reference would count twice; set one of them to 0"),
        ("algo.reject_zero_std_subgroups=true", "hardly two rewards are equal"),
        ("algo.update_share=0.5", "chosen by their advantage, which the KL changes"),
    ],
)
def test_what_makes_no_sense_with_it_is_refused(override, says):
    fitting = ("rollout.segment.length=8", "algo.use_tis=false")
    check(config(*BASE, *fitting), 1)
    with pytest.raises(ConfigError, match=r"reward\.kl_coef") as error:
        check(config(*BASE, *fitting, override), 1)
    assert says in str(error.value)


def test_either_kl_builds_a_reference():
    assert config(*BASE).needs_reference and config().needs_reference
    assert not config("algo.kl_loss_coef=0").needs_reference
