"""What a plan takes for granted about samples: lengths, what trees share, and how many prompts are kept.

lengths = Lengths.assumed(cfg, rates)              # log-normal, with assumed means
lengths = read_lengths("runs/mine").put(lengths)   # as the trees of a run were (logging.trees_interval)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_mega.config import Config
from treepo_mega.errors import TreepoError
from treepo_mega.plan.hardware import Rates

TREES = "trees"
"""Folder of a run with the trees of some of its steps."""
PARTS = 128
"""Into which measured lengths are divided."""


class LengthsError(TreepoError):
    """A run does not say how long its responses were; the message names the file and what it holds."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Means in tokens. The factors correct what branching lets expect by what a run had: `sampled` and `trained`
    tokens, `steps` and `requests` of engines."""

    response: float
    prompt: float
    spread: float
    """Standard deviation of the logarithm of a response's length."""
    kept: float
    """Share of sampled prompts whose rewards differ."""
    sampled: float = 1.0
    trained: float = 1.0
    steps: float = 1.0
    requests: float = 1.0
    tail: tuple[float, ...] = ()
    """Response lengths of a run in equal parts, ascending, tokens; (): log-normal with `spread`."""
    source: str = "assumed"

    @classmethod
    def assumed(cls, cfg: Config, rates: Rates) -> Lengths:
        """By the shares of the limits that `rates` names."""
        drops = cfg.rollout.dynamic_sampling and cfg.rollout.n_samples_per_prompt > 1
        return cls(
            rates.response * cfg.rollout.max_response_len,
            max(1.0, rates.prompt * cfg.data.max_prompt_len),
            rates.spread,
            rates.kept if drops else 1.0,
        )


@dataclass(frozen=True, slots=True)
class MeasuredLengths:
    """Of `leaves` trajectories of a run. `tail`: response lengths in equal parts, ascending; means are tokens."""

    run: str
    leaves: int
    tail: tuple[float, ...]
    prompt: float
    steps: tuple[int, ...] = ()
    """Whose trees were read."""

    @property
    def response(self) -> float:
        """Mean."""
        return sum(self.tail) / len(self.tail)

    def put(self, lengths: Lengths) -> Lengths:
        """`lengths` with these in the place of its own."""
        return dataclasses.replace(
            lengths, response=self.response, prompt=self.prompt, tail=self.tail, source=f"of {self.run}"
        )

    def scaled(self, longest: int) -> MeasuredLengths:
        """The same shape with `longest` as the greatest length."""
        factor = longest / self.tail[-1]
        return dataclasses.replace(self, tail=tuple(factor * length for length in self.tail))


def read_lengths(run: str | Path) -> MeasuredLengths:
    """Of the trees that a run kept; those of its first step are left out where there are others.

    Raises LengthsError for a run without trees, and for a file that does not hold trees.
    """
    files = sorted((Path(run) / TREES).glob("step_*.jsonl"))
    if not files:
        raise LengthsError(
            f"--lengths {run}: there is no {TREES}/step_*.jsonl; expected a run's directory (logging.run_dir) that "
            "kept trees (logging.trees_interval above 0)"
        )
    found: list[int] = []
    prompts: list[int] = []
    files = files[1:] or files
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                tree = json.loads(line)
                found += _of_leaves(tree)
                prompts.append(len(tree["nodes"][0]["tokens"]))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise LengthsError(f"{path}:{number}: not a tree of this version: {error!r}") from None
    if not found or max(found) < 1:
        raise LengthsError(f"--lengths {run}: its trees have no finished response")
    steps = tuple(int(path.stem.removeprefix("step_")) for path in files)
    return MeasuredLengths(str(run), len(found), equal_parts(found), sum(prompts) / len(prompts), steps)


def _of_leaves(tree: dict[str, Any]) -> list[int]:
    """Response tokens of each leaf of a stored tree. Raises ValueError where a node does not come after its parent."""
    depth = [0]
    for number, node in enumerate(tree["nodes"][1:], 1):
        if not 0 <= node["parent"] < number:
            raise ValueError(f"node {number} has the parent {node['parent']}")
        depth.append(depth[node["parent"]] + len(node["tokens"]))
    return [depth[leaf] for leaf in tree["leaves"]]


def equal_parts(lengths: list[int]) -> tuple[float, ...]:
    """PARTS lengths, each the mean of as many of them; of fewer, all.

    >>> equal_parts([5, 1, 3])
    (1.0, 3.0, 5.0)
    """
    ranked = sorted(lengths)
    count = min(PARTS, len(ranked))
    ends = [round(part * len(ranked) / count) for part in range(count + 1)]
    return tuple(sum(ranked[begin:end]) / (end - begin) for begin, end in itertools.pairwise(ends))
