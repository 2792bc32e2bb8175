"""What follows from other keys: values that `Config` fills in where a key was left at null.

Each rule names its key and computes one value. The rules run in order, so a rule may read what an earlier one
derived. `Config.derived` records what was filled in, and the saved file shows it as a comment.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treepo_mega.text.function_path import is_function_path

if TYPE_CHECKING:
    from treepo_mega.config.root import Config


def _trajectories_per_step(cfg: Config) -> int:
    made = cfg.rollout.rollout_batch_size * cfg.rollout.n_samples_per_prompt
    return max(1, made // cfg.train.num_steps_per_rollout)


def _canary_limit(cfg: Config, fp32: float, low: float, quantized: float) -> float:
    """The limit for the precisions of engine and actor, nats."""
    engine = cfg.rollout.engine
    if engine.quantization:
        return quantized
    return fp32 if engine.dtype == cfg.model.params_dtype == "fp32" else low


def _precisions_differ(cfg: Config) -> bool:
    """Whether samples come from another policy than the one whose logprobs are trained on, or are to be weighed so."""
    if cfg.algo.rollout_is is not None:
        return True
    # The ratio to the engine's logprobs holds the correction already.
    if cfg.algo.old_logprobs == "rollout":
        return False
    precisions = {cfg.rollout.engine.dtype, cfg.model.params_dtype, cfg.loss.logprob_precision}
    return precisions != {"fp32"} or cfg.rollout.partial_rollout is not None


def _whitens(cfg: Config) -> bool:
    """Whether the estimator is made to be whitened; a plug-in says itself what an advantage is."""
    estimator = cfg.algo.advantage_estimator
    return estimator.startswith(("treepo", "reinforce")) and not is_function_path(estimator)


def _hang_timeout(cfg: Config) -> float:
    """Seconds: every wait meets its own deadline first, and that error knows what was waited for."""
    longest = max(cfg.distributed.timeout_s, cfg.rollout.timeout_s)
    return max(1.1 * longest, longest + 30)


RULES: dict[str, Callable[[Config], Any]] = {
    "train.global_batch_size": _trajectories_per_step,
    "rollout.engine.dtype": lambda cfg: cfg.model.params_dtype,
    "reshard.canary.max_abs_diff": lambda cfg: _canary_limit(cfg, 1e-3, 2.0, 4.0),
    "reshard.canary.mean_abs_diff": lambda cfg: _canary_limit(cfg, 5e-5, 0.15, 0.33),
    # In this order: logprob_precision reads precision, and use_tis reads logprob_precision.
    "loss.precision": lambda cfg: cfg.model.params_dtype,
    "loss.logprob_precision": lambda cfg: cfg.loss.precision,
    "algo.use_tis": _precisions_differ,
    "algo.whiten_advantages": _whitens,
    "checkpoint.save": lambda cfg: str(Path(cfg.logging.run_dir) / "checkpoints"),
    "distributed.hang_timeout_s": _hang_timeout,
    "train.lr_decay_iters": lambda cfg: cfg.train.num_rollouts * cfg.train.num_steps_per_rollout * cfg.train.ppo_epochs,
}
"""Key to the value that it has when it is null."""


def derive(cfg: Config) -> dict[str, Any]:
    """Fill in every key of RULES that is null; returns those keys with their values."""
    derived: dict[str, Any] = {}
    for key, rule in RULES.items():
        *sections, name = key.split(".")
        section: Any = cfg
        for part in sections:
            section = getattr(section, part)
        if getattr(section, name) is None:
            derived[key] = rule(cfg)
            setattr(section, name, derived[key])
    return derived
