"""The whole configuration: one typed tree, read from YAML and dotted overrides.

    cfg = load_config("examples/tiny_cpu.yaml", ["train.lr=3e-4", "parallel.tensor_model_parallel_size=2"])

The keys are defined and documented in `config/sections.py` (`treepo-mega train --help-config` prints them). An
unknown key is an error that names the nearest known one. `check(cfg, world_size, hf)` applies the
rules that join several keys (`config/rules.py`): world size, divisibility, batch sizes. This module
imports neither torch nor megatron nor vLLM, so that planning and `--dry-run` work anywhere.

What counts as a sample: one *trajectory* (a root-to-leaf path). A tree with `n_samples_per_prompt`
leaves counts as that many samples, whatever it shares, so that

    rollout_batch_size * n_samples_per_prompt = global_batch_size * num_steps_per_rollout

means the same for trees and for plain sampling. Mini-batches never split a prompt.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from treepo_mega.config.rules import check_batch, check_loss, check_model, check_parallel, check_sampling
from treepo_mega.config.sections import (
    AlgoConfig,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    ReshardConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    TrainConfig,
)
from treepo_mega.errors import TreepoError


class ConfigError(TreepoError):
    """The configuration cannot be used; the message names the key, what was expected and the nearest name."""


class Config(Section):
    """A run."""

    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reshard: ReshardConfig = Field(default_factory=ReshardConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    algo: AlgoConfig = Field(default_factory=AlgoConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)

    def model_post_init(self, _: Any) -> None:
        """Derive what follows from other keys, so that the saved configuration is complete."""
        r, t = self.rollout, self.train
        if t.global_batch_size is None:
            t.global_batch_size = max(1, r.rollout_batch_size * r.n_samples_per_prompt // t.num_steps_per_rollout)
        if r.engine.dtype is None:
            r.engine.dtype = self.model.params_dtype
        largest, mean = (1e-3, 5e-5) if r.engine.dtype == self.model.params_dtype == "fp32" else (2.0, 0.15)
        if r.engine.quantization:
            largest, mean = 4.0, 0.4
        if r.engine.canary_max_abs_diff is None:
            r.engine.canary_max_abs_diff = largest
        if r.engine.canary_mean_abs_diff is None:
            r.engine.canary_mean_abs_diff = mean
        head = self.loss.head
        if head.precision is None:
            head.precision = self.model.params_dtype
        if head.logprob_precision is None:
            head.logprob_precision = head.precision
        if self.algo.use_tis is None:
            low = {r.engine.dtype, self.model.params_dtype, head.logprob_precision} != {"fp32"}
            self.algo.use_tis = low or r.partial_rollout is not None
        if self.algo.whiten_advantages is None:
            self.algo.whiten_advantages = self.algo.advantage_estimator.startswith(("treepo", "reinforce"))
        if self.checkpoint.save is None:
            self.checkpoint.save = str(Path(self.logging.run_dir) / "checkpoints")
        if t.lr_decay_iters is None:
            t.lr_decay_iters = t.num_rollouts * t.num_steps_per_rollout

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest prompt plus the longest response: the engine's window."""
        return self.data.max_prompt_len + self.rollout.max_response_len


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, eq, value = text.partition("=")
    if not eq or not key.strip():
        raise ConfigError(f"override {text!r}: expected key=value, such as train.lr=1e-6")
    try:
        parsed = yaml.safe_load(value) if value else ""
    except yaml.YAMLError as e:
        raise ConfigError(f"override {text!r}: the value is not YAML: {e}") from None
    # YAML 1.1 reads 1e-6 (no dot) as a string; people mean a number.
    if isinstance(parsed, str):
        with contextlib.suppress(ValueError):  # not a number after all: it stays the string it is
            parsed = float(parsed) if any(c in parsed for c in "eE.") else parsed
    return key.strip().lstrip("+").split("."), parsed


def _set(tree: dict[str, Any], path: list[str], value: Any, text: str) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {text!r}: {part!r} is a value, not a section")
    tree[path[-1]] = value


def _known_names(loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the section in which the unknown key `loc[-1]` was written."""
    section: Any = Config
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        section = next((a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")), annotation)
    return list(section.model_fields)


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for e in error.errors():
        key = ".".join(str(p) for p in e["loc"])
        if e["type"] == "extra_forbidden":
            names = _known_names(e["loc"])
            near = difflib.get_close_matches(str(e["loc"][-1]), names, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"
            lines.append(f"{key}: unknown key; {hint}")
        elif e["type"] == "missing":
            lines.append(f"{key}: required, but not set")
        else:
            lines.append(f"{key}: {e['msg']} (got {e.get('input')!r})")
    return f"{source}: " + "; ".join(lines)


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read YAML file `path` (None: only overrides), apply `a.b=c` overrides, validate.

    Raises ConfigError naming the file, the key, what was expected and the nearest valid name.
    """
    raw: Any = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"{path}: cannot read the configuration: {e.strerror or e}") from None
        try:
            raw = yaml.safe_load(text) or {}
        except yaml.YAMLError as e:
            raise ConfigError(f"{path}: not valid YAML: {e}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: expected a mapping of sections, got {type(raw).__name__}")
    for text in overrides:
        keys, value = _parse_override(text)
        _set(raw, keys, value, text)
    return parse_config(raw, str(path or "overrides"))


def parse_config(raw: dict[str, Any], source: str = "config") -> Config:
    """Validate a plain dict; see `load_config` for the errors."""
    try:
        return Config.model_validate(_numbers(raw))
    except ValidationError as e:
        raise ConfigError(_explain(e, source)) from None


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads `1e-6` as a string: turn such strings into numbers, everywhere in the tree."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str) and value[:1] in "+-0123456789." and any(c in value for c in "eE"):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def dump_config(cfg: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML; `load_config` reads it back to an equal Config."""
    Path(path).write_text(yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def read_hf_config(hf_dir: str | Path) -> dict[str, Any]:
    """The model's config.json in `hf_dir`, with the sizes that `check` needs; weights need not be there.

    Raises ConfigError naming the file and what is missing.
    """
    path = Path(hf_dir) / "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"model.hf_checkpoint: cannot read {path}: {e.strerror or e}") from None
    except json.JSONDecodeError as e:
        raise ConfigError(f"{path}:{e.lineno}: not valid JSON: {e.msg}") from None
    needed = ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    if not isinstance(hf, dict) or (missing := [n for n in needed if not isinstance(hf.get(n), int)]):
        what = ", ".join(missing) if isinstance(hf, dict) else "a mapping"
        raise ConfigError(f"{path}: expected a transformers model configuration; missing or not an integer: {what}")
    return hf


def batch_invariant(cfg: Config) -> str:
    """The batch sizes as one line for people; `check` verifies it."""
    r, t = cfg.rollout, cfg.train
    return (
        f"{r.rollout_batch_size} prompts x {r.n_samples_per_prompt} trajectories "
        f"= {t.global_batch_size} trajectories x {t.num_steps_per_rollout} optimizer steps per rollout"
    )


def data_parallel_size(cfg: Config, world_size: int) -> int:
    """Megatron's data-parallel size; ConfigError when the world size does not fit."""
    p = cfg.parallel
    size = p.model_parallel_size
    if world_size % size:
        raise ConfigError(
            f"world size {world_size} is not a multiple of tensor_model_parallel_size {p.tensor_model_parallel_size} x "
            f"pipeline_model_parallel_size {p.pipeline_model_parallel_size} x context_parallel_size "
            f"{p.context_parallel_size} = {size}: start {size}, {2 * size}, ... processes"
        )
    return world_size // size


def check(cfg: Config, world_size: int, hf: dict[str, Any] | None = None) -> list[str]:
    """Verify the rules that join keys, for `world_size` processes and, if given, the model's config.json `hf`.

    Returns notes for people (the batch invariant, sizes). Raises ConfigError listing every broken rule.
    """
    bad: list[str] = []
    dp = 0
    try:
        dp = data_parallel_size(cfg, world_size)
    except ConfigError as e:
        bad.append(str(e))
    bad += check_batch(cfg) + check_sampling(cfg, world_size) + check_parallel(cfg) + check_loss(cfg)
    if hf is not None:
        bad += check_model(cfg, hf)
    if bad:
        raise ConfigError("\n  ".join(["the configuration does not fit:", *bad]))
    p = cfg.parallel
    return [
        f"world size {world_size} = TP {p.tensor_model_parallel_size} x PP {p.pipeline_model_parallel_size}"
        f" x CP {p.context_parallel_size} x DP {dp}; engines {world_size // cfg.rollout.engine.tensor_parallel_size}"
        f" x TP_v {cfg.rollout.engine.tensor_parallel_size}",
        batch_invariant(cfg),
    ]
