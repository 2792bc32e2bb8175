"""The peak of activations in a pass of a pipeline stage: which tensors are alive at its fullest moments. Pure.

    peak = activation_peak(cfg, spec, layout, stage=0)
    peak.old_logprobs, peak.update           # bytes beside parameters, gradients and optimizer state

Counted are the tensors of Megatron's local layers with the fused operations of a GPU, attention that keeps no scores,
and the loss head in tiles. `treepo-mega plan --prove` runs the same passes with fake tensors and measures the peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from treepo_mega.config import Config
from treepo_mega.modelspec.spec import ModelSpec, padded_vocab
from treepo_mega.plan.layout import ITEMSIZE, Layout

TILE_BYTES = 48 * 2**20
"""Of logits in the loss head, as `loss/shard.py` has it."""
LEAST_TILE_ROWS = 128
WEIGHT_ROWS = 4096
"""Rows of the output matrix that the head widens to fp32 at a time."""
FP32 = 4
ROUTER_ITEMSIZE = {"fp32": 4, "fp64": 8, None: 0}


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes. `items`: what is alive at the update's peak, the most bytes first."""

    old_logprobs: float
    update: float
    items: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class _Experts:
    """Bytes of the tensors of a layer's experts, all 0 without any. Each expert is taken equally often."""

    sent: float
    """[n, K], n = s/tp * k: a rank's tokens under sequence parallelism, once for each expert that they take."""
    gathered: float
    """[n * etp, K]: what comes to a rank's experts, with the tokens of the ranks that share their matrices."""
    inner: float
    """[n, F]: the inside of all experts of a rank."""
    choice: float
    """fp32 [s/tp, E]."""
    local: int
    """Experts that a rank holds."""
    summed: float
    """`gathered` in the dtype of the router, in which parts of results are summed; 0 where experts are whole."""
    cast: bool
    """Whether that is another dtype than that of activations."""

    @classmethod
    def of(cls, cfg: Config, spec: ModelSpec, layout: Layout, own: int) -> _Experts:
        itemsize = ITEMSIZE[cfg.model.params_dtype]
        summing = ROUTER_ITEMSIZE[cfg.model.moe_router_dtype] or itemsize
        rows = own * spec.experts_per_token * itemsize
        split = layout.expert_tp if layout.expert_tp > 1 else 0
        return cls(
            float(rows * spec.hidden_size),
            float(rows * spec.hidden_size * layout.expert_tp),
            float(rows * spec.expert_intermediate_size),
            float(own * spec.num_experts * FP32),
            spec.num_experts // layout.ep,
            float(own * spec.experts_per_token * spec.hidden_size * summing * split),
            summing != itemsize,
        )

    @property
    def kept(self) -> float:
        """For the backward pass: tokens in the order of experts, both halves and their product, the router's choice."""
        return self.gathered + 3 * self.inner + 3 * self.choice

    @property
    def passing(self) -> float:
        """At the fullest moment of a forward pass, beside what is kept.

        Tokens before and after they were sent are held until the layer ends. The results of experts lie there one by
        one and joined, or joined and in the order of ranks: then also cast, as the collective packs them, and summed.
        """
        results = (2 if self.local > 1 else 1) * self.gathered
        if not self.summed:
            return 2 * self.sent + results
        return 2 * self.sent + results + (2 if self.cast else 1) * self.summed + self.summed * self.sent / self.gathered

    @property
    def of_one(self) -> float:
        """The inside of one expert as its forward or backward pass needs it: halves and product, or their gradients."""
        return 4 * self.inner / max(1, self.local)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of the tensors that a pass is made of. `shared`: those that sequence parallelism splits over TP."""

    whole: float
    """[s, K], of all tokens of a context-parallel rank."""
    shared: float
    """[s/tp, K] under sequence parallelism, else [s, K]."""
    ffn: float
    """[s, F/tp] of a dense MLP or of the shared expert."""
    experts: _Experts
    query: float
    """[s, H/tp * D]."""
    key: float
    """[s, G/tp * D]."""
    all_keys: float
    """[T, G/tp * D], of all tokens of the pack."""
    log_sum: float
    angles: float
    """fp32 [s, D], by which queries and keys are rotated."""
    ffn_weight: float
    """A gradient [K, F/tp] of the second matrix of an MLP, in the dtype of parameters."""
    head_weight: float
    """Elements [V/tp, K] of the output matrix."""
    itemsize: int
    gathers: bool

    @classmethod
    def of(cls, cfg: Config, spec: ModelSpec, layout: Layout) -> _Sizes:
        itemsize = ITEMSIZE[cfg.model.params_dtype]
        own = padded_tokens(cfg, layout) // layout.cp
        split = layout.tp if cfg.parallel.sequence_parallel else 1
        key = own * spec.num_key_value_heads * spec.head_dim * itemsize / layout.tp
        width = spec.shared_expert_intermediate_size if spec.num_experts else spec.intermediate_size
        return cls(
            whole=own * spec.hidden_size * itemsize,
            shared=own * spec.hidden_size * itemsize / split,
            ffn=own * width * itemsize / layout.tp,
            experts=_Experts.of(cfg, spec, layout, own // split),
            query=own * spec.num_attention_heads * spec.head_dim * itemsize / layout.tp,
            key=key,
            all_keys=key * layout.cp,
            angles=own * spec.head_dim * FP32,
            log_sum=own * spec.num_attention_heads * FP32 / layout.tp,
            ffn_weight=spec.hidden_size * (spec.expert_intermediate_size or width) * itemsize / layout.tp,
            head_weight=padded_vocab(spec, cfg.model.make_vocab_size_divisible_by, layout.tp)
            * spec.hidden_size
            / layout.tp,
            itemsize=itemsize,
            gathers=split > 1,
        )

    @property
    def layer(self) -> float:
        """What a layer's forward pass keeps for its backward pass, its input left out."""
        # Norms' results and the residual between attention and MLP; queries, keys and values before and after they
        # are rotated; attention's output; the MLP's two halves and their product.
        norms = 3 * self.shared
        rotated = self.query + self.key
        gathered = 2 * self.all_keys if self.all_keys > self.key else 0.0
        attention = 2 * self.query + 2 * self.key + rotated + self.log_sum + gathered
        # Cosines and sines, for queries and for keys, in the dtype of activations.
        rotary = 4 * self.angles * self.itemsize / FP32
        return norms + attention + rotary + 3 * self.ffn + self.experts.kept

    @property
    def buffer(self) -> float:
        """Megatron's buffer for activations gathered over TP: it stays."""
        return self.whole if self.gathers else 0.0


def padded_tokens(cfg: Config, layout: Layout) -> int:
    """Tokens of a full pack with its padding."""
    share = layout.cp * (layout.tp if cfg.parallel.sequence_parallel else 1)
    return math.ceil(cfg.train.max_tokens_per_gpu / share) * share


def in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Forward passes of a chunk whose backward pass is still to come, at most."""
    if layout.vpp == 1:
        return min(layout.pp - stage, micro_batches)
    # The interleaved schedule: its warm-up, and one more.
    return min(2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1, micro_batches * layout.vpp)


def activation_peak(cfg: Config, spec: ModelSpec, layout: Layout, stage: int, micro_batches: int = 10**6) -> Peak:
    """Of a stage that runs full packs, `micro_batches` of them in a step."""
    sizes = _Sizes.of(cfg, spec, layout)
    layers = spec.num_layers // (layout.pp * layout.vpp)
    flights = in_flight(layout, stage, micro_batches)
    kept, again = _kept(cfg, sizes, layers)
    # The chunk's input and its result stay as long as the pass is in flight.
    waiting = flights * (kept + sizes.angles)
    last = stage == layout.pp - 1
    lasting = [("kept for the backward passes", waiting), ("gathered activations", sizes.buffer)]
    moments = [[*lasting, *_layer_moment(sizes, again)]]
    head = 0.0
    if last:
        tile = _Tile.of(cfg, spec, layout)
        head = _head_forward(spec, sizes, tile)
        moments.append([*lasting, *_head_moment(cfg, spec, sizes, tile)])
    fullest = max(moments, key=lambda moment: sum(size for _, size in moment))
    # What a stage receives and what it sends lie beside the layer that runs.
    ends = 4 + (stage > 0) + (not last)
    experts = sizes.experts
    routed = experts.gathered + max(experts.passing, 2 * experts.sent + experts.of_one) + experts.choice
    mlp = max(4 * sizes.ffn, routed)
    forward = sizes.buffer + 1.5 * sizes.angles + max(mlp + ends * sizes.shared, head + 3 * sizes.shared)
    items = tuple(sorted(((name, size) for name, size in fullest if size), key=lambda item: -item[1]))
    return Peak(forward, sum(size for _, size in items), items)


def _kept(cfg: Config, sizes: _Sizes, layers: int) -> tuple[float, float]:
    """(bytes that a chunk in flight keeps, bytes of the layers that are computed again at a time)."""
    parallel = cfg.parallel
    everything = sizes.layer + sizes.shared
    if parallel.recompute_granularity != "full":
        return layers * everything + sizes.shared, 0.0
    count = min(layers, parallel.recompute_num_layers or 1)
    if parallel.recompute_method == "block":
        # The backward pass has freed the last layers, which were kept, when it comes to the first ones.
        again = sizes.layer if count == layers else 0.0
        return count * sizes.shared + (layers - count) * everything + sizes.shared, again
    return math.ceil(layers / count) * sizes.shared + sizes.shared, count * everything - sizes.shared


def _layer_moment(sizes: _Sizes, again: float) -> list[tuple[str, float]]:
    """The fullest of an MLP's backward pass at its second matrix, at the activation before it, and of experts whose
    layer is computed again."""
    gathered = sizes.whole if sizes.gathers else 0.0
    experts = sizes.experts
    routed = 3 * experts.gathered
    matrix = [("gradients of activations", max(gathered + sizes.ffn, routed) + 2.5 * sizes.shared)]
    matrix.append(("gradient of a weight", sizes.ffn_weight))
    # The result's gradient, both halves' gradients, and as much again before they are joined.
    inside = max(4 * sizes.ffn, experts.of_one + experts.gathered)
    activation = [("gradients of activations", inside + 2.5 * sizes.shared)]
    dispatched = [("tokens on their way to experts and back", experts.passing + 2.5 * sizes.shared)]
    fuller = max((matrix, activation, dispatched), key=lambda moment: sum(size for _, size in moment))
    return [("layers computed again", again), *fuller]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Bytes of what the loss head makes of some rows at a time. `several`: whether a pack has more rows than that."""

    logits: float
    scratch: float
    hidden: float
    """[n, K] in fp32."""
    several: bool

    @classmethod
    def of(cls, cfg: Config, spec: ModelSpec, layout: Layout) -> _Tile:
        columns = math.ceil(spec.vocab_size / layout.tp)
        rows = min(cfg.loss.tile_rows, max(TILE_BYTES // (FP32 * columns), LEAST_TILE_ROWS))
        own = padded_tokens(cfg, layout) // layout.cp
        several = own > rows
        rows = min(rows, own)
        return cls(
            float(rows * columns * FP32),
            float(rows * min(WEIGHT_ROWS, columns) * FP32),
            float(rows * spec.hidden_size * FP32),
            several,
        )


def _widened(spec: ModelSpec, sizes: _Sizes) -> float:
    """fp32 rows of the output matrix: the slice before is only let go when the next one is there."""
    slices = 2 * WEIGHT_ROWS * spec.hidden_size * FP32 if sizes.itemsize < FP32 else 0.0
    return min(slices, sizes.head_weight * FP32)


def _head_forward(spec: ModelSpec, sizes: _Sizes, tile: _Tile) -> float:
    """Tensors of the head's forward pass: the selected hidden states, a tile of logits, rows of the matrix."""
    widened = _widened(spec, sizes)
    # The scratch of a tile's sums is there when the next tile's logits are made.
    beside = widened + tile.scratch if tile.several else max(widened, tile.scratch)
    return sizes.whole + tile.logits + tile.hidden + beside


def _head_moment(cfg: Config, spec: ModelSpec, sizes: _Sizes, tile: _Tile) -> list[tuple[str, float]]:
    """The fuller of the head's forward pass with its gradients, and of its backward pass."""
    # With overlapped reduction the weight's gradient is a tensor of its own, which is scaled and rounded.
    own = cfg.parallel.overlap_grad_reduce
    made = FP32 * sizes.head_weight if own else 0.0
    scaled = (FP32 + (sizes.itemsize if sizes.itemsize < FP32 else 0)) * sizes.head_weight if own else 0.0
    # Rows of the matrix once more, for the gradients, beside the scratch of the sums.
    working = 2 * sizes.whole + tile.logits + 2 * tile.hidden + _widened(spec, sizes) + tile.scratch
    if working >= 2 * sizes.whole + scaled:
        return [("loss head", working), ("gradient of the output matrix", made)]
    return [("loss head", 2 * sizes.whole), ("gradient of the output matrix", made + scaled)]
