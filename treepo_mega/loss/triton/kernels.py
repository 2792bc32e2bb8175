"""The two kernels with a matrix product: log-softmax sums of a split of the vocabulary, and the logits' gradient.

One template for fp32, bf16 and fp8 operands and all three scalings. Operands come through host TMA descriptors, which
fill what is out of bounds with zeros: K needs no mask, and neither do loads at the end of rows or vocabulary; only
the epilogue masks columns. A program owns BM rows.

`MODE`: 0 no scale or one a tensor (`a_scale`, `b_scale` of one element), 1 one a row of either operand, 2 one per
1 x 128 of a and 128 x 128 of b (BN = BK = 128).

`LOUD`: a_loud [T, 64] and b_loud [V, 64] are the channels that stay in bf16: one more product a tile, into the same
accumulator, because they come in units of the scales (modes 0 and 1) or the accumulator has none (mode 2).

`IMPRECISE`: on Hopper an fp8 sum stays in the tensor core's short accumulator for the whole of K unless it is told
after how many products to move on (128 here: Transformer Engine's split accumulator). Mode 2 moves on anyway.

`column` is the row's target as a column of this shard, and -1 where another rank owns it. It must never be a padded
column: the host sees to that, because a target of the next rank would otherwise match a column that does not exist.
The target's own logit never comes from here: it is a dot product a row, exact in FP8 as well, and cheap. The forward
sums leave its column out and `rows.combine_kernel` adds it: a third sum carried along would cost register spills.
"""

import triton
import triton.language as tl

NOTHING, MASKED = tl.constexpr(-1.0e29), tl.constexpr(-1.0e30)


@triton.jit
def _logits(
    a_desc, b_desc, a_loud, b_loud, a_scale, b_scale, m0, n0, T, V, K, blocks, inv_temperature,
    LOUD: tl.constexpr, MODE: tl.constexpr, IMPRECISE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BN] fp32 tile of a @ b^T with its scales over the temperature, rows from m0, columns from n0."""
    rows = m0 + tl.arange(0, BM)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if LOUD:
        acc = tl.dot(a_loud.load([m0, 0]), b_loud.load([n0, 0]).T, acc)
    for k in range(0, tl.cdiv(K, BK)):
        a = a_desc.load([m0, k * BK])
        b = b_desc.load([n0, k * BK])
        if MODE == 2:
            part = tl.dot(a, b.T, input_precision=PRECISION)
            sa = tl.load(a_scale + rows * blocks + k, mask=rows < T, other=0.0)
            sb = tl.load(b_scale + (n0 // BN) * blocks + k, mask=n0 < V, other=0.0)
            acc += part * (sa * sb)[:, None]
        else:
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
    if MODE == 0:
        acc = acc * (tl.load(a_scale) * tl.load(b_scale) * inv_temperature)
    elif MODE == 1:
        columns = n0 + tl.arange(0, BN)
        sa = tl.load(a_scale + rows, mask=rows < T, other=0.0)
        sb = tl.load(b_scale + columns, mask=columns < V, other=0.0)
        acc = acc * (sa * inv_temperature)[:, None] * sb[None, :]
    else:
        acc = acc * inv_temperature
    return acc


@triton.jit
def forward_kernel(
    a_desc, b_desc, a_loud, b_loud, a_scale, b_scale, column, partial, T, V, K, blocks, splits, inv_temperature,
    LOUD: tl.constexpr, MODE: tl.constexpr, IMPRECISE: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sums of log-softmax over TILES vocabulary tiles for BM rows, the target's column left out of all of them.

    partial [3, splits, T], fp32: the largest logit m; the sum of exp(z - m); the sum of exp(z - m) * (z - m).
    """
    m0, split = tl.program_id(0) * BM, tl.program_id(1)
    rows = m0 + tl.arange(0, BM)
    own = tl.load(column + rows, mask=rows < T, other=-1)
    top = tl.full((BM,), NOTHING, dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    moment = tl.zeros((BM,), dtype=tl.float32)
    for tile in range(0, TILES):
        n0 = (split * TILES + tile) * BN
        z = _logits(
            a_desc, b_desc, a_loud, b_loud, a_scale, b_scale, m0, n0, T, V, K, blocks, inv_temperature,
            LOUD, MODE, IMPRECISE, PRECISION, BM, BN, BK,
        )  # fmt: skip
        columns = n0 + tl.arange(0, BN)
        # Masked logits are far below NOTHING, so that their exponential is 0 even where a tile has nothing else.
        z = tl.where((columns < V)[None, :] & (columns[None, :] != own[:, None]), z, MASKED)
        new = tl.maximum(top, tl.max(z, 1))
        shrink = tl.exp(top - new)
        z -= new[:, None]
        weight = tl.exp(z)
        moment = shrink * (moment + (top - new) * total) + tl.sum(weight * z, 1)
        total = shrink * total + tl.sum(weight, 1)
        top = new
    at = partial + split * T + rows
    stride = splits * T
    tl.store(at, top, mask=rows < T)
    tl.store(at + stride, total, mask=rows < T)
    tl.store(at + 2 * stride, moment, mask=rows < T)


@triton.jit
def dlogits_kernel(
    a_desc, b_desc, a_loud, b_loud, a_scale, b_scale, column, given, lse, entropy, g_logp, g_entropy, dz, dz_scale,
    first, T, V, K, blocks, dz_stride, inv_temperature,
    LOUD: tl.constexpr, MODE: tl.constexpr, ENTROPY: tl.constexpr, ROW_SCALE: tl.constexpr,
    IMPRECISE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """d loss / d logits before temperature, for columns from `first`: dz [T, dz_stride], one BM x BN tile a program.

    dz = (g (onehot - p) - h p (log p + H)) / temperature with p recomputed; ENTROPY: h is not zero. The target's
    logit is `given` [T]. ROW_SCALE: dz is fp8 and stored as dz / dz_scale[row].
    """
    m0, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    n0 = first + n
    z = _logits(
        a_desc, b_desc, a_loud, b_loud, a_scale, b_scale, m0, n0, T, V, K, blocks, inv_temperature,
        LOUD, MODE, IMPRECISE, PRECISION, BM, BN, BK,
    )  # fmt: skip
    rows, columns = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    live = rows < T
    mine = columns[None, :] == tl.load(column + rows, mask=live, other=-1)[:, None]
    z = tl.where(mine, tl.load(given + rows, mask=live, other=0.0)[:, None], z)
    logp = z - tl.load(lse + rows, mask=live, other=0.0)[:, None]
    p = tl.exp(logp)
    g = tl.load(g_logp + rows, mask=live, other=0.0)[:, None]
    out = tl.where(mine, g, 0.0) - g * p
    if ENTROPY:
        h = tl.load(g_entropy + rows, mask=live, other=0.0)[:, None]
        spread = tl.where(p > 0, logp, 0.0) + tl.load(entropy + rows, mask=live, other=0.0)[:, None]
        out -= h * p * spread
    out = out * inv_temperature
    if ROW_SCALE:
        out = out / tl.load(dz_scale + rows, mask=live, other=1.0)[:, None]
    at = dz + rows[:, None].to(tl.int64) * dz_stride + (n + tl.arange(0, BN))[None, :]
    keep = live[:, None] & (columns < V)[None, :]
    tl.store(at, out.to(dz.dtype.element_ty), mask=keep)
