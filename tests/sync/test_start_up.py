"""tools/bench/start_up.py: what a rank reads and pins, by plan; and what two real ranks read, in the slow lane."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import start_up

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def test_the_recipe_of_70b_by_plan():
    row = start_up.by_plan("examples/llama3_70b_16x8.yaml", 128)
    # Llama-3-70B has 70.55 billion parameters; its head is not tied.
    assert row["checkpoint_bytes"] == pytest.approx(141.1e9, rel=1e-3)
    # 32 ways of TP and PP share the layers; the first and the last stage also have 1/8 of 128,256 rows of 8,192.
    layers = (row["checkpoint_bytes"] - 2 * 2 * 128256 * 8192) / 32
    assert row["actor_bytes"] == pytest.approx(layers + 2 * 128256 * 8192 / 8, rel=1e-3)
    assert row["refit_bytes"] == row["actor_bytes"]
    assert row["load_bytes"] - row["refit_bytes"] == row["checkpoint_bytes"]
    # Data parallelism of 4: every weight is read by four ranks, and norms by each of 8 more.
    assert row["read_by_all_refit"] == pytest.approx(4 * row["checkpoint_bytes"], rel=1e-3)
    assert row["read_by_all_load"] - row["read_by_all_refit"] == 128 * row["checkpoint_bytes"]
    assert row["pinned_engine_1"] == pytest.approx(row["checkpoint_bytes"] / 8, rel=1e-3)
    assert row["pinned_engine_2"] == 0
    exact = 12 * (row["actor_bytes"] / 2) / 4
    assert exact <= row["pinned_optimizer"] < 1.15 * exact < row["pinned_optimizer_one_piece"]


def test_pinned_allocations_are_rounded_as_host_memory_rounds_them():
    import torch

    from treepo_mega.sync.handover import HostBlocks

    for size in (1, MIB, 3 * MIB, 65 * MIB, 128 * MIB + 1):
        host = HostBlocks(pinned=False)
        host.keep(torch.zeros(size, dtype=torch.uint8))
        assert host.taken == start_up.in_blocks(size), size
    assert start_up.rounded(65 * MIB) == 128 * MIB and start_up.in_blocks(65 * MIB) == 65 * MIB
    assert start_up.rounded(0) == 0


def test_bytes_asked_of_a_file_are_counted(tmp_path, monkeypatch):
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({"whole": torch.zeros(5, 4), "part": torch.zeros(6, 2)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(start_up.CountedFile, "bytes_read", 0)
    with start_up.CountedFile(safe_open(tmp_path / "x.safetensors", framework="pt")) as file:
        assert sorted(file.keys()) == ["part", "whole"] and start_up.CountedFile.bytes_read == 0
        assert file.get_tensor("whole").shape == (5, 4)
        assert file.get_slice("part").get_shape() == [6, 2]
        assert file.get_slice("part")[1:3].shape == (2, 2)
    assert start_up.CountedFile.bytes_read == 4 * (20 + 4)


@pytest.mark.parametrize(
    "load, refit, message",
    [(99, 0, "asked for 99 bytes of 100"), (100, 1, "a refit fills read 1 bytes")],
)
def test_counts_that_cannot_be_are_refused(load, refit, message):
    with pytest.raises(RuntimeError, match=message):
        start_up.check([{"engine_bytes": load}, {"engine_bytes": refit}], 100)


@pytest.mark.slow
def test_an_engine_that_a_refit_fills_reads_nothing_of_the_checkpoint():
    command = [sys.executable, str(ROOT / "tools/bench/start_up.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["way"] for row in found["starts"]] == ["load", "refit"]
    assert [row["engine_bytes"] for row in found["starts"]] == [found["checkpoint_bytes"], 0]
    assert all(row["actor_bytes"] == found["checkpoint_bytes"] for row in found["starts"])
