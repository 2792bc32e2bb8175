"""The parts of a run and the verbs of its loop; `train.py` says in which order.

    trainer = Trainer(cfg)                   collective over all ranks: groups, actor, reference, engine, prompts
    trainer.memory.to_engine()
    trainer.collect(step) ...

Everything is built in one order on every rank, because building the engine and the models is collective. What people
get wrong most often comes first: prompts, end tokens, then the actor, which fails fast on a bad checkpoint. The engine
must be built inside a running process group.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from treepo_mega import build
from treepo_mega.actor.batch import plan_rollout
from treepo_mega.actor.losses import PolicyLoss
from treepo_mega.actor.perplexity import perplexity
from treepo_mega.checkpoint import mcore as checkpoint
from treepo_mega.checkpoint.export import export_hf
from treepo_mega.config import Config, ConfigError
from treepo_mega.data.rewards import RewardPool
from treepo_mega.loss.operands import Numerics
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.progress import Progress
from treepo_mega.monitor.timers import Timers
from treepo_mega.records import Records
from treepo_mega.rollout.collect import Collector, Forest
from treepo_mega.rollout.eval import Evaluator
from treepo_mega.rollout.generator import Generator
from treepo_mega.runtime import dist
from treepo_mega.runtime.signals import StopRequest
from treepo_mega.sync.memory import Memory
from treepo_mega.sync.refit import Refit, check_canary_limits
from treepo_mega.tree.pack import Pack, StepPlan


class Trainer:
    """A run: see the module docstring. All methods are collective over all ranks unless they say otherwise."""

    def __init__(self, cfg: Config) -> None:
        started = time.time()
        self.cfg = cfg
        hf_dir = cfg.model.hf_checkpoint
        spec = ModelSpec.from_hf(hf_dir)
        check_canary_limits(cfg)
        notes = dist.initialize(cfg, spec)
        self.stop = StopRequest().install()
        self.timers = Timers()
        self.progress = Progress(enabled=cfg.logging.progress and dist.is_main())
        self.progress.say(*notes)
        self.pool = RewardPool(cfg.reward)
        self.inputs = build.load_inputs(cfg, spec, self.progress)
        self.actor = build.build_actor(cfg)
        self.reference = build.build_reference(cfg, self.actor)
        self.engine, handover = build.build_engine(cfg, self.actor)
        self.generator = Generator(self.engine, cfg, self.inputs.tokenizer, progress=self.progress.leaves)
        self.collector = Collector(cfg, self.generator, self.pool, self.inputs.cursor, self.timers)
        self.evaluator = Evaluator(self.generator, self.pool, cfg)
        weights = Refit(cfg, self.actor.spec, self.actor.models, self.engine, self.score)
        self.memory = Memory(handover, weights, self.engine)
        self.step = self._resume()
        self.records = Records(cfg, self.progress, started=started, resume_step=self.step)

    def _resume(self) -> int:
        """Restore the checkpoint that the configuration points to; returns the step to begin with."""
        directory = build.checkpoint_to_resume(self.cfg)
        self.resumed_from = directory
        self.saved_before = False
        if directory is None:
            return 0
        actor = self.actor
        state = checkpoint.load_training(
            directory,
            actor.models,
            actor.optimizer,
            actor.scheduler,
            known_whole=self.cfg.checkpoint.load == "auto",
        )
        actor.weights_changed()
        actor.skipped_in_a_row = state["skipped_in_a_row"]
        self.inputs.cursor.load_state_dict(state["cursor"], source=str(directory))
        self.collector.carried = state.get("carried", [])
        if "costs" in state:
            self.generator.costs.load_state_dict(state["costs"])
        if state["step"] >= self.cfg.train.num_rollouts:
            self.progress.say(
                f"{directory}: this run is complete (train.num_rollouts {self.cfg.train.num_rollouts}); nothing to do. "
                "A larger train.num_rollouts goes on from here; checkpoint.load=null begins anew"
            )
        else:
            self.progress.say(f"resumed from {directory}: next step {state['step']}")
        return int(state["step"])

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps and delete older ones beyond keep_last; the trainer has the memory."""
        state = {
            "step": step,
            "cursor": self.inputs.cursor.state_dict(),
            "skipped_in_a_row": self.actor.skipped_in_a_row,
            "carried": self.collector.carried,
            "costs": self.generator.costs.state_dict(),
        }
        self._set_aside_others()
        directory = self.cfg.checkpoint.directory / f"step_{step:06d}"
        actor = self.actor
        timeout_s = self.cfg.distributed.timeout_s
        checkpoint.save_training(directory, actor.models, actor.optimizer, actor.scheduler, state, timeout_s)
        checkpoint.prune(self.cfg.checkpoint.directory, self.cfg.checkpoint.keep_last)

    def _set_aside_others(self) -> None:
        """Before the first checkpoint: those of other runs in the same directory must not outrank it."""
        if self.saved_before:
            return
        self.saved_before = True
        # Only now, not at the start: a run that fails before it saves leaves the directory as it was.
        if dist.is_main():
            aside = checkpoint.set_aside_others(self.cfg.checkpoint.directory, self.resumed_from)
            if aside is not None:
                self.progress.say(f"checkpoints of another run were in the way; they are in {aside} now")
        dist.barrier("setting older checkpoints aside", self.cfg.distributed.timeout_s)

    def export_hf(self) -> None:
        """Write the actor as a Hugging Face checkpoint under <run_dir>/hf, replacing an earlier export whole."""
        target, like = Path(self.cfg.logging.run_dir) / "hf", self.cfg.model.hf_checkpoint
        dtype = next(self.actor.models[0].parameters()).dtype
        export_hf(self.actor.models, self.actor.spec, self.cfg, target, like=like, dtype=dtype, replace=True)

    def begin_step(self, step: int) -> None:
        """Every step's global generators are a function of (seed, step): a checkpoint needs no RNG state."""
        dist.seed_everything(self.cfg.train.seed, step)
        self.progress.begin(step, self.cfg.train.num_rollouts)

    def collect(self, step: int) -> Forest:
        """Sample, grade and exchange the trees of a step; the engine has the memory."""
        return self.collector.collect(step)

    def plan(self, forest: Forest) -> tuple[list[StepPlan], dict[str, float]]:
        """Advantages, mini-batches and packs of this rank; and where in the path credit falls."""
        return plan_rollout(forest.trees, self.cfg, self.actor.spec)

    def old_logprobs(self, plans: list[StepPlan]) -> dict[str, float]:
        """Fill in the actor's logprobs before the update; returns how far the engine's are from them."""
        packs = [p for plan in plans for p in plan.packs]
        self._fill_old(plans)
        fell_back, metrics = self.actor.watch_head()
        if fell_back:  # once: the steps that follow begin in bf16
            self.progress.say(
                f"the FP8 head is {metrics['train/head_logp_abs_diff']:.3f} nats from bf16, more than "
                f"loss.guard.max_abs_diff {self.cfg.loss.guard.max_abs_diff}: bf16 until it is near again"
            )
            self._fill_old(plans)
            self.actor.guard.take_drift()
        return metrics | self._mismatch(packs)

    def _fill_old(self, plans: list[StepPlan]) -> None:
        for plan in plans:
            for pack, logprobs in zip(plan.packs, self.actor.logprobs(plan.packs, watch=True) or (), strict=False):
                pack.old_logprobs = logprobs

    def _mismatch(self, packs: list[Pack]) -> dict[str, float]:
        diffs = [np.abs(p.old_logprobs - p.rollout_logprobs) for p in packs if p.old_logprobs is not None]
        sums = dist.sum_over_replicas(
            {"diff": float(sum(d.sum() for d in diffs)), "rows": float(sum(d.size for d in diffs))}
        )
        peak = dist.max_over_ranks({"max": max((float(d.max()) for d in diffs if d.size), default=0.0)})
        return {
            "rollout/logprob_abs_diff_mean": sums["diff"] / max(1.0, sums["rows"]),
            "rollout/logprob_abs_diff_max": peak["max"],
        }

    def ref_logprobs(self, plans: list[StepPlan]) -> None:
        """Fill in the reference's logprobs, when a KL term needs them."""
        if self.reference is None:
            return
        for plan in plans:
            for pack, logprobs in zip(plan.packs, self.reference.logprobs(plan.packs) or (), strict=False):
                pack.ref_logprobs = logprobs

    def update(self, plans: list[StepPlan]) -> dict[str, float]:
        """All optimizer steps of the rollout; returns their `train/` metrics (means; maxima of max_*)."""
        loss = PolicyLoss(self.cfg.algo, self.actor.head.backend)
        self.memory.weights_changed()
        stats = [self.actor.update(plan.packs, loss) for plan in plans]
        out = {"train/skipped_steps": sum(s["skipped_steps"] for s in stats)}
        for name in ("loss", "pg_loss", "kl_loss", "entropy", "pg_clipfrac", "ppo_kl", "tis_weight"):
            out[f"train/{name}"] = sum(s[name] for s in stats) / len(stats)
        out["train/ratio_max_diff"] = max(s["max_ratio_diff"] for s in stats)
        out |= self.actor.head_flips()
        return out | {"grad-norm": stats[-1]["grad-norm"], "learning-rate": stats[-1]["learning-rate"]}

    def score(self, tokens: list[int]) -> np.ndarray | None:
        """Actor logprobs of `tokens[1:]` at the sampling temperature, on last-stage ranks; None elsewhere."""
        # In the parameters' precision whatever the loss head's: this proves a refit, so only weights may differ.
        return self.actor.sequence_logprobs(tokens, Numerics(precision=self.cfg.model.params_dtype))

    def accuracy(self, step: int) -> dict[str, float]:
        """Sampled (and greedy) accuracy on the evaluation prompts; the engine has the memory."""
        prompts = self.inputs.eval_prompts
        if not prompts:
            raise ConfigError("eval.interval, eval.at_start and eval.at_end need data.eval: there are no prompts")
        settings = self.cfg.eval
        count = settings.n_samples_per_prompt
        sampled = self.evaluator.evaluate(prompts, temperature=settings.temperature, n=count, step=step)
        metrics = {
            "eval/accuracy": sampled[f"avg@{count}"],
            "eval/pass_at_n": sampled[f"pass@{count}"],
            "eval/maj_at_n": sampled[f"maj@{count}"],
            "eval/response_len_mean": sampled["response_len"],
        }
        if settings.greedy:
            greedy = self.evaluator.evaluate(prompts, temperature=0.0, n=1, step=step)
            metrics["eval/greedy_accuracy"] = greedy["avg@1"]
        return metrics

    def perplexity(self) -> dict[str, float]:
        """The actor's perplexity of the evaluation prompts' reference texts; the trainer has the memory."""
        return {"eval/perplexity": perplexity(self.actor, self.inputs.references, self.cfg)}

    def close(self) -> None:
        """Close logs and graders (not collective). The engine stays until the process ends."""
        self.records.close()
        self.progress.close()
        self.pool.close()
