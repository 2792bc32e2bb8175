"""From trees to a batch: estimators and whitening as the configuration says, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from treepo_mega.actor.batch import _mark_fresh, _thinned, advantages, lesson_of, pair_cost
from treepo_mega.config import Config, ConfigError, check, load_config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.tree.descent import leaf_counts
from treepo_mega.tree.merge import merge
from treepo_mega.tree.node import Tree
from treepo_mega.tree.node_advantage import node_advantages
from treepo_mega.tree.pack import Batch, plan_step
from treepo_mega.tree.segments import Segments


def config(*overrides: str) -> Config:
    return load_config(None, ["model.hf_checkpoint=unused", "data.train=[{path: unused.jsonl}]", *overrides])


def forest() -> list[Tree]:
    """Two trees with a shared segment of 3 tokens and leaves of 1 and 5, and one path of 4."""
    trees = []
    for i, rewards in enumerate(((1.0, 0.0), (0.0, 1.0))):
        tree = Tree.start(f"p{i}", [1, 2])
        for parent, size in ((0, 3), (1, 1), (1, 5)):
            node = tree.add_child(parent)
            node.tokens, node.logprobs = [3] * size, [-1.0] * size
        tree.leaves, tree.rewards = [2, 3], list(rewards)
        trees.append(tree)
    return trees


def test_whitening_weighs_every_trajectory_and_token_once():
    got = advantages(forest(), config())
    repeated = np.concatenate([np.repeat(v, [4, 8]) for v in got])
    assert [len(v) for v in got] == [2, 2], "per leaf"
    assert repeated.mean() == pytest.approx(0, abs=1e-12) and repeated.std(ddof=1) == pytest.approx(1)


def test_segment_advantages_are_per_node_and_can_be_whitened():
    plain = advantages(forest(), config("algo.advantage_estimator=segment"))
    assert [v.tolist() for v in plain] == [node_advantages(tree, "segment") for tree in forest()]
    white = advantages(forest(), config("algo.advantage_estimator=segment", "algo.whiten_advantages=true"))
    # Node 1 is shared by two trajectories of 3 tokens each; the prompt carries nothing.
    repeated = np.concatenate([np.repeat(v[1:], [6, 1, 5]) for v in white])
    assert repeated.mean() == pytest.approx(0, abs=1e-12) and repeated.std(ddof=1) == pytest.approx(1)


def test_trees_without_signal_get_nothing_and_change_nothing():
    """Whitening takes off a mean; a tree that compares nothing must not receive it."""
    alone = advantages(forest(), config())
    flat = forest()[0]
    for reward in (0.0, 1.0):
        flat.rewards = [reward, reward]
        got = advantages([*forest(), flat], config())
        assert [values.tolist() for values in got[:2]] == [values.tolist() for values in alone]
        assert got[2].tolist() == [0.0, 0.0]
    # REINFORCE++ compares with the batch: there an all-right prompt is better than the others.
    assert advantages([*forest(), flat], config("algo.advantage_estimator=reinforce_pp"))[2].min() > 0


@pytest.mark.parametrize("weight", ["uniform", "descent"])
def test_dr_grpo_is_the_reward_minus_the_trees_mean(weight):
    """On trees as on independent samples; the mean is that of the leaves as they count."""
    trees = forest()
    third = trees[0].add_child(0)
    third.tokens = [3] * 2
    trees[0].leaves.append(third.id)
    trees[0].rewards.append(0.0)
    chosen = ("algo.advantage_estimator=grpo", "algo.norm_adv_by_std=false", f"algo.leaf_weight={weight}")
    first, second = advantages(trees, config(*chosen))
    mean = 1 / 3 if weight == "uniform" else 1 / 4
    assert first == pytest.approx([1 - mean, -mean, -mean]) and second == pytest.approx([-0.5, 0.5])


def test_reinforce_pp_baseline_divides_by_the_batchs_deviation():
    got = np.concatenate(advantages(forest(), config("algo.advantage_estimator=reinforce_pp_baseline")))
    # R - mean is 0.5 and -0.5 in both trees; its tokens are 4 and 8 in the first, and the other way round.
    centred = np.repeat([0.5, -0.5, -0.5, 0.5], [4, 8, 4, 8])
    want = (np.array([0.5, -0.5, -0.5, 0.5]) - centred.mean()) / centred.std(ddof=1)
    assert got == pytest.approx(want)


def test_descent_counts_a_leaf_by_its_chance():
    """In whitening, each (trajectory, token) pair counts its trajectory's share; advantages can be bounded."""
    trees = forest()
    third = trees[0].add_child(0)
    third.tokens = [3] * 2
    trees[0].leaves.append(third.id)
    trees[0].rewards.append(0.0)
    first, second = advantages(trees, config("algo.leaf_weight=descent"))
    # Chances: 1/4, 1/4 behind the shared segment, 1/2 for the new leaf; the tree counts as three trajectories.
    pairs = np.array([3 / 4 * 4, 3 / 4 * 8, 3 / 2 * 2, 4, 8])
    values = np.concatenate([first, second])
    assert (values * pairs).sum() == pytest.approx(0, abs=1e-12)
    assert (values**2 * pairs).sum() / (pairs.sum() - 1) == pytest.approx(1)
    bounded = advantages(trees, config("algo.leaf_weight=descent", "algo.advantage_clip=0.5"))
    assert np.abs(np.concatenate(bounded)).max() == 0.5


def uneven() -> list[Tree]:
    """Trees of two and three leaves."""
    trees = forest()
    third = trees[0].add_child(0)
    third.tokens, third.logprobs = [3] * 2, [-1.0] * 2
    trees[0].leaves.append(third.id)
    trees[0].rewards.append(0.0)
    return trees


@pytest.mark.parametrize("estimator", ["treepo", "segment"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_a_tree_counts_as_one_prompt_where_it_is_told_to(mode, estimator):
    """As if every leaf of the tree of two stood in the batch three times, and of the tree of three twice."""
    keys = (f"algo.loss_agg_mode={mode}", f"algo.advantage_estimator={estimator}", "algo.whiten_advantages=false")
    trees = uneven()
    alike = config(*keys)
    values = advantages(trees, alike)

    def masses(cfg: Config, times: list[int]) -> list[np.ndarray]:
        """A_pos, A_neg and n by segment of each tree, of the loss as it is divided by the pairs of the batch."""
        chosen = [index for index, often in enumerate(times) for _ in range(often)]
        batch = [trees[index] for index in chosen]
        segments = Segments.from_trees(batch, list(range(len(batch))), "tree")
        credit = lesson_of(segments, [values[index] for index in chosen], batch, cfg).credit()
        table = np.stack([credit.A_pos, credit.A_neg, credit.n]) / segments.flat_lengths().sum()
        by_tree = [table[:, segments.group == group] for group in range(len(batch))]
        return [sum(by_tree[at] for at, index in enumerate(chosen) if index == tree) for tree in (0, 1)]

    prompt = masses(config(*keys, "algo.tree_weight=prompt"), [1, 1])
    for got, want in zip(prompt, masses(alike, [2, 3]), strict=True):
        assert got == pytest.approx(want, rel=1e-12, abs=1e-15)
    leaves = masses(config(*keys, "algo.tree_weight=leaves"), [1, 1])
    assert not np.allclose(leaves[0], prompt[0]) and np.array_equal(leaves[0], masses(alike, [1, 1])[0])


def test_whitening_counts_a_tree_as_one_prompt_where_it_is_told_to():
    first, second = advantages(uneven(), config("algo.tree_weight=prompt"))
    # Two and a half trajectories each: 4, 8 and 2 tokens in the first, 4 and 8 in the second.
    pairs = np.array([4, 8, 2, 0, 0]) * 2.5 / 3 + np.array([0, 0, 0, 4, 8]) * 2.5 / 2
    values = np.concatenate([first, second])
    assert (values * pairs).sum() == pytest.approx(0, abs=1e-12)
    assert (values**2 * pairs).sum() / (pairs.sum() - 1) == pytest.approx(1)


def test_descent_and_leaves_scale_the_shares_of_a_tree():
    trees = uneven()
    assert leaf_counts(trees, "uniform", "auto") is None
    assert leaf_counts(trees, "descent", "auto") == leaf_counts(trees, "descent", "prompt")
    assert leaf_counts(trees, "descent", "auto") == [0.25, 0.25, 0.5, 0.5, 0.5]
    assert leaf_counts(trees, "descent", "leaves") == [0.75, 0.75, 1.5, 1.0, 1.0]


def test_descent_refuses_to_pay_for_leaves_that_count_nothing():
    fitting = ("algo.leaf_weight=descent", "rollout.segment.length=128", "train.max_tokens_per_gpu=8192")
    with pytest.raises(ConfigError, match=r"set rollout\.fallback\.from=none"):
        check(config(*fitting), 1)
    check(config(*fitting, "rollout.fallback.from=none"), 1)


def test_corrections_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"icepop_range \[1.5, 2.0\]: expected \[low, high\]"):
        check(config("algo.icepop_range=[1.5, 2.0]", "train.max_tokens_per_gpu=8192"), 1)
    with pytest.raises(ConfigError, match="use one of them"):
        check(
            config(
                "algo.policy_loss=cispo",
                "algo.ratio_level=sequence",
                "train.prefix_sharing=none",
                "train.max_tokens_per_gpu=8192",
            ),
            1,
        )


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        (("algo.rollout_is=sequence", "algo.use_tis=false"), "rollout_is sequence with algo.use_tis false"),
        (("algo.tis_clip_low=1", "algo.tis_clip=0.9"), "tis_clip_low 1 exceeds algo.tis_clip 0.9"),
        (("algo.rollout_rs_threshold_lower=0.5",), "has no effect without algo.rollout_rs"),
    ],
)
def test_corrections_that_would_do_nothing_are_refused(overrides, wanted):
    with pytest.raises(ConfigError, match=wanted):
        check(config("train.max_tokens_per_gpu=8192", *overrides), 1)


@pytest.mark.parametrize(
    "override, wanted",
    [
        ("algo.rollout_rs=token", "sequence"),
        ("algo.rollout_rs_threshold=0.5", "rollout_rs_threshold"),
        ("algo.rollout_is_threshold=3", "set algo.tis_clip"),
        ("algo.rollout_is_level=sequence", "set algo.rollout_is"),
    ],
)
def test_names_and_values_of_other_trainers_are_answered(override, wanted):
    with pytest.raises(ConfigError, match=wanted):
        config(override)


def test_weighing_trajectories_switches_importance_sampling_on():
    assert not config().algo.use_tis, "both sides compute in fp32"
    asked = config("algo.rollout_is=geometric").algo
    assert asked.use_tis and asked.weighs_leaves and not asked.rejects_leaves
    assert not config("algo.rollout_is=token").algo.weighs_leaves
    assert config("algo.rollout_token_veto_threshold=1e-4").algo.rejects_leaves


def test_reinforce_is_whitened_by_default():
    assert config("algo.advantage_estimator=reinforce_pp").algo.whiten_advantages
    assert not config("algo.advantage_estimator=segment").algo.whiten_advantages


def test_sequence_ratios_refuse_shared_tokens():
    wanted = "a shared token has as many ratios as trajectories"
    with pytest.raises(ConfigError, match=wanted):
        check(config("algo.ratio_level=sequence", "train.max_tokens_per_gpu=8192"), 1)
    check(config("algo.ratio_level=sequence", "train.prefix_sharing=none", "train.max_tokens_per_gpu=8192"), 1)


SHAPE = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 192, "num_hidden_layers": 4, "vocab_size": 32,
}  # fmt: skip


def test_pair_cost_is_attention_over_matrices():
    # Multiply-adds a layer: 2 x 128 per pair; q, o 64 x 128 each, k, v 64 x 64 each, three of 64 x 192 per token.
    assert pair_cost(ModelSpec.from_config(SHAPE)) == 256 / (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 192)


def test_pair_cost_knows_the_default_head_size_of_qwen3():
    """Qwen3 leaves `head_dim` out at 128, whatever its hidden size; another model's would be hidden / heads."""
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    qwen3 = ModelSpec.from_config(shape | {"architectures": ["Qwen3ForCausalLM"]})
    assert pair_cost(qwen3) == 1024 / (2 * 64 * 512 + 2 * 64 * 256 + 3 * 64 * 192)
    assert pair_cost(ModelSpec.from_config(shape)) == 128 / (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)


def test_merging_equal_tokens_is_refused_where_an_engine_logprob_cannot_speak_for_all_copies():
    with pytest.raises(ConfigError, match=r"prefix_sharing content with rollout\.partial_rollout"):
        check(config("train.prefix_sharing=content", "rollout.partial_rollout=64", "train.max_tokens_per_gpu=8192"), 1)
    sequence = ("algo.use_tis=true", "algo.rollout_is=sequence")
    check(config("train.prefix_sharing=content", *sequence, "train.max_tokens_per_gpu=8192"), 1)


def test_a_choice_of_leaves_teaches_what_all_teach_on_average():
    """With the weights of the configuration, over the choices of many steps; the same choice for the same step."""
    cfg = config("algo.leaf_weight=descent", "algo.advantage_estimator=grpo", "algo.update_share=0.5")
    trees = uneven()
    values = advantages(trees, cfg)
    counts = leaf_counts(trees, "descent", "auto")
    want = sum(c * v for c, v in zip(counts, np.concatenate(values), strict=True) if v > 0)
    sums = []
    for step in range(300):
        for tree in trees:
            tree.nodes[1].policy_version = step
        fewer = _thinned(trees, [0, 1], values, cfg)
        assert _thinned(trees, [0, 1], values, cfg).counts.tolist() == fewer.counts.tolist()
        segments = Segments.from_trees(fewer.trees, fewer.prompts)
        lesson = lesson_of(segments, fewer.values, fewer.trees, cfg, fewer.counts)
        assert lesson.counts is fewer.counts and sum(len(tree.leaves) for tree in fewer.trees) in (2, 3)
        sums.append(sum(c * v for c, v in zip(fewer.counts, np.concatenate(fewer.values), strict=True) if v > 0))
    assert np.mean(sums) == pytest.approx(want, abs=4 * np.std(sums) / len(sums) ** 0.5)


@pytest.mark.parametrize("sharing", ["tree", "prompt", "content"])
def test_packs_say_which_rows_the_weights_of_the_step_sampled(sharing):
    old, new = forest()
    for number, node in enumerate(old.nodes[1:]):
        # Each segment has a token of its own, by which its rows are found again.
        node.tokens = [10 + number] * len(node.tokens)
    for tree, version in ((old, 3), (new, 4)):
        for node in tree.nodes[1:]:
            node.policy_version = version
    # It was carried over: its last leaf is of this step.
    old.nodes[3].policy_version = 4
    trees = [old, new]
    segments = Segments.from_trees(trees, [0, 1], "prompt" if sharing == "prompt" else "tree")
    lesson = lesson_of(segments, advantages(trees, config()), trees, config())
    if sharing == "content":
        lesson = replace(lesson, merged=merge(segments))
    plan = plan_step(Batch(lesson.laid_out, lesson.row_credit()), dp_size=1, dp_rank=0, max_tokens=64)
    plan.lesson = lesson
    _mark_fresh(plan, trees, 4)
    for pack in plan.packs:
        assert pack.fresh is not None
        assert set(pack.target[pack.fresh].tolist()) == {3, 12}
        assert set(pack.target[~pack.fresh].tolist()) == {10, 11}
    for tree in trees:
        for node in tree.nodes[1:]:
            node.policy_version = 4
    plan.packs[0].fresh = None
    _mark_fresh(plan, trees, 4)
    assert plan.packs[0].fresh is None, "all rows are"
