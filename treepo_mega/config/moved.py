"""Keys that are not here: those that have moved, and those that people know from other trainers.

Either kind is refused with the key to use instead. Pure data and one function over plain dicts.
"""

from __future__ import annotations

from typing import Any

_BRANCHING = "rollout.branching"
_BUDGET = "rollout.branching.budget"

MOVED: dict[str, str] = {
    "rollout.segment_length": "rollout.segment.length",
    "rollout.segment_end": "rollout.segment.end",
    "rollout.segment_min_length": "rollout.segment.min_length",
    "rollout.branch_factor": f"{_BRANCHING}.factor",
    "rollout.initial_branches": f"{_BRANCHING}.initial",
    "rollout.transfer": f"{_BRANCHING}.transfer",
    "rollout.budget": f"{_BUDGET}.kind",
    "rollout.budget_signal": f"{_BUDGET}.signal",
    "rollout.budget_top_k": f"{_BUDGET}.top_k",
    "rollout.budget_temperature": f"{_BUDGET}.temperature",
    "rollout.budget_temperature_end": f"{_BUDGET}.temperature_end",
    "rollout.budget_temperature_schedule": f"{_BUDGET}.temperature_schedule",
    "rollout.fallback": "rollout.fallback.from",
    "rollout.fallback_cut": "rollout.fallback.cut",
    "rollout.engine.canary_max_abs_diff": "reshard.canary.max_abs_diff",
    "rollout.engine.canary_mean_abs_diff": "reshard.canary.mean_abs_diff",
    "rollout.engine.enforce_eager": "rollout.engine.cuda_graphs",
    "reshard.canary_prompts": "reshard.canary.prompts",
    "reshard.canary_failure": "reshard.canary.on_failure",
    "loss.head.precision": "loss.precision",
    "loss.head.logprob_precision": "loss.logprob_precision",
    "loss.head.backend": "loss.backend",
    "loss.head.fp8_recipe": "loss.fp8_recipe",
    "loss.head.fp8_loud_channels": "loss.fp8_loud_channels",
    "loss.head.fp8_grads": "loss.fp8_grads",
    "loss.head.guard.sample_rows": "loss.guard.sample_rows",
    "loss.head.guard.max_abs_diff": "loss.guard.max_abs_diff",
    "train.logprob_chunk_size": "loss.tile_rows",
    "rollout.schedule": "debug.schedule",
    "rollout.continue_paths": "debug.continue_paths",
    "rollout.segment_alignment": "debug.segment_alignment",
    "rollout.engine.copy_partial_blocks": "debug.copy_partial_blocks",
    "loss.head.exact_target": "debug.exact_target",
    "loss.head.power_of_2_scales": "debug.power_of_2_scales",
}
"""Key of version 0.1 to the key of now."""

_TRUNCATED = "truncated sampling changes the logprobs that are trained on, so every token is sampled from the whole"
_TRUNCATED += " distribution; sharpen it with rollout.temperature"

KNOWN_ELSEWHERE: dict[str, str] = {
    "top_p": _TRUNCATED,
    "top_k": _TRUNCATED,
    "min_p": _TRUNCATED,
    "repetition_penalty": "a penalty changes the logprobs trained on; rollout.stop.repetition_window ends loops",
    "n": "set rollout.n_samples_per_prompt, the leaves of a tree",
    "num_generations": "set rollout.n_samples_per_prompt, the leaves of a tree",
    "train_batch_size": "set rollout.rollout_batch_size, the prompts of a step",
    "ppo_mini_batch_size": "set train.num_steps_per_rollout; train.global_batch_size counts trajectories",
    "ppo_micro_batch_size_per_gpu": "set train.max_tokens_per_gpu: micro-batches are packed by tokens",
    "per_device_train_batch_size": "set train.max_tokens_per_gpu: micro-batches are packed by tokens",
    "micro_batch_size": "set train.max_tokens_per_gpu: micro-batches are packed by tokens",
    "gradient_accumulation_steps": "it follows from train.max_tokens_per_gpu and train.global_batch_size",
    "use_dynamic_batch_size": "micro-batches are always packed by tokens; set train.max_tokens_per_gpu",
    "ppo_epochs": "set train.ppo_epochs, the passes over a rollout",
    "num_iterations": "set train.ppo_epochs, the passes over a rollout",
    "total_epochs": "set train.num_rollouts, the rollout steps of the run",
    "num_train_epochs": "set train.num_rollouts, the rollout steps of the run",
    "num_rollout": "set train.num_rollouts, the rollout steps of the run",
    "max_steps": "set train.num_rollouts, the rollout steps of the run",
    "learning_rate": "set train.lr",
    "max_grad_norm": "set train.clip_grad",
    "beta": "set algo.kl_loss_coef, the weight of KL(actor || reference)",
    "epsilon": "set algo.eps_clip",
    "epsilon_high": "set algo.eps_clip_high",
    "clip_ratio_low": "set algo.eps_clip",
    "clip_ratio_high": "set algo.eps_clip_high",
    "clip_ratio_c": "set algo.eps_clip_c",
    "delta": "set algo.eps_clip_c, the dual clip",
    "adv_estimator": "set algo.advantage_estimator",
    "use_kl_loss": "set algo.kl_loss_coef above 0",
    "use_kl_in_reward": "set reward.kl_coef above 0",
    "kl_ctrl": "set reward.kl_coef, a constant weight",
    "init_kl_coef": "set reward.kl_coef, a constant weight",
    "scale_rewards": "set algo.whiten_advantages",
    "loss_type": "set algo.loss_agg_mode and algo.ratio_level",
    "importance_sampling_level": "set algo.ratio_level",
    "max_prompt_length": "set data.max_prompt_len",
    "rollout_max_prompt_len": "set data.max_prompt_len",
    "max_response_length": "set rollout.max_response_len",
    "max_completion_length": "set rollout.max_response_len",
    "rollout_max_response_len": "set rollout.max_response_len",
    "train_files": "set data.train, a list of sources such as {path: train.parquet}",
    "val_files": "set data.eval, a list of sources such as {path: test.parquet}",
    "prompt_data": "set data.train, a list of sources such as {path: train.jsonl}",
    "prompt_key": "set data.input_key",
    "rm_type": "set data.verifier",
    "custom_reward_function": "set data.verifier to path/to/file.py:function",
    "save_steps": "set checkpoint.save_interval",
    "save_freq": "set checkpoint.save_interval",
    "test_freq": "set eval.interval",
    "eval_steps": "set eval.interval",
    "gradient_checkpointing": "set parallel.recompute_granularity",
    "enable_gradient_checkpointing": "set parallel.recompute_granularity",
    "free_cache_engine": "the engine always hands its memory over while the actor trains",
    "colocate": "actor and engine always share their ranks",
    "dynamic_sampling_filter_path": "set rollout.filter_metric to path/to/file.py:function",
    "custom_rm_path": "set data.verifier to path/to/file.py:function",
    "custom_rollout_log_function_path": "set logging.sinks to a list of path/to/file.py:function",
    "report_to": "set logging.sinks, such as [wandb]",
    "use_wandb": "set logging.sinks, such as [wandb]",
    "wandb_enabled": "set logging.sinks, such as [wandb]",
    "wandb_project": "set logging.project",
    "project_name": "set logging.project",
    "experiment_name": "set logging.run_name",
    "filter_groups": "set rollout.dynamic_sampling and rollout.filter_metric",
    "max_num_gen_batches": "set rollout.max_refills, one less: prompts replace others at once, there are no rounds",
    "gen_batch_size": "set rollout.oversample, a multiple of rollout.rollout_batch_size",
    "over_sampling_batch_size": "set rollout.oversample, a multiple of rollout.rollout_batch_size",
    "overlong_buffer": "set reward.overlong.buffer_len and reward.overlong.penalty",
    "overlong_buffer_cfg": "set reward.overlong.buffer_len and reward.overlong.penalty",
    "mask_truncated_completions": "set algo.mask_truncated_samples",
    "tis_imp_ratio_cap": "set algo.tis_clip",
    "rollout_is_threshold": "set algo.tis_clip",
    "rollout_is_level": "set algo.rollout_is",
    "rollout_is_mode": "set algo.rollout_is to weigh (truncate), algo.rollout_rs to reject (mask)",
    "rollout_is_veto_threshold": "set algo.rollout_token_veto_threshold",
}
"""Last part of a key of verl, slime or TRL to why it is not here and what to set instead."""


def moved_keys(raw: Any) -> list[str]:
    """A sentence for each key of `raw`, the plain configuration, that has another name now."""
    found = []
    for old, new in MOVED.items():
        *sections, name = old.split(".")
        section = raw
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or name not in section:
            continue
        # `rollout.fallback` is a section now: only a plain value under it is the key of before.
        if not isinstance(section[name], dict):
            found.append(f"{old} is now {new}")
    checkpoint = raw.get("checkpoint") if isinstance(raw, dict) else None
    if isinstance(checkpoint, dict) and checkpoint.get("save") == "":
        found.append('checkpoint.save "" is now checkpoint.enabled false')
    return found
