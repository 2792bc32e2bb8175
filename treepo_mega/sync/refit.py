"""Refit: the actor's weights into the engine, and the proof that they arrived.

    refit = Refit(cfg, spec, models, engine, score)
    metrics = refit()                            # collective over all ranks; after every update

The plan (`reshard/plan.py`) is made once. Each refit carries it out into the engine's own sharded parameters and ends
with a canary: the engine scores fixed token sequences, and its logprobs are compared with the actor's own. The run
stops if the largest difference exceeds `reshard.canary.max_abs_diff`, or the mean one `reshard.canary.mean_abs_diff`.
With reshard.canary.on_failure warn, that is printed and counted. Training on samples of other weights than those
updated goes wrong silently.

Before it complains, a failed canary moves the weights once more with checksums, so that its message can say what is
wrong: the layer group whose bytes differ in the engine; or that all bytes agree now, and either the first transfer was
damaged, or names or the engine's packing are at fault.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from treepo_mega.checkpoint.load import local_params
from treepo_mega.config import Config
from treepo_mega.engine.vllm_target import VllmTarget
from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.mcore_layout import ModelSpec
from treepo_mega.reshard.checksums import differing_groups
from treepo_mega.reshard.execute import Resharder, ReshardStats
from treepo_mega.reshard.sides import engine_side, grid_of, mcore_side
from treepo_mega.runtime import dist
from treepo_mega.runtime.device import has_cuda
from treepo_mega.runtime.seeding import derive_seed

CANARY_TOKENS = 24


class RefitError(TreepoError):
    """The engine does not hold the actor's weights; the message says how far off and, if known, which layers."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Between engine and actor, nats; infinite when a logprob is not a number."""

    largest: float
    mean: float


def check_canary_limits(cfg: Config) -> None:
    """Raises RefitError for limits that the canary cannot keep on this machine."""
    engine = cfg.rollout.engine
    keys = [key for key in ("reshard.canary.max_abs_diff", "reshard.canary.mean_abs_diff") if key in cfg.derived]
    # vLLM's fp32 attention on CUDA multiplies in TF32, about 1e-3 relative: no refit would pass the limits of fp32.
    if has_cuda() and engine.dtype == cfg.model.params_dtype == "fp32" and not engine.quantization and keys:
        raise RefitError(
            f"rollout.engine.dtype fp32 on CUDA: vLLM's attention multiplies in TF32, and the fp32 default of "
            f"{keys[0]} would stop the run; set model.params_dtype=bf16, or set {' and '.join(keys)} yourself"
        )


class Refitted(Protocol):
    """What a refit needs of the engine; `engine.engine.Engine` has it."""

    @property
    def vocab_size(self) -> int:
        """Ids that the model knows."""

    def weight_target(self) -> VllmTarget:
        """This rank's part of the engine, to write weights into."""

    def update_weights_by(self, reshard: Callable[[], Any]) -> Any:
        """Run `reshard`, which writes all weights, with the engine idle; returns what it returns."""

    def score(self, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        """Logprobs of `token_ids[1:]`, nats."""


class Refit:
    """Moves weights from `models` into `engine`. Building and calling are collective over all ranks.

    `score(tokens)` gives the actor's logprobs [len - 1] of a token list on ranks that know them, else None.
    Raises VllmTargetError when the engine's parameters are not those of the map.
    """

    def __init__(
        self,
        cfg: Config,
        spec: ModelSpec,
        models: Sequence[Any],
        engine: Refitted,
        score: Callable[[list[int]], np.ndarray | None],
    ) -> None:
        self.cfg = cfg
        self.models = models
        self.engine = engine
        self.score = score
        world = dist.world_size()
        self.source = mcore_side(spec, grid_of(cfg), world)
        self.wanted = engine_side(cfg, spec, world)
        self.target = engine.weight_target()
        self.target.init_weight_transfer(self.wanted.of(dist.rank())[0])
        self.resharder = Resharder.between(
            self.source,
            self.wanted,
            source_dtype=next(models[0].parameters()).dtype,
            target_dtype=self.target.dtype,
            bucket_bytes=cfg.reshard.bucket_mb << 20,
            timeout_s=cfg.distributed.timeout_s,
        )
        self.bound = self.resharder.plan.traffic().bound
        rng = random.Random(derive_seed("canary", cfg.train.seed))
        length = min(CANARY_TOKENS, cfg.max_model_len)
        # Drawn from the seed, alike on every rank: one rank's logprobs of the actor serve the engines of all.
        self.prompts = [
            [rng.randrange(engine.vocab_size) for _ in range(length)] for _ in range(cfg.reshard.canary.prompts)
        ]

    def __call__(self) -> dict[str, float]:
        """Transfer and canary; returns the `reshard/` metrics. Raises RefitError when the canary fails."""
        return self.transfer() | self.canary()

    def transfer(self) -> dict[str, float]:
        """New weights into the engine; the metrics of that."""
        started = time.perf_counter()
        stats = self.move()
        seconds = time.perf_counter() - started
        total = dist.sum_over_ranks({"moved": stats.bytes_received, "placed": stats.bytes_received + stats.bytes_local})
        slowest = dist.max_over_ranks({"transport": stats.seconds, "pack": stats.handed_over_seconds})
        return {
            "reshard/bytes": total["placed"],
            "reshard/bytes_moved": total["moved"],
            "reshard/bytes_over_bound": total["moved"] / self.bound if self.bound else 1.0,
            "reshard/buffer_bytes": float(self.resharder.transport.buffer_bytes),
            "reshard/seconds": seconds,
            "reshard/transport_s": slowest["transport"],
            "reshard/pack_s": slowest["pack"],
            "reshard/gb_per_s": total["placed"] / max(slowest["transport"], 1e-9) / 1e9,
        }

    def canary(self) -> dict[str, float]:
        """Score the canary on both sides, which needs the engine's KV cache and the actor's weights."""
        found, failed = self.check()
        return {
            "reshard/canary_abs_diff": found.largest,
            "reshard/canary_mean_abs_diff": found.mean,
            "reshard/canary_failures": float(failed),
        }

    def move(self, checksums: bool = False) -> ReshardStats:
        """The transfer alone, without the canary."""
        chunks = [local_params(model) for model in self.models]
        return self.engine.update_weights_by(lambda: self.resharder(chunks, self.target, checksums=checksums))

    def difference(self) -> Difference:
        """|engine - actor| logprob of the canary: largest over all engines, and the mean of the engine worst off."""
        diffs = []
        for tokens in self.prompts:
            theirs = np.array(self.engine.score(tokens, self.cfg.rollout.temperature))
            known = self.score(tokens)
            # Only last-stage ranks know the actor's logprobs; the first of them tells all engines.
            scored = dist.gather_objects(None if known is None else known.tolist())
            ours = next(logprobs for logprobs in scored if logprobs is not None)
            diffs.append(np.abs(theirs - np.array(ours)))
        # A logprob that is not a number must exceed every limit: a comparison with NaN is false.
        here = np.nan_to_num(np.concatenate(diffs), nan=np.inf)
        # The maximum over all ranks: a failed canary goes on with collectives, so all ranks must see the same.
        found = dist.max_over_ranks({"largest": float(here.max()), "mean": float(here.mean())})
        return Difference(**found)

    def check(self) -> tuple[Difference, bool]:
        """(the difference, whether it is above a limit). Raises RefitError, or warns, as configured."""
        found = self.difference()
        exceeded = self._exceeded(found)
        if not exceeded:
            return found, False
        message = f"after the refit the engine's logprobs differ from the actor's {exceeded}: {self._diagnosis()}"
        if self.cfg.reshard.canary.on_failure == "stop":
            raise RefitError(message)
        if dist.is_main():
            print(f"warning: {message}", file=sys.stderr, flush=True)
        return found, True

    def _exceeded(self, found: Difference) -> str:
        """Which limit is exceeded, in words; "" for none."""
        limits = self.cfg.reshard.canary
        for how, value, name in (
            ("by up to", found.largest, "max_abs_diff"),
            ("on average by", found.mean, "mean_abs_diff"),
        ):
            limit = getattr(limits, name)
            if limit is not None and not value <= limit:
                return f"{how} {value:.3g} nats, more than reshard.canary.{name} = {limit:.3g}"
        return ""

    def _diagnosis(self) -> str:
        """Move the weights again with checksums, and say what that shows. Collective over all ranks."""
        differing = dist.gather_objects(differing_groups(self.move(checksums=True).checksums))
        if groups := list(dict.fromkeys(group for of_rank in differing for group in of_rank)):
            more = f" and {len(groups) - 4} more" if len(groups) > 4 else ""
            return f"the engine does not hold the actor's weights: checksums differ in {', '.join(groups[:4])}{more}"
        if not self._exceeded(self.difference()):
            return "a second transfer repaired it, so the first was damaged on its way"
        return (
            "yet every layer group's checksum agrees: the bytes arrived, so the map's names or the engine's packing "
            "are wrong, or the two sides compute differently"
        )
