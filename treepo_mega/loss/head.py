"""The loss head of one policy: from hidden states to log-probabilities and to the loss with its gradients.

    head = LossHead(model.head_weight, cfg.loss, vocab_size=32000, temperature=1.0, tile_rows=1024)
    logp, entropy = head.logprobs(rows, target)          # [N] each; differentiable, logits recomputed in backward
    total, stats = head.loss(rows, target, loss_fn)      # gradients taken while the logits are there

It owns what outlives a pass: the prepared (bf16, FP8) copies of the output matrix, the guard that watches FP8, and the
choice of backend. What differs between passes is an argument. Call `weights_changed` after writing new weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from treepo_mega.config import LossConfig
from treepo_mega.loss.backend import backend_of, resolve_backend
from treepo_mega.loss.fused import RowLoss, row_loss
from treepo_mega.loss.guard import GatesOf, HeadGuard, Sample
from treepo_mega.loss.logprobs import logprob_entropy
from treepo_mega.loss.operands import Numerics, WeightCache
from treepo_mega.loss.shard import Shard
from treepo_mega.loss.stats import Stats


class LossHead:
    """See the module docstring. `weight` gives this rank's rows [V/tp, K] of the output matrix, anew in each pass."""

    def __init__(
        self,
        weight: Callable[[], Tensor],
        config: LossConfig,
        *,
        vocab_size: int,
        temperature: float,
        tile_rows: int,
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
        guard: HeadGuard | None = None,
        use_main_grad: bool = True,
    ) -> None:
        """`rank` is this rank's place in the tensor-parallel `group`; `vocab_size` is the true one, padding left out.

        `use_main_grad` False returns the weight's gradient as usual. Raises ConfigError when the backend that `config`
        asks for cannot run here.
        """
        # A function, not a tensor: only the last pipeline stage has the matrix, and only it is asked.
        self.weight = weight
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.tile_rows = tile_rows
        self.rank = rank
        self.group = group
        self.use_main_grad = use_main_grad
        self.guard = guard or HeadGuard(config)
        self.backend = resolve_backend(config)
        self.cache = WeightCache()

    def weights_changed(self) -> None:
        """Forget the prepared copies of the weight."""
        self.cache.clear()

    def shard(self, numerics: Numerics, temperature: float | None = None) -> Shard:
        """This rank's part of the vocabulary for one pass; `temperature` None: the head's own."""
        weight = self.weight()
        return Shard.of(
            weight,
            self.rank * weight.shape[0],
            self.vocab_size,
            temperature=self.temperature if temperature is None else temperature,
            chunk=self.tile_rows,
            group=self.group,
            numerics=numerics,
            cache=self.cache,
            backend=backend_of(self.backend, numerics.precision),
            use_main_grad=self.use_main_grad,
        )

    def logprobs(
        self, rows: Tensor, target: Tensor, *, numerics: Numerics | None = None, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """(log-probability [N] of `target` [N], entropy [N]) in nats, of hidden states `rows` [N, K].

        `numerics` None: what the configuration and the guard say for logprobs. Collectives: `logprob_entropy`.
        """
        shard = self.shard(numerics or self.guard.numerics(for_update=False), temperature)
        return logprob_entropy(rows, self.weight(), target, shard)

    def loss(
        self, rows: Tensor, target: Tensor, loss_fn: RowLoss, *, whole: bool = False, numerics: Numerics | None = None
    ) -> tuple[Tensor, Stats]:
        """(loss [] with gradients, statistics) of hidden states `rows` [N, K] and `target` [N].

        `loss_fn` sees a tile of rows at a time, or with `whole` all of them at once, which costs one more product.
        `numerics` None: the update's. Collectives: `row_loss` or `logprob_entropy`.
        """
        shard = self.shard(numerics or self.guard.numerics(for_update=True))
        if whole:
            logp, entropy = logprob_entropy(rows, self.weight(), target, shard)
            return loss_fn(logp, entropy, slice(0, rows.shape[0]))
        total, stats, _, _ = row_loss(rows, self.weight(), target, shard, loss_fn)
        return total, stats

    def watch(
        self, rows: Tensor, target: Tensor, *, numerics: Numerics | None = None, temperature: float | None = None
    ) -> Sample | None:
        """The guard's sample of these rows, to be kept with them. Arguments and collectives as of `logprobs`."""
        shard = self.shard(numerics or self.guard.numerics(for_update=False), temperature)
        return self.guard.watch(rows, self.weight(), target, shard)

    def count_flips(self, sample: Sample | None, rows: Tensor, target: Tensor, closed: GatesOf) -> None:
        """Clip gates that FP8 flips on the sampled rows. Collective over the group."""
        shard = self.shard(self.guard.numerics(for_update=True))
        self.guard.count_flips(sample, rows, self.weight(), target, shard, closed)
