"""The chunked vocabulary-parallel head against dense log_softmax, on one rank and over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from treepo_mega.loss.head import logprob_entropy

WORKER = Path(__file__).with_name("head_worker.py")


def inputs(rows=7, vocab=11, padded=16, width=5, dtype=torch.float64):
    """Hidden states, weight with `padded` rows of which `vocab` are real, targets on both ends of the vocabulary."""
    g = torch.Generator().manual_seed(rows * 1000 + vocab)
    hidden = torch.randn(rows, width, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(padded, width, generator=g, dtype=dtype).requires_grad_()
    target = torch.randint(0, vocab, (rows,), generator=g)
    target[0], target[-1] = 0, vocab - 1
    return hidden, weight, target


def dense(hidden, weight, target, vocab, temperature):
    logp = ((hidden @ weight[:vocab].t()) / temperature).log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(1)


def test_gradcheck_in_fp64():
    hidden, weight, target = inputs(rows=4, vocab=5, padded=6, width=3)

    def f(h, w):
        return logprob_entropy(h, w, target, vocab_start=0, vocab_size=5, temperature=0.7, chunk=3)

    assert torch.autograd.gradcheck(f, (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("vocab, padded", [(11, 11), (11, 16), (1, 2)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_dense_log_softmax_with_gradients(chunk, vocab, padded, temperature):
    hidden, weight, target = inputs(vocab=vocab, padded=padded)
    got = logprob_entropy(hidden, weight, target, vocab_start=0, vocab_size=vocab, temperature=temperature, chunk=chunk)
    want = dense(hidden, weight, target, vocab, temperature)
    mix = torch.linspace(-1, 1, len(target), dtype=torch.float64)
    grads = [torch.autograd.grad((mix * a + mix.flip(0) * b).sum(), (hidden, weight)) for a, b in (got, want)]
    for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert (grads[0][1][vocab:] == 0).all(), "padded rows of the vocabulary get no gradient"


def test_low_precision_inputs_are_summed_in_fp32():
    hidden, weight, target = inputs(dtype=torch.float32)
    h, w = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    logp, entropy = logprob_entropy(h, w, target, vocab_start=0, vocab_size=11, chunk=2)
    assert logp.dtype == entropy.dtype == torch.float32
    want = ((h @ w[:11].t()).float()).log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logp, want, rtol=0, atol=1e-6)
    (logp + entropy).sum().backward()
    assert h.grad.dtype == w.grad.dtype == torch.bfloat16


def test_large_logits_do_not_overflow():
    hidden, weight, target = inputs(dtype=torch.float32)
    logp, entropy = logprob_entropy(hidden * 1e3, weight, target, vocab_start=0, vocab_size=11)
    (logp.sum() + entropy.sum()).backward()
    assert all(torch.isfinite(t).all() for t in (logp, entropy, hidden.grad, weight.grad))


def test_no_rows():
    hidden, weight, target = inputs()
    logp, entropy = logprob_entropy(hidden[:0], weight, target[:0], vocab_start=0, vocab_size=11)
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == entropy.shape == (0,)
    assert (weight.grad == 0).all()


def test_two_vocabulary_shards_over_gloo():
    out = run_ranks(2, WORKER)
    assert out.count("head worker passed") == 2, out
