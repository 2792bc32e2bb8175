"""What the actor is compared with: transformers on the same tiny checkpoint, one trajectory at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.actor.experts import KINDS, as_in_files
from tests.checkpoints import save_random
from treepo_mega.config import Config, load_config
from treepo_mega.loss.policy import policy_loss
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.tree.pack import Trajectory

VOCAB = 83
PROMPT_LEN = 8


_ORIGINAL = "original_max_position_embeddings"
ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, _ORIGINAL: 32},
    "longrope": {
        "rope_type": "longrope", _ORIGINAL: 8, "short_factor": [1 + i / 8 for i in range(8)],
        "long_factor": [1 + i for i in range(8)],
    },
    "longrope-short": {
        "rope_type": "longrope", _ORIGINAL: 128, "short_factor": [1 + i / 8 for i in range(8)],
        "long_factor": [1 + i for i in range(8)],
    },
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, _ORIGINAL: 32},
}  # fmt: skip
"""Rotary parameters for heads of 16: the trajectories below lie within and beyond the original length of yarn and
llama3, beyond that of longrope, and within that of longrope-short."""


def write_checkpoint(directory: Path, kind: str, tied: bool) -> Path:
    """A random checkpoint; biases and norms are not trivial, logits are of order 1.

    `kind` is llama, qwen2, qwen3 or one of KINDS, with "+" and a name of ROTATIONS behind it for another rotation than
    the default.
    """
    torch.manual_seed(0)
    kind, _, rotation = kind.partition("+")
    more: dict[str, Any] = {"rope_parameters": {"rope_theta": 10000.0, **ROTATIONS[rotation]}} if rotation else {}
    more |= KINDS.get(kind, {})
    config = AutoConfig.for_model(
        kind, vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
        head_dim=16 if kind in ("qwen2", "qwen2_moe") or rotation else 32,
        max_position_embeddings=256, initializer_range=0.1, **more,
    )  # fmt: skip
    return save_random(config, directory, 0.1)


def configuration(hf_dir: Path, *overrides: str) -> Config:
    """The configuration of these tests, with the sizes of `oracle_step` in mind."""
    return load_config(
        None,
        [
            f"model.hf_checkpoint={hf_dir}",
            "data.train=[{path: unused.jsonl}]",
            "data.max_prompt_len=64",
            "rollout.max_response_len=64",
            "rollout.segment.length=16",
            "rollout.temperature=0.8",
            "model.make_vocab_size_divisible_by=8",
            "algo.entropy_coef=0.01",
            "algo.kl_loss_coef=0.1",
            "train.lr=1e-3",
            "train.weight_decay=0.1",
            "train.adam_eps=1e-3",  # a smooth first step: g / (|g| + eps) would turn rounding into signs
            "train.clip_grad=0.5",
            "loss.tile_rows=50",
            *overrides,
        ],
    )


def trajectories(count: int = 12, seed: int = 3) -> list[Trajectory]:
    """Random trajectories of different lengths, two a prompt."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        size = int(torch.randint(12, 60, (1,), generator=g))
        tokens = torch.randint(0, VOCAB, (size,), generator=g).tolist()
        advantage = float(torch.randn(1, generator=g))
        out.append(Trajectory(i // 2, tokens, PROMPT_LEN, advantage, [0.0] * (size - PROMPT_LEN)))
    return out


def logprobs(model: torch.nn.Module, t: Trajectory, temperature: float) -> tuple[Tensor, Tensor]:
    """(logprobs, entropies) of the response tokens [response_len] by transformers."""
    ids = torch.tensor([t.tokens])
    dist = (model(ids).logits[0, t.prompt_len - 1 : -1] / temperature).log_softmax(-1)
    return dist.gather(1, ids[0, t.prompt_len :, None])[:, 0], -(dist.exp() * dist).sum(-1)


@torch.no_grad()
def perplexity(model: torch.nn.Module, batch: list[Trajectory]) -> float:
    """Of the responses, by transformers' own loss."""
    nll, tokens = 0.0, 0
    for t in batch:
        ids = torch.tensor([t.tokens])
        labels = ids.clone()
        labels[:, : t.prompt_len] = -100
        nll += float(model(ids, labels=labels).loss) * t.response_len
        tokens += t.response_len
    return math.exp(nll / tokens)


@dataclass(frozen=True)
class Oracle:
    """One optimizer step of the whole batch in transformers and torch. `torch.save` takes its `measure`."""

    loss: float
    logprobs: dict[tuple[int, ...], Tensor]
    """Of the response, by the tokens of the trajectory."""
    grads: dict[str, Tensor]
    """Before clipping."""
    grad_norm: float
    weights: dict[str, Tensor]
    """After the step."""
    second_loss: float
    """Of the same batch at these weights, with the old logprobs from before the step: a second epoch begins with it."""
    second_ratio_diff: float
    """Largest |ratio - 1| there."""
    perplexity: float
    first_perplexity: float
    """Of the first trajectory alone."""

    @staticmethod
    def measure(hf_dir: Path, cfg: Config, batch: list[Trajectory]) -> dict[str, Any]:
        """The fields."""
        model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
        spec = ModelSpec.from_hf(hf_dir)
        texts = {"perplexity": perplexity(model, batch), "first_perplexity": perplexity(model, batch[:1])}
        known = {tuple(x.tokens): logprobs(model, x, cfg.rollout.temperature)[0].detach() for x in batch}
        loss, _ = _loss(model, cfg, batch, known)
        loss.backward()
        grads = as_in_files({n: p.grad.clone() for n, p in model.named_parameters()}, spec)
        norm = float(torch.sqrt(sum((g**2).sum() for g in grads.values())))
        step = {"loss": float(loss.detach()), "logprobs": known, "grads": grads, "grad_norm": norm}
        step["weights"] = as_in_files(_step(model, cfg), spec)
        with torch.no_grad():
            second, ratio_diff = _loss(model, cfg, batch, known)
        return {**step, "second_loss": float(second), "second_ratio_diff": ratio_diff, **texts}


def _loss(
    model: torch.nn.Module, cfg: Config, batch: list[Trajectory], known: dict[tuple[int, ...], Tensor]
) -> tuple[Tensor, float]:
    """(mean loss over tokens [], largest |ratio - 1|); `known` are old, engine and reference logprobs alike."""
    loss, pairs, furthest = torch.zeros(()), 0, 0.0
    for x in batch:
        logp, entropy = logprobs(model, x, cfg.rollout.temperature)
        same = known[tuple(x.tokens)]
        a = torch.full_like(logp, x.advantage)
        total, _ = policy_loss(
            logp, entropy, old_logprobs=same, rollout_logprobs=same, ref_logprobs=same, A_pos=a.clamp(min=0),
            A_neg=a.clamp(max=0), n=torch.ones_like(logp), algo=cfg.algo,
        )  # fmt: skip
        loss, pairs = loss + total, pairs + len(logp)
        furthest = max(furthest, float(((logp.detach() - same).exp() - 1).abs().max()))
    return loss / pairs, furthest


def _step(model: torch.nn.Module, cfg: Config) -> dict[str, Tensor]:
    """torch's AdamW after clipping; norms and biases do not decay."""
    c = cfg.train
    named = list(model.named_parameters())
    torch.nn.utils.clip_grad_norm_([p for _, p in named], c.clip_grad)
    groups = [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": c.weight_decay},
        {"params": [p for _, p in named if p.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=c.lr, betas=(c.adam_beta1, c.adam_beta2), eps=c.adam_eps).step()
    return {n: p.detach() for n, p in named}
