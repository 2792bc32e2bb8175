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
from treepo_mega.actor.batch import charge_kl, plan_rollout, work_of
from treepo_mega.actor.dump import write_dump
from treepo_mega.actor.losses import PolicyLoss
from treepo_mega.actor.passes import (
    correct_leaves,
    fill_reference_logprobs,
    optimizer_steps,
    provide_old_logprobs,
)
from treepo_mega.actor.perplexity import perplexity
from treepo_mega.actor.update import TrainingDiverged
from treepo_mega.checkpoint.export import export_hf
from treepo_mega.config import Config
from treepo_mega.config.surroundings import STOP_FILE
from treepo_mega.data.rewards import RewardPool
from treepo_mega.data.rewards.trial import try_rewards, verifiers_of
from treepo_mega.environment.setup import open_environment
from treepo_mega.errors import TreepoError
from treepo_mega.loss.operands import Numerics
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.flops import UPDATE
from treepo_mega.monitor.nvml import open_telemetry
from treepo_mega.monitor.progress import Progress
from treepo_mega.monitor.ranks import Ranks
from treepo_mega.monitor.startup import Startup
from treepo_mega.monitor.status import Status
from treepo_mega.monitor.timers import Timers
from treepo_mega.monitor.workload import STEP, Workload, rollout_work
from treepo_mega.plugins import require_plugins
from treepo_mega.records import Records
from treepo_mega.rollout.collect import Collector, Forest
from treepo_mega.rollout.contents import bring_to_main
from treepo_mega.rollout.eval import Evaluator
from treepo_mega.rollout.generator import Generator
from treepo_mega.runtime import device, dist
from treepo_mega.runtime.pulse import pulse
from treepo_mega.runtime.signals import StopRequest
from treepo_mega.saves import Saves
from treepo_mega.sync.memory import Memory
from treepo_mega.sync.refit import Refit, check_canary_limits
from treepo_mega.tree.pack import StepPlan


class Trainer:
    """A run: see the module docstring. All methods are collective over all ranks unless they say otherwise."""

    def __init__(self, cfg: Config) -> None:
        started = time.time()
        self.startup = Startup()
        self.startup("imports")
        self.cfg = cfg
        hf_dir = cfg.model.hf_checkpoint
        spec = ModelSpec.from_hf(hf_dir)
        check_canary_limits(cfg)
        require_plugins(cfg)
        notes = dist.initialize(cfg, spec)
        self.stop = StopRequest(Path(cfg.logging.run_dir) / STOP_FILE).install()
        self.startup("groups")
        self.timers = Timers(waits=dist.seconds_waited, memory=device.PeakMemory())
        self.workload = Workload(cfg, gpus=dist.world_size(), device=device.name())
        self.progress = Progress(enabled=cfg.logging.progress and dist.is_main())
        self.status = Status(
            Path(cfg.logging.run_dir),
            rank=dist.rank(),
            world=dist.world_size(),
            interval_s=cfg.logging.status_interval_s,
            hang_timeout_s=cfg.distributed.hang_timeout_s,
        )
        pulse().plant(cfg.debug.fault, dist.rank())
        with self.status.watching():
            self._build(spec, notes, started)

    def _build(self, spec: ModelSpec, notes: list[str], started: float) -> None:
        """All parts, in one order on every rank; `started`: Unix time."""
        cfg = self.cfg
        self.timers.watchers += [self.status.phase, self.progress.phase]
        self.progress.say(*notes)
        self.ranks = Ranks(self.timers, self.progress.say)
        self.pool = RewardPool(cfg.reward)
        self.environment = open_environment(cfg)
        self.inputs = build.load_inputs(cfg, spec, self.progress, self.environment)
        self.progress.say(*try_rewards(self.pool, cfg.reward, self.inputs.examples))
        # Their imports take seconds: workers go through them while actor and engine are built.
        self.pool.warm(verifiers_of(cfg.reward, self.inputs.examples))
        self.startup("inputs")
        self.actor = build.build_actor(cfg)
        self.startup("actor")
        self.reference = build.build_reference(cfg, self.actor)
        self.startup("reference")
        self.engine, handover = build.build_engine(cfg, self.actor)
        self.startup("engine")
        self.pool.finish_warming(self.progress.say)
        self.generator = Generator(
            *(self.engine, cfg, self.inputs.tokenizer), environment=self.environment, progress=self.progress.leaves
        )
        self.collector = Collector(cfg, self.generator, self.pool, self.inputs.cursor, self.timers)
        self.evaluator = Evaluator(self.generator, self.pool, cfg)
        weights = Refit(cfg, self.actor.spec, self.actor.models, self.engine, self.score)
        self.memory = Memory(handover, weights, self.engine)
        self.saves = Saves(cfg, self.progress, self.actor, self.inputs.cursor, self.collector)
        # Before the first refit, so that the engine gets the restored weights; before Records, which cuts to this step.
        self.step = self.saves.resume()
        self.telemetry = open_telemetry(cfg.logging.telemetry_interval_s)
        self.records = Records(cfg, self.progress, started=started, resume_step=self.step)
        self.startup("resume")

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps and delete older ones beyond keep_last; the trainer has the memory."""
        self.saves.write(step)

    def export_hf(self) -> None:
        """Write the actor as a Hugging Face checkpoint under <run_dir>/hf, replacing an earlier export whole."""
        target, like = Path(self.cfg.logging.run_dir) / "hf", self.cfg.model.hf_checkpoint
        dtype = next(self.actor.models[0].parameters()).dtype
        export_hf(self.actor.models, self.actor.spec, self.cfg, target, like=like, dtype=dtype, replace=True)

    def begin_step(self, step: int) -> None:
        """Every step's global generators are a function of (seed, step): a checkpoint needs no RNG state."""
        self.saves.poll()
        dist.seed_everything(self.cfg.train.seed, step)
        self.timers.trace = self.records.timeline(step + 1)
        self.timers.profiler = self.records.profiler
        self.records.profiler.begin_step(step + 1)
        self.progress.begin(step, self.cfg.train.num_rollouts)
        self.status.step(step + 1, self.cfg.train.num_rollouts)
        self.running = pulse().step = step + 1
        pulse().beat("step")

    def collect(self, step: int) -> Forest:
        """Sample, grade and exchange the trees of a step; the engine has the memory."""
        forest = self.collector.collect(step)
        self.workload.add("rollout", self.actor.spec, rollout_work(forest.metrics))
        return forest

    def plan(self, forest: Forest) -> tuple[list[StepPlan], dict[str, float]]:
        """Advantages, mini-batches and packs of this rank; and where in the path credit falls."""
        plans, metrics = plan_rollout(forest.trees, self.cfg, self.actor.spec, version=self.running - 1)
        self.workload.add(STEP, self.actor.spec, work_of(plans))
        return plans, metrics

    def old_logprobs(self, plans: list[StepPlan]) -> dict[str, float]:
        """The actor's logprobs before the update, where the update does not give them itself; metrics of the head."""
        computed = provide_old_logprobs(self.actor, plans, self.cfg)
        self.workload.add("old_logprobs", self.actor.spec, work_of(computed))
        if not computed:
            # The guard takes its sample in the update.
            return {}
        fell_back, metrics = self.actor.watch_head()
        if fell_back:  # once: the steps that follow begin in bf16
            self._say_fell_back(metrics)
            computed = provide_old_logprobs(self.actor, plans, self.cfg)
            self.workload.add("old_logprobs", self.actor.spec, work_of(computed))
            self.actor.guard.take_drift()
        return metrics

    def correct(self, plans: list[StepPlan]) -> tuple[list[StepPlan], dict[str, float]]:
        """Weigh and reject trajectories by how far the engine is from the actor; the plans that have some left."""
        return correct_leaves(plans, self.cfg.algo)

    def ref_logprobs(self, plans: list[StepPlan]) -> None:
        """Fill in the reference's logprobs, when a KL term needs them."""
        if self.reference is not None:
            fill_reference_logprobs(self.reference, plans)
            self.workload.add("ref_logprobs", self.reference.spec, work_of(plans))

    def charge_kl(self, plans: list[StepPlan], forest: Forest) -> dict[str, float]:
        """Take the KL of each leaf off its reward (reward.kl_coef); the plans then teach the advantages of that."""
        return charge_kl(plans, forest.trees, self.cfg)

    def record(self, step: int, forest: Forest) -> None:
        """Write and show trees, once their rewards and advantages are those that are trained on."""
        wanted = self.records.trees_to_write(step + 1, forest.trees)
        bring_to_main(wanted, timeout_s=self.cfg.distributed.timeout_s)
        self.records.save_trees(step + 1, forest.trees)
        self.records.draw(step + 1, forest.trees, self.inputs.tokenizer.decode)
        self.records.show_completions(step + 1, forest.trees, self.inputs.tokenizer.decode)

    def update(self, plans: list[StepPlan]) -> dict[str, float]:
        """All optimizer steps of the rollout; returns their `train/` metrics (means; maxima of max_*)."""
        self.memory.weights_changed()
        loss = PolicyLoss(self.cfg.algo, self.actor.head.backend)
        epochs = self.cfg.train.ppo_epochs
        self.workload.add("update", self.actor.spec, epochs * work_of(plans), passes=UPDATE)
        fallen = self.actor.guard.fallen
        try:
            metrics = optimizer_steps(self.actor, plans, loss, epochs)
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{error}. {self._dump(error)}") from None
        if self.actor.guard.fallen and not fallen:
            self._say_fell_back(metrics)
        return metrics

    def _say_fell_back(self, metrics: dict[str, float]) -> None:
        self.progress.say(
            f"the FP8 head is {metrics['train/head_logp_abs_diff']:.3f} nats from bf16, more than "
            f"loss.guard.max_abs_diff {self.cfg.loss.guard.max_abs_diff}: bf16 until it is near again"
        )

    def _dump(self, error: TrainingDiverged) -> str:
        """Write the step that was skipped last; what to say of it."""
        try:
            written = write_dump(self.actor, error.packs, step=self.running, grad_norm=error.grad_norm)
        # A full disk must not hide why the run ends.
        except (OSError, TreepoError) as failure:
            return f"The step could not be dumped: {failure}"
        return f"`treepo-mega replay {written}` says where the first value that is not finite appears"

    def score(self, tokens: list[int]) -> np.ndarray | None:
        """Actor logprobs of `tokens[1:]` at the sampling temperature, on last-stage ranks; None elsewhere."""
        # In the parameters' precision whatever the loss head's: this proves a refit, so only weights may differ.
        return self.actor.sequence_logprobs(tokens, Numerics(precision=self.cfg.model.params_dtype))

    def accuracy(self, step: int) -> dict[str, float]:
        """Sampled (and greedy) accuracy on the evaluation prompts; the engine has the memory."""
        return self.evaluator.accuracy(self.inputs.eval_prompts, step=step)

    def perplexity(self) -> dict[str, float]:
        """The actor's perplexity of the evaluation prompts' reference texts; the trainer has the memory."""
        return {"eval/perplexity": perplexity(self.actor, self.inputs.references, self.cfg)}

    def close(self, how: str) -> None:
        """Wait for a checkpoint, close logs and graders, say `how` the run ended. The engine stays with the process.

        Collective over all ranks where a checkpoint is written in the background.
        """
        self.saves.finish()
        self.status.close(how)
        self.telemetry.close()
        self.records.close()
        self.progress.close()
        self.pool.close()
        if self.environment is not None:
            self.environment.close()
