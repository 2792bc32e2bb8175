"""No micro-batch waits: the host reads numbers after the schedule, and arrays leave it from pinned memory."""

from __future__ import annotations

import traceback
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.actor.test_attention_flex import packs
from treepo_mega.actor import losses
from treepo_mega.actor.attention import PackLayout
from treepo_mega.actor.forward import _logprobs_of, _loss_of
from treepo_mega.actor.losses import PolicyLoss, clip_gates, on_device
from treepo_mega.actor.update import _numbers
from treepo_mega.config import AlgoConfig, LossConfig
from treepo_mega.loss.guard import HeadGuard
from treepo_mega.loss.head import LossHead
from treepo_mega.runtime import staging

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


class HostCopies(TorchDispatchMode):
    """Copies from the host to the device of a pass: (does it wait?, where its bytes begin on the host)."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[bool, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and args[0].is_meta and args[1].device.type == "cpu":
            self.copies.append((not (args[2] if len(args) > 2 else False), args[1].data_ptr()))
        leaves = torch.device(kwargs.get("device") or "cpu").type == "meta"
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and leaves:
            self.copies.append((not kwargs.get("non_blocking"), args[0].data_ptr()))
        return func(*args, **kwargs)


def test_a_copy_that_waits_is_seen():
    with HostCopies() as seen:
        values = torch.arange(3)
        values.to("meta")
        torch.empty(3, dtype=torch.int64, device="meta").copy_(values)
    assert seen.copies == [(True, values.data_ptr())] * 2


def test_the_arrays_of_a_micro_batch_go_through_the_same_buffers_and_nobody_waits(monkeypatch):
    """The device is torch's meta device: it takes copies and computes nothing."""
    buffers: list[torch.Tensor] = []

    def buffer(nbytes: int) -> torch.Tensor:
        buffers.append(torch.empty(nbytes, dtype=torch.uint8))
        return buffers[-1]

    meta = torch.device("meta")
    stage = staging.Staging(meta, 1 << 16, buffer)
    monkeypatch.setattr(staging, "_staging", lambda _: stage)
    monkeypatch.setattr(losses, "device", lambda: meta)
    loss = PolicyLoss(AlgoConfig(kl_loss_coef=0.1))
    with HostCopies() as seen:
        for seed in range(8):
            pack = packs(seed, 128)
            pack.old_logprobs = pack.ref_logprobs = pack.rollout_logprobs
            PackLayout.build(pack, meta)
            for values in (pack.tokens, pack.position, pack.target, pack.predictor):
                on_device(values)
            logp = torch.zeros(len(pack.target), device=meta)
            loss(logp, logp, pack)
            clip_gates(AlgoConfig(), pack, logp, None, on_device(np.arange(len(pack.target))))
    assert len(buffers) == staging.BUFFERS
    assert len(seen.copies) >= 8 * 18
    begin = [held.data_ptr() for held in buffers]
    for waits, at in seen.copies:
        assert not waits and any(first <= at < first + (1 << 16) for first in begin)
