"""How much a phase computes and how near that is to what the device can do. Pure functions of counts.

    flops = forward_flops(spec, Work(tokens=..., pairs=..., rows=...))
    mfu(3 * flops, seconds=..., gpus=8, device="NVIDIA H100 80GB HBM3", kinds=Kinds("bf16", "bf16", "bf16"))

Counted are multiplications of matrices, two operations for each product: the layers' matrices once a token, attention
once a *visible* pair, the output matrix once a predicted row. Shared tokens are computed once and so counted once;
padding is not counted. Norms, activations, the optimizer and the second look of attention's backward pass at its
scores are left out, as Chowdhery et al., "PaLM" (2022), appendix B, leave them out. The embedding is a look-up.

MFU leaves out what is computed again in the backward pass. HFU counts it.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from treepo_mega.config import ParallelConfig
from treepo_mega.modelspec.spec import ModelSpec

UPDATE = 3.0
"""A forward pass, and a backward pass of two products for each of its products."""

TERA = 1e12

PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("GB200", {"fp8": 5000.0, "bf16": 2500.0, "fp32": 1250.0}),
    ("B200", {"fp8": 4500.0, "bf16": 2250.0, "fp32": 1125.0}),
    ("H200 NVL", {"fp8": 1670.5, "bf16": 835.5, "fp32": 417.5}),
    ("H200", {"fp8": 1979.0, "bf16": 989.5, "fp32": 494.5}),
    ("GH200", {"fp8": 1979.0, "bf16": 989.5, "fp32": 494.5}),
    ("H100 NVL", {"fp8": 1670.5, "bf16": 835.5, "fp32": 417.5}),
    ("H100 PCIe", {"fp8": 1513.0, "bf16": 756.5, "fp32": 378.0}),
    ("H100", {"fp8": 1979.0, "bf16": 989.5, "fp32": 494.5}),
    ("A100", {"bf16": 312.0, "fp32": 156.0}),
)
"""TFLOP/s of dense products by a name's words and the operands' type; the first row whose words stand in it counts.

Source: NVIDIA's data sheets of these products, whose figures with sparsity are halved. "Blackwell" has 10, 5 and 2.5
PFLOPS for a GPU of GB200 NVL72 at 1,200 W; for one of HGX B200 at 1,000 W, 9, 4.5 and 2.2, the last rounded from 2.25.
fp32 has the figure of TF32, which its products may use: a run that does not use it is further from its peak, and none
can be above it."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a phase computes, all ranks together.

    `tokens` go through the model, `pairs` of (query, key) are visible, `rows` are predicted. `unique` and `flat` are
    tokens of the phase's trajectories, prompts included: shared ones once, and trajectory by trajectory.
    """

    tokens: float = 0.0
    pairs: float = 0.0
    rows: float = 0.0
    unique: float = 0.0
    flat: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __rmul__(self, times: float) -> Work:
        """The same several times."""
        return Work(*(times * count for count in astuple(self)))


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations by where they are done: each part may have a precision of its own."""

    layers: float
    attention: float
    head: float

    def __rmul__(self, times: float) -> Flops:
        """The same several times."""
        return Flops(*(times * count for count in astuple(self)))

    @property
    def total(self) -> float:
        """Of all parts."""
        return self.layers + self.attention + self.head


@dataclass(frozen=True, slots=True)
class Kinds:
    """Type of the operands, fp32, bf16 or fp8, of each part of `Flops`."""

    layers: str
    attention: str
    head: str


def forward_flops(spec: ModelSpec, work: Work) -> Flops:
    """Of one forward pass: of experts, those that a token takes, the shared one, and the router."""
    heads = spec.num_attention_heads
    attention = spec.hidden_size * spec.head_dim * (2 * heads + 2 * spec.num_key_value_heads)
    matrices = attention + mlp_elements(spec)
    return Flops(
        layers=2.0 * spec.num_layers * matrices * work.tokens,
        # A pair's score and its share of the value: `head_dim` products each, in every head.
        attention=4.0 * spec.num_layers * heads * spec.head_dim * work.pairs,
        head=2.0 * spec.hidden_size * spec.vocab_size * work.rows,
    )


def mlp_elements(spec: ModelSpec) -> int:
    """Elements of the matrices of a layer's MLP through which a token goes."""
    if not spec.num_experts:
        return 3 * spec.hidden_size * spec.intermediate_size
    taken = 3 * spec.hidden_size * spec.expert_intermediate_size * spec.experts_per_token
    shared = (
        spec.hidden_size * (3 * spec.shared_expert_intermediate_size + 1) if spec.shared_expert_intermediate_size else 0
    )
    return spec.num_experts * spec.hidden_size + taken + shared


def recomputed_flops(forward: Flops, spec: ModelSpec, parallel: ParallelConfig) -> Flops:
    """Of what the backward pass computes a second time, as `parallel.recompute_granularity` says."""
    if parallel.recompute_granularity is None:
        return 0.0 * forward
    if parallel.recompute_granularity == "selective":
        return Flops(0.0, forward.attention, 0.0)
    share = 1.0
    if parallel.recompute_method == "block":
        chunks = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
        share = min(1.0, chunks * (parallel.recompute_num_layers or 0) / spec.num_layers)
    return Flops(share * forward.layers, share * forward.attention, 0.0)


def peak_flops(device: str, kind: str) -> float | None:
    """FLOP/s of a device by its name; None where that is not known, as of a slice of one (MIG) or of a CPU.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bf16"), peak_flops("cpu", "bf16"), peak_flops("NVIDIA A100-PCIE", "fp8")
    (989500000000000.0, None, None)
    """
    if "MIG" in device:
        return None
    table = next((table for words, table in PEAKS if words in device), {})
    return table[kind] * TERA if kind in table else None


def mfu(flops: Flops, *, seconds: float, gpus: int, device: str, kinds: Kinds) -> float | None:
    """The share of `seconds` on `gpus` devices that these operations take at the device's peak; None: not known.

    Each part has the peak of its own type, so that FP8 matrices beside bf16 attention cannot come to more than 1.
    """
    parts = list(zip(astuple(flops), astuple(kinds), strict=True))
    peaks = [peak_flops(device, kind) for count, kind in parts if count]
    if not peaks or seconds <= 0 or any(peak is None for peak in peaks):
        return None
    at_peak = sum(count / peak for (count, _), peak in zip((p for p in parts if p[0]), peaks, strict=True) if peak)
    return at_peak / (seconds * gpus)
