"""Two ranks of test_versions.py: `versions_worker.py write|read DIRECTORY`.

`write` trains four steps with TP 2 and saves after two; `read` loads that with TP 2 and with PP 2 and takes the other
two. `read` is launched with the other version of megatron-core, and prints how far its steps and weights are off.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import treepo_mega  # noqa: F401  (before Megatron, which the next import brings: this is also a script of torchrun)
from tests.checkpoint.training_worker import begin, difference, steps, weights
from tests.ranks import report_found
from treepo_mega.checkpoint import mcore as checkpoint
from treepo_mega.runtime import dist

TRAINER = {"step": 2, "cursor": {"taken": 32}}


def write(directory: Path) -> dict[str, object]:
    """The run that is saved in its middle; its last steps and weights lie beside the checkpoint."""
    cfg, actor = begin(directory, "tp2")
    steps(cfg, actor, range(2))
    checkpoint.save_training(directory / "step_000002", actor.models, actor.optimizer, actor.scheduler, TRAINER, 60)
    rows = steps(cfg, actor, range(2, 4))
    whole = weights(cfg, actor)
    if dist.is_main():
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, directory / "whole.safetensors")
        (directory / "steps.json").write_text(json.dumps(rows))
    return {"steps": rows}


def read(directory: Path) -> dict[str, object]:
    """Per layout: was the trainer's state as saved, and how far are losses, gradient norms and weights off."""
    want = torch.tensor(json.loads((directory / "steps.json").read_text()), dtype=torch.float64)
    whole = load_file(directory / "whole.safetensors")
    found: dict[str, object] = {}
    for layout in ("tp2", "pp2"):
        cfg, actor = begin(directory, layout)
        back = checkpoint.load_training(directory / "step_000002", actor.models, actor.optimizer, actor.scheduler)
        rows = torch.tensor(steps(cfg, actor, range(2, 4)), dtype=torch.float64)
        off = float(((rows - want) / want).abs().max())
        far = difference(weights(cfg, actor), whole) / cfg.train.lr
        found[layout] = {"trainer": back == TRAINER, "steps_off": off, "weights_off": far}
    return found


if __name__ == "__main__":
    report_found({"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2])))
