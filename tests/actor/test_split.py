"""Halves of packs hold what the packs held. That an update with them is the same one: test_trees.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.actor.oracle import trajectories
from treepo_mega.actor.split import ON_CPU, is_out_of_memory, split
from treepo_mega.tree.pack import Pack, Trajectory, own_part, plan_step

ROWS = ("target", "A_pos", "A_neg", "n", "count", "rollout_logprobs", "trajectory", "segment", "depth", "old_logprobs")


def packs_of(paths: list[Trajectory], max_tokens: int = 160) -> list[Pack]:
    packs = plan_step(paths, dp_size=1, dp_rank=0, max_tokens=max_tokens).packs
    for number, pack in enumerate(packs):
        pack.old_logprobs = number + np.arange(len(pack.target)) / 1000
    return packs


def test_halves_have_all_rows_and_see_the_same():
    packs = packs_of(trajectories())
    halves = split(packs, multiple=8)
    assert halves is not None and len(halves) == 2 * len(packs)
    assert all(len(half.tokens) % 8 == 0 for half in halves)
    for number, pack in enumerate(packs):
        pair = halves[2 * number : 2 * number + 2]
        for name in ROWS:
            assert np.concatenate([getattr(half, name) for half in pair]).tolist() == getattr(pack, name).tolist()
        own = [half.tokens[a:b].tolist() for half in pair for a, b in half.blocks]
        assert own == [pack.tokens[a:b].tolist() for a, b in pack.blocks]
        sizes = [half.blocks[-1][1] for half in pair]
        longest_tree = max(b - a for a, b in pack.blocks)
        assert abs(sizes[0] - sizes[1]) <= longest_tree, "as even as trees allow"
    for half in halves:
        end = half.blocks[-1][1]
        assert (half.subtree_end[:end] <= end).all(), "nothing sees beyond its trees"
        assert half.subtree_end[end:].tolist() == list(range(end + 1, len(half.tokens) + 1))
        # A flat row is predicted by its neighbour.
        assert half.tokens[half.predictor + 1].tolist() == half.target.tolist()


def test_single_trees_cannot_be_split():
    assert split(packs_of(trajectories()[:3], max_tokens=60), 1) is None


def test_a_shared_pack_is_not_split_by_one_rank():
    (pack,) = plan_step(trajectories()[:2], dp_size=1, dp_rank=0, max_tokens=160, multiple=8).packs
    with pytest.raises(ValueError, match="several ranks share"):
        split([own_part(pack, 2, 0)], 8)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (
            RuntimeError(f"[enforce fail at alloc_cpu.cpp:118] {ON_CPU}: you tried to allocate 8000000000000 bytes"),
            True,
        ),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_host_says_so_itself():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
