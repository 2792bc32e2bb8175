"""Checkpoints: resume bit-equal in the same layout and close in others; damaged ones are named and passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from tests.actor.oracle import configuration
from tests.ranks import run_ranks
from treepo_mega.checkpoint import mcore
from treepo_mega.checkpoint.directories import find_latest, prune
from treepo_mega.checkpoint.mcore import MANIFEST, CheckpointError, check_complete, check_digests
from treepo_mega.checkpoint.space import checkpoint_bytes
from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.mcore_layout import ModelSpec

WORKER = Path(__file__).with_name("training_worker.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The worker's directory, with results.json and real checkpoints; launched once for the module."""
    directory = tmp_path_factory.mktemp("training")
    run_ranks(2, WORKER, directory)
    return directory


@pytest.fixture(scope="module")
def results(trained):
    return json.loads((trained / "results.json").read_text())


@pytest.mark.parametrize("saved", ["tp2", "dp2"])
@pytest.mark.parametrize("layout", ["tp2", "pp2", "vpp2", "dp2"])
def test_resume_continues_the_run(results, saved, layout):
    whole, back = results["resume"][saved]["whole"], results["resume"][saved][layout]
    assert whole[0][0] > 0 and whole[2] != whole[3]
    assert back["trainer"], "the trainer's own state comes back as it was"
    if layout == saved:
        assert back["steps"] == whole[2:] and back["weight_diff"] == 0, "bit for bit"
    else:
        for got, want in zip(back["steps"], whole[2:], strict=True):
            assert got == pytest.approx(want, rel=1e-6)
        assert back["weight_diff"] < 1e-2, "in units of the learning rate"


def test_a_checkpoint_that_is_written_while_steps_go_on_is_that_of_its_own_step(results):
    run = results["background"]
    assert run["before_its_name"] == [], "until it is whole, the one before it is the newest"
    assert run["written"] == [True, None], "told once"
    assert run["tp2"]["trainer"] and run["tp2"]["steps"] == run["whole"][2:] and run["tp2"]["weight_diff"] == 0
    for got, want in zip(run["dp2"]["steps"], run["whole"][2:], strict=True):
        assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("layout", ["experts_ep2", "experts_tp2"])
def test_experts_resume_in_this_and_other_layouts(results, layout):
    whole, back = results["experts"]["whole"], results["experts"][layout]
    if layout == "experts_ep2":
        assert back["steps"] == whole[2:] and back["weight_diff"] == 0, "bit for bit"
    for got, want in zip(back["steps"], whole[2:], strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    assert back["weight_diff"] < 5e-2, "in units of the learning rate"


def test_a_checkpoint_with_another_number_of_experts_is_refused(results):
    assert "8 experts; the model has 4" in results["fewer_experts"]


def test_a_training_checkpoint_with_expert_parallelism_is_refused_without(results):
    assert "expert_model_parallel_size 2" in results["without_ep"] and "model.load" in results["without_ep"]


def test_resume_without_the_distributed_optimizer(results):
    run = results["plain_optimizer"]
    assert run["dp2_plain_optimizer"]["steps"] == run["whole"][2:]
    assert run["dp2_plain_optimizer"]["weight_diff"] == 0


@pytest.mark.parametrize("layout", ["tp2", "dp2_plain_optimizer"])
def test_a_run_that_never_stepped_can_be_saved_and_resumed(results, layout):
    run = results["before_the_first_step"][layout]
    assert run[layout]["steps"] == run["whole"] and run[layout]["weight_diff"] == 0


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "experts_ep2"])
def test_a_nan_gradient_changes_nothing_and_is_counted(results, layout):
    got = results["skipping"][layout]
    assert got["moved_by_good_step"] > 0
    assert got["skipped"] == 1.0 and got["norm"] == "nan"
    assert got["moved"] == 0, "weights as before"
    assert got["moments"] > 0 and got["moments_moved"] == 0, "optimizer state as before"
    assert got["lr"][0] > got["lr"][1] == got["lr"][2], "the schedule waits for the skipped step"
    assert got["in_a_row"] == [1, 0, 1, 2], "a good step starts the count again"
    assert "3 optimizer steps in a row had the gradient norm nan" in got["diverged"]


@pytest.fixture
def checkpoints(trained, tmp_path):
    """A folder with copies of a real checkpoint as steps 2, 4 and 6, and a partial one."""
    real = trained / "tp2" / "step_000002"
    for step in (2, 4, 6):
        shutil.copytree(real, tmp_path / f"step_{step:06d}")
    shutil.copytree(real, tmp_path / ".step_000008.partial")
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_the_manifest_states_the_layout_and_every_file(trained):
    directory = trained / "tp2" / "step_000002"
    manifest = check_complete(directory)
    assert manifest["step"] == 2 and manifest["layout"]["tensor_model_parallel_size"] == 2
    on_disk = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == on_disk - {MANIFEST}
    cfg = configuration(trained / "hf", "parallel.tensor_model_parallel_size=2")
    foretold = checkpoint_bytes(cfg, ModelSpec.from_hf(trained / "hf"))
    assert 1 <= sum(manifest["files"].values()) / foretold < 1.2, "names and padding weigh on a model this small"
    assert not list(trained.rglob("*.partial")), "nothing is left half-written"


def test_newest_complete_one_is_found(checkpoints, capsys):
    assert find_latest(checkpoints) == checkpoints / "step_000006"
    assert capsys.readouterr().out == ""
    assert find_latest(checkpoints / "nowhere") is None


def test_a_truncated_file_is_named_and_passed_over(checkpoints, capsys):
    newest = checkpoints / "step_000006"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    size = victim.stat().st_size
    with victim.open("r+b") as f:
        f.truncate(size - 1)
    with pytest.raises(CheckpointError, match=rf"{victim}: expected {size} bytes, found {size - 1}: .* is damaged"):
        check_complete(newest)
    assert find_latest(checkpoints) == checkpoints / "step_000004"
    assert f"passing over {newest}" in capsys.readouterr().out
    victim.unlink()
    with pytest.raises(CheckpointError, match="found nothing"):
        check_complete(newest)


def test_a_flipped_bit_is_named_and_passed_over(checkpoints, capsys):
    newest = checkpoints / "step_000006"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 3] ^= 1
    victim.write_bytes(data)
    manifest = check_complete(newest)
    with pytest.raises(CheckpointError, match=rf"{victim}: SHA-256 is .*{MANIFEST} says .*use another checkpoint"):
        check_digests(newest, manifest)
    assert find_latest(checkpoints) == checkpoints / "step_000004"
    assert f"passing over {newest}" in capsys.readouterr().out
    del manifest["sha256"]
    check_digests(newest, manifest)  # of an earlier version: sizes are all that is known


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"files": 3}'])
def test_without_a_manifest_it_is_no_checkpoint(checkpoints, text):
    newest = checkpoints / "step_000006"
    (newest / MANIFEST).unlink()
    if text is not None:
        (newest / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=str(newest)) as e:
        check_complete(newest)
    assert isinstance(e.value, TreepoError), "the command line prints it as one message"
    assert find_latest(checkpoints) == checkpoints / "step_000004"


def test_prune_keeps_the_last(checkpoints):
    prune(checkpoints, 2)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["notes", "step_000004", "step_000006"]
    prune(checkpoints, 5)
    assert len(list(checkpoints.iterdir())) == 3


FULL = "[Errno 28] No space left on device"
UNREADABLE = "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"


def _save_meets(error, monkeypatch):
    def refuse(state, directory, **_):
        raise error

    monkeypatch.setattr(mcore.dist_checkpointing, "save", refuse)


@pytest.mark.parametrize(
    ("error", "writable"),
    [
        (RuntimeError(f"Worker failure: {FULL}"), True),
        (OSError(28, "No space left on device"), True),
        (RuntimeError(UNREADABLE), False),
        # What the coordinator raises, which knows of the others.
        (CheckpointException("write", {3: _wrap_exception(RuntimeError(f"Worker failure: {FULL}"))}), True),
        # And the others, which know of nobody.
        (CheckpointException("write", {}), False),
    ],
)
def test_a_full_disk_is_told_with_what_is_free_and_what_to_do(error, writable, tmp_path, monkeypatch):
    directory = tmp_path / "step_000002"
    directory.mkdir()
    if not writable:
        # A device that is always full takes the probe's place.
        (directory / ".probe_0").symlink_to("/dev/full")
    _save_meets(error, monkeypatch)
    with pytest.raises(CheckpointError, match="could not be written: ") as caught:
        mcore._write({}, directory, {}, 5.0)
    assert FULL in str(caught.value)
    assert "are free there). Earlier checkpoints are whole" in str(caught.value)
    assert "make room" in str(caught.value)


def test_a_rank_that_others_failed_ends_as_they_do(tmp_path, monkeypatch):
    _save_meets(CheckpointException("write", {}), monkeypatch)
    with pytest.raises(CheckpointError, match="could not be written: another rank says why"):
        mcore._write({}, tmp_path, {}, 5.0)


def test_another_fault_while_saving_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    _save_meets(RuntimeError("shapes differ"), monkeypatch)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        mcore._write({}, tmp_path, {}, 5.0)
    assert list(tmp_path.iterdir()) == []
