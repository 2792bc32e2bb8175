"""One rank of test_head.py: a shard of the vocabulary each, compared with the dense head. Run under torchrun."""

from datetime import timedelta

import torch
import torch.distributed as dist

from tests.loss.test_head import dense, inputs
from treepo_mega.loss.head import logprob_entropy


def main():
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    # (vocab, padded): even shards; padding on rank 1; rank 1 with one real row; rank 1 with nothing but padding.
    for vocab, padded in ((16, 16), (11, 16), (9, 16), (8, 16), (3, 16)):
        for chunk in (2, 100):
            hidden, weight, target = inputs(vocab=vocab, padded=padded)
            half = padded // 2
            # First and last column of each rank's real rows.
            target[1], target[2] = min(half - 1, vocab - 1), min(half, vocab - 1)
            shard = weight[rank * half : (rank + 1) * half].detach().requires_grad_()
            got = logprob_entropy(
                hidden, shard, target, vocab_start=rank * half, vocab_size=vocab, temperature=0.8, chunk=chunk,
                group=dist.group.WORLD,
            )  # fmt: skip
            want = dense(hidden, weight, target, vocab, 0.8)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
            mix = torch.linspace(-1, 1, len(target), dtype=torch.float64)
            d_hidden, d_shard = torch.autograd.grad((mix * got[0] + mix.flip(0) * got[1]).sum(), (hidden, shard))
            dist.all_reduce(d_hidden)  # the caller's part: each rank's hidden gradient is only its shard's
            e_hidden, e_weight = torch.autograd.grad((mix * want[0] + mix.flip(0) * want[1]).sum(), (hidden, weight))
            torch.testing.assert_close(d_hidden, e_hidden, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(d_shard, e_weight[rank * half : (rank + 1) * half], rtol=1e-10, atol=1e-12)
    print("head worker passed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
