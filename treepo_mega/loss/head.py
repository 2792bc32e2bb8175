"""LM head to log-probabilities, vocabulary-parallel, a chunk of rows at a time.

From hidden states of the predicting tokens [N, K] and this rank's shard of the output weight [V/tp, K] to
the log-probability of each target and the entropy of each distribution [N], without ever holding
[N, V/tp] logits: rows are processed `chunk` at a time and recomputed in the backward pass.

Per row three sums cross the vocabulary shards (log-sum-exp, target logit, sum of p * logit), in two
all-reduces over the tensor-parallel group for the whole call: a MAX, then a SUM of three numbers a row.
Columns at or beyond the true vocabulary size (padding) are excluded from the distribution.

Backward, with z the logits after temperature, p their softmax, H the entropy:
    d logp_target / dz = onehot - p          dH / dz = -p * (z - lse + H)
The hidden gradient of a rank is only its shard's part: the caller sums it over tensor-parallel ranks
(`copy_to_tensor_model_parallel_region` or the sequence-parallel gather do).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _chunks(rows: int, size: int) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _logits(hidden: Tensor, weight: Tensor, temperature: float, valid: int) -> Tensor:
    """[n, V/tp] logits after temperature in fp32 (fp64 stays); padded columns are -inf."""
    z = hidden @ weight.t()
    z = (z if z.dtype == torch.float64 else z.float()) / temperature
    if valid < z.shape[1]:
        z[:, valid:] = float("-inf")
    return z


class _LogProbEntropy(torch.autograd.Function):
    """See the module docstring; a function of (hidden, weight) with two outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        first: int,
        valid: int,
        temperature: float,
        chunk: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        """(logp [N], entropy [N]); two all-reduces over `group`."""
        rows = hidden.shape[0]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        peak = torch.full((rows,), float("-inf"), dtype=dtype, device=hidden.device)
        local = target - first
        mine = (local >= 0) & (local < valid)
        local = local.clamp(0, max(valid - 1, 0))
        sums = torch.zeros(3, rows, dtype=dtype, device=hidden.device)  # sum exp, sum exp * z, target logit
        # A shard of nothing but padding has no part in the distribution: its sums stay 0 and its peak -inf.
        for part in _chunks(rows if valid else 0, chunk):
            z = _logits(hidden[part], weight, temperature, valid)
            top = z.amax(1)
            peak[part] = top
            e = (z - top[:, None]).exp()
            sums[0, part] = e.sum(1)
            sums[1, part] = torch.where(e > 0, e * z, torch.zeros_like(z)).sum(1)
            sums[2, part] = torch.where(mine[part], z.gather(1, local[part, None])[:, 0], sums[2, part])
        if group is not None and dist.get_world_size(group) > 1:
            top = peak.clone()
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            sums[:2] *= torch.where(peak > float("-inf"), (peak - top).exp(), torch.zeros_like(peak))
            peak = top
            dist.all_reduce(sums, group=group)
        lse = peak + sums[0].log()
        entropy = lse - sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, local, mine, lse, entropy)
        ctx.valid, ctx.temperature, ctx.chunk = valid, temperature, chunk
        return sums[2] - lse, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden [N, K] (this shard's part) and weight [V/tp, K], logits recomputed; no collective."""
        g_logp, g_entropy = grads
        hidden, weight, local, mine, lse, entropy = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=lse.dtype)
        for part in _chunks(hidden.shape[0], ctx.chunk):
            z = _logits(hidden[part], weight, ctx.temperature, ctx.valid)
            logp = z - lse[part, None]
            p = logp.exp()
            spread = torch.where(p > 0, logp, torch.zeros_like(logp)) + entropy[part, None]
            dz = -p * (g_logp[part, None] + g_entropy[part, None] * spread)
            rows = torch.arange(dz.shape[0], device=dz.device)
            dz[rows, local[part]] += torch.where(mine[part], g_logp[part], torch.zeros_like(g_logp[part]))
            dz = (dz / ctx.temperature).to(hidden.dtype)
            d_hidden[part] = dz @ weight
            d_weight += (dz.t() @ hidden[part]).to(d_weight.dtype)
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None, None, None


def logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    temperature: float = 1.0,
    chunk: int = 1024,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `target` [N] and entropy [N], in nats, fp32 (fp64 for fp64 input).

    hidden [N, K]; weight [V/tp, K], rows `vocab_start` to `vocab_start + V/tp` of the output matrix;
    `vocab_size` is the true vocabulary, so rows beyond it never get probability. Collectives: two
    all-reduces of [N] and [3, N] over `group` (the tensor-parallel group) in forward, none in backward.
    """
    valid = min(max(vocab_size - vocab_start, 0), weight.shape[0])
    return _LogProbEntropy.apply(hidden, weight, target, vocab_start, valid, temperature, chunk, group)
