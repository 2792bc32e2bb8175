"""The guard of the FP8 head: what it samples, when it falls back, when it returns."""

from __future__ import annotations

import pytest
import torch

from tests.loss.test_fp8_head import VOCAB, operands
from treepo_mega.config import DebugConfig, LossConfig
from treepo_mega.loss.guard import HeadGuard
from treepo_mega.loss.operands import Numerics
from treepo_mega.loss.shard import Shard


def guard(exact_target: bool = True, **loss: object) -> HeadGuard:
    return HeadGuard(
        LossConfig(**{"precision": "fp8", "logprob_precision": "fp8", **loss}), DebugConfig(exact_target=exact_target)
    )


def test_precisions_of_update_and_logprobs_are_apart():
    g = guard(logprob_precision="bf16", fp8_recipe="blockwise", exact_target=False, fp8_grads=True, fp8_loud_channels=8)
    update, logprobs = g.numerics(for_update=True), g.numerics(for_update=False)
    assert (update.precision, update.recipe, update.exact_target) == ("fp8", "blockwise", False)
    assert (update.grads, update.loud_channels, logprobs.precision) == ("fp8", 8, "bf16")


def test_a_fallen_guard_turns_fp8_into_bf16_and_nothing_else():
    g = guard()
    assert g.decide(0.05) and g.fallen
    assert g.numerics(for_update=True).precision == g.numerics(for_update=False).precision == "bf16"
    mixed = guard(logprob_precision="fp32")
    mixed.decide(0.05)
    assert mixed.numerics(for_update=False).precision == "fp32"


def test_it_falls_once_stays_while_the_sample_is_far_and_returns():
    g = guard()
    assert [g.decide(mean) for mean in (0.029, 0.031, 0.5, float("nan"), 0.01, 0.031)] == [
        False, True, False, False, False, True,
    ]  # fmt: skip
    assert g.fallen


@pytest.mark.parametrize("rows, sampled", [(150, 64), (40, 40), (0, 0)])
def test_the_sample_is_spread_over_the_rows_and_bounded(rows, sampled):
    hidden, weight, target = operands()
    g = guard(guard={"sample_rows": 64})
    shard = Shard.of(weight, 0, VOCAB)
    g.watch(hidden[:rows], weight, target[:rows], shard)
    drift = g.take_drift()
    assert drift.rows == sampled
    if sampled:
        assert 0 < drift.total / drift.rows < drift.largest < 0.5
    assert g.take_drift().rows == 0, "taken is taken"


def test_loud_channels_and_exact_targets_show_in_what_it_measures():
    hidden, weight, target = operands()
    loud = hidden.detach().clone()
    loud[:, :6] *= 10
    shard = Shard.of(weight, 0, VOCAB)
    means = []
    for head in ({}, {"fp8_loud_channels": 0}, {"fp8_loud_channels": 0, "exact_target": False}):
        g = guard(**head)
        g.watch(loud, weight, target, shard)
        drift = g.take_drift()
        means.append(drift.total / drift.rows)
    assert means[0] < means[1] < means[2], means


@pytest.mark.parametrize(
    "head", [{"guard": {"sample_rows": 0}}, {"precision": "bf16", "logprob_precision": "bf16"}], ids=["off", "no fp8"]
)
def test_nothing_is_computed_when_there_is_nothing_to_watch(head):
    g = guard(**head)
    assert not g.watches
    g.watch(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2).long(), Shard(0, 4, 4))
    assert g.take_drift().rows == 0


def test_flipped_gates_are_counted_on_the_rows_that_were_watched():
    """One row's gate is closed by hand in either precision; the others agree."""
    hidden, weight, target = operands()
    g = guard(guard={"sample_rows": 10})
    shard = Shard.of(weight, 0, VOCAB, numerics=Numerics("fp8"))
    seen = []

    def closed(logp, old, rows):
        seen.append((old is None, rows.tolist(), float((logp - (logp if old is None else old)).abs().max())))
        gates = torch.zeros(len(rows), dtype=torch.bool)
        gates[0 if old is None else 1] = True
        return gates

    g.count_flips(None, hidden, weight, target, shard, closed)
    assert not seen, "never watched, nothing to compare with"
    sample = g.watch(hidden, weight, target, shard)
    g.count_flips(sample, hidden, weight, target, shard, closed)
    drift = g.take_drift()
    assert (drift.flips, drift.gates) == (2, 10)
    assert [s[0] for s in seen] == [True, False] and seen[0][1] == seen[1][1]
    assert seen[1][2] == 0, "bf16 logprobs of the same weights are the old ones"
    g.count_flips(sample, hidden, weight, target, Shard.of(weight, 0, VOCAB, numerics=Numerics("bf16")), closed)
    assert g.take_drift().gates == 0, "a step that fell back has no FP8 gates"
