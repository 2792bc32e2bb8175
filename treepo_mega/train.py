"""The training loop: TreePO, one step at a time, the same for every mode.

    torchrun --nproc-per-node 2 --no-python treepo-mega train CONFIG.yaml parallel.tensor_model_parallel_size=2

prompts -> rollout (vLLM) -> forest -> rewards -> advantages -> packs -> old and reference logprobs -> policy
update -> reshard back into the engine. Tree or sequential, CPU or GPU, one rank or many: mode is data, and
this is the only loop.
"""

from __future__ import annotations

from typing import Any

from treepo_mega.config import Config
from treepo_mega.runtime.process import run_and_leave
from treepo_mega.runtime.signals import STOPPED_EXIT_CODE
from treepo_mega.trainer import Trainer


def train(cfg: Config) -> int:
    """Run the training that `cfg` describes; returns the exit code. Collective over all ranks."""
    t = Trainer(cfg)
    every, last = cfg.checkpoint.save_interval, cfg.train.num_rollouts
    first = t.refit()  # also proves that actor and engine agree before anything is sampled
    if t.step == 0 and cfg.eval.at_start:
        t.log(0, first | t.evaluate(0))

    for step in range(t.step, last):
        t.begin_step(step)
        with t.timers("step"):
            metrics = one_step(t, step)
        metrics |= throughput(t.timers.pop(), metrics)
        if cfg.eval.interval and (step + 1) % cfg.eval.interval == 0 and step + 1 < last:
            with t.timers("eval"):
                metrics |= t.evaluate(step + 1)
        if step + 1 == last and cfg.eval.at_end:
            with t.timers("eval"):
                metrics |= t.evaluate(last)
        # Logged before it is saved: a kill in between repeats the step, and no step is without its line.
        t.log(step + 1, metrics | t.timers.pop())
        asked_to_stop = t.stop.agreed()
        if (step + 1) % every == 0 or step + 1 == last or asked_to_stop:
            with t.timers("checkpoint"):
                t.save(step + 1)
            t.add_to_log(step + 1, t.timers.pop())
        if asked_to_stop and step + 1 < last:
            t.progress.say(f"asked to stop: saved after step {step + 1}")
            t.close()
            return STOPPED_EXIT_CODE

    if cfg.checkpoint.save_hf:
        t.export_hf()
    t.close()
    return 0


def one_step(t: Trainer, step: int) -> dict[str, float]:
    """Sample, learn, hand the new weights to the engine."""
    forest = t.collect(step)
    metrics = dict(forest.metrics)
    t.save_trees(step + 1, forest)
    with t.timers("advantage"):
        plans, credit = t.plan(forest)
    metrics |= credit
    if not plans:
        t.progress.say(f"step {step}: no prompt had differing rewards; nothing to learn from, weights unchanged")
        return metrics
    with t.timers("old_logprobs"):
        metrics |= t.old_logprobs(plans)
    with t.timers("ref_logprobs"):
        t.ref_logprobs(plans)
    with t.timers("update"):
        metrics |= t.update(plans)
    with t.timers("reshard"):
        metrics |= t.refit()
    return metrics


def throughput(times: dict[str, float], metrics: dict[str, Any]) -> dict[str, float]:
    """The step's times, and trained response tokens per second."""
    seconds = times["timing_s/step"]
    return times | {"perf/step_s": seconds, "perf/tokens_per_s": metrics["tree/flat_tokens"] / max(seconds, 1e-9)}


def main(cfg: Config) -> None:
    """Train and end the process."""
    run_and_leave(lambda: train(cfg))
