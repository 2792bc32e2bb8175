"""The fused loss head against other heads, as shares of the card's rate of matrix products.

    python tools/bench/gpu/head.py [--quick] [--check]

Forward and backward of the summed cross entropy of T tokens under a vocabulary V, hidden width K, in bf16; the weight's
gradient is added to an fp32 buffer, as Megatron's is.

    full       logits [T, V] in memory, torch's cross entropy
    torch      torch.nn.functional.linear_cross_entropy
    liger      Liger's fused linear cross entropy, where `liger-kernel` is installed
    cce        cut cross entropy, where `cut-cross-entropy` is installed
    ours       loss/fused.py as the policy update runs it: kernels where they can run, else tiles of torch; entropy too
    ours fp8   the same with FP8 products (the kernels' rowwise recipe)
    logprobs   ours without gradients, as old and reference logprobs are taken

The bound of a head is 3 products of T x K x V (logprobs: 1) at the measured rate of bf16 products. A head that keeps no
logits needs one product more; its share says what that costs.

Last line, JSON: {"bench", "device", "check", "shares": {"<shape> <way>": bound seconds / seconds}, "wrong", "rows": [{
"shape", "way", "seconds", "share", "peak_bytes", "loss_diff", "grad_diff"}], "absent": [ways that are not installed]}.
loss_diff and grad_diff are relative, to `full`; a difference over the dtype's tolerance is in "wrong".
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tools.bench.gpu import card
from treepo_mega.loss.backend import missing_for_kernels
from treepo_mega.loss.fused import row_loss
from treepo_mega.loss.logprobs import logprob_entropy
from treepo_mega.loss.operands import Numerics
from treepo_mega.loss.shard import Shard
from treepo_mega.loss.stats import Stats
from treepo_mega.runtime.device import device, has_cuda

TOLERANCE = {"ours fp8": 0.2}
"""Relative difference of a gradient from `full`'s; the others are bf16 against bf16."""
BF16_TOLERANCE = 0.02


class Shape(NamedTuple):
    """T tokens of width K over V columns."""

    T: int
    K: int
    V: int


FULL = (Shape(8192, 3584, 152064), Shape(8192, 8192, 16032))
"""Qwen2.5-7B on one rank; Llama-3-70B's share of a TP of 8."""
QUICK = (Shape(4096, 2048, 32000),)
CHECK = (Shape(64, 32, 96),)


class Problem:
    """One shape's operands; the weight has Megatron's buffer for its gradient."""

    def __init__(self, shape: Shape) -> None:
        draw = torch.Generator().manual_seed(0)
        self.shape = shape
        self.hidden = torch.randn(shape.T, shape.K, generator=draw).to(device(), torch.bfloat16).requires_grad_()
        spread = 2.4 / shape.K**0.5
        weight = (torch.randn(shape.V, shape.K, generator=draw) * spread).to(device(), torch.bfloat16)
        self.weight = torch.nn.Parameter(weight)
        self.target = torch.randint(0, shape.V, (shape.T,), generator=draw).to(device())
        self.weight.main_grad = torch.zeros(shape.V, shape.K, device=device())  # type: ignore[attr-defined]

    def clear(self) -> None:
        """Forget gradients."""
        self.hidden.grad = self.weight.grad = None
        self.weight.main_grad.zero_()

    def dense_backward(self, loss: Tensor) -> Tensor:
        """Backward of a head that returns the weight's gradient, which then goes to the buffer; the loss."""
        self.hidden.grad = None
        loss.backward()
        self.weight.main_grad.add_(self.weight.grad)
        self.weight.grad = None
        return loss.detach()

    def shard(self, precision: str) -> Shard:
        """The whole vocabulary as one shard, on what runs here."""
        backend = "triton" if missing_for_kernels() is None else "torch"
        return Shard.of(self.weight, 0, self.shape.V, numerics=Numerics(precision), backend=backend)


def full(problem: Problem) -> Tensor:
    """Logits in memory."""
    logits = problem.hidden @ problem.weight.t()
    return problem.dense_backward(F.cross_entropy(logits.float(), problem.target, reduction="sum"))


def torch_head(problem: Problem) -> Tensor:
    """PyTorch's chunked head."""
    loss = F.linear_cross_entropy(problem.hidden, problem.weight, problem.target, reduction="sum")
    return problem.dense_backward(loss)


def liger(problem: Problem) -> Tensor:
    """Liger's head: gradients in the forward pass, chunk by chunk."""
    module = importlib.import_module("liger_kernel.transformers")
    head = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return problem.dense_backward(head(problem.weight, problem.hidden, problem.target))


def cce(problem: Problem) -> Tensor:
    """Cut cross entropy: no logits in memory, recomputed in backward."""
    head = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return problem.dense_backward(head(problem.hidden, problem.weight, problem.target, reduction="sum"))


def ours(problem: Problem, precision: str = "bf16") -> Tensor:
    """As the policy update: the gradient is in the buffer when this returns."""

    def loss(logp: Tensor, entropy: Tensor, part: slice) -> tuple[Tensor, Stats]:
        return -logp.sum(), Stats({"entropy": entropy.sum()})

    problem.hidden.grad = None
    total, *_ = row_loss(problem.hidden, problem.weight, problem.target, problem.shard(precision), loss)
    total.backward()
    return total.detach()


def logprobs(problem: Problem) -> Tensor:
    """As old and reference logprobs."""
    with torch.no_grad():
        logp, _ = logprob_entropy(problem.hidden, problem.weight, problem.target, problem.shard("bf16"))
    return -logp.sum()


Way = Callable[[Problem], Tensor]
INSTALLED = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}
"""Ways that need a package which is not among this project's."""


def ways() -> tuple[dict[str, Way], list[str]]:
    """(name -> way, in the order of the table; names of those that cannot run here). `full` is the reference."""
    all_ways: dict[str, Way] = {"full": full, "torch": torch_head, "liger": liger, "cce": cce, "ours": ours}
    all_ways |= {"ours fp8": lambda problem: ours(problem, "fp8"), "logprobs": logprobs}
    absent = [name for name, module in INSTALLED.items() if importlib.util.find_spec(module) is None]
    if not hasattr(F, "linear_cross_entropy"):
        absent.append("torch")
    # Their kernels need a GPU also where the package is there.
    absent += [name for name in INSTALLED if not has_cuda() and name not in absent]
    return {name: way for name, way in all_ways.items() if name not in absent}, absent


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def measure(shape: Shape, size: card.Size, rate: float) -> list[dict[str, Any]]:
    """A row for each way."""
    problem = Problem(shape)
    chosen, _ = ways()
    rows: list[dict[str, Any]] = []
    wanted: tuple[Tensor, Tensor, Tensor] | None = None
    for name, way in chosen.items():
        problem.clear()
        loss = way(problem)
        row: dict[str, Any] = {"shape": f"{shape.T}x{shape.K}x{shape.V}", "way": name}
        if wanted is None:
            wanted = loss, problem.hidden.grad.clone(), problem.weight.main_grad.clone()
        row["loss_diff"] = relative(loss, wanted[0])
        if name != "logprobs":
            row["grad_diff"] = max(
                relative(problem.hidden.grad, wanted[1]), relative(problem.weight.main_grad, wanted[2])
            )
        row["peak_bytes"] = card.peak_bytes(lambda way=way: way(problem))
        row["seconds"] = card.seconds_of(lambda way=way: way(problem), size.repeats)
        products = 1 if name == "logprobs" else 3
        row["share"] = products * 2 * shape.T * shape.K * shape.V / rate / row["seconds"]
        rows.append(row)
    return rows


def disagreements(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences on rows that differ from `full` by more than their dtype explains."""
    out = []
    for row in rows:
        limit = TOLERANCE.get(row["way"], BF16_TOLERANCE)
        for what in ("loss_diff", "grad_diff"):
            # Written so that NaN is over the limit too.
            if what in row and not row[what] <= limit:
                out.append(
                    f"{row['way']} at {row['shape']} differs from full logits: {what} {row[what]:.2g}, over {limit}"
                )
    return out


def main(given: list[str] | None = None) -> int:
    """Measure and print; the exit status."""
    size = card.arguments(__doc__, given)
    rate = card.product_rate(torch.bfloat16, size)
    rows = [row for shape in size.choose(FULL, QUICK, CHECK) for row in measure(shape, size, rate)]
    print(f"{card.card_name()}: bf16 products at {rate / 1e12:.3g} TFLOP/s")
    columns = {"shape": "s", "way": "s", "seconds": ".4f", "share": ".3f", "peak_bytes": ",d"}
    print(card.table(rows, columns | {"loss_diff": ".1e", "grad_diff": ".1e"}))
    absent = ways()[1]
    if absent:
        print(f"not here: {', '.join(absent)}")
    shares = {f"{row['shape']} {row['way']}": row["share"] for row in rows}
    return card.finish("head", size, shares, disagreements(rows), rows=rows, absent=absent)


if __name__ == "__main__":
    sys.exit(main())
