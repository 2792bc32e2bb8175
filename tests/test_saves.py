"""What a checkpoint keeps of the rollout, beside weights: the order of prompts, and trees that train later."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.rollout.fakes import fake_collector, fake_config, said, state_of
from treepo_mega.checkpoint.directories import prune, step_directories
from treepo_mega.checkpoint.mcore import MANIFEST, CheckpointError
from treepo_mega.rollout.collect import Collector
from treepo_mega.saves import Saves, checkpoint_to_resume


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
    monkeypatch.setattr("treepo_mega.saves.directories.prune", lambda *_: None)
    monkeypatch.setattr("treepo_mega.saves.directories.set_aside_others", lambda *_: None)
    first = fake_collector(cfg, 0, 0.5)
    first.collect(0)
    assert first.surplus, "else there is nothing to keep"
    saves(first).write(1)
    resumed = fake_collector(cfg, 1, 0.5)
    assert saves(resumed).resume() == 1
    assert state_of(resumed) == state_of(first)
    assert said([resumed.collect(1)]) == said([first.collect(1)])


def empty_checkpoints(where: Path, *steps: int) -> None:
    """Directories that are whole as far as names and sizes say."""
    for step in steps:
        directory = where / f"step_{step:06d}"
        directory.mkdir(parents=True)
        (directory / MANIFEST).write_text(json.dumps({"files": {}}))


@pytest.mark.parametrize("load", ["auto", "latest", "its directory"])
def test_the_newest_complete_checkpoint_is_gone_on_with(load: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saves = tmp_path / "checkpoints"
    cfg = fake_config().replace({"checkpoint.save": str(saves)})
    cfg = cfg.replace({"checkpoint.load": str(saves) if load == "its directory" else load})
    if load == "auto":
        assert checkpoint_to_resume(cfg) is None
    if load == "latest":
        with pytest.raises(CheckpointError, match=f"{saves} holds no complete checkpoint"):
            checkpoint_to_resume(cfg)
    empty_checkpoints(saves, 10, 20, 30)
    (saves / "step_000030" / MANIFEST).unlink()
    assert checkpoint_to_resume(cfg) == saves / "step_000020"
    assert f"passing over {saves / 'step_000030'}: " in capsys.readouterr().out


def test_a_path_is_that_checkpoint_and_null_is_none(tmp_path: Path):
    empty_checkpoints(tmp_path, 10, 20)
    cfg = fake_config().replace({"checkpoint.save": str(tmp_path)})
    assert checkpoint_to_resume(cfg.replace({"checkpoint.load": str(tmp_path / "step_000010")})) == (
        tmp_path / "step_000010"
    )
    assert checkpoint_to_resume(cfg.replace({"checkpoint.load": None})) is None


@pytest.mark.parametrize("named", ["pretrain", "pretrain/iter_0000100"])
def test_a_checkpoint_of_megatron_lm_is_told_to_be_initial_weights(named: str, tmp_path: Path):
    (tmp_path / "pretrain/iter_0000100").mkdir(parents=True)
    cfg = fake_config().replace({"checkpoint.load": str(tmp_path / named), "checkpoint.save": str(tmp_path / "saves")})
    with pytest.raises(CheckpointError, match=f"Begin from its weights: model.load={tmp_path / named}, and leave"):
        checkpoint_to_resume(cfg)


def test_checkpoints_at_multiples_stay_for_good(tmp_path: Path):
    empty_checkpoints(tmp_path, 10, 20, 30, 40, 50)
    (tmp_path / ".step_000060.partial").mkdir()
    prune(tmp_path, 1, 20)
    assert [path.name for path in step_directories(tmp_path)] == ["step_000020", "step_000040", "step_000050"]
    prune(tmp_path, 2)
    assert [path.name for path in step_directories(tmp_path)] == ["step_000040", "step_000050"]
    assert len(list(tmp_path.iterdir())) == 2
