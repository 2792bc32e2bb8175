"""Do the bytes that arrived differ from those that were sent? One sum per HF tensor at both ends of a reshard.

A sum runs over the bits of the elements, each weighted by its place in the HF tensor. Parts of a tensor may be summed
on any rank and added, modulo 2^64, however the tensor is cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from treepo_mega.modelspec.mcore_layout import Box, ParamLayout
from treepo_mega.reshard.plan import Copy
from treepo_mega.runtime import dist

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as an element."""


class Checksums:
    """Sums of one reshard on this rank; `gather` brings both ends together."""

    def __init__(self) -> None:
        self._sent: dict[int, Counter[str]] = {}
        self._arrived: Counter[str] = Counter()

    def add_source(self, copy: Copy, values: Tensor, targets: Sequence[int]) -> None:
        """What this rank holds of `copy`, which goes to the ranks `targets`. `values`: in the dtype on the way."""
        for target in targets:
            self._sent.setdefault(target, Counter())[copy.hf_name] += checksum(values, copy.box)

    def add_target(self, layout: ParamLayout, value: Tensor, dtype: torch.dtype) -> None:
        """What a destination parameter holds now. `dtype`: that on the way."""
        for block in layout.blocks:
            # In the dtype on the way: a wider destination holds the same values in other bits.
            part = value[block.local_index].reshape(block.shape).to(dtype)
            self._arrived[block.hf_name] += checksum(part, block.hf_slice)

    def gather(self, rank: int) -> dict[str, tuple[int, int]]:
        """HF tensor -> (as its sources hold it, as it arrived on this rank). Collective over all ranks."""
        expected: Counter[str] = Counter()
        for sent in dist.gather_objects({str(target): dict(sums) for target, sums in self._sent.items()}):
            expected.update(sent.get(str(rank), {}))
        names = sorted({*expected, *self._arrived})
        # Each part wrapped around in int64, but Python's sum of parts does not: only the remainders are equal.
        return {name: (expected[name] % 2**64, self._arrived[name] % 2**64) for name in names}


def checksum(values: Tensor, box: Box) -> int:
    """Sum over the elements of `box` of (bits as an integer) x (a weight of the place in the HF tensor)."""
    bits = values.contiguous().view(_BITS[values.element_size()])
    weights = torch.ones((), dtype=torch.int64, device=values.device)
    for (start, stop), prime in zip(box, (7919, 104729, 1299709), strict=False):
        places = torch.arange(start, stop, device=values.device)
        weights = weights.unsqueeze(-1) * 31 + (places * prime + 1) % 65521
    return int((bits.to(torch.int64) * weights).sum())


def differing_groups(checksums: Mapping[str, tuple[int, int]]) -> list[str]:
    """Layer groups (`model.layers.3`, or the tensor itself outside layers) with a tensor whose checksums differ."""
    groups = []
    for name, (sent, arrived) in checksums.items():
        if sent != arrived:
            parts = name.split(".")
            groups.append(".".join(parts[:3]) if parts[1:2] == ["layers"] else name)
    return list(dict.fromkeys(groups))
