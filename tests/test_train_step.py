"""A step of the loop with parts that write down what they are asked for: what happens when nothing is left to learn."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

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
