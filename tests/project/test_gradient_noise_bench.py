"""What the bench of gradient noise takes for a gradient, and what it says a sample is worth."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from treepo_mega.actor.batch import advantages
from treepo_mega.config import load_config
from treepo_mega.tree.node import ROOT, Tree

BENCH = Path(__file__).parents[2] / "tools" / "bench" / "gradient_noise.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gradient_noise_bench", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measured(bench: ModuleType, gradients: torch.Tensor, tokens: float = 100.0):
    return bench.Measured("arm", gradients, len(gradients), tokens, 16.0, 1.0, 1.0)


def test_a_prompt_has_no_mass_even_where_whitening_shifts_advantages(bench):
    """A prompt's gradient is the same whatever is sampled: it would be all signal."""
    tree = Tree.start("p", [1, 2])
    for length in (2, 6):
        node = tree.add_child(ROOT)
        node.tokens, node.logprobs = [3] * length, [-1.0] * length
        tree.leaves.append(node.id)
    tree.rewards = [1.0, 0.0]
    cfg = load_config(None, ["model.hf_checkpoint=unused", "data.train=[{path: unused.jsonl}]"])
    (values,) = advantages([tree], cfg)
    assert abs(values.sum()) > 0.1, "the leaves differ in length, so whitening shifts"
    (mass,) = bench.mass_by_node([tree], [values], None, cfg)
    assert set(mass) == {1, 2} and [mass[1], mass[2]] == pytest.approx([values[0] / 8, values[1] / 8])


def test_noise_without_signal_is_worth_nothing_and_half_the_noise_is_worth_twice(bench):
    draw = torch.Generator().manual_seed(0)
    direction = torch.zeros(400)
    direction[0] = 3.0

    def noisy(scale: float, towards: torch.Tensor) -> torch.Tensor:
        return towards + scale * torch.randn(600, 400, generator=draw)

    own, apart = (measured(bench, noisy(1.0, direction)) for _ in range(2))
    assert bench.judge(own, own, own, apart)["worth"] == 1.0
    less = bench.judge(measured(bench, noisy(0.5**0.5, direction)), own, own, apart)
    assert less["samples"] == pytest.approx(409 / 209, rel=0.1) and less["cosine"] == pytest.approx(1, abs=0.05)
    cheap = bench.judge(measured(bench, noisy(1.0, direction), tokens=50.0), own, own, apart)
    assert cheap["tokens_ratio"] == 0.5 and cheap["worth"] == pytest.approx(2, rel=0.1)
    assert bench.judge(measured(bench, noisy(1.0, 0 * direction)), own, own, apart)["samples"] < 0.02


def test_where_the_reference_has_no_signal_nothing_is_said_of_worth(bench):
    draw = torch.Generator().manual_seed(1)
    own, apart = (measured(bench, torch.randn(32, 400, generator=draw)) for _ in range(2))
    apart.gradients -= own.gradients.mean(0) * 100
    row = bench.judge(measured(bench, own.gradients * 2.0), own, own, apart)
    assert (row["samples"], row["worth"], row["worth_error"]) == (None, None, None)
    assert row["noise_ratio"] == 4.0 and row["tokens_ratio"] == 1.0


def test_shared_tokens_are_differentiated_once(bench):
    """The gradient of a tree is that of its paths one by one, each token's mass split over the paths through it."""
    policy = bench.Policy(str(BENCH.parents[2] / "examples" / "tiny_searcher"))
    tree = Tree.start("p", [1, 7, 9])
    up = tree.add_child(ROOT)
    up.tokens = [11, 12]
    for tokens in ([13], [14, 15]):
        node = tree.add_child(up.id)
        node.tokens = tokens
        tree.leaves.append(node.id)
    whole = policy.gradient(tree, {1: 0.5, 2: 1.0, 3: -2.0})
    first = policy.gradient(tree.only([0]), {1: 0.2, 2: 1.0})
    second = policy.gradient(tree.only([1]), {1: 0.3, 3: -2.0})
    assert torch.allclose(whole, first + second, atol=1e-5)
    assert np.isfinite(whole).all() and float(whole.abs().sum()) > 0
