"""Switches for comparison and diagnosis."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from treepo_mega.config.section import Section


class FaultConfig(Section):
    """A fault that a rank brings upon itself, to see what the others and the log make of it."""

    kind: Literal[
        "none", "stuck_in_engine", "stuck_in_collective", "stuck_in_pack", "stuck_in_grading", "stuck_in_writer"
    ] = "none"
    """The rank sleeps for ever before a forward pass of the engine, a collective of the trainer, the next pack of a
    pass, or where it waits for its graders. stuck_in_writer: the process that writes its part of a checkpoint in the
    background does, and the rank goes on."""
    step: int = Field(1, ge=0)
    """Not before this step, counted from 1; 0: from the start."""
    rank: int = Field(0, ge=0)
    """The rank that has the fault, once."""


class DebugConfig(Section):
    """Switches for comparison and diagnosis. No run needs them: the defaults are never worse."""

    schedule: Literal["async", "level"] = "async"
    """async: no tree waits for another. level: the published schedule, one blocking call a level for all prompts. With
    rollout.branching.transfer level it gives the same trees, only slower."""
    continue_paths: Literal["auto", "always", "never"] = "auto"
    """Sample a path that cannot branch any more in one go to its end, instead of resubmitting it segment by segment.
    auto: when segments do not end at KV-block borders, where resubmitting would copy or recompute part of a block."""
    segment_alignment: Literal["auto", "none", "kv_block"] = "auto"
    """kv_block: segments are stretched, by less than a KV block, to end one token after a block border. Resubmitting a
    path there recomputes least without debug.copy_partial_blocks. auto: kv_block when rollout.engine.block_size divides
    rollout.segment.length, so that only the first segment of a path is stretched. none: never."""
    copy_partial_blocks: bool = True
    """A branch inside a KV block copies the beginning of the block from where it was computed (engine/branch_cache.py).
    false: it is computed again, as vLLM alone would. Models in which some layer does not attend to everything need
    false."""
    exact_target: bool = True
    """With fp8: the sampled token's own logit comes from bf16 operands. Without it ratios drift by several times as
    much."""
    power_of_2_scales: bool = False
    """With fp8: round scales to powers of two, as Transformer Engine's block scaling does by default."""
    fault: FaultConfig = Field(default_factory=FaultConfig)
    """A fault to plant, for tests of what follows from it."""
