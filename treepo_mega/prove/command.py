"""`treepo-mega plan --prove`: the plan and the proof of each distinct rank, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from treepo_mega.config import Config, ConfigError
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.plan.activations import activation_peak
from treepo_mega.plan.layout import Layout, held_bytes
from treepo_mega.prove.rank import RankProof, passes_of, prove_rank

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Compared:
    """One item of a rank's memory, bytes."""

    rank: int
    stage: int
    item: str
    planned: float
    proven: float

    @property
    def ratio(self) -> float:
        """Planned / proven."""
        return self.planned / self.proven if self.proven else math.inf

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"ratio": self.ratio}


@dataclass(frozen=True, slots=True)
class Proof:
    """Of the first, a middle and the last stage."""

    compared: tuple[Compared, ...]
    ranks: tuple[RankProof, ...]

    def lines(self) -> list[str]:
        """For people."""
        out = [f"proof: {'':<24}{'planned MiB':>13}{'built MiB':>13}{'ratio':>9}   (fake tensors, full packs)"]
        for each in self.compared:
            out.append(
                f"  rank {each.rank:<6}stage {each.stage:<3}{each.item:<15}{each.planned / MIB:>12.1f}"
                f"{each.proven / MIB:>13.1f}{each.ratio:>9.3f}"
            )
        for rank in self.ranks:
            said = ", ".join(f"{count} x {label} {size / MIB:.0f}" for label, count, size in rank.largest[:4])
            out.append(f"  rank {rank.rank}: built and run in {rank.seconds:.1f} s; most of its update's peak: {said}")
        return out

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "compared": [each.to_dict() for each in self.compared],
            "ranks": [each.to_dict() for each in self.ranks],
        }


def distinct_ranks(layout: Layout) -> list[int]:
    """The first rank of the first, a middle and the last stage: all others hold as much as one of them."""
    return [layout.first_rank(stage) for stage in sorted({0, min(1, layout.pp - 1), layout.pp - 1})]


def prove(cfg: Config, spec: ModelSpec, *, world_size: int, ranks_per_node: int = 8) -> Proof:
    """Build and run each distinct rank of `cfg`, and compare it with its plan. Needs a process without groups.

    Raises ConfigError for experts whose dispatcher is not alltoall.
    """
    if spec.num_experts and cfg.model.moe_token_dispatcher_type != "alltoall":
        raise ConfigError(
            f"--prove: model.moe_token_dispatcher_type={cfg.model.moe_token_dispatcher_type} reads from the router's "
            "choice, which fake tensors do not hold, how much it gathers: prove the layout with alltoall"
        )
    layout = Layout.of(cfg, world_size)
    ranks = tuple(
        prove_rank(cfg, spec, rank=rank, world_size=world_size, ranks_per_node=ranks_per_node)
        for rank in distinct_ranks(layout)
    )
    return Proof(tuple(each for proof in ranks for each in _compare(cfg, spec, layout, proof)), ranks)


def _compare(cfg: Config, spec: ModelSpec, layout: Layout, proof: RankProof) -> Iterator[Compared]:
    held = held_bytes(cfg, spec, layout, layout.place(proof.rank))
    peak = activation_peak(cfg, spec, layout, proof.stage, passes_of(cfg, proof.stage))
    for item, planned in (
        ("parameters", held.parameters),
        ("gradients", held.gradients),
        ("optimizer", held.optimizer),
        ("old_logprobs", peak.old_logprobs),
        ("update", peak.update),
    ):
        yield Compared(proof.rank, proof.stage, item, float(planned), float(getattr(proof, item)))
