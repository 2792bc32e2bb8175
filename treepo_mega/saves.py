"""A run's training checkpoints: where it goes on from, what it writes, and what it sets aside.

    saves = Saves(cfg, progress, actor, cursor, collector)
    step = saves.resume()                # 0 for a new run
    saves.write(step)
    saves.poll()                         # between steps: a checkpoint that is written meanwhile may be whole by now
    saves.finish()                       # at the end: wait for it

All are collective over all ranks.
"""

from __future__ import annotations

from pathlib import Path

from treepo_mega.actor.update import Actor
from treepo_mega.checkpoint import directories
from treepo_mega.checkpoint import mcore as checkpoint
from treepo_mega.checkpoint.background import BackgroundSave
from treepo_mega.checkpoint.iterations import is_megatron_lm
from treepo_mega.config import Config
from treepo_mega.data.cursor import PromptCursor
from treepo_mega.monitor.progress import Progress
from treepo_mega.rollout.collect import Collector
from treepo_mega.rollout.durable import Durable
from treepo_mega.runtime import dist


class Saves:
    """Restores and writes all that a later step depends on: weights, optimizer, prompts' order, unfinished trees."""

    def __init__(
        self, cfg: Config, progress: Progress, actor: Actor, cursor: PromptCursor, collector: Collector
    ) -> None:
        self.cfg = cfg
        self.progress = progress
        self.actor = actor
        self.cursor = cursor
        self.collector = collector
        self.resumed_from: Path | None = None
        self.written_before = False
        self.background = BackgroundSave(cfg.distributed.timeout_s) if cfg.checkpoint.async_save else None

    def resume(self) -> int:
        """Restore the checkpoint that the configuration points to; returns the step to begin with.

        Raises CheckpointError for one that is damaged or another model's, PromptError for one of other prompts.
        """
        directory = self.resumed_from = checkpoint_to_resume(self.cfg)
        step = 0 if directory is None else self._restore(directory)
        if self.cfg.rollout.durable and self.cfg.checkpoint.enabled:
            self.collector.durable = self._durable(step)
        return step

    def _durable(self, step: int) -> Durable:
        """Where the trees of steps from `step` on are kept. Collective over all ranks."""
        settings = self.cfg.checkpoint
        # A run's own checkpoints hold what its configuration made; others may hold any weights.
        own = self.resumed_from is None or self.resumed_from.resolve().parent == settings.directory.resolve()
        return Durable(
            self.cfg,
            origin="" if own else str(self.resumed_from),
            first_step=step,
            # Null says that nothing of before is to be gone on with.
            afresh=settings.load is None,
            say=self.progress.say,
        )

    def _restore(self, directory: Path) -> int:
        """Fill everything from a checkpoint; the step that comes next."""
        actor = self.actor
        # find_latest has just compared every file with its digest; a named directory is still unchecked.
        known_whole = not _is_checkpoint(self.cfg.checkpoint.load)
        state = checkpoint.load_training(
            directory, actor.models, actor.optimizer, actor.scheduler, known_whole=known_whole
        )
        # The load writes in place: prepared copies of the output matrix would still hold the initial weights.
        actor.weights_changed()
        actor.skipped_in_a_row = state["skipped_in_a_row"]
        self.cursor.load_state_dict(state["cursor"], source=str(directory))
        self.collector.restore(state)
        if "costs" in state:
            self.collector.generator.costs.load_state_dict(state["costs"])
        last = self.cfg.train.num_rollouts
        if state["step"] >= last:
            self.progress.say(
                f"{directory}: this run is complete (train.num_rollouts {last}); nothing to do. "
                "A larger train.num_rollouts goes on from here; checkpoint.load=null begins anew"
            )
        else:
            self.progress.say(f"resumed from {directory}: next step {state['step']}")
        return int(state["step"])

    def write(self, step: int) -> None:
        """Write a checkpoint after `step` steps, or begin to; older ones beyond keep_last go once it is whole."""
        # One at a time: a write that takes longer than the steps between two of them holds up the run, and shows.
        self.finish()
        actor = self.actor
        settings = self.cfg.checkpoint
        state = {
            "step": step,
            "cursor": self.cursor.state_dict(),
            "skipped_in_a_row": actor.skipped_in_a_row,
            "costs": self.collector.generator.costs.state_dict(),
        }
        self._set_aside_others()
        directory = settings.directory / f"step_{step:06d}"
        of_run = (actor.models, actor.optimizer, actor.scheduler, state)
        waiting = self.collector.waiting()
        if self.background is None:
            checkpoint.save_training(directory, *of_run, self.cfg.distributed.timeout_s, waiting)
            self._forget_older(step)
        else:
            self.background.start(directory, *checkpoint.training_state(*of_run, waiting))

    def poll(self) -> None:
        """See whether the checkpoint that is being written is whole."""
        self._look(wait=False)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        self._look(wait=True)

    def _look(self, *, wait: bool) -> None:
        written = None if self.background is None else self.background.poll(wait=wait)
        if written is not None:
            self._forget_older(directories.step_of(written))

    def _forget_older(self, step: int) -> None:
        """Delete what the checkpoint of `step` makes superfluous."""
        settings = self.cfg.checkpoint
        # After the new checkpoint has its name: a kill before that leaves the older ones to resume from.
        directories.prune(settings.directory, settings.keep_last, settings.keep_every)
        if self.collector.durable is not None:
            self.collector.durable.forget(before=step)

    def _set_aside_others(self) -> None:
        """Before the first checkpoint: those of other runs in the same directory must not outrank it."""
        if self.written_before:
            return
        self.written_before = True
        # Only now, not at the start: a run that fails before it saves leaves the directory as it was.
        if dist.is_main():
            aside = directories.set_aside_others(self.cfg.checkpoint.directory, self.resumed_from)
            if aside is not None:
                self.progress.say(f"checkpoints of another run were in the way; they are in {aside} now")
        dist.barrier("setting older checkpoints aside", self.cfg.distributed.timeout_s)


def checkpoint_to_resume(cfg: Config) -> Path | None:
    """The training checkpoint that the configuration points to; None for a new run. Collective over all ranks.

    Raises CheckpointError when `checkpoint.load` asks for one and none is complete.
    """
    settings = cfg.checkpoint
    if settings.load is None:
        return None
    if settings.load == "auto":
        return directories.find_latest(settings.directory) if settings.enabled and settings.save else None
    if settings.load != "latest" and is_megatron_lm(Path(settings.load)):
        raise checkpoint.CheckpointError(
            f"checkpoint.load {settings.load}: a checkpoint of Megatron-LM, which no run of this project goes on from. "
            f"Begin from its weights: model.load={settings.load}, and leave checkpoint.load out"
        )
    if _is_checkpoint(settings.load):
        return Path(settings.load)
    parent = settings.directory if settings.load == "latest" else Path(settings.load)
    found = directories.find_latest(parent)
    if found is None:
        raise checkpoint.CheckpointError(
            f"checkpoint.load {settings.load}: {parent} holds no complete checkpoint (step_000010 and the like, each "
            "with a manifest.json). Name another directory, or begin anew with checkpoint.load=auto or null"
        )
    return found


def _is_checkpoint(load: str | None) -> bool:
    """Whether `checkpoint.load` names one checkpoint, and not a directory of them."""
    # One without a manifest is refused by its loader, which says that its writing was cut short.
    return load not in (None, "auto", "latest") and not directories.step_directories(str(load))
