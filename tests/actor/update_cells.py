"""One optimizer step of the actor against transformers and torch: what trees_worker.py measures of a case.

A case is kind:tied:tp:pp:vpp:sp[:override,override]. Compared are logprobs, perplexity, loss, every parameter's
gradient, and the weights after a clipped update.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as ps
from torch import Tensor

from tests.actor.oracle import Oracle, configuration, trajectories, write_checkpoint
from tests.ranks import leave_layout
from tests.whole import whole_tensors
from treepo_mega.actor.forward import count_multiple, padding_multiple, run_schedule
from treepo_mega.actor.losses import PolicyLoss
from treepo_mega.actor.model import equal_lengths
from treepo_mega.actor.moe import gathers_tokens
from treepo_mega.actor.perplexity import perplexity
from treepo_mega.actor.update import Actor, Policy
from treepo_mega.checkpoint.load import local_params
from treepo_mega.config import Config
from treepo_mega.loss.stats import Stats
from treepo_mega.runtime import dist
from treepo_mega.tree.pack import Pack, StepPlan, plan_step


class ShortOfMemory(PolicyLoss):
    """Rank 0 finds no memory for its second pack, once; by then the first one's gradients are in the buffers."""

    asked = 0

    def __call__(self, logp: Tensor, entropy: Tensor, pack: Pack) -> tuple[Tensor, Stats]:
        self.asked += 1
        if self.asked == 2 and dist.is_main():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB, says the test")
        return super().__call__(logp, entropy, pack)


def settings(case: str) -> tuple[str, bool, list[str]]:
    """(kind, tied, overrides) of a case."""
    kind, tied, tp, pp, vpp, sp, *more = case.split(":")
    out = [
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.pipeline_model_parallel_size={pp}",
        f"parallel.sequence_parallel={bool(int(sp))}",
    ]
    if int(vpp) > 1:
        out.append(f"parallel.virtual_pipeline_model_parallel_size={vpp}")
    return kind, tied == "tied", out + [o for m in more for o in m.split(",") if o]


def plan(cfg: Config) -> StepPlan:
    """This rank's packs of the one batch."""
    return plan_step(
        trajectories(),
        dp_size=ps.get_data_parallel_world_size(),
        dp_rank=ps.get_data_parallel_rank(),
        max_tokens=160,
        multiple=padding_multiple(cfg),
        count_multiple=count_multiple(cfg),
        equal_lengths=equal_lengths(cfg),
        on_all_ranks=gathers_tokens(cfg),
    )


def logprob_diff(step: StepPlan, oracle: Oracle) -> float:
    """Largest |actor - transformers| over this rank's rows; their order is that of the blocks."""
    worst = 0.0
    for pack in step.packs:
        want = [oracle.logprobs[tuple(pack.tokens[s:e].tolist())] for s, e in pack.blocks]
        if want:
            worst = max(worst, float((torch.from_numpy(pack.old_logprobs) - torch.cat(want)).abs().max()))
    return worst


def gradient_diff(actor: Actor, step: StepPlan, cfg: Config, oracle: Oracle) -> float:
    """Worst relative error of a parameter's gradient, gathered into transformers' names, before clipping changes it.

    A data-parallel rank of the distributed optimizer holds only its share of the reduced gradient: one replica only.
    """
    if ps.get_data_parallel_world_size() > 1 and cfg.parallel.use_distributed_optimizer:
        return 0.0
    for chunk in actor.chunks:
        chunk.zero_grad_buffer()
    run_schedule(actor.chunks, step.packs, actor.head, loss=PolicyLoss(cfg.algo))
    whole = whole_tensors(cfg, actor.spec, [{n: p.main_grad for n, p in m.named_parameters()} for m in actor.models])
    return max(float((got - oracle.grads[n]).norm() / oracle.grads[n].norm()) for n, got in whole.items())


def weight_diff(actor: Actor, cfg: Config, oracle: Oracle) -> float:
    """Largest |actor - transformers| weight after the update, in units of the learning rate."""
    whole = whole_tensors(cfg, actor.spec, [local_params(m) for m in actor.models])
    return max(float((t - oracle.weights[n]).abs().max()) for n, t in whole.items()) / cfg.train.lr


def oracle_of(hf_dir: Path, cfg: Config) -> Oracle:
    """The step in transformers, taken by rank 0 once a checkpoint and read by all: no layout changes it."""
    path = hf_dir.with_name(f"{hf_dir.name}_update.pt")
    if dist.is_main() and not path.exists():
        torch.save(Oracle.measure(hf_dir, cfg, trajectories()), path)
    dist.barrier("the oracle", 120)
    return Oracle(**torch.load(path, weights_only=True))


def measure_update(case: str, directory: Path) -> dict[str, Any]:
    """Measure one case; the layout is taken down again afterwards."""
    kind, tied, overrides = settings(case)
    hf_dir = directory / f"{kind}_{tied}"
    cfg = configuration(hf_dir, *overrides)
    dist.initialize(cfg)
    if dist.is_main() and not (hf_dir / "config.json").exists():
        write_checkpoint(hf_dir, kind, tied)
    dist.barrier("the checkpoint", 60)
    oracle = oracle_of(hf_dir, cfg)
    actor, reference = Actor(cfg, hf_dir), Policy(cfg, hf_dir)
    step = plan(cfg)
    known = actor.logprobs(step.packs)
    for i, x in enumerate(reference.logprobs(step.packs) or ()):
        step.packs[i].old_logprobs, step.packs[i].ref_logprobs = known[i], x
    far = {
        "logprob_diff": logprob_diff(step, oracle) if known else 0.0,
        "gradient_diff": gradient_diff(actor, step, cfg, oracle),
        "perplexity_rel": abs(perplexity(actor, trajectories(), cfg) / oracle.perplexity - 1),
        "one_text_rel": abs(perplexity(actor, trajectories()[:1], cfg) / oracle.first_perplexity - 1),
    }
    alone = cfg.parallel.model_parallel_size == 1 and not cfg.parallel.overlap_grad_reduce
    stats = actor.update(step.packs, (ShortOfMemory if alone else PolicyLoss)(cfg.algo))
    far["weight_diff"] = weight_diff(actor, cfg, oracle)
    out = dist.max_over_ranks(far) | stats | {"packs": len(step.packs), "alone": alone}
    out["grad_norm_rel"] = abs(stats["grad-norm"] - oracle.grad_norm) / oracle.grad_norm
    out["loss_diff"] = abs(stats["loss"] - oracle.loss)
    out["clipped_by"] = oracle.grad_norm / cfg.train.clip_grad
    # A second epoch over the same packs; what they hold is from before the first.
    again = actor.update(step.packs, PolicyLoss(cfg.algo))
    out["second_loss_diff"] = abs(again["loss"] - oracle.second_loss)
    out["second_ratio_rel"] = abs(again["max_ratio_diff"] / oracle.second_ratio_diff - 1)
    out["second_ratio_diff"] = again["max_ratio_diff"]
    leave_layout()
    return out
