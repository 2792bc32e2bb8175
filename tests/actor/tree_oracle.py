"""Plain autograd on flat sequences through transformers: what training on a tree must equal.

The loss is written out a trajectory at a time (flat_loss.py), without masses and multiplicities. Old, reference and
engine logprobs are the model's own plus noise that is a function of the token's whole prefix, so that every clip regime
occurs and shared tokens agree.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.actor.experts import as_in_files
from tests.actor.flat_loss import aggregate, is_kept, shares, trajectory_loss
from tests.actor.oracle import VOCAB
from treepo_mega.config import AlgoConfig, Config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.tree.node import Tree
from treepo_mega.tree.pack import Pack

SCALES = {"old": 0.6, "ref": 0.3, "rollout": 0.5}


def forest(depth: int, seed: int, trees: int = 3) -> list[Tree]:
    """Trees whose leaves lie `depth` branchings below the prompt; depth 0: single paths. Some segments are empty."""
    rng = random.Random(1000 * depth + seed)

    def grow(tree: Tree, parent: int, left: int) -> None:
        node = tree.add_child(parent)
        size = rng.choice((1, 3, 7, 9) if rng.random() < 0.9 else (0,))
        node.tokens = [rng.randrange(VOCAB) for _ in range(size)]
        node.logprobs = [0.0] * size
        if left == 0:
            tree.leaves.append(node.id)
        for _ in range(rng.choice((2, 2, 3)) if left > 0 else 0):
            grow(tree, node.id, left - 1)

    out = []
    for i in range(trees):
        tree = Tree.start(f"p{i}", [rng.randrange(VOCAB) for _ in range(rng.choice((5, 9, 60)))])
        grow(tree, 0, depth)
        tree.rewards = [rng.choice((0.0, 1.0)) for _ in tree.leaves]
        out.append(tree)
    return out


def advantages(trees: list[Tree], seed: int = 0) -> list[np.ndarray]:
    """Random advantages of both signs, per tree."""
    g = np.random.default_rng(seed)
    return [g.normal(size=len(t.leaves)) for t in trees]


def noise(prefix: tuple[int, ...], kind: str) -> float:
    """A number of order SCALES[kind], now and then far out (dual clip), the same for every copy of a token."""
    x = random.Random(f"{kind}{prefix}")
    return x.gauss(0, SCALES[kind]) - (3.5 if kind == "old" and x.random() < 0.05 else 0.0)


def flat_step(hf_dir: Path, cfg: Config, trees: list[Tree], dtype: torch.dtype) -> dict[str, Any]:
    """Loss, gradients and each token's logprob and entropy from transformers, one trajectory at a time."""
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype)
    per_token, counts, logprobs, entropies = [], [], {}, 0.0
    for tree, values in zip(trees, advantages(trees), strict=True):
        start = len(tree.prompt_tokens)
        for leaf, advantage, count in zip(tree.leaves, values.tolist(), shares(tree, cfg.algo), strict=True):
            tokens = tree.prefix(leaf)
            ids = torch.tensor([tokens])
            dist = (model(ids).logits[0, start - 1 : -1] / cfg.rollout.temperature).log_softmax(-1)
            logp, entropy = dist.gather(1, ids[0, start:, None])[:, 0], -(dist.exp() * dist).sum(-1)
            prefixes = [tuple(tokens[: i + 1]) for i in range(start, len(tokens))]
            logprobs |= dict(zip(prefixes, logp.tolist(), strict=True))
            kept = {k: logp.detach() + torch.tensor([noise(p, k) for p in prefixes], dtype=dtype) for k in SCALES}
            if not is_kept(kept["old"] - kept["rollout"], cfg.algo):
                continue
            per_token.append(trajectory_loss(logp, entropy, kept, torch.full_like(logp, advantage), cfg.algo))
            counts.append(count)
            entropies += float(entropy.detach().sum())
    loss = aggregate(per_token, counts, cfg.algo.loss_agg_mode, cfg.rollout.max_response_len)
    loss.backward()
    pairs = sum(len(x) for x in per_token)
    grads = as_in_files({n: p.grad for n, p in model.named_parameters()}, ModelSpec.from_hf(hf_dir))
    return {"loss": float(loss.detach()), "grads": grads, "logprobs": logprobs, "entropy": entropies / pairs}


def prefixes_of_rows(pack: Pack) -> list[tuple[int, ...]]:
    """Each row's whole prefix, target included, by the pack's own visibility rule."""
    out = []
    for at, target in zip(pack.predictor.tolist(), pack.target.tolist(), strict=True):
        i = at if pack.local is None else int(pack.local[at])
        seen = np.flatnonzero(pack.subtree_end[: i + 1] > i)
        out.append((*pack.tokens[seen].tolist(), target))
    return out


def fill_in(packs: list[Pack], logprobs: dict[tuple[int, ...], float]) -> None:
    """The noisy old, reference and engine logprobs of `flat_step` for every row."""
    for pack in packs:
        prefixes = prefixes_of_rows(pack)
        known = np.array([logprobs[p] for p in prefixes])
        noises = {k: np.array([noise(p, k) for p in prefixes]) for k in SCALES}
        pack.old_logprobs, pack.ref_logprobs = known + noises["old"], known + noises["ref"]
        pack.rollout_logprobs = known + noises["rollout"]


def regimes(packs: list[Pack], logprobs: dict[tuple[int, ...], float], algo: AlgoConfig) -> set[str]:
    """Which clip regimes the rows of `packs` are in, with which masses."""
    out = set()
    for pack in packs:
        ratio = np.exp(np.array([logprobs[p] for p in prefixes_of_rows(pack)]) - pack.old_logprobs)
        for r, up, down in zip(ratio.tolist(), pack.A_pos.tolist(), pack.A_neg.tolist(), strict=True):
            where = "high" if r > 1 + algo.eps_clip_high else "low" if r < 1 - algo.eps_clip else "inside"
            where = "dual" if algo.eps_clip_c and r > algo.eps_clip_c else where
            out.add(f"{where}{'+' if up > 0 else ''}{'-' if down < 0 else ''}")
    return out


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


CLIP_REGIMES = {f"{w}{m}" for w, m in itertools.product(("high", "low", "inside", "dual"), ("+", "-", "+-"))}
