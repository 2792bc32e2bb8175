"""Evaluation: n samples a prompt with the training engines, graded by the training graders.

    evaluator = Evaluator(generator, pool, cfg)
    metrics = evaluator.evaluate(prompts, temperature=1.0, n=4, step=step)     # all prompts, on every rank

Prompts are dealt to engines by expected cost and stolen by engines that run dry, as in training (`rollout/dealing.py`),
so that a slow engine does not hold the others. What is sampled depends on the prompt alone (per-node seeds), and the
metrics are taken over the prompts in their order: the same figures whoever sampled what. (Only `forwarded_tokens` may
differ: prompts that begin alike share a prefix cache only on the same engine.) Keys, with n filled in:

    avg@n           mean score over graded samples
    pass@n          share of prompts with at least one correct sample (score > 0.5)
    maj@n           share of prompts whose most frequent answer is correct (the last answer box, else the last
                    line, whitespace removed; the earliest sample wins a tie)
    response_len    mean tokens of a response
    truncated       share of responses that ended by length or depth
    generated_tokens, forwarded_tokens    tokens sampled, and tokens that went through the model: sums
    prompts, samples, graded, lost    counts; a lost sample (grader crashed or timed out) has no score: it is left
                    out of avg@n and counts as not correct in pass@n and maj@n
    stolen, idle_share_max    prompts that engines took from others' lists; the largest share of the sampling time
                    that an engine waited for the others at the end

Sampling is `mode: sequential` whatever training uses, unless `rollout` says otherwise: independent samples are what
these metrics are defined for. The leaves of a tree share prefixes, so their avg@n is noisier and their pass@n lower
than that of as many independent samples; they cost less (`treepo-mega eval` draws both over tokens).
temperature 0 is greedy, for which n must be 1.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from treepo_mega.config import Config, RolloutConfig
from treepo_mega.data.rewards import RewardItem, RewardPool
from treepo_mega.data.rewards.lost import report_lost
from treepo_mega.rollout.dealing import CostModel
from treepo_mega.rollout.generator import Generator, Job
from treepo_mega.rollout.round import open_round
from treepo_mega.runtime import dist
from treepo_mega.text.boxes import last_box
from treepo_mega.tree.node import Tree

if TYPE_CHECKING:
    from treepo_mega.data.prompts import Prompt

CORRECT = 0.5
"""A score above this counts as correct: half of the range of a 0/1 verifier, and above 0 for a -1/+1 one."""


@dataclass(frozen=True, slots=True)
class Graded:
    """What the metrics need of one prompt's samples, JSON-safe. Tokens are sums over its samples."""

    scores: list[float | None]
    majority: bool
    truncated: int
    response_tokens: int
    unique_tokens: int
    generated_tokens: float
    forwarded_tokens: float


class Evaluator:
    """Evaluations over all engines of the job. Remembers how long responses were, to deal the next one better."""

    def __init__(self, generator: Generator, pool: RewardPool, cfg: Config) -> None:
        self.generator, self.pool, self.cfg = generator, pool, cfg
        self._costs = CostModel()

    def evaluate(
        self,
        prompts: Sequence[Prompt],
        *,
        temperature: float,
        n: int,
        step: int,
        rollout: RolloutConfig | None = None,
    ) -> dict[str, float]:
        """Sample and grade `prompts`, the same on every rank; see the module docstring for the result, on every rank.

        `rollout`: how to sample instead of independently; its n_samples_per_prompt must be `n`. Collective over all
        ranks. Raises ValueError for greedy with n > 1, what `Generator.grow` raises, and RankLost when an engine has
        not finished rollout.timeout_s after this one.
        """
        if temperature == 0 and n > 1:
            raise ValueError(f"greedy evaluation has one sample a prompt, not {n}")
        r = rollout or self.cfg.rollout.model_copy(update={"mode": "sequential", "n_samples_per_prompt": n})
        r = r.model_copy(update={"partial_rollout": None})
        started = time.monotonic()
        queue = open_round(self.cfg, [self._costs.expected(p) for p in prompts], f"evaluation {step}")
        jobs = [Job(p) for p in prompts]
        grown = self.generator.grow(jobs, queue, step=step, rollout=r, temperature=temperature, purpose="eval")
        busy = time.monotonic() - started
        dist.barrier("evaluation", self.cfg.rollout.timeout_s)
        idle = 1 - busy / max(time.monotonic() - started, 1e-9)
        speaks = dist.rank() % self.cfg.rollout.engine.tensor_parallel_size == 0
        mine = self._grade(prompts, grown.trees) if speaks else {}
        told = dist.gather_objects([list(mine.items()), queue.stolen if speaks else 0, idle])
        graded = {i: Graded(**g) for part, _, _ in told for i, g in part}
        report_lost(self.pool.take_tally(), "evaluation", fatal=False)
        if missing := [p.id for i, p in enumerate(prompts) if i not in graded]:
            raise RuntimeError(f"evaluation: nobody sampled {len(missing)} of {len(prompts)} prompts: {missing[:5]}")
        rows = [graded[i] for i in range(len(prompts))]
        self._costs.learn(prompts, [g.unique_tokens for g in rows])
        return metrics(rows, n) | {"stolen": sum(s for _, s, _ in told), "idle_share_max": max(i for _, _, i in told)}

    def _grade(self, prompts: Sequence[Prompt], trees: dict[int, Tree]) -> dict[int, dict[str, object]]:
        """`Graded` of this engine's trees, as dicts, by the index of their prompt."""
        texts = {i: [self.generator.decode(t.response(leaf)) for leaf in t.leaves] for i, t in trees.items()}
        items = [
            RewardItem(p.verifier, p.data_source, text, p.answer, p.extra)
            for p, samples in ((prompts[i], texts[i]) for i in trees)
            for text in samples
        ]
        results = iter(self.pool.score(items)) if items else iter(())
        return {i: asdict(grade(t, texts[i], [next(results).score for _ in texts[i]])) for i, t in trees.items()}


def grade(tree: Tree, texts: list[str], scores: list[float | None]) -> Graded:
    """What counts of a finished tree, whose leaves say `texts` and got `scores`."""
    return Graded(
        scores=scores,
        majority=_correct(_majority(texts, scores)),
        truncated=sum(tree.nodes[leaf].stop in ("length", "depth") for leaf in tree.leaves),
        response_tokens=sum(len(tree.response(leaf)) for leaf in tree.leaves),
        unique_tokens=tree.unique_tokens(),
        generated_tokens=tree.counts.get("generated_tokens", 0),
        forwarded_tokens=tree.counts.get("forwarded_tokens", 0),
    )


def metrics(rows: Sequence[Graded], n: int) -> dict[str, float]:
    """The keys of the module docstring over `rows`, one a prompt, in the order of the prompts."""
    scores = [s for row in rows for s in row.scores]
    graded = [s for s in scores if s is not None]
    samples = max(1, len(scores))
    return {
        f"avg@{n}": sum(graded) / max(1, len(graded)),
        f"pass@{n}": sum(any(_correct(s) for s in row.scores) for row in rows) / max(1, len(rows)),
        f"maj@{n}": sum(row.majority for row in rows) / max(1, len(rows)),
        "response_len": sum(row.response_tokens for row in rows) / samples,
        "truncated": sum(row.truncated for row in rows) / samples,
        "prompts": len(rows),
        "samples": len(scores),
        "graded": len(graded),
        "lost": len(scores) - len(graded),
        "generated_tokens": sum(row.generated_tokens for row in rows),
        "forwarded_tokens": sum(row.forwarded_tokens for row in rows),
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
