"""Which tests stay together when two processes share a lane (pytest-xdist), and which begin first.

A group runs in one process, in the order of its files. Tests of a file that no group names are a group of their own,
because fixtures of a module are measured or built once. Groups are handed out in the order of GROUPS, longest first:
what is long and begins last leaves the other core idle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
GROUPS: dict[str, tuple[str, ...]] = {
    # Whole runs.
    "runs": ("e2e", "rollout/test_lost_rank.py", "test_evaluate.py", "gpu/test_device.py"),
    # Ranks that compare layouts: the longest worlds.
    "layouts": ("actor/test_trees.py", "actor/test_layers.py"),
    # Other engines inside ranks.
    "refits": (
        *("sync/test_refit.py", "sync/test_expert_parallel.py", "rollout/test_ranks.py"),
        *("engine/test_moe_engine.py", "actor/test_routing.py"),
    ),
    # Engines in the test process. One after the other: each keeps its cache until the process ends.
    "engine": (
        *("rollout/test_generator.py", "rollout/test_eval.py"),
        *("engine/test_engine.py", "engine/test_branch_cache.py"),
    ),
    # All other ranks.
    "ranks": (
        *(
            "checkpoint/test_mcore.py",
            "checkpoint/test_megatron_lm.py",
            "checkpoint/test_versions.py",
            "checkpoint/test_load.py",
            "convert",
            "loss/test_head.py",
        ),
        *("loss/test_training.py", "reshard/test_execute.py", "runtime/test_dist.py", "test_tiny_model.py"),
        *("test_world.py", "actor/test_fetch.py", "actor/test_dump.py", "rollout/test_refill.py"),
    ),
    # Thousands of sampled trees in the slow lane.
    "samples": ("tree/test_distribution.py",),
    # Compiles every kernel in the slow lane.
    "kernels": ("loss/test_triton.py",),
    # Mostly waiting: deadlines of graders that hang, jobs that are signalled.
    "waiting": ("data/test_reward_pool.py", "slurm"),
    # Fresh interpreters that import torch and Megatron.
    "interpreters": ("runtime/test_cpu_megatron.py", "examples"),
}


def group_of(path: Path) -> str:
    """The group of the test file at `path`: one of GROUPS, or its own."""
    if not path.is_relative_to(TESTS):
        return path.as_posix()
    relative = path.relative_to(TESTS)
    names = {relative.as_posix(), *(folder.as_posix() for folder in relative.parents)}
    for group, members in GROUPS.items():
        if names.intersection(members):
            return group
    return relative.as_posix()


def need_engines(items: list[pytest.Item]) -> bool:
    """Whether ranks of these tests build engines, so that their fork server had better import vLLM."""
    return any(group_of(item.path) in ("runs", "refits") for item in items)


def sort_by_group(items: list[pytest.Item]) -> None:
    """Bring tests into the order of their groups, those without a group last; the order inside a group stays."""
    order = {group: position for position, group in enumerate(GROUPS)}
    items.sort(key=lambda item: order.get(group_of(item.path), len(order)))


def make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What hands out whole groups, for xdist's `pytest_xdist_make_scheduler`.

    xdist 3.8 writes its own marks of groups into a private attribute that pytest 9.2 does not read: with
    `--dist loadgroup` every test would be a group of its own, without a word.
    """
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(config.rootpath / nodeid.split("::")[0])

    return GroupScheduling(config, log)
