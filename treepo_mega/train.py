"""The training loop: TreePO, one step at a time, the same for every mode.

    torchrun --nproc-per-node 2 --no-python treepo-mega train CONFIG.yaml parallel.tensor_model_parallel_size=2

prompts -> rollout (vLLM) -> forest -> rewards -> advantages -> packs -> old and reference logprobs -> policy
update -> reshard back into the engine. Tree or sequential, CPU or GPU, one rank or many: mode is data, and
this is the only loop.
"""

from __future__ import annotations

from treepo_mega.config import Config
from treepo_mega.monitor.explain import why_nothing, why_rejected
from treepo_mega.monitor.workload import throughput
from treepo_mega.runtime.process import run_and_leave
from treepo_mega.runtime.signals import STOPPED_EXIT_CODE
from treepo_mega.trainer import Trainer


def train(cfg: Config) -> int:
    """Run the training that `cfg` describes; returns the exit code. Collective over all ranks."""
    trainer = Trainer(cfg)
    with trainer.status.watching():
        return all_steps(trainer)


def all_steps(trainer: Trainer) -> int:
    """The steps that are left; returns the exit code."""
    cfg = trainer.cfg
    last = cfg.train.num_rollouts
    # Also proves that actor and engine agree before anything is sampled.
    first_refit = trainer.memory.to_engine()
    trainer.startup("refit")
    if trainer.step == 0 and cfg.eval.at_start:
        trainer.records.log(0, first_refit | trainer.startup.metrics() | evaluate(trainer, 0))

    for step in range(trainer.step, last):
        done = step + 1
        trainer.begin_step(step)
        with trainer.timers("step"):
            metrics = one_step(trainer, step)
        # Of this start, new or resumed: they go with the first line that is written, and are empty afterwards.
        metrics |= trainer.startup.metrics() | trainer.ranks.metrics(done)
        times = trainer.timers.pop()
        metrics |= throughput(times, metrics) | trainer.workload.pop(times) | trainer.telemetry.pop()
        if is_evaluated(cfg, done):
            with trainer.timers("eval"):
                metrics |= evaluate(trainer, done)
        # Logged before it is saved: a kill in between repeats the step, and no step is without its line.
        trainer.records.log(done, metrics | trainer.timers.pop())
        # Asked once for both uses: a signal between them would end the run without a checkpoint.
        asked_to_stop = trainer.stop.agreed()
        if done % cfg.checkpoint.save_interval == 0 or done == last or asked_to_stop:
            with trainer.timers("checkpoint"):
                save(trainer, done)
            trainer.records.add_to_log(done, trainer.timers.pop())
        if asked_to_stop and done < last:
            trainer.progress.say(f"asked to stop: saved after step {done}")
            trainer.stop.obeyed(f"saved after step {done}")
            trainer.close("stopped, as asked")
            return STOPPED_EXIT_CODE

    if cfg.checkpoint.save_hf:
        trainer.export_hf()
    trainer.close("finished")
    return 0


def one_step(trainer: Trainer, step: int) -> dict[str, float]:
    """Sample, learn, hand the new weights to the engine. Ends with the memory in the engine's hands."""
    # Nothing to do here unless a checkpoint or an evaluation gave the memory to the trainer.
    trainer.memory.to_engine()
    forest = trainer.collect(step)
    metrics = dict(forest.metrics)
    with trainer.timers("advantage"):
        plans, credit = trainer.plan(forest)
    metrics |= credit
    if not plans:
        trainer.record(step, forest)
        trainer.progress.say(f"step {step}: {why_nothing(metrics)}; weights unchanged")
        return metrics
    with trainer.timers("old_logprobs"):
        trainer.memory.to_trainer()
        metrics |= trainer.old_logprobs(plans)
    with trainer.timers("ref_logprobs"):
        trainer.ref_logprobs(plans)
    with trainer.timers("advantage"):
        metrics |= trainer.charge_kl(plans, forest)
        plans, corrections = trainer.correct(plans)
    metrics |= corrections
    trainer.record(step, forest)
    if not plans:
        trainer.progress.say(f"step {step}: {why_rejected(metrics)}; weights unchanged")
        return metrics | trainer.memory.to_engine()
    with trainer.timers("update"):
        metrics |= trainer.update(plans)
    with trainer.timers("reshard"):
        metrics |= trainer.memory.to_engine()
    return metrics


def evaluate(trainer: Trainer, step: int) -> dict[str, float]:
    """Accuracy by the engine, which has the memory; then the actor's perplexity, for which the trainer takes it."""
    metrics = trainer.accuracy(step)
    if trainer.inputs.references:
        trainer.memory.to_trainer()
        metrics |= trainer.perplexity()
    return metrics


def save(trainer: Trainer, step: int) -> None:
    """A checkpoint, for which the optimizer state must be in place; nothing if checkpoints are switched off."""
    if trainer.cfg.checkpoint.enabled and trainer.cfg.checkpoint.save:
        trainer.memory.to_trainer()
        trainer.save(step)


def is_evaluated(cfg: Config, done: int) -> bool:
    """Whether an evaluation follows the first `done` steps."""
    if done == cfg.train.num_rollouts:
        return cfg.eval.at_end
    return bool(cfg.eval.interval) and done % cfg.eval.interval == 0


def main(cfg: Config) -> None:
    """Train and end the process."""
    run_and_leave(lambda: train(cfg))
