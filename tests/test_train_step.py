"""The loop with parts that write down what they are asked for: nothing left to learn, what is logged, how it ends."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from treepo_mega import train
from treepo_mega.config import load_config
from treepo_mega.monitor.live import look
from treepo_mega.monitor.metrics import read_metrics
from treepo_mega.monitor.progress import Progress
from treepo_mega.monitor.ranks import Ranks
from treepo_mega.monitor.registry import check_known
from treepo_mega.monitor.startup import Startup
from treepo_mega.monitor.status import Status
from treepo_mega.monitor.timers import Timers
from treepo_mega.records import Records
from treepo_mega.runtime import device, dist
from treepo_mega.train import one_step


def test_a_step_whose_trajectories_are_all_rejected_says_so_and_gives_the_memory_back():
    trainer = MagicMock()
    trainer.collect.return_value = SimpleNamespace(metrics={"tree/leaves": 8.0}, trees=[])
    trainer.plan.return_value = (["a plan"], {})
    trainer.old_logprobs.return_value = {"rollout/logprob_abs_diff_mean": 3.0}
    trainer.correct.return_value = ([], {"rollout/leaves_rejected": 8.0})
    trainer.memory.to_engine.return_value = {"reshard/bytes": 0.0}
    metrics = one_step(trainer, 3)
    assert metrics["rollout/leaves_rejected"] == 8 and metrics["rollout/logprob_abs_diff_mean"] == 3
    trainer.correct.assert_called_once_with(["a plan"])
    trainer.update.assert_not_called()
    assert trainer.mock_calls[-1] == ("memory.to_engine", (), {}), "the engine is awake at the end, as after any step"
    (line,) = trainer.progress.say.call_args.args
    assert line.startswith("step 3: all 8 trajectories were rejected") and "algo.rollout_rs" in line


def watched_trainer(directory: Path, steps: int) -> MagicMock:
    """A trainer whose work is nothing, with the real parts that look at it."""
    cfg = load_config(
        None,
        [
            *("model.hf_checkpoint=m", "data.train=[{path: t.jsonl}]", f"train.num_rollouts={steps}"),
            *(f"logging.run_dir={directory}", "logging.tensorboard=false", "logging.price_per_gpu_hour=2"),
            *("logging.status_interval_s=60", "checkpoint.save_interval=99"),
        ],
    )
    trainer = MagicMock(cfg=cfg, step=0)
    trainer.timers = Timers(waits=dist.seconds_waited, memory=device.PeakMemory())
    trainer.ranks = Ranks(trainer.timers, trainer.progress.say)
    trainer.startup = Startup()
    trainer.status = Status(directory, rank=0, world=1, interval_s=60)
    trainer.timers.watchers = [trainer.status.phase]
    trainer.records = Records(cfg, Progress(enabled=False), started=time.time() - 3600, resume_step=0)
    trainer.collect.side_effect = lambda step: SimpleNamespace(metrics={"tree/unique_tokens": 8.0}, trees=[])
    trainer.plan.return_value = (["a plan"], {})
    trainer.correct.return_value = (["a plan"], {})
    for verb in (
        trainer.old_logprobs,
        trainer.charge_kl,
        trainer.update,
        trainer.memory.to_engine,
        trainer.workload.pop,
    ):
        verb.return_value = {}
    trainer.telemetry.pop.return_value = {}
    trainer.stop.agreed.return_value = False

    def close(how):
        trainer.status.close(how)
        trainer.records.close()

    trainer.close.side_effect = close
    return trainer


def test_a_run_writes_what_its_ranks_did_and_how_it_ended(tmp_path, monkeypatch):
    trainer = watched_trainer(tmp_path, 2)
    monkeypatch.setattr(train, "Trainer", lambda cfg: trainer)
    assert train.train(trainer.cfg) == 0
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["startup_s/refit"] >= 0 and first["startup_s/total"] > 0
    assert not [name for name in second if name.startswith("startup_s/")], "of the start alone"
    for row in (first, second):
        assert {f"ranks/{phase}_busy_s_max" for phase in ("update", "old_logprobs", "step")} <= row.keys()
        assert row["memory/update_peak_gib"] > 0 and 0 <= row["ranks/idle_share"] <= 1
        assert 1 <= row["perf/gpu_hours"] < 1.1 and row["perf/cost"] == 2 * row["perf/gpu_hours"]
        for name in row.keys() - {"step", "time"}:
            check_known(name)
    assert look(tmp_path, time.time()).verdict.startswith("finished")


def test_a_run_that_fails_says_so_before_it_goes(tmp_path, monkeypatch):
    trainer = watched_trainer(tmp_path, 2)
    trainer.update.side_effect = RuntimeError("no memory")
    monkeypatch.setattr(train, "Trainer", lambda cfg: trainer)
    with pytest.raises(RuntimeError, match="no memory"):
        train.train(trainer.cfg)
    assert look(tmp_path, time.time()).verdict.startswith("dead: rank 0 on ")
    assert "failed with RuntimeError" in look(tmp_path, time.time()).verdict


def test_gpu_hours_go_on_after_a_resume(tmp_path, monkeypatch):
    trainer = watched_trainer(tmp_path, 1)
    monkeypatch.setattr(train, "Trainer", lambda cfg: trainer)
    train.train(trainer.cfg)
    again = Records(trainer.cfg, Progress(enabled=False), started=time.time() - 1800, resume_step=1)
    again.log(2, {"train/loss": 1.0})
    again.close()
    before, after = read_metrics(tmp_path / "metrics.jsonl")
    assert after["perf/gpu_hours"] == pytest.approx(before["perf/gpu_hours"] + 0.5, abs=0.05)
