"""Experts: what Megatron is told of them, and the router of their layers.

A token goes to the `experts_per_token` experts whose router logits are highest, whatever else lies in its pack: no
expert has a capacity, and no token is dropped. So a tree's token meets the experts that it meets in each
of its trajectories, and packed training stays exact. Dispatch is a collective of the ranks that share experts: these
make equally many micro-batches (`tree/deal.py`), and under `allgather` of one length too.

The auxiliary losses are ours, because Megatron's are means over what happens to lie on a rank. Both are taken over the
tokens of a micro-batch, a shared one once, padding left out, and weighed so that the step's objective is

    mean policy loss over pairs + sum over layers of the mean over tokens of (coefficient * loss of the micro-batch)

With a softmax over E experts of which a token takes k, P_e the mean probability of expert e and f_e the share of
tokens that take it, the load-balancing loss is E / k * sum_e f_e P_e: 1 when loads are even (Fedus et al.,
"Switch Transformers" (2021), eq. 4). The z loss is the mean of squared log-sum-exps (Zoph et al., "ST-MoE" (2022)).

Replay of the engine's routing (`routing.py`) hooks into `PackRouter.routing` through Megatron's own `router_replay`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from treepo_mega.config import Config, ConfigError, ModelConfig
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.runtime import dist
from treepo_mega.runtime.device import has_cuda
from treepo_mega.tree.pack import Pack

# Megatron 0.16 asks for this name in every router, and only an import of Transformer Engine gives it.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


_NOTED = ("probs", "routing_map", "local_probs", "local_map", "reversed_local_input_permutation_mapping")
"""Attributes of Megatron's dispatchers that hold tensors as long as the tokens of a pack."""


def expert_fields(cfg: Config, spec: ModelSpec) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for the model's experts, or for none.

    Raises ConfigError for a token dispatcher that cannot run here.
    """
    if not spec.num_experts:
        # Megatron's default refuses packs of different lengths, even without experts.
        return {"moe_token_dispatcher_type": "alltoall"}
    require_dispatcher(cfg.model)
    shared = spec.shared_expert_intermediate_size
    return {
        "moe_token_dispatcher_type": cfg.model.moe_token_dispatcher_type,
        "num_moe_experts": spec.num_experts,
        "moe_router_topk": spec.experts_per_token,
        "moe_ffn_hidden_size": spec.expert_intermediate_size,
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_shared_expert_gate": shared > 0,
        # A softmax over all experts before the choice, or over the chosen ones, which is the former divided by its sum.
        "moe_router_pre_softmax": not spec.norm_topk_prob,
        "moe_router_dtype": cfg.model.moe_router_dtype,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        # One product for all experts of a rank: Transformer Engine's module. Megatron's own layers take one after the
        # other.
        "moe_grouped_gemm": cfg.model.transformer_impl == "transformer_engine",
        "expert_model_parallel_size": cfg.parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": cfg.parallel.expert_tensor_size,
    }


def gathers_tokens(cfg: Config) -> bool:
    """Whether ranks that share experts gather one another's tokens, equally many from each."""
    return cfg.model.moe_token_dispatcher_type == "allgather"


def require_dispatcher(model: ModelConfig) -> None:
    """Raise ConfigError with the reason when `model.moe_token_dispatcher_type` cannot run here."""
    if model.moe_token_dispatcher_type != "flex":
        return
    missing = None if has_cuda() else "torch sees no GPU here"
    if missing is None:
        try:
            importlib.import_module("deep_ep")
        # OSError: built for another torch or CUDA.
        except (ImportError, OSError) as e:
            missing = f"DeepEP (deep_ep) does not load ({type(e).__name__}: {e})"
    if missing is None and model.moe_router_dtype != "fp32":
        missing = "DeepEP weighs in fp32: set model.moe_router_dtype=fp32"
    if missing is not None:
        raise ConfigError(
            f"model.moe_token_dispatcher_type=flex cannot run: {missing}. alltoall runs everywhere, allgather too"
        )


class PackRouter(TopKRouter):
    """Megatron's router, with the auxiliary losses of the module's docstring in the place of Megatron's."""

    aux_loss_coeff: float = 0.0
    z_loss_coeff: float = 0.0
    pairs_per_token: float = 1.0
    """Of the step: Megatron divides all gradients by pairs, and these losses are means over tokens."""

    @property
    def has_losses(self) -> bool:
        """Whether any auxiliary loss is asked for."""
        return self.aux_loss_coeff > 0 or self.z_loss_coeff > 0

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [T, 1, E] -> (weights [T, E], 0 where not chosen; chosen [T, E] bool). `padding_mask` [T, 1]: padding.

        With auxiliary losses in training: one all-reduce of E + 1 numbers over the tensor and context parallel group.
        """
        probs, chosen = super().routing(logits)
        # Recomputed layers come here twice, the first time without gradients.
        if self.has_losses and self.training and torch.is_grad_enabled():
            loss = self._auxiliary(logits.view(-1, logits.shape[-1]), chosen, padding_mask)
            probs = MoEAuxLossAutoScaler.apply(probs, loss)
        return probs, chosen

    def _auxiliary(self, logits: Tensor, chosen: Tensor, padding_mask: Tensor | None) -> Tensor:
        """This rank's part [] of both losses, times the tokens of the micro-batch."""
        real = torch.ones_like(logits[:, 0]) if padding_mask is None else (~padding_mask.reshape(-1)).to(logits.dtype)
        real = real.float()[:, None]
        counts = torch.cat([(chosen * real).sum(0), real.sum(0)])
        torch.distributed.all_reduce(counts, group=self.tp_cp_group)
        taken, tokens = counts[:-1], counts[-1].clamp(min=1)
        total = logits.new_zeros((), dtype=torch.float32)
        if self.aux_loss_coeff:
            mass = (torch.softmax(logits, dim=-1, dtype=torch.float32) * real).sum(0)
            # Times the tokens: one of the two means stays a sum.
            total = total + self.aux_loss_coeff * chosen.shape[-1] / self.topk * (mass * taken / tokens).sum()
        if self.z_loss_coeff:
            total = total + self.z_loss_coeff * (torch.logsumexp(logits.float(), -1).square() * real[:, 0]).sum()
        return total * self.pairs_per_token


def routers(chunks: Sequence[nn.Module]) -> list[PackRouter]:
    """The routers of the layers of these chunks, in the order of the layers."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, PackRouter)]


def set_auxiliary(chunks: Sequence[nn.Module], model: ModelConfig) -> None:
    """Give the routers their coefficients; a pass without gradients takes no notice of them."""
    for router in routers(chunks):
        router.aux_loss_coeff = model.moe_aux_loss_coeff
        router.z_loss_coeff = model.moe_z_loss_coeff or 0.0


def forget_dispatch(chunks: Sequence[nn.Module]) -> None:
    """Let each layer with experts drop, when its forward pass ends, what its dispatcher noted of the tokens.

    Megatron keeps it until the next pass: the router's choice of all layers. It has a graph, whose first node holds the
    layer's input and its gradient, long after the backward pass: two hidden states of every layer.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                module.register_forward_hook(_forget)


def _forget(layer: MoELayer, *_: Any) -> None:
    for name in _NOTED:
        if hasattr(layer.token_dispatcher, name):
            setattr(layer.token_dispatcher, name, None)


def weigh_auxiliary(chunks: Sequence[nn.Module], packs: Sequence[Pack]) -> None:
    """Tell the routers how many pairs the step has for each of its tokens; nothing without auxiliary losses.

    With them collective over all ranks.
    """
    of_layers = [router for router in routers(chunks) if router.has_losses]
    # A stage may hold no layer with experts only where none has any: all ranks decide alike.
    if not of_layers:
        return
    sums = {"pairs": float(sum(pack.pairs for pack in packs)), "tokens": 0.0}
    # Context-parallel ranks hold the tokens of a pack together, but its rows apart.
    if ps.get_context_parallel_rank() == 0:
        sums["tokens"] = float(sum(real_tokens(pack) for pack in packs))
    total = dist.sum_over_replicas(sums, counts=ps.get_pipeline_model_parallel_rank() == 0)
    for router in of_layers:
        router.pairs_per_token = total["pairs"] / max(1.0, total["tokens"])


def real_tokens(pack: Pack) -> int:
    """Tokens of the whole pack before its padding."""
    return pack.blocks[-1][1] if pack.blocks else 0


def padding_of(pack: Pack, config: Any, *, first_stage: bool) -> Tensor:
    """True where a token of this rank is padding, [1, T / cp]; for GPTModel's `padding_mask`.

    Under sequence parallelism the first stage takes this rank's whole part and splits it itself, together with the
    embeddings; on later stages it is split here, [1, T / cp / tp].
    """
    size = len(pack.tokens)
    mine = torch.arange(size) if pack.local is None else torch.from_numpy(pack.local)
    padding = mine >= real_tokens(pack)
    if config.sequence_parallel and not first_stage:
        padding = padding.chunk(ps.get_tensor_model_parallel_world_size())[ps.get_tensor_model_parallel_rank()]
    return padding[None]
