"""Two ranks under torchrun: an engine each (with nothing to do on one of them), and one engine over both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

REPO = Path(__file__).parents[2]


def launch(hf: Path, other: Path, tp: int) -> dict[str, list]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("ranks.py")), str(hf), str(other), str(tp)]
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in drop}
    env |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trees_and_scores_are_the_same_in_either_layout(tiny_llama, make_tiny_llama):
    other = make_tiny_llama(seed=1)
    apart, together = launch(tiny_llama, other, 1), launch(tiny_llama, other, 2)
    assert len(apart["trees"]) == 3 and apart["trees"] == together["trees"]
    (whole,) = together["evaluated"]
    assert whole["stolen"] == 0 and whole["metrics"][0]["samples"] == 12 and whole["metrics"][1]["samples"] == 36
    for slow in apart["evaluated"]:
        assert slow["stolen"] > 0, "the fast engine takes prompts that were dealt to the slow one"
        assert slow["metrics"] == whole["metrics"], "the figures do not depend on who sampled what"
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        want = (model(torch.tensor([[3] * 33])).logits[0, :-1] / 0.7).log_softmax(-1)[:, 3].tolist()
    assert apart["scores"] == pytest.approx(want, abs=1e-4)
    assert together["scores"] == pytest.approx(want, abs=1e-4), "the weight update reached both shards"
