"""What users get wrong: a message that names it, status 2, no traceback, no hang, and no engine started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.ranks import LAUNCHER_VARIABLES, REPO

MODEL = REPO / "examples" / "tiny_reasoner"


def train(*overrides: str, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | {"OMP_NUM_THREADS": "1", **extra}
    command = [sys.executable, "-m", "treepo_mega.cli", "train", "examples/tiny_cpu.yaml", *overrides]
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=120)


def check_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    for word in words:
        assert word in done.stderr, done.stderr[-4000:]


@pytest.fixture
def model(tmp_path) -> Path:
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


def run_with(model: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return train(f"model.hf_checkpoint={model}", f"logging.run_dir={model.parent}/run", *more)


def test_a_key_that_does_not_exist():
    check_refused(train("rollout.segmnt_length=8"), "rollout.segmnt_length", "did you mean 'segment'")


def test_a_missing_checkpoint(tmp_path):
    check_refused(train(f"model.hf_checkpoint={tmp_path}/nowhere"), "nowhere/config.json")


def test_a_layout_that_does_not_divide_the_heads():
    check_refused(
        train("parallel.tensor_model_parallel_size=3", WORLD_SIZE="3"), "does not divide", "num_attention_heads"
    )


def test_a_world_size_that_does_not_fit():
    check_refused(train("parallel.tensor_model_parallel_size=2"), "world size 1 is not a multiple")


def test_missing_weights(model):
    (model / "model.safetensors").unlink()
    check_refused(run_with(model), "model", "safetensors")


def test_a_tensor_of_the_wrong_shape(model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    check_refused(run_with(model), "model.norm.weight", "[63]", "[64]")


def test_a_malformed_line(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "a", "answer": "1"}) + "\n{not json\n")
    check_refused(train(f"data.train=[{{path: {bad}}}]", f"logging.run_dir={tmp_path}/run"), "bad.jsonl", "line 2")


def test_a_missing_answer(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "a", "anser": "1"}) + "\n")
    check_refused(
        train(f"data.train=[{{path: {bad}}}]", f"logging.run_dir={tmp_path}/run"), "bad.jsonl", "answer", "anser"
    )


def test_an_unknown_verifier(tmp_path):
    check_refused(train("data.verifier=boxd", f"logging.run_dir={tmp_path}/run"), "boxd", "boxed")


def test_a_checkpoint_cut_short(tmp_path):
    partial = tmp_path / "step_000002"
    partial.mkdir()
    check_refused(
        train(f"checkpoint.load={partial}", f"logging.run_dir={tmp_path}/run"), "step_000002", "manifest.json"
    )


def test_a_model_without_an_end_token(model):
    for name, keys in (
        ("config.json", ("eos_token_id",)),
        ("generation_config.json", ("eos_token_id",)),
        ("tokenizer_config.json", ("eos_token",)),
    ):
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({k: v for k, v in content.items() if k not in keys}))
    done = run_with(model)
    check_refused(done, "no EOS token in generation_config.json", "rollout.stop.eos_token_ids")
    assert "prompts to train on" not in done.stdout, "said before prompts, actor and engine"
