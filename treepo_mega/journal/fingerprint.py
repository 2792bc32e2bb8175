"""What the trees of a step depend on, as one digest: records of another configuration are not taken for this run's.

The set of a step's trees is a function of the seed, the step, the weights and the prompts. Weights follow from all that
training does, so every key counts but those of LEFT_OUT: layouts, deadlines, and what only looks on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from treepo_mega.config import Config

LEFT_OUT = (
    *("parallel", "checkpoint", "eval", "logging", "distributed", "reshard", "data.eval"),
    *("rollout.engine", "rollout.timeout_s", "rollout.durable"),
    *("reward.num_workers", "reward.timeout_s", "reward.startup_timeout_s", "reward.in_flight", "reward.memory_mb"),
    "debug.fault",
)
"""Sections and keys that may differ between the run that was killed and the one that goes on."""
SUFFIXES = (".safetensors", ".json", ".distcp", ".txt")
"""Of files that hold weights, or say which ones."""


def fingerprint(cfg: Config, sources: Mapping[str, str], origin: str) -> str:
    """The digest of a run's configuration, 16 hexadecimal digits.

    `sources`: of the functions that it names, digests by key. `origin`: where its first weights come from, beside
    `model.hf_checkpoint`.
    """
    values = cfg.model_dump(mode="json", by_alias=True)
    for key in LEFT_OUT:
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        # Not `pop`: a key that was renamed would silently count.
        del section[name]
    said = {"keys": values, "sources": dict(sources), "origin": origin, "weights": _files(cfg.model.hf_checkpoint)}
    if cfg.model.load is not None:
        # Another run may write there, and the newest of its iterations is what a start takes.
        said["load"] = _files(cfg.model.load)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _files(directory: str) -> list[list[str | int]]:
    """Names, sizes and times of the files that the first weights come from; reading them all would take minutes."""
    return sorted(
        [path.name, path.stat().st_size, path.stat().st_mtime_ns]
        for path in Path(directory).glob("*")
        if path.suffix in SUFFIXES and path.is_file()
    )
