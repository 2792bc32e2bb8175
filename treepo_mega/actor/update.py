"""The actor (trained) and the reference (frozen), each a stack of Megatron chunks.

    actor = Actor(cfg, hf_dir)            weights read from HF files by slices (or a Megatron checkpoint)
    logprobs = actor.logprobs(packs)      list of [N] on last-stage ranks
    stats = actor.update(packs, loss)     forward, backward, clip, optimizer, schedule: all Megatron's

A step with a non-finite gradient norm is skipped and counted; `max_skipped_steps` in a row stop the run
with a diagnosis. A rank without memory for a pack splits its packs and begins its passes again, once, where
no other rank waits for it amid a pass.

The loss is a sum over (trajectory, token) pairs; Megatron's per-token loss divides the
gradient by the number of pairs of the whole step, all-reduced over data-parallel ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as ps
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from treepo_mega.actor.costs import UpdateCosts, expected_seconds
from treepo_mega.actor.forward import compute_logprobs, count_multiple, padding_multiple, run_schedule
from treepo_mega.actor.losses import PackLoss, clip_gates, on_device
from treepo_mega.actor.model import DTYPES, PolicyModel, build_model
from treepo_mega.actor.routing import routing_noted, take_routing, watch_routing
from treepo_mega.actor.split import PacksTooLarge, is_out_of_memory, split
from treepo_mega.checkpoint.load import load_from_hf
from treepo_mega.config import Config
from treepo_mega.errors import TreepoError
from treepo_mega.loss.guard import HeadGuard
from treepo_mega.loss.head import LossHead
from treepo_mega.loss.mismatch import MISMATCH
from treepo_mega.loss.operands import Numerics
from treepo_mega.loss.stats import Stats
from treepo_mega.modelspec.mcore_layout import ModelSpec
from treepo_mega.runtime import dist
from treepo_mega.runtime.device import device, release_cached_memory
from treepo_mega.tree.pack import Pack, StepPlan, Trajectory, plan_step

logger = logging.getLogger(__name__)

SPLIT = "ranks_split"
"""Name of the statistic that counts ranks which had to split their packs."""


class TrainingDiverged(TreepoError):
    """Too many optimizer steps in a row had a non-finite gradient; the last one's packs, and its gradient norm."""

    def __init__(self, message: str, packs: Sequence[Pack] = (), grad_norm: float = math.nan) -> None:
        super().__init__(message)
        self.packs = packs
        self.grad_norm = grad_norm


class Policy:
    """Weights and forward passes. The reference is exactly this; the actor adds an optimizer."""

    def __init__(self, cfg: Config, hf_dir: str | Path, guard: HeadGuard | None = None) -> None:
        """Build this rank's chunks and fill them from the HF files in `hf_dir`, reading only its slices."""
        self.cfg = cfg
        self.hf_dir = Path(hf_dir)
        self.spec = ModelSpec.from_hf(hf_dir)
        self.models: list[PolicyModel] = build_model(cfg, self.spec)
        load_from_hf(self.models, self.spec, cfg, hf_dir)
        self.chunks: list[MegatronModule] = list(self.models)
        self.head = LossHead(
            # Only the last stage's last chunk has the output matrix; only it is asked.
            self.models[-1].head_weight,
            cfg.loss,
            vocab_size=self.spec.vocab_size,
            temperature=cfg.rollout.temperature,
            tile_rows=cfg.loss.tile_rows,
            rank=ps.get_tensor_model_parallel_rank(),
            group=ps.get_tensor_model_parallel_group(),
            guard=guard or HeadGuard(cfg.loss, cfg.debug),
            # With overlapped reduction Megatron wants to see the weight's gradient in param.grad.
            use_main_grad=not cfg.parallel.overlap_grad_reduce,
        )
        self.guard = self.head.guard

    def logprobs(
        self, packs: list[Pack], temperature: float | None = None, *, numerics: Numerics | None = None,
        watch: bool = False, replay: bool = False,
    ) -> list[np.ndarray] | None:  # fmt: skip
        """Logprobs [N] of each pack's rows on last-stage ranks, None elsewhere. Collective over model parallel.

        `temperature` None: the sampling temperature, because ratios are of what was sampled. `numerics` None: what the
        configuration and the guard say. `watch` lets the guard take its sample. `replay`: tokens go to the experts
        that the packs name.
        """
        return compute_logprobs(
            self.chunks, packs, self.head, temperature=temperature, numerics=numerics, watch=watch, replay=replay
        )

    def weights_changed(self) -> None:
        """Call it after writing new weights: prepared (bf16, fp8) copies of the output matrix are then made anew."""
        self.head.weights_changed()

    def sequence_logprobs(self, tokens: list[int], numerics: Numerics | None = None) -> np.ndarray | None:
        """Logprobs of `tokens[1:]` at the sampling temperature, on last-stage ranks; None elsewhere.

        The head computes in `numerics`, default: as for old and reference logprobs.

        Collective over the model-parallel and context-parallel groups: every data-parallel rank computes it for itself.
        """
        one = Trajectory(0, tokens, 1, 0.0, [0.0] * (len(tokens) - 1))
        cp_size = ps.get_context_parallel_world_size()
        cp_rank = ps.get_context_parallel_rank()
        multiple = padding_multiple(self.cfg)
        plan = plan_step(
            [one], dp_size=1, dp_rank=0, max_tokens=len(tokens), multiple=multiple, cp_size=cp_size, cp_rank=cp_rank
        )
        # The interleaved schedule takes groups of PP micro-batches: the pack is repeated, and one result is read.
        got = self.logprobs(plan.packs * count_multiple(self.cfg), numerics=numerics)
        if got is None:
            return None
        (pack,) = plan.packs
        at = pack.predictor if pack.local is None else pack.local[pack.predictor]
        out = torch.zeros(len(tokens) - 1, device=device())
        out[on_device(at)] = on_device(got[0])
        # Each rank filled in the rows it owns and left zeros elsewhere.
        if cp_size > 1:
            torch.distributed.all_reduce(out, group=ps.get_context_parallel_group())
        return out.cpu().numpy()


class Actor(Policy):
    """The trained policy: Megatron DDP, distributed optimizer, LR schedule, clipping."""

    def __init__(self, cfg: Config, hf_dir: str | Path) -> None:
        super().__init__(cfg, hf_dir)
        if cfg.rollout.notes_routing:
            watch_routing(self.models)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=cfg.parallel.use_distributed_optimizer,
            overlap_grad_reduce=cfg.parallel.overlap_grad_reduce,
        )
        config = self.models[0].config
        self.chunks: list[DistributedDataParallel] = [
            # One bucket for later chunks, as in Megatron's trainer: their reduction overlaps compute anyway.
            DistributedDataParallel(config=config, ddp_config=ddp, module=model, disable_bucketing=i > 0)
            for i, model in enumerate(self.models)
        ]
        # Replicas read the same files, but a bit that differs on one would never be noticed again.
        for chunk in self.chunks:
            chunk.broadcast_params()
        self.optimizer = get_megatron_optimizer(_optimizer_config(cfg), self.chunks)
        self.scheduler = _scheduler(cfg, self.optimizer)
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = self._sum_gradients
        self._alone = True
        """Whether the passes of the running step have met no other rank yet."""
        if cfg.parallel.overlap_grad_reduce:
            syncs = [own_chunk.no_sync for own_chunk in self.chunks]
            # Megatron takes a list for virtual stages and a function for one chunk.
            config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        self.skipped_in_a_row = 0
        self._judged: dict[str, float] = {}
        """What the guard said of the running rollout's first update, until its metrics are taken."""
        stages = cfg.parallel.pipeline_model_parallel_size
        parameter_bytes = sum(one.nbytes for chunk in self.chunks for one in chunk.parameters())
        expected = expected_seconds(device().type, config.num_layers // stages, parameter_bytes)
        self.costs = UpdateCosts(pipelined=stages > 1, expected=expected)

    def head_metrics(self) -> dict[str, float]:
        """Metrics of the guard after a rollout's updates. Collective over all ranks."""
        if not self.guard.watches:
            return {}
        judged, self._judged = self._judged, {}
        drift = self.guard.take_drift()
        sums = dist.sum_over_replicas({"flips": drift.flips, "gates": drift.gates})
        return judged | {"train/head_gate_flips": sums["flips"] / max(sums["gates"], 1.0)}

    def routing(self, plans: Sequence[StepPlan]) -> dict[str, float]:
        """Metrics of the engine's routing after a rollout's updates over `plans`. Collective over all ranks."""
        if not self.cfg.rollout.notes_routing:
            return {}
        return take_routing(self.models) | {"rollout/routing_noted": routing_noted(plans)}

    def watch_head(self) -> tuple[bool, dict[str, float]]:
        """(did the head just fall back to bf16?, metrics) after a watched pass; ({}, when FP8 is not used).

        Collective over all ranks, which decide alike.
        """
        if not self.guard.watches:
            return False, {}
        drift = self.guard.take_drift()
        sums = dist.sum_over_replicas({"diff": drift.total, "rows": drift.rows})
        largest = dist.max_over_ranks({"max": drift.largest})["max"]
        mean = sums["diff"] / max(sums["rows"], 1.0)
        fell = self.guard.decide(mean)
        return fell, {
            "train/head_logp_abs_diff": mean,
            "train/head_logp_abs_diff_max": largest,
            "train/head_fallback": float(self.guard.fallen),
        }

    def update(self, packs: list[Pack], loss: PackLoss) -> dict[str, float]:
        """One optimizer step over this rank's packs; returns global statistics, the same on every rank.

        Where no pass has seen the packs, the guard judges the sample of this one before anything moves. If FP8 is too
        far from bf16, the passes are made once more in bf16.

        Collective over all ranks. Keys: the loss's sums divided by the pairs of the step, `grad-norm`,
        `learning-rate`, `skipped_steps`, `ranks_split`. Raises TrainingDiverged after too many skipped steps in a row,
        PacksTooLarge when memory is short and smaller packs are not to be had.
        """
        data, packs, split_packs = self._gradients(packs, loss)
        # The same on every rank: each has packs of the step, and all of them or none are unseen.
        if any(pack.unseen for pack in packs):
            fell, self._judged = self.watch_head()
            if fell:
                data, packs, split_packs = self._gradients(packs, loss)
                self.guard.take_drift()
        # Read before the step: the scheduler then moves on.
        lr = self.optimizer.param_groups[0]["lr"]
        grad_norm = self._apply_gradients()
        skipped = not math.isfinite(grad_norm)
        self._after_step(skipped, grad_norm, packs)
        stats = self._mean_over_pairs(data, packs, split=split_packs)
        self.costs.stepped()
        return {
            **stats,
            "grad-norm": grad_norm,
            "learning-rate": float(lr),
            "skipped_steps": float(skipped),
        }

    def _gradients(self, packs: list[Pack], loss: PackLoss) -> tuple[list[Stats], list[Pack], bool]:
        """(statistics, the packs that they are of, whether these were split for want of memory)."""
        data, smaller = self._passes(packs, loss)
        split_packs = data is None
        if data is None:
            # Not in an except clause: its traceback would hold the activations.
            packs = smaller
            data, _ = self._passes(packs, loss, again=True)
        assert data is not None, "the second attempt returns or raises"
        self.costs.passed()
        return data, packs, split_packs

    def _passes(
        self, packs: list[Pack], loss: PackLoss, *, again: bool = False
    ) -> tuple[list[Stats] | None, list[Pack]]:
        """Statistics of `packs`, whose gradients are in the buffers. (None, smaller packs) when memory was short.

        `again`: this is the second attempt. Then, and where another rank takes part in a pass, raises PacksTooLarge.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        # Beside the buffers, not in their place: Megatron's optimizers clear `.grad` alone.
        self.optimizer.zero_grad()
        self._alone = not self._meets_others()
        gates = partial(clip_gates, self.cfg.algo)
        try:
            return run_schedule(
                self.chunks, packs, self.head, loss=loss, gates=gates, watch=self.costs.watch,
                replay=self.cfg.rollout.routing_replay == "all",
            ), packs  # fmt: skip
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            told = str(error).splitlines()[0]
        self.costs.dropped()
        release_cached_memory()
        largest = max(len(pack.tokens) for pack in packs)
        # Whoever waits for this rank amid a pass would wait in vain for the one that it began again.
        smaller = split(packs, padding_multiple(self.cfg)) if self._alone and not again else None
        if smaller is None:
            raise PacksTooLarge(
                f"rank {dist.rank()}: no memory for a pass over packs of up to {largest} tokens ({told}). Lower "
                f"train.max_tokens_per_gpu (now {self.cfg.train.max_tokens_per_gpu}), or keep fewer activations with "
                "parallel.recompute_granularity=full; the newest checkpoint is whole"
            )
        logger.warning(
            "rank %d: no memory for packs of up to %d tokens (%s): this step's are split, %d become %d. Lower "
            "train.max_tokens_per_gpu (now %d) if this comes again",
            *(dist.rank(), largest, told, len(packs), len(smaller), self.cfg.train.max_tokens_per_gpu),
        )
        return None, smaller

    def _meets_others(self) -> bool:
        """Whether a pass has collectives of its own, before gradients are summed at its end."""
        parallel = self.cfg.parallel
        return parallel.model_parallel_size > 1 or parallel.overlap_grad_reduce or bool(self.spec.num_experts)

    def _sum_gradients(self, *arguments: Any, **named: Any) -> None:
        """Megatron's end of a pass, which is collective over all ranks."""
        self._alone = False
        finalize_model_grads(*arguments, **named)

    def _apply_gradients(self) -> float:
        """Clip and step; returns the gradient norm, the same on every rank. Nothing moves when it is not finite."""
        # Megatron looks for NaN only under a loss scaler. In fp32 and bf16 its step would write them into the weights,
        # and a gradient norm that is reported afterwards comes too late.
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        # The norm is all-reduced, so that every rank takes the same branch: the step is collective.
        if math.isfinite(grad_norm):
            self.optimizer.step()
            self.weights_changed()
        return grad_norm

    def _after_step(self, skipped: bool, grad_norm: float, packs: Sequence[Pack]) -> None:
        if not skipped:
            self.skipped_in_a_row = 0
            self.scheduler.step(increment=1)
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.cfg.train.max_skipped_steps:
            raise TrainingDiverged(
                f"{self.skipped_in_a_row} optimizer steps in a row had the gradient norm {grad_norm}; the last good "
                f"weights are in the newest checkpoint. Lower train.lr (now {self.cfg.train.lr}) or train.clip_grad, "
                "and look at rollout/logprob_abs_diff_max and train/pg_clipfrac before the first skipped step",
                packs,
                grad_norm,
            )

    def _mean_over_pairs(self, data: list[Stats], packs: list[Pack], *, split: bool = False) -> dict[str, float]:
        """Sums over last-stage ranks (one per tensor-parallel group) / pairs of the step, and maxima; on every rank.

        Sums of the mismatch are not divided, nor is the number of ranks whose packs were `split`.
        """
        # Ranks of other stages have no statistics and must still know their names to take part in the sums.
        last = ps.is_pipeline_last_stage(ignore_virtual=True)
        mine = [sorted(data[0].sums), sorted(data[0].maxima)] if last and data else [[], []]
        known = dist.gather_objects(mine)
        sums = {name: 0.0 for of_rank in known for name in of_rank[0]} | {"pairs": 0.0, SPLIT: 0.0}
        peaks = {name: 0.0 for of_rank in known for name in of_rank[1]}
        if last:
            counted = ("pairs", SPLIT)
            sums = {name: sum(_numbers([stats.sums[name] for stats in data])) for name in sums if name not in counted}
            sums["pairs"] = float(sum(pack.pairs for pack in packs))
            sums[SPLIT] = float(split)
            # Ranks of a tensor-parallel group hold the same maxima: no need to leave any out.
            peaks = {name: max(_numbers([stats.maxima[name] for stats in data])) for name in peaks}
        total = dist.sum_over_replicas(sums, counts=last)
        pairs = max(total.pop("pairs"), 1.0)
        # The mismatch is a mean over rows, which may be those of some steps only: its sums go out as they are.
        whole = {SPLIT: total.pop(SPLIT)}
        means = whole | {name: value if name.startswith(MISMATCH) else value / pairs for name, value in total.items()}
        return means | (dist.max_over_ranks(peaks) if peaks else {})


def _numbers(scalars: list[torch.Tensor]) -> list[float]:
    """Scalars [] of one dtype and device as floats, read from the device at once; [] for none."""
    return torch.stack(scalars).tolist() if scalars else []


def _optimizer_config(cfg: Config) -> OptimizerConfig:
    train = cfg.train
    dtype = DTYPES[cfg.model.params_dtype]
    return OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=cfg.parallel.use_distributed_optimizer,
    )


def _scheduler(cfg: Config, optimizer: object) -> OptimizerParamScheduler:
    """Learning rate and weight decay per optimizer step."""
    # Without a scheduler Megatron decays norms and biases too.
    train = cfg.train
    # Megatron wants warm-up strictly inside the decay span.
    decay = max(train.lr_decay_iters or 1, train.lr_warmup_iters + 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.lr_warmup_iters,
        lr_decay_steps=decay,
        lr_decay_style=train.lr_decay_style,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
    )
