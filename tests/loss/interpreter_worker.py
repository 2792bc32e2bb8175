"""Every kernel in Triton's interpreter against torch: the process behind test_triton.py.

    TRITON_INTERPRET=1 python -m tests.loss.interpreter_worker OUT.json

A process of its own, because a kernel decorated under the interpreter stays there. Writes {check: null or why it
failed}. Sizes are small: the interpreter's time goes by tiles.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from tests.loss import interpreter_patch
from tests.loss.test_fused import EVERY_TERM, policy_rows
from treepo_mega.config import AlgoConfig
from treepo_mega.loss import quantize
from treepo_mega.loss.logprobs import logprob_entropy
from treepo_mega.loss.operands import Numerics, WeightCache
from treepo_mega.loss.policy import policy_loss
from treepo_mega.loss.shard import Shard, TargetError
from treepo_mega.loss.triton import launch

CHECKS: dict[str, Callable[[], None]] = {}
ROWS, WIDTH, VOCAB = 130, 144, 300
"""No multiple of a tile in any direction; two row tiles, K tails, three vocabulary tiles."""


def check(f: Callable[[], None]) -> Callable[[], None]:
    """Register a check under its name."""
    CHECKS[f.__name__] = f
    return f


@triton.jit
def cast_probe(x, out, n: tl.constexpr):
    """out = x in out's type."""
    at = tl.arange(0, n)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def dot_probe(a, b, out, n: tl.constexpr):
    """out = a @ b, all [n, n]."""
    at = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def probe_cast(dtype: torch.dtype) -> float:
    """Share of 4096 Gaussian numbers (and awkward ones) that the interpreter casts unlike torch."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 100
    x[:6] = torch.tensor([1.97, 126.2, 31.9, 0.001, 100.0, -0.0])
    x = x.clamp(-440, 440)
    out = torch.empty(4096, dtype=dtype)
    cast_probe[(1,)](x, out, n=4096)
    return float((out.float() != x.to(dtype).float()).float().mean())


def probe_dot() -> float:
    """Largest error of a bf16 product of numbers of order 1."""
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(16, 16)
    dot_probe[(1,)](a, b, out, n=16)
    return float((out - a.float() @ b.float()).abs().max())


def stock_interpreter_is_still_wrong() -> None:
    """Run before the patch. Fails when Triton has mended its interpreter: then remove interpreter_patch.py."""
    wrong = probe_cast(torch.float8_e4m3fn)
    assert wrong > 0.005, f"only {wrong:.2%} of the casts to e4m3 are wrong: the patch can go"
    assert probe_cast(torch.bfloat16) > 0.1, "casts to bf16 are right: the patch can go"
    error = probe_dot()
    assert not error < 1e3, f"the bf16 product is off by {error} only: the patch can go"


@check
def patched_interpreter_is_right() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16):
        assert probe_cast(dtype) == 0.0, dtype
    assert probe_dot() < 1e-5


def operands(rows: int = ROWS, width: int = WIDTH, vocab: int = VOCAB) -> tuple[torch.Tensor, ...]:
    """hidden [rows, width], weight [vocab, width], target [rows] on both ends of the vocabulary."""
    g = torch.Generator().manual_seed(rows + vocab)
    hidden = torch.randn(rows, width, generator=g)
    weight = torch.randn(vocab, width, generator=g) * (2.4 / width**0.5)
    target = torch.randint(0, vocab, (rows,), generator=g)
    target[0], target[-1] = 0, vocab - 1
    return hidden.requires_grad_(), weight.requires_grad_(), target


def compare_quantisers(x: torch.Tensor, recipe: quantize.Recipe, **how: object) -> None:
    got, want = launch.quantize_rows(x, recipe, **how), quantize.quantize(x, recipe, **how)
    torch.testing.assert_close(got.scale, want.scale, rtol=0, atol=0)
    assert (got.data.float() == want.data.float()).all()
    assert got.data.stride(0) % 16 == 0 and got.scale.shape == want.scale.shape


@check
def quantisers_equal_torchs() -> None:
    x = torch.randn(150, 200, generator=torch.Generator().manual_seed(0)) * 3
    x[5], x[140:] = 0, 1e30
    for recipe in quantize.RECIPES:
        for how in ({}, {"power_of_2_scales": True}, {"format": "e5m2"}, {"block_rows": 128}):
            compare_quantisers(x, recipe, valid_rows=140, **how)
    compare_quantisers(x[:140].bfloat16(), "blockwise", block_rows=128)


@check
def quantisers_refuse_what_is_not_finite() -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.zeros(40, 130)
        x[33, 129] = bad
        launch.quantize_rows(x, "rowwise", valid_rows=33)
        with pytest.raises(quantize.QuantizeError, match="row 33, column 129"):
            launch.quantize_rows(x, "blockwise")


def head(hidden, weight, target, numerics: Numerics, backend: str, parts: list[int], valid: int, temperature: float):
    """(logp, entropy, d_hidden, d_weight) with the vocabulary cut into `parts`, joined as all-reduces would."""
    from treepo_mega.loss import logprobs as module

    mix = torch.linspace(-1, 1, len(target))
    if len(parts) == 1:
        shard = Shard.of(weight, 0, valid, temperature=temperature, numerics=numerics, backend=backend)
        logp, entropy = logprob_entropy(hidden, weight, target, shard)
        grads = torch.autograd.grad((mix * logp + mix.flip(0) * entropy).sum(), (hidden, weight))
        return logp, entropy, *grads
    return _sharded(module, hidden, weight, target, numerics, backend, parts, valid, temperature, mix)


def _sharded(module, hidden, weight, target, numerics, backend, parts, valid, temperature, mix):
    """The same over several shards: forward sums of each, joined in fp64; backward of each with the joint sums."""
    from treepo_mega.loss.triton import head as kernels

    shards, first = [], 0
    for size in parts:
        w = weight[first : first + size].detach()
        shards.append((w, Shard.of(w, first, valid, temperature=temperature, numerics=numerics, backend=backend)))
        first += size
    calls = [kernels._Call(hidden, w, target, s) for w, s in shards]
    sums = [launch.forward(c.a, c.b, c.column, c.given, temperature) for c in calls]
    top = torch.stack([p for p, _ in sums]).amax(0)
    total = torch.zeros(3, len(target))
    for peak, s in sums:
        lower = peak - top
        total += torch.stack([lower.exp() * s[0], lower.exp() * (s[1] + lower * s[0]), s[2]])
    lse = top + total[0].log()
    logp, entropy = total[2] - lse, total[0].log() - total[1] / total[0]
    d_hidden, d_weight = torch.zeros(hidden.shape), []
    slopes = launch.Slopes(lse, entropy, mix, mix.flip(0).contiguous())
    for c, (w, s) in zip(calls, shards, strict=True):
        dz = torch.empty(len(target), s.valid)
        launch.dlogits(c.a, c.b, c.column, c.given, temperature, slopes, 0, dz)
        d_hidden += dz @ w[: s.valid]
        d_weight.append(torch.cat([dz.t() @ hidden.detach(), torch.zeros(w.shape[0] - s.valid, w.shape[1])]))
    return logp, entropy, d_hidden, torch.cat(d_weight)


def compare_heads(numerics: Numerics, tolerance: float, gradients: float, temperature: float = 0.8) -> None:
    hidden, weight, target = operands()
    got = head(hidden, weight, target, numerics, "triton", [VOCAB], VOCAB, temperature)
    want = head(hidden, weight, target, numerics, "torch", [VOCAB], VOCAB, temperature)
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    for a, b in zip(got[2:], want[2:], strict=True):
        error = float((a - b).norm() / b.norm())
        assert error < gradients, error


@check
def fp32_head_equals_torchs() -> None:
    compare_heads(Numerics("fp32"), 5e-6, 2e-6)


@check
def bf16_head_equals_torchs() -> None:
    compare_heads(Numerics("bf16"), 2e-5, 5e-4)


@check
def fp8_heads_equal_torchs_emulation() -> None:
    for recipe in quantize.RECIPES:
        for exact, channels in ((True, 64), (False, 5), (True, 0)):
            compare_heads(Numerics("fp8", recipe, exact_target=exact, loud_channels=channels), 2e-5, 5e-4)


@check
def shards_of_every_size_join() -> None:
    """TP 2 and 4, unequal, with padding, targets on the first and last column of each: against the dense head."""
    for parts, valid in (([160, 160], 300), ([37, 133, 2, 128], 300), ([200, 100], 201)):
        hidden, weight, target = operands(vocab=sum(parts))
        firsts = [sum(parts[:i]) for i in range(len(parts))]
        ends = [c for f, n in zip(firsts, parts, strict=True) for c in (f, f + n - 1) if c < valid]
        target = target % valid
        target[: len(ends)] = torch.tensor(ends)
        want = head(hidden, weight, target, Numerics("fp32"), "torch", [sum(parts)], valid, 1.0)
        got = head(hidden, weight, target, Numerics("fp32"), "triton", parts, valid, 1.0)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=2e-5)


@check
def many_splits_and_a_deep_product() -> None:
    """More vocabulary than one program walks over; K of several tiles with a tail (576 = 4.5 x 128)."""
    hidden, weight, target = operands(rows=8, width=576, vocab=launch.TILES * launch.BN + 77)
    n = Numerics("fp8", "blockwise")
    shards = [Shard.of(weight, 0, weight.shape[0], numerics=n, backend=b) for b in ("triton", "torch")]
    with torch.no_grad():
        got, want = (logprob_entropy(hidden, weight, target, s) for s in shards)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@check
def main_grad_is_added_to_and_the_weight_prepared_once() -> None:
    hidden, weight, target = operands(rows=16)
    cache, want = WeightCache(), torch.zeros_like(weight)
    for backend in ("torch", "triton"):
        weight.main_grad = torch.ones_like(weight)
        shard = Shard.of(weight, 0, VOCAB, numerics=Numerics("fp8"), backend=backend, cache=cache)
        logprob_entropy(hidden, weight, target, shard)[0].sum().backward()
        if backend == "torch":
            want = weight.main_grad.clone()
            assert cache.made == 2, "one fp8 and one bf16 copy"
    assert cache.made == 2 and weight.grad is None
    error = float((weight.main_grad - want).norm() / (want - 1).norm())
    assert error < 5e-4, error


@check
def a_row_that_is_not_finite_spoils_no_other_or_is_refused() -> None:
    hidden, weight, target = operands(rows=16)
    broken = hidden.detach().clone()
    broken[5, 140] = float("nan")
    shard = Shard.of(weight, 0, VOCAB, backend="triton")
    sound, spoilt = (logprob_entropy(h, weight, target, shard) for h in (hidden.detach(), broken))
    others = torch.arange(16) != 5
    for a, b in zip(sound, spoilt, strict=True):
        assert b[5].isnan() and torch.equal(a[others], b[others])
    fp8 = Shard.of(weight, 0, VOCAB, numerics=Numerics("fp8"), backend="triton")
    with pytest.raises(quantize.QuantizeError, match="row 5, column 140"):
        logprob_entropy(broken, weight, target, fp8)
    target[3] = VOCAB
    with pytest.raises(TargetError, match="row 3: the target 300 is no token of 300"):
        logprob_entropy(hidden, weight, target, shard)


@check
def fp8_gradient_of_logits_is_scaled_by_row() -> None:
    hidden, weight, target = operands(rows=20)
    a, b = launch.plain(hidden.detach()), launch.plain(weight.detach())
    logits = hidden.detach() @ weight.detach().t()
    lse, g = logits.logsumexp(1), torch.logspace(-6, 3, 20)
    slopes = launch.Slopes(lse, torch.zeros(20), g, None)
    dz, exact = torch.empty(20, VOCAB, dtype=torch.float8_e5m2), torch.empty(20, VOCAB)
    given = logits.gather(1, target[:, None])[:, 0]
    scale = g / torch.finfo(torch.float8_e5m2).max  # |dz| <= |g| without an entropy bonus
    launch.dlogits(a, b, target.int(), given, 1.0, slopes, 0, exact)
    launch.dlogits(a, b, target.int(), given, 1.0, slopes, 0, dz, scale)
    error = (dz.float() * scale[:, None] - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error.max()) < 0.08, float(error.max())


@check
def policy_kernel_equals_torchs() -> None:
    logp = -torch.rand(300, generator=torch.Generator().manual_seed(1))
    entropy = torch.rand(300, generator=torch.Generator().manual_seed(2))
    rows = policy_rows(logp)
    for name in ("A_pos", "A_neg", "n"):
        rows[name][-3:] = 0  # rows that do not count, whose ratio and KL term overflow
    rows["old_logprobs"][-3:], rows["ref_logprobs"][-3:] = -200.0, 200.0
    for algo in (
        *(EVERY_TERM.model_copy(update={"kl_loss_type": k}) for k in ("k1", "k2", "k3")),
        AlgoConfig(use_tis=False, eps_clip_c=None),
    ):
        ways = []
        for kernel in (True, False):
            leaf = logp.clone().requires_grad_()
            total, stats = policy_loss(leaf, entropy, **rows, algo=algo, kernel=kernel)
            ways.append((total, torch.autograd.grad(total, leaf)[0], stats.by_name()))
        torch.testing.assert_close(ways[0][:2], ways[1][:2], rtol=1e-5, atol=1e-5)
        assert ways[0][2].keys() == ways[1][2].keys()
        for k, v in ways[1][2].items():
            torch.testing.assert_close(ways[0][2][k], v, rtol=2e-5, atol=1e-4)


def main() -> None:
    """Run all checks; the stock interpreter's one first, before the patch."""
    results: dict[str, str | None] = {}
    first = {"stock_interpreter_is_still_wrong": stock_interpreter_is_still_wrong}
    for name, f in {**first, **CHECKS}.items():
        try:
            f()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        if name in first:
            interpreter_patch.apply()
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        json.dump(results, out)


if __name__ == "__main__":
    main()
