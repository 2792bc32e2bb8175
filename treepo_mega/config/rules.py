"""The rules that join configuration keys; `config.check` applies them.

Each function looks at one concern and returns the broken rules as sentences for people, naming the keys and
the values; an empty list means that all hold. The types are only named here, not imported: config.py, which
holds the keys, calls these rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treepo_mega.text.function_path import is_function_path

if TYPE_CHECKING:
    from treepo_mega.config import AlgoConfig, Config, RolloutConfig


def check_batch(cfg: Config) -> list[str]:
    """The batch sizes agree, and the longest trajectory fits into a micro-batch."""
    rollout = cfg.rollout
    train = cfg.train
    bad = []
    made = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    used = (train.global_batch_size or 0) * train.num_steps_per_rollout
    if made != used:
        bad.append(
            f"rollout.rollout_batch_size x rollout.n_samples_per_prompt = {made} trajectories per rollout, but "
            f"train.global_batch_size x train.num_steps_per_rollout = {used}: they must be equal"
        )
    if rollout.rollout_batch_size % train.num_steps_per_rollout:
        bad.append(
            f"rollout.rollout_batch_size {rollout.rollout_batch_size} is not a multiple of train.num_steps_per_rollout "
            f"{train.num_steps_per_rollout}: mini-batches never split a prompt"
        )
    if cfg.algo.ratio_level == "sequence" and (
        train.prefix_sharing != "none" or cfg.parallel.context_parallel_size > 1
    ):
        bad.append(
            "algo.ratio_level sequence needs train.prefix_sharing none (and context_parallel_size 1): a sequence's "
            "ratio is a mean over its own tokens, so a shared token has as many ratios as trajectories, and the "
            f"clipped loss no longer depends on two sums of advantages; got prefix_sharing {train.prefix_sharing}, "
            f"context_parallel_size {cfg.parallel.context_parallel_size}"
        )
    if cfg.algo.policy_loss == "cispo" and cfg.algo.ratio_level == "sequence":
        bad.append(
            "algo.policy_loss cispo with algo.ratio_level sequence: GSPO clips a sequence's ratio, CISPO bounds a "
            "token's weight; use one of them"
        )
    icepop = cfg.algo.icepop_range
    if icepop is not None and not 0 <= icepop[0] < 1 < icepop[1]:
        bad.append(
            f"algo.icepop_range {list(icepop)}: expected [low, high] with 0 <= low < 1 < high, such as [0.5, 5.0]"
        )
    bad += _check_corrections(cfg.algo) + _check_kl_reward(cfg)
    if cfg.rollout.routing_replay == "old" and cfg.algo.old_logprobs == "rollout":
        bad.append(
            "rollout.routing_replay old has no effect with algo.old_logprobs rollout, which computes no old logprobs: "
            "set rollout.routing_replay=all, or off"
        )
    if train.prefix_sharing == "content":
        bad += _check_merging(cfg)
    fallback = cfg.rollout.fallback.from_
    if cfg.algo.leaf_weight == "descent" and cfg.rollout.mode == "tree" and fallback != "none":
        bad.append(
            f"algo.leaf_weight descent with rollout.fallback.from {fallback}: leaves made by fallback are no fair "
            "samples of the policy and would count nothing, but cost their tokens; set rollout.fallback.from=none"
        )
    branching = cfg.rollout.branching
    if cfg.algo.leaf_weight == "descent" and cfg.rollout.forks and branching.fork.threshold is None:
        bad.append(
            "algo.leaf_weight descent with rollout.branching.at fork: branches at the most uncertain tokens are no "
            "fair samples of the policy and would count nothing; set rollout.branching.fork.threshold"
        )
    if train.max_tokens_per_gpu < cfg.max_model_len:
        bad.append(
            f"train.max_tokens_per_gpu {train.max_tokens_per_gpu} is smaller than the longest trajectory "
            f"(data.max_prompt_len + rollout.max_response_len = {cfg.max_model_len})"
        )
    return bad


def _check_kl_reward(cfg: Config) -> list[str]:
    """A KL in the reward meets neither a second KL nor rules that its continuous rewards make void."""
    coef = cfg.reward.kl_coef
    if not coef:
        return []
    bad = []
    if cfg.algo.kl_loss_coef > 0:
        bad.append(
            f"reward.kl_coef {coef:g} with algo.kl_loss_coef {cfg.algo.kl_loss_coef:g}: the distance from the "
            "reference would count twice; set one of them to 0"
        )
    if cfg.algo.update_share < 1:
        bad.append(
            f"reward.kl_coef with algo.update_share {cfg.algo.update_share:g}: leaves are chosen by their advantage, "
            "which the KL changes after the choice; use algo.kl_loss_coef"
        )
    if cfg.algo.reject_zero_std_subgroups:
        bad.append(
            "reward.kl_coef with algo.reject_zero_std_subgroups: with a KL in it hardly two rewards are equal, so "
            "that no subgroup would be rejected; use algo.kl_loss_coef"
        )
    return bad


def _check_merging(cfg: Config) -> list[str]:
    """A merged token has one engine logprob."""
    bad = []
    if cfg.rollout.partial_rollout is not None:
        bad.append(
            "train.prefix_sharing content with rollout.partial_rollout: equal tokens that weights of different steps "
            "sampled have different engine logprobs, and a merged token has one; set train.prefix_sharing=tree"
        )
    return bad


def _check_corrections(algo: AlgoConfig) -> list[str]:
    """The corrections for the distance between engine and trainer do not contradict one another."""
    bad = []
    if algo.rollout_is is not None and not algo.use_tis:
        bad.append(
            f"algo.rollout_is {algo.rollout_is} with algo.use_tis false: nothing would be weighed; drop one of them"
        )
    compared = [name for name in ("use_tis", "rollout_is", "rollout_rs", "rollout_token_veto_threshold", "icepop_range")
                if getattr(algo, name)]  # fmt: skip
    if algo.old_logprobs == "rollout" and compared:
        bad.append(
            f"algo.old_logprobs rollout with algo.{compared[0]}: it compares the actor's logprobs from before the "
            "update with the engine's, and those are then the same; set algo.old_logprobs=recompute"
        )
    if algo.tis_clip_low > algo.tis_clip:
        bad.append(f"algo.tis_clip_low {algo.tis_clip_low:g} exceeds algo.tis_clip {algo.tis_clip:g}")
    if algo.rollout_rs_threshold_lower is not None and algo.rollout_rs is None:
        bad.append(
            f"algo.rollout_rs_threshold_lower {algo.rollout_rs_threshold_lower:g} has no effect without "
            "algo.rollout_rs (sequence or geometric)"
        )
    return bad


def check_sampling(cfg: Config, world_size: int) -> list[str]:
    """The sampled logprobs can be trained on, and engine and tree can hold what is asked for."""
    rollout = cfg.rollout
    bad = []
    if world_size % rollout.engine.tensor_parallel_size:
        bad.append(
            f"world size {world_size} is not a multiple of rollout.engine.tensor_parallel_size "
            f"{rollout.engine.tensor_parallel_size}"
        )
    if rollout.engine.enable_expert_parallel and rollout.engine.tensor_parallel_size == 1:
        bad.append(
            "rollout.engine.enable_expert_parallel needs rollout.engine.tensor_parallel_size > 1: the ranks of an "
            "engine share its experts out (nearest: 2)"
        )
    bad += _check_tree(rollout)
    bad += _check_leaves(rollout)
    if rollout.engine.max_num_batched_tokens < cfg.max_model_len:
        bad.append(
            f"rollout.engine.max_num_batched_tokens {rollout.engine.max_num_batched_tokens} is smaller than the "
            f"longest trajectory ({cfg.max_model_len} tokens)"
        )
    if rollout.engine.quantization and rollout.engine.dtype != "bf16":
        bad.append(f"rollout.engine.quantization needs rollout.engine.dtype bf16, which is {rollout.engine.dtype}")
    # One reward never differs from itself: every prompt would be dropped.
    if rollout.dynamic_sampling and rollout.n_samples_per_prompt < 2:
        bad.append("rollout.dynamic_sampling needs rollout.n_samples_per_prompt >= 2: one reward never differs")
    if cfg.reward.overlong.buffer_len > rollout.max_response_len:
        bad.append(
            f"reward.overlong.buffer_len {cfg.reward.overlong.buffer_len} exceeds rollout.max_response_len "
            f"{rollout.max_response_len}: every response would be overlong"
        )
    if rollout.oversample != 1 and not rollout.dynamic_sampling:
        bad.append(
            f"rollout.oversample {rollout.oversample:g} needs rollout.dynamic_sampling: else nothing is refilled"
        )
    if rollout.surplus == "carry" and rollout.oversample == 1:
        bad.append("rollout.surplus carry needs rollout.oversample above 1: else nothing is left over")
    if is_function_path(rollout.filter_metric) and not rollout.dynamic_sampling:
        bad.append(
            f"rollout.filter_metric {rollout.filter_metric} needs rollout.dynamic_sampling: else none is dropped"
        )
    return bad


def _check_tree(rollout: RolloutConfig) -> list[str]:
    """A tree of this shape can have its n_samples_per_prompt leaves, and its paths can reach their length."""
    if rollout.mode != "tree":
        odd = [name for name in ("token_budget", "partial_rollout") if getattr(rollout, name) is not None]
        return [f"rollout.{name} needs rollout.mode tree: sequential samples have one segment" for name in odd]
    bad = [*_check_segments(rollout), *_check_forks(rollout)]
    first = rollout.branching.factor
    width = rollout.n_samples_per_prompt
    if rollout.token_budget is not None and rollout.branching.transfer == "quota":
        bad.append(
            "rollout.token_budget needs rollout.branching.transfer level: under quota no path knows what others spent"
        )
    if rollout.token_budget is not None and rollout.token_budget < rollout.segment.length:
        bad.append(
            f"rollout.token_budget {rollout.token_budget} is less than one segment (rollout.segment.length "
            f"{rollout.segment.length}): it could not begin a tree"
        )
    bad += _check_budget(rollout)
    bad += _check_look_alikes(rollout)
    if rollout.partial_rollout is not None and rollout.debug.schedule == "level":
        bad.append("rollout.partial_rollout needs debug.schedule async")
    if rollout.branching.initial is not None:
        low, first = rollout.branching.initial
        if not 1 <= low <= first:
            return [*bad, f"rollout.branching.initial {[low, first]}: expected [lo, hi] with 1 <= lo <= hi"]
        if first > width:
            bad.append(
                f"rollout.branching.initial {[low, first]} exceeds rollout.n_samples_per_prompt {width}: a tree with "
                f"{width} leaves cannot begin with more branches than that"
            )
    # Of turns: rules_environment.py.
    if rollout.forks or rollout.segment.end == "turn":
        return bad
    # A path ends by its length, whatever max_depth allows.
    depth = min(rollout.depth_limit, -(-rollout.max_response_len // rollout.segment.length))
    # Bounded exponent: past 2**64 leaves the answer is the same, and a depth of 10,000 would make a huge integer.
    widest_branch = max(rollout.branching.factor, rollout.branching.after_observation or 0)
    reachable = first * widest_branch ** min(depth - 1, 64)
    widest = rollout.leaves_at_most
    if rollout.fallback.from_ == "none" and reachable < widest:
        key = "n_samples_per_prompt" if rollout.leaves == "fixed" else "most_leaves"
        begin = (
            "rollout.branching.factor" if rollout.branching.initial is None else "the most of rollout.branching.initial"
        )
        bad.append(
            f"rollout.{key} {widest} is out of reach: with rollout.fallback.from none, {begin} {first} "
            f"at the prompt and rollout.branching.factor {rollout.branching.factor} after each of the other "
            f"{depth - 1} segments, paths that run to their end give {reachable} leaves; use another "
            f"rollout.fallback.from, more branches, or a smaller rollout.segment.length than {rollout.segment.length}"
        )
    return bad


def _check_leaves(rollout: RolloutConfig) -> list[str]:
    """A handful decides about the rest of the leaves, and the trees can hold the leaves of a step."""
    width = rollout.n_samples_per_prompt
    if rollout.leaves == "fixed":
        if rollout.most_leaves is None:
            return []
        return [f"rollout.most_leaves {rollout.most_leaves} has no effect with rollout.leaves fixed; set adaptive"]
    bad = []
    if rollout.token_budget is not None:
        bad.append(
            "rollout.leaves adaptive with rollout.token_budget: both decide how many leaves a tree has. A tree whose "
            "tokens are spent could not take the leaves that its step has dealt to it; use one of the two keys"
        )
    if rollout.surplus == "carry":
        bad.append("rollout.leaves adaptive with rollout.surplus carry: what is left over has a handful of leaves only")
    if rollout.first_leaves >= width:
        bad.append(
            f"rollout.first_leaves {rollout.first_leaves} is not below rollout.n_samples_per_prompt {width}: nothing "
            "would be left to deal out"
        )
    if rollout.leaves_at_most < width:
        bad.append(
            f"rollout.most_leaves {rollout.most_leaves} is below rollout.n_samples_per_prompt {width}: a step "
            "could not spend its leaves even if no prompt were settled"
        )
    return bad


def _check_look_alikes(rollout: RolloutConfig) -> list[str]:
    """Look-alikes can be told by their first segments."""
    branching = rollout.branching
    tokens = branching.look_alike_tokens
    if branching.look_alikes == "keep":
        if tokens is None:
            return []
        return ["rollout.branching.look_alike_tokens has no effect with rollout.branching.look_alikes keep; set cut"]
    if rollout.forks:
        return ["rollout.branching.look_alikes cut needs rollout.branching.at border: forks start one at a time"]
    if tokens is not None and tokens > rollout.segment.length:
        return [
            f"rollout.branching.look_alike_tokens {tokens} exceeds rollout.segment.length {rollout.segment.length}: "
            "siblings are compared after their first segments"
        ]
    return []


def _check_budget(rollout: RolloutConfig) -> list[str]:
    """Every key of rollout.branching.budget has an effect, and some border can reach the floor."""
    budget = rollout.branching.budget
    scale = budget.scale_used
    if budget.kind == "equal":
        unused = {
            "temperature_end": budget.temperature_end is not None,
            "scale": budget.scale != "auto",
            "floor": budget.floor is not None,
        }
        why = "has no effect with rollout.branching.budget.kind equal: nothing is weighed"
        return [f"rollout.branching.budget.{name} {why}" for name, is_set in unused.items() if is_set]
    if is_function_path(budget.kind):
        odd = [name for name in ("scale", "floor") if getattr(budget, name) not in ("auto", None)]
        return [
            f"rollout.branching.budget.{name} has no effect with the plug-in {budget.kind}, which divides by itself"
            for name in odd
        ]
    bad = []
    if budget.temperature_end is not None and scale in ("share", "rank"):
        bad.append(
            f"rollout.branching.budget.temperature_end has no effect with rollout.branching.budget.scale {scale}, "
            "which has no temperature; use nats or zscore"
        )
    if budget.floor is None:
        return bad
    most = {"share": 1.0, "rank": 1.0, "zscore": 0.0}.get(scale)
    if most is not None and budget.floor > most:
        bad.append(
            f"rollout.branching.budget.floor {budget.floor:g} with rollout.branching.budget.scale {scale}: expected at "
            f"most {most:g}, which the best border of a level always reaches"
        )
    if budget.kind == "high_prob" and scale == "nats":
        bad.append(
            "rollout.branching.budget.floor with rollout.branching.budget.kind high_prob needs "
            "rollout.branching.budget.scale share, rank or zscore: in nats a probable border has no uncertainty"
        )
    return bad


def _check_forks(rollout: RolloutConfig) -> list[str]:
    """Keys that belong to branching at borders are not set when branches start at forks, and the other way round."""
    branching = rollout.branching
    fork = branching.fork
    if branching.at != "fork":
        return [
            f"rollout.branching.fork.{name} has no effect with rollout.branching.at border; leave it out, or set fork"
            for name, field in type(fork).model_fields.items()
            if getattr(fork, name) != field.default
        ]
    unused = {
        "rollout.branching.transfer quota": branching.transfer == "quota",
        f"rollout.branching.budget.kind {branching.budget.kind}": branching.budget.kind != "equal",
        "rollout.max_depth": rollout.max_depth is not None,
        "debug.segment_alignment kv_block": rollout.debug.segment_alignment == "kv_block",
    }
    bad = [
        f"{name} has no effect with rollout.branching.at fork, where branches start at tokens, not at levels of "
        "segments; leave it out, or set rollout.branching.at=border"
        for name, is_set in unused.items()
        if is_set
    ]
    if fork.threshold is not None and fork.signal != "entropy":
        bad.append(
            f"rollout.branching.fork.threshold needs rollout.branching.fork.signal entropy, which is {fork.signal}: "
            "the logprob of a token is not known before the token is sampled"
        )
    if fork.threshold is not None and rollout.token_budget is not None:
        bad.append(
            "rollout.branching.fork.threshold with rollout.token_budget: what other paths cost would decide which "
            "tokens fork, and the leaves would be no fair samples; use one of them"
        )
    if fork.threshold is not None and rollout.leaves == "adaptive":
        bad.append(
            "rollout.branching.fork.threshold with rollout.leaves adaptive: branches share a number of leaves that is "
            "fixed beforehand; set rollout.leaves=fixed, or no threshold"
        )
    return bad


def _check_segments(r: RolloutConfig) -> list[str]:
    """Segments can be as long as they are told to be, and enough of them fit on a path."""
    bad = []
    shortest = r.segment.length
    if r.ends_at_text:
        shortest = r.segment.min_length
        if r.debug.segment_alignment == "kv_block":
            bad.append("debug.segment_alignment kv_block needs rollout.segment.end length: steps end where they end")
        if r.segment.end == [] or (isinstance(r.segment.end, list) and not all(r.segment.end)):
            bad.append("rollout.segment.end: a list names at least one string, and none of them is empty")
        if shortest > r.segment.length:
            bad.append(
                f"rollout.segment.min_length {shortest} exceeds rollout.segment.length {r.segment.length}, the longest"
            )
    if r.segment.end == "turn":
        return bad
    if r.depth_limit * r.segment.length < r.max_response_len:
        bad.append(
            f"rollout.max_depth {r.depth_limit} x rollout.segment.length {r.segment.length} is less than "
            f"rollout.max_response_len {r.max_response_len}: no path could reach it"
        )
    return bad


def check_parallel(cfg: Config) -> list[str]:
    """The parallel settings do not contradict one another."""
    parallel = cfg.parallel
    bad = []
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        bad.append("parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1")
    if parallel.virtual_pipeline_model_parallel_size and parallel.pipeline_model_parallel_size < 2:
        bad.append("parallel.virtual_pipeline_model_parallel_size needs parallel.pipeline_model_parallel_size > 1")
    if parallel.recompute_granularity == "full" and not (parallel.recompute_method and parallel.recompute_num_layers):
        bad.append("parallel.recompute_granularity=full needs recompute_method and recompute_num_layers")
    return bad


def check_loss(cfg: Config) -> list[str]:
    """Objective and precisions do not contradict one another. Whether the machine has the latter: loss/te.py."""
    model = cfg.model
    loss = cfg.loss
    bad = []
    estimator = cfg.algo.advantage_estimator
    if cfg.algo.reject_zero_std_subgroups and estimator not in ("treepo", "treepo_size_weighted"):
        bad.append(
            "algo.reject_zero_std_subgroups needs algo.advantage_estimator treepo or treepo_size_weighted: "
            f"{estimator} has no subgroups"
        )
    fp8 = "fp8" in (loss.precision, loss.logprob_precision)
    if loss.fp8_grads and loss.precision != "fp8":
        bad.append(f"loss.fp8_grads needs loss.precision fp8, which is {loss.precision}")
    if cfg.debug.power_of_2_scales and not fp8:
        bad.append(f"debug.power_of_2_scales needs loss.precision fp8, which is {loss.precision}")
    if model.fp8 and model.params_dtype != "bf16":
        bad.append(f"model.fp8 {model.fp8} needs model.params_dtype bf16, which is {model.params_dtype}")
    if model.first_last_layers_bf16 and not model.fp8:
        bad.append("model.first_last_layers_bf16 needs model.fp8: without it every layer has model.params_dtype")
    # Megatron enters one FP8 context for all layers under this recipe: it cannot leave two of them out.
    if model.first_last_layers_bf16 and model.fp8_recipe == "delayed":
        bad.append("model.first_last_layers_bf16 cannot be had with model.fp8_recipe delayed; use tensorwise")
    return bad


def check_faults(cfg: Config, world_size: int) -> list[str]:
    """Deadlines follow one another, and a planted fault has a rank."""
    bad = []
    distributed = cfg.distributed
    longest = max(distributed.timeout_s, cfg.rollout.timeout_s)
    if distributed.hang_timeout_s is not None and distributed.hang_timeout_s <= longest:
        bad.append(
            f"distributed.hang_timeout_s {distributed.hang_timeout_s:g} must be longer than distributed.timeout_s "
            f"{distributed.timeout_s:g} and rollout.timeout_s {cfg.rollout.timeout_s:g}: a rank that waits for others "
            "would be taken for one that hangs"
        )
    fault = cfg.debug.fault
    if fault.kind != "none" and fault.rank >= world_size:
        bad.append(f"debug.fault.rank {fault.rank}: there are {world_size} ranks, the first is 0")
    return bad
