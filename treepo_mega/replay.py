"""`treepo-mega replay DUMP`: run an optimizer step that was not finite again, on one rank, and say where it begins.

    main(Path("runs/mine/dumps/step_000012"))        # the exit status: 0 when it is found

The dump holds the weights before the step in a form that any layout loads, so one rank computes what many did. Its
rounding differs from theirs: an overflow that hangs on the last bit may not come again, and the message says so.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from treepo_mega.actor.dump import WEIGHTS, Dump, DumpError, read_dump
from treepo_mega.actor.losses import PolicyLoss
from treepo_mega.actor.nonfinite import NonFinite, first_non_finite
from treepo_mega.actor.update import Actor
from treepo_mega.checkpoint.mcore import load_model_weights
from treepo_mega.config import Config, ParallelConfig, parse_config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.runtime import dist
from treepo_mega.runtime.process import run_and_leave
from treepo_mega.tree.pack import Pack


def replay(dump: Dump) -> tuple[NonFinite | None, int]:
    """(the first value that is not finite, the rank that had the pack or -1). Starts one rank's process group.

    Raises DumpError without packs, and what building a policy raises.
    """
    if not dump.packs:
        raise DumpError(f"{dump.directory}: no rank_*.safetensors: the dump has lost its packs")
    cfg = _on_one_rank(dump)
    spec = ModelSpec.from_hf(cfg.model.hf_checkpoint)
    dist.initialize(cfg, spec)
    dist.seed_everything(cfg.train.seed, dump.step - 1)
    actor = Actor(cfg, cfg.model.hf_checkpoint)
    load_model_weights(actor.models, dump.directory / WEIGHTS)
    actor.weights_changed()
    actor.guard.fallen = dump.head_fallen
    packs = [_whole(pack) for _, pack in dump.packs]
    found = first_non_finite(actor, packs, PolicyLoss(cfg.algo, actor.head.backend))
    rank = -1 if found is None or found.pack is None else dump.packs[found.pack][0]
    return found, rank


def _on_one_rank(dump: Dump) -> Config:
    """The run's configuration without its layout, its faults and its checkpoints."""
    raw = dict(dump.config)
    raw["parallel"] = ParallelConfig().model_dump(mode="json")
    raw.pop("debug", None)
    cfg = parse_config(raw)
    # The layers of the machine that replays: the dump may come from one with a GPU.
    cfg.model.transformer_impl = "auto"
    return cfg


def _whole(pack: Pack) -> Pack:
    """The pack for one context-parallel rank: all its tokens, and the rows that the dump's rank had."""
    if pack.local is None:
        return pack
    return replace(pack, predictor=pack.local[pack.predictor], local=None, order=None)


def _run(directory: Path) -> int:
    dump = read_dump(directory)
    found, rank = replay(dump)
    print(f"step {dump.step} of {directory}: gradient norm {dump.grad_norm}, {len(dump.packs)} packs")
    if found is None:
        print(
            "on one rank everything is finite: the overflow hangs on the layout's rounding, or on a fault of one "
            "device. Look at the hosts of the run, and lower train.lr"
        )
        return 1
    print(found.text() + (f" (a pack of rank {rank})" if rank >= 0 else ""))
    return 0


def main(directory: Path) -> None:
    """Replay and end the process: with 0 when the value is found, with 1 when all is finite."""
    run_and_leave(lambda: _run(directory))
