"""The field's figures of engine against trainer: by hand, by the plain formulas, and on a tree as on its paths."""

from __future__ import annotations

import math

import pytest
import torch

from treepo_mega.loss.mismatch import DEPTHS, MEANS, mismatch_metrics, mismatch_sums, share_names
from treepo_mega.monitor.registry import check_known


def metrics(actor: list[float], engine: list[float], count: list[float], depth: list[int], dtype=torch.float64):
    rows = [torch.tensor(values, dtype=dtype) for values in (actor, engine, count)]
    sums = mismatch_sums(*rows, torch.tensor(depth, dtype=torch.int64))
    return mismatch_metrics({name: float(total) for name, total in sums.items()})


def test_two_tokens_by_hand():
    """Ratios actor / engine of 2 and 1/2: |d| = ln 2 both times."""
    half, quarter = math.log(0.5), math.log(0.25)
    found = metrics([half, quarter], [quarter, half], [1, 1], [1, 1])
    assert found["train/token_mult_prob_error"] == pytest.approx(2)
    # (2 - ln 2 - 1) and (1/2 + ln 2 - 1): their mean is 1/4, from either side.
    assert found["train/gen_kl_error"] == pytest.approx(0.25)
    assert found["train/policy_kl_error"] == pytest.approx(0.25)
    assert found["train/sampling_importance_ratio"] == pytest.approx(1.25)
    assert found["train/is_eff_sample_size"] == pytest.approx(2.5**2 / (2 * 4.25))
    # The mixture is 3/8 for both: the actor is 4/3 of it at one token, 2/3 at the other, and the engine the reverse.
    by_hand = ((4 / 3 - math.log(4 / 3) - 1) + (2 / 3 - math.log(2 / 3) - 1)) / 2
    assert found["train/js_divergence_error"] == pytest.approx(by_hand)
    assert found["train/gen_kl_error_depth_1"] == found["train/gen_kl_error"]
    for name in found:
        check_known(name)


def test_as_the_sources_write_it():
    generator = torch.Generator().manual_seed(3)
    actor, engine = (-3 * torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(2))
    found = metrics(actor.tolist(), engine.tolist(), [1.0] * 50, [1] * 50)
    mixture = (0.5 * actor.exp() + 0.5 * engine.exp()).log()

    def kl(at: torch.Tensor, against: torch.Tensor) -> torch.Tensor:
        return (against - at).exp() - (against - at) - 1

    assert found["train/gen_kl_error"] == pytest.approx(float(kl(engine, actor).mean()))
    assert found["train/policy_kl_error"] == pytest.approx(float(kl(actor, engine).mean()))
    divergence = 0.5 * kl(mixture, actor) + 0.5 * kl(mixture, engine)
    assert found["train/js_divergence_error"] == pytest.approx(float(divergence.mean()))


def test_a_shared_token_counts_in_every_trajectory():
    tree = metrics([-1.0, -2.0, -1.5], [-1.2, -1.0, -1.6], [3, 1, 2], [1, 2, 5])
    paths = metrics([-1.0] * 3 + [-2.0] + [-1.5] * 2, [-1.2] * 3 + [-1.0] + [-1.6] * 2, [1] * 6, [1, 1, 1, 2, 5, 5])
    assert tree == pytest.approx(paths)
    assert "train/gen_kl_error_depth_8" not in tree, "no token is so deep"


def test_every_depth_has_its_range():
    for depth, least in ((1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (40, 8)):
        found = metrics([-1.0], [-1.5], [2], [depth])
        assert [name for name in DEPTHS if f"train/gen_kl_error_depth_{name}" in found] == [least]


def test_small_differences_keep_their_digits_in_fp32():
    apart = 2.0**-17
    found = metrics([-1.0] * 4, [-1.0 - apart] * 4, [1] * 4, [1] * 4, dtype=torch.float32)
    assert found["train/gen_kl_error"] == pytest.approx(apart**2 / 2, rel=0.02)
    assert found["train/js_divergence_error"] == pytest.approx(apart**2 / 8, rel=0.02)


def test_a_row_that_counts_nothing_may_hold_anything_and_no_mean_is_infinite():
    found = metrics([math.nan, -200.0], [-1.0, -1.0], [0, 1], [1, 1])
    assert all(math.isfinite(value) for value in found.values())
    assert found["train/token_mult_prob_error"] == pytest.approx(math.exp(20))


def test_nothing_compared_is_nothing_said():
    assert metrics([], [], [], []) == {}
    assert {name for name in metrics([-1.0], [-1.0], [1], [1]) if "depth" not in name} == {
        *(f"train/{name}" for name in MEANS),
        "train/is_eff_sample_size",
        *share_names(),
    }


def test_shares_by_distance_add_up():
    apart = [0.0005, 0.001, 0.005, 0.5, -0.5, 3.0]
    found = metrics([-1.0] * 6, [-1.0 - distance for distance in apart], [1, 1, 2, 1, 1, 4], [1] * 6)
    assert [found[name] * 10 for name in share_names()] == pytest.approx([2, 2, 0, 2, 4])
