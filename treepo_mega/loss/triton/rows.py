"""Kernels without a matrix product: quantising rows, joining splits, and the policy loss of a token."""

import triton
import triton.language as tl


@triton.jit
def amax_kernel(x, amax, N, K, x_stride, blocks, BM: tl.constexpr, BLOCK: tl.constexpr):
    """Largest magnitude of x [N, K] per row and BLOCK columns: amax [N, blocks], fp32; NaN carries over."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    keep = (rows < N)[:, None] & (columns < K)[None, :]
    at = x + rows[:, None].to(tl.int64) * x_stride + columns[None, :]
    value = tl.abs(tl.load(at, mask=keep, other=0.0).to(tl.float32))
    # The comparison is false for NaN: an infinity says so to the host, which refuses both.
    value = tl.where(value == value, value, float("inf"))
    tl.store(amax + rows * blocks + block, tl.max(value, 1), mask=rows < N)


@triton.jit
def cast_kernel(
    x, out, factor, N, K, x_stride, out_stride, row_stride, block_stride,
    SHARED_ROWS: tl.constexpr, LARGEST: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = fp8(x * factor), saturating; factor of (row // SHARED_ROWS, block of BLOCK columns) by its strides."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    keep = (rows < N)[:, None] & (columns < K)[None, :]
    at = rows[:, None].to(tl.int64)
    value = tl.load(x + at * x_stride + columns[None, :], mask=keep, other=0.0).to(tl.float32)
    by = tl.load(factor + (rows // SHARED_ROWS) * row_stride + block * block_stride, mask=rows < N, other=1.0)
    value = tl.clamp(value * by[:, None], -LARGEST, LARGEST)
    tl.store(out + at * out_stride + columns[None, :], value.to(out.dtype.element_ty), mask=keep)


@triton.jit
def combine_kernel(partial, column, given, peak, sums, T, splits, BM: tl.constexpr):
    """Join the splits and the target's logit: partial [3, splits, T], given [T] -> peak [T], sums [3, T].

    They are `loss/logprobs.py`'s Tiles.sums_: the target's logit counts where this shard owns it (column >= 0).
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    live = rows < T
    stride = splits * T
    mine = tl.load(column + rows, mask=live, other=-1) >= 0
    hit = tl.load(given + rows, mask=live, other=0.0)
    top = tl.where(mine, hit, -1.0e29)
    for s in range(0, splits):
        top = tl.maximum(top, tl.load(partial + s * T + rows, mask=live, other=-1.0e29))
    total = tl.where(mine, tl.exp(hit - top), 0.0)
    moment = tl.where(mine, total * (hit - top), 0.0)
    for s in range(0, splits):
        at = partial + s * T + rows
        lower = tl.load(at, mask=live, other=-1.0e29) - top
        part = tl.load(at + stride, mask=live, other=0.0)
        shrink = tl.exp(lower)
        moment += shrink * (tl.load(at + 2 * stride, mask=live, other=0.0) + lower * part)
        total += shrink * part
    tl.store(peak + rows, top, mask=live)
    tl.store(sums + rows, total, mask=live)
    tl.store(sums + T + rows, moment, mask=live)
    tl.store(sums + 2 * T + rows, tl.where(mine, hit, 0.0), mask=live)


@triton.jit
def policy_kernel(
    logp, entropy, old, weight, ref, A_pos, A_neg, n, slope, parts, T, programs,
    low, high, dual, kl_coef, entropy_coef, KL: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """`loss/policy.py`'s loss of a token and its slope; KL: 0 none, 1, 2, 3 the estimator. `dual` inf: no dual clip.

    slope [T] = d loss / d logp. parts [8, programs]: sums over this program's rows of loss, policy term, KL,
    n * entropy, n * clipped, n * (old - logp), n * weight; the last is the largest |ratio - 1|.
    """
    program = tl.program_id(0)
    rows = program * BM + tl.arange(0, BM)
    live = rows < T
    lp = tl.load(logp + rows, mask=live, other=0.0)
    h = tl.load(entropy + rows, mask=live, other=0.0)
    log_ratio = lp - tl.load(old + rows, mask=live, other=0.0)
    ratio = tl.exp(log_ratio)
    w = tl.load(weight + rows, mask=live, other=0.0)
    pos = tl.load(A_pos + rows, mask=live, other=0.0)
    neg = tl.load(A_neg + rows, mask=live, other=0.0)
    count = tl.load(n + rows, mask=live, other=0.0)
    below = tl.minimum(tl.maximum(ratio, low), dual)
    # Where a mass is 0 its ratio may have overflowed, and inf * 0 would be NaN.
    pg = -w * (pos * tl.minimum(ratio, high) + tl.where(neg < 0, neg * below, 0.0))
    inside = (neg < 0) & (ratio >= low) & (ratio <= dual)
    g = -w * (tl.where(ratio <= high, pos * ratio, 0.0) + tl.where(inside, neg * ratio, 0.0))
    kl = tl.zeros((BM,), dtype=tl.float32)
    if KL > 0:
        d = tl.load(ref + rows, mask=live, other=0.0) - lp
        if KL == 1:
            kl, dkl = -d, tl.full((BM,), 1.0, dtype=tl.float32)
        elif KL == 2:
            kl, dkl = 0.5 * d * d, -d
        else:
            e = tl.exp(d)
            kl, dkl = e - d - 1.0, 1.0 - e
        kl = tl.where(live & (count != 0), count * kl, 0.0)
        g += tl.where(count != 0, kl_coef * count * dkl, 0.0)
    bonus = count * h
    clipped = ((pos > 0) & (ratio > high)) | ((neg < 0) & (ratio < low))
    tl.store(slope + rows, g, mask=live)
    at = parts + program
    tl.store(at, tl.sum(pg + kl_coef * kl - entropy_coef * bonus, 0))
    tl.store(at + programs, tl.sum(pg, 0))
    tl.store(at + 2 * programs, tl.sum(kl, 0))
    tl.store(at + 3 * programs, tl.sum(bonus, 0))
    tl.store(at + 4 * programs, tl.sum(tl.where(clipped, count, 0.0), 0))
    tl.store(at + 5 * programs, tl.sum(-count * log_ratio, 0))
    tl.store(at + 6 * programs, tl.sum(count * w, 0))
    tl.store(at + 7 * programs, tl.max(tl.where(live, tl.abs(ratio - 1.0), 0.0), 0))
