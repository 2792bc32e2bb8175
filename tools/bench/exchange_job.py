"""What exchange.py and exchange_waiting.py share: a job's layout, the plan of its steps, and its ranks as processes."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from treepo_mega.config import load_config  # noqa: E402
from treepo_mega.tree.credit import Credit  # noqa: E402
from treepo_mega.tree.deal import Dealt, deal_forest  # noqa: E402
from treepo_mega.tree.merge import merge_equal, told_alike  # noqa: E402
from treepo_mega.tree.node import Tree  # noqa: E402
from treepo_mega.tree.pack import split_steps  # noqa: E402
from treepo_mega.tree.segments import Segments  # noqa: E402
from treepo_mega.tree.stretches import Deliveries, wanted  # noqa: E402

MAX_TOKENS = 8192
BYTES_PER_TOKEN = 8


@dataclass(frozen=True)
class Layout:
    """A job: `model` ranks hold a replica together, `engine` ranks an engine."""

    ranks: int
    model: int
    engine: int
    prompts: int
    steps: int

    @property
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return self.ranks // self.model

    def home(self, prompt: int) -> int:
        """The rank that speaks for the engine which samples the prompt."""
        engines = self.ranks // self.engine
        return prompt * engines // self.prompts * self.engine

    def replica_of_rank(self) -> list[int]:
        """As Megatron has them with TP innermost, DP next and PP outermost; TP is that of the engine."""
        width = self.engine * self.replicas
        return [rank % width // self.engine for rank in range(self.ranks)]


def plan(
    trees: Sequence[Tree], layout: Layout, prompts: Sequence[int]
) -> tuple[list[list[int]], list[Segments], list[Dealt], Deliveries]:
    """The optimizer steps of a rollout from structure: places in `trees`, segments, who trains what, who needs what.

    `prompts`: whose trees they are.
    """
    homes = np.array([layout.home(prompt) for prompt in prompts])
    steps = split_steps(range(len(trees)), layout.steps)
    segments = []
    dealt = []
    for chosen in steps:
        of_step = [trees[prompt] for prompt in chosen]
        sampled = Segments.from_trees(of_step, chosen)
        nothing = np.zeros(len(sampled))
        merged, _ = merge_equal(
            sampled, Credit(nothing, nothing, nothing, np.zeros(len(sampled), np.int64)), told_alike(of_step)
        )
        segments.append(merged)
        dealt.append(deal_forest(merged, dp_size=layout.replicas, max_tokens=MAX_TOKENS, pair_cost=1e-4))
    return steps, segments, dealt, Deliveries([wanted(s, d, homes) for s, d in zip(segments, dealt, strict=True)])


class Meter:
    """Bytes that this rank receives, counted where torch.distributed is called."""

    def __init__(self) -> None:
        self.received = 0
        real = {name: getattr(torch.distributed, name) for name in ("irecv", "broadcast", "all_gather")}

        def irecv(buffer: torch.Tensor, *args: Any, **named: Any) -> Any:
            """As torch's."""
            self.received += buffer.nbytes
            return real["irecv"](buffer, *args, **named)

        def broadcast(buffer: torch.Tensor, src: int, **named: Any) -> Any:
            """As torch's."""
            self.received += buffer.nbytes if src != torch.distributed.get_rank() else 0
            return real["broadcast"](buffer, src=src, **named)

        def all_gather(parts: list[torch.Tensor], own: torch.Tensor, **named: Any) -> Any:
            """As torch's."""
            self.received += sum(part.nbytes for part in parts) - own.nbytes
            return real["all_gather"](parts, own, **named)

        for name, counted in (("irecv", irecv), ("broadcast", broadcast), ("all_gather", all_gather)):
            setattr(torch.distributed, name, counted)

    def take(self) -> int:
        """The bytes since the last call."""
        received = self.received
        self.received = 0
        return received


def configuration() -> Any:
    """What reports need to know."""
    settings = ("model.hf_checkpoint=unused", "data.train=[{path: unused}]", "train.prefix_sharing=content")
    return load_config(None, list(settings))


def join(rank: int, layout: Layout, port: int) -> None:
    """Make this process a gloo rank."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(layout.ranks)
    torch.distributed.init_process_group("gloo")


def on_ranks(act: Callable[[int, Layout, int, Any], None], layout: Layout) -> list[dict[str, Any]]:
    """What `act` answers on each rank of the layout, each a forked process: nothing is imported twice."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    ranks = [
        context.Process(target=act, args=(rank, layout, port, answers), daemon=True) for rank in range(layout.ranks)
    ]
    for process in ranks:
        process.start()
    said = [answers.get(timeout=300) for _ in ranks]
    for process in ranks:
        process.join(60)
    return said
