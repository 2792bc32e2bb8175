"""What users get wrong: a message that names it, status 2, no traceback, no hang, and no engine started.

The command runs in ranks that are forked with its imports done (world.py). One case is the real command, started as
people start it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.ranks import LAUNCHER_VARIABLES, REPO
from tests.world import run_world

MODEL = REPO / "examples" / "tiny_reasoner"
WORKER = Path(__file__).with_name("cli_worker.py")
RECIPE = "examples/tiny_cpu.yaml"
Done = subprocess.CompletedProcess[str]
Train = Callable[..., Done]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """train(*overrides): the command on the tiny recipe; its run directory, if it makes one, lies in `tmp_path`."""

    def command(*overrides: str) -> Done:
        errors = tmp_path / "stderr"
        arguments = ["train", RECIPE, f"logging.run_dir={tmp_path}/run", *overrides]
        status, output, _ = run_world(1, [str(WORKER), str(errors), *arguments], 120)
        return Done(arguments, status, output, errors.read_text())

    return command


def check_refused(done: Done, *words: str) -> None:
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    for word in words:
        assert word in done.stderr, done.stderr[-4000:]


@pytest.fixture
def model(tmp_path) -> Path:
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


def test_a_key_that_does_not_exist(train):
    check_refused(train("rollout.segmnt_length=8"), "rollout.segmnt_length", "did you mean 'segment'")


def test_a_missing_checkpoint(train, tmp_path):
    check_refused(train(f"model.hf_checkpoint={tmp_path}/nowhere"), "nowhere/config.json")


def test_a_layout_that_does_not_divide_the_heads_in_the_real_command():
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    env |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "3"}
    command = [sys.executable, "-m", "treepo_mega.cli", "train", RECIPE, "parallel.tensor_model_parallel_size=3"]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=120)
    check_refused(done, "does not divide", "num_attention_heads")


def test_a_world_size_that_does_not_fit(train):
    check_refused(train("parallel.tensor_model_parallel_size=2"), "world size 1 is not a multiple")


def test_missing_weights(train, model):
    (model / "model.safetensors").unlink()
    check_refused(train(f"model.hf_checkpoint={model}"), "model", "safetensors")


def test_a_tensor_of_the_wrong_shape(train, model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    check_refused(train(f"model.hf_checkpoint={model}"), "model.norm.weight", "[63]", "[64]")


def test_a_malformed_line(train, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "a", "answer": "1"}) + "\n{not json\n")
    check_refused(train(f"data.train=[{{path: {bad}}}]"), "bad.jsonl", "line 2")


def test_a_missing_answer(train, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "a", "anser": "1"}) + "\n")
    check_refused(train(f"data.train=[{{path: {bad}}}]"), "bad.jsonl", "answer", "anser")


def test_an_unknown_verifier(train):
    check_refused(train("data.verifier=boxd"), "boxd", "boxed")


def test_a_checkpoint_cut_short(train, tmp_path):
    partial = tmp_path / "step_000002"
    partial.mkdir()
    check_refused(train(f"checkpoint.load={partial}"), "step_000002", "manifest.json")


def test_a_model_without_an_end_token(train, model):
    for name, keys in (
        ("config.json", ("eos_token_id",)),
        ("generation_config.json", ("eos_token_id",)),
        ("tokenizer_config.json", ("eos_token",)),
    ):
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({k: v for k, v in content.items() if k not in keys}))
    done = train(f"model.hf_checkpoint={model}")
    check_refused(done, "no EOS token in generation_config.json", "rollout.stop.eos_token_ids")
    assert "prompts to train on" not in done.stdout, "said before prompts, actor and engine"
