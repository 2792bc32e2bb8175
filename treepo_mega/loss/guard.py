"""Which numerics the head runs in, and whether FP8 may go on.

FP8 moves logprobs by a few hundredths of a nat; against a clip range of 0.2 that matters. How far depends on the
model's activations, and is not known beforehand. So every step measures: the old-logprob pass computes a sample of
each micro-batch's rows in fp8 and in bf16, or the first update where there is no such pass. If the mean difference over
all ranks exceeds `loss.guard.max_abs_diff`, the step runs in bf16 and is counted. Its old logprobs, or its gradients,
are computed again: ratios compare like with like. The following steps run in bf16 and still measure, until the sample
is within the limit again.

On the same rows, the update counts the clip decisions on which FP8 and bf16 disagree. Such flips are most of what FP8
does to the gradient.

The sample is cheap: 256 rows are computed twice beside the thousands of a micro-batch, with the same quantised weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from treepo_mega.config import DebugConfig, LossConfig
from treepo_mega.loss.logprobs import logprob_entropy
from treepo_mega.loss.operands import Numerics, Precision
from treepo_mega.loss.shard import Shard


def numerics_of(loss: LossConfig, debug: DebugConfig, precision: Precision | None) -> Numerics:
    """The head's numerics in `precision` (loss.precision or loss.logprob_precision)."""
    return Numerics(
        precision=precision or "fp32",
        recipe=loss.fp8_recipe,
        exact_target=debug.exact_target,
        power_of_2_scales=debug.power_of_2_scales,
        grads="fp8" if loss.fp8_grads else "bf16",
        loud_channels=loss.fp8_loud_channels,
    )


GatesOf = Callable[[Tensor, Tensor | None, Tensor], Tensor]


@dataclass(slots=True)
class Drift:
    """|logp_fp8 - logp_bf16| over sampled rows, nats, and gates that differ."""

    total: float = 0.0
    rows: float = 0.0
    largest: float = 0.0
    flips: float = 0.0
    gates: float = 0.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What one micro-batch adds to the drift: counts, and scalars [] that stay on the device."""

    # A micro-batch must not read its own numbers: each read waits for the device before the next one is queued.
    rows: int = 0
    total: Tensor | float = 0.0
    largest: Tensor | float = 0.0
    gates: int = 0
    flips: Tensor | float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """The rows [n] of a micro-batch that are watched, and their bf16 logprobs in the old-logprob pass."""

    take: Tensor
    """[n] indices of the rows."""
    old: Tensor
    """[n] nats."""


class HeadGuard:
    """See the module docstring. One per model that is trained; the reference follows the actor's."""

    def __init__(self, loss: LossConfig, debug: DebugConfig | None = None) -> None:
        self.config = loss
        debug = debug or DebugConfig()
        self.update = numerics_of(loss, debug, loss.precision)
        self.logprobs = numerics_of(loss, debug, loss.logprob_precision)
        self.fallen = False
        """Does this step run in bf16?"""
        self._seen: list[Seen] = []

    @property
    def watches(self) -> bool:
        """Is there an FP8 pass to watch?"""
        return self.config.guard.sample_rows > 0 and "fp8" in (self.update.precision, self.logprobs.precision)

    def numerics(self, *, for_update: bool) -> Numerics:
        """What a pass runs in now."""
        chosen = self.update if for_update else self.logprobs
        return replace(chosen, precision="bf16") if self.fallen and chosen.precision == "fp8" else chosen

    @torch.no_grad()
    def watch(self, hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard) -> Sample | None:
        """Compare a sample of the rows hidden [N, K], target [N] and return it; None when there is nothing to watch.

        Keep the sample with its micro-batch: `count_flips` asks for it. Collective over the shard's group.
        """
        rows = hidden.shape[0]
        if not self.watches or not rows:
            return None
        # Evenly spread, not random: each row's sums cross the group, so that all its ranks must take the same rows.
        take = torch.linspace(0, rows - 1, min(rows, self.config.guard.sample_rows), device=hidden.device).long()
        low, exact = (self._logp(precision, hidden[take], weight, target[take], shard) for precision in ("fp8", "bf16"))
        diff = (low - exact).abs()
        self._seen.append(Seen(rows=len(take), total=diff.sum(), largest=diff.max()))
        return Sample(take, exact)

    def _logp(self, precision: Precision, hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard) -> Tensor:
        fp8 = self.update if self.update.precision == "fp8" else self.logprobs
        way = replace(shard, numerics=replace(fp8, precision=precision))
        return logprob_entropy(hidden, weight, target, way)[0]

    @torch.no_grad()
    def count_flips(
        self, sample: Sample | None, hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard, closed: GatesOf
    ) -> None:
        """In the update: gates `closed(logp [n], old [n] or None, rows [n])` of the update's head against bf16's.

        `sample` is what `watch` returned for these rows. `old` None stands for the batch's own old logprobs. Collective
        over the shard's group.
        """
        if sample is None or shard.numerics.precision != "fp8":
            return
        take = sample.take
        low, exact = (self._logp(precision, hidden[take], weight, target[take], shard) for precision in ("fp8", "bf16"))
        flips = (closed(low, None, take) != closed(exact, sample.old, take)).sum()
        self._seen.append(Seen(gates=len(take), flips=flips))

    def take_drift(self) -> Drift:
        """What was seen since the last call, on this rank. Waits for the device."""
        drift = Drift()
        for seen in self._seen:
            drift.rows += seen.rows
            drift.gates += seen.gates
            drift.total += float(seen.total)
            drift.largest = max(drift.largest, float(seen.largest))
            drift.flips += float(seen.flips)
        self._seen = []
        return drift

    def decide(self, mean: float) -> bool:
        """Set this step's precision from the mean over all ranks; True when it changed from fp8 to bf16 just now."""
        was = self.fallen
        # Not `mean > limit`: NaN must fall back too.
        self.fallen = not mean <= self.config.guard.max_abs_diff
        return self.fallen and not was
