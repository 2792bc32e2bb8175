"""Attention over packed trees against flash attention over flat sequences, as shares of the card's matrix products.

    python tools/bench/gpu/attention.py [--quick] [--check]

A binary tree of segments, its leaves of equal length, in bf16; forward and backward of one layer's attention.

    tree           the pack as the actor has it: each token once, FlexAttention (on a CPU: runs through torch's kernel)
    flat           the same trajectories one by one, shared tokens repeated: torch's flash attention, causal
    flat, alike    flash attention over as many tokens as the pack has, in sequences as long as its trajectories

The bound counts visible (query, key) pairs alone: 4 products forward and 10 backward, each of head_dim per pair and
head, at the measured rate of bf16 products. Shares therefore compare kernels, `time_vs_flat` compares what a step pays:
its bound is pairs_vs_flat, the pairs of the pack over those of the flat trajectories.

Last line, JSON: {"bench", "device", "check", "shares": {"<shape> <way>": share}, "wrong", "rows": [{"shape", "way",
"tokens", "pairs", "seconds", "share", "peak_bytes"}], "ratios": [{"shape", "time_vs_flat", "pairs_vs_flat",
"output_diff", "gradient_diff"}]}. Outputs along each path and gradients summed over paths must be those of flat.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tools.bench.gpu import card
from treepo_mega.actor import attention, attention_cpu, attention_flex
from treepo_mega.runtime.device import device, has_cuda

FORWARD, BACKWARD = 4, 10
TOLERANCE = 0.03


class Shape(NamedTuple):
    """Segments of `segment` tokens, `depth` on each path, two children each; heads, groups of keys, head_dim."""

    segment: int
    depth: int
    heads: int
    groups: int
    width: int

    @property
    def name(self) -> str:
        """As it is printed."""
        return f"{self.depth}x{self.segment} H{self.heads} G{self.groups} D{self.width}"


FULL = (Shape(512, 4, 28, 4, 128), Shape(256, 5, 8, 1, 128), Shape(1024, 4, 8, 1, 128))
"""Qwen2.5-7B on one rank; Llama-3-70B's share of a TP of 8, with short and with long segments."""
QUICK = (Shape(512, 3, 8, 2, 128),)
CHECK = (Shape(8, 3, 4, 2, 16),)


@dataclass(frozen=True)
class TreePack:
    """A binary tree in depth-first order, padded as packs on this device are."""

    subtree_end: np.ndarray
    """[T] as in `tree.pack.Pack`; padding sees itself."""
    paths: np.ndarray
    """[leaves, depth * segment] indices into the pack."""
    real: int
    """Tokens without padding."""

    @classmethod
    def of(cls, shape: Shape, bucket: int) -> TreePack:
        """Of `shape`, padded to a multiple of `bucket`."""
        end: list[int] = []
        paths: list[list[int]] = []

        def grow(path: list[int], level: int) -> None:
            start = len(end)
            own = list(range(start, start + shape.segment))
            end.extend(own)
            if level == shape.depth:
                paths.append(path + own)
            else:
                grow(path + own, level + 1)
                grow(path + own, level + 1)
            end[start : start + shape.segment] = [len(end)] * shape.segment

        grow([], 1)
        real = len(end)
        end.extend(range(real + 1, -(-real // bucket) * bucket + 1))
        return cls(np.array(end), np.array(paths), real)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs without padding: every token of a key's subtree sees it."""
        return int((self.subtree_end[: self.real] - np.arange(self.real)).sum())

    def layout(self) -> attention.PackLayout:
        """For the kernel of this device."""
        if has_cuda():
            return attention.PackLayout(attention_flex.FlexLayout.build(self.subtree_end, device()))
        return attention.PackLayout(attention_cpu.CpuLayout.build(self.subtree_end, [(0, self.real)]))


def causal_pairs(length: int) -> int:
    """Visible pairs of a flat sequence."""
    return length * (length + 1) // 2


class Problem:
    """A tree's queries, keys and values, in the pack and along its paths."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.pack = TreePack.of(shape, attention_flex.SHAPE_BUCKET if has_cuda() else 1)
        self.layout = self.pack.layout()
        draw = torch.Generator().manual_seed(0)
        length = len(self.pack.subtree_end)
        heads = (shape.heads, shape.groups, shape.groups)
        made = [torch.randn(length, number, shape.width, generator=draw) for number in (*heads, shape.heads)]
        *inputs, slope = (tensor.to(device(), torch.bfloat16) for tensor in made)
        self.index = torch.from_numpy(self.pack.paths).to(device())
        times = torch.bincount(self.index.flatten(), minlength=length).clamp(min=1)[:, None, None]
        slope[self.pack.real :] = 0
        self.packed = [tensor.requires_grad_() for tensor in inputs]
        self.slope = slope
        self.flat = [self.along(tensor.detach()).requires_grad_() for tensor in inputs]
        # Each path gets its part of a shared token's gradient, so that both ways have the same sum.
        self.flat_slope = self.along(slope / times)
        count = max(1, self.pack.real // self.index.shape[1])
        self.alike = [tensor.detach()[:count].contiguous().requires_grad_() for tensor in self.flat]
        self.alike_slope = self.flat_slope[:count].contiguous()

    def along(self, tensor: Tensor) -> Tensor:
        """[T, H, D] -> [leaves, H, path, D]."""
        return tensor[self.index].transpose(1, 2).contiguous()

    def tree(self) -> Tensor:
        """[T, H, D] with gradients in `packed`."""
        out = attention.attend(*self.packed, self.layout, None)
        self._backward(out, self.packed, self.slope)
        return out.detach()

    def flat_(self) -> Tensor:
        """[leaves, H, path, D] with gradients in `flat`."""
        return self._flash(self.flat, self.flat_slope)

    def alike_(self) -> Tensor:
        """As `flat_`, over fewer sequences."""
        return self._flash(self.alike, self.alike_slope)

    def _flash(self, inputs: list[Tensor], slope: Tensor) -> Tensor:
        # Named, because torch would answer a refusal with a kernel that is no yardstick.
        kernel = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if has_cuda() else contextlib.nullcontext()
        with kernel:
            out = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
            self._backward(out, inputs, slope)
        return out.detach()

    @staticmethod
    def _backward(out: Tensor, inputs: list[Tensor], slope: Tensor) -> None:
        for tensor in inputs:
            tensor.grad = None
        out.backward(slope)

    def differences(self) -> tuple[float, float]:
        """(outputs, gradients): relative differences of the pack from the flat trajectories."""
        packed, flat = self.tree(), self.flat_()
        gradients = []
        for mine, other in zip(self.packed, self.flat, strict=True):
            summed = torch.zeros(mine.shape, device=mine.device)
            summed.index_add_(0, self.index.flatten(), other.grad.transpose(1, 2).flatten(0, 1).float())
            gradients.append(relative(mine.grad[: self.pack.real], summed[: self.pack.real]))
        return relative(self.along(packed), flat), max(gradients)


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def measure(shape: Shape, size: card.Size, rate: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(a row for each way, the ratios)."""
    problem = Problem(shape)
    leaves, length = problem.pack.paths.shape
    ways: dict[str, tuple[Callable[[], Tensor], int, int]] = {
        "tree": (problem.tree, problem.pack.real, problem.pack.pairs),
        "flat": (problem.flat_, leaves * length, leaves * causal_pairs(length)),
        "flat, alike": (problem.alike_, len(problem.alike[0]) * length, len(problem.alike[0]) * causal_pairs(length)),
    }
    rows = []
    for name, (way, tokens, pairs) in ways.items():
        row: dict[str, Any] = {"shape": shape.name, "way": name, "tokens": tokens, "pairs": pairs}
        row["peak_bytes"] = card.peak_bytes(way)
        row["seconds"] = card.seconds_of(way, size.repeats)
        operations = (FORWARD + BACKWARD) * shape.width * shape.heads * pairs
        row["share"] = operations / rate / row["seconds"]
        rows.append(row)
    output, gradient = problem.differences()
    return rows, {
        "shape": shape.name,
        "time_vs_flat": rows[0]["seconds"] / rows[1]["seconds"],
        "pairs_vs_flat": rows[0]["pairs"] / rows[1]["pairs"],
        "output_diff": output,
        "gradient_diff": gradient,
    }


def main(given: list[str] | None = None) -> int:
    """Measure and print; the exit status."""
    size = card.arguments(__doc__, given)
    rate = card.product_rate(torch.bfloat16, size)
    found = [measure(shape, size, rate) for shape in size.choose(FULL, QUICK, CHECK)]
    rows = list(itertools.chain.from_iterable(part for part, _ in found))
    ratios = [ratio for _, ratio in found]
    print(f"{card.card_name()}: bf16 products at {rate / 1e12:.3g} TFLOP/s")
    columns = {"shape": "s", "way": "s", "tokens": ",d", "pairs": ",d", "seconds": ".5f", "share": ".3f"}
    print(card.table(rows, columns | {"peak_bytes": ",d"}))
    print(card.table(ratios, {"shape": "s", "time_vs_flat": ".3f", "pairs_vs_flat": ".3f", "gradient_diff": ".1e"}))
    wrong = [
        f"{ratio['shape']}: the pack's {what} differ from the trajectories' by {ratio[key]:.2g}, over {TOLERANCE}"
        for ratio in ratios
        for what, key in (("outputs", "output_diff"), ("gradients", "gradient_diff"))
        if not ratio[key] <= TOLERANCE
    ]
    shares = {f"{row['shape']} {row['way']}": row["share"] for row in rows}
    return card.finish("attention", size, shares, wrong, rows=rows, ratios=ratios)


if __name__ == "__main__":
    sys.exit(main())
