"""The chunked vocabulary-parallel head against dense log_softmax, on one rank and over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from treepo_mega.loss import logprobs
from treepo_mega.loss.logprobs import Tiles
from treepo_mega.loss.operands import Numerics
from treepo_mega.loss.shard import MIN_TILE_ROWS, Shard, TargetError

WORKER = Path(__file__).with_name("head_worker.py")


def inputs(rows=7, vocab=11, padded=16, width=5, dtype=torch.float64):
    """Hidden states, weight with `padded` rows of which `vocab` are real, targets on both ends of the vocabulary."""
    g = torch.Generator().manual_seed(rows * 1000 + vocab)
    hidden = torch.randn(rows, width, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(padded, width, generator=g, dtype=dtype).requires_grad_()
    target = torch.randint(0, vocab, (rows,), generator=g)
    target[0], target[-1] = 0, vocab - 1
    return hidden, weight, target


def dense(hidden, weight, target, vocab, temperature):
    logp = ((hidden @ weight[:vocab].t()) / temperature).log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(1)


def logprob_entropy(hidden, weight, target, vocab_start=0, vocab_size=11, **how):
    """The head on the shard that begins at `vocab_start`."""
    return logprobs.logprob_entropy(hidden, weight, target, Shard.of(weight, vocab_start, vocab_size, **how))


def test_gradcheck_in_fp64():
    hidden, weight, target = inputs(rows=4, vocab=5, padded=6, width=3)

    def f(h, w):
        return logprob_entropy(h, w, target, vocab_start=0, vocab_size=5, temperature=0.7, chunk=3)

    assert torch.autograd.gradcheck(f, (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("vocab, padded", [(11, 11), (11, 16), (1, 2)])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1e-3])
def test_equals_dense_log_softmax_with_gradients(chunk, vocab, padded, temperature):
    hidden, weight, target = inputs(vocab=vocab, padded=padded)
    got = logprob_entropy(hidden, weight, target, vocab_start=0, vocab_size=vocab, temperature=temperature, chunk=chunk)
    want = dense(hidden, weight, target, vocab, temperature)
    mix = torch.linspace(-1, 1, len(target), dtype=torch.float64)
    grads = [torch.autograd.grad((mix * a + mix.flip(0) * b).sum(), (hidden, weight)) for a, b in (got, want)]
    for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert (grads[0][1][vocab:] == 0).all(), "padded rows of the vocabulary get no gradient"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_low_precision_inputs_are_summed_in_fp32(precision):
    """Products of bf16 numbers, sums and logits in fp32: equal to fp64 on the same numbers, with no rounded logits."""
    hidden, weight, target = inputs(dtype=torch.float32)
    h, w = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    logp, entropy = logprob_entropy(
        h, w, target, vocab_start=0, vocab_size=11, chunk=2, numerics=Numerics(precision=precision)
    )
    assert logp.dtype == entropy.dtype == torch.float32
    h64, w64 = (t.detach().double().requires_grad_() for t in (h, w))
    want = dense(h64, w64, target, 11, 1.0)
    for a, b in zip((logp, entropy), want, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=0, atol=2e-6)
    (logp + entropy).sum().backward()
    assert h.grad.dtype == w.grad.dtype == torch.bfloat16
    for got, exact in zip((h, w), torch.autograd.grad((want[0] + want[1]).sum(), (h64, w64)), strict=True):
        torch.testing.assert_close(got.grad.double(), exact, rtol=2e-2, atol=2e-2)


def test_bf16_head_of_fp32_parameters_rounds_the_operands_only():
    hidden, weight, target = inputs(dtype=torch.float32)
    rounded = (t.detach().bfloat16().double() for t in (hidden, weight))
    want = dense(*rounded, target, 11, 1.0)
    got = logprob_entropy(hidden, weight, target, vocab_start=0, vocab_size=11, numerics=Numerics(precision="bf16"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)


def test_tiles_of_rows_are_bounded_in_bytes_and_the_same_on_every_rank():
    assert Shard(0, 49152, 49152, chunk=4096).tile_rows(4) == 256
    assert Shard(0, 151936, 151936, chunk=4096).tile_rows(4) == MIN_TILE_ROWS, "few rows are slow: bytes give way"
    assert Shard(0, 32, 32, chunk=100).tile_rows(4) == 100
    hidden, weight, target = inputs(rows=300, vocab=11, padded=11)
    tiles = Tiles(hidden, weight, target, Shard.of(weight, 0, 11, chunk=128))
    parts = list(tiles.parts())
    assert [p.stop - p.start for p in parts] == [128, 128, 44]
    shapes = {tuple(tiles.logits(p)._base.shape) for p in parts}
    assert shapes == {(128, 11)}, "one buffer serves every tile"


def test_large_logits_do_not_overflow():
    hidden, weight, target = inputs(dtype=torch.float32)
    logp, entropy = logprob_entropy(hidden * 1e3, weight, target, vocab_start=0, vocab_size=11)
    (logp.sum() + entropy.sum()).backward()
    assert all(torch.isfinite(t).all() for t in (logp, entropy, hidden.grad, weight.grad))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match="expected a positive number"):
        Shard(0, 4, 4, temperature=temperature)


@pytest.mark.parametrize("token", [-1, 11, 15])
def test_a_target_that_no_shard_has_is_refused_with_its_row(token):
    """11 to 15 are columns of padding: their logit would be taken for 0."""
    hidden, weight, target = inputs(vocab=11, padded=16)
    target[3] = token
    with pytest.raises(TargetError, match=f"row 3: the target {token} is no token of 11"):
        logprob_entropy(hidden, weight, target)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_that_is_not_finite_spoils_no_other(bad, precision):
    """FP8 refuses it (test_fp8_head.py), for it would turn into an ordinary number."""
    hidden, weight, target = inputs(dtype=torch.float32)
    broken = hidden.detach().clone()
    broken[2, 1] = bad
    numerics = Numerics(precision=precision)
    sound, spoilt = (logprob_entropy(h, weight, target, numerics=numerics) for h in (hidden.detach(), broken))
    others = torch.arange(len(target)) != 2
    for a, b in zip(sound, spoilt, strict=True):
        assert b[2].isnan() and torch.equal(a[others], b[others])


def test_no_rows():
    hidden, weight, target = inputs()
    logp, entropy = logprob_entropy(hidden[:0], weight, target[:0], vocab_start=0, vocab_size=11)
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == entropy.shape == (0,)
    assert (weight.grad == 0).all()


def test_main_grad_takes_the_weight_gradient():
    hidden, weight, target = inputs()
    want = torch.autograd.grad(dense(hidden, weight, target, 11, 1.0)[0].sum(), weight)[0]
    weight.main_grad = torch.ones_like(weight)
    logprob_entropy(hidden, weight, target, vocab_start=0, vocab_size=11)[0].sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad - 1, want, rtol=1e-10, atol=1e-12)


def test_equals_torchs_own_fused_head():
    hidden, weight, target = inputs(rows=64, vocab=33, padded=33, width=12, dtype=torch.float32)
    mix = torch.linspace(-1, 1, 64)
    loss = torch.nn.functional.linear_cross_entropy(hidden, weight, target, reduction="none")
    want = (-loss, *torch.autograd.grad((mix * -loss).sum(), (hidden, weight)))
    logp, _ = logprob_entropy(hidden, weight, target, vocab_start=0, vocab_size=33, chunk=10)
    got = (logp, *torch.autograd.grad((mix * logp).sum(), (hidden, weight)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_vocabulary_shards_over_gloo():
    out = run_ranks(4, WORKER)
    assert out.count("head worker passed") == 4, out
