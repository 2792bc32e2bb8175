"""One rank of a run, built and run with fake tensors: what its memory really is.

    proof = prove_rank(cfg, spec, rank=0, world_size=128, ranks_per_node=8)
    proof.parameters, proof.gradients, proof.optimizer, proof.update, proof.old_logprobs       # bytes

Model, gradient buffers and optimizer are the trainer's own, at full size; old logprobs and an update go through the
real pipeline schedule with full packs. Seconds, without a GPU, weights or peers: see `bridges.py` for what that takes.
"""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from treepo_mega.actor.forward import count_multiple, logprob_tensors, padding_multiple, run_schedule
from treepo_mega.actor.losses import PolicyLoss
from treepo_mega.actor.update import Actor
from treepo_mega.config import Config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.prove.bridges import FakeWorld, bridged
from treepo_mega.prove.tracker import MemoryTracker
from treepo_mega.tree.pack import Pack, plan_step
from treepo_mega.tree.segments import Trajectory


@dataclass(frozen=True, slots=True)
class RankProof:
    """Bytes of a rank. `old_logprobs` and `update` are peaks beside parameters, gradients and optimizer state.

    What the first pass leaves for later ones (Megatron's buffer for gathered activations) counts in both.
    """

    rank: int
    stage: int
    parameters: int
    gradients: int
    optimizer: int
    old_logprobs: int
    update: int
    seconds: float
    largest: tuple[tuple[str, int, int], ...] = ()
    """(operation and shape, how many, bytes) of the update's peak."""

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def full_packs(cfg: Config, count: int, cp_rank: int) -> list[Pack]:
    """`count` packs of train.max_tokens_per_gpu tokens, each one long trajectory, of which every token is trained."""
    cp_size = cfg.parallel.context_parallel_size
    tokens = cfg.train.max_tokens_per_gpu
    whole = Trajectory(0, [1] * tokens, 1, 1.0, [0.0] * (tokens - 1))
    plan = plan_step(
        [whole], dp_size=1, dp_rank=0, max_tokens=tokens, multiple=padding_multiple(cfg), cp_size=cp_size,
        cp_rank=cp_rank,
    )  # fmt: skip
    (pack,) = plan.packs
    pack.old_logprobs = np.zeros(len(pack.target), np.float32)
    return [pack] * count


def passes_of(cfg: Config, stage: int) -> int:
    """Micro-batches of a proof: after so many the stage holds no more activations at a time."""
    pp = cfg.parallel.pipeline_model_parallel_size
    return 2 * pp if count_multiple(cfg) > 1 else pp - stage + 1


def prove_rank(cfg: Config, spec: ModelSpec, *, rank: int, world_size: int, ranks_per_node: int = 8) -> RankProof:
    """Build rank `rank` of `world_size` and run old logprobs and an update. `transformer_impl` auto is taken as local.

    Changes the process groups of this process: not to be called in one that has any.
    """
    cfg = cfg.replace({"model.transformer_impl": "local"})
    parallel = cfg.parallel
    started = time.perf_counter()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    multiple = padding_multiple(cfg)
    tokens = -(-cfg.train.max_tokens_per_gpu // multiple) * multiple // parallel.context_parallel_size
    if parallel.sequence_parallel:
        tokens //= parallel.tensor_model_parallel_size
    world = FakeWorld(rank, world_size, ranks_per_node, parallel, (tokens, 1, spec.hidden_size))
    with warnings.catch_warnings(), bridged(world), FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker() as seen:
        warnings.simplefilter("ignore")
        return _prove(cfg, rank, seen, started)


def _prove(cfg: Config, rank: int, seen: MemoryTracker, started: float) -> RankProof:
    from megatron.core import parallel_state

    actor = Actor(cfg, cfg.model.hf_checkpoint)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    packs = full_packs(cfg, passes_of(cfg, stage), parallel_state.get_context_parallel_rank())
    with_moments(actor)
    parameters, gradients, optimizer = (sum(each.values()) for each in held(actor))
    before = seen.used
    seen.restart()
    logprob_tensors(actor.chunks, packs, actor.head)
    old = seen.peak - before
    seen.restart()
    for chunk in actor.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    run_schedule(actor.chunks, packs, actor.head, loss=PolicyLoss(cfg.algo, actor.head.backend))
    return RankProof(
        rank, stage, parameters, gradients, optimizer, old,
        seen.peak - before, time.perf_counter() - started, tuple(seen.largest()),
    )  # fmt: skip


def with_moments(actor: Actor) -> None:
    """Let the optimizer make its moments, which it else does in its first step."""
    for part in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        inner.step()
        inner.zero_grad()


def held(actor: Actor) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """Bytes of the storages of parameters, gradients and optimizer state, each by its storage."""
    kinds: list[dict[int, int]] = []
    tensors: list[list[torch.Tensor]] = [[], [], []]
    for chunk in actor.chunks:
        for parameter in chunk.parameters():
            tensors[0].append(parameter)
            tensors[1].append(parameter.main_grad)
    for part in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
        for group in part.optimizer.param_groups:
            tensors[2] += group["params"]
        for state in part.optimizer.state.values():
            tensors[2] += [value for value in state.values() if value.dim()]
    counted: set[int] = set()
    for of_kind in tensors:
        sizes = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in of_kind}
        # In fp32 the optimizer works on the parameters themselves.
        kinds.append({key: size for key, size in sizes.items() if key not in counted})
        counted |= set(sizes)
    return kinds[0], kinds[1], kinds[2]
