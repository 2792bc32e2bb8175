"""What can be known of a run before any weights are read: all problems at once, in seconds.

    problems = preflight(cfg, world_size)

`treepo-mega train` asks before it imports anything heavy, and `--dry-run` asks without starting at all. Each problem is
a sentence that names the key or file. Nothing here needs torch, vLLM or Megatron.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treepo_mega.checkpoint.headers import (
    NoWeightsError,
    adapter_problem,
    check_against,
    missing_index_note,
    stored_tensors,
)
from treepo_mega.checkpoint.iterations import check_stays, find_iteration, is_megatron_lm
from treepo_mega.checkpoint.space import check_space, describe_space
from treepo_mega.config import Config, PromptSource, check
from treepo_mega.config.servers import missing_tokens
from treepo_mega.config.surroundings import check_directories, check_stop_file
from treepo_mega.data.gym import GymError, make_items
from treepo_mega.data.rewards.verifiers import check_verifier
from treepo_mega.data.rewards.weighted import check_functions
from treepo_mega.data.trial import try_sources
from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.rotary import check_rotary
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.sinks import check_sinks
from treepo_mega.plan.disk import expected_journals
from treepo_mega.plugins import check_plugins

LARGEST_SEED = 2**32 - 1
"""Of numpy's older generators, which some reasoning-gym tasks use."""


def preflight(
    cfg: Config, world_size: int, *, starting: bool = False, elsewhere: bool = False
) -> tuple[list[str], list[str]]:
    """(problems, notes for people) of starting `cfg` with `world_size` processes on this machine.

    `world_size` is that of the run, which may be larger than this machine. `starting`: the run begins now, so that a
    model directory without weights is a problem; a plan can be made from config.json alone. `elsewhere`: the plan is
    for another machine, so that the disk of this one is only told of.
    """
    problems: list[str] = []

    def attempt(look: Callable[[], Any]) -> Any:
        """What `look` returns; None after a TreepoError, whose message joins the problems once."""
        try:
            return look()
        except TreepoError as error:
            # A missing config.json would otherwise be told by each rule that reads it.
            if str(error) not in problems:
                problems.append(str(error))
            return None

    hf_dir = cfg.model.hf_checkpoint
    spec: ModelSpec | None = None
    if adapter := adapter_problem(hf_dir):
        problems.append(adapter)
    else:
        spec = attempt(lambda: ModelSpec.from_hf(hf_dir))
    notes: list[str] = attempt(lambda: check(cfg, world_size, spec)) or []
    # Without config.json there is no model, and that is said already.
    if not adapter and (Path(hf_dir) / "config.json").is_file():
        notes += attempt(lambda: check_weights(hf_dir, spec, needed=starting)) or []
    if spec is not None:
        model = spec
        attempt(lambda: check_rotary(model, cfg.max_model_len, f"{hf_dir}/config.json"))
        # Assumed lengths need a configuration that holds: its problems are told above.
        trees = {} if problems else expected_journals(cfg, spec)
        problems += [] if elsewhere else check_space(cfg, spec, trees)
        notes += describe_space(cfg, spec, trees)
    load = cfg.model.load
    if load is not None and not elsewhere and is_megatron_lm(Path(load)):
        attempt(lambda: find_iteration(Path(load)))
        if cfg.needs_reference:
            attempt(lambda: check_stays(Path(load)))
    problems += check_directories(cfg) + check_plugins(cfg) + check_sinks(cfg, starting=starting)
    problems += check_stop_file(cfg) if starting else []
    attempt(lambda: check_verifier(cfg.data.verifier))
    problems += check_functions(cfg.reward.functions)
    (problems if starting else notes).extend(missing_tokens(cfg))
    for source in [*cfg.data.train, *cfg.data.eval]:
        if source.reasoning_gym is not None:
            attempt(lambda source=source: check_gym(source, make_one=not starting))  # type: ignore[misc]  # no default
    tried, said = try_sources(
        [*cfg.data.train, *cfg.data.eval],
        cfg.data,
        hf_dir,
        spec.vocab_size if spec is not None else None,
        tokenizer_needed=starting or any(Path(hf_dir).glob("*.safetensors")),
    )
    problems += [problem for problem in tried if problem not in problems]
    notes += said
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


def check_gym(source: PromptSource, *, make_one: bool) -> None:
    """Raise GymError for a reasoning-gym source that cannot be made. `make_one`: its first item is, in a second or two.

    A start makes all of them right after, and a laptop that only plans may lack the library.
    """
    for key in ("seed", "size"):
        if key in source.params:
            raise GymError(
                f"reasoning_gym: {source.reasoning_gym}: params has {key} {source.params[key]!r}; set {key} beside "
                "params, where it is a key of the source"
            )
    if source.seed + source.size > LARGEST_SEED:
        raise GymError(
            f"reasoning_gym: {source.reasoning_gym}: seed {source.seed} + size {source.size} exceeds {LARGEST_SEED}, "
            "the largest seed that every task takes: each item has the next one"
        )
    if make_one and source.reasoning_gym and importlib.util.find_spec("reasoning_gym"):
        make_items(source.reasoning_gym, source.params, seed=source.seed, size=1)
