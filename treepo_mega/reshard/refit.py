"""Refit: the actor's weights into the engine, and the proof that they arrived.

Every refit ends with a canary: the engine scores a fixed token sequence and its logprobs are compared with the
actor's own. A difference above `rollout.engine.canary_max_abs_diff` stops the run: training on samples of other
weights than those updated goes wrong silently.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treepo_mega.config import Config
from treepo_mega.reshard.gather import HfGather, local_params
from treepo_mega.runtime import dist
from treepo_mega.runtime.seeding import derive_seed

CANARY_TOKENS = 24


class RefitError(RuntimeError):
    """The engine does not hold the actor's weights."""


class Refit:
    """Moves weights from `models` into `engine`. Collective over all ranks.

    `score(tokens)` gives the actor's logprobs [len - 1] of a token list on ranks that know them, else None.
    """

    def __init__(
        self,
        cfg: Config,
        models: Sequence[Any],
        engine: Any,
        gather: HfGather,
        score: Callable[[list[int]], np.ndarray | None],
    ) -> None:
        self.cfg, self.models, self.engine, self.gather, self.score = cfg, models, engine, gather, score
        rng = random.Random(derive_seed("canary", cfg.train.seed))
        length = min(CANARY_TOKENS, cfg.max_model_len)
        self.canary = [rng.randrange(engine.vocab_size) for _ in range(length)]

    def __call__(self) -> dict[str, float]:
        """Refit and check; returns the `reshard/` metrics. Raises RefitError when the canary fails."""
        started = time.perf_counter()
        self.engine.update_weights(self.gather([local_params(m) for m in self.models]))
        seconds = time.perf_counter() - started
        moved = dist.sum_over_ranks({"bytes": float(self.gather.stats.bytes_hf)})["bytes"]
        return {
            "reshard/bytes": moved,
            "reshard/seconds": seconds,
            "reshard/gb_per_s": moved / max(seconds, 1e-9) / 1e9,
            "reshard/canary_abs_diff": self.check(),
        }

    def check(self) -> float:
        """Largest |engine - actor| logprob of the canary over all engines, nats. Raises RefitError above the limit."""
        theirs = np.array(self.engine.score(self.canary, self.cfg.rollout.temperature))
        known = self.score(self.canary)
        # Only last-stage ranks know the actor's logprobs; the first of them tells all engines.
        told = [x for x in dist.gather_objects(None if known is None else known.tolist()) if x is not None]
        diff = float(np.abs(theirs - np.array(told[0])).max())
        worst = dist.max_over_ranks({"diff": diff if np.isfinite(diff) else 1e9})["diff"]
        limit = self.cfg.rollout.engine.canary_max_abs_diff
        if limit is not None and worst > limit:
            raise RefitError(
                f"after the refit the engine's logprobs differ from the actor's by up to {worst:.3g} nats, more than "
                f"rollout.engine.canary_max_abs_diff = {limit:.3g}: the engine does not hold the actor's weights"
            )
        return worst
