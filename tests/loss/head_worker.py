"""One rank of test_head.py: a shard of the vocabulary each, compared with the dense head. Run under torchrun, 4 ranks.

Groups of 1, 2 and 4 ranks, shards of equal and of different size, with padding, with nothing but padding; targets on
the first and last column of every rank's real rows.
"""

from datetime import timedelta
from itertools import accumulate

import torch
import torch.distributed as dist

from tests.loss.test_head import dense, inputs
from treepo_mega.loss.fused import row_loss
from treepo_mega.loss.logprobs import logprob_entropy
from treepo_mega.loss.shard import Shard
from treepo_mega.loss.stats import Stats

CASES = {
    1: [(11, [13])],
    2: [(16, [8, 8]), (11, [8, 8]), (9, [8, 8]), (8, [8, 8]), (3, [8, 8]), (13, [5, 8])],
    4: [(15, [4, 4, 4, 4]), (14, [1, 6, 2, 5]), (5, [4, 4, 4, 4])],
}
"""Group size -> (true vocabulary, rows of each shard)."""


def compare(vocab: int, sizes: list[int], chunk: int, group: dist.ProcessGroup) -> None:
    """Both ways of this rank's shard against the dense head."""
    hidden, weight, target = inputs(rows=11, vocab=vocab, padded=sum(sizes))
    starts = [0, *accumulate(sizes)][: len(sizes)]
    ends = [c for a, n in zip(starts, sizes, strict=True) for c in (a, a + n - 1) if c < vocab]
    target[: len(ends)] = torch.tensor(ends)
    first, size = (x[dist.get_rank(group)] for x in (starts, sizes))
    shard = weight[first : first + size].detach().requires_grad_()
    mix = torch.linspace(-1, 1, len(target), dtype=torch.float64)
    want = dense(hidden, weight, target, vocab, 0.8)
    e_hidden, e_weight = torch.autograd.grad((mix * want[0] + mix.flip(0) * want[1]).sum(), (hidden, weight))

    def loss(logp, entropy, part):
        return (mix[part] * logp + mix.flip(0)[part] * entropy).sum(), Stats()

    spec = Shard.of(shard, first, vocab, temperature=0.8, chunk=chunk, group=group)
    one = logprob_entropy(hidden, shard, target, spec)
    total, _, *two = row_loss(hidden, shard, target, spec, loss)
    for got, value in ((one, loss(*one, slice(None))[0]), (two, total)):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        d_hidden, d_shard = torch.autograd.grad(value, (hidden, shard))
        dist.all_reduce(d_hidden, group=group)  # the caller's part: each rank's hidden gradient is only its shard's
        torch.testing.assert_close(d_hidden, e_hidden, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(d_shard, e_weight[first : first + size], rtol=1e-10, atol=1e-12)


def nothing(group: dist.ProcessGroup) -> None:
    """A micro-batch without rows: as many collectives as any other, of nothing, and a gradient of zeros."""
    hidden, weight, target = inputs(rows=11, vocab=8, padded=8)
    shard = Shard.of(weight, 8 * dist.get_rank(group), 8 * dist.get_world_size(group), group=group)
    logp, entropy = logprob_entropy(hidden[:0], weight, target[:0], shard)
    total, *_ = row_loss(hidden[:0], weight, target[:0], shard, lambda logp, entropy, part: (logp.sum(), Stats()))
    (logp.sum() + entropy.sum() + total).backward()
    assert logp.shape == entropy.shape == (0,) and (weight.grad == 0).all()


def main() -> None:
    """Every case of every group size."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    for size, cases in CASES.items():
        groups = [dist.new_group(list(range(i, i + size))) for i in range(0, 4, size)]
        for vocab, sizes in cases:
            for chunk in (3, 100):
                compare(vocab, sizes, chunk, groups[rank // size])
        nothing(groups[rank // size])
    print("head worker passed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
