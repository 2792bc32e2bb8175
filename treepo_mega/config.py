"""The whole configuration: one typed tree, read from YAML and dotted overrides.

    cfg = load_config("examples/tiny_cpu.yaml", ["train.lr=3e-4", "parallel.tensor_model_parallel_size=2"])

Every key below is documented where it is defined (`treepo-mega train --help-config` prints them). An
unknown key is an error that names the nearest known one. `check(cfg, world_size, hf)` applies the
rules that join several keys (`config_rules.py`): world size, divisibility, batch sizes. This module
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
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from treepo_mega.config_rules import check_batch, check_model, check_parallel, check_sampling


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key, what was expected and the nearest name."""


class Section(BaseModel):
    """Base of every section: unknown keys are refused, fields are documented by their docstrings."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class ModelConfig(Section):
    """The policy."""

    hf_checkpoint: str
    """Directory with config.json, *.safetensors and the tokenizer (Llama, Qwen2/2.5, Qwen3)."""
    load: str | None = None
    """Megatron checkpoint with the initial weights (from convert_hf_to_mcore.py); None: read hf_checkpoint."""
    params_dtype: Literal["fp32", "bf16"] = "fp32"
    """Parameter and activation dtype of actor and reference. Optimizer state is always fp32."""
    make_vocab_size_divisible_by: int = Field(128, ge=1)
    """The vocabulary is padded to a multiple of this times tensor_model_parallel_size."""


class ParallelConfig(Section):
    """Megatron-Core layout; data-parallel size is what is left of the world size."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    pipeline_model_parallel_size: int = Field(1, ge=1)
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    """Model chunks per pipeline rank (interleaved schedule); None: one chunk."""
    context_parallel_size: int = Field(1, ge=1)
    sequence_parallel: bool = False
    """Shard activations along the sequence between tensor-parallel regions (needs TP > 1)."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = Field(None, ge=1)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: TP * PP * CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


class PromptSource(Section):
    """Where prompts come from: a file, or a reasoning-gym task. Exactly one of `path` and `reasoning_gym`."""

    path: str | None = None
    """A .jsonl or .parquet file; `file.jsonl@[a:b]` takes rows a to b."""
    reasoning_gym: str | None = None
    """Name of a reasoning-gym dataset, such as chain_sum."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reasoning-gym dataset."""
    size: int = Field(512, ge=1)
    """Items to draw from a reasoning-gym task."""
    seed: int = 0
    verifier: str | None = None
    """Overrides data.verifier for this source."""


class DataConfig(Section):
    """Prompts and how to read them."""

    train: list[PromptSource] = Field(min_length=1)
    eval: list[PromptSource] = Field(default_factory=list)
    input_key: str = "prompt"
    """Key of the prompt, dots reach inside; with the default, messages, question, problem and input are tried too."""
    label_key: str = "answer"
    """Key of the ground truth; with the default, label, ground_truth, solution and reward_model.ground_truth are
    tried too."""
    apply_chat_template: bool = False
    """Wrap the prompt with the tokenizer's chat template (a list of messages is always wrapped)."""
    system_prompt: str | None = None
    prompt_suffix: str = ""
    """Text appended to every prompt before the template, such as an answer-format instruction."""
    verifier: str = "math"
    """math | boxed | last_number | exact | reasoning_gym | path/to/file.py:function (verl's compute_score).
    A source's own verifier comes first; reasoning_gym sources without one use reasoning_gym."""
    max_prompt_len: int = Field(1024, ge=1)
    """Longer prompts are dropped, counted and reported. Tokens."""
    shuffle: bool = True


class EngineConfig(Section):
    """vLLM, co-located in the trainer's processes."""

    tensor_parallel_size: int = Field(1, ge=1)
    """Ranks that share one engine (TP_v). 1: an engine a rank."""
    dtype: Literal["fp32", "bf16"] | None = None
    """None: model.params_dtype."""
    block_size: int = Field(32, ge=1)
    """KV-cache block, tokens. The CPU kernels take multiples of 32."""
    max_num_seqs: int = Field(256, ge=1)
    max_num_batched_tokens: int = Field(8192, ge=1)
    kv_cache_memory_mb: int = Field(64, ge=1)
    """KV-cache size on CPU, MiB per engine."""
    gpu_memory_utilization: float = Field(0.6, gt=0, lt=1)
    """Share of a GPU's memory for the engine (CUDA only)."""
    enforce_eager: bool = True
    canary_max_abs_diff: float | None = Field(None, gt=0)
    """After each refit the engine's logprobs of a fixed prompt may differ from the actor's by this much, nats;
    None: 1e-3 when both are fp32, else 1 (random tokens are improbable, and bf16 rounds their logits coarsely)."""


class StopConfig(Section):
    """When a path ends, besides the length and depth limits."""

    eos_token_ids: list[int] | None = None
    """None: from generation_config.json, config.json and the tokenizer."""
    answer_box: bool = True
    """End a path once its response holds a closed \\boxed{...}, also across segment borders."""
    repetition_window: int = Field(32, ge=0)
    """Characters; a window of this size seen repetition_count times (in the new segment and the window * count
    characters before it) ends the path. 0: off."""
    repetition_count: int = Field(8, ge=2)


class RolloutConfig(Section):
    """Sampling."""

    mode: Literal["tree", "sequential"] = "tree"
    """tree: TreePO's segment trees. sequential: n independent samples a prompt, through the same code."""
    rollout_batch_size: int = Field(16, ge=1)
    """Prompts trained on per rollout step."""
    n_samples_per_prompt: int = Field(16, ge=1)
    """Leaves per tree (the paper's width w)."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = 1.0
    top_k: int = -1
    max_response_len: int = Field(1024, ge=1)
    """Tokens."""
    segment_length: int = Field(512, ge=1)
    """Tokens sampled between two branch points (the paper's l)."""
    max_depth: int | None = Field(None, ge=1)
    """Segments on a path; None: ceil(max_response_len / segment_length)."""
    branch_factor: int = Field(2, ge=1)
    """Children of a node while budget lasts (the paper's N)."""
    initial_branches: tuple[int, int] | None = None
    """[lo, hi]: children of the root, drawn per prompt; None: branch_factor."""
    budget: Literal["equal", "low_prob", "high_prob"] = "equal"
    """Who gets the branches: every path alike, or more for paths whose newest segment the model found improbable
    (low_prob) or probable (high_prob). The paper found equal at least as good as both."""
    budget_temperature: float = Field(2.0, gt=0)
    """Of the softmax over mean segment logprobs (nats a token) in low_prob and high_prob; higher is more equal."""
    transfer: Literal["level", "quota"] = "level"
    """level: branches of stopped paths go to their living siblings, level by level (a tree waits only for itself).
    quota: every node has a quota of leaves, which its children share; they start when their parent ends. What paths
    that stopped early leave over is spent by fallback once nothing of the tree is running."""
    fallback: Literal["finished", "any", "longest", "none"] = "finished"
    """Which ended paths are cut back and resampled when a tree ran dry before it had all its leaves."""
    fallback_cut: Literal["random", "low_prob"] = "random"
    """Where they are cut: at a random segment border before the end, or at the border behind which the path's first
    token had the lowest logprob."""
    dynamic_sampling: bool = True
    """Drop prompts whose rewards are all equal, and refill from new prompts."""
    max_refills: int = Field(2, ge=0)
    """Extra generation rounds per step before training goes on with fewer prompts."""
    timeout_s: float = Field(1800, gt=0)
    """Deadline of a generation phase, seconds; the error names what is missing."""
    stop: StopConfig = Field(default_factory=StopConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)

    @property
    def depth_limit(self) -> int:
        """Segments allowed on a path: 1 in sequential mode."""
        if self.mode == "sequential":
            return 1
        return self.max_depth or math.ceil(self.max_response_len / self.segment_length)

    @property
    def segment_tokens(self) -> int:
        """Tokens allowed in one segment: the whole response in sequential mode."""
        return self.max_response_len if self.mode == "sequential" else self.segment_length


class RewardConfig(Section):
    """Grading, in killable worker processes."""

    num_workers: int = Field(1, ge=1)
    """Grader processes per rank."""
    timeout_s: float = Field(10.0, gt=0)
    """Deadline of one grading; a worker past it is killed, replaced and the sample counted as lost."""
    max_chars: int = Field(20_000, ge=16)
    """Longer responses are graded by their last max_chars characters."""
    startup_timeout_s: float = Field(120.0, gt=0)
    """Deadline of starting a worker and importing its verifier (math-verify and reasoning-gym take seconds)."""
    memory_mb: int = Field(4096, ge=256)
    """Address space of one worker, MiB; an allocation beyond it fails and the sample counts as lost."""


class AlgoConfig(Section):
    """Advantages and loss."""

    advantage_estimator: Literal["treepo", "treepo_size_weighted", "grpo", "rloo"] = "treepo"
    reject_zero_std_subgroups: bool = False
    """TreePO eq. 7: skip subgroups whose rewards are all equal."""
    whiten_advantages: bool | None = None
    """Token-weighted mean 0 and standard deviation 1 over the rollout; None: on for the treepo estimators."""
    eps_clip: float = Field(0.2, gt=0, lt=1)
    eps_clip_high: float = Field(0.28, gt=0)
    eps_clip_c: float | None = Field(10.0, gt=1)
    """Dual clip: bound of the ratio for negative advantages; None: off."""
    kl_loss_coef: float = Field(0.0, ge=0)
    """Weight of KL(actor || reference); 0: no reference model is built."""
    kl_loss_type: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    loss_agg_mode: Literal["token-mean"] = "token-mean"
    """token-mean: sum over all (trajectory, token) pairs of the global batch / their number."""
    use_tis: bool | None = None
    """Truncated importance sampling against the engine's logprobs; None: on when the two precisions differ."""
    tis_clip: float = Field(2.0, gt=0)


class TrainConfig(Section):
    """The optimisation."""

    num_rollouts: int = Field(100, ge=1)
    """Rollout steps in the whole run."""
    num_steps_per_rollout: int = Field(1, ge=1)
    """Optimizer steps (mini-batches) per rollout."""
    global_batch_size: int | None = Field(None, ge=1)
    """Trajectories per optimizer step; None: derived from the batch invariant."""
    max_tokens_per_gpu: int = Field(4096, ge=1)
    """Tokens in one micro-batch of one data-parallel rank."""
    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_iters: int = Field(0, ge=0)
    lr_decay_iters: int | None = Field(None, ge=1)
    """Optimizer steps over which lr decays; None: the whole run."""
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = Field(1.0, ge=0)
    seed: int = 1234
    max_skipped_steps: int = Field(3, ge=1)
    """Consecutive optimizer steps with a non-finite gradient before the run stops with a diagnosis."""
    logprob_chunk_size: int = Field(1024, ge=1)
    """Rows of [rows, V/tp] logits alive at a time in the loss head."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    save: str | None = None
    """Directory of checkpoints; None: <run_dir>/checkpoints. An empty string: never save."""
    load: str | None = "auto"
    """auto: resume from the newest complete checkpoint under `save`, if any; a path; or null: start afresh."""
    save_interval: int = Field(10, ge=1)
    keep_last: int = Field(2, ge=1)
    save_hf: bool = False
    """Also export Hugging Face safetensors at the end of the run, under <run_dir>/hf."""


class EvalConfig(Section):
    """Evaluation on data.eval with the same engine."""

    interval: int = Field(0, ge=0)
    """Every that many rollout steps; 0: only where at_start and at_end say."""
    at_start: bool = False
    at_end: bool = False
    n_samples_per_prompt: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0)
    greedy: bool = False
    """Also report greedy accuracy."""
    max_prompts: int | None = Field(None, ge=1)


class LoggingConfig(Section):
    """Where a run writes."""

    run_dir: str = "runs/default"
    tensorboard: bool = True
    trees_interval: int = Field(0, ge=0)
    """Every that many steps the forest is written to <run_dir>/trees/step_N.jsonl, one tree a line; 0: never."""
    progress: bool = True
    """Progress bars on the console (rank 0)."""


class DistributedConfig(Section):
    """Processes and deadlines."""

    timeout_s: float = Field(600, gt=0)
    """Deadline of a collective or barrier, seconds."""


class Config(Section):
    """A run."""

    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    algo: AlgoConfig = Field(default_factory=AlgoConfig)
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
        if r.engine.canary_max_abs_diff is None:
            r.engine.canary_max_abs_diff = 1e-3 if r.engine.dtype == self.model.params_dtype == "fp32" else 1.0
        if self.algo.use_tis is None:
            self.algo.use_tis = r.engine.dtype != self.model.params_dtype or self.model.params_dtype == "bf16"
        if self.algo.whiten_advantages is None:
            self.algo.whiten_advantages = self.algo.advantage_estimator.startswith("treepo")
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
    bad += check_batch(cfg) + check_sampling(cfg, world_size) + check_parallel(cfg)
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
