"""Short real training runs for the benches: start torchrun, watch it, read what it wrote."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = [
    "rollout.rollout_batch_size=8",
    "rollout.n_samples_per_prompt=8",
    # A step begins exactly its batch: what it samples then says what it trains.
    "rollout.oversample=1",
    "rollout.surplus=drop",
    "train.num_steps_per_rollout=1",
    "train.lr_warmup_iters=0",
    "train.max_tokens_per_gpu=1024",
    "eval.at_start=false",
    "eval.at_end=false",
    "checkpoint.save_hf=false",
    "logging.tensorboard=false",
    "logging.progress=false",
]
"""The demo's recipe, cut down to a few seconds a step."""


def start(ranks: int, run_dir: Path, overrides: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Launch the trainer on `ranks` processes in a process group of its own; output goes to `log`."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *("-m", "treepo_mega.cli", "train", "examples/tiny_cpu.yaml", *BASE, f"logging.run_dir={run_dir}", *overrides),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True)


def wait(
    process: subprocess.Popen[bytes], log: Path, what: str, timeout_s: float = 600, codes: tuple[int, ...] = (0,)
) -> None:
    """Wait for the end; RuntimeError with the end of the log when it fails or passes its deadline."""
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        kill(process)
        raise RuntimeError(f"{what} did not end within {timeout_s:.0f} s:\n{tail(log)}") from None
    if code not in codes:
        raise RuntimeError(f"{what} ended with status {code}:\n{tail(log)}")


def kill(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    """Signal the launcher and all its descendants; after SIGKILL wait until every one is gone.

    torchrun starts each rank in a session of its own, so signalling its process group would miss them.
    """
    launcher = psutil.Process(process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    for member in family if number == signal.SIGKILL else [launcher]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)
    if number == signal.SIGKILL:
        process.wait(30)
        _, alive = psutil.wait_procs(family[1:], timeout=30)
        if alive:
            raise RuntimeError(f"processes {[p.pid for p in alive]} outlived SIGKILL by 30 s")


def run(ranks: int, run_dir: Path, overrides: list[str], what: str) -> list[dict[str, Any]]:
    """One whole run; returns its metrics, a dict per step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    log = run_dir / "log.txt"
    wait(start(ranks, run_dir, overrides, log), log, what)
    return metrics(run_dir)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl so far; a line still being written is left out."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for_step(
    process: subprocess.Popen[bytes], run_dir: Path, step: int, log: Path, timeout_s: float = 600
) -> None:
    """Return once the line of `step` is written; RuntimeError when the run ends first or the deadline passes."""
    deadline = time.monotonic() + timeout_s
    while not any(row["step"] >= step for row in metrics(run_dir)):
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before step {step}:\n{tail(log)}")
        if time.monotonic() > deadline:
            kill(process)
            raise RuntimeError(f"step {step} did not come within {timeout_s:.0f} s:\n{tail(log)}")
        time.sleep(0.1)


def tail(log: Path, lines: int = 25) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
