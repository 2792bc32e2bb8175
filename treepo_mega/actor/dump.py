"""An optimizer step that could not be taken, on disk: its packs, the weights before it, seed and configuration.

    directory = write_dump(actor, packs, step=12, grad_norm=math.nan)     collective over all ranks
    dump = read_dump(directory)                                           one process; `treepo-mega replay`

    RUN_DIR/dumps/step_000012/dump.json              step, seed, layout, configuration
                              rank_N.safetensors     the packs of each data-parallel and context-parallel rank
                              weights/               a Megatron checkpoint, loadable in any layout

JSON and safetensors, nothing that can hold code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core import parallel_state as ps
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from treepo_mega.actor.update import Actor
from treepo_mega.checkpoint.mcore import write_model_weights
from treepo_mega.errors import TreepoError
from treepo_mega.runtime import dist
from treepo_mega.runtime.files import atomic_file
from treepo_mega.tree.pack import Pack

DUMP = "dump.json"
WEIGHTS = "weights"
VERSION = 1


class DumpError(TreepoError):
    """A dump is missing or damaged; the message names the file."""


@dataclass
class Dump:
    """What `write_dump` wrote. `packs`: (rank that computed it, pack), in the order of ranks."""

    directory: Path
    step: int
    grad_norm: float
    head_fallen: bool
    config: dict[str, Any]
    packs: list[tuple[int, Pack]]


def write_dump(actor: Actor, packs: Sequence[Pack], *, step: int, grad_norm: float) -> Path:
    """Write the step's packs and the weights that they met; returns the directory. Collective over all ranks.

    `step` is counted from 1. Raises CheckpointError and RankLost as a checkpoint does, OSError.
    """
    cfg = actor.cfg
    timeout_s = cfg.distributed.timeout_s
    target = Path(cfg.logging.run_dir) / "dumps" / f"step_{step:06d}"
    with dist.shared_directory(target, timeout_s, replace=True) as partial:
        if dist.is_main():
            (partial / WEIGHTS).mkdir()
            about = {
                "version": VERSION,
                "step": step,
                "seed": cfg.train.seed,
                "grad_norm": str(grad_norm),
                "world_size": dist.world_size(),
                "head_fallen": actor.guard.fallen,
                "weights": WEIGHTS,
                "config": cfg.model_dump(mode="json", by_alias=True),
            }
            with atomic_file(partial / DUMP) as file:
                json.dump(about, file, indent=1)
        # Ranks of a tensor-parallel group hold the same packs; the last stage has the old logprobs.
        if ps.is_pipeline_last_stage(ignore_virtual=True) and ps.get_tensor_model_parallel_rank() == 0:
            _write_packs(partial / f"rank_{dist.rank()}.safetensors", packs)
        dist.barrier("the dump's packs", timeout_s)
        write_model_weights(actor.models, partial / WEIGHTS, timeout_s)
    return target


def _write_packs(path: Path, packs: Sequence[Pack]) -> None:
    arrays: dict[str, np.ndarray] = {}
    notes = []
    for number, pack in enumerate(packs):
        for field in fields(pack):
            value = getattr(pack, field.name)
            if isinstance(value, np.ndarray):
                arrays[f"{number}.{field.name}"] = np.ascontiguousarray(value)
        notes.append({"blocks": [list(block) for block in pack.blocks], "on_policy": pack.on_policy})
    save_file(arrays, path, {"packs": json.dumps(notes)})


def read_dump(directory: str | Path) -> Dump:
    """The dump in `directory`. Raises DumpError for one that is missing, damaged or of another version."""
    directory = Path(directory)
    path = directory / DUMP
    if not path.is_file():
        raise DumpError(f"{directory}: no {DUMP}: not a dump; expected a directory such as RUN/dumps/step_000012")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version = about["version"]
        if version != VERSION:
            raise DumpError(f"{path}: a dump of version {version}; this program reads version {VERSION}")
        files = sorted(directory.glob("rank_*.safetensors"), key=lambda file: int(file.stem.removeprefix("rank_")))
        return Dump(
            directory=directory,
            step=int(about["step"]),
            grad_norm=float(about["grad_norm"]),
            head_fallen=bool(about["head_fallen"]),
            config=about["config"],
            packs=[(int(file.stem.removeprefix("rank_")), pack) for file in files for pack in _read_packs(file)],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DumpError(f"{path}: damaged: {error!r}; expected what a stopped run wrote") from None


def _read_packs(path: Path) -> list[Pack]:
    """The packs of one file. Raises DumpError."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            notes = json.loads(file.metadata()["packs"])
            arrays: list[dict[str, Any]] = [{} for _ in notes]
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                number, _, name = key.partition(".")
                arrays[int(number)][name] = file.get_tensor(key)
        return [
            Pack(**named, blocks=[(first, end) for first, end in note["blocks"]], on_policy=note["on_policy"])
            for named, note in zip(arrays, notes, strict=True)
        ]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DumpError(f"{path}: damaged: {error}; expected packs of a stopped run") from None
