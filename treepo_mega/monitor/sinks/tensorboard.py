"""TensorBoard: scalars, histograms, sample texts, hyper-parameters, and a layout that opens on the curves that matter.

    board = TensorBoard(run_dir / "tensorboard", purge_step=0, config=flat(cfg.model_dump()))
    board.scalars(step, time, {"train/loss": 0.1})
    board.histograms(step, {"histograms/advantages": values})
    board.close()

The layout is the tab "Custom scalars". `purge_step`: TensorBoard hides what earlier files hold from that step on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PHASES = ("rollout", "reward", "old_logprobs", "ref_logprobs", "update", "reshard")

LAYOUT: dict[str, dict[str, tuple[str, ...]]] = {
    "1 Learning": {
        "accuracy": ("rollout/accuracy_policy", "eval/accuracy", "eval/greedy_accuracy", "eval/pass_at_n"),
        "reward": ("rollout/reward_policy", "reward/mean"),
        "response length": ("rollout/response_len_policy", "eval/response_len_mean"),
        "entropy": ("train/entropy",),
        "policy moved": ("train/ppo_kl", "train/kl_loss", "train/pg_clipfrac"),
        "gradient norm": ("grad-norm",),
    },
    "2 Engine against trainer": {
        "token_mult_prob_error": ("train/token_mult_prob_error",),
        "KL": ("train/gen_kl_error", "train/policy_kl_error", "train/js_divergence_error"),
        "KL by depth": tuple(f"train/gen_kl_error_depth_{depth}" for depth in (1, 2, 4, 8)),
        "importance": ("train/sampling_importance_ratio", "train/is_eff_sample_size"),
    },
    "3 Trees": {
        "token ratio": ("tree/token_ratio", "perf/packed_token_ratio"),
        "credit along the path": tuple(f"tree/credit_q{quarter}" for quarter in (1, 2, 3, 4)),
        "prompts": ("rollout/prompts_trained", "rollout/prompts_dropped_zero_std"),
        "diversity": ("tree/distinct_share", "rollout/truncated_share"),
    },
    "4 Speed": {
        "seconds by phase": (*(f"timing_s/{phase}" for phase in PHASES), "timing_s/step"),
        "tokens/s per GPU": ("perf/unique_tokens_per_s_per_gpu", "perf/flat_tokens_per_s_per_gpu"),
        "MFU": ("perf/rollout_mfu", "perf/old_logprobs_mfu", "perf/update_mfu"),
        "idle": ("ranks/idle_share", "rollout/engine_idle_share", "rollout/engine_grader_wait_share"),
    },
    "5 Machines": {
        "GPU": ("gpu/utilization_mean", "gpu/throttled_share_mean"),
        "GPU memory, GiB": ("gpu/memory_used_gib_max",),
        "host memory, GiB": ("host/memory_used_gib_max", "host/rss_gib_max"),
        "faults": ("reward/lost", "train/skipped_steps", "train/nonfinite_metrics", "reshard/canary_failures"),
    },
}
"""Section to chart to the metrics that are drawn in it."""

OUTCOMES = ("eval/accuracy", "rollout/reward_policy", "tree/token_ratio", "perf/step_s")
"""What the tab "HParams" compares runs by."""


class TensorBoard:
    """Event files of one run. `config`: flat, key to number, bool or text; shown as hyper-parameters."""

    def __init__(self, directory: Path, *, purge_step: int, config: Mapping[str, Any] | None = None) -> None:
        # Imported here: it costs a torch import, which readers of a run do not need.
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(log_dir=str(directory), purge_step=purge_step)
        self._writer.add_custom_scalars(_layout())
        self._end: Any = None
        if config:
            experiment, begin, self._end = hparams(dict(config), dict.fromkeys(OUTCOMES, 0.0))
            # Not `add_hparams`: it puts every call into a folder of its own, which then looks like another run.
            self._summary(experiment)
            self._summary(begin)
        self._writer.flush()

    def _summary(self, summary: Any) -> None:
        writer = self._writer.file_writer
        assert writer is not None, "it is gone only when the board is closed"
        writer.add_summary(summary)

    def scalars(self, step: int, when: float, values: Mapping[str, float | None]) -> None:
        """Numbers of `step`; None, which was not finite, is left out. `when`: Unix seconds."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, global_step=step, walltime=when)
        self._writer.flush()

    def histograms(self, step: int, values: Mapping[str, Sequence[float]]) -> None:
        """Distributions of `step`; empty ones are left out."""
        for name, numbers in values.items():
            if len(numbers):
                self._writer.add_histogram(name, np.asarray(numbers, np.float64), global_step=step)

    def shares(self, step: int, name: str, limits: Sequence[float], shares: Sequence[float]) -> None:
        """A distribution that is known as the share up to each of `limits`, which ascend from 0."""
        middles = (np.array([0.0, *limits[:-1]]) + np.array(limits)) / 2
        weights = np.asarray(shares, np.float64)
        self._writer.add_histogram_raw(
            name,
            min=0.0,
            max=limits[-1],
            num=float(weights.sum()),
            sum=float(weights @ middles),
            sum_squares=float(weights @ middles**2),
            bucket_limits=list(limits),
            bucket_counts=weights.tolist(),
            global_step=step,
        )

    def text(self, step: int, name: str, text: str) -> None:
        """A text as it is: as a block of code, so that nothing of it is read as Markdown."""
        lines = text.split("\n")
        self._writer.add_text(name, "\n".join(f"    {line}" for line in lines), global_step=step)

    def close(self) -> None:
        """Say that the run has ended, and close the files; calling it again does nothing."""
        if self._end is not None:
            self._summary(self._end)
            self._end = None
        self._writer.close()


def _layout() -> dict[str, dict[str, list[Any]]]:
    """`LAYOUT` as the library takes it: tags are regular expressions there."""
    return {
        section: {title: ["Multiline", [f"^{re.escape(name)}$" for name in names]] for title, names in charts.items()}
        for section, charts in LAYOUT.items()
    }
