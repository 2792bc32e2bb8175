"""What can be known of a run before any weights are read: all problems at once, in seconds.

    problems = preflight(cfg, world_size)

`treepo-mega train` asks before it imports anything heavy, and `--dry-run` asks without starting at all. Each problem is
a sentence that names the key or file. Nothing here needs torch, vLLM or Megatron.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from treepo_mega.checkpoint.headers import (
    NoWeightsError,
    adapter_problem,
    check_against,
    missing_index_note,
    stored_tensors,
)
from treepo_mega.config import Config, check, read_hf_config
from treepo_mega.config.rules import check_directories
from treepo_mega.data.files import find_parts
from treepo_mega.data.hub import hub_id, require_datasets
from treepo_mega.data.rewards.verifiers import check_verifier
from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.spec import ROTARY_TYPES, ModelSpec

FIRST_ROWS = 20
"""Rows of a prompt file that are read here: enough to see that it is one, cheap for a large one."""


def preflight(cfg: Config, world_size: int, *, starting: bool = False) -> tuple[list[str], list[str]]:
    """(problems, notes for people) of starting `cfg` with `world_size` processes on this machine.

    `world_size` is that of the run, which may be larger than this machine. `starting`: the run begins now, so that a
    model directory without weights is a problem; a plan can be made from config.json alone.
    """
    problems: list[str] = []

    def attempt(look: Callable[[], Any]) -> Any:
        """What `look` returns; None after a TreepoError, whose message joins the problems once."""
        try:
            return look()
        except TreepoError as error:
            if str(error) not in problems:
                problems.append(str(error))
            return None

    hf_dir = cfg.model.hf_checkpoint
    if adapter := adapter_problem(hf_dir):
        problems.append(adapter)
        hf = None
    else:
        hf = attempt(lambda: read_hf_config(hf_dir))
    notes: list[str] = attempt(lambda: check(cfg, world_size, hf)) or []
    if hf is not None:
        spec = attempt(lambda: ModelSpec.from_hf(hf_dir))
        notes += attempt(lambda: check_weights(hf_dir, spec, needed=starting)) or []
        if spec is not None and spec.rope_type not in ROTARY_TYPES:
            problems.append(
                f"{hf_dir}/config.json: rope_type {spec.rope_type!r} is not supported; "
                f"expected {', '.join(ROTARY_TYPES)}"
            )
    problems += check_directories(cfg)
    attempt(lambda: check_verifier(cfg.data.verifier))
    for source in [*cfg.data.train, *cfg.data.eval]:
        if source.verifier is not None:
            attempt(lambda name=source.verifier: check_verifier(name))  # type: ignore[misc]  # mypy infers no default
        for path in source.paths:
            attempt(lambda path=path: _try_rows(path))  # type: ignore[misc]  # as above
    return problems, notes


def check_weights(hf_dir: str, spec: ModelSpec | None, *, needed: bool) -> list[str]:
    """Notes on the weight files, from their headers. Raises HfCheckpointError for files that cannot be loaded.

    `spec` None: config.json has a problem of its own, and only the files are looked at. `needed` false: no weights at
    all is no error.
    """
    try:
        stored = stored_tensors(hf_dir)
    except NoWeightsError:
        if needed:
            raise
        return []
    if spec is not None:
        check_against(hf_dir, stored, spec)
    return missing_index_note(hf_dir, stored)


def _try_rows(spec: str) -> None:
    """Read the first rows of every file of `spec`; of a Hub data set only whether the package is there."""
    name = hub_id(spec)
    if name is not None:
        require_datasets(name)
        return
    for part in find_parts(spec):
        for _ in part.rows(FIRST_ROWS):
            pass
