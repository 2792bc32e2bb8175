"""Sampling: trees of segments, when a path ends, and the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from treepo_mega.config.debug import DebugConfig
from treepo_mega.config.section import Section
from treepo_mega.config.source import FunctionPath
from treepo_mega.text.function_path import is_function_path


class EngineConfig(Section):
    """vLLM, co-located in the trainer's processes."""

    tensor_parallel_size: int = Field(1, ge=1)
    """Ranks that share one engine (TP_v). 1: an engine a rank."""
    enable_expert_parallel: bool = False
    """Each rank of an engine holds num_experts / TP_v whole experts, not a slice of every one. Needs TP_v > 1."""
    dtype: Literal["fp32", "bf16"] | None = None
    """None: model.params_dtype."""
    quantization: Literal["fp8_per_tensor", "fp8_per_block", "fp8_per_channel"] | None = None
    """FP8 in the engine's linear layers, by vLLM's names: weights are quantised anew by each refit, activations as they
    come. The trainer keeps its own precision, so algo.use_tis is on. On a CPU fp8_per_channel, with AMX also
    fp8_per_block."""
    block_size: int = Field(32, ge=1)
    """KV-cache block, tokens. The CPU kernels take multiples of 32."""
    max_num_seqs: int = Field(256, ge=1)
    max_num_batched_tokens: int = Field(8192, ge=1)
    kv_cache_memory_mb: int = Field(64, ge=1)
    """KV-cache size on CPU, MiB per engine."""
    gpu_memory_utilization: float = Field(0.6, gt=0, lt=1)
    """Share of a GPU's memory for the engine (CUDA only). While the engine is built, only the weights of actor and
    reference are on the GPU beside it."""
    cuda_graphs: Literal["none", "piecewise", "full_decode_only", "full_and_piecewise"] = "none"
    """vLLM's CUDA graph mode. none: eager, the fall-back where graphs do not work. CUDA only."""
    sleep_level: Literal[1, 2] = 2
    """What the engine's weights do while it sleeps (CUDA only). 2: they are dropped, and the refit writes them anew. 1:
    they wait in pinned host memory, and after a checkpoint no refit is needed."""
    async_scheduling: Literal["auto"] | bool = "auto"
    """Schedule the next step while one runs (a queue of two). auto: true on CUDA, false on a CPU, whose build of vLLM
    has no such scheduler."""
    model_runner: Literal["auto", "v1", "v2"] = "auto"
    """vLLM's model runner. auto: v2 on CUDA, v1 on a CPU, where v2 needs a Triton that no wheel has. The key replaces
    VLLM_USE_V2_MODEL_RUNNER, which is not read."""


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


class SegmentConfig(Section):
    """The tokens that are sampled between two branch points."""

    length: int = Field(512, ge=1)
    """Tokens of a segment (the paper's l). With an `end` at a text: the most tokens of one."""
    end: Literal["length", "newline", "sentence", "turn"] | list[str] = "length"
    """Where a segment ends. length: after `length` tokens. newline: at a token that holds a newline. sentence: at a
    token that ends a sentence. A list of strings: at a token that holds one of them. Such a segment is a step of
    reasoning. It has at least `min_length` and at most `length` tokens. turn: where the policy's turn ends, however
    long it is (data.environment)."""
    min_length: int = Field(1, ge=1)
    """Tokens of the shortest segment when `end` is not length."""


class BudgetConfig(Section):
    """Who gets the branches of a level."""

    kind: Literal["equal", "low_prob", "high_prob", "entropy"] | FunctionPath = "equal"
    """equal: every path alike. low_prob: more for paths that the model found improbable. high_prob: more for probable
    ones. entropy: more for paths with an uncertain next token. The paper found equal at least as good as low_prob and
    high_prob. path/to/file.py:function: a plug-in that says how many each path gets."""
    signal: Literal["segment", "branch_point"] = "segment"
    """What low_prob, high_prob and a plug-in look at. segment: mean logprob of the newest segment's tokens (the
    paper's). branch_point: logprob of the likeliest next token after it, for which one token more is sampled and
    dropped."""
    top_k: int = Field(10, ge=1, le=20)
    """Next tokens over which entropy takes the entropy at a branch point (renormalised), and which a plug-in sees under
    signal branch_point."""
    scale: Literal["auto", "nats", "share", "rank", "zscore"] = "auto"
    """How certainties become weights. nats: the paper's softmax at `temperature`, for which the paths of a sure model
    are nearly equal. share: in proportion to the uncertainty (high_prob: to the probability). rank: in proportion to
    the place among the paths. zscore: a softmax at `temperature` over standard deviations. auto: share for entropy,
    else nats."""
    floor: float | None = None
    """Least standing of a border at which a path branches. Below it the path goes on alone; its branches go to others,
    or wait for a later level. In the unit of `scale`. nats: uncertainty, nats. share: multiples of the paths' mean, at
    most 1. rank: place / paths, at most 1. zscore: standard deviations, at most 0. None: every border is good enough.
    """
    temperature: float = Field(2.0, gt=0)
    """Of the softmax over certainties (nats, or standard deviations under zscore). Higher is more equal."""
    temperature_end: float | None = Field(None, gt=0)
    """The temperature at the last of train.num_rollouts. None: constant. The paper's Naive2Low goes from 5.0 to 1.0."""
    temperature_schedule: Literal["linear", "cosine"] = "linear"
    """The way from temperature to temperature_end."""

    @property
    def scale_used(self) -> Literal["nats", "share", "rank", "zscore"]:
        """`scale`, without auto."""
        if self.scale == "auto":
            return "share" if self.kind == "entropy" else "nats"
        return self.scale

    def temperature_at(self, progress: float) -> float:
        """The temperature when a share `progress` in [0, 1] of the run is done."""
        if self.temperature_end is None:
            return self.temperature
        share = min(max(progress, 0.0), 1.0)
        if self.temperature_schedule == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        return self.temperature + share * (self.temperature_end - self.temperature)


class ForkConfig(Section):
    """Where branches start with branching.at fork."""

    signal: Literal["entropy", "logprob"] = "entropy"
    """What makes a token worth a fork. entropy: of the `top_k` likeliest tokens there (renormalised), which the engine
    then reports for every token, divided by the branches there. logprob: the probability that no branch there has drawn
    yet, which costs nothing."""
    top_k: int = Field(10, ge=1, le=20)
    """Likeliest tokens: of which entropy is taken, and among which `draw: other` chooses."""
    draw: Literal["again", "other"] = "again"
    """What a branch begins with. again: a free draw, often the token that is there already. other: a token that no
    branch has there, of the `top_k` likeliest, by their probabilities; it is explored more than the policy would."""
    waves: int = Field(1, ge=1)
    """Rounds in which the missing leaves start. A later round also sees what the earlier ones sampled, and takes as
    long again."""
    distance: int = Field(4, ge=1)
    """Fewest tokens on a path between two branch points, and between one and the prompt."""
    threshold: float | None = Field(None, gt=0)
    """None: the most uncertain points of the tree fork. Nats: a path forks at its first token above this entropy, in
    branching.factor branches that share its leaves. Such leaves are fair samples (algo.leaf_weight descent).
    With `draw: other` a branch then weighs as much as its first token is probable."""


class BranchingConfig(Section):
    """How a tree branches."""

    at: Literal["border", "fork"] = "border"
    """Where paths branch. border: after segments, while they grow. fork: first some paths are sampled to their ends.
    Then branches start where the model was uncertain, at any token, until the tree has its leaves."""
    factor: int = Field(2, ge=1)
    """Children of a node while the budget lasts (the paper's N)."""
    after_observation: int | None = Field(None, ge=1)
    """Children right after an observation while the budget lasts (data.environment). None: `factor`."""
    initial: tuple[int, int] | None = None
    """[lo, hi]: children of the root, drawn per prompt. None: `factor`; with `at: fork` a quarter of the leaves."""
    fork: ForkConfig = Field(default_factory=ForkConfig)
    look_alikes: Literal["keep", "cut"] = "keep"
    """cut: a new branch whose first tokens are those of a sibling that began with it ends there, and its leaves grow
    elsewhere. The leaves are then more unlike than the policy's answers; algo.leaf_weight descent corrects it."""
    look_alike_tokens: int | None = Field(None, ge=1)
    """First tokens in which a branch repeats a sibling, with look_alikes cut. None: those of the whole segment."""
    transfer: Literal["level", "quota"] = "level"
    """Where the branches of stopped paths go. level: to their living siblings, level by level. A tree waits only for
    itself. quota: every node has a quota of leaves that its children share. They start when their parent ends. Fallback
    spends what paths that stopped early leave over, once nothing of the tree is running."""
    budget: BudgetConfig = Field(default_factory=BudgetConfig)

    def width(self, *, observed: bool) -> int:
        """Children of a node while the budget lasts; `observed`: they start right after an observation."""
        return self.after_observation if observed and self.after_observation is not None else self.factor


class FallbackConfig(Section):
    """Ended paths are cut back and resampled when a tree ran dry before it had all its leaves."""

    from_: Literal["finished", "any", "longest", "none"] = Field("finished", alias="from")
    """Which ended paths are cut back."""
    cut: Literal["random", "low_prob"] = "random"
    """Where they are cut. random: at a random segment border before the end. low_prob: at the border after which the
    path's first token had the lowest logprob."""


class RolloutConfig(Section):
    """Sampling."""

    mode: Literal["tree", "sequential"] = "tree"
    """tree: TreePO's segment trees. sequential: n independent samples a prompt, through the same code."""
    rollout_batch_size: int = Field(16, ge=1)
    """Prompts trained on per rollout step."""
    n_samples_per_prompt: int = Field(16, ge=1)
    """Leaves per tree (the paper's width w)."""
    leaves: Literal["fixed", "adaptive"] = "fixed"
    """fixed: every tree has n_samples_per_prompt leaves. adaptive: a step has rollout_batch_size x n_samples_per_prompt
    leaves. Trees begin with `first_leaves`. Prompts whose rewards are then all equal are settled, and the others share
    what is left."""
    first_leaves: int = Field(4, ge=2)
    """Leaves that decide whether a prompt is settled, with leaves adaptive."""
    most_leaves: int | None = Field(None, ge=2)
    """Most leaves of a tree, with leaves adaptive. None: twice n_samples_per_prompt."""
    temperature: float = Field(1.0, ge=0.01)
    """Of sampling, and of the logprobs trained on. The engine would take anything below 0.01 for 0.01."""
    max_response_len: int = Field(1024, ge=1)
    """Tokens."""
    segment: SegmentConfig = Field(default_factory=SegmentConfig)
    branching: BranchingConfig = Field(default_factory=BranchingConfig)
    fallback: FallbackConfig = Field(default_factory=FallbackConfig)
    max_depth: int | None = Field(None, ge=1)
    """Segments on a path; None: as many as max_response_len tokens of the shortest segments can be."""
    token_budget: int | None = Field(None, ge=1)
    """Tokens to sample a tree, instead of a fixed number of leaves (n_samples_per_prompt is then the most): a tree
    makes new branches only while its budget holds another segment.length.
    Living paths are finished (needs branching.transfer level)."""
    partial_rollout: int | None = Field(None, ge=1)
    """Tokens by which a path may grow in one step. A tree with longer paths is carried over and goes on in the next
    step, under the weights of then (Node.policy_version says which segment is whose); None: trees are finished."""
    dynamic_sampling: bool = True
    """Drop prompts whose rewards are all equal. Each is replaced at once by the next prompt, while too few are found or
    in flight."""
    filter_metric: Literal["reward", "acc"] | FunctionPath = "reward"
    """What dynamic sampling looks at. reward: the rewards that are trained on. acc: the verifier's verdict before any
    penalty (the number `acc` of its dict, else its score), as DAPO does: shaped rewards nearly always differ.
    path/to/file.py:function: a plug-in that says for each tree whether the step trains on it."""
    oversample: float = Field(1.0, ge=1)
    """Prompts that begin at once, as a multiple of those that the step wants. More in flight: fewer engine steps with a
    small batch at the end."""
    surplus: Literal["drop", "carry"] = "drop"
    """What becomes of trees with signal beyond the first rollout_batch_size of a step (oversample > 1). drop: nothing,
    rollout/wasted_tokens counts them. carry: they train first in the next step, under the weights of then
    (Node.policy_version says whose they are)."""
    max_refills: int = Field(10, ge=0)
    """Prompts that may begin in place of others, as a multiple of those that begin at once. Then the step goes on with
    fewer prompts, or ends. 0: nothing is replaced."""
    allow_smaller_batch: bool = True
    """Whether a step that could not be filled trains on fewer prompts, and says so. false: the run ends with an error.
    Trees that rollout.partial_rollout carries over are not missing."""
    durable: bool = True
    """Keep each finished and graded tree on disk as it comes, under <run_dir>/rollouts, until a checkpoint has its
    step. After a kill only trees in flight are sampled again. Nothing is kept without checkpoint.enabled."""
    timeout_s: float = Field(1800, gt=0)
    """Deadline of a generation phase, seconds; the error names what is missing."""
    routing_replay: Literal["off", "old", "all"] = "off"
    """For models with experts: passes that send each token to the experts that the engine sent it to. off: none. old:
    the pass for old logprobs. all: the update's passes too; gradients then meet the experts that sampled.
    Weights of experts are computed in every pass; the reference always routes for itself."""
    stop: StopConfig = Field(default_factory=StopConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)

    # The section `debug` of the whole configuration, which says how segments are laid out and scheduled.
    _debug: DebugConfig = PrivateAttr(default_factory=DebugConfig)

    @property
    def debug(self) -> DebugConfig:
        """The section `debug` of the configuration that this section belongs to; the defaults when it stands alone."""
        return self._debug

    def with_debug(self, debug: DebugConfig) -> RolloutConfig:
        """A copy that follows another section `debug`."""
        copy = self.model_copy()
        copy._debug = debug
        return copy

    def replace(self, changes: Mapping[str, Any]) -> RolloutConfig:
        """As `Section.replace`; keys that begin with `debug.` change the copy's section `debug`."""
        own = {key: value for key, value in changes.items() if not key.startswith("debug.")}
        switches = {key.removeprefix("debug."): value for key, value in changes.items() if key not in own}
        return super().replace(own).with_debug(self._debug.replace(switches))

    @property
    def leaves_at_most(self) -> int:
        """Leaves of the widest tree of a step."""
        if self.leaves == "fixed":
            return self.n_samples_per_prompt
        return 2 * self.n_samples_per_prompt if self.most_leaves is None else self.most_leaves

    @property
    def depth_limit(self) -> int:
        """Segments allowed on a path: 1 in sequential mode."""
        if self.mode == "sequential":
            return 1
        # A fork cuts segments in two anywhere: the length limit alone ends a path.
        if self.forks:
            return self.max_response_len
        # Turns come on top, as many as the environment answers.
        if self.segment.end == "turn":
            return self.max_depth or 1
        shortest = self.segment.min_length if self.ends_at_text else self.segment.length
        return self.max_depth or math.ceil(self.max_response_len / shortest)

    @property
    def notes_routing(self) -> bool:
        """Whether the engine returns the experts of every token, and trees carry them."""
        return self.routing_replay != "off"

    @property
    def forks(self) -> bool:
        """Whether branches start where ended paths were uncertain (branching.at fork)."""
        return self.mode == "tree" and self.branching.at == "fork"

    @property
    def entropy_top_k(self) -> int:
        """Likeliest tokens whose entropy is wanted at every sampled token; 0: no entropies."""
        fork = self.branching.fork
        return fork.top_k if self.forks and fork.signal == "entropy" else 0

    @property
    def segment_tokens(self) -> int:
        """Tokens allowed in one segment: the whole response in sequential mode, and where segments are turns."""
        whole = self.mode == "sequential" or self.segment.end == "turn"
        return self.max_response_len if whole else self.segment.length

    @property
    def ends_at_text(self) -> bool:
        """Whether certain tokens end a segment, which may then be as short as `segment.min_length`."""
        return self.mode == "tree" and self.segment.end not in ("length", "turn")

    @property
    def alignment(self) -> int:
        """Tokens of the KV block that segments are aligned to; 0: they are not (see debug.segment_alignment)."""
        wanted = self._debug.segment_alignment
        fixed = self.mode == "tree" and self.segment.end == "length" and not self.forks
        divides = self.segment.length % self.engine.block_size == 0
        aligned = wanted == "kv_block" or (wanted == "auto" and divides)
        return self.engine.block_size if fixed and aligned else 0

    @property
    def continues(self) -> bool:
        """Whether paths that cannot branch any more are sampled in one go (see debug.continue_paths)."""
        if self.mode == "sequential" or self.partial_rollout is not None:
            return False
        wanted = self._debug.continue_paths
        return wanted == "always" or (wanted == "auto" and not self.alignment)

    @property
    def peek(self) -> int:
        """Likeliest next tokens to look at after a segment (`budget.top_k`, or 1); 0: the budget does not ask."""
        budget = self.branching.budget
        if self.mode == "sequential" or self.forks or budget.kind == "equal":
            return 0
        by_plugin = is_function_path(budget.kind) and budget.signal == "branch_point"
        if budget.kind == "entropy" or by_plugin:
            return budget.top_k
        return 1 if budget.signal == "branch_point" else 0

    def budget_temperature_at(self, progress: float) -> float:
        """The budget's temperature when a share `progress` in [0, 1] of the run is done."""
        return self.branching.budget.temperature_at(progress)
