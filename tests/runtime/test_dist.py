"""Waits have deadlines that name what is missing; plain values travel between ranks of unequal sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import REPO, run_ranks
from treepo_mega.config import ConfigError, parse_config
from treepo_mega.runtime import dist
from treepo_mega.runtime.packed import PackedError

WORKER = Path(__file__).with_name("dist_worker.py")


def test_exchange_between_two_ranks():
    out = run_ranks(2, WORKER, "exchange", timeout=120)
    assert "finished 0" in out and "finished 1" in out


def test_a_barrier_names_what_it_waits_for_and_the_missing_rank():
    out = run_ranks(2, WORKER, "missing", timeout=120)
    message = next(line for line in out.splitlines() if "MESSAGE" in line)
    assert "rank 0 waited for all ranks to finish generation (deadline 2 s); missing: rank 1." in message
    assert "Ranks 1 failed to pass monitoredBarrier" in message or "Rank 1 failed to pass" in message


def test_one_process_needs_no_group():
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert dist.gather_objects({"a": (1, 2)}) == [{"a": [1, 2]}]
    assert (dist.tell_all({"a": (1, 2)}), dist.tell_all()) == ({0: {"a": [1, 2]}}, {})
    assert dist.sum_over_ranks({"x": 2.0}) == {"x": 2.0} == dist.max_over_ranks({"x": 2.0})
    dist.barrier("nobody", 0.001)


def test_bytes_that_arrive_damaged_are_an_error_that_names_the_speaker(monkeypatch):
    """Two ranks of one process: the second's value loses a bit on the way."""

    def all_gather(parts, own):
        for part in parts:
            part.copy_(own)
        if own.dtype == torch.uint8:
            parts[1][-1] ^= 4

    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist.dist, "all_gather", all_gather)
    with pytest.raises(PackedError, match=r"what rank 1 told rank 0 arrived damaged: checksum \w{8}, expected \w{8}"):
        dist.gather_objects({"logprobs": [-0.5] * 100})


def test_a_world_that_does_not_fit_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    cfg = parse_config(
        {
            "model": {"hf_checkpoint": "unused"},
            "data": {"train": [{"path": "x"}]},
            "parallel": {"tensor_model_parallel_size": 2},
        }
    )
    with pytest.raises(ConfigError, match="world size 3 is not a multiple of tensor_model_parallel_size 2"):
        dist.initialize(cfg)


def test_the_default_group_is_whole_before_anyone_uses_it(monkeypatch):
    """A rank that a refit leaves out would otherwise be missing from NCCL's first call."""
    calls: list[tuple[str, object]] = []

    def note(name):
        return lambda *args, **kwargs: calls.append((name, kwargs.get("group", args)))

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist.ps, "model_parallel_is_initialized", lambda: False)
    for owner, name in (
        (dist.dist, "init_process_group"),
        (dist.dist, "all_reduce"),
        (dist, "cpu_group"),
        (dist.ps, "initialize_model_parallel"),
        (dist, "seed_everything"),
    ):
        monkeypatch.setattr(owner, name, note(name))
    dist.initialize(parse_config({"model": {"hf_checkpoint": "unused"}, "data": {"train": [{"path": "x"}]}}))
    assert [name for name, _ in calls[:3]] == ["init_process_group", "all_reduce", "cpu_group"]
    (tensor,) = calls[1][1]
    assert tensor.device == dist.device(), "on the device: gloo's part of the group is another one"


def test_leave_ends_helpers_and_keeps_the_exit_status():
    # A child that would sleep past the deadline below, and holds the console open.
    code = (
        "import multiprocessing, sys, time\n"
        "from treepo_mega.runtime import dist\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.get_context('fork').Process(target=time.sleep, args=(300,)).start()\n"
        "    print('said', end='')\n"
        "    dist.leave(75)\n"
    )
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert child.returncode == 75 and child.stdout.endswith("said"), child.stderr[-2000:]
