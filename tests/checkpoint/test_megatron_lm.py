"""A checkpoint of Megatron-LM as initial weights: any layout, and what is wrong with one is named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from tests.actor.oracle import write_checkpoint
from tests.ranks import run_ranks
from treepo_mega.checkpoint.description import read_description
from treepo_mega.checkpoint.mcore import CheckpointError
from treepo_mega.checkpoint.megatron_lm import check_initial, is_megatron_lm

WORKER = Path(__file__).with_name("megatron_lm_worker.py")
MODELS = {
    "hf": ("llama", True),
    "untied": ("llama", False),
    "rotated": ("llama", True),
    "qwen2": ("qwen2", True),
    "experts": ("qwen3_moe", True),
    "fewer": ("mixtral", True),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The worker's directory, with results.json and checkpoints of Megatron-LM; launched once for the module."""
    directory = tmp_path_factory.mktemp("megatron_lm")
    for folder, (kind, tied) in MODELS.items():
        write_checkpoint(directory / folder, kind, tied)
    config = directory / "rotated" / "config.json"
    config.write_text(config.read_text().replace("10000.0", "500000.0"))
    run_ranks(2, WORKER, directory)
    return directory


@pytest.fixture(scope="module")
def results(written):
    return json.loads((written / "results.json").read_text())


@pytest.fixture
def root(written, tmp_path):
    """A copy of a directory that Megatron-LM wrote."""
    return Path(shutil.copytree(written / "lm_hf", tmp_path / "lm"))


@pytest.mark.parametrize(
    ("folder", "layout"),
    [
        *(("hf", layout) for layout in ("tp2", "pp2", "vpp2", "dp2")),
        ("untied", "tp2"),
        *(("experts", layout) for layout in ("experts_tp2", "experts_pp2")),
    ],
)
def test_its_weights_fill_any_layout(results, folder, layout):
    found = results["loads"][folder][layout]
    assert found["weights_off"] == 0, "bit for bit"
    assert found["logprobs_off"] < 2e-5


def test_another_model_is_refused_with_what_differs(results):
    assert "untie_embeddings_and_output_weights True, here False" in results["untied into hf"]
    assert "untie_embeddings_and_output_weights False, here True" in results["hf into untied"]
    assert "rotary_base 10000, here 500000.0" in results["hf into rotated"]
    assert "kv_channels 32, here 16" in results["hf into qwen2"] and "add_qkv_bias False" in results["hf into qwen2"]
    assert "num_experts 8, here 4" in results["experts into fewer"]


def test_the_tracker_says_which_iteration(root):
    assert is_megatron_lm(root) and check_initial(root) == root / "iter_0000100"
    assert check_initial(root / "iter_0000100") == root / "iter_0000100"
    (root / "iter_0000100").rename(root / "release")
    (root / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert check_initial(root) == root / "release"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as told:
        check_initial(path)
    return str(told.value)


def test_an_iteration_that_is_not_there_is_told_with_those_that_are(root):
    assert "no such iteration; there are iter_0000100 (did you mean 'iter_0000100'?)" in refusal(root / "iter_0000200")
    (root / "latest_checkpointed_iteration.txt").write_text("200")
    assert "although latest_checkpointed_iteration.txt says 200; there are: iter_0000100" in refusal(root)
    (root / "latest_checkpointed_iteration.txt").write_text("soon")
    assert "says 'soon'; expected a number of iterations, or release" in refusal(root)
    (root / "latest_checkpointed_iteration.txt").unlink()
    assert f"name one of them, as {root / 'iter_0000100'}" in refusal(root)


def test_other_formats_are_refused_with_the_way_out(root):
    directory = root / "iter_0000100"
    kept = json.loads((directory / "metadata.json").read_text())
    (directory / "metadata.json").write_text(json.dumps({**kept, "sharded_backend": "zarr"}))
    assert "the format is 'zarr'" in refusal(root) and "--ckpt-convert-format torch_dist" in refusal(root)
    (directory / "metadata.json").unlink()
    assert "metadata.json: no such file: not a torch_dist checkpoint" in refusal(root)
    (directory / "mp_rank_00").mkdir()
    assert "has mp_rank_00: Megatron-LM's old format" in refusal(root)
    assert "--ckpt-convert-format torch_dist" in refusal(root)


def test_a_file_that_was_not_copied_whole_is_named(root):
    directory = root / "iter_0000100"
    victim = max(directory.glob("*.distcp"), key=lambda path: path.stat().st_size)
    with victim.open("r+b") as file:
        file.truncate(victim.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=rf"{victim}: expected at least \d+ bytes, found \d+"):
        read_description(directory).check_files()
    victim.unlink()
    with pytest.raises(CheckpointError, match="found nothing"):
        read_description(directory).check_files()


class Runs:
    """A pickle of it runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def test_a_description_that_would_run_a_program_is_refused_unread(root, tmp_path):
    directory = root / "iter_0000100"
    (directory / ".metadata").write_bytes(pickle.dumps(Runs(f"touch {tmp_path / 'ran'}")))
    with pytest.raises(CheckpointError, match=r"names posix.system, which the description of no checkpoint needs"):
        read_description(directory)
    assert not (tmp_path / "ran").exists()
    (directory / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match="not the description of a checkpoint"):
        read_description(directory)
    (directory / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="no such file: not a torch_dist checkpoint"):
        read_description(directory)
