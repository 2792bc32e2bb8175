"""Two ranks of test_versions.py: `versions_worker.py write|read DIRECTORY`.

`write` trains four steps with TP 2 and saves after two; `read` loads that with TP 2 and with PP 2 and takes the other
two. A mixture of experts is saved with EP 2, and read with EP 2 and with TP 2. `read` is launched with the other
version of megatron-core, and prints how far its steps and weights are off.
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


READERS = {"tp2": ("tp2", "pp2"), "experts_ep2": ("experts_ep2", "experts_tp2")}
"""Layout that saves -> layouts that load it."""


def write(directory: Path) -> dict[str, object]:
    """The runs that are saved in their middle; their last steps and weights lie beside the checkpoints."""
    rows = {}
    for layout in READERS:
        cfg, actor = begin(directory, layout)
        steps(cfg, actor, range(2))
        where = directory / layout / "step_000002"
        checkpoint.save_training(where, actor.models, actor.optimizer, actor.scheduler, TRAINER, 60)
        rows[layout] = steps(cfg, actor, range(2, 4))
        whole = weights(cfg, actor)
        if dist.is_main():
            kept = {name: tensor.contiguous() for name, tensor in whole.items()}
            save_file(kept, directory / f"{layout}.safetensors")
            (directory / f"{layout}.json").write_text(json.dumps(rows[layout]))
    return {"steps": rows}


def read(directory: Path) -> dict[str, object]:
    """Per layout: was the trainer's state as saved, and how far are losses, gradient norms and weights off."""
    found: dict[str, object] = {}
    for saved, layouts in READERS.items():
        want = torch.tensor(json.loads((directory / f"{saved}.json").read_text()), dtype=torch.float64)
        whole = load_file(directory / f"{saved}.safetensors")
        for layout in layouts:
            cfg, actor = begin(directory, layout)
            where = directory / saved / "step_000002"
            back = checkpoint.load_training(where, actor.models, actor.optimizer, actor.scheduler)
            rows = torch.tensor(steps(cfg, actor, range(2, 4)), dtype=torch.float64)
            off = float(((rows - want) / want).abs().max())
            far = difference(weights(cfg, actor), whole) / cfg.train.lr
            found[layout] = {"trainer": back == TRAINER, "steps_off": off, "weights_off": far}
    return found


if __name__ == "__main__":
    report_found({"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2])))
