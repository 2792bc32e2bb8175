"""Packs: what the trainer computes on. Pure Python and NumPy.

A *pack* is one micro-batch as one token sequence. Each *block* of it is a tree laid out in depth-first
pre-order (for now a tree that is a single path: one trajectory, the flat layout). Per token it states

    tokens[T], position[T]      id, and depth inside its own trajectory (what RoPE rotates by)
    subtree_end[T]              key j is visible to query i  iff  j <= i < subtree_end[j]

and per predicted token (a *row*) the pack index whose hidden state predicts it (`predictor`), the token
(`target`), the masses `A_pos >= 0`, `A_neg <= 0` and the multiplicity `n` of the trajectories through it,
and the engine's logprob. Masses, not a net advantage: see `loss/policy.py`.

`split_steps` deals trajectories to optimizer steps (never splitting a prompt), `plan_step` those of a step to
data-parallel ranks and micro-batches. Both are pure functions of their arguments, so every rank computes the
same plan and no metadata is exchanged. All micro-batches of a step have one padded length, and every data-parallel rank
has the same number of them (Megatron's schedules need both).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One root-to-leaf path ready for training."""

    prompt_index: int
    """Index of its prompt in the batch: mini-batches keep equal indices together."""
    tokens: list[int]
    """Prompt and response."""
    prompt_len: int
    advantage: float
    rollout_logprobs: list[float]
    """Engine logprobs of the response tokens."""

    @property
    def response_len(self) -> int:
        """Trained tokens."""
        return len(self.tokens) - self.prompt_len


@dataclass(slots=True)
class Pack:
    """One micro-batch; see the module docstring for the fields. N rows, T padded tokens."""

    tokens: Ints
    position: Ints
    subtree_end: Ints
    blocks: list[tuple[int, int]]
    """[start, end) of each tree in the pack; padding after the last block belongs to none."""
    predictor: Ints
    target: Ints
    A_pos: Floats
    A_neg: Floats
    n: Floats
    rollout_logprobs: Floats
    old_logprobs: Floats | None = None
    """Actor logprobs before the update, on last-pipeline-stage ranks."""
    ref_logprobs: Floats | None = None

    @property
    def pairs(self) -> int:
        """(trajectory, token) pairs: the denominator of token-mean."""
        return int(self.n.sum())


@dataclass(slots=True)
class StepPlan:
    """One optimizer step of one data-parallel rank."""

    packs: list[Pack]
    padded_tokens: int = 0
    real_tokens: int = 0
    trajectories: list[Trajectory] = field(default_factory=list)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def flat_pack(trajectories: list[Trajectory], length: int, pad_id: int = 0) -> Pack:
    """Lay trajectories one after the other, padded to `length` tokens. Raises ValueError when they do not fit."""
    tokens = np.full(length, pad_id, np.int64)
    position = np.zeros(length, np.int64)
    end = np.arange(1, length + 1, dtype=np.int64)
    blocks, rows = [], []
    at = 0
    for t in trajectories:
        size = len(t.tokens)
        if at + size > length:
            raise ValueError(f"trajectories of {at + size}+ tokens do not fit a pack of {length}")
        tokens[at : at + size] = t.tokens
        position[at : at + size] = np.arange(size)
        end[at : at + size] = at + size
        blocks.append((at, at + size))
        rows.append((at, t))
        at += size
    count = [t.response_len for _, t in rows]
    first = [s + t.prompt_len - 1 for s, t in rows]
    spans = [np.arange(f, f + c, dtype=np.int64) for f, c in zip(first, count, strict=True)]
    predictor = np.concatenate([*spans, np.zeros(0, np.int64)])
    advantage = np.repeat(np.array([t.advantage for _, t in rows], np.float32), count)
    logprobs = np.array([x for _, t in rows for x in t.rollout_logprobs], np.float32)
    return Pack(
        tokens=tokens,
        position=position,
        subtree_end=end,
        blocks=blocks,
        predictor=predictor,
        target=tokens[predictor + 1],
        A_pos=np.maximum(advantage, 0),
        A_neg=np.minimum(advantage, 0),
        n=np.ones(len(predictor), np.float32),
        rollout_logprobs=logprobs,
    )


def split_steps(trajectories: list[Trajectory], steps: int) -> list[list[Trajectory]]:
    """Deal prompts to optimizer steps in order, as evenly as their count allows; no prompt is split."""
    prompts = sorted({t.prompt_index for t in trajectories})
    bounds = np.linspace(0, len(prompts), steps + 1).round().astype(int)
    chosen = [set(prompts[a:b]) for a, b in itertools.pairwise(bounds)]
    return [[t for t in trajectories if t.prompt_index in c] for c in chosen]


def balance(costs: list[int], bins: int) -> list[list[int]]:
    """Indices dealt to `bins` so that sums are near equal: largest first, each to the emptiest bin. Deterministic."""
    out: list[list[int]] = [[] for _ in range(bins)]
    load = [0] * bins
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        b = min(range(bins), key=lambda b: (load[b], b))
        out[b].append(i)
        load[b] += costs[i]
    return [sorted(b) for b in out]


def plan_step(
    trajectories: list[Trajectory],
    *,
    dp_size: int,
    dp_rank: int,
    max_tokens: int,
    multiple: int = 1,
    count_multiple: int = 1,
    pad_id: int = 0,
) -> StepPlan:
    """Micro-batches of one optimizer step for `dp_rank`: at most `max_tokens` tokens each, padded to one length.

    The number of micro-batches and their length are those of the fullest rank; ranks with less get padding.
    Lengths are padded to `multiple`; the number of micro-batches is a multiple of `count_multiple` (Megatron's
    interleaved schedule wants whole groups of pipeline-size micro-batches). Raises ValueError when a single
    trajectory is longer than `max_tokens`.
    """
    longest = max((len(t.tokens) for t in trajectories), default=0)
    if longest > max_tokens:
        raise ValueError(f"a trajectory of {longest} tokens does not fit max_tokens_per_gpu={max_tokens}")
    per_rank = [[trajectories[i] for i in b] for b in balance([len(t.tokens) for t in trajectories], dp_size)]
    most = max(sum(len(t.tokens) for t in r) for r in per_rank)
    count = _round_up(max(1, -(-most // max_tokens)), count_multiple)
    while True:
        dealt = [[[r[i] for i in b] for b in balance([len(t.tokens) for t in r], count)] for r in per_rank]
        fullest = max(sum(len(t.tokens) for t in b) for r in dealt for b in r)
        if fullest <= max_tokens:
            break
        count += count_multiple
    length = _round_up(max(fullest, 2), multiple)
    packs = [flat_pack(b, length, pad_id) for b in dealt[dp_rank]]
    mine = per_rank[dp_rank]
    return StepPlan(packs, length * count, sum(len(t.tokens) for t in mine), mine)
