"""Every metric a run may log, with its unit, its healthy range and what it means.

One place for names, so that dashboards, the report and the trainer cannot drift apart: a test asks
`check_known` for every name a run wrote. Prefixes follow what users of slime and verl expect
(`train/ rollout/ tree/ reward/ reshard/ perf/ timing_s/ cpu_s/ eval/`); `learning-rate` and `grad-norm` are
Megatron's own names, kept as they are for people with old dashboards.

A name may hold alternatives in braces: `tree/stop_{eos,answer}` stands for two metrics. No name is
both a metric and the folder of another (`a` and `a/b`): loggers that map names to files cannot store that.
"""

from __future__ import annotations

from treepo_mega.errors import nearest
from treepo_mega.monitor.metric import Metric
from treepo_mega.monitor.registry_machine import COSTS, LOGGING, MACHINE, RANKS

_OPTIMISATION = (
    Metric("train/loss", "nats/token", "no trend required; finite", "policy loss plus KL and entropy terms"),
    Metric("train/pg_loss", "nats/token", "near 0", "clipped policy-gradient term alone"),
    Metric("train/pg_clipfrac", "share", "0 at the first mini-batch; below 0.2", "tokens at which the clip was active"),
    Metric("train/ppo_kl", "nats/token", "0 at the first mini-batch; below 0.1", "mean of old_logp - logp"),
    Metric("train/ratio_max_diff", "ratio", "0 at the first mini-batch", "largest |exp(logp - old_logp) - 1|"),
    Metric("train/routing_differs", "share", "below 0.1 in bf16", "choices of experts that are not the engine's"),
    Metric("train/kl_loss", "nats/token", "0 at the first step; below 1", "KL(actor || reference), kl_loss_type"),
    Metric(
        "train/tis_weight",
        "ratio",
        "near 1",
        "mean importance weight of a token; 1 with algo.use_tis off, or by trajectory",
    ),
    Metric(
        "train/token_mult_prob_error",
        "ratio",
        "below 1.05; NeMo-RL's own runs fail above 1.1. Above: look at reshard/canary_abs_diff, then at dtypes",
        "mean exp|engine - actor| of logprobs, as NeMo-RL defines it; a shared token counts once a trajectory",
    ),
    Metric(
        "train/gen_kl_error",
        "nats/token",
        "below 0.002; above 0.02 engine and trainer differ: algo.use_tis, fp32 heads, or a bug",
        "KL(engine || actor) on sampled tokens, estimator k3 (NeMo-RL)",
    ),
    Metric("train/policy_kl_error", "nats/token", "near gen_kl_error", "KL(actor || engine), estimator k3 (NeMo-RL)"),
    Metric(
        "train/js_divergence_error",
        "nats/token",
        "about a quarter of gen_kl_error",
        "Jensen-Shannon divergence of engine and actor, estimator k3 (NeMo-RL)",
    ),
    Metric(
        "train/sampling_importance_ratio",
        "ratio",
        "near 1; a drift to one side is a bias: look at temperature and at masks of the engine",
        "mean exp(actor - engine) of sampled tokens, unbounded (NeMo-RL)",
    ),
    Metric(
        "train/is_eff_sample_size",
        "share",
        "above 0.95; below 0.5 half of the tokens teach nothing: algo.use_tis or a smaller lag",
        "effective sample size of these ratios / tokens: (sum of ratios)^2 / (tokens x sum of squares)",
    ),
    Metric(
        "train/log_ratio_share_{0.001,0.01,0.1,1,more}",
        "share",
        "nearly all up to 0.01 in fp32, up to 0.1 in bf16; none at more",
        "tokens by |engine - actor| of their logprobs, nats: up to each number, and above the one before",
    ),
    Metric(
        "train/gen_kl_error_depth_{1,2,4,8}",
        "nats/token",
        "alike; a rise with depth is an error that a cached prefix carries along",
        "gen_kl_error of tokens in the first segment of a path, in 2 and 3, in 4 to 7, and from 8 on; absent without",
    ),
    Metric("train/entropy", "nats/token", "slow decline; not 0", "mean entropy of the actor's next-token law"),
    Metric("train/head_logp_abs_diff", "nats", "below 0.03", "mean |logp_fp8 - logp_bf16| of a sample; fp8 head only"),
    Metric("train/head_logp_abs_diff_max", "nats", "below 0.2", "largest |logp_fp8 - logp_bf16| of that sample"),
    Metric("train/head_gate_flips", "share", "below 0.01", "clip gates of that sample at which fp8 and bf16 differ"),
    Metric("train/head_fallback", "0 or 1", "0", "the step ran with a bf16 head, for the fp8 one was too far from it"),
    Metric("train/skipped_steps", "count", "0", "optimizer steps skipped for a non-finite gradient, this step"),
    Metric(
        "train/ranks_split", "count", "0", "ranks without memory for a pack, which then split theirs: by step, a sum"
    ),
    Metric("train/nonfinite_metrics", "count", "absent", "metrics of this step that were NaN or infinite (null here)"),
    Metric("learning-rate", "1", "follows the schedule", "learning rate of the last optimizer step (Megatron's name)"),
    Metric("grad-norm", "1", "no spikes", "gradient norm before clipping (Megatron's name)"),
)

_ROLLOUT = (
    Metric("rollout/reward_policy", "reward", "rises", "estimate of the policy's mean reward, whatever the sampler"),
    Metric(
        "rollout/accuracy_policy",
        "share",
        "rises; 0.1 to 0.9 teaches most",
        "estimate of the policy's share of verdicts above 0.5, whatever the sampler: leaves count by their descent",
    ),
    Metric("rollout/response_len_policy", "tokens", "no jump", "estimate of the policy's mean response length"),
    Metric("rollout/reward_mean", "reward", "rises", "mean reward of the trajectories sampled, before any drop"),
    Metric(
        "rollout/accuracy", "share", "rises", "leaves with a verdict above 0.5; trees over-represent long responses"
    ),
    Metric("rollout/response_len_mean", "tokens", "no jump", "mean response length of the leaves"),
    Metric("rollout/response_len_max", "tokens", "at most max_response_len", "longest response"),
    Metric("rollout/truncated_share", "share", "below 0.2", "trajectories cut by length or depth"),
    Metric(
        "rollout/prompts_dropped_zero_std",
        "count",
        "below half",
        "prompts dropped: all rewards equal, refused by a filter plug-in, or no leaf left",
    ),
    Metric("rollout/leaves_masked", "count", "0 without algo.mask_truncated_samples", "cut leaves that count nothing"),
    Metric("rollout/prompts_trained", "count", "rollout.rollout_batch_size", "prompts that the step trained on"),
    Metric(
        "rollout/leaves_unspent",
        "count",
        "near 0; always 0 under rollout.leaves fixed",
        "leaves of the step that no prompt with signal could take (rollout.most_leaves)",
    ),
    Metric(
        "rollout/prompts_surplus", "count", "0 with oversample 1", "prompts with signal that the batch had no room for"
    ),
    Metric(
        "rollout/signal_share",
        "share",
        "above 0.5; below: prompts are too easy or too hard, see rollout/accuracy_policy",
        "of the prompts finished in the step, those that teach something: not prompts_dropped_zero_std",
    ),
    Metric("rollout/refills", "count", "below rollout_batch_size", "prompts that began in place of others"),
    Metric("rollout/wasted_tokens", "tokens", "0 with oversample 1", "tokens sampled of the surplus that was dropped"),
    Metric("rollout/surplus_trained", "count", "0 without rollout.surplus carry", "trees left over by earlier steps"),
    Metric("rollout/prompts_settled", "count", "0 under leaves fixed", "prompts lost after a handful of leaves"),
    Metric("rollout/tokens_saved", "tokens", "0 under leaves fixed", "what their other leaves would have cost, about"),
    Metric(
        "rollout/logprob_abs_diff_mean",
        "nats",
        "below 1e-4 in fp32, 1e-2 in bf16",
        "mean |engine - actor| logp of what the weights of this step sampled",
    ),
    Metric("rollout/routing_noted", "share", "1", "sampled tokens whose predicting token has the engine's experts"),
    Metric("rollout/logprob_abs_diff_max", "nats", "below 1e-3 in fp32, 1 in bf16", "the largest of them"),
    Metric("rollout/is_weight_mean", "ratio", "near 1; absent by token", "mean importance weight of the trajectories"),
    Metric(
        "rollout/is_ratio_{min,max}",
        "ratio",
        "between 0.5 and 2; absent by token",
        "smallest and largest ratio trainer / engine of a trajectory, as algo.rollout_is has it, before its bounds",
    ),
    Metric("rollout/leaves_rejected", "count", "small beside leaves; absent when off", "trajectories rejected for it"),
    Metric("rollout/generated_tokens", "tokens", "unique_tokens plus dropped prompts", "tokens sampled"),
    Metric("rollout/cached_tokens", "tokens", "most of the prefix tokens", "prefix tokens found in the KV cache"),
    Metric("rollout/recomputed_tokens", "tokens", "small beside cached_tokens", "prefix tokens prefilled again"),
    Metric("rollout/dropped_tokens", "tokens", "small beside generated_tokens", "of those, cut off behind an answer"),
    Metric("rollout/forwarded_tokens", "tokens", "unique_tokens plus prompts", "tokens that went through the model"),
    Metric(
        "rollout/forwarded_pairs",
        "pairs",
        "-",
        "(query, key) pairs of attention that these tokens saw, themselves included",
    ),
    Metric("rollout/engine_steps", "count", "engines x the longest path", "forward steps of the engines"),
    Metric(
        "rollout/running_mean", "segments", "near engine.max_num_seqs", "segments in an engine's batch, mean of steps"
    ),
    Metric("rollout/engine_idle_share", "share", "below 0.1", "of the engines' time spent waiting for the slowest one"),
    Metric("rollout/engine_idle_share_max", "share", "below 0.3", "the same, of the engine that waited most"),
    Metric(
        "rollout/engine_grader_wait_share",
        "share",
        "below 0.05",
        "of the engines' time with nothing to sample until graders said whether trees are replaced",
    ),
    Metric(
        "rollout/idle_share/{tail,memory,refill,graders,tools,engines}",
        "share",
        "memory, refill and graders near 0",
        "of the engines' room (the most segments that ran at once) that was empty: nothing left to begin; no KV "
        "blocks; graders had yet to say what is replaced, beside others or alone; waiting for other engines",
    ),
    Metric("rollout/prompts_stolen", "count", "small", "prompts begun by another engine than they were dealt to"),
    Metric("rollout/trees_restored", "count", "0 but after a kill", "trees that were on disk (rollout.durable)"),
    Metric("rollout/tokens_restored", "tokens", "0 but after a kill", "tokens sampled for these trees"),
    Metric("rollout/trees_resumed", "count", "0 without partial_rollout", "trees carried over from the step before"),
    Metric(
        "rollout/trees_carried_over", "count", "0 without partial_rollout", "unfinished trees left to the next step"
    ),
    Metric("rollout/stale_token_share", "share", "below 0.3", "unique tokens trained on that older weights sampled"),
)

_TREE = (
    Metric("tree/token_ratio", "ratio", "below 1; 1 without sharing", "unique tokens / flat tokens"),
    Metric("tree/unique_tokens", "tokens", "-", "response tokens of the forest, shared ones once"),
    Metric("tree/flat_tokens", "tokens", "-", "response tokens of all trajectories one by one"),
    Metric("tree/prompt_tokens", "tokens", "-", "prompt tokens of the forest, once a tree"),
    Metric("tree/flat_prompt_tokens", "tokens", "-", "prompt tokens of all trajectories one by one"),
    Metric("tree/depth_mean", "segments", "above 1", "mean depth of the leaves"),
    Metric("tree/depth_max", "segments", "at most max_depth", "depth of the deepest leaf"),
    Metric("tree/duplicates", "count", "small beside leaves", "leaves whose response equals another's of the tree"),
    Metric("tree/budget_temperature", "nats", "follows its schedule", "temperature of the branching budget"),
    Metric(
        "tree/look_alikes", "count", "0 with look_alikes keep", "branches that were cut because they repeat a sibling"
    ),
    Metric("tree/look_alike_tokens", "tokens", "small beside unique_tokens", "tokens of the branches that were cut"),
    Metric("tree/distinct_share", "share", "near 1", "distinct responses / leaves, in each tree"),
    Metric(
        "tree/effective_samples",
        "count",
        "1 to n_samples_per_prompt, the higher the better",
        "1 / sum of squared shares of the distinct responses of a tree, mean over trees",
    ),
    Metric(
        "tree/independent_q{1,2,3,4}",
        "count",
        "rises to effective_samples; n_samples_per_prompt with independent samples",
        "draws of the policy that a tree's leaves stand for in each quarter of their paths, mean over trees",
    ),
    Metric(
        "tree/divergence_depth",
        "tokens",
        "below response_len_mean",
        "response tokens before the first difference of two unlike leaves of a tree, mean over pairs",
    ),
    Metric(
        "tree/leaves_per_prompt_{min,mean,max}",
        "count",
        "n_samples_per_prompt; around it under rollout.leaves adaptive",
        "leaves of a tree that is trained on",
    ),
    Metric(
        "tree/budget_divergence",
        "share",
        "0 to 1; 0 for equal",
        "mean distance (total variation) of the allocation of branches from an equal one, over decisions",
    ),
    Metric("tree/leaves", "count", "prompts x n_samples_per_prompt", "trajectories trained on"),
    Metric("tree/leaves_chosen", "count", "algo.update_share x leaves", "of these, those that the update computes"),
    Metric(
        "tree/credit_q{1,2,3,4}",
        "share",
        "rising from q1 to q4; 0.25 each without sharing",
        "share of the credit, |mean advantage of the trajectories through a token|, in each quarter of the path",
    ),
    Metric("tree/fallbacks", "count", "small beside leaves", "paths cut back and resampled to reach the leaf count"),
    Metric("tree/forks", "count", "0 at borders", "branches that started at an uncertain token of an ended path"),
    Metric(
        "tree/fork_uncertainty_mean",
        "nats",
        "above the mean entropy",
        "entropy where forks started; by logprob, 0 to 1",
    ),
    Metric("tree/shortfall", "count", "0", "leaves missing from trees that ran dry (reason kept in the tree)"),
    Metric("tree/stop_{eos,answer,length,depth,repetition}", "count", "mostly eos or answer", "leaves by stop reason"),
    Metric("tree/stop_{context,lost}", "count", "0; with an environment", "leaves that it ended: no room, or lost"),
)

_ENVIRONMENT = (
    Metric("env/turns", "count", "what the task needs", "turns of a trajectory that the environment answered, mean"),
    Metric("env/observation_tokens", "tokens", "below max_observation_len", "tokens of its answers, a trajectory"),
    Metric("env/hidden_tokens", "tokens", "0 but for history: fork", "tokens that later turns do not see, a path"),
    Metric(
        "env/tool_calls", "count", "falls with useless calls", "calls of the step; one that paths share counts once"
    ),
    Metric("env/tool_errors", "share", "falls", "of these, calls that were answered with an error"),
    Metric("env/latency_s", "s", "below a segment's time", "from a turn's calls to their answers, mean"),
    Metric("env/wait_share", "share", "near 0: other paths go on meanwhile", "sampling time with nothing but tools"),
    Metric("env/state_copies", "count", "near the turns of the step", "states that branches copied"),
    Metric("env/state_replays", "count", "0 but for trees that go on", "states rebuilt from their calls"),
    Metric("env/worker_restarts", "count", "0", "worker processes that hung, died or filled their memory"),
    Metric("env/lost", "count", "0", "requests after which a trajectory could not go on, or had no reward"),
)

ANY_REWARD = "reward/<name>"
"""Stands for the numbers that verifiers give beside their scores; their names are the verifiers' own."""

_REWARD = (
    Metric("reward/lost", "count", "0", "gradings lost to a timeout, crash or NaN; never scored 0 in silence"),
    Metric(
        "reward/overlapped_share",
        "share",
        "near 1 with quick verifiers",
        "gradings that had ended when their engine had done sampling; the rest is waited for in timing_s/reward",
    ),
    Metric("reward/mean", "reward", "rises", "mean reward of the trajectories trained on"),
    Metric(
        "reward/remote_calls", "count", "answers / batch_size at most", "requests to reward servers, retries included"
    ),
    Metric("reward/remote_retries", "count", "0", "of these, requests that were not the first try"),
    Metric("reward/remote_cached", "count", "rises", "answers whose score was known, or asked for already"),
    Metric("reward/overlong_penalty", "reward", "near 0; absent when off", "mean of reward.overlong over the answers"),
    Metric("reward/kl", "nats", "slow rise; absent when off", "KL of a response from the reference, mean of leaves"),
    Metric("reward/kl_penalty", "reward", "small beside rewards; absent when off", "mean of -reward.kl_coef x that KL"),
    Metric(
        ANY_REWARD, "the verifier's", "-", "mean of a number that a verifier's dict holds, over answers that have it"
    ),
)

_RESHARD = (
    Metric("reshard/bytes", "bytes", "constant", "weight bytes placed into the engines, all ranks"),
    Metric("reshard/bytes_moved", "bytes", "constant", "of these, bytes that came from another rank"),
    Metric("reshard/bytes_over_bound", "ratio", "1", "bytes_moved / what receivers did not already hold"),
    Metric("reshard/buffer_bytes", "bytes", "at most 2 x reshard.bucket_mb", "transfer buffers of a rank"),
    Metric("reshard/seconds", "s", "small beside rollout", "time of one refit, without the canary"),
    Metric("reshard/transport_s", "s", "most of reshard/seconds on CUDA", "transfer and placement, slowest rank"),
    Metric("reshard/pack_s", "s", "0 on CUDA; leads on CPU", "the engine's own packing of new weights, slowest rank"),
    Metric("reshard/gb_per_s", "GB/s", "near the link's speed", "bytes / transport_s / 1e9"),
    Metric("reshard/handover_{freed,taken}_bytes", "bytes", "constant", "memory given by trainer / taken by engine"),
    Metric("reshard/canary_abs_diff", "nats", "below 1e-3 in fp32", "engine vs actor logp of fixed prompts, after it"),
    Metric("reshard/canary_mean_abs_diff", "nats", "below 5e-5 in fp32", "the same, mean over their tokens"),
    Metric("reshard/canary_failures", "count", "0", "1 when the canary was above its limit (on_failure warn)"),
)

_PERF = (
    Metric("perf/tokens_per_s", "tokens/s", "steady", "tree/unique_tokens / step time, all ranks"),
    Metric(
        "perf/unique_tokens_per_s_per_gpu",
        "tokens/s",
        "steady",
        "perf/packed_tokens / step time / GPUs (ranks on a CPU): tokens trained on, prompts included, shared ones once",
    ),
    Metric(
        "perf/flat_tokens_per_s_per_gpu",
        "tokens/s",
        "above unique, by the sharing",
        "the same of the trajectories one by one: NeMo-RL's tokens_per_sec_per_gpu",
    ),
    Metric(
        "perf/{rollout,old_logprobs,ref_logprobs,update}_unique_tokens_per_s_per_gpu",
        "tokens/s",
        "steady",
        "tokens of a phase, prompts included and shared ones once, / its timing_s / GPUs; of the rollout, dropped "
        "prompts count too; absent where nothing was computed",
    ),
    Metric(
        "perf/{rollout,old_logprobs,ref_logprobs,update}_flat_tokens_per_s_per_gpu",
        "tokens/s",
        "above unique, by the sharing",
        "the same of the trajectories one by one: NeMo-RL's definition by stage",
    ),
    Metric(
        "perf/{rollout,old_logprobs,ref_logprobs,update}_tflops_per_gpu",
        "TFLOP/s",
        "steady",
        "products of matrices that a phase needs, from exact attention pairs, / its timing_s / GPUs; padding and "
        "recomputation left out",
    ),
    Metric(
        "perf/{rollout,old_logprobs,ref_logprobs,update}_mfu",
        "share",
        "0.3 to 0.5 for update; rollout far below, decoding waits for memory; above 1 is a bug",
        "these at the device's peak / timing_s; absent on a CPU and on a device that monitor/flops.py does not list",
    ),
    Metric("perf/update_hfu", "share", "at least update_mfu, below 1", "update_mfu with recomputation counted"),
    Metric(
        "perf/update_recompute_share",
        "share",
        "0 without parallel.recompute_granularity; 0.25 at most",
        "of the update's FLOPs, those that its backward pass computes again",
    ),
    Metric("perf/packed_tokens", "tokens", "near token_ratio x flat", "tokens of a training pass, prompts included"),
    Metric(
        "perf/packed_token_ratio",
        "ratio",
        "below 1; 1 with prefix_sharing none",
        "tokens of a training pass (ancestors of cut trees repeated) / tokens of its trajectories one by one",
    ),
    Metric("perf/padding_share", "share", "below 0.05", "padding in the tokens of a training pass"),
    Metric("perf/loss_rows", "tokens", "tree/unique_tokens", "tokens with a loss, shared ones once"),
    Metric("perf/step_s", "s", "steady", "wall time of the step, evaluation and checkpoint excluded"),
    Metric(
        "perf/gpu_hours",
        "h",
        "grows by GPUs x hours; compare reward at equal values",
        "GPUs (ranks on a CPU) x hours since the run began, start-up, evaluation and checkpoints included; after a "
        "resume it goes on from the last step that is kept",
    ),
    Metric("perf/cost", "price's", "-", "perf/gpu_hours x logging.price_per_gpu_hour; absent without a price"),
    Metric(
        "timing_s/{rollout,reward,advantage,old_logprobs,ref_logprobs,update,reshard,checkpoint,eval,step}",
        "s",
        "rollout and update lead",
        "wall time of a phase on rank 0",
    ),
    Metric(
        "cpu_s/{rollout,reward,advantage,old_logprobs,ref_logprobs,update,reshard,checkpoint,eval,step}",
        "s",
        "near timing_s times the rank's threads on a CPU",
        "CPU time of rank 0's process in a phase, all its threads; graders not included",
    ),
)

_EVAL = (
    Metric("eval/accuracy", "share", "rises", "mean correctness of single samples at eval.temperature"),
    Metric("eval/pass_at_n", "share", "at least accuracy", "prompts with one correct sample of n"),
    Metric("eval/maj_at_n", "share", "at least accuracy as a rule", "prompts whose majority answer is correct"),
    Metric("eval/greedy_accuracy", "share", "rises", "correctness of the greedy response"),
    Metric(
        "eval/perplexity",
        "1",
        "no jump: a better solver need not write like the references",
        "exp of the mean -logp per token of the evaluation rows' reference texts (data.reference_key) and end marks "
        "at temperature 1; absent when no row has one",
    ),
    Metric("eval/response_len_mean", "tokens", "no jump", "mean response length in evaluation"),
)

METRICS: tuple[Metric, ...] = (_OPTIMISATION + _ROLLOUT + _TREE + _ENVIRONMENT + _REWARD + _RESHARD) + (
    _PERF + COSTS + MACHINE + RANKS + LOGGING + _EVAL
)


def known_names() -> dict[str, Metric]:
    """Concrete name -> its documentation."""
    return {name: metric for metric in METRICS for name in metric.names()}


def check_known(name: str) -> Metric:
    """The documentation of `name`; KeyError names the nearest documented metric when there is none."""
    names = known_names()
    if name not in names:
        # A verifier's dict may hold any number, which becomes `reward/<its name>`: nobody can list those beforehand.
        if name.startswith("reward/"):
            return names[ANY_REWARD]
        raise KeyError(f"metric {name!r} is not documented in monitor/registry.py{nearest(name, names)}")
    return names[name]


_CLOCKED = (
    *("time", "timing_s/", "cpu_s/", "perf/", "gpu/", "host/", "logging/"),
    *("ranks/", "memory/", "startup_s/"),
    *("reshard/seconds", "reshard/transport_s", "reshard/pack_s", "reshard/gb_per_s"),
    *("rollout/engine_steps", "rollout/engine_idle_share", "rollout/running_mean", "rollout/prompts_stolen"),
    *(f"rollout/engine_{part}_" for part in ("step", "token", "request")),
    "rollout/requests",
    *("reward/overlapped_share", "reward/remote_calls", "reward/remote_retries", "reward/remote_cached"),
    *("rollout/engine_grader_wait_share", "rollout/idle_share/"),
    *("env/latency_s", "env/wait_share", "env/state_", "env/worker_restarts"),
    # An engine that runs dry takes prompts from another one: what a prefix cache holds then depends on speed.
    *("rollout/cached_tokens", "rollout/recomputed_tokens", "rollout/forwarded_tokens"),
    *("rollout/forwarded_pairs", "rollout/trees_restored", "rollout/tokens_restored"),
)


def depends_on_time(name: str) -> bool:
    """Whether a metric says how a step went rather than what it made: its seconds, who sampled what and beside whom.

    All others are the same in two runs of the same configuration, stopped and resumed or not.
    """
    return name.startswith(_CLOCKED)
