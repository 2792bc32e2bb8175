"""What the phases of a step computed, as tokens/s, TFLOP/s and MFU per GPU.

    workload = Workload(cfg, gpus=8, device="NVIDIA H200")
    workload.add("update", spec, Work(...), passes=UPDATE)
    workload.pop(times)        # {"perf/update_mfu": 0.41, "perf/update_tflops_per_gpu": ..., ...}

Tokens/s/GPU is defined as NeMo-RL's performance summary defines it: all tokens of a stage, prompts included, by its
time and by all GPUs. Every rank has one GPU; without one, a rank counts as one. Where a name says `flat`, a token is
counted in every trajectory that goes through it: what a trainer without trees would have to compute.
"""

from __future__ import annotations

from treepo_mega.config import Config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.flops import TERA, Flops, Kinds, Work, forward_flops, mfu, recomputed_flops

STEP = "step"
"""The phase around all others; only tokens are counted of it."""


def kinds_of(phase: str, cfg: Config) -> Kinds:
    """The operands' types in a phase: the engine's for the rollout, else the trainer's."""
    if phase == "rollout":
        engine = cfg.rollout.engine
        dtype = str(engine.dtype)
        return Kinds("fp8" if engine.quantization else dtype, dtype, dtype)
    dtype = cfg.model.params_dtype
    head = cfg.loss.precision if phase == "update" else cfg.loss.logprob_precision
    return Kinds("fp8" if cfg.model.fp8 else dtype, dtype, str(head))


class Workload:
    """Counts of a step by phase. `gpus`: all ranks; `device`: its name, by which its peak is looked up."""

    def __init__(self, cfg: Config, *, gpus: int, device: str) -> None:
        self.cfg = cfg
        self.gpus = gpus
        self.device = device
        self._done: dict[str, tuple[ModelSpec, Work, float]] = {}

    def add(self, phase: str, spec: ModelSpec, work: Work, passes: float = 1.0) -> None:
        """`work` in a phase of a model; `passes`: FLOPs by those of a forward pass. Counts of a phase add up."""
        earlier = self._done[phase][1] if phase in self._done else Work()
        self._done[phase] = (spec, earlier + work, passes)

    def pop(self, times: dict[str, float]) -> dict[str, float]:
        """Metrics of the phases that computed something, by their seconds in `times`; starts again from zero."""
        out: dict[str, float] = {}
        for phase, (spec, work, passes) in self._done.items():
            seconds = times.get(f"timing_s/{phase}", 0.0)
            if seconds <= 0 or not work.unique:
                continue
            prefix = "perf/" if phase == STEP else f"perf/{phase}_"
            out[f"{prefix}unique_tokens_per_s_per_gpu"] = work.unique / seconds / self.gpus
            out[f"{prefix}flat_tokens_per_s_per_gpu"] = work.flat / seconds / self.gpus
            if phase != STEP:
                out |= self._computing(phase, spec, work, passes, seconds)
        self._done = {}
        return out

    def _computing(self, phase: str, spec: ModelSpec, work: Work, passes: float, seconds: float) -> dict[str, float]:
        forward = forward_flops(spec, work)
        flops = passes * forward
        out = {f"perf/{phase}_tflops_per_gpu": flops.total / TERA / seconds / self.gpus}
        shares = {f"perf/{phase}_mfu": flops}
        if passes > 1:
            again = recomputed_flops(forward, spec, self.cfg.parallel)
            out["perf/update_recompute_share"] = again.total / (flops.total + again.total)
            shares["perf/update_hfu"] = Flops(
                flops.layers + again.layers, flops.attention + again.attention, flops.head + again.head
            )
        kinds = kinds_of(phase, self.cfg)
        for name, count in shares.items():
            share = mfu(count, seconds=seconds, gpus=self.gpus, device=self.device, kinds=kinds)
            # Not 0 and not a guess: a dashboard must not show a figure where no peak is known.
            if share is not None:
                out[name] = share
        return out


def rollout_work(metrics: dict[str, float]) -> Work:
    """Of sampling, from a forest's metrics: prompts that were dropped cost as much as those that are trained on."""
    return Work(
        tokens=metrics["rollout/forwarded_tokens"],
        pairs=metrics["rollout/forwarded_pairs"],
        # The engine's output matrix is asked for the tokens that are sampled, not for those of a prefix.
        rows=metrics["rollout/generated_tokens"],
        unique=metrics["tree/unique_tokens"] + metrics["tree/prompt_tokens"],
        flat=metrics["tree/flat_tokens"] + metrics["tree/flat_prompt_tokens"],
    )


def throughput(times: dict[str, float], metrics: dict[str, float]) -> dict[str, float]:
    """The step's times, and sampled response tokens per second, shared ones once."""
    seconds = times["timing_s/step"]
    return times | {"perf/step_s": seconds, "perf/tokens_per_s": metrics["tree/unique_tokens"] / max(seconds, 1e-9)}
