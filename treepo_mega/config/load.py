"""The whole configuration: one typed tree, read from YAML and dotted overrides.

    cfg = load_config("examples/tiny_cpu.yaml", ["train.lr=3e-4", "parallel.tensor_model_parallel_size=2"])

The keys are defined and documented section by section beside this file (`treepo-mega train --help-config` prints
them). An unknown key is an error that names the nearest known one. A key that has moved (`moved`) is an error that
names its new place. `check(cfg, world_size, spec)` applies the rules that join several keys (`rules.py`,
`surroundings.py`). This module imports neither torch nor megatron nor vLLM, so that planning and `--dry-run` work
anywhere.

A sample is one *trajectory* (a root-to-leaf path). A tree with `n_samples_per_prompt` leaves counts as that many
samples, whatever it shares, so that

    rollout_batch_size * n_samples_per_prompt = global_batch_size * num_steps_per_rollout

means the same for trees and for plain sampling. Mini-batches never split a prompt.
"""

from __future__ import annotations

import contextlib
import json
import re
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from treepo_mega.config.moved import KNOWN_ELSEWHERE, moved_keys
from treepo_mega.config.presets import expand_preset
from treepo_mega.config.root import Config
from treepo_mega.config.rules import check_batch, check_faults, check_loss, check_parallel, check_sampling
from treepo_mega.config.rules_environment import check_environment
from treepo_mega.config.section import Section
from treepo_mega.config.servers import check_servers
from treepo_mega.config.source import SourceError, annotation_at, members, read_mapping, read_value, scalar_is_text
from treepo_mega.config.surroundings import check_data, check_evaluation, check_model
from treepo_mega.errors import TreepoError, nearest, nearest_name
from treepo_mega.modelspec.spec import ModelSpec


class ConfigError(TreepoError):
    """The configuration cannot be used; the message names the key, what was expected and the nearest name."""


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, eq, value = text.partition("=")
    if not eq or not key.strip():
        raise ConfigError(f"override {text!r}: expected key=value, such as train.lr=1e-6")
    path = key.strip().lstrip("+").split(".")
    try:
        return path, read_value(value, tuple(path), Config)
    except SourceError as error:
        raise ConfigError(str(error)) from None


def _set(tree: dict[str, Any], path: list[str], value: Any, text: str) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {text!r}: {part!r} is a value, not a section")
    tree[path[-1]] = value


def section_in(annotation: Any) -> type[Section] | None:
    """The section that `annotation` is, or is a list of; None for a plain value."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, Section)), None)


def _known_names(loc: tuple[Any, ...]) -> list[str]:
    """Names of the keys of the section in which the unknown key `loc[-1]` was written."""
    section: type[Section] = Config
    for part in loc[:-1]:
        if not isinstance(part, int):
            inner = section_in(section.model_fields[section.attribute_of(part)].annotation)
            assert inner is not None, f"{part} holds no keys"
            section = inner
    return list(section.key_names())


def _unknown(loc: tuple[Any, ...]) -> str:
    """What to say about the unknown key at `loc`."""
    name = str(loc[-1])
    if name in KNOWN_ELSEWHERE:
        return f"not a key of this trainer: {KNOWN_ELSEWHERE[name]}"
    names = _known_names(loc)
    # A slip in another trainer's name is nearer to that name than to any of ours.
    foreign = nearest_name(name, [*names, *KNOWN_ELSEWHERE], cutoff=0.8)
    if foreign in KNOWN_ELSEWHERE:
        return f"unknown key, like {foreign!r}, which is not a key of this trainer: {KNOWN_ELSEWHERE[foreign]}"
    return f"unknown key{nearest(name, names) or '; known here: ' + ', '.join(names)}"


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    wrong: dict[tuple[Any, ...], list[Any]] = {}
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: {_unknown(problem['loc'])}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: required, but not set")
        else:
            wrong.setdefault(_without_member(problem["loc"]), []).append(problem)
    lines += [_wrong_value(loc, problems) for loc, problems in wrong.items()]
    return f"{source}: " + "; ".join(lines)


def _without_member(loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """Where a value stands. A key of several types has an error for each, whose place ends with the type's name."""
    for end in range(len(loc), 0, -1):
        if annotation_at(Config, loc[:end]) is not None:
            return loc[:end]
    return loc


def _wrong_value(loc: tuple[Any, ...], problems: list[Any]) -> str:
    """What was expected at `loc` in place of the value there, with the nearest word that is allowed."""
    got = problems[0].get("input")
    # The words last: the value stands behind them.
    first, *others = [problem["msg"] for problem in sorted(problems, key=lambda p: p["type"] == "literal_error")]
    expected = ", or ".join([first, *(message.removeprefix("Input should be ") for message in others)])
    choices = [
        choice
        for member in members(annotation_at(Config, loc))
        if typing.get_origin(member) is Literal
        for choice in typing.get_args(member)
    ]
    hint = nearest(got, map(str, choices)) if isinstance(got, str) else ""
    # The user and password of a URL are nobody's business.
    shown = re.sub(r"(?<=://)[^/@\s]+@", "***@", repr(got))
    return f"{'.'.join(map(str, loc))}: {expected} (got {shown}){hint}"


def _refuse_moved(raw: dict[str, Any], source: str) -> None:
    if moved := moved_keys(raw):
        raise ConfigError(f"{source}: " + "; ".join(moved))


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read YAML file `path` (None: only overrides), apply `a.b=c` overrides, validate.

    Raises ConfigError naming the file, the key, what was expected and the nearest valid name.
    """
    raw: Any = {}
    if path is not None:
        try:
            # utf-8-sig: an editor's byte-order mark is no part of the first key.
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as e:
            raise ConfigError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}): save it as UTF-8") from None
        except OSError as e:
            raise ConfigError(f"{path}: cannot read the configuration: {e.strerror or e}") from None
        try:
            raw = read_mapping(text, str(path), Config) or {}
        except SourceError as e:
            raise ConfigError(str(e)) from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: expected a mapping of sections, got {type(raw).__name__}")
    _refuse_moved(raw, str(path))
    for text in overrides:
        keys, value = _parse_override(text)
        _set(raw, keys, value, text)
    return parse_config(raw, str(path or "overrides"))


def parse_config(raw: dict[str, Any], source: str = "config") -> Config:
    """Validate a plain dict; see `load_config` for the errors."""
    _refuse_moved(raw, source)
    try:
        return Config.model_validate(_numbers(expand_preset(raw)))
    except ValidationError as e:
        raise ConfigError(_explain(e, source)) from None


def _numbers(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """YAML 1.1 reads `1e-6` as a string: turn such strings into numbers, except in keys that take text."""
    if isinstance(value, dict):
        return {key: _numbers(inner, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner, (*path, index)) for index, inner in enumerate(value)]
    if isinstance(value, str) and value[:1] in tuple("+-0123456789.") and any(char in value for char in "eE"):
        # A name such as `1e5-model` is no number: what the key takes decides, not how the value looks.
        annotation = annotation_at(Config, path)
        if annotation is not None and scalar_is_text(annotation):
            return value
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def dump_text(cfg: Config) -> str:
    """The whole configuration as YAML: a derived value is null, and its comment says what was derived.

    >>> cfg = parse_config({"model": {"hf_checkpoint": "m"}, "data": {"train": [{"path": "t.jsonl"}]}})
    >>> [line.strip() for line in dump_text(cfg).splitlines() if "global_batch_size" in line]
    ['global_batch_size: null  # derived: 256']
    """
    # One line a value, however long: YAML's folding would put the comment inside the text.
    lines = yaml.safe_dump(cfg.as_set(), sort_keys=False, width=10**6).splitlines()
    sections: list[str] = []
    for number, line in enumerate(lines):
        name = line.strip().partition(":")[0]
        depth = (len(line) - len(line.lstrip())) // 2
        sections = [*sections[:depth], name]
        key = ".".join(sections)
        if key in cfg.derived and line.endswith(": null"):
            lines[number] = f"{line}  # derived: {json.dumps(cfg.derived[key])}"
    return "\n".join(lines) + "\n"


def dump_config(cfg: Config, path: str | Path) -> None:
    """Write `dump_text` to `path`; `load_config` reads it back to an equal Config."""
    Path(path).write_text(dump_text(cfg), encoding="utf-8")


def batch_invariant(cfg: Config) -> str:
    """The batch sizes as one line for people; `check` verifies it."""
    rollout = cfg.rollout
    train = cfg.train
    passes = "" if train.ppo_epochs == 1 else f", {train.ppo_epochs} times over"
    return (
        f"{rollout.rollout_batch_size} prompts x {rollout.n_samples_per_prompt} trajectories "
        f"= {train.global_batch_size} trajectories x {train.num_steps_per_rollout} optimizer steps per rollout{passes}"
    )


def data_parallel_size(cfg: Config, world_size: int) -> int:
    """Megatron's data-parallel size; ConfigError when the world size does not fit."""
    parallel = cfg.parallel
    size = parallel.model_parallel_size
    if world_size % size:
        raise ConfigError(
            f"world size {world_size} is not a multiple of "
            f"tensor_model_parallel_size {parallel.tensor_model_parallel_size} x "
            f"pipeline_model_parallel_size {parallel.pipeline_model_parallel_size} x context_parallel_size "
            f"{parallel.context_parallel_size} = {size}: start {size}, {2 * size}, ... processes"
        )
    # Experts divide the ranks of a stage anew.
    stage = world_size // parallel.pipeline_model_parallel_size
    experts = parallel.expert_tensor_size * parallel.expert_model_parallel_size
    if parallel.expert_model_parallel_size > 1 and stage % experts:
        raise ConfigError(
            f"the {stage} ranks of a pipeline stage (world size {world_size} / pipeline_model_parallel_size "
            f"{parallel.pipeline_model_parallel_size}) are not a multiple of expert_tensor_parallel_size "
            f"{parallel.expert_tensor_size} x expert_model_parallel_size {parallel.expert_model_parallel_size} = "
            f"{experts}"
        )
    return world_size // size


def check(cfg: Config, world_size: int, spec: ModelSpec | None = None) -> list[str]:
    """Verify the rules that join keys, for `world_size` processes and, if given, the model `spec`.

    Returns notes for people (the batch invariant, sizes). Raises ConfigError listing every broken rule.
    """
    # Every broken rule at once: a start on a cluster costs more than a reading of the file.
    bad: list[str] = []
    dp = 0
    try:
        dp = data_parallel_size(cfg, world_size)
    except ConfigError as e:
        bad.append(str(e))
    bad += check_batch(cfg) + check_sampling(cfg, world_size) + check_parallel(cfg) + check_loss(cfg)
    bad += check_data(cfg) + check_evaluation(cfg) + check_servers(cfg)
    bad += check_faults(cfg, world_size) + check_environment(cfg)
    if spec is not None:
        bad += check_model(cfg, spec)
    if bad:
        raise ConfigError("\n  ".join(["the configuration does not fit:", *bad]))
    parallel = cfg.parallel
    engine_tp = cfg.rollout.engine.tensor_parallel_size
    experts = f" (EP {parallel.expert_model_parallel_size})" if parallel.expert_model_parallel_size > 1 else ""
    return [
        f"world size {world_size} = TP {parallel.tensor_model_parallel_size}"
        f" x PP {parallel.pipeline_model_parallel_size} x CP {parallel.context_parallel_size} x DP {dp}{experts};"
        f" engines {world_size // engine_tp} x TP_v {engine_tp}",
        batch_invariant(cfg),
    ]
