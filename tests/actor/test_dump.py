"""A step that is not finite is dumped by the ranks that had it, and one rank finds where it begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import CLI, found_by, run_ranks
from tests.world import run_world
from treepo_mega.actor.dump import DumpError, read_dump

WORKER = Path(__file__).with_name("dump_worker.py")


@pytest.fixture(scope="module")
def dumped(tmp_path_factory) -> dict:
    """What the worker reported; its dump lies in a directory of this module."""
    return found_by(run_ranks(2, WORKER, tmp_path_factory.mktemp("dumped")))


def test_a_run_that_skips_too_many_steps_leaves_a_dump(dumped):
    assert dumped["skipped"] == [1.0] and "2 optimizer steps in a row" in dumped["message"]
    dump = read_dump(dumped["dump"])
    assert dump.step == 12 and not np.isfinite(dump.grad_norm)
    assert [rank for rank, _ in dump.packs] == [0] * dumped["packs"], "ranks of a TP group hold the same packs"
    _, pack = dump.packs[0]
    assert pack.tokens.dtype == np.int64 and (pack.old_logprobs == pack.rollout_logprobs).all()
    assert all(path.suffix in (".json", ".safetensors") for path in Path(dumped["dump"]).iterdir() if path.is_file())


def test_memory_that_is_short_where_ranks_wait_for_one_another_ends_the_update(dumped):
    assert dumped["refused"].startswith("rank 0: no memory for a pass over packs of up to ")
    assert "(CUDA out of memory. Tried to allocate 9 GiB, says the test)" in dumped["refused"]
    assert "Lower train.max_tokens_per_gpu (now " in dumped["refused"]


def test_one_rank_names_the_module(dumped):
    output = run_ranks(1, CLI, "replay", dumped["dump"])
    assert "pack 0, forward pass: decoder.layers.2.mlp.linear_fc2 has " in output, output[-3000:]
    assert "infinite of" in output and "; its input is finite, at most " in output
    assert "(a pack of rank 0)" in output and "step 12 of " in output


def test_what_is_no_dump_is_named(dumped, tmp_path):
    with pytest.raises(
        DumpError, match=r"no dump.json: not a dump; expected a directory such as RUN/dumps/step_000012"
    ):
        read_dump(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(dumped["dump"], copy)
    (copy / "rank_0.safetensors").write_bytes(b"half of it")
    with pytest.raises(DumpError, match=r"rank_0.safetensors: damaged: .*expected packs of a stopped run"):
        read_dump(copy)
    about = json.loads((copy / "dump.json").read_text())
    (copy / "dump.json").write_text(json.dumps(about | {"version": 9}))
    with pytest.raises(DumpError, match="a dump of version 9; this program reads version 1"):
        read_dump(copy)


def test_the_command_refuses_what_is_no_dump(tmp_path):
    code, output, _ = run_world(1, [str(CLI), "replay", str(tmp_path)], 120)
    assert code == 2 and "not a dump" in output
