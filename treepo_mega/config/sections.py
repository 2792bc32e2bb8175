"""The sections of the configuration: every key, typed and documented where it is defined.

`config.py` joins them into one `Config`, reads YAML and overrides, and derives what follows from other keys. A
field's docstring is what `treepo-mega train --help-config` prints; units stand there. Pure: no torch, no Megatron,
no vLLM.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


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
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Modules of the transformer layers: Megatron's own, or Transformer Engine's with norms fused into the linear
    layers (a GPU only; refused elsewhere). Attention over trees is the same in both."""
    gradient_accumulation_fusion: Literal["auto"] | bool = "auto"
    """Weight gradients are added to their fp32 buffers by the matrix product itself: Apex's kernel (local layers) or
    Transformer Engine's, on a GPU. auto: where the kernel is there. true: refused where it is not."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """FP8 products in the transformer layers (Transformer Engine on a GPU; refused elsewhere). hybrid: e5m2 gradients.
    The output layer has its own setting, loss.head."""
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8", "delayed"] = "tensorwise"
    """How the layers' operands are scaled (Megatron's names): by tensor, by blocks (Hopper on), by 32 (Blackwell)."""
    first_last_layers_bf16: bool = False
    """With fp8: the first and the last transformer layer stay in bf16."""


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
    reference_key: str = "solution"
    """Key of a reference text (a worked solution), whose perplexity under the actor is reported at evaluation; with the
    default, target and completion are tried too, and an answer in GSM8K's form (`reasoning`, then `#### 42`). verl's
    GSM8K files have it in extra_info.answer. Rows without one are left out."""
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
    quantization: Literal["fp8_per_tensor", "fp8_per_block", "fp8_per_channel"] | None = None
    """FP8 in the engine's linear layers, by vLLM's names: weights are quantised anew by each refit, activations as they
    come. The trainer keeps its own precision, so algo.use_tis is on. On a CPU fp8_per_channel, with AMX also
    fp8_per_block."""
    block_size: int = Field(32, ge=1)
    """KV-cache block, tokens. The CPU kernels take multiples of 32."""
    copy_partial_blocks: bool = True
    """A branch inside a KV block copies the block's beginning from where it was computed (engine/branch_cache.py).
    false: computes it again, as vLLM alone would. Models whose layers do not all attend to everything need false."""
    max_num_seqs: int = Field(256, ge=1)
    max_num_batched_tokens: int = Field(8192, ge=1)
    kv_cache_memory_mb: int = Field(64, ge=1)
    """KV-cache size on CPU, MiB per engine."""
    gpu_memory_utilization: float = Field(0.6, gt=0, lt=1)
    """Share of a GPU's memory for the engine (CUDA only)."""
    enforce_eager: bool = True
    canary_max_abs_diff: float | None = Field(None, gt=0)
    """After each refit the engine's logprobs of fixed random tokens may differ from the actor's by this much, nats.
    None: 1e-3 when both are fp32, else 2, and 4 for a quantised engine. What is left when the weights agree is rounding
    in another order: in fp32 up to 1.5e-4, each side as far from fp64 as from the other and as transformers is; in bf16
    up to 0.9, in FP8 up to 1.5."""
    canary_mean_abs_diff: float | None = Field(None, gt=0)
    """The same for the mean over those tokens, which tells rounding from a wrong weight where the largest alone cannot.
    None: 5e-5 when both are fp32, else 0.15, and 0.4 for a quantised engine. Rounding, measured on a trained model: up
    to 6e-6 in fp32, 0.11 in bf16, 0.27 in FP8; a projection, norm or slice of a single layer in the wrong place: 0.19
    to 4.6 in either, 0.46 to 3.0 in FP8."""


class StopConfig(Section):
    """When a path ends, besides the length and depth limits."""

    eos_token_ids: list[int] | None = Field(None, min_length=1)
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
    temperature: float = Field(1.0, ge=0.01)
    """Of sampling, and of the logprobs trained on. The engine would take anything below 0.01 for 0.01."""
    top_p: float = 1.0
    top_k: int = -1
    max_response_len: int = Field(1024, ge=1)
    """Tokens."""
    segment_length: int = Field(512, ge=1)
    """Tokens sampled between two branch points (the paper's l); with another segment_end than length, the most."""
    segment_end: Literal["length", "newline", "sentence"] | list[str] = "length"
    """Where a segment ends. length: after segment_length tokens. newline, sentence, or a list of strings: at the first
    token from segment_min_length on whose text holds a newline, ends a sentence, or holds one of the strings, so that a
    segment is a step of reasoning; after segment_length tokens at the latest."""
    segment_min_length: int = Field(1, ge=1)
    """Tokens of the shortest segment when segment_end is not length."""
    segment_alignment: Literal["auto", "none", "kv_block"] = "auto"
    """kv_block: segments of segment_length are stretched (by less than a KV block) to end one token behind a block
    border, where resubmitting a path recomputes least without engine.copy_partial_blocks. auto: that, when block_size
    divides segment_length (then only the first segment of a path is stretched). none: never."""
    continue_paths: Literal["auto", "always", "never"] = "auto"
    """Sample a path that cannot branch any more in one go to its end, instead of resubmitting it segment by segment.
    auto: when segments do not end at KV-block borders, where resubmitting would copy or recompute part of a block."""
    max_depth: int | None = Field(None, ge=1)
    """Segments on a path; None: as many as max_response_len tokens of the shortest segments can be."""
    branch_factor: int = Field(2, ge=1)
    """Children of a node while budget lasts (the paper's N)."""
    initial_branches: tuple[int, int] | None = None
    """[lo, hi]: children of the root, drawn per prompt; None: branch_factor."""
    budget: Literal["equal", "low_prob", "high_prob", "entropy"] = "equal"
    """Who gets the branches: every path alike; more for paths which the model found improbable (low_prob) or probable
    (high_prob), by budget_signal; or more for paths whose next token is uncertain (entropy: of the budget_top_k
    likeliest next tokens at the branch point). The paper found equal at least as good as low_prob and high_prob."""
    budget_signal: Literal["segment", "branch_point"] = "segment"
    """Of low_prob and high_prob. segment: mean logprob of the newest segment's tokens (the paper's). branch_point:
    logprob of the likeliest next token behind it, for which one token more is sampled and dropped."""
    budget_top_k: int = Field(10, ge=1, le=20)
    """Next tokens that the entropy at a branch point is taken over (renormalised)."""
    budget_temperature: float = Field(2.0, gt=0)
    """Of the softmax over certainties (nats) in low_prob, high_prob and entropy; higher is more equal."""
    budget_temperature_end: float | None = Field(None, gt=0)
    """The temperature at the last of train.num_rollouts; None: constant. (The paper's Naive2Low: 5.0 to 1.0.)"""
    budget_temperature_schedule: Literal["linear", "cosine"] = "linear"
    """The way from budget_temperature to budget_temperature_end."""
    token_budget: int | None = Field(None, ge=1)
    """Tokens to sample a tree, instead of a fixed number of leaves (n_samples_per_prompt is then the most): a tree
    makes new branches only while its budget holds another segment_length; living paths are finished (transfer: level).
    """
    transfer: Literal["level", "quota"] = "level"
    """level: branches of stopped paths go to their living siblings, level by level (a tree waits only for itself).
    quota: every node has a quota of leaves, which its children share; they start when their parent ends. What paths
    that stopped early leave over is spent by fallback once nothing of the tree is running."""
    schedule: Literal["async", "level"] = "async"
    """async: no tree waits for another. level: the published schedule, one blocking call a level for all prompts; with
    transfer level the same trees, only slower. For comparison."""
    partial_rollout: int | None = Field(None, ge=1)
    """Tokens by which a path may grow in one step. A tree with longer paths is carried over and goes on in the next
    step, under the weights of then (Node.policy_version says which segment is whose); None: trees are finished."""
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
        shortest = self.segment_length if self.segment_end == "length" else self.segment_min_length
        return self.max_depth or math.ceil(self.max_response_len / shortest)

    @property
    def segment_tokens(self) -> int:
        """Tokens allowed in one segment: the whole response in sequential mode."""
        return self.max_response_len if self.mode == "sequential" else self.segment_length

    @property
    def alignment(self) -> int:
        """Tokens of the KV block that segments are aligned to; 0: they are not (see segment_alignment)."""
        fixed = self.mode == "tree" and self.segment_end == "length"
        divides = self.segment_length % self.engine.block_size == 0
        aligned = self.segment_alignment == "kv_block" or (self.segment_alignment == "auto" and divides)
        return self.engine.block_size if fixed and aligned else 0

    @property
    def continues(self) -> bool:
        """Whether paths that cannot branch any more are sampled in one go (see continue_paths)."""
        if self.mode == "sequential" or self.partial_rollout is not None:
            return False
        return self.continue_paths == "always" or (self.continue_paths == "auto" and not self.alignment)

    @property
    def peek(self) -> int:
        """Likeliest next tokens to look at behind a segment (`budget_top_k`, or 1); 0: the budget does not ask."""
        if self.mode == "sequential" or self.budget == "equal":
            return 0
        if self.budget == "entropy":
            return self.budget_top_k
        return 1 if self.budget_signal == "branch_point" else 0

    def budget_temperature_at(self, progress: float) -> float:
        """The budget's temperature when a share `progress` in [0, 1] of the run is done."""
        if self.budget_temperature_end is None:
            return self.budget_temperature
        x = min(max(progress, 0.0), 1.0)
        if self.budget_temperature_schedule == "cosine":
            x = 0.5 - 0.5 * math.cos(math.pi * x)
        return self.budget_temperature + x * (self.budget_temperature_end - self.budget_temperature)


class ReshardConfig(Section):
    """Moving weights from the actor into the engine."""

    bucket_mb: int = Field(64, ge=1)
    """Buffers of a refit: what a rank sends and receives in one round, MiB. Two rounds are in flight."""
    canary_prompts: int = Field(2, ge=1)
    """Fixed token sequences that engine and actor score after each refit."""
    canary_failure: Literal["stop", "warn"] = "stop"
    """When rollout.engine.canary_max_abs_diff or canary_mean_abs_diff is exceeded: end the run, or print, count and go
    on."""


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

    advantage_estimator: Literal["treepo", "treepo_size_weighted", "segment", "grpo", "rloo", "reinforce_pp"] = "treepo"
    """segment: V(child) - V(parent) per node, V the mean reward of the leaves below; the others: one number a leaf."""
    segment_sqrt_n: bool = False
    """Divide a node's segment advantage by the square root of the leaves below it."""
    reject_zero_std_subgroups: bool = False
    """TreePO eq. 7: skip subgroups whose rewards are all equal."""
    whiten_advantages: bool | None = None
    """Token-weighted mean 0 and standard deviation 1 over the rollout; None: on for the treepo estimators and
    reinforce_pp."""
    eps_clip: float = Field(0.2, gt=0, lt=1)
    eps_clip_high: float = Field(0.28, gt=0)
    eps_clip_c: float | None = Field(10.0, gt=1)
    """Dual clip: bound of the ratio for negative advantages; None: off."""
    kl_loss_coef: float = Field(0.0, ge=0)
    """Weight of KL(actor || reference); 0: no reference model is built."""
    kl_loss_type: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"
    """token-mean: sum over all (trajectory, token) pairs of the global batch / their number. seq-mean-token-mean: mean
    over trajectories of each one's token mean. seq-mean-token-sum: mean over trajectories of each one's token sum."""
    ratio_level: Literal["token", "sequence"] = "token"
    """sequence: GSPO's ratio, the geometric mean over a trajectory's tokens; needs train.prefix_sharing none, and goes
    with loss_agg_mode seq-mean-token-mean."""
    use_tis: bool | None = None
    """Truncated importance sampling against the engine's logprobs; None: on when the two precisions differ, and with
    rollout.partial_rollout (older weights sampled the first segments of a tree that was carried over)."""
    tis_clip: float = Field(2.0, gt=0)


class HeadGuardConfig(Section):
    """Is the FP8 head still near bf16? Asked of a sample of rows in every step."""

    sample_rows: int = Field(256, ge=0)
    """Rows per micro-batch of the old-logprob pass that are computed in fp8 and in bf16. 0: never ask."""
    max_abs_diff: float = Field(0.03, gt=0)
    """Largest acceptable mean |logp_fp8 - logp_bf16|, nats. Beyond it the step runs in bf16, counted in
    train/head_fallback; fp8 comes back with the first step whose sample is within it."""


class HeadConfig(Section):
    """Output layer, log-softmax and loss: from hidden states to logprobs and gradients."""

    precision: Literal["fp32", "bf16", "fp8"] | None = None
    """Operands of the logits in the policy update; sums are always fp32. None: model.params_dtype."""
    logprob_precision: Literal["fp32", "bf16", "fp8"] | None = None
    """The same for old and reference logprobs. None: as precision."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """torch: tiles of rows, any device. triton: fused kernels (Hopper or newer). auto: triton where it can run."""
    fp8_recipe: Literal["tensorwise", "rowwise", "blockwise"] = "blockwise"
    """fp8: a scale per tensor, per row, or per 1 x 128 (hidden states) and 128 x 128 (weight). Current scaling. The
    default is what a real model's activations said (tools/bench/fp8_error.py)."""
    exact_target: bool = True
    """fp8: the sampled token's own logit comes from bf16 operands. Without it ratios drift by several times as much."""
    fp8_loud_channels: int = Field(64, ge=0, le=64)
    """fp8: so many channels of hidden states and weight (at most an eighth), those that carry most of the logits'
    variance, stay in bf16. Models have a few that are far louder than the rest, and set the error alone."""
    power_of_2_scales: bool = False
    """fp8: round scales to powers of two, as Transformer Engine's block scaling does by default."""
    fp8_grads: bool = False
    """fp8: also the gradient's two products, with e5m2 row-scaled logit gradients. Off: they run in bf16."""
    guard: HeadGuardConfig = Field(default_factory=HeadGuardConfig)


class LossConfig(Section):
    """How the loss is computed; what it is stands in algo."""

    head: HeadConfig = Field(default_factory=HeadConfig)


class TrainConfig(Section):
    """The optimisation."""

    num_rollouts: int = Field(100, ge=1)
    """Rollout steps in the whole run."""
    num_steps_per_rollout: int = Field(1, ge=1)
    """Optimizer steps (mini-batches) per rollout."""
    global_batch_size: int | None = Field(None, ge=1)
    """Trajectories per optimizer step; None: derived from the batch invariant."""
    max_tokens_per_gpu: int = Field(4096, ge=1)
    """Tokens in one micro-batch of one data-parallel rank; a larger tree is cut, its pieces repeat their ancestors."""
    prefix_sharing: Literal["tree", "prompt", "none"] = "tree"
    """What a micro-batch computes once. tree: every shared token. prompt: only the prompt. none: nothing (flat)."""
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
    """Most rows of [rows, V/tp] logits alive at a time in the loss head; large vocabularies take fewer (48 MiB)."""


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
