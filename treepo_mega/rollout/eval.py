"""Evaluation: n samples a prompt with the training engines, graded by the training graders.

    evaluator = Evaluator(generator, pool, cfg)
    metrics = evaluator.evaluate(prompts, temperature=1.0, n=4, step=step)     # all prompts, on every rank

What is sampled depends on the prompt alone (per-node seeds). Metrics are taken over the prompts in their order, so
they are the same whichever engine sampled what; `rollout/README.md` names the one exception. Keys, n filled in:

    avg@n           mean score over graded samples
    pass@n          share of prompts with at least one correct sample (score > 0.5)
    maj@n           share of prompts whose most frequent answer is correct (see `_answer`; the earliest wins a tie)
    response_len    mean tokens of a response
    truncated       share of responses that ended by length or depth
    generated_tokens, forwarded_tokens    tokens sampled, and tokens that went through the model: sums
    prompts, samples, graded, lost    counts; a lost sample (its grader crashed or timed out) has no score: it is
                    left out of avg@n and counts as not correct in pass@n and maj@n
    stolen, idle_share_max    prompts that engines took from others' lists; the largest share of the sampling time
                    that an engine waited for the others at the end
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from treepo_mega.config import Config, ConfigError, RolloutConfig
from treepo_mega.data.rewards import RewardPool
from treepo_mega.data.rewards.lost import report_lost
from treepo_mega.errors import TreepoError
from treepo_mega.rollout.dealing import CostModel
from treepo_mega.rollout.generator import Generator
from treepo_mega.rollout.jobs import Job
from treepo_mega.rollout.round import sample_and_grade
from treepo_mega.rollout.shaping import CUT
from treepo_mega.text.boxes import last_box
from treepo_mega.tree.node import Tree

if TYPE_CHECKING:
    from treepo_mega.data.prompts import Prompt

CORRECT = 0.5
"""A score above this counts as correct: half of the range of a 0/1 verifier, and above 0 for a -1/+1 one."""


class EvaluationError(TreepoError):
    """An evaluation was asked for that has no result; the message says what to change."""


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
    """Evaluations over all engines of the job. It learns how long responses are, to deal the next one better."""

    def __init__(self, generator: Generator, pool: RewardPool, cfg: Config) -> None:
        self.generator = generator
        self.pool = pool
        self.cfg = cfg
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
        ranks. Raises EvaluationError for greedy with n > 1, and what `sample_and_grade` raises.
        """
        if temperature == 0 and n > 1:
            raise EvaluationError(f"greedy evaluation (temperature 0) has one sample a prompt, not {n}: set n to 1")
        # Independent samples are what these metrics are defined for, whatever training uses. Leaves of a tree share
        # prefixes: their avg@n is noisier and their pass@n lower. They cost less.
        how = rollout or self.cfg.rollout.model_copy(update={"mode": "sequential", "n_samples_per_prompt": n})
        sampled = sample_and_grade(
            self.generator,
            self.pool,
            [Job(prompt) for prompt in prompts],
            lambda tree, texts, results: asdict(grade(tree, texts, [result.score for result in results])),
            name=f"evaluation {step}",
            costs=[self._costs.expected(prompt) for prompt in prompts],
            step=step,
            rollout=how.model_copy(update={"partial_rollout": None}),
            temperature=temperature,
            purpose="eval",
            waits_for="evaluation",
        )
        # Not fatal here: an evaluation with a few lost samples is worth more than none.
        report_lost(self.pool.take_tally(), "evaluation", fatal=False)
        missing = [prompt.id for index, prompt in enumerate(prompts) if index not in sampled.rows]
        if missing:
            raise EvaluationError(f"no engine sampled {len(missing)} of {len(prompts)} prompts: {missing[:5]}")
        rows = [Graded(**row) for row in sampled.rows.values()]
        self._costs.learn(prompts, [row.unique_tokens for row in rows])
        dealt = {"stolen": sampled.counts["stolen"], "idle_share_max": sampled.idle_share_max}
        return metrics(rows, n) | dealt

    def accuracy(self, prompts: Sequence[Prompt], *, step: int) -> dict[str, float]:
        """The `eval/` metrics of training: sampled as the section `eval` says, and greedy if it asks for that.

        Raises ConfigError without prompts. Collective over all ranks.
        """
        if not prompts:
            raise ConfigError("eval.interval, eval.at_start and eval.at_end need data.eval: there are no prompts")
        settings = self.cfg.eval
        count = settings.n_samples_per_prompt
        sampled = self.evaluate(prompts, temperature=settings.temperature, n=count, step=step)
        metrics = {
            "eval/accuracy": sampled[f"avg@{count}"],
            "eval/pass_at_n": sampled[f"pass@{count}"],
            "eval/maj_at_n": sampled[f"maj@{count}"],
            "eval/response_len_mean": sampled["response_len"],
        }
        if settings.greedy:
            greedy = self.evaluate(prompts, temperature=0.0, n=1, step=step)
            metrics["eval/greedy_accuracy"] = greedy["avg@1"]
        return metrics


def grade(tree: Tree, texts: list[str], scores: list[float | None]) -> Graded:
    """What counts of a finished tree, whose leaves say `texts` and got `scores`."""
    return Graded(
        scores=scores,
        majority=_correct(_majority(texts, scores)),
        truncated=sum(tree.nodes[leaf].stop in CUT for leaf in tree.leaves),
        response_tokens=tree.flat_tokens(),
        unique_tokens=tree.unique_tokens(),
        generated_tokens=tree.counts.get("generated_tokens", 0),
        forwarded_tokens=tree.counts.get("forwarded_tokens", 0),
    )


def metrics(rows: Sequence[Graded], n: int) -> dict[str, float]:
    """The keys of the module docstring over `rows`, one a prompt, in the order of the prompts."""
    scores = [score for row in rows for score in row.scores]
    graded = [score for score in scores if score is not None]
    samples = max(1, len(scores))
    return {
        f"avg@{n}": sum(graded) / max(1, len(graded)),
        f"pass@{n}": sum(any(_correct(score) for score in row.scores) for row in rows) / max(1, len(rows)),
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
    # most_common keeps the order of first occurrence: the earliest answer wins a tie.
    best = Counter(answers).most_common(1)[0][0]
    return scores[answers.index(best)]


def _answer(text: str) -> str:
    """What is compared between samples: the last answer box, else the last line; whitespace is removed."""
    answer = last_box(text)
    if answer is None:
        answer = next(reversed(text.strip().splitlines()), "")
    return "".join(answer.split())
