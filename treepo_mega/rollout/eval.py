"""Evaluation: n samples a prompt with the training engine, graded by the training graders.

    here = evaluate(generator, my_prompts, pool, cfg, temperature=1.0, n=4, step=step)   # this rank's prompts
    metrics = merge([here, *others])                                                   # all ranks'

The caller deals prompts over ranks and gathers the dicts; `merge` weights them. Keys, with n filled in:

    avg@n           mean score over graded samples
    pass@n          share of prompts with at least one correct sample (score > 0.5)
    maj@n           share of prompts whose most frequent answer is correct (the last answer box, else the last
                    line, whitespace removed; the earliest sample wins a tie)
    response_len    mean tokens of a response
    truncated       share of responses that ended by length or depth
    generated_tokens, forwarded_tokens    tokens sampled, and tokens that went through the model: sums
    prompts, samples, graded, lost    counts; a lost sample (grader crashed or timed out) has no score: it is left
                    out of avg@n and counts as not correct in pass@n and maj@n

Sampling is `mode: sequential` whatever training uses, unless `rollout` says otherwise: independent samples are what
these metrics are defined for. The leaves of a tree share prefixes, so their avg@n is noisier and their pass@n lower
than that of as many independent samples; they cost less (`treepo-mega eval` draws both over tokens).
temperature 0 is greedy, for which n must be 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from treepo_mega.config import Config, RolloutConfig
from treepo_mega.data.rewards import RewardItem, RewardPool
from treepo_mega.data.rewards.verifiers import last_box
from treepo_mega.rollout.generator import Generator
from treepo_mega.tree.node import Tree

if TYPE_CHECKING:
    from treepo_mega.data.prompts import Prompt

CORRECT = 0.5
"""A score above this counts as correct: half of the range of a 0/1 verifier, and above 0 for a -1/+1 one."""

COSTS = ("generated_tokens", "forwarded_tokens")


def evaluate(
    generator: Generator,
    prompts: Sequence[Prompt],
    reward_pool: RewardPool,
    cfg: Config,
    *,
    temperature: float,
    n: int,
    step: int,
    rollout: RolloutConfig | None = None,
) -> dict[str, float]:
    """Sample and grade; see the module docstring for the result. Zero weights for no prompts.

    `rollout`: how to sample instead of independently; its n_samples_per_prompt must be `n`.

    Raises ValueError for greedy with n > 1, and what `Generator.rollout` raises.
    """
    if temperature == 0 and n > 1:
        raise ValueError(f"greedy evaluation has one sample a prompt, not {n}")
    sampling = rollout or cfg.rollout.model_copy(update={"mode": "sequential", "n_samples_per_prompt": n})
    trees = generator.rollout(prompts, step=step, rollout=sampling, temperature=temperature, purpose="eval")
    texts = [[generator.decode(tree.response(leaf)) for leaf in tree.leaves] for tree in trees]
    items = [
        RewardItem(p.verifier, p.data_source, text, p.answer, p.extra)
        for p, samples in zip(prompts, texts, strict=True)
        for text in samples
    ]
    results = iter(reward_pool.score(items)) if items else iter(())
    scores = [[next(results).score for _ in samples] for samples in texts]
    cost = {name: generator.counts.get(name, 0) for name in COSTS}
    return _metrics(trees, texts, scores, n) | cost


def merge(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """One dict of the same keys from several ranks', each mean weighted by what it is a mean over."""
    keys = list(dict.fromkeys(k for p in parts for k in p))
    out: dict[str, float] = {}
    for key in keys:
        if key in ("prompts", "samples", "graded", "lost", *COSTS):
            out[key] = sum(p[key] for p in parts)
            continue
        over = "graded" if key.startswith("avg@") else "prompts" if "@" in key else "samples"
        weight = sum(p[over] for p in parts)
        out[key] = sum(p[key] * p[over] for p in parts) / weight if weight else 0.0
    return out


def _metrics(
    trees: Sequence[Tree], texts: list[list[str]], scores: list[list[float | None]], n: int
) -> dict[str, float]:
    graded = [s for row in scores for s in row if s is not None]
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
    solved = sum(any(_correct(s) for s in row) for row in scores)
    agreed = sum(_correct(_majority(t, s)) for t, s in zip(texts, scores, strict=True))
    cut = sum(tree.nodes[leaf].stop in ("length", "depth") for tree, leaf in leaves)
    return {
        f"avg@{n}": sum(graded) / max(1, len(graded)),
        f"pass@{n}": solved / max(1, len(trees)),
        f"maj@{n}": agreed / max(1, len(trees)),
        "response_len": sum(len(tree.response(leaf)) for tree, leaf in leaves) / max(1, len(leaves)),
        "truncated": cut / max(1, len(leaves)),
        "prompts": len(trees),
        "samples": len(leaves),
        "graded": len(graded),
        "lost": len(leaves) - len(graded),
    }


def _correct(score: float | None) -> bool:
    return score is not None and score > CORRECT


def _majority(texts: list[str], scores: list[float | None]) -> float | None:
    """Score of the first sample that gives the most frequent answer."""
    answers = [_answer(text) for text in texts]
    if not answers:
        return None
    best = Counter(answers).most_common(1)[0][0]
    return scores[answers.index(best)]


def _answer(text: str) -> str:
    """What is compared between samples: the content of the last answer box, else the last line."""
    answer = last_box(text)
    if answer is None:
        answer = next(reversed(text.strip().splitlines()), "")
    return "".join(answer.split())
