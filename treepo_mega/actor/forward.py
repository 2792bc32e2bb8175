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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import mappings
from megatron.core.utils import unwrap_model
from torch import Tensor

from treepo_mega.actor.attention import PACKS, PackLayout
from treepo_mega.actor.attention_flex import SHAPE_BUCKET
from treepo_mega.actor.losses import PackLoss, on_device
from treepo_mega.actor.model import PolicyModel
from treepo_mega.actor.moe import padding_of, routers, weigh_auxiliary
from treepo_mega.actor.routing import replaying, tell_routers
from treepo_mega.config import Config
from treepo_mega.loss.guard import Sample
from treepo_mega.loss.head import LossHead
from treepo_mega.loss.operands import Numerics
from treepo_mega.loss.stats import Stats
from treepo_mega.loss.te import row_multiple
from treepo_mega.runtime.device import device, has_cuda
from treepo_mega.runtime.pulse import pulse
from treepo_mega.tree.pack import Pack

Gates = Callable[[Pack, Tensor, Tensor | None, Tensor], Tensor]
"""(pack, logp [n], old logprobs [n] or None for the pack's, rows [n]) -> closed clip gates [n]."""

TOKEN_FIELDS = ("tokens", "position", "subtree_end", "local", "order", "experts")
"""Arrays of a pack with an entry per token; all its other arrays have one per row."""


def padding_multiple(cfg: Config) -> int:
    """Packs are padded to a multiple of this."""
    # Sequence parallelism splits each rank's share over TP, and FP8 layers take whole groups of rows. On CUDA the
    # attention kernel is compiled per length: few lengths, few compilations.
    parallel = cfg.parallel
    share = parallel.context_parallel_size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    share *= row_multiple(cfg.model)
    return math.lcm(share, SHAPE_BUCKET) if has_cuda() else share


def count_multiple(cfg: Config) -> int:
    """Micro-batches per step come in multiples of this: the interleaved schedule takes groups of PP."""
    parallel = cfg.parallel
    return parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size else 1


def rows_of(pack: Pack, part: slice) -> Pack:
    """The pack with only the rows `part`."""
    if part.indices(len(pack.target)) == (0, len(pack.target), 1):
        return pack
    arrays = {spec.name: getattr(pack, spec.name) for spec in fields(pack) if spec.name not in TOKEN_FIELDS}
    cut: dict[str, Any] = {name: array[part] for name, array in arrays.items() if isinstance(array, np.ndarray)}
    return replace(pack, **cut)


def predicting_rows(model: PolicyModel, hidden: Tensor, pack: Pack) -> Tensor:
    """Hidden states [N, K] that predict the pack's rows, from the last stage's [T, 1, K] or, under SP, [T/tp, 1, K]."""
    if model.config.sequence_parallel:
        # True: backward sums the ranks' gradients before it splits them. False would lose what other shards gave.
        hidden = mappings.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        # Identity forward. Each rank's hidden gradient is its shard's part; this sums them over the group.
        hidden = mappings.copy_to_tensor_model_parallel_region(hidden)
    return hidden[:, 0].index_select(0, on_device(pack.predictor))


LastStage = Callable[[Tensor, Tensor, Pack], Any]
"""(hidden states [N, K] that predict the rows, targets [N], pack) -> what Megatron's loss callback returns."""


def _logprobs_of(
    head: LossHead, temperature: float | None, numerics: Numerics | None, watch: bool,
    rows: Tensor, target: Tensor, pack: Pack,
) -> dict[str, Tensor]:  # fmt: skip
    """A `LastStage` without gradients: the pack's logprobs [N] in fp32, on the device."""
    if watch:
        pack.watched = head.watch(rows, target, numerics=numerics, temperature=temperature)
    logp, _ = head.logprobs(rows, target, numerics=numerics, temperature=temperature)
    # Not to the host here: that waits for the device, and the next micro-batch is not queued meanwhile.
    return {"logprobs": logp.detach().float()}


def _loss_of(
    head: LossHead, loss: PackLoss, gates: Gates | None, rows: Tensor, target: Tensor, pack: Pack
) -> tuple[Tensor, Tensor, Stats]:
    """A `LastStage` with gradients: (loss [], pairs [], statistics)."""

    def of_rows(logp: Tensor, entropy: Tensor, part: slice) -> tuple[Tensor, Stats]:
        return loss(logp, entropy, rows_of(pack, part))

    total, stats = head.loss(rows, target, of_rows, whole=loss.needs_whole_packs)
    if gates is not None:
        head.count_flips(cast("Sample | None", pack.watched), rows, target, partial(gates, pack))
    if pack.unseen:
        head.watch(rows.detach(), target)
    # Megatron scales `total` in place; the statistics are separate tensors.
    # `full` writes on the device; `tensor` would copy a number from the host, and wait for it.
    return total.clone(), torch.full((), pack.pairs, dtype=torch.int, device=total.device), stats


def _loss_func(model: PolicyModel, pack: Pack, last: LastStage, hidden: Tensor, non_loss_data: bool = False) -> Any:
    """Megatron's loss callback on the last stage's output."""
    return last(predicting_rows(model, hidden, pack), on_device(pack.target), pack)


def _forward_step(
    layouts: dict[int, PackLayout],
    last: LastStage,
    packs: Iterator[tuple[int, Pack]],
    model: Any,
    *_: Any,
) -> tuple[Tensor, Any]:
    pulse().beat("pack")
    number, pack = next(packs)
    # Every model chunk of this rank sees the same packs: a layout is built once for all of them.
    if number not in layouts:
        layouts[number] = PackLayout.build(pack, device())
    mine = slice(None) if pack.local is None else pack.local
    tokens, position = (on_device(values[mine])[None] for values in (pack.tokens, pack.position))
    policy = unwrap_model(model)
    tell_routers(policy, pack)
    more = {}
    if any(router.has_losses for router in routers([policy])):
        more["padding_mask"] = padding_of(pack, policy.config, first_stage=policy.pre_process).to(device())
    hidden = model(tokens, position, PACKS.add(layouts[number]), **more)
    return hidden, partial(_loss_func, policy, pack, last)


Watch = Callable[[Sequence[Pack]], Iterator[tuple[int, Pack]]]
"""Packs with their numbers, as `enumerate` gives them, to something that notes when each is asked for."""


def _run(
    chunks: list[Any], packs: list[Pack], last: LastStage, *, gradients: bool, watch: Watch = enumerate,
    replay: bool = False,
) -> list[Any]:  # fmt: skip
    """One pass over `packs` through the pipeline. Collective over the model-parallel group.

    `replay`: tokens go to the experts that their packs name. Returns what `last` reported of each pack on the last
    stage, [] elsewhere.
    """
    # An iterator for each chunk: the schedule advances them apart.
    layouts: dict[int, PackLayout] = {}
    iterators = [watch(packs), *(enumerate(packs) for _ in chunks[1:])]
    try:
        with replaying(chunks, on=replay, gradients=gradients):
            return get_forward_backward_func()(
                forward_step_func=partial(_forward_step, layouts, last),
                data_iterator=iterators if len(chunks) > 1 else iterators[0],
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=len(packs),
                seq_length=max(len(pack.tokens) for pack in packs),
                micro_batch_size=1,
                forward_only=not gradients,
                collect_non_loss_data=not gradients,
            )
    finally:
        # Not earlier: recomputation in the last backward pass still asks for its pack's layout.
        PACKS.clear()


def run_schedule(
    chunks: list[Any], packs: list[Pack], head: LossHead, *, loss: PackLoss, gates: Gates | None = None,
    watch: Watch = enumerate, replay: bool = False,
) -> list[Stats]:  # fmt: skip
    """Loss and gradients of `packs`; the gradients are left in Megatron's buffers. `replay`: as in `_run`.

    `watch` sees the packs of the first chunk as they are asked for. With `gates` the guard counts the clip gates that
    FP8 flips, and it takes its sample of packs that no pass has seen. Collective over the model-parallel group, with
    experts over the ranks that share them, with auxiliary losses over all ranks. Returns the statistics of each pack on
    the last stage, [] elsewhere.
    """
    weigh_auxiliary(chunks, packs)
    return _run(chunks, packs, partial(_loss_of, head, loss, gates), gradients=True, watch=watch, replay=replay)


def compute_logprobs(
    chunks: list[Any],
    packs: list[Pack],
    head: LossHead,
    *,
    temperature: float | None = None,
    numerics: Numerics | None = None,
    watch: bool = False,
    replay: bool = False,
) -> list[np.ndarray] | None:
    """Logprobs of every pack's rows [N], fp32, without gradients: on last-stage ranks, None elsewhere.

    `temperature` and `numerics` None: the head's own. With `watch` the guard's sample is kept in `pack.watched`.
    `replay`: as in `_run`.
    Collective over the model-parallel group.
    """
    data = logprob_tensors(chunks, packs, head, temperature=temperature, numerics=numerics, watch=watch, replay=replay)
    return [logprobs.cpu().numpy() for logprobs in data] if data else None


def logprob_tensors(
    chunks: list[Any],
    packs: list[Pack],
    head: LossHead,
    *,
    temperature: float | None = None,
    numerics: Numerics | None = None,
    watch: bool = False,
    replay: bool = False,
) -> list[Tensor]:
    """As `compute_logprobs`, left on the device: fp32 [N] of each pack on last-stage ranks, [] elsewhere."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        last = partial(_logprobs_of, head, temperature, numerics, watch)
        data = _run(chunks, packs, last, gradients=False, replay=replay)
    for chunk, mode in zip(chunks, modes, strict=True):
        chunk.train(mode)
    return [of_pack["logprobs"] for of_pack in data]
