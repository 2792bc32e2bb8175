"""Which numerics the head runs in, and whether FP8 may go on.

FP8 moves logprobs by a few hundredths of a nat, and against a clip range of 0.2 that matters; how far depends on the
model's activations, which nobody knows beforehand. So every step asks: in the old-logprob pass a sample of each
micro-batch's rows is computed in fp8 and in bf16. When the mean difference over all ranks is beyond
`loss.head.guard.max_abs_diff` the step runs in bf16 (its old logprobs are computed again, so that ratios compare like
with like) and is counted; the following steps go on in bf16 and still ask, until the sample is within the limit again.

The sample is cheap: 256 rows are computed twice beside the thousands of a micro-batch, with the same quantised weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from treepo_mega.config_sections import HeadConfig
from treepo_mega.loss.head import Shard, logprob_entropy
from treepo_mega.loss.operands import Numerics, Precision


def numerics_of(head: HeadConfig, precision: Precision | None) -> Numerics:
    """The head's numerics in `precision` (loss.head.precision or loss.head.logprob_precision)."""
    return Numerics(
        precision=precision or "fp32",
        recipe=head.fp8_recipe,
        exact_target=head.exact_target,
        power_of_2_scales=head.power_of_2_scales,
        grads="fp8" if head.fp8_grads else "bf16",
        loud_channels=head.fp8_loud_channels,
    )


@dataclass(slots=True)
class Drift:
    """|logp_fp8 - logp_bf16| over sampled rows, nats."""

    total: float = 0.0
    rows: float = 0.0
    largest: float = 0.0


class HeadGuard:
    """See the module docstring. One per model that is trained; the reference follows the actor's."""

    def __init__(self, head: HeadConfig) -> None:
        self.head = head
        self.update = numerics_of(head, head.precision)
        self.logprobs = numerics_of(head, head.logprob_precision)
        self.fallen = False
        """Does this step run in bf16?"""
        self.drift = Drift()

    @property
    def watches(self) -> bool:
        """Is there an FP8 pass to watch?"""
        return self.head.guard.sample_rows > 0 and "fp8" in (self.update.precision, self.logprobs.precision)

    def numerics(self, *, for_update: bool) -> Numerics:
        """What a pass runs in now."""
        n = self.update if for_update else self.logprobs
        return replace(n, precision="bf16") if self.fallen and n.precision == "fp8" else n

    @torch.no_grad()
    def watch(self, hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard) -> None:
        """Compare a sample of the rows hidden [N, K], target [N]. Collective over the shard's group."""
        rows = hidden.shape[0]
        if not self.watches or not rows:
            return
        take = torch.linspace(0, rows - 1, min(rows, self.head.guard.sample_rows), device=hidden.device).long()
        fp8 = self.update if self.update.precision == "fp8" else self.logprobs
        ways = [replace(shard, numerics=replace(fp8, precision=p)) for p in ("fp8", "bf16")]
        low, exact = (logprob_entropy(hidden[take], weight, target[take], way)[0] for way in ways)
        diff = (low - exact).abs()
        self.drift.total += float(diff.sum())
        self.drift.rows += len(take)
        self.drift.largest = max(self.drift.largest, float(diff.max()))

    def take_drift(self) -> Drift:
        """What was seen since the last call, on this rank."""
        drift, self.drift = self.drift, Drift()
        return drift

    def decide(self, mean: float) -> bool:
        """Set this step's precision from the mean over all ranks; True when it changed from fp8 to bf16 just now."""
        was, self.fallen = self.fallen, not mean <= self.head.guard.max_abs_diff
        return self.fallen and not was
