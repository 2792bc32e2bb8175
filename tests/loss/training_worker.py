"""Two ranks (TP2) of test_training.py: an FP8 head in the real actor. Writes DIRECTORY/results.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as ps

from tests.actor.oracle import configuration, trajectories, write_checkpoint
from tests.ranks import leave_layout
from treepo_mega.actor.forward import count_multiple, padding_multiple
from treepo_mega.actor.losses import PolicyLoss
from treepo_mega.actor.update import Actor
from treepo_mega.loss.quantize import BLOCK, Split, quantize, split
from treepo_mega.runtime import dist
from treepo_mega.tree.pack import Pack, plan_step


def begin(directory: Path, *overrides: str) -> tuple[Actor, list[Pack]]:
    """An actor and the packs of one optimizer step."""
    if ps.model_parallel_is_initialized():
        leave_layout()
    hf = directory / "hf"
    # Without importance weights: the rollout logprobs of these trajectories are made up.
    fixed = ("parallel.tensor_model_parallel_size=2", "algo.kl_loss_coef=0", "algo.use_tis=false")
    cfg = configuration(hf, *fixed, *overrides)
    dist.initialize(cfg)
    if dist.is_main() and not hf.exists():
        write_checkpoint(hf, "llama", tied=True)
    dist.barrier("the checkpoint", 60)
    how = {"max_tokens": 200, "multiple": padding_multiple(cfg), "count_multiple": count_multiple(cfg)}
    return Actor(cfg, hf), plan_step(trajectories(), dp_size=1, dp_rank=0, **how).packs


def train(actor: Actor, packs: list[Pack], steps: int = 2) -> tuple[dict[str, float], list[dict[str, float]]]:
    """What the trainer does with a rollout: old logprobs, the guard's decision, updates. (guard's metrics, stats)."""
    for watch in (True, False):
        for pack, old in zip(packs, actor.logprobs(packs, watch=watch) or (), strict=True):
            pack.old_logprobs = old
        if watch:
            fell, metrics = actor.watch_head()
            if not fell:
                break
    loss = PolicyLoss(actor.cfg.algo, actor.head.backend)
    stats = [actor.update(packs, loss) for _ in range(steps)]
    return metrics | actor.head_metrics(), stats


def train_unseen(actor: Actor, packs: list[Pack]) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The same of a rollout that no pass goes over before its one update."""
    for pack in packs:
        pack.on_policy = pack.unseen = True
    stats = [actor.update(packs, PolicyLoss(actor.cfg.algo, actor.head.backend))]
    return actor.head_metrics(), stats


def kept_is_fresh(actor: Actor, packs: list[Pack]) -> bool:
    """Is the quantised output weight that the head uses that of the weights as they are?"""
    actor.logprobs(packs)
    weight = actor.models[-1].head_weight().detach()
    (kept,) = (k for k in actor.head.cache._kept.values() if isinstance(k, Split))
    valid = min(max(actor.spec.vocab_size - ps.get_tensor_model_parallel_rank() * len(weight), 0), len(weight))
    fresh = split(weight, kept.channels, kept.rest.recipe, quantize, block_rows=BLOCK, valid_rows=valid)
    return torch.equal(kept.values(), fresh.values())


def main() -> None:
    """Every case, in this process."""
    directory = Path(sys.argv[1])
    out: dict[str, Any] = {}
    norms = {}
    for precision in ("fp32", "bf16", "fp8"):
        actor, packs = begin(directory, f"loss.precision={precision}", "loss.guard.max_abs_diff=1")
        metrics, stats = train(actor, packs)
        norms[precision] = [s["grad-norm"] for s in stats]
        out[precision] = metrics
    out["norms"] = norms
    out["made"] = actor.head.cache.made
    out["fresh"] = kept_is_fresh(actor, packs)
    actor, packs = begin(directory, "loss.precision=fp8", "loss.guard.max_abs_diff=1e-6")
    out["fallen"], stats = train(actor, packs)
    norms["fallen"] = [s["grad-norm"] for s in stats]
    actor, packs = begin(directory, "loss.precision=fp8", "loss.logprob_precision=bf16")
    out["apart"], _ = train(actor, packs)
    unseen: dict[str, Any] = {}
    for name, limit in (("near", 1), ("far", 1e-6)):
        actor, packs = begin(directory, "loss.precision=fp8", f"loss.guard.max_abs_diff={limit}")
        metrics, stats = train_unseen(actor, packs)
        unseen[name] = {"metrics": metrics, "norm": stats[0]["grad-norm"]}
    actor, packs = begin(directory, "loss.precision=bf16")
    unseen["bf16"] = {"norm": train_unseen(actor, packs)[1][0]["grad-norm"]}
    out["unseen"] = unseen
    if dist.is_main():
        (directory / "results.json").write_text(json.dumps(out))
    dist.barrier("the end", 60)
    dist.leave()


if __name__ == "__main__":
    main()
