"""A rank that is stuck ends the run within the deadline, with a message that names it, its phase and its stack."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest

from tests.ranks import CLI
from tests.world import run_world

DEADLINE_S = 40


def run_stuck(run_dir: Path, ranks: int, *overrides: str) -> str:
    """The output of a run that does not end well; nothing of it is left."""
    code, output, _ = run_world(
        ranks,
        [
            *(str(CLI), "train", "examples/tiny_cpu.yaml", f"logging.run_dir={run_dir}"),
            *("rollout.rollout_batch_size=4", "rollout.n_samples_per_prompt=4", "train.num_steps_per_rollout=1"),
            *("data.train=[{path: 'examples/tiny_reasoner/train.jsonl@[0:64]'}]", "eval.at_start=false"),
            *("train.num_rollouts=4", "logging.tensorboard=false", "logging.status_interval_s=0.5"),
            *(f"rollout.timeout_s={DEADLINE_S}", f"distributed.timeout_s={DEADLINE_S}"),
            *("distributed.hang_timeout_s=60", "debug.fault.step=2", *overrides),
        ],
        240,
    )
    assert code == 2, output[-6000:]
    left = [p.pid for p in psutil.process_iter() if any(str(run_dir) in part for part in _command(p))]
    assert not left, "nothing of the run is left"
    return output


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "overrides", "waits_in", "stuck_in"),
    [
        ("stuck_in_engine", [], "rollout", "rollout"),
        # Megatron's own all-reduce, of which the trainer sees nothing.
        ("stuck_in_pack", ["parallel.tensor_model_parallel_size=2"], "update", "update"),
        ("stuck_in_grading", [], "reward", "reward"),
    ],
)
def test_who_waits_names_the_rank_that_is_stuck(tmp_path, kind, overrides, waits_in, stuck_in):
    output = run_stuck(tmp_path, 2, f"debug.fault.kind={kind}", "debug.fault.rank=1", *overrides)
    told = next(line for line in output.splitlines() if line.startswith("error (rank 0): in "))
    assert told.startswith(f"error (rank 0): in {waits_in} of step 2: ")
    assert re.search(rf"Others: rank 1 on \S+ in {stuck_in} of step 2, last progress \d\d s ago", told), told
    stacks = (tmp_path / "status" / "rank_1.stacks").read_text()
    assert "rank 0 asked for it" in stacks and "runtime/pulse.py" in stacks, "where it is stuck"
    assert "runtime/pulse.py" in output, "the log has the stack too"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_rank_alone_ends_itself(tmp_path):
    output = run_stuck(tmp_path, 1, "debug.fault.kind=stuck_in_engine")
    assert "is stuck: no progress for " in output
    assert "in rollout of step 2, last seen at: engine" in output
    assert "runtime/pulse.py" in (tmp_path / "status" / "rank_0.stacks").read_text()
