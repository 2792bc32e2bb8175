"""Sampling configurations for tests, written as keyword arguments: `segment__length=4` is segment.length 4."""

from __future__ import annotations

from treepo_mega.config import RolloutConfig


def rollout_config(base: RolloutConfig | None = None, **changes: object) -> RolloutConfig:
    """`base` (None: the defaults) with other values; `debug__schedule` and its like change the section debug."""
    return (base or RolloutConfig()).replace({key.replace("__", "."): value for key, value in changes.items()})
