"""No micro-batch waits for its own numbers: what the host reads of a pass, it reads after the schedule."""

from __future__ import annotations

import traceback
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.actor.test_attention_flex import packs
from treepo_mega.actor.forward import _logprobs_of, _loss_of
from treepo_mega.actor.losses import PolicyLoss, clip_gates
from treepo_mega.actor.update import _numbers
from treepo_mega.config import AlgoConfig, LossConfig
from treepo_mega.loss.guard import HeadGuard
from treepo_mega.loss.head import LossHead

WIDTH, VOCAB = 128, 300


KNOWN = {"fp32": {"owned"}, "bf16": {"owned"}, "fp8": {"owned", "split", "quantize"}}
"""Functions that may read. `owned` does so on a CPU only; the FP8 quantiser refuses NaN by name, for which it waits."""


class HostReads(TorchDispatchMode):
    """The functions in which `.item()`, `float(tensor)`, `bool(tensor)` or the like made a number of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            stack = traceback.extract_stack()[:-1]
            ours = [frame.name for frame in stack if "treepo_mega" in frame.filename or frame.filename == __file__]
            self.readers.append(ours[-1])
        return func(*args, **(kwargs or {}))


def test_reads_are_seen():
    with HostReads() as reads:
        float(torch.zeros(3).sum())
        assert not torch.zeros(())
    assert reads.readers == ["test_reads_are_seen"] * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_the_passes_of_a_micro_batch_read_nothing(precision):
    torch.manual_seed(0)
    config, algo = LossConfig(precision=precision, logprob_precision=precision), AlgoConfig()
    weight = torch.nn.Parameter(torch.randn(VOCAB, WIDTH) / 10)
    guard = HeadGuard(config)
    head = LossHead(lambda: weight, config, vocab_size=VOCAB, temperature=1.0, tile_rows=16, guard=guard)
    pack = packs(3, 32)
    rows = torch.randn(len(pack.target), WIDTH, requires_grad=True)
    target = torch.from_numpy(pack.target) % VOCAB
    with torch.no_grad(), HostReads() as reads:
        logprobs = _logprobs_of(head, None, None, True, rows, target, pack)["logprobs"]
    assert isinstance(logprobs, torch.Tensor) and logprobs.dtype == torch.float32
    assert set(reads.readers) <= KNOWN[precision]
    pack.old_logprobs = logprobs.numpy().astype(np.float64)
    with HostReads() as reads:
        total, pairs, stats = _loss_of(head, PolicyLoss(algo), partial(clip_gates, algo), rows, target, pack)
        total.backward()
    assert set(reads.readers) <= KNOWN[precision]
    assert int(pairs) == pack.pairs and pairs.dtype == torch.int
    assert _numbers([stats.sums["loss"]] * 2) == [float(total.detach())] * 2
    with HostReads() as reads:
        drift = guard.take_drift()
    assert set(reads.readers) == ({"take_drift"} if precision == "fp8" else set())
    assert (drift.rows > 0, drift.gates > 0) == (precision == "fp8",) * 2
