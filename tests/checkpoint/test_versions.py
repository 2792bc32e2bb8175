"""Checkpoints of one version of megatron-core in the other, both ways. Needs the environments of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import found_by, run_ranks
from tests.world import LAUNCHER_VARIABLES, REPO
from treepo_mega.runtime.megatron_versions import PINS

WORKER = Path(__file__).with_name("versions_worker.py")
OTHER = "TREEPO_OTHER_PYTHON"


@pytest.fixture(scope="module")
def other_python() -> str:
    """An interpreter that has the other version of megatron-core."""
    python = os.environ.get(OTHER)
    if python is None:
        pytest.skip(f"{OTHER} names no Python of the other lane (make setup PYTHON=python3.12 builds .venv-3.12)")
    code = "from importlib.metadata import version; print(version('megatron-core'))"
    commands = [[name, "-c", code] for name in (sys.executable, python)]
    told = [subprocess.run(command, capture_output=True, text=True, timeout=60) for command in commands]
    assert {done.stdout.strip() for done in told} == set(PINS.values()), [done.stdout + done.stderr for done in told]
    return python


def in_the_other(python: str, *command: object) -> str:
    """The output of two ranks under torchrun of `python`."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    env |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [*torchrun, *map(str, command)]
    done = subprocess.run(line, env=env, cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.mark.parametrize("writer", ["this", "other"])
def test_a_checkpoint_of_one_version_resumes_in_the_other(other_python, tmp_path, writer):
    if writer == "this":
        run_ranks(2, WORKER, "write", tmp_path)
        found = found_by(in_the_other(other_python, WORKER, "read", tmp_path))
    else:
        in_the_other(other_python, WORKER, "write", tmp_path)
        found = found_by(run_ranks(2, WORKER, "read", tmp_path))
    assert set(found) == {"tp2", "pp2", "experts_ep2", "experts_tp2"}
    for layout, got in found.items():
        assert got["trainer"], "the trainer's own state comes back as it was"
        assert got["steps_off"] < 1e-6, (layout, got)
        assert got["weights_off"] < 1e-2, "in units of the learning rate"
