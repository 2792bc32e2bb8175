"""What a run adds to its disk: checkpoints, and trees of steps that no checkpoint has yet (`rollout.durable`). Pure.

    plan = plan_disk(cfg, spec, tree_shape(cfg, lengths), kept=lengths.kept)
    plan.journal_step, plan.journal_steps        # bytes of one step's trees, and steps that lie there together
    expected_journals(cfg, spec)                 # folder -> bytes, with assumed lengths, as `check_space` takes them

A record has 8 bytes a token (id and logprob in 4 bytes each; the prompt's without logprob), 4 more where branches ask
for entropies, the experts of a token where routing is replayed, some numbers a segment and a leaf, and text beside
them. Trees without signal are kept too: a run that goes on must not begin them again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from treepo_mega.checkpoint.space import checkpoint_bytes, in_units, planned_bytes
from treepo_mega.config import Config
from treepo_mega.journal.folder import FOLDER
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.plan.engine import waves
from treepo_mega.plan.hardware import Rates
from treepo_mega.plan.lengths import Lengths
from treepo_mega.plan.seconds import tree_shape
from treepo_mega.plan.work import TreeShape

TOKEN_BYTES = 4
LOGPROB_BYTES = 4
ENTROPY_BYTES = 4
RECORD_BYTES = 2048
"""Names of columns and of what graders said, of any tree."""
SEGMENT_BYTES = 32
"""Of its lengths, its place in the tree and its reason to stop; measured 22 in small trees, 30 in large ones."""
LEAF_BYTES = 20
"""Its reward and verdict as fp64, and its node."""


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Bytes. `journal_step`: of one step's trees; 0 where none are kept."""

    checkpoint: int
    checkpoints: int
    """What stands below checkpoint.save at most, all together."""
    journal_step: int
    journal_steps: int
    """Steps whose trees lie there together, at most."""

    @property
    def journals(self) -> int:
        """Of all trees that lie there together."""
        return self.journal_step * self.journal_steps

    def lines(self) -> list[str]:
        """For people; nothing for a run that saves nothing."""
        if not self.checkpoints:
            return []
        trees = ""
        if self.journals:
            trees = f"; trees {in_units(self.journal_step)} a step, {self.journal_steps} steps of them together"
        return [
            f"disk: a checkpoint {in_units(self.checkpoint)}, with those that stand together "
            f"{in_units(self.checkpoints)}{trees}"
        ]


def plan_disk(cfg: Config, spec: ModelSpec, shape: TreeShape, kept: float) -> DiskPlan:
    """The disk of `cfg` with trees of `shape`, of which a share of `kept` has signal."""
    settings = cfg.checkpoint
    saves = settings.enabled and bool(settings.save)
    checkpoints = planned_bytes(cfg, spec)[Path(str(settings.save))] if saves else 0
    if not (cfg.rollout.durable and settings.enabled):
        return DiskPlan(checkpoint_bytes(cfg, spec), checkpoints, 0, 0)
    of_tree = record_bytes(
        cfg, spec, tokens=shape.unique, prompt=shape.prompt, segments=1 + shape.requests, leaves=shape.leaves
    )
    step = math.ceil(sum(waves(cfg, kept)) * of_tree)
    # Until the checkpoint is whole, which one that is written meanwhile may be as late as the next.
    together = settings.save_interval * (2 if settings.async_save else 1) + 1
    return DiskPlan(checkpoint_bytes(cfg, spec), checkpoints, step, min(together, cfg.train.num_rollouts))


def record_bytes(
    cfg: Config, spec: ModelSpec, *, tokens: float, prompt: float, segments: float, leaves: float
) -> float:
    """Of one tree with so many sampled `tokens`, which count once where paths share them; its root is a segment too."""
    of_token = TOKEN_BYTES + LOGPROB_BYTES
    if cfg.rollout.entropy_top_k:
        of_token += ENTROPY_BYTES
    if cfg.rollout.routing_replay != "off":
        # One byte an expert holds the numbers of 255.
        of_token += spec.num_layers * spec.experts_per_token * (1 if spec.num_experts <= 255 else 2)
    return RECORD_BYTES + of_token * tokens + TOKEN_BYTES * prompt + SEGMENT_BYTES * segments + LEAF_BYTES * leaves


def expected_journals(cfg: Config, spec: ModelSpec) -> dict[Path, int]:
    """Folder -> bytes of the trees that lie there together, with assumed lengths; empty where none are kept."""
    lengths = Lengths.assumed(cfg, Rates())
    plan = plan_disk(cfg, spec, tree_shape(cfg, lengths), lengths.kept)
    return {Path(cfg.logging.run_dir) / FOLDER: plan.journals} if plan.journals else {}
