"""Forests of which a rank holds parts: what another rank has of a tree, and plans that must not differ."""

from __future__ import annotations

import dataclasses

import numpy as np

from treepo_mega.runtime.packed import pack, unpack
from treepo_mega.tree.columns import from_columns, to_columns
from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import StepPlan


def sent(trees: list[Tree]) -> list[Tree]:
    """What another rank has of `trees`."""
    return from_columns(unpack(pack(to_columns(trees))), [tree.prompt_id for tree in trees])


def assert_equal(got: StepPlan, want: StepPlan) -> None:
    assert len(got.packs) == len(want.packs)
    for mine, other in zip(got.packs, want.packs, strict=True):
        for spec in dataclasses.fields(mine):
            left, right = getattr(mine, spec.name), getattr(other, spec.name)
            assert np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right, spec.name
