"""Where Megatron-LM keeps what it trained, and in which format: by names alone, without torch.

    is_megatron_lm(path)         # and not a checkpoint of this project
    find_iteration(path)         # DIR/iter_0000100

DIR has `latest_checkpointed_iteration.txt`, which says "100" or "release". `DIR/iter_0000100/metadata.json` says the
format. A directory that was given another name is not recognised.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from treepo_mega.checkpoint.error import CheckpointError
from treepo_mega.errors import nearest

MANIFEST = "manifest.json"
"""Of this project's checkpoints, which Megatron-LM's do not have."""
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
FORMAT = "torch_dist"
CONVERT = (
    "let Megatron-LM write it as torch_dist: its own training command with --ckpt-convert-format torch_dist "
    "--ckpt-convert-save DIR"
)
_ITERATION = re.compile(r"iter_\d{7,}")


def is_megatron_lm(path: Path) -> bool:
    """Whether `path` is meant as a directory of Megatron-LM, and not as a checkpoint of this project."""
    if (path / MANIFEST).is_file():
        return False
    names = _ITERATION.fullmatch(path.name) is not None or path.name == RELEASE
    return names or (path / TRACKER).is_file() or bool(_iterations(path))


def find_iteration(path: Path) -> Path:
    """The directory of one iteration: `path` itself, or the one that its tracker file names.

    Raises CheckpointError for one that is missing, or of a format that cannot be loaded.
    """
    directory = _named(path)
    _check_format(directory)
    return directory


def check_stays(path: Path) -> None:
    """Raise CheckpointError where the weights of a frozen reference are named by a file that may move on.

    Every restart loads them again.
    """
    if is_megatron_lm(path) and (path / TRACKER).is_file():
        raise CheckpointError(
            f"model.load {path}: {TRACKER} names the iteration, and a training that goes on there moves it. The frozen "
            "reference (algo.kl_loss_coef, reward.kl_coef) loads it again at every restart and would change: name one, "
            f"as {find_iteration(path)}"
        )


def _named(path: Path) -> Path:
    tracker = path / TRACKER
    if not tracker.is_file():
        if found := _iterations(path):
            raise CheckpointError(
                f"{path}: no {TRACKER}, so nothing says which iteration is the last whole one; name one of them, as "
                f"{path / found[-1]}"
            )
        if not path.is_dir():
            beside = _iterations(path.parent)
            more = f"; there are {', '.join(beside)}{nearest(path.name, beside)}" if beside else ""
            raise CheckpointError(f"{path}: no such iteration{more}")
        return path
    said = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if said != RELEASE and not said.isdecimal():
        raise CheckpointError(f"{tracker}: says {said[:40]!r}; expected a number of iterations, or {RELEASE}")
    directory = path / (said if said == RELEASE else f"iter_{int(said):07d}")
    if not directory.is_dir():
        there = ", ".join(_iterations(path)) or "none"
        raise CheckpointError(
            f"{directory}: no such iteration, although {TRACKER} says {said}; there are: {there}. Name one of them, or "
            "copy the missing one"
        )
    return directory


def _iterations(path: Path) -> list[str]:
    """Names of the iterations below a directory, oldest first."""
    return sorted(each.name for each in path.glob("iter_*") if _ITERATION.fullmatch(each.name) and each.is_dir())


def _check_format(directory: Path) -> None:
    """Raise CheckpointError for what is no checkpoint in the format torch_dist."""
    if ranks := sorted(each.name for each in directory.glob("mp_rank_*")):
        raise CheckpointError(
            f"{directory}: has {ranks[0]}: Megatron-LM's old format (--ckpt-format torch), which is a pickle a rank "
            f"and fits one layout alone. It is not read: {CONVERT}"
        )
    path = directory / "metadata.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file: not a {FORMAT} checkpoint of Megatron-LM, or its writing was cut short. "
            f"Use another iteration; of another format, {CONVERT}"
        )
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: expected a JSON object with sharded_backend; use another iteration") from None
    if backend != FORMAT:
        raise CheckpointError(f"{path}: the format is {backend!r}, and only {FORMAT!r} is read: {CONVERT}")
