"""The parts of a run and the verbs of its loop; `train.py` says in which order.

    trainer = Trainer(cfg)                   collective over all ranks: groups, actor, reference, engine, prompts
    trainer.collect(step) ...

Everything is built in one order on every rank, because building the engine and the models is collective. What people
get wrong most often comes first: prompts, end tokens, then the actor, which fails fast on a bad checkpoint. The engine
must be built inside a running process group.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from treepo_mega.actor.batch import plan_rollout
from treepo_mega.actor.losses import PolicyLoss
from treepo_mega.actor.perplexity import describe_references, perplexity, reference_texts
from treepo_mega.actor.update import Actor, Policy
from treepo_mega.checkpoint import mcore as checkpoint
from treepo_mega.checkpoint.export import export_hf
from treepo_mega.config import Config, ConfigError, dump_config, read_hf_config
from treepo_mega.data.end_tokens import find_eos_token_ids
from treepo_mega.data.prompts import Prompt, PromptCursor, load_prompts
from treepo_mega.data.rewards import RewardPool
from treepo_mega.engine.engine import Engine
from treepo_mega.loss.operands import Numerics
from treepo_mega.monitor.metrics import MetricsLogger
from treepo_mega.monitor.progress import Progress
from treepo_mega.monitor.timers import Timers
from treepo_mega.rollout.collect import Collector, Forest
from treepo_mega.rollout.eval import Evaluator
from treepo_mega.rollout.generator import Generator
from treepo_mega.runtime import dist
from treepo_mega.runtime.signals import StopRequest
from treepo_mega.sync.actor_memory import handover_backend
from treepo_mega.sync.handover import Handover, State
from treepo_mega.sync.refit import Refit
from treepo_mega.tree.pack import Pack, StepPlan

SUMMARY = "summary.json"


class Trainer:
    """A run: see the module docstring. All methods are collective over all ranks unless they say otherwise."""

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.started = cfg, time.time()
        hf_dir = cfg.model.hf_checkpoint
        notes = dist.initialize(cfg, read_hf_config(hf_dir))
        self.stop = StopRequest().install()
        self.timers = Timers()
        self.progress = Progress(enabled=cfg.logging.progress and dist.is_main())
        self.progress.say(*notes)
        self.pool = RewardPool(cfg.reward)
        self._load_prompts(hf_dir)
        self.actor = Actor(cfg, hf_dir)
        if cfg.model.load:
            checkpoint.load_model_weights(self.actor.models, cfg.model.load)
            self.actor.weights_changed()
            self.actor.optimizer.reload_model_params()
        self.reference = self._build_reference() if cfg.algo.kl_loss_coef > 0 else None
        self.engine = Engine(hf_dir, cfg, seed=cfg.train.seed)
        self.generator = Generator(self.engine, cfg, self.tokenizer, progress=self.progress.leaves)
        self.collector = Collector(cfg, self.generator, self.pool, self.cursor, self.timers)
        self.evaluator = Evaluator(self.generator, self.pool, cfg)
        self.weights = Refit(cfg, self.actor.spec, self.actor.models, self.engine, self.score)
        self.handover = self._build_handover()
        self.step = self._resume()
        self.summary: dict[str, Any] = self._read_summary() if self.step else {}
        self.logger = self._open_logger() if dist.is_main() else None

    def _build_handover(self) -> Handover:
        """Gradients and optimizer state make room for the engine; the canary needs the actor's weights beside it."""
        wanted = self.weights.wanted.of(dist.rank())[0].values()
        sizes = {
            "weights": sum(math.prod(p.shape) for p in wanted) * self.weights.target.dtype.itemsize,
            "kv_cache": self.cfg.rollout.engine.kv_cache_memory_mb << 20,
        }
        backend = handover_backend(self.actor, self.engine.sleeper, sizes)
        backend.sleep()
        return Handover(backend, offload=("grads", "optimizer"))

    def _build_reference(self) -> Policy:
        reference = Policy(self.cfg, self.cfg.model.hf_checkpoint, self.actor.guard)
        if self.cfg.model.load:
            checkpoint.load_model_weights(reference.models, self.cfg.model.load)
            reference.weights_changed()
        for model in reference.models:
            model.requires_grad_(False)
        return reference

    def _load_prompts(self, hf_dir: str) -> None:
        from transformers import AutoTokenizer

        cfg = self.cfg
        self.tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
        find_eos_token_ids(hf_dir, self.tokenizer, cfg.rollout.stop.eos_token_ids)  # an error here costs no engine
        prompts = load_prompts(cfg.data.train, cfg.data, self.tokenizer)
        self.eval_prompts: list[Prompt] = []
        dropped = dict(prompts.dropped)
        if cfg.data.eval:
            held_out = load_prompts(cfg.data.eval, cfg.data, self.tokenizer)
            self.eval_prompts = list(held_out.prompts)[: cfg.eval.max_prompts]
            dropped |= {f"eval {reason}": n for reason, n in held_out.dropped.items()}
        self.references = reference_texts(self.eval_prompts, self.tokenizer, cfg.rollout.max_response_len)
        self.cursor = PromptCursor(prompts, seed=cfg.train.seed, shuffle=cfg.data.shuffle)
        told = "".join(f"; dropped {n} ({reason})" for reason, n in dropped.items() if n)
        self.progress.say(f"{len(prompts)} prompts to train on, {len(self.eval_prompts)} to evaluate{told}")
        if self.eval_prompts:
            self.progress.say(describe_references(len(self.references), len(self.eval_prompts), cfg.data.reference_key))

    # Checkpoints ------------------------------------------------------------------------------------------------

    def _resume(self) -> int:
        """Restore the checkpoint that the configuration points to; returns the step to begin with."""
        c = self.cfg.checkpoint
        directory = checkpoint.find_latest(c.save) if c.load == "auto" and c.enabled and c.save else None
        if c.load and c.load != "auto":
            directory = Path(c.load)
        if directory is None:
            return 0
        a, found = self.actor, c.load == "auto"
        state = checkpoint.load_training(directory, a.models, a.optimizer, a.scheduler, known_whole=found)
        self.actor.weights_changed()
        self.cursor.load_state_dict(state["cursor"])
        self.actor.skipped_in_a_row = state["skipped_in_a_row"]
        self.collector.carried = state.get("carried", [])
        if "costs" in state:
            self.generator.costs.load_state_dict(state["costs"])
        self.progress.say(f"resumed from {directory}: next step {state['step']}")
        return int(state["step"])

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps and delete older ones beyond keep_last."""
        c = self.cfg.checkpoint
        if not c.enabled or not c.save:
            return
        self._take_memory()
        trainer = {
            "step": step,
            "cursor": self.cursor.state_dict(),
            "skipped_in_a_row": self.actor.skipped_in_a_row,
            "carried": self.collector.carried,
            "costs": self.generator.costs.state_dict(),
        }
        directory = Path(c.save) / f"step_{step:06d}"
        a = self.actor
        checkpoint.save_training(directory, a.models, a.optimizer, a.scheduler, trainer, self.cfg.distributed.timeout_s)
        checkpoint.prune(c.save, c.keep_last)

    def export_hf(self) -> None:
        """Write the actor as a Hugging Face checkpoint under <run_dir>/hf, replacing an earlier export whole."""
        target, like = Path(self.cfg.logging.run_dir) / "hf", self.cfg.model.hf_checkpoint
        if dist.is_main() and target.exists():
            shutil.rmtree(target)
        dist.barrier("the Hugging Face export", self.cfg.distributed.timeout_s)
        dtype = next(self.actor.models[0].parameters()).dtype
        export_hf(self.actor.models, self.actor.spec, self.cfg, target, like=like, dtype=dtype)

    # Verbs of the loop --------------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Every step's global generators are a function of (seed, step): a checkpoint needs no RNG state."""
        dist.seed_everything(self.cfg.train.seed, step)
        self.progress.begin(step, self.cfg.train.num_rollouts)

    def collect(self, step: int) -> Forest:
        """Sample, grade and exchange the trees of a step."""
        if self.handover.state is not State.ROLLOUT:
            self._wake_engine()  # a checkpoint was written since: the trainer had its memory back
        return self.collector.collect(step)

    def plan(self, forest: Forest) -> tuple[list[StepPlan], dict[str, float]]:
        """Advantages, mini-batches and packs of this rank; and where in the path credit falls."""
        return plan_rollout(forest.trees, self.cfg)

    def old_logprobs(self, plans: list[StepPlan]) -> dict[str, float]:
        """Fill in the actor's logprobs before the update; returns how far the engine's are from them."""
        self._take_memory()
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
        self.handover.weights_changed()
        stats = [self.actor.update(plan.packs, loss) for plan in plans]
        out = {"train/skipped_steps": sum(s["skipped_steps"] for s in stats)}
        for name in ("loss", "pg_loss", "kl_loss", "entropy", "pg_clipfrac", "ppo_kl", "tis_weight"):
            out[f"train/{name}"] = sum(s[name] for s in stats) / len(stats)
        out["train/ratio_max_diff"] = max(s["max_ratio_diff"] for s in stats)
        out |= self.actor.head_flips()
        return out | {"grad-norm": stats[-1]["grad-norm"], "learning-rate": stats[-1]["learning-rate"]}

    def refit(self) -> dict[str, float]:
        """Memory and new weights to the engine, and proof that it computes with them; the `reshard/` metrics."""
        self._take_memory()
        h, first = self.handover, len(self.handover.log)
        h.offload()
        h.wake_weights()
        metrics = h.refit(self.weights.transfer)
        h.free_actor()
        h.wake_kv()
        log = h.log[first:]
        memory = {"freed": float(sum(t.freed for t in log)), "taken": float(sum(t.taken for t in log))}
        return metrics | self.weights.canary() | {f"reshard/handover_{k}_bytes": v for k, v in memory.items()}

    def _wake_engine(self) -> None:
        """The engine's turn, with the weights that it has if those are the actor's, else with new ones."""
        if not self.handover.weights_current:
            self.refit()
            return
        h = self.handover
        h.offload()
        h.wake_weights()
        h.keep_weights()
        h.free_actor()
        h.wake_kv()
        self.engine.reset_prefix_cache()  # its KV did not survive; and a resumed run begins without any

    def _take_memory(self) -> None:
        """The trainer's turn: the engine sleeps, gradients and optimizer state return. No-op when it is already."""
        if self.handover.state is State.ROLLOUT:
            self.handover.sleep()
            self.handover.resume()
        self.handover.require(State.TRAIN)

    def score(self, tokens: list[int]) -> np.ndarray | None:
        """Actor logprobs of `tokens[1:]` at the sampling temperature, on last-stage ranks; None elsewhere."""
        # In the parameters' precision whatever the loss head's: this proves a refit, so only weights may differ.
        return self.actor.sequence_logprobs(tokens, Numerics(precision=self.cfg.model.params_dtype))

    def evaluate(self, step: int) -> dict[str, float]:
        """Sampled (and greedy) accuracy on the evaluation prompts, with the weights the engine holds; and the actor's
        perplexity of their reference texts, for which the trainer takes its memory back."""
        if not self.eval_prompts:
            raise ConfigError("eval.interval, eval.at_start and eval.at_end need data.eval: there are no prompts")
        e, n = self.cfg.eval, self.cfg.eval.n_samples_per_prompt
        sampled = self.evaluator.evaluate(self.eval_prompts, temperature=e.temperature, n=n, step=step)
        out = {
            "eval/accuracy": sampled[f"avg@{n}"],
            "eval/pass_at_n": sampled[f"pass@{n}"],
            "eval/maj_at_n": sampled[f"maj@{n}"],
            "eval/response_len_mean": sampled["response_len"],
        }
        if e.greedy:
            greedy = self.evaluator.evaluate(self.eval_prompts, temperature=0.0, n=1, step=step)
            out["eval/greedy_accuracy"] = greedy["avg@1"]
        if self.references:
            self._take_memory()
            out["eval/perplexity"] = perplexity(self.actor, self.references, self.cfg)
        return out

    # Records ------------------------------------------------------------------------------------------------------

    def _open_logger(self) -> MetricsLogger:
        run = Path(self.cfg.logging.run_dir)
        run.mkdir(parents=True, exist_ok=True)
        dump_config(self.cfg, run / "config.yaml")
        resume = self.step or None
        return MetricsLogger(run, tensorboard=self.cfg.logging.tensorboard, resume_step=resume)

    def save_trees(self, step: int, forest: Forest) -> None:
        """Every logging.trees_interval steps, the forest as one JSON tree a line (rank 0)."""
        every = self.cfg.logging.trees_interval
        if not every or step % every or not dist.is_main():
            return
        path = Path(self.cfg.logging.run_dir) / "trees" / f"step_{step:06d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(t.to_dict()) + "\n" for t in forest.trees), encoding="utf-8")
        partial.replace(path)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """The line of metrics after `step` finished steps (rank 0); `summary.json` keeps what a reader asks first."""
        self._summarize(step, metrics)
        if self.logger is not None:
            self.logger.log(step, metrics)
            self.progress.show(step, metrics)
            path = Path(self.cfg.logging.run_dir) / SUMMARY
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(self.summary, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)

    def add_to_log(self, step: int, metrics: dict[str, float]) -> None:
        """More metrics for the line of `step` (rank 0)."""
        if self.logger is not None:
            self.logger.log(step, metrics)

    def _summarize(self, step: int, metrics: dict[str, float]) -> None:
        s = self.summary
        for name, key in (("eval/accuracy", "accuracy"), ("eval/greedy_accuracy", "greedy")):
            if name in metrics:
                s.setdefault(f"{key}_before", metrics[name])
                s[f"{key}_after"] = metrics[name]
        if "tree/token_ratio" in metrics:
            s["steps"] = step
            s["unique_tokens"] = s.get("unique_tokens", 0.0) + metrics["tree/unique_tokens"]
            s["flat_tokens"] = s.get("flat_tokens", 0.0) + metrics["tree/flat_tokens"]
            s["token_ratio"] = s["unique_tokens"] / max(1.0, s["flat_tokens"])
            s["mismatch_max"] = max(s.get("mismatch_max", 0.0), metrics.get("rollout/logprob_abs_diff_max", 0.0))
        s["seconds_train"] = round(time.time() - self.started, 1)

    def _read_summary(self) -> dict[str, Any]:
        path = Path(self.cfg.logging.run_dir) / SUMMARY
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def close(self) -> None:
        """Close logs and graders (not collective). The engine stays until the process ends."""
        if self.logger is not None:
            self.logger.close()
        self.progress.close()
        self.pool.close()
