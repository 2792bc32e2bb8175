"""Disk space for a run's checkpoints, before any exists. Pure: config.json's shapes, the configuration, and the disk.

    check_space(cfg, spec)        # problems of file systems that cannot hold what the run will write
    describe_space(cfg, spec)     # the same figures as one line for people

A training checkpoint holds the weights in `model.params_dtype` and, for the optimizer, fp32 weights and AdamW's two
moments: 14 bytes a parameter in bf16, 16 in fp32. Where fp32 weights are not split over data-parallel ranks, they are
not stored twice: 12. Names and padding come on top; on a model of 0.2 M parameters they were 14 %, on large ones
they do not count.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from treepo_mega.config import Config
from treepo_mega.config.run import CheckpointConfig
from treepo_mega.config.surroundings import nearest_existing
from treepo_mega.modelspec.mcore_layout import ModelSpec, hf_shapes, padded_vocab

WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
MOMENT_BYTES = 8
MASTER_BYTES = 4
NOTHING: Mapping[Path, int] = MappingProxyType({})


def checkpoint_bytes(cfg: Config, spec: ModelSpec) -> int:
    """Bytes of the tensors of one training checkpoint."""
    p = cfg.parallel
    rows = padded_vocab(spec, cfg.model.make_vocab_size_divisible_by, p.tensor_model_parallel_size) - spec.vocab_size
    padding = rows * spec.hidden_size * (1 if spec.tie_word_embeddings else 2)
    weights = WEIGHT_BYTES[cfg.model.params_dtype]
    master = MASTER_BYTES if p.use_distributed_optimizer or weights < MASTER_BYTES else 0
    return (_parameters(spec) + padding) * (weights + master + MOMENT_BYTES)


def planned_bytes(cfg: Config, spec: ModelSpec) -> dict[Path, int]:
    """Directory -> bytes that the run will still add there at most, at any time.

    `keep_last` checkpoints stay, those of `keep_every` beside them, and the next is written before the oldest goes.
    Those that are there already are replaced, unless the run begins anew and sets them aside.
    """
    out: dict[Path, int] = {}
    settings = cfg.checkpoint
    if settings.enabled and settings.save:
        saves = math.ceil(cfg.train.num_rollouts / settings.save_interval)
        there = list(Path(settings.save).glob("step_" + "[0-9]" * 6)) if settings.seeks else []
        for_good = _for_good(settings, cfg.train.num_rollouts)
        kept = min(settings.keep_last + len(for_good), len(there))
        copies = max(1, min(saves, settings.keep_last + 1 + len(for_good) - kept))
        out[Path(settings.save)] = copies * checkpoint_bytes(cfg, spec)
    if settings.save_hf:
        out[Path(cfg.logging.run_dir) / "hf"] = _parameters(spec) * WEIGHT_BYTES[cfg.model.params_dtype]
    return out


def _for_good(settings: CheckpointConfig, steps: int) -> list[int]:
    """Steps before the newest `keep_last` whose checkpoints stay for good."""
    if settings.keep_every is None:
        return []
    saved = [*range(settings.save_interval, steps, settings.save_interval), steps]
    return [step for step in saved[: -settings.keep_last] if step % settings.keep_every == 0]


def check_space(cfg: Config, spec: ModelSpec, beside: Mapping[Path, int] = NOTHING) -> list[str]:
    """A sentence for each file system that has less room than the run needs there.

    `beside`: directory -> bytes of what is no checkpoint (`plan/disk.py`).
    """
    needs: dict[int, dict[Path, int]] = {}
    for directory, size in {**planned_bytes(cfg, spec), **beside}.items():
        # By device, not by directory: two directories on one disk share its room.
        needs.setdefault(nearest_existing(directory).stat().st_dev, {})[directory] = size
    bad = []
    for on_disk in needs.values():
        free = shutil.disk_usage(nearest_existing(next(iter(on_disk)))).free
        if sum(on_disk.values()) > free:
            what = " and ".join(f"{in_units(size)} in {directory}" for directory, size in on_disk.items())
            bad.append(
                f"the run needs {what}; {in_units(free)} are free there: a checkpoint has "
                f"{in_units(checkpoint_bytes(cfg, spec))}, and checkpoint.keep_last + 1 of them stand together; set "
                "checkpoint.save and logging.run_dir to a larger disk, or lower checkpoint.keep_last"
                f"{' or checkpoint.save_interval' if beside else ''}"
            )
    return bad


def describe_space(cfg: Config, spec: ModelSpec, beside: Mapping[Path, int] = NOTHING) -> list[str]:
    """One line a directory: what the run will write there and what is free; empty where it saves nothing."""
    lines = []
    for directory, size in {**planned_bytes(cfg, spec), **beside}.items():
        free = shutil.disk_usage(nearest_existing(directory)).free
        lines.append(f"disk: up to {in_units(size)} in {directory}, {in_units(free)} free")
    return lines


def in_units(size: float) -> str:
    """Bytes for people.

    >>> in_units(3 * 2**30)
    '3.0 GiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _parameters(spec: ModelSpec) -> int:
    return sum(math.prod(shape) for shape in hf_shapes(spec).values())
