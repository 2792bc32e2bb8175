"""What is learnt from samples: algorithm, loss and optimisation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from treepo_mega.config.section import Section
from treepo_mega.config.source import FunctionPath


class AlgoConfig(Section):
    """Advantages and loss."""

    advantage_estimator: (
        Literal["treepo", "treepo_size_weighted", "segment", "grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
        | FunctionPath
    ) = "treepo"
    """treepo, treepo_size_weighted: TreePO's means over subgroups (eq. 5, 6). segment: the change of the expected
    reward at each segment, from branch to branch. rloo: against the leaves that do not share the token. grpo: against
    the tree's mean, in its standard deviations. reinforce_pp: against the batch's mean. reinforce_pp_baseline: against
    the tree's mean, in the batch's standard deviations. path/to/file.py:function: a plug-in, per leaf or per node."""
    leaf_weight: Literal["uniform", "descent"] = "uniform"
    """What a leaf counts in means, advantages, loss and metrics. uniform: all alike, as in the paper; long responses
    are then over-represented. descent: the chance that a random walk from the root ends in it, which makes the
    gradient that of the policy; leaves made by fallback count nothing."""
    tree_weight: Literal["auto", "leaves", "prompt"] = "auto"
    """What a tree counts in loss and whitening beside trees with more or fewer leaves. leaves: as many samples as it
    has leaves. prompt: one, whatever its leaves. auto: leaves; with leaf_weight descent one prompt in the loss."""
    norm_adv_by_std: bool = True
    """grpo: divide by the tree's standard deviation. Off: Dr.GRPO's R - mean."""
    segment_sqrt_n: bool = False
    """Divide an advantage of segment or rloo by the square root of the leaves below its node."""
    reject_zero_std_subgroups: bool = False
    """TreePO eq. 7: skip subgroups whose rewards are all equal."""
    max_subgroup_depth: int | None = Field(None, ge=1)
    """treepo: subgroups of nodes deeper than so many segments are left out. None: no limit."""
    root_group: bool = True
    """treepo: whether the whole tree is a group, too."""
    whiten_advantages: bool | None = None
    """Token-weighted mean 0 and standard deviation 1 over the rollout; None: on for the treepo estimators and
    the reinforce_pp ones. Trees whose rewards are all equal are left out and get 0."""
    mask_truncated_samples: bool = False
    """Leaves cut by length or depth leave their tree before advantages are computed. Metrics of sampling still hold
    them; rollout/leaves_masked counts them."""
    update_share: float = Field(1.0, gt=0, le=1)
    """Of an optimizer step's leaves, how many train. They are chosen by |advantage|, and count by the inverse of their
    chance: the expected gradient is that of all leaves. Baselines are those of all. 1: all train."""
    advantage_clip: float | None = Field(None, gt=0)
    """Largest |advantage|, after whitening. None: no limit."""
    policy_loss: Literal["ppo", "cispo"] = "ppo"
    """ppo: the clipped ratio times the advantage. cispo: the ratio, bounded by 1 + eps_clip_high and held fixed, times
    the advantage times the logprob, so that no token loses its gradient. Both are exact on shared tokens."""
    eps_clip: float = Field(0.2, gt=0, lt=1)
    eps_clip_high: float = Field(0.28, gt=0)
    eps_clip_c: float | None = Field(10.0, gt=1)
    """Dual clip: bound of the ratio for negative advantages; None: off."""
    kl_loss_coef: float = Field(0.0, ge=0)
    """Weight of KL(actor || reference); 0: no reference model is built."""
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k3"
    """The estimator of the KL. low_var_kl: k3, bounded by 10 nats (verl's and slime's)."""
    entropy_coef: float = 0.0
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """token-mean: sum over all (trajectory, token) pairs of the global batch / their number. seq-mean-token-mean: mean
    over trajectories of each one's token mean. seq-mean-token-sum: mean over trajectories of each one's token sum.
    seq-mean-token-sum-norm: that, divided by rollout.max_response_len (Dr.GRPO)."""
    ratio_level: Literal["token", "sequence"] = "token"
    """sequence: GSPO's ratio, the geometric mean over a trajectory's tokens; needs train.prefix_sharing none, and goes
    with loss_agg_mode seq-mean-token-mean."""
    old_logprobs: Literal["auto", "recompute", "rollout"] = "auto"
    """Where the logprobs from before the update come from. recompute: a pass of the actor. auto: likewise, but the
    first mini-batch takes those of the update's own forward pass where they are the same: its ratios are exactly 1.
    rollout: the engine's, so that there is no pass; ratios then hold the distance of engine and trainer, too."""
    use_tis: bool | None = None
    """Truncated importance sampling against the engine's logprobs; None: on when the two precisions differ, with
    rollout.partial_rollout (older weights sampled the first segments of a tree that was carried over), and with
    rollout_is."""
    tis_clip: float = Field(2.0, gt=0)
    """Largest importance weight, at every level."""
    tis_clip_low: float = Field(0.0, ge=0, le=1)
    """Smallest importance weight, at every level."""
    rollout_is: Literal["token", "sequence", "geometric"] | None = None
    """What an importance weight is of. token: a token's probability ratio trainer / engine. sequence: the product of a
    trajectory's ratios. geometric: their geometric mean. None: token. All are exact on shared tokens: a trajectory's
    weight is a factor of its share of their masses. KL and entropy are not weighed."""
    rollout_rs: Literal["sequence", "geometric"] | None = None
    """Rejection: trajectories whose product (or geometric mean) of ratios trainer / engine is out of range leave loss
    and averages; their rewards stay in the baselines. Exact on shared tokens. For single tokens: icepop_range."""
    rollout_rs_threshold: float = Field(2.0, gt=1)
    """rollout_rs: largest ratio that is kept."""
    rollout_rs_threshold_lower: float | None = Field(None, gt=0, lt=1)
    """rollout_rs: smallest ratio that is kept. None: 1 / rollout_rs_threshold."""
    rollout_token_veto_threshold: float | None = Field(None, gt=0, lt=1)
    """A trajectory with a token whose ratio trainer / engine is below this is rejected. None: no veto."""
    icepop_range: tuple[float, float] | None = None
    """[low, high]: tokens whose probability ratio trainer / engine is outside count nothing in the policy loss
    (IcePop). None: all count. Exact on shared tokens."""

    @property
    def weighs_leaves(self) -> bool:
        """Whether importance weights are of trajectories."""
        return bool(self.use_tis) and self.rollout_is in ("sequence", "geometric")

    @property
    def rejects_leaves(self) -> bool:
        """Whether trajectories may be rejected for the distance of engine and trainer."""
        return self.rollout_rs is not None or self.rollout_token_veto_threshold is not None


class GuardConfig(Section):
    """Is the FP8 head still near bf16? Asked of a sample of rows in every step."""

    sample_rows: int = Field(256, ge=0)
    """Rows per micro-batch of the old-logprob pass that are computed in fp8 and in bf16; of the first update where no
    such pass is made. 0: never ask."""
    max_abs_diff: float = Field(0.03, gt=0)
    """Largest acceptable mean |logp_fp8 - logp_bf16|, nats. Beyond it the step runs in bf16, counted in
    train/head_fallback; fp8 comes back with the first step whose sample is within it."""


class LossConfig(Section):
    """How the loss is computed: output layer, log-softmax and loss. What it is stands in algo."""

    precision: Literal["fp32", "bf16", "fp8"] | None = None
    """Operands of the logits in the policy update; sums are always fp32. None: model.params_dtype."""
    logprob_precision: Literal["fp32", "bf16", "fp8"] | None = None
    """The same for old and reference logprobs. None: as precision."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """torch: tiles of rows, any device. triton: fused kernels (Hopper or newer), not in fp32. auto: triton
    where it can run."""
    tile_rows: int = Field(1024, ge=1)
    """Most rows of [rows, V/tp] logits alive at a time; large vocabularies take fewer (48 MiB)."""
    fp8_recipe: Literal["tensorwise", "rowwise", "blockwise"] = "blockwise"
    """fp8: a scale per tensor, per row, or per 1 x 128 (hidden states) and 128 x 128 (weight). Current scaling. The
    default is what a real model's activations said (tools/bench/fp8_error.py)."""
    fp8_loud_channels: int = Field(64, ge=0, le=64)
    """fp8: so many channels of hidden states and weight (at most an eighth), those that carry most of the logits'
    variance, stay in bf16. Models have a few that are far louder than the rest, and set the error alone."""
    fp8_grads: bool = False
    """fp8: also the gradient's two products, with e5m2 row-scaled logit gradients. Off: they run in bf16."""
    guard: GuardConfig = Field(default_factory=GuardConfig)


class TrainConfig(Section):
    """The optimisation."""

    num_rollouts: int = Field(100, ge=1)
    """Rollout steps in the whole run."""
    num_steps_per_rollout: int = Field(1, ge=1)
    """Optimizer steps (mini-batches) per rollout."""
    ppo_epochs: int = Field(1, ge=1)
    """Passes over a rollout's mini-batches, each in the same order. Old logprobs and corrections stay those from before
    the first pass, so ratios leave 1 in later ones. The schedule of lr counts every optimizer step."""
    global_batch_size: int | None = Field(None, ge=1)
    """Trajectories per optimizer step; None: derived from the batch invariant."""
    max_tokens_per_gpu: int = Field(4096, ge=1)
    """Tokens in one micro-batch of one data-parallel rank; a larger tree is cut, its pieces repeat their ancestors."""
    prefix_sharing: Literal["tree", "content", "prompt", "none"] = "tree"
    """What a micro-batch computes once. tree: every token that the sampler shared. content: also what siblings sampled
    alike, in both modes of rollout. prompt: only the prompt. none: nothing (flat). Gradients are the same."""
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
    seed: int = Field(1234, ge=0, lt=2**32)
    """numpy and torch take seeds of 32 bits."""
    max_skipped_steps: int = Field(3, ge=1)
    """Consecutive optimizer steps with a non-finite gradient before the run stops with a diagnosis."""
