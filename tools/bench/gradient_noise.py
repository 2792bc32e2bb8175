"""How much of a gradient is signal? Ways to sample and to give credit, compared at one policy, without training it.

    python tools/bench/gradient_noise.py                                       # the search task's model as it ships
    python tools/bench/gradient_noise.py --model runs/countdown/hf --prompts 256 --arms flat-grpo tree-treepo
    python tools/bench/gradient_noise.py --quick

Learning curves of tiny runs differ by luck more than by method. Here every arm of tools/bench/learning.yaml samples
trees of the same prompts from the same policy by the sampler that trains, and its advantages, weights and choice of
leaves are those of the trainer. The gradient of each prompt is then computed by itself, by transformers in fp32.

With g_p the arm's gradient of prompt p and h_p that of the reference (--reference, sampled apart):

    signal      g . h over unlike prompts / |h|, what a step along the mean gradient gains
    noise       mean |g_p|^2, what it costs in variance
    samples     (signal^2 / noise) / that of the reference: prompts of the reference that one prompt here is worth
    tokens      forwarded while sampling + 3 x trained (+ the old-logprob pass of all but the first mini-batch)
    worth       samples / tokens, as a ratio to the reference: above 1 is more for the same tokens
    noise_ratio noise / that of the reference: all there is to compare where expectations and scale are the same
    cosine      of the two mean gradients, both corrected for noise

Where the reference's own signal is lost in noise, samples and worth are null: ask for more prompts.

The signal of unlike prompts is unbiased. Its standard error is by jackknife over prompts, and given for `worth`.
Prompts without signal in their rewards are dropped as in training, and their tokens are counted.

Last line, JSON: {"model", "prompts", "reference", "arms": [{"name", "samples", "tokens_ratio", "worth", "worth_error",
"noise_ratio", "cosine", "snr", "kept", "distinct", "leaves"}]}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

# Loaded as a module of another name, the repository's folder is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from treepo_mega.actor.batch import advantages, lesson_of
from treepo_mega.config import Config, load_config
from treepo_mega.data.prompts import Prompt, load_prompts
from treepo_mega.data.rewards.verifiers import load_verifier
from treepo_mega.rollout.borders import border_tokens
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.advantage import has_signal, set_rewards
from treepo_mega.tree.diversity import distinct_responses
from treepo_mega.tree.node import Tree
from treepo_mega.tree.search import TreeSearch
from treepo_mega.tree.segments import Segments
from treepo_mega.tree.stop import StopRules
from treepo_mega.tree.thin import thin
from treepo_mega.tree.wants import Segment, Want

ROOT = Path(__file__).resolve().parent.parent.parent
PLAN = ROOT / "tools" / "bench" / "learning.yaml"


class Policy:
    """A causal model that samples segments and differentiates sums of logprobs."""

    def __init__(self, hf: str) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(hf, local_files_only=True)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            hf, dtype=torch.float32, local_files_only=True
        ).eval()
        found = self.model.generation_config.eos_token_id
        self.ends = frozenset([found] if isinstance(found, int) else found)
        self.forwarded = 0
        """Tokens computed so far while sampling, of which prefixes that a tree holds already count nothing."""

    @torch.no_grad()
    def sample(self, wants: list[Want], borders: frozenset[int]) -> list[Segment]:
        """One segment for every want, in their order."""
        width = max(len(want.prefix) for want in wants)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(want.prefix)) + want.prefix for want in wants])
        mask = torch.tensor([[0] * (width - len(want.prefix)) + [1] * len(want.prefix) for want in wants])
        room = [max(want.max_tokens, want.run if not borders else 0) for want in wants]
        tokens: list[list[int]] = [[] for _ in wants]
        logprobs: list[list[float]] = [[] for _ in wants]
        reasons: list[str | None] = [None] * len(wants)
        cache = DynamicCache()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        while any(reason is None for reason in reasons):
            out = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            scores = out.logits[:, -1].log_softmax(-1)
            drawn = torch.multinomial(scores.exp(), 1)
            taken = scores.gather(1, drawn)[:, 0].tolist()
            for row, (token, logprob) in enumerate(zip(drawn[:, 0].tolist(), taken, strict=True)):
                if reasons[row] is None:
                    tokens[row].append(token)
                    logprobs[row].append(logprob)
                    long_enough = len(tokens[row]) >= wants[row].min_tokens
                    if token in self.ends:
                        reasons[row] = "stop"
                    elif token in borders and long_enough:
                        reasons[row] = "border"
                    elif len(tokens[row]) == room[row]:
                        reasons[row] = "length"
            mask = torch.cat([mask, torch.ones(len(wants), 1, dtype=mask.dtype)], 1)
            positions = positions[:, -1:] + 1
            ids = drawn
        return [
            Segment(row, scored, reason or "") for row, scored, reason in zip(tokens, logprobs, reasons, strict=True)
        ]

    def gradient(self, tree: Tree, mass_of_node: dict[int, float]) -> torch.Tensor:
        """[parameters] gradient of the sum over the tree's tokens of mass x logprob."""
        rows = []
        weights = []
        seen: set[int] = set()
        for leaf in tree.leaves:
            path = tree.ancestry(leaf)
            rows.append([token for node in path for token in tree.nodes[node].tokens])
            row_weights: list[float] = []
            for node in path:
                # A shared token has one logprob: the first path through it carries its whole mass.
                mass = 0.0 if node in seen else mass_of_node.get(node, 0.0)
                row_weights += [mass] * len(tree.nodes[node].tokens)
            seen.update(path)
            weights.append(row_weights)
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        weight = torch.tensor([row + [0.0] * (width - len(row)) for row in weights])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        logits = self.model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        total = (logits.gather(2, ids[:, 1:, None])[:, :, 0] * weight[:, 1:]).sum()
        parameters = [value for value in self.model.parameters() if value.requires_grad]
        return torch.cat([value.reshape(-1) for value in torch.autograd.grad(total, parameters)])


def grow(policy: Policy, prompts: list[Prompt], cfg: Config, seed: int) -> list[Tree]:
    """A graded tree of every prompt, by the sampler that trains."""
    rules = StopRules.from_config(cfg.rollout, sorted(policy.ends), policy.tokenizer.decode)
    end = cfg.rollout.segment.end
    borders = frozenset() if end == "length" else border_tokens(policy.tokenizer, policy.model.config.vocab_size, end)
    torch.manual_seed(seed)
    searches = [
        TreeSearch(prompt.id, prompt.tokens, cfg.rollout, seed=derive_seed(seed, prompt.id), stop=rules)
        for prompt in prompts
    ]
    waiting = [(search, want) for search in searches for want in search.wants()]
    while waiting:
        sampled = policy.sample([want for _, want in waiting], borders)
        waiting = [
            (search, new)
            for (search, want), segment in zip(waiting, sampled, strict=True)
            for new in deliver(search, want, segment)
        ]
    for search, prompt in zip(searches, prompts, strict=True):
        grade(search.tree, prompt, policy)
    return [search.tree for search in searches]


def deliver(search: TreeSearch, want: Want, segment: Segment) -> list[Want]:
    """Give a segment to its tree, one that ran on in parts; returns what is wanted now."""
    others: list[Want] = []
    begin = 0
    while True:
        end = min(begin + want.max_tokens, len(segment.tokens))
        whole = end == len(segment.tokens)
        part = segment.part(begin, end)
        search.take(want.node_id, part if whole else Segment(part.tokens, part.logprobs, "length"))
        node = want.node_id
        new = search.wants()
        others += [other for other in new if other.after != node]
        following = [other for other in new if other.after == node]
        if whole or not following:
            # After the last part a path that goes on is one to sample.
            return others + [other for other in following if whole]
        want = following[0]
        begin = end


def grade(tree: Tree, prompt: Prompt, policy: Policy) -> None:
    """Write the verifier's scores into the tree."""
    verifier = load_verifier(prompt.verifier)
    scores = []
    for leaf in tree.leaves:
        text = policy.tokenizer.decode(tree.response(leaf), skip_special_tokens=True)
        found = verifier(prompt.data_source, text, prompt.answer, prompt.extra)
        scores.append(float(found["score"] if isinstance(found, dict) else found))
    set_rewards(tree, scores)


@dataclass
class Measured:
    """What an arm's gradients are, prompt by prompt, and what they cost."""

    name: str
    gradients: torch.Tensor
    """[prompts with signal, parameters]"""
    prompts: int
    """Begun: with those without signal."""
    tokens: float
    leaves: float
    kept: float
    distinct: float


def mass_by_node(
    trees: list[Tree], values: list[np.ndarray], counts: np.ndarray | None, cfg: Config
) -> list[dict[int, float]]:
    """What pushes each token of a node at ratio 1 in the step's loss, by tree; `counts` as in `lesson_of`.

    Prompts have none.
    """
    segments = Segments.from_trees(trees, list(range(len(trees))))
    credit = lesson_of(segments, values, trees, cfg, counts).credit()
    # The loss divides by the pairs of the step: without that, arms that train fewer would have another scale.
    net = (credit.A_pos + credit.A_neg) / max(1, int(segments.flat_lengths().sum()))
    first = np.cumsum([0, *(len(tree.nodes) for tree in trees)])
    masses: list[dict[int, float]] = [{} for _ in trees]
    for segment, (group, node) in enumerate(zip(segments.group, segments.node, strict=True)):
        # Prompts are no draws of the policy. Their mass is what whitening shifts, and would be taken for signal.
        if segments.trained[segment]:
            masses[group][int(node - first[group])] = float(net[segment])
    return masses


def measure(policy: Policy, prompts: list[Prompt], name: str, cfg: Config, seed: int) -> Measured:
    """Sample the prompts by one arm, and differentiate each of those that have signal."""
    grown = grow(policy, prompts, cfg, seed)
    trees = [tree for tree in grown if has_signal(tree) or not cfg.rollout.dynamic_sampling]
    values = advantages(trees, cfg)
    numbers = list(range(len(trees)))
    counts = None
    leaves = sum(len(tree.leaves) for tree in trees)
    if cfg.algo.update_share < 1:
        start = derive_seed(seed, name) / 2**63
        fewer = thin(trees, numbers, values, None, share=cfg.algo.update_share, start=start)
        trees, values, counts = fewer.trees, fewer.values, fewer.counts
    masses = mass_by_node(trees, values, counts, cfg)
    gradients = torch.stack([policy.gradient(tree, mass) for tree, mass in zip(trees, masses, strict=True)])
    sampled = sum(tree.counts["generated_tokens"] + len(tree.prompt_tokens) for tree in grown)
    trained = sum(tree.unique_tokens() + len(tree.prompt_tokens) for tree in trees)
    steps = cfg.train.num_steps_per_rollout
    passes = 3 + (0 if cfg.algo.old_logprobs == "rollout" else (steps - 1) / steps)
    return Measured(
        name,
        gradients,
        len(prompts),
        (sampled + passes * trained) / len(trees),
        leaves / max(1, len(trees)),
        sum(len(tree.leaves) for tree in trees) / max(1, leaves),
        sum(map(distinct_responses, trees)) / max(1, sum(len(tree.leaves) for tree in trees)),
    )


def merit(arm: torch.Tensor, reference: torch.Tensor) -> float:
    """signal^2 / noise of the module docstring: the gain of the best step along the arm's gradient of one prompt."""
    across = float(arm.sum(0) @ reference.sum(0)) / (len(arm) * len(reference))
    noise = float((arm * arm).sum(1).mean())
    return max(0.0, across) ** 2 / noise


def without(arm: Measured, fold: int, folds: int) -> torch.Tensor:
    """[prompts, parameters] the gradients but for every `folds`-th prompt."""
    return arm.gradients[torch.arange(len(arm.gradients)) % folds != fold]


def signal(gradients: torch.Tensor) -> float:
    """|mean gradient|^2, without what noise adds to it."""
    total = gradients.sum(0)
    count = len(gradients)
    return float(total @ total - (gradients * gradients).sum()) / (count * (count - 1))


def judge(arm: Measured, own: Measured, reference: Measured, apart: Measured) -> dict[str, float | str | None]:
    """The row of an arm. `own`: the baseline of the ratio. `apart`: the reference's gradients of other samples.

    `samples`, `worth` and its error are None where the reference's own signal is lost in noise, in all or in a fold.
    """
    tokens = arm.tokens / own.tokens
    folds = 16
    whole = merit(own.gradients, apart.gradients)
    of_folds = [merit(without(own, fold, folds), without(apart, fold, folds)) for fold in range(folds)]
    samples = worth = error = None
    if whole > 0 and min(of_folds) > 0:
        samples = merit(arm.gradients, apart.gradients) / whole
        worth = samples / tokens
        parts = [
            merit(without(arm, fold, folds), without(apart, fold, folds)) / base / tokens
            for fold, base in enumerate(of_folds)
        ]
        error = float(np.sqrt((folds - 1) * np.var(parts)))
    cross = float(arm.gradients.mean(0) @ apart.gradients.mean(0))
    lengths = signal(arm.gradients) * signal(apart.gradients)
    noise = float((arm.gradients**2).sum(1).mean())
    return {
        "name": arm.name,
        "samples": None if samples is None else round(samples, 3),
        "tokens_ratio": round(tokens, 3),
        "worth": None if worth is None else round(worth, 3),
        "worth_error": None if error is None else round(error, 3),
        "noise_ratio": round(noise / float((own.gradients**2).sum(1).mean()), 3),
        "cosine": round(cross / lengths**0.5, 3) if lengths > 0 else None,
        "snr": round(signal(arm.gradients) / noise, 4),
        "kept": round(arm.kept, 3),
        "distinct": round(arm.distinct, 3),
        "leaves": round(arm.leaves, 2),
    }


def main() -> int:
    """Measure and print; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", default="search")
    p.add_argument("--model", help="a checkpoint; default: the one that the task's recipe trains")
    p.add_argument("--arms", nargs="+", default=["flat-grpo", "tree-treepo", "fair-rloo"])
    p.add_argument("--reference", default="flat-grpo")
    p.add_argument("--prompts", type=int, default=192)
    p.add_argument("--seed", type=int, default=101)
    p.add_argument("--quick", action="store_true")
    args = p.parse_args()
    torch.set_num_threads(1)
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    task = plan["tasks"][args.task]
    if args.quick:
        args.prompts, args.arms = 24, ["flat-grpo", "tree-treepo"]

    def config(arm: str) -> Config:
        return load_config(str(ROOT / task["config"]), [*task["overrides"], *plan["arms"][arm]])

    base = config(args.reference)
    policy = Policy(args.model or str(ROOT / base.model.hf_checkpoint))
    every = load_prompts(base.data.train, base.data, policy.tokenizer).prompts
    chosen = np.random.default_rng(args.seed).permutation(len(every))
    ours = [every[index] for index in chosen[: args.prompts]]
    # Other prompts: what both have in common by luck would count as signal.
    others = [every[index] for index in chosen[args.prompts : 2 * args.prompts]]
    apart = measure(policy, others, args.reference, base, args.seed + 1)
    own = measure(policy, ours, args.reference, base, args.seed + 2)
    rows = [judge(own, own, own, apart)]
    columns = (
        "samples",
        "tokens_ratio",
        "worth",
        "worth_error",
        "noise_ratio",
        "cosine",
        "snr",
        "kept",
        "distinct",
        "leaves",
    )
    print(f"| arm | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    print(f"| {args.reference} | {' | '.join(str(rows[0][name]) for name in columns)} |", flush=True)
    for name in args.arms:
        if name == args.reference:
            continue
        began = time.process_time()
        rows.append(judge(measure(policy, ours, name, config(name), args.seed + 3), own, own, apart))
        print(f"| {name} | {' | '.join(str(rows[-1][column]) for column in columns)} |", flush=True)
        print(f"{name}: {time.process_time() - began:.0f} CPU s", file=sys.stderr)
    print(json.dumps({"model": args.model, "prompts": args.prompts, "reference": args.reference, "arms": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
