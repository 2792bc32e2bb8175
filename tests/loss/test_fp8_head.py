"""The FP8 head by emulation: it computes what it says, and the exact target brings its logprobs back."""

from __future__ import annotations

import pytest
import torch

from treepo_mega.loss.fused import row_loss
from treepo_mega.loss.logprobs import logprob_entropy
from treepo_mega.loss.operands import Numerics, WeightCache
from treepo_mega.loss.quantize import BLOCK, RECIPES, QuantizeError, Split, quantize
from treepo_mega.loss.shard import Shard
from treepo_mega.loss.stats import Stats

VOCAB, PADDED, WIDTH, ROWS = 1000, 1024, 200, 150


def operands():
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=g).requires_grad_()
    weight = (torch.randn(PADDED, WIDTH, generator=g) * (2.4 / WIDTH**0.5)).requires_grad_()
    target = (hidden.detach() @ weight.detach()[:VOCAB].t()).softmax(-1).multinomial(1, generator=g)[:, 0]
    return hidden, weight, target


def call(hidden, weight, target, numerics, **how):
    return logprob_entropy(hidden, weight, target, Shard.of(weight, 0, VOCAB, numerics=numerics, chunk=64, **how))


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_are_products_of_the_quantised_operands(recipe):
    hidden, weight, target = operands()
    h = quantize(hidden.detach(), recipe).values().double()
    w = quantize(weight.detach(), recipe, block_rows=BLOCK, valid_rows=VOCAB).values().double()[:VOCAB]
    z = h @ w.t()
    got = call(hidden, weight, target, Numerics("fp8", recipe, exact_target=False, loud_channels=0))
    logp = z.log_softmax(1)
    torch.testing.assert_close(got[0].double(), logp.gather(1, target[:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1].double(), -(logp.exp() * logp).sum(1), rtol=0, atol=1e-5)
    exact = (hidden.detach().bfloat16().double() * weight.detach()[target].bfloat16().double()).sum(1)
    z.scatter_(1, target[:, None], exact[:, None])
    got = call(hidden, weight, target, Numerics("fp8", recipe, loud_channels=0))
    torch.testing.assert_close(got[0].double(), exact - z.logsumexp(1), rtol=0, atol=1e-5)
    assert float(got[0].detach().max()) <= 0, "swapped inside the sum, so no probability exceeds 1"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_exact_target_brings_logprobs_back(recipe):
    hidden, weight, target = operands()
    want = call(hidden, weight, target, Numerics())[0]
    error = {}
    for exact in (True, False):
        got = call(hidden, weight, target, Numerics("fp8", recipe, exact_target=exact, loud_channels=0))[0]
        error[exact] = float((got - want).detach().abs().mean())
    assert error[True] < error[False] / 3 and 0.03 < error[False] < 0.2, error


@pytest.mark.parametrize("grads", ["bf16", "fp8"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_both_ways_to_the_gradient_agree_and_are_near_fp32(recipe, grads):
    hidden, weight, target = operands()
    numerics = Numerics("fp8", recipe, grads=grads)
    slope = torch.randn(ROWS, generator=torch.Generator().manual_seed(4))
    shard = Shard.of(weight, 0, VOCAB, numerics=numerics, chunk=64)
    fused = row_loss(hidden, weight, target, shard, lambda logp, _, part: ((slope[part] * logp).sum(), Stats()))[0]
    ways = [fused, *((slope * call(hidden, weight, target, n)[0]).sum() for n in (numerics, Numerics()))]
    grad = [torch.autograd.grad(x, (hidden, weight)) for x in ways]
    for one, two, exact in zip(*grad, strict=True):
        assert float((one - two).norm() / two.norm()) < (1e-3 if grads == "bf16" else 2e-2)
        assert float((one - exact).norm() / exact.norm()) < (0.05 if grads == "bf16" else 0.1)
    assert (grad[0][1][VOCAB:] == 0).all()


def test_the_weight_is_quantised_once_for_old_reference_and_policy_passes():
    hidden, weight, target = operands()
    cache, numerics = WeightCache(), Numerics("fp8", exact_target=False, grads="fp8")
    for _ in range(3):
        call(hidden, weight, target, numerics, cache=cache)[0].sum().backward()
    assert cache.made == 1
    with torch.no_grad():
        weight.mul_(2)  # torch counts this as a new version
    call(hidden, weight, target, numerics, cache=cache)
    assert cache.made == 2
    weight.data.mul_(2)  # Megatron's optimizers write like this, and torch does not notice
    stale = call(hidden, weight, target, numerics, cache=cache)[0]
    cache.clear()
    fresh = call(hidden, weight, target, numerics, cache=cache)[0]
    assert cache.made == 3 and not torch.equal(stale, fresh)


def test_an_empty_micro_batch_does_not_choose_the_loud_channels():
    """A data-parallel rank with less work than others begins its step with one."""
    hidden, weight, target = operands()
    loud = hidden.detach().clone()
    loud[:, 150:156] *= 10
    numerics, cache = Numerics("fp8", loud_channels=6), WeightCache()
    logp, entropy = call(loud[:0], weight, target[:0], numerics, cache=cache)
    (logp.sum() + entropy.sum()).backward()
    assert cache.made == 0 and (weight.grad == 0).all()
    got = call(loud, weight, target, numerics, cache=cache)[0]
    assert torch.equal(got, call(loud, weight, target, numerics)[0])


@pytest.mark.parametrize("grads", ["bf16", "fp8"])
def test_a_slope_that_is_not_finite_reaches_the_gradient_norm(grads):
    """Where the step is skipped; rounding to FP8 would have made it an ordinary number."""
    hidden, weight, target = operands()
    slope = torch.ones(ROWS)
    slope[7] = float("nan")
    (slope * call(hidden, weight, target, Numerics("fp8", grads=grads))[0]).sum().backward()
    others = torch.arange(ROWS) != 7
    assert hidden.grad[7].isnan().all() and hidden.grad[others].isfinite().all()
    assert weight.grad[:VOCAB].isnan().all()


def test_hidden_states_that_are_not_finite_are_refused():
    hidden, weight, target = operands()
    broken = hidden.detach().clone()
    broken[5, 6] = float("inf")
    with pytest.raises(QuantizeError, match="row 5, column 6"):
        call(broken, weight, target, Numerics("fp8"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_loud_channels_stay_in_bf16(recipe):
    """Six channels of hidden states ten times the others, as models have them: their error goes, and is most of it."""
    hidden, weight, target = operands()
    loud, quiet = hidden.detach().clone(), weight.detach()
    loud[:, 10:70:10] *= 10
    want = call(loud, quiet, target, Numerics())[0]
    error = {}
    for channels in (0, 3, 6):
        got = call(loud, quiet, target, Numerics("fp8", recipe, exact_target=False, loud_channels=channels))[0]
        error[channels] = float((got - want).abs().mean())
    assert error[6] < error[3] < error[0] and error[6] < error[0] / 2, error
    cache = WeightCache()
    call(loud, quiet, target, Numerics("fp8", recipe, loud_channels=6), cache=cache)
    (kept,) = (k for k in cache._kept.values() if isinstance(k, Split))
    assert kept.channels.tolist() == list(range(10, 70, 10))
    torch.testing.assert_close(kept.values()[:VOCAB, 10:70:10], quiet[:VOCAB, 10:70:10], rtol=2**-8, atol=0)


def test_one_loud_row_costs_the_others_nothing_but_in_tensorwise():
    hidden, weight, target = operands()
    loud = hidden.detach().clone()
    loud[0] *= 3000
    for recipe in RECIPES:
        alone, beside = (
            call(h, weight, target, Numerics("fp8", recipe, loud_channels=0))[0][1:] for h in (hidden, loud)
        )
        assert torch.equal(alone, beside) == (recipe != "tensorwise"), recipe


def test_shards_of_nothing_but_padding_have_no_gradient():
    hidden, weight, target = operands()
    for precision in ("bf16", "fp8"):
        shard = Shard.of(weight, VOCAB, VOCAB, numerics=Numerics(precision))
        logp, _ = logprob_entropy(hidden, weight, target, shard)
        assert (logp.isnan() | logp.isinf()).all(), "alone it is no distribution"
        grads = torch.autograd.grad(logp.sum(), (hidden, weight))
        assert all((g == 0).all() for g in grads)
