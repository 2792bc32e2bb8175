"""The loss on masses against the per-trajectory PPO loss it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from treepo_mega.config import AlgoConfig
from treepo_mega.loss.policy import clipped_objective, kl_penalty, kl_slope, policy_loss, supervised_loss


def ppo_term(r: float, advantage: float, algo: AlgoConfig) -> float:
    """One trajectory's term as PPO states it: min of the two products, bounded below for A < 0 (dual clip)."""
    low, high = 1 - algo.eps_clip, 1 + algo.eps_clip_high
    term = min(r * advantage, min(max(r, low), high) * advantage)
    if advantage < 0 and algo.eps_clip_c is not None:
        term = max(term, algo.eps_clip_c * advantage)
    return term


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def loss_of(logp, *, old, algo=None, rollout=None, ref=None, A=(1.0,), entropy=None, n=None):
    """policy_loss of rows given as lists; `A` are net advantages of flat rows."""
    logp = tensor(*logp).requires_grad_()
    A = tensor(*A)
    total, sums = policy_loss(
        logp,
        torch.zeros_like(logp) if entropy is None else entropy,
        old_logprobs=tensor(*old),
        rollout_logprobs=tensor(*(rollout or old)),
        ref_logprobs=None if ref is None else tensor(*ref),
        A_pos=A.clamp(min=0),
        A_neg=A.clamp(max=0),
        n=torch.ones_like(logp) if n is None else tensor(*n),
        algo=algo or AlgoConfig(use_tis=False),
    )
    total.backward()
    return total.item(), {k: v.item() for k, v in sums.by_name().items()}, logp.grad.tolist()


@examples(300)
@given(
    # Ratios in every regime: below, inside and above the clip range, and beyond the dual clip.
    st.floats(-4, 4),
    st.lists(st.floats(-5, 5), min_size=1, max_size=8),
    st.floats(0.05, 0.9),
    st.floats(0.05, 2),
    st.one_of(st.none(), st.floats(1.5, 20)),
)
def test_masses_are_the_sum_over_trajectories(log_ratio, advantages, low, high, dual):
    algo = AlgoConfig(eps_clip=low, eps_clip_high=high, eps_clip_c=None if dual is None else max(dual, 1 + high))
    r = math.exp(log_ratio)
    pos, neg = sum(a for a in advantages if a > 0), sum(a for a in advantages if a < 0)
    got = clipped_objective(tensor(r), tensor(pos), tensor(neg), algo).item()
    assert got == pytest.approx(sum(ppo_term(r, a, algo) for a in advantages), rel=1e-12, abs=1e-12)


def test_a_net_advantage_would_be_wrong():
    algo = AlgoConfig()
    masses = clipped_objective(tensor(2.0), tensor(1.0), tensor(-1.0), algo).item()
    assert masses == pytest.approx(1.28 - 2.0)  # the net advantage is 0, and so would the loss be


@pytest.mark.parametrize(
    "ratio, advantage, slope",
    [
        (1.0, 1.0, -1.0),  # inside: dL/dlogp = -A r
        (1.0, -1.0, 1.0),
        (1.1, 2.0, -2.2),
        (1.5, 1.0, 0.0),  # clipped from above: nothing left to gain
        (0.5, 1.0, -0.5),  # a good token that became unlikely is pulled back
        (0.5, -1.0, 0.0),  # clipped from below
        (1.5, -1.0, 1.5),  # a bad token that became likely is pushed down
        (11.0, -1.0, 0.0),  # dual clip
    ],
)
def test_gradient_in_closed_form(ratio, advantage, slope):
    _, _, grad = loss_of([math.log(ratio)], old=[0.0], A=[advantage])
    assert grad[0] == pytest.approx(slope)


def test_first_step_is_the_plain_policy_gradient():
    logp = [-0.3, -2.0, -1e-9]
    total, sums, grad = loss_of(logp, old=logp, A=[0.5, -2.0, 1.0])
    assert sums["max_ratio_diff"] == 0.0 and sums["ppo_kl"] == 0.0 and sums["pg_clipfrac"] == 0.0
    assert total == pytest.approx(0.5) == pytest.approx(sums["pg_loss"])
    assert grad == pytest.approx([-0.5, 2.0, -1.0])


def test_clip_fraction_and_kl_count_pairs():
    old = [0.0, 0.0, 0.0]
    _, sums, _ = loss_of([math.log(2), math.log(0.5), 0.0], old=old, A=[1.0, -1.0, 1.0], n=[3, 2, 4])
    assert sums["pg_clipfrac"] == 5  # both clipped tokens, by their multiplicity
    assert sums["ppo_kl"] == pytest.approx(-(3 - 2) * math.log(2))
    assert sums["max_ratio_diff"] == pytest.approx(1.0)
    assert sums["tis_weight"] == 9


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_penalties(kind):
    logp, ref = tensor(-1.0, -0.5, -3.0), tensor(-1.0, -1.5, -1.0)
    d = ref - logp
    want = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[kind]
    torch.testing.assert_close(kl_penalty(logp, ref, kind), want)
    assert kl_penalty(logp, ref, kind)[0] == 0
    if kind != "k1":
        assert (kl_penalty(logp, ref, kind)[1:] > 0).all()


def test_k1_and_k3_estimate_the_same_divergence():
    p, q = (torch.randn(50, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    p, q = p.log_softmax(0), q.log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * kl_penalty(p, q, kind)).sum(), exact)


def test_kl_term_is_weighted_by_multiplicity_and_needs_a_reference():
    algo = AlgoConfig(kl_loss_coef=0.1, kl_loss_type="k2", use_tis=False)
    total, sums, grad = loss_of([-1.0], old=[-1.0], ref=[-2.0], A=[0.0], n=[3], algo=algo)
    assert total == pytest.approx(0.1 * 3 * 0.5) and sums["kl_loss"] == pytest.approx(1.5)
    assert grad == pytest.approx([0.1 * 3 * 1.0])
    with pytest.raises(ValueError, match="the reference pass did not run"):
        loss_of([-1.0], old=[-1.0], algo=algo)


def test_reference_equal_to_actor_costs_nothing():
    algo = AlgoConfig(kl_loss_coef=0.5, use_tis=False)
    _, sums, _ = loss_of([-1.0, -0.2], old=[-1.0, -0.2], ref=[-1.0, -0.2], A=[1.0, 1.0], algo=algo)
    assert sums["kl_loss"] == 0.0


def test_truncated_importance_sampling_weighs_rows_and_gives_no_gradient_itself():
    algo = AlgoConfig(use_tis=True, tis_clip=2.0)
    old, rollout = [math.log(0.5)] * 3, [math.log(0.5), math.log(0.4), math.log(0.1)]
    total, sums, grad = loss_of(old, old=old, rollout=rollout, A=[1.0, 1.0, 1.0], algo=algo)
    weights = [1.0, 1.25, 2.0]  # the last would be 5
    assert total == pytest.approx(-sum(weights)) and sums["tis_weight"] == pytest.approx(sum(weights))
    assert grad == pytest.approx([-w for w in weights])


def test_entropy_bonus_lowers_the_loss_by_pairs():
    entropy = tensor(0.5, 2.0).requires_grad_()
    algo = AlgoConfig(entropy_coef=0.1, use_tis=False)
    total, sums, _ = loss_of([0.0, 0.0], old=[0.0, 0.0], A=[0.0, 0.0], n=[2, 3], entropy=entropy, algo=algo)
    assert total == pytest.approx(-0.7) and sums["entropy"] == pytest.approx(7.0)
    assert entropy.grad.tolist() == pytest.approx([-0.2, -0.3])


def test_a_pack_without_rows_costs_nothing():
    total, sums, _ = loss_of([], old=[], A=[])
    assert total == 0.0 and all(v == 0.0 for v in sums.values())


def test_supervised_loss_is_cross_entropy_by_multiplicity():
    logp = tensor(-1.0, -2.0).requires_grad_()
    loss, sums = supervised_loss(logp, tensor(3.0, 1.0))
    loss.backward()
    assert loss.item() == 5.0 == sums.sums["loss"].item()
    assert logp.grad.tolist() == [-3.0, -1.0]


@examples(200)
@given(st.integers(0, 2**31), st.sampled_from(["k1", "k2", "k3"]), st.booleans(), st.booleans())
def test_closed_form_gradient_is_autograds(seed, kind, dual, bonus):
    """Against autograd on the formulas themselves, in every regime of the clip."""
    g = torch.Generator().manual_seed(seed)
    logp, old, rollout, ref, pos, neg, entropy = torch.randn(7, 32, generator=g, dtype=torch.float64)
    n = torch.randint(1, 6, (32,), generator=g).double()
    algo = AlgoConfig(
        kl_loss_coef=0.3, kl_loss_type=kind, use_tis=True, eps_clip_c=3.0 if dual else None,
        entropy_coef=0.1 if bonus else 0.0,
    )  # fmt: skip
    logp, entropy = logp.requires_grad_(), entropy.requires_grad_()
    pos, neg = pos.abs(), -neg.abs()
    weight = (old - rollout).exp().clamp(max=algo.tis_clip)
    objective = clipped_objective((logp - old).exp(), pos, neg, algo)
    want = (-weight * objective + 0.3 * n * kl_penalty(logp, ref, kind) - algo.entropy_coef * n * entropy).sum()
    got, _ = policy_loss(
        logp,
        entropy,
        old_logprobs=old,
        rollout_logprobs=rollout,
        ref_logprobs=ref,
        A_pos=pos,
        A_neg=neg,
        n=n,
        algo=algo,
    )
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(2 * x, (logp, entropy), allow_unused=True) for x in (got, want)]
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-12, atol=1e-12)
    if bonus:
        torch.testing.assert_close(grads[0][1], grads[1][1])
    else:
        assert grads[0][1] is None


@pytest.mark.parametrize("dual", [10.0, None])
def test_a_ratio_that_overflows_gives_no_nan(dual):
    algo = AlgoConfig(use_tis=False, eps_clip_c=dual)
    total, _, grad = loss_of([800.0, 0.0], old=[0.0, 800.0], A=[1.0, -1.0], algo=algo)
    assert grad == [0.0, 0.0] and total == pytest.approx(-1.28 + 0.8)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_rows_that_do_not_count_cost_nothing_whatever_they_hold(kind):
    """All of a micro-batch masked: no masses, no multiplicity, and ratios and KL terms that overflow."""
    algo = AlgoConfig(use_tis=True, eps_clip_c=None, kl_loss_coef=0.1, kl_loss_type=kind, entropy_coef=0.01)
    logp, old, rollout = [0.0, -900.0, 0.0], [-900.0, 0.0, 0.0], [0.0, -900.0, -900.0]
    total, sums, grad = loss_of(
        logp, old=old, rollout=rollout, ref=[900.0, -900.0, 0.0], A=[0.0] * 3, n=[0.0] * 3, algo=algo
    )
    assert total == 0.0 and grad == [0.0] * 3
    assert all(v == 0.0 for k, v in sums.items() if k != "max_ratio_diff")


@examples(200)
@given(st.floats(-3, 3), st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(0.05, 2))
def test_cispo_on_masses_is_the_sum_over_trajectories(log_ratio, advantages, high):
    """Against autograd on the flat statement: a weight without gradient times A * logp, once a trajectory."""
    algo = AlgoConfig(use_tis=False, policy_loss="cispo", eps_clip_high=high)
    flat = tensor(log_ratio).requires_grad_()
    weight = flat.detach().exp().clamp(max=1 + high)
    expected = -sum((weight * advantage * flat).sum() for advantage in advantages)
    expected.backward()
    logp = tensor(log_ratio).requires_grad_()
    total, _ = policy_loss(
        logp,
        torch.zeros_like(logp),
        old_logprobs=tensor(0.0),
        rollout_logprobs=tensor(0.0),
        ref_logprobs=None,
        A_pos=tensor(sum(a for a in advantages if a > 0)),
        A_neg=tensor(sum(a for a in advantages if a < 0)),
        n=tensor(float(len(advantages))),
        algo=algo,
    )
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-10)
    assert logp.grad.item() == pytest.approx(flat.grad.item(), rel=1e-10, abs=1e-10)


def test_cispo_keeps_the_gradient_that_the_clip_takes():
    ppo = loss_of([math.log(1.5)], old=[0.0], A=[1.0])[2]
    cispo = AlgoConfig(use_tis=False, policy_loss="cispo")
    assert ppo == [0.0]
    assert loss_of([math.log(1.5)], old=[0.0], A=[1.0], algo=cispo)[2] == pytest.approx([-1.28])


@examples(200)
@given(st.floats(-40, 40))
def test_low_var_kl_is_bounded_and_its_slope_is_autograds(difference):
    reference = tensor(difference)
    logp = tensor(0.0).requires_grad_()
    bounded = (reference - logp).clamp(-20, 20)
    stated = (bounded.exp() - bounded - 1).clamp(-10, 10)
    stated.sum().backward()
    assert kl_penalty(logp.detach(), reference, "low_var_kl").item() == stated.item() <= 10
    assert kl_slope(logp.detach(), reference, "low_var_kl").item() == pytest.approx(logp.grad.item(), abs=1e-12)


def test_icepop_drops_tokens_that_the_engine_sees_differently():
    algo = AlgoConfig(use_tis=False, icepop_range=(0.5, 2.0))
    rollout = [0.0, math.log(3.0), -math.log(3.0)]
    total, sums, slopes = loss_of([0.0] * 3, old=[0.0] * 3, rollout=rollout, A=[1.0] * 3, algo=algo)
    assert slopes == [-1.0, 0.0, 0.0]
    assert (total, sums["tis_weight"]) == (-1.0, 1.0)
    with_tis = AlgoConfig(use_tis=True, tis_clip=1.5, icepop_range=(0.3, 4.0))
    assert loss_of([0.0] * 3, old=[0.0] * 3, rollout=rollout, A=[1.0] * 3, algo=with_tis)[2] == pytest.approx(
        [-1.0, -1 / 3, -1.5]
    )
