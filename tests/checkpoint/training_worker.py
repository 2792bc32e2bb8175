"""Two ranks of test_checkpoint.py and test_skipped_steps.py: `training_worker.py DIRECTORY`.

Trains four steps and saves after two; resumes in the same layout and in others; then meets NaN gradients. Rank 0
writes what happened to DIRECTORY/results.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as ps
from torch import Tensor

from tests.actor.oracle import configuration, trajectories, write_checkpoint
from tests.ranks import leave_layout
from tests.whole import whole_tensors
from treepo_mega.actor.forward import count_multiple, padding_multiple
from treepo_mega.actor.losses import SupervisedLoss
from treepo_mega.actor.model import equal_lengths
from treepo_mega.actor.moe import gathers_tokens
from treepo_mega.actor.update import Actor, TrainingDiverged
from treepo_mega.checkpoint import mcore as checkpoint
from treepo_mega.checkpoint.background import BackgroundSave
from treepo_mega.checkpoint.directories import step_directories
from treepo_mega.checkpoint.load import local_params
from treepo_mega.config import Config
from treepo_mega.loss.stats import Stats
from treepo_mega.runtime import dist
from treepo_mega.tree.pack import Pack, plan_step

LAYOUTS = {
    "tp2": ["parallel.tensor_model_parallel_size=2"],
    "pp2": ["parallel.pipeline_model_parallel_size=2"],
    "vpp2": ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
    "dp2": [],
    "dp2_plain_optimizer": ["parallel.use_distributed_optimizer=false"],
    "experts_ep2": ["parallel.expert_model_parallel_size=2"],
    "experts_tp2": [
        *("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
        *("parallel.expert_model_parallel_size=2", "parallel.expert_tensor_parallel_size=1"),
    ],
    "experts_pp2": ["parallel.pipeline_model_parallel_size=2"],
}
KINDS = {"hf": "llama", "experts": "qwen3_moe", "fewer": "mixtral"}
"""Model of each folder: tensors of mixtral are those of qwen3_moe but for their sizes and the norms of queries."""

UNSTEPPED = ("tp2", "dp2_plain_optimizer")


def begin(directory: Path, layout: str, folder: str | None = None) -> tuple[Config, Actor]:
    """A fresh actor in `layout`; an earlier layout of this process is taken down. `folder`: one of KINDS."""
    if ps.model_parallel_is_initialized():
        leave_layout()
    hf_dir = directory / (folder or ("experts" if layout.startswith("experts") else "hf"))
    decay = ["train.lr_decay_style=linear", "train.num_rollouts=8", "train.adam_eps=1e-8"]
    cfg = configuration(hf_dir, *LAYOUTS[layout], *decay, "train.max_skipped_steps=3")
    dist.initialize(cfg)
    if dist.is_main() and not hf_dir.exists():
        write_checkpoint(hf_dir, KINDS[hf_dir.name], tied=True)
    dist.barrier("the checkpoint", 60)
    return cfg, Actor(cfg, hf_dir)


def packs(cfg: Config, seed: int) -> list[Pack]:
    """This rank's packs of batch `seed`."""
    batch = [replace(t, advantage=1.0) for t in trajectories(8, seed)]
    dp_size, dp_rank = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    multiple, count = padding_multiple(cfg), count_multiple(cfg)
    return plan_step(
        batch,
        dp_size=dp_size,
        dp_rank=dp_rank,
        max_tokens=160,
        multiple=multiple,
        count_multiple=count,
        equal_lengths=equal_lengths(cfg),
        on_all_ranks=gathers_tokens(cfg),
    ).packs


def weights(cfg: Config, actor: Actor) -> dict[str, Tensor]:
    """All weights by their transformers names, on every rank."""
    return whole_tensors(cfg, actor.spec, [local_params(m) for m in actor.models])


def steps(cfg: Config, actor: Actor, which: range) -> list[list[float]]:
    """[loss, gradient norm, learning rate] of each step."""
    stats = [actor.update(packs(cfg, s), SupervisedLoss()) for s in which]
    return [[s["loss"], s["grad-norm"], s["learning-rate"]] for s in stats]


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    return max(float((a[n] - b[n]).abs().nan_to_num(nan=float("inf")).max()) for n in a)


def resume(
    directory: Path, saved: str, layouts: list[str], after: int = 2, background: BackgroundSave | None = None
) -> dict[str, Any]:
    """A run in layout `saved` that saves after `after` steps, against runs resumed from that in `layouts`.

    `background`: the steps that follow change every tensor while the checkpoint is written.
    """
    where = directory / f"{saved}{'_background' if background else ''}" / f"step_{after:06d}"
    cfg, actor = begin(directory, saved)
    whole = steps(cfg, actor, range(after))
    trainer = {"step": after, "cursor": {"taken": 32}, "skipped_in_a_row": 1}
    of_main = {"carried": [{"prompt": 7}]} if dist.is_main() else {}
    of_run = (actor.models, actor.optimizer, actor.scheduler, trainer)
    if background is None:
        checkpoint.save_training(where, *of_run, 60, of_main)
    else:
        background.start(where, *checkpoint.training_state(*of_run, of_main))
    trainer["carried"] = [{"prompt": 7}]
    whole += steps(cfg, actor, range(after, 4))
    want = weights(cfg, actor)
    out: dict[str, Any] = {"whole": whole}
    if background is not None:
        out["before_its_name"] = [path.name for path in step_directories(where.parent)]
        out["written"] = [background.poll(wait=True) == where, background.poll(wait=True)]
    for layout in layouts:
        cfg, actor = begin(directory, layout)
        back = checkpoint.load_training(where, actor.models, actor.optimizer, actor.scheduler)
        rows = steps(cfg, actor, range(after, 4))
        far = difference(weights(cfg, actor), want) / cfg.train.lr
        out[layout] = {"trainer": back == trainer, "steps": rows, "weight_diff": far}
    return out


def refused(directory: Path, saved: str, folder: str, layout: str | None = None) -> str:
    """What loading a checkpoint of `saved` into the model of `folder` says, in `layout` or the same."""
    _, actor = begin(directory, layout or saved, folder)
    try:
        checkpoint.load_training(directory / saved / "step_000002", actor.models, actor.optimizer, actor.scheduler)
    except checkpoint.CheckpointError as e:
        return str(e)
    return ""


class NotFinite(SupervisedLoss):
    """A loss that is NaN on the last rank only: the others must skip too."""

    def __call__(self, logp: Tensor, entropy: Tensor, pack: Pack) -> tuple[Tensor, Stats]:
        loss, stats = super().__call__(logp, entropy, pack)
        return loss * (float("nan") if dist.rank() == dist.world_size() - 1 else 1.0), stats


def skipping(directory: Path, layout: str) -> dict[str, Any]:
    """A good step, NaN, a good step, then NaN until it stops."""
    cfg, actor = begin(directory, layout)
    start = weights(cfg, actor)
    lr = [actor.update(packs(cfg, 0), SupervisedLoss())["learning-rate"]]
    before = weights(cfg, actor)
    moments = [t.clone() for t in _moments(actor)]
    first = actor.update(packs(cfg, 1), NotFinite())
    out: dict[str, Any] = {
        "moved_by_good_step": difference(before, start),
        "skipped": first["skipped_steps"],
        "norm": repr(first["grad-norm"]),
        "moved": difference(weights(cfg, actor), before),
        "moments": len(moments),
        "moments_moved": sum(not torch.equal(a, b) for a, b in zip(moments, _moments(actor), strict=True)),
        "in_a_row": [actor.skipped_in_a_row],
    }
    good = actor.update(packs(cfg, 0), SupervisedLoss())
    out["lr"] = [*lr, first["learning-rate"], good["learning-rate"]]
    try:
        for _ in range(5):
            out["in_a_row"].append(actor.skipped_in_a_row)
            actor.update(packs(cfg, 1), NotFinite())
    except TrainingDiverged as e:
        out["diverged"] = str(e)
    return out


def _moments(actor: Actor) -> list[Tensor]:
    """Adam's state on this rank."""
    inner = [o.optimizer for o in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])]
    return [v for o in inner for s in o.state.values() for v in s.values() if isinstance(v, Tensor)]


def main() -> None:
    """Everything in one launch; each entry of the results is one question."""
    directory = Path(sys.argv[1])
    results = {
        "resume": {saved: resume(directory, saved, list(LAYOUTS)[:4]) for saved in ("tp2", "dp2")},
        "plain_optimizer": resume(directory, "dp2_plain_optimizer", ["dp2_plain_optimizer"]),
        "before_the_first_step": {saved: resume(directory, saved, [saved], after=0) for saved in UNSTEPPED},
        "background": resume(directory, "tp2", ["tp2", "dp2"], background=BackgroundSave(60)),
        "experts": resume(directory, "experts_ep2", ["experts_ep2", "experts_tp2"]),
        "fewer_experts": refused(directory, "experts_ep2", "fewer"),
        "without_ep": refused(directory, "experts_ep2", "experts", "experts_pp2"),
        "skipping": {layout: skipping(directory, layout) for layout in ("tp2", "pp2", "dp2", "experts_ep2")},
    }
    if dist.is_main():
        (directory / "results.json").write_text(json.dumps(results, indent=1))
    dist.leave()


if __name__ == "__main__":
    main()
