"""What a checkpoint keeps of the rollout, beside weights: the order of prompts, and trees that train later."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.rollout.fakes import fake_collector, fake_config, said, state_of
from treepo_mega.rollout.collect import Collector
from treepo_mega.saves import Saves


def test_a_resumed_run_has_the_trees_that_were_left_over(monkeypatch: pytest.MonkeyPatch, tmp_path):
    cfg = fake_config(n_samples_per_prompt=4, oversample=3.0, surplus="carry")
    cfg = cfg.replace({key: str(tmp_path) for key in ("checkpoint.load", "checkpoint.save", "logging.run_dir")})
    written: dict[str, Any] = {}

    def save_training(directory, models, optimizer, scheduler, state, timeout_s, of_main) -> None:
        written.update(json.loads(json.dumps(state | of_main)))

    def saves(collector: Collector) -> Saves:
        actor = SimpleNamespace(models=[], optimizer=None, scheduler=None, skipped_in_a_row=0, weights_changed=list)
        return Saves(cfg, MagicMock(), actor, collector.cursor, collector)  # type: ignore[arg-type]

    monkeypatch.setattr("treepo_mega.saves.checkpoint.save_training", save_training)
    monkeypatch.setattr("treepo_mega.saves.checkpoint.load_training", lambda *_, **__: written)
    monkeypatch.setattr("treepo_mega.saves.checkpoint.prune", lambda *_: None)
    monkeypatch.setattr("treepo_mega.saves.checkpoint.set_aside_others", lambda *_: None)
    first = fake_collector(cfg, 0, 0.5)
    first.collect(0)
    assert first.surplus, "else there is nothing to keep"
    saves(first).write(1)
    resumed = fake_collector(cfg, 1, 0.5)
    assert saves(resumed).resume() == 1
    assert state_of(resumed) == state_of(first)
    assert said([resumed.collect(1)]) == said([first.collect(1)])
