"""Passes over a step's plans, with an actor that writes down what it is asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from treepo_mega.actor.losses import ROWS, SupervisedLoss
from treepo_mega.actor.passes import optimizer_steps
from treepo_mega.config import parse_config
from treepo_mega.tree.pack import StepPlan

NAMES = ("loss", "pg_loss", "kl_loss", "entropy", "pg_clipfrac", "ppo_kl", "tis_weight")


class Recorder:
    """Its n-th update has every mean at n and the ratio's distance at n / 10; the third is skipped."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.costs = SimpleNamespace(metrics=dict)

    def update(self, packs, loss):
        self.trained.append(packs[0].name)
        number = float(len(self.trained))
        numbers = dict.fromkeys(NAMES, number) | {"max_ratio_diff": (number - 1) / 10}
        numbers |= {ROWS: 2.0, "mismatch": number, "max_mismatch": number}
        return numbers | {
            "skipped_steps": float(number == 3),
            "ranks_split": 0.0,
            "grad-norm": number,
            "learning-rate": number / 100,
        }

    def head_metrics(self):
        return {}

    def routing(self, plans):
        return {}


def test_epochs_repeat_the_mini_batches_in_order_and_count_every_step():
    actor = Recorder()
    plans = [StepPlan([SimpleNamespace(name=name)]) for name in ("first", "second")]
    got = optimizer_steps(actor, plans, SupervisedLoss(), epochs=3)
    assert actor.trained == ["first", "second"] * 3
    assert got["train/loss"] == got["train/entropy"] == (1 + 2 + 3 + 4 + 5 + 6) / 6, "a mean over all steps"
    assert got["train/ratio_max_diff"] == 0.5 and got["train/skipped_steps"] == 1
    assert (got["grad-norm"], got["learning-rate"]) == (6, 0.06), "of the last step"
    assert optimizer_steps(Recorder(), plans, SupervisedLoss())["train/loss"] == 1.5, "one epoch by default"


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_schedule_of_lr_spans_all_epochs(epochs):
    base = {"model": {"hf_checkpoint": "m"}, "data": {"train": [{"path": "t.jsonl"}]}}
    cfg = parse_config(base | {"train": {"num_rollouts": 5, "num_steps_per_rollout": 2, "ppo_epochs": epochs}})
    assert cfg.train.lr_decay_iters == 10 * epochs
    once = parse_config(base | {"train": {"num_steps_per_rollout": 2}})
    assert cfg.train.global_batch_size == once.train.global_batch_size, "a batch has its size, however often it is used"
