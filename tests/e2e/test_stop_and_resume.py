"""A run that is stopped, and later killed amid a rollout, equals one that was left alone: bit for bit.

Long trees are carried over from step to step, so that a checkpoint has unfinished ones to keep: trunks on their way,
and trees whose branches have started at uncertain steps of reasoning. Leaves are dealt to the prompts with signal.
What the killed steps had sampled is on disk, and is not sampled again. The kill comes while a checkpoint is written in
the background: it leaves no trace.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.ranks import CLI, finish, run_ranks, start_ranks
from treepo_mega.checkpoint.mcore import check_complete
from treepo_mega.config import load_config
from treepo_mega.journal import folder
from treepo_mega.journal.contents import to_tree
from treepo_mega.journal.file import framed, read_records
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.metrics import read_metrics
from treepo_mega.monitor.registry import depends_on_time
from treepo_mega.plan.disk import record_bytes

STEPS = 12


def command(run_dir: Path) -> list[str]:
    """Two ranks, tensor parallel, with a reference model, twice two optimizer steps a rollout, carried-over forks."""
    return [
        *("train", "examples/tiny_cpu.yaml", f"logging.run_dir={run_dir}"),
        *("parallel.tensor_model_parallel_size=2", "rollout.rollout_batch_size=8", "rollout.n_samples_per_prompt=8"),
        *(
            "rollout.partial_rollout=24",
            *("rollout.branching.at=fork", "rollout.branching.fork.draw=other", "rollout.branching.fork.waves=2"),
            *("rollout.segment.length=12", "rollout.segment.end=[';']", "rollout.branching.initial=[2,2]"),
            *("rollout.leaves=adaptive", "rollout.first_leaves=4", "rollout.surplus=drop"),
            "train.prefix_sharing=tree",
            "algo.kl_loss_coef=0.05",
            "train.ppo_epochs=2",
            f"train.num_rollouts={STEPS}",
            "eval.at_start=false",
            "eval.max_prompts=8",
        ),
    ]


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks that a torchrun started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True, timeout=30)
    return [int(x) for x in listed.stdout.split()]


def numbers(run_dir: Path) -> list[dict[str, float]]:
    """The run's metrics without those that depend on time."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not depends_on_time(k)} for row in rows]


def kill_amid_a_rollout(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """SIGKILL of launcher and ranks as soon as the rollout of `step` or of a later one has a finished tree on disk."""
    deadline = time.monotonic() + 200
    while not any(kept >= step and folder.files_of(run_dir, kept) for kept in folder.steps_kept(run_dir)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    launcher = psutil.Process(process.pid)
    for member in [launcher, *launcher.children(recursive=True)]:
        member.kill()
    finish(process, 60)


def records_of(run_dir: Path, step: int) -> tuple[float, int]:
    """(planned, real) bytes of the finished trees of a step."""
    cfg = load_config(str(run_dir / "config.yaml"), [])
    spec = ModelSpec.from_hf(cfg.model.hf_checkpoint)
    planned, real = 0.0, 0
    for record in (each for path in folder.files_of(run_dir, step) for each in read_records(path).records):
        if "tree" not in record:
            continue
        root, *nodes = to_tree(record["tree"]).nodes
        tokens = sum(len(node.tokens) for node in nodes)
        leaves = sum(not node.children for node in nodes)
        planned += record_bytes(
            cfg, spec, tokens=tokens, prompt=len(root.tokens), segments=1 + len(nodes), leaves=leaves
        )
        real += len(framed(record))
    return planned, real


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_and_a_killed_run_go_on_as_if_nothing_had_happened(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = start_ranks(2, "-m", "treepo_mega.cli", *command(stopped))
    metrics, deadline = stopped / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    # To one rank only: the other must learn of it.
    os.kill(ranks_of(process.pid)[-1], signal.SIGUSR1)
    code, out = finish(process, 120)
    assert "asked to stop: saved after step" in out, out[-6000:]
    assert code != 0 and "exitcode  : 75" in out, "the status that job scripts requeue on"
    (saved,) = (stopped / "checkpoints").iterdir()
    done = check_complete(saved)["step"]
    assert 1 <= done < STEPS and done == len(numbers(stopped))
    assert numbers(stopped)[-1]["rollout/trees_carried_over"] > 0, "the checkpoint keeps unfinished trees"

    before = metrics.read_text().splitlines()
    written = [f"checkpoint.save_interval={done + 1}", "checkpoint.async_save=true"]
    # The other rank's writer never ends, so that the next rollout is sampled meanwhile.
    stuck = [*written, "debug.fault.kind=stuck_in_writer", "debug.fault.rank=1"]
    kill_amid_a_rollout(start_ranks(2, "-m", "treepo_mega.cli", *command(stopped), *stuck), stopped, done + 1)
    in_part = list((stopped / "checkpoints").glob(f".step_{done + 1:06d}.*.partial"))
    assert len(in_part) == 1, "the kill came amid the write"
    assert check_complete(saved)["step"] == done and len(list((stopped / "checkpoints").iterdir())) == 2
    kept = len(folder.steps_kept(stopped))
    planned, on_disk = records_of(stopped, folder.steps_kept(stopped)[0])
    assert 0.7 < on_disk / planned < 1.2, "bytes of a step's trees, as a plan of the disk counts them"
    resumed = run_ranks(2, CLI, *command(stopped), timeout=280)
    assert "resumed from" in resumed and f"next step {done}" in resumed
    after = metrics.read_text().splitlines()
    assert after[:done] == before and json.loads(after[done])["step"] == done + 1, "the first lines are kept as written"
    restored = [row["rollout/trees_restored"] for row in read_metrics(metrics)[done:]]
    assert all(restored[: kept - 1]) and not any(restored[kept:]), "steps since the checkpoint are trained, not sampled"
    assert folder.steps_kept(stopped) == [], "the last checkpoint has them all"
    assert not in_part[0].exists()
    run_ranks(2, CLI, *command(whole), timeout=280)
    assert numbers(stopped) == numbers(whole)
    assert len(numbers(whole)) == STEPS
    assert sum(row["rollout/trees_carried_over"] for row in numbers(whole)) > STEPS, "checkpoints keep unfinished trees"
    assert any(row["rollout/stale_token_share"] > 0.1 for row in numbers(whole))
    assert all(row["tree/forks"] > 0 for row in numbers(whole) if row["rollout/prompts_trained"])
    assert max(row["tree/leaves_per_prompt_max"] for row in numbers(whole)) > 8, "some trees have grown on"
    a, b = (load_file(d / "hf" / "model.safetensors") for d in (stopped, whole))
    assert a.keys() == b.keys() and all(a[n].equal(b[n]) for n in a)
