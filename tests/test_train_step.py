"""A step of the loop with parts that write down what they are asked for: what happens when nothing is left to learn."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

from treepo_mega.train import one_step


class Parts:
    """A trainer whose trajectories are all rejected by `correct`."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.said: list[str] = []
        self.memory = SimpleNamespace(
            to_engine=lambda: self._noted("to engine", {"reshard/bytes": 0.0}),
            to_trainer=lambda: self._noted("to trainer"),
        )
        self.records = SimpleNamespace(save_trees=lambda step, trees: None)
        self.progress = SimpleNamespace(say=self.said.append)
        self.timers = lambda name: contextlib.nullcontext()

    def _noted(self, call: str, answer=None):
        self.calls.append(call)
        return answer

    def collect(self, step):
        return SimpleNamespace(metrics={"tree/leaves": 8.0}, trees=[])

    def plan(self, forest):
        return ["a plan"], {}

    def old_logprobs(self, plans):
        return self._noted("old logprobs", {"rollout/logprob_abs_diff_mean": 3.0})

    def correct(self, plans):
        return [], {"rollout/leaves_rejected": 8.0}

    def ref_logprobs(self, plans):
        self._noted("reference logprobs")

    def update(self, plans):
        return self._noted("update", {})


def test_a_step_whose_trajectories_are_all_rejected_says_so_and_gives_the_memory_back():
    parts = Parts()
    metrics = one_step(parts, 3)
    assert parts.calls == ["to engine", "to trainer", "old logprobs", "to engine"], "no update, and the engine is awake"
    assert metrics["rollout/leaves_rejected"] == 8 and metrics["rollout/logprob_abs_diff_mean"] == 3
    (line,) = parts.said
    assert line.startswith("step 3: all 8 trajectories were rejected") and "algo.rollout_rs" in line
