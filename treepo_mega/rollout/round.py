"""Rounds of prompts over the engines of this job: `rollout/dealing.py`'s lists on the launcher's store.

    queue = open_round(cfg, costs, "step 7")      # on every rank; this engine's queue, for Generator.grow

Training and evaluation deal alike through it: by expected cost, stolen by whoever runs dry.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from treepo_mega.config import Config
from treepo_mega.rollout.dealing import LocalQueue, Queue, SharedQueue, deal_by_cost
from treepo_mega.runtime import dist


@functools.cache
def _rounds() -> itertools.count[int]:
    """Numbers the rounds of this process: a list in the store is used once, and every rank opens the same rounds."""
    return itertools.count()


def open_round(cfg: Config, costs: Sequence[float], what: str) -> Queue:
    """This engine's way to the prompts of a new round, by their expected costs. All ranks call it alike."""
    tp = cfg.rollout.engine.tensor_parallel_size
    engines = max(1, dist.world_size() // tp)
    deal = deal_by_cost(costs, engines)
    name = f"round {next(_rounds())}, {what}"
    if engines == 1:
        return LocalQueue(deal[0])
    engine, rank = divmod(dist.rank(), tp)
    timeout_s = cfg.rollout.timeout_s
    return SharedQueue(dist.store(), name, deal, costs, engine, rank=rank, ranks=tp, timeout_s=timeout_s)
