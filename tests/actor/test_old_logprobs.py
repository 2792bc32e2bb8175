"""Where old logprobs come from: a pass, the update's own forward pass where that is the same, or the engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from treepo_mega.actor.forward import rows_of
from treepo_mega.actor.losses import LossError, PolicyLoss
from treepo_mega.actor.passes import first_forward_suffices, optimizer_steps, provide_old_logprobs
from treepo_mega.config import Config, ConfigError, check, load_config
from treepo_mega.loss.stats import Stats
from treepo_mega.tree.credit import fold
from treepo_mega.tree.kl_reward import gather_kl
from treepo_mega.tree.pack import Batch, Pack, StepPlan, plan_step
from treepo_mega.tree.segments import Segments, Trajectory


def config(*overrides: str) -> Config:
    fixed = ("model.hf_checkpoint=unused", "data.train=[{path: unused.jsonl}]", "train.max_tokens_per_gpu=8192")
    return load_config(None, [*fixed, *overrides])


def plan(seed: int) -> StepPlan:
    generator = np.random.default_rng(seed)
    paths = [
        Trajectory(0, generator.integers(0, 9, 6).tolist(), 2, 0.0, (-generator.random(4)).tolist()) for _ in range(3)
    ]
    segments = Segments.from_paths(paths)
    credit = fold(segments, np.array([1.0, -2.0, 0.5]), np.ones(3))
    return plan_step(Batch(segments, credit), dp_size=1, dp_rank=0, max_tokens=64)


class Actor:
    """Counts its passes; logprobs of a pass are -3."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.updated: list[bool] = []
        self.costs = SimpleNamespace(metrics=dict)

    def logprobs(self, packs: list[Pack], watch: bool = False, replay: bool = False) -> list[np.ndarray]:
        self.asked.append(len(packs))
        return [np.full(len(pack.target), -3.0) for pack in packs]

    def update(self, packs: list[Pack], loss: object) -> dict[str, float]:
        self.updated.append(packs[0].on_policy)
        names = ("loss", "pg_loss", "kl_loss", "entropy", "pg_clipfrac", "ppo_kl", "tis_weight", "max_ratio_diff")
        own = {"mismatch": 2.0, "mismatch_rows": 4.0, "max_mismatch": 0.75, "skipped_steps": 0.0, "ranks_split": 0.0}
        return dict.fromkeys(names, 0.0) | own | {"grad-norm": 1.0, "learning-rate": 1.0}

    def head_metrics(self) -> dict[str, float]:
        return {}

    def routing(self, plans: list[StepPlan]) -> dict[str, float]:
        return {}


def test_the_first_mini_batch_needs_no_pass():
    actor, plans = Actor(), [plan(0), plan(1)]
    provide_old_logprobs(actor, plans, config())
    assert len(actor.asked) == 1, "the second mini-batch alone"
    assert all(pack.old_logprobs is None and pack.on_policy for pack in plans[0].packs)
    assert all((pack.old_logprobs == -3).all() and not pack.on_policy for pack in plans[1].packs)


def test_the_guard_samples_the_first_update_where_no_pass_came_before_it():
    def unseen(plans: list[StepPlan], *overrides: str) -> list[bool]:
        provide_old_logprobs(Actor(), plans, config(*overrides))
        return [pack.unseen for one in plans for pack in one.packs]

    assert unseen([plan(0)]) == [True]
    assert unseen([plan(0), plan(1)]) == [False, False], "the second mini-batch's pass is watched"
    assert unseen([plan(0)], "algo.old_logprobs=recompute") == [False]
    assert unseen([plan(0), plan(1)], "algo.old_logprobs=rollout", "algo.use_tis=false") == [True, False]


def test_recompute_asks_for_every_mini_batch_and_rollout_for_none():
    actor, plans = Actor(), [plan(0), plan(1)]
    provide_old_logprobs(actor, plans, config("algo.old_logprobs=recompute"))
    assert len(actor.asked) == 2
    provide_old_logprobs(actor, plans, config("algo.old_logprobs=rollout"))
    assert len(actor.asked) == 2
    assert all((pack.old_logprobs == pack.rollout_logprobs).all() for one in plans for pack in one.packs)


@pytest.mark.parametrize(
    "overrides",
    [
        ("algo.old_logprobs=recompute",),
        ("train.ppo_epochs=2",),
        ("loss.logprob_precision=bf16",),
        ("algo.rollout_is=sequence",),
        ("algo.rollout_rs=sequence",),
        ("algo.rollout_token_veto_threshold=0.01",),
        ("reward.kl_coef=0.1",),
        ("rollout.routing_replay=old",),
    ],
)
def test_a_pass_is_made_where_the_update_cannot_stand_in_for_it(overrides):
    assert first_forward_suffices(config())
    assert not first_forward_suffices(config(*overrides))


def loss_of(pack: Pack, logp: torch.Tensor, *overrides: str) -> tuple[torch.Tensor, Stats]:
    return PolicyLoss(config("algo.use_tis=false", *overrides).algo)(logp, torch.zeros_like(logp), pack)


def test_ratios_to_the_own_forward_pass_are_exactly_one_and_have_its_gradient():
    (pack,) = plan(0).packs
    logp = torch.linspace(-2, -0.1, len(pack.target), dtype=torch.float64, requires_grad=True)
    with pytest.raises(LossError, match="has no old logprobs"):
        loss_of(pack, logp)
    pack.on_policy = True
    own, stats = loss_of(pack, logp)
    (slope,) = torch.autograd.grad(own, logp)
    assert float(stats.maxima["max_ratio_diff"]) == 0 and float(stats.sums["ppo_kl"]) == 0
    pack.old_logprobs = logp.detach().numpy()
    given, _ = loss_of(pack, logp)
    assert own == given and torch.equal(slope, torch.autograd.grad(given, logp)[0])


@pytest.mark.parametrize(
    "where, on_policy, rows", [("recompute", False, 1), ("rollout", True, 1), ("rollout", False, 0)]
)
def test_the_mismatch_is_of_the_weights_that_sampled(where, on_policy, rows):
    """After an optimizer step, the forward pass no longer says what the sampling weights give."""
    (pack,) = plan(0).packs
    pack.on_policy = on_policy
    logp = torch.full((len(pack.target),), -1.0, dtype=torch.float64)
    before = np.full(len(pack.target), -2.0)
    pack.old_logprobs = before if where == "recompute" else pack.rollout_logprobs
    actor = before if where == "recompute" else logp.numpy()
    _, stats = loss_of(pack, logp, f"algo.old_logprobs={where}")
    apart = np.abs(actor - pack.rollout_logprobs) * rows
    assert float(stats.sums["mismatch"]) == pytest.approx(apart.sum())
    assert float(stats.sums["mismatch_rows"]) == rows * len(pack.target)
    assert float(stats.maxima["max_mismatch"]) == pytest.approx(apart.max())


def test_metrics_take_the_mean_over_all_rows_and_later_epochs_are_off_policy():
    actor, plans = Actor(), [plan(0), plan(1)]
    provide_old_logprobs(actor, plans, config("train.ppo_epochs=2"))
    metrics = optimizer_steps(actor, plans, None, epochs=2)
    assert actor.updated == [True, False, False, False]
    assert metrics["rollout/logprob_abs_diff_mean"] == 0.5 and metrics["rollout/logprob_abs_diff_max"] == 0.75


@pytest.mark.parametrize("other", ["use_tis=true", "rollout_rs=sequence", "icepop_range=[0.5, 2.0]"])
def test_what_compares_engine_and_trainer_beforehand_needs_the_pass(other):
    with pytest.raises(ConfigError, match=rf"algo\.old_logprobs rollout with algo\.{other.split('=')[0]}"):
        check(config("algo.old_logprobs=rollout", f"algo.{other}"), 1)


def test_a_missing_pass_is_no_kl_of_nothing():
    (pack,) = plan(0).packs
    pack.ref_logprobs = np.full(len(pack.target), -1.0)
    with pytest.raises(ValueError, match="old or reference logprobs alone"):
        gather_kl([pack], 6)


def test_rows_that_other_weights_sampled_are_not_compared():
    """Of a tree that waited for a step, the distance is the policy's way and not the engine's error."""
    (pack,) = plan(0).packs
    logp = torch.full((len(pack.target),), -1.0, dtype=torch.float64)
    pack.old_logprobs = np.full(len(pack.target), -2.0)
    pack.fresh = np.isin(np.arange(len(pack.target)), [0, 3, 5])
    _, stats = loss_of(pack, logp)
    apart = np.abs(-2.0 - pack.rollout_logprobs)[[0, 3, 5]]
    assert float(stats.sums["mismatch_rows"]) == 3
    assert float(stats.sums["mismatch"]) == pytest.approx(apart.sum())
    assert float(stats.maxima["max_mismatch"]) == pytest.approx(apart.max())
    assert float(stats.sums["mismatch_pairs"]) == pack.count[[0, 3, 5]].sum()
    # A tile of the loss head has some of the rows.
    part = rows_of(pack, slice(3, 6))
    _, stats = loss_of(part, logp[3:6])
    assert float(stats.sums["mismatch_rows"]) == 2
    pack.fresh[:] = False
    _, stats = loss_of(pack, logp)
    assert float(stats.sums["mismatch_rows"]) == float(stats.maxima["max_mismatch"]) == 0
