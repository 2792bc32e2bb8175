"""The one-pass loss: its gradient is that of the two-pass head, of autograd and of finite differences."""

from __future__ import annotations

import pytest
import torch

from tests.loss.test_head import dense, inputs
from treepo_mega.config import AlgoConfig
from treepo_mega.loss.fused import row_loss
from treepo_mega.loss.policy import policy_loss
from treepo_mega.loss.shard import Shard
from treepo_mega.loss.stats import Stats

EVERY_TERM = AlgoConfig(
    eps_clip=0.2, eps_clip_high=0.28, eps_clip_c=3.0, kl_loss_coef=0.1, entropy_coef=0.02, use_tis=True, tis_clip=1.5
)


def policy_rows(logp: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """What policy_loss needs beside logp, with ratios in every regime of the clip and none near its corners."""
    g = torch.Generator().manual_seed(seed)
    n = len(logp)

    def noise():
        return torch.randn(n, generator=g, dtype=torch.float64).to(logp.dtype)

    shift = torch.tensor([0.0, 0.15, 0.5, -0.1, -0.5, -1.5, 0.1, -0.7], dtype=logp.dtype).repeat(n // 8 + 1)[:n]
    return {
        "old_logprobs": logp.detach() + shift,
        "rollout_logprobs": logp.detach() + shift + 0.3 * noise(),
        "ref_logprobs": logp.detach() + 0.3 * noise(),
        "A_pos": noise().abs(),
        "A_neg": -noise().abs(),
        "n": torch.randint(1, 5, (n,), generator=g).to(logp.dtype),
    }


def policy(rows: dict[str, torch.Tensor], algo: AlgoConfig):
    """A RowLoss."""

    def loss(logp, entropy, part):
        return policy_loss(logp, entropy, **{k: v[part] for k, v in rows.items()}, algo=algo)

    return loss


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradcheck_in_fp64_with_every_term(kind):
    hidden, weight, target = inputs(rows=8, vocab=5, padded=6, width=3)
    rows = policy_rows(dense(hidden, weight, target, 5, 0.7)[0])
    algo = EVERY_TERM.model_copy(update={"kl_loss_type": kind})
    shard = Shard.of(weight, 0, 5, temperature=0.7, chunk=3)

    def f(h, w):
        return row_loss(h, w, target, shard, policy(rows, algo))[0]

    assert torch.autograd.gradcheck(f, (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 5, 1024])
@pytest.mark.parametrize("algo", [EVERY_TERM, AlgoConfig(use_tis=False)], ids=["every term", "defaults"])
def test_equals_the_dense_head_with_all_statistics(chunk, algo):
    hidden, weight, target = inputs(rows=24, vocab=11, padded=16)
    want_logp, want_entropy = dense(hidden, weight, target, 11, 0.8)
    rows = policy_rows(want_logp)
    want, want_stats = policy_loss(want_logp, want_entropy, **rows, algo=algo)
    want_sums = want_stats.by_name()
    shard = Shard.of(weight, 0, 11, temperature=0.8, chunk=chunk)
    got, stats, logp, entropy = row_loss(hidden, weight, target, shard, policy(rows, algo))
    sums = stats.by_name()
    assert sums.keys() == want_sums.keys()
    assert sums["pg_clipfrac"] > 0
    for a, b in [(got, want), (logp, want_logp), (entropy, want_entropy), *((sums[k], want_sums[k]) for k in sums)]:
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(3 * x, (hidden, weight)) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert (grads[0][1][11:] == 0).all(), "padded rows of the vocabulary get no gradient"


def test_main_grad_is_added_to_in_the_loss_scale_that_was_told():
    hidden, weight, target = inputs(rows=24)
    rows = policy_rows(dense(hidden, weight, target, 11, 1.0)[0])
    shard = Shard.of(weight, 0, 11, chunk=5)
    plain = row_loss(hidden, weight, target, shard, policy(rows, EVERY_TERM))[0]
    d_hidden, d_weight = torch.autograd.grad(8 * plain, (hidden, weight))
    weight.main_grad = torch.ones_like(weight)
    loss = row_loss(hidden, weight, target, shard, policy(rows, EVERY_TERM), loss_scale=8.0)[0]
    (8 * loss).backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad - 1, d_weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hidden.grad, d_hidden, rtol=1e-10, atol=1e-12)


def test_another_scale_than_the_one_told_is_an_error():
    hidden, weight, target = inputs(rows=24)
    weight.main_grad = torch.zeros_like(weight)
    shard = Shard.of(weight, 0, 11)
    loss = row_loss(hidden, weight, target, shard, lambda logp, entropy, part: (logp.sum(), Stats()))[0]
    with pytest.raises(RuntimeError, match="not the loss_scale it was told"):
        (2 * loss).backward()


def test_no_rows():
    hidden, weight, target = inputs()
    rows = policy_rows(torch.zeros(0, dtype=torch.float64))
    shard = Shard.of(weight, 0, 11)
    loss, stats, logp, _ = row_loss(hidden[:0], weight, target[:0], shard, policy(rows, EVERY_TERM))
    sums = stats.by_name()
    loss.backward()
    assert loss == 0 and logp.shape == (0,) and (weight.grad == 0).all()
    assert all(v == 0 for v in sums.values()) and "pg_clipfrac" in sums
