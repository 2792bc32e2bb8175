"""Passes over packs through Megatron's pipeline schedules: logprobs, and loss with gradients.

`get_forward_backward_func` drives TP, PP, VPP and DP. A pass takes the packs of one optimizer step on this
data-parallel rank: equally many on every data-parallel rank, and of any length, except that the interleaved
schedule wants one (`tree/pack.py` sees to both). Context parallelism: a rank computes its own tokens of the pack
(`Pack.local`) and owns the rows they predict; only attention looks at the others' keys and values.

The last stage turns hidden states into (logp, entropy) for the pack's rows. Hidden states arrive as
[T/tp, 1, K] under sequence parallelism and are gathered; else they pass through Megatron's copy region.
Both make the backward sum the shards' hidden gradients over the tensor-parallel group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treepo_mega.actor.attention import PACKS, PackLayout
from treepo_mega.actor.attention_flex import SHAPE_BUCKET
from treepo_mega.actor.model import PolicyModel
from treepo_mega.config import Config
from treepo_mega.loss.backend import Backend
from treepo_mega.loss.fused import row_loss
from treepo_mega.loss.guard import HeadGuard
from treepo_mega.loss.head import Shard, logprob_entropy
from treepo_mega.loss.operands import Numerics, WeightCache
from treepo_mega.loss.te import row_multiple
from treepo_mega.runtime import cpu_megatron
from treepo_mega.runtime.device import device, has_cuda
from treepo_mega.tree.pack import Pack

cpu_megatron.install()

from megatron.core import parallel_state as ps  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import mappings  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402

LossFunction = Callable[[Tensor, Tensor, Pack], tuple[Tensor, dict[str, Tensor]]]
"""(logp [N], entropy [N], pack) -> (loss summed over rows, sums for logging). A sum over rows: it sees a tile of the
pack's rows at a time, unless it joins rows and says so by an attribute `whole_packs`."""

TOKEN_FIELDS = ("tokens", "position", "subtree_end", "local", "order")
"""Arrays of a pack with an entry per token; all its other arrays have one per row."""


@dataclass(slots=True)
class Head:
    """What the head needs besides the model."""

    vocab_size: int
    temperature: float
    chunk: int
    numerics: Numerics
    cache: WeightCache
    guard: HeadGuard | None = None
    """Set in the passes that watch FP8."""
    gates: Callable[[Pack, Tensor, Tensor | None, Tensor], Tensor] | None = None
    """(pack, logp [n], old logprobs [n] or None for the pack's, rows [n]) -> closed clip gates [n], in an update."""
    backend: Backend = "torch"
    overlap_grad_reduce: bool = False
    """Megatron then wants to see the weight's gradient in param.grad."""


def padding_multiple(cfg: Config) -> int:
    """Packs are padded to a multiple of this: sequence parallelism splits each rank's share over TP, FP8 layers want
    more, and on CUDA the attention kernel is compiled per length."""
    p = cfg.parallel
    share = p.context_parallel_size * (p.tensor_model_parallel_size if p.sequence_parallel else 1)
    share *= row_multiple(cfg.model)
    return math.lcm(share, SHAPE_BUCKET) if has_cuda() else share


def count_multiple(cfg: Config) -> int:
    """Micro-batches per step come in multiples of this: the interleaved schedule takes groups of PP."""
    p = cfg.parallel
    return p.pipeline_model_parallel_size if p.virtual_pipeline_model_parallel_size else 1


def equal_lengths(cfg: Config) -> bool:
    """Whether all packs of a rank are padded to one length: the interleaved schedule's buffers have one size."""
    return cfg.parallel.virtual_pipeline_model_parallel_size is not None


def on_device(values: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    """A pack's array on this rank's device, in `dtype` if given (packs hold fp64, the loss computes in logp's)."""
    return torch.from_numpy(values).to(device(), dtype)


def rows_of(pack: Pack, part: slice) -> Pack:
    """The pack with only the rows `part`."""
    if part.indices(len(pack.target)) == (0, len(pack.target), 1):
        return pack
    arrays = {f.name: getattr(pack, f.name) for f in fields(pack) if f.name not in TOKEN_FIELDS}
    return replace(pack, **{k: v[part] for k, v in arrays.items() if isinstance(v, np.ndarray)})


def predicting_rows(model: PolicyModel, hidden: Tensor, pack: Pack) -> Tensor:
    """Hidden states [N, K] that predict the pack's rows, from the last stage's [T, 1, K] or, under SP, [T/tp, 1, K]."""
    if model.config.sequence_parallel:
        hidden = mappings.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = mappings.copy_to_tensor_model_parallel_region(hidden)
    return hidden[:, 0].index_select(0, on_device(pack.predictor))


def vocabulary_shard(weight: Tensor, head: Head) -> Shard:
    """This tensor-parallel rank's shard of the output matrix."""
    return Shard.of(
        weight,
        ps.get_tensor_model_parallel_rank() * weight.shape[0],
        head.vocab_size,
        temperature=head.temperature,
        chunk=head.chunk,
        group=ps.get_tensor_model_parallel_group(),
        numerics=head.numerics,
        cache=head.cache,
        backend=head.backend,
        use_main_grad=not head.overlap_grad_reduce,
    )


def _loss_func(
    model: PolicyModel, pack: Pack, head: Head, loss: LossFunction | None, hidden: Tensor, non_loss_data: bool = False
) -> Any:
    """Megatron's loss callback. Without `loss`: the pack's logprobs, as data."""
    weight, target = model.head_weight(), on_device(pack.target)
    shard, rows = vocabulary_shard(weight, head), predicting_rows(model, hidden, pack)
    if loss is None:
        if head.guard is not None:
            head.guard.watch(pack, rows, weight, target, shard)
        logp, entropy = logprob_entropy(rows, weight, target, shard)
        return {"logprobs": logp.detach().float().cpu().numpy(), "entropy": entropy.detach().float().sum().cpu()}

    def of_rows(logp: Tensor, entropy: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(logp, entropy, rows_of(pack, part))

    if getattr(loss, "whole_packs", False):
        total, sums = loss(*logprob_entropy(rows, weight, target, shard), pack)
    else:
        total, sums, _, _ = row_loss(rows, weight, target, shard, of_rows)
    if head.guard is not None and head.gates is not None:
        head.guard.count_flips(pack, rows, weight, target, shard, partial(head.gates, pack))
    # Megatron scales `total` in place; the sums for logging are separate tensors.
    return total.clone(), torch.tensor(pack.pairs, dtype=torch.int, device=total.device), sums


def _forward_step(
    layouts: dict[int, PackLayout],
    head: Head,
    loss: LossFunction | None,
    packs: Iterator[Pack],
    model: Any,
    *_: Any,
) -> tuple[Tensor, Any]:
    pack = next(packs)
    if id(pack) not in layouts:  # every model chunk of this rank sees the same packs
        layouts[id(pack)] = PackLayout.build(pack, device())
    mine = slice(None) if pack.local is None else pack.local
    hidden = model(
        on_device(pack.tokens[mine])[None], on_device(pack.position[mine])[None], PACKS.add(layouts[id(pack)])
    )
    return hidden, partial(_loss_func, unwrap_model(model), pack, head, loss)


def run_schedule(
    chunks: list[Any], packs: list[Pack], head: Head, *, loss: LossFunction | None
) -> list[dict[str, Any]]:
    """One pass over `packs` through the pipeline; with `loss`, gradients too (left in Megatron's buffers).

    Collective over the model-parallel group. Returns one dict per pack on the last stage, [] elsewhere.
    """
    layouts: dict[int, PackLayout] = {}
    iterators = [iter(packs) for _ in chunks]
    try:
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, layouts, head, loss),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(packs),
            seq_length=max(len(p.tokens) for p in packs),
            micro_batch_size=1,
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )
    finally:
        PACKS.clear()


def compute_logprobs(chunks: list[Any], packs: list[Pack], head: Head) -> list[np.ndarray] | None:
    """Logprobs of every pack's rows [N], fp32, without gradients: on last-stage ranks, None elsewhere."""
    modes = [c.training for c in chunks]
    for c in chunks:
        c.eval()
    with torch.no_grad():
        data = run_schedule(chunks, packs, head, loss=None)
    for c, mode in zip(chunks, modes, strict=True):
        c.train(mode)
    return [d["logprobs"] for d in data] if data else None
