"""Two ranks (TP2) of test_dump.py: an update that overflows in one layer, dumped. `dump_worker.py DIRECTORY`.

Rank 0 reports where the dump lies and why the updates ended; and what an update without memory says before that.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from tests.actor.oracle import configuration, trajectories, write_checkpoint
from tests.ranks import report_found
from treepo_mega.actor.dump import write_dump
from treepo_mega.actor.losses import PolicyLoss
from treepo_mega.actor.split import PacksTooLarge
from treepo_mega.actor.update import Actor, TrainingDiverged
from treepo_mega.loss.stats import Stats
from treepo_mega.runtime import dist
from treepo_mega.tree.pack import Pack, plan_step


class NoMemory(PolicyLoss):
    """No rank has memory for its first pack."""

    def __call__(self, logp: Tensor, entropy: Tensor, pack: Pack) -> tuple[Tensor, Stats]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB, says the test")


def refusal(actor: Actor, packs: list[Pack]) -> str:
    """What an update says that finds no memory; "" if it finds some."""
    try:
        actor.update(packs, NoMemory(actor.cfg.algo))
    except PacksTooLarge as error:
        return str(error)
    return ""


def main(directory: Path) -> None:
    """See the module docstring."""
    hf = directory / "hf"
    cfg = configuration(
        hf,
        "parallel.tensor_model_parallel_size=2",
        "algo.kl_loss_coef=0",
        "algo.use_tis=false",
        "train.max_skipped_steps=2",
        "model.transformer_impl=local",
        f"logging.run_dir={directory / 'run'}",
    )
    dist.initialize(cfg)
    if dist.is_main():
        write_checkpoint(hf, "llama", tied=True)
    dist.barrier("the checkpoint", 60)
    actor = Actor(cfg, hf)
    packs = plan_step(trajectories(), dp_size=1, dp_rank=0, max_tokens=200).packs
    for pack in packs:
        pack.old_logprobs = pack.rollout_logprobs
    refused = refusal(actor, packs)
    # Finite weights whose product with finite inputs is not: as a step that was too long leaves them.
    with torch.no_grad():
        actor.models[0].decoder.layers[2].mlp.linear_fc2.weight.mul_(3e38)
    actor.weights_changed()
    loss = PolicyLoss(cfg.algo, actor.head.backend)
    skipped = []
    try:
        for _ in range(3):
            skipped.append(actor.update(packs, loss)["skipped_steps"])
    except TrainingDiverged as error:
        written = write_dump(actor, error.packs, step=12, grad_norm=error.grad_norm)
        report_found(
            {"dump": str(written), "skipped": skipped, "packs": len(packs), "message": str(error), "refused": refused}
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
