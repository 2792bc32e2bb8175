"""Megatron's parameters to a Hugging Face checkpoint, every rank writing its share of the shards.

    info = export_hf(models, spec, cfg, target, like=hf_dir, dtype=torch.bfloat16)     # collective over all ranks

The plan of `plan.py` takes whole tensors to the ranks that write them (`files_side`), spread by bytes; a rank
collects tensors until a shard is full and writes it, so that it holds about one shard and the tensors under way. At
the end rank 0 gives the shards their names, writes the index, and adds configuration and tokenizer. The directory
appears by a rename: all ranks must see the same file system.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from treepo_mega.checkpoint.headers import INDEX, SINGLE, HfCheckpointError, key_problems
from treepo_mega.checkpoint.hf import HfReader, copy_companions, set_config_dtype, shard_name
from treepo_mega.checkpoint.load import local_params
from treepo_mega.config import Config
from treepo_mega.modelspec.mcore_layout import ModelSpec, ParamLayout, hf_shapes
from treepo_mega.reshard.execute import Resharder
from treepo_mega.reshard.sides import files_side, grid_of, mcore_side
from treepo_mega.runtime import dist


class WholeTensors:
    """Tensors [full HF shape] of this rank's share as the destination of a reshard, on the CPU, each made at need."""

    def __init__(self, layout: Mapping[str, ParamLayout], dtype: torch.dtype) -> None:
        self._layout = layout
        self._dtype = dtype
        self._open: dict[str, Tensor] = {}

    def start_weight_update(self) -> None:
        """Nothing to do."""

    def buffer(self, chunk: int, name: str) -> Tensor:
        """The tensor, made when its first part arrives."""
        if name not in self._open:
            self._open[name] = torch.empty(self._layout[name].shape, dtype=self._dtype)
        return self._open[name]


class ShardTarget(WholeTensors):
    """This rank's shards as the destination of a reshard: whole tensors are collected and written, shard by shard."""

    def __init__(self, layout: Mapping[str, ParamLayout], directory: Path, rank: int, dtype: torch.dtype, limit: int):
        super().__init__(layout, dtype)
        self._directory = directory
        self._rank = rank
        self._limit = limit
        self._whole: dict[str, Tensor] = {}
        self.shards: list[tuple[str, list[str], int]] = []

    def update_weight(self, chunk: int, name: str) -> None:
        """Into the shard; a full shard is written first."""
        tensor = self._open.pop(name)
        if self._whole and sum(held.nbytes for held in self._whole.values()) + tensor.nbytes > self._limit:
            self._write()
        self._whole[name] = tensor

    def finish_weight_update(self) -> None:
        """The last shard."""
        if self._whole:
            self._write()

    def abort_weight_update(self) -> None:
        """What is written stays in the partial directory, which is never published."""
        self._open.clear()
        self._whole.clear()

    def _write(self) -> None:
        # The final name holds the number of shards, which no rank knows before all have written.
        name = f"rank{self._rank:05d}-{len(self.shards):05d}.safetensors"
        save_file(self._whole, self._directory / name, metadata={"format": "pt"})
        self.shards.append((name, list(self._whole), sum(tensor.nbytes for tensor in self._whole.values())))
        self._whole = {}


def export_hf(
    models: Sequence[nn.Module],
    spec: ModelSpec,
    cfg: Config,
    target: str | Path,
    *,
    like: str | Path,
    dtype: torch.dtype,
    replace: bool = False,
) -> dict[str, Any]:
    """`write_hf` to a directory that appears whole. Collective over all ranks.

    `replace`: an older `target` stays until then; otherwise OutputExistsError is raised when there is one.
    """
    with dist.shared_directory(target, cfg.distributed.timeout_s, replace=replace) as partial:
        return write_hf(models, spec, cfg, partial, like=like, dtype=dtype)


def write_hf(
    models: Sequence[nn.Module],
    spec: ModelSpec,
    cfg: Config,
    directory: Path,
    *,
    like: str | Path,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 << 30,
) -> dict[str, Any]:
    """Write into an empty directory, which the caller publishes. Collective over all ranks.

    Returns its bytes, shards and the seconds of transport of the slowest rank. `like`: the directory with
    configuration and tokenizer. Raises HfCheckpointError when what was written is not the tensors of `spec`.
    """
    world = dist.world_size()
    rank = dist.rank()
    # No more writers than shards: a small model is one file.
    size = sum(math.prod(shape) for shape in hf_shapes(spec).values()) * dtype.itemsize
    writers = max(1, min(world, -(-size // max_shard_bytes)))
    files = files_side(spec, world, writers)
    resharder = Resharder.between(
        mcore_side(spec, grid_of(cfg), world),
        files,
        source_dtype=next(models[0].parameters()).dtype,
        target_dtype=dtype,
        bucket_bytes=cfg.reshard.bucket_mb << 20,
        timeout_s=cfg.distributed.timeout_s,
    )
    shards = ShardTarget(files.of(rank)[0], directory, rank, dtype, max_shard_bytes)
    stats = resharder([local_params(model) for model in models], shards)
    written = [shard for of_rank in dist.gather_objects(shards.shards) for shard in of_rank]
    if dist.is_main():
        _complete(directory, written, spec, Path(like), dtype, cfg.data.chat_template)
        # Key set and shapes, as the next reader will see them.
        HfReader(directory, spec).close()
    dist.barrier(f"completing {directory}", cfg.distributed.timeout_s)
    return {
        "bytes": sum(size for _, _, size in written),
        "shards": len(written),
        "transport_seconds": round(dist.max_over_ranks({"s": stats.seconds})["s"], 3),
    }


def _complete(
    partial: Path, written: list[Any], spec: ModelSpec, like: Path, dtype: torch.dtype, chat_template: str | None
) -> None:
    """Final names, index, configuration and tokenizer. Raises HfCheckpointError unless each tensor was written once."""
    times = Counter(name for _, tensors, _ in written for name in tensors)
    problems = key_problems(set(hf_shapes(spec)), set(times))
    problems += [f"{name} was written {count} times" for name, count in times.items() if count > 1]
    if problems:
        raise HfCheckpointError(f"{partial}: " + "; ".join(problems))
    total = len(written)
    weight_map: dict[str, str] = {}
    for i, (file, tensors, _) in enumerate(written, 1):
        final = SINGLE if total == 1 else shard_name(i, total)
        (partial / file).rename(partial / final)
        weight_map |= dict.fromkeys(tensors, final)
    if total > 1:
        index = {"metadata": {"total_size": sum(size for _, _, size in written)}, "weight_map": weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_companions(like, partial, chat_template)
    set_config_dtype(partial / "config.json", dtype)
