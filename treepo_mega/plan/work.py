"""How many tokens a step samples and trains on, and how many see each other: from lengths and branching. Pure.

    shape = TreeShape.of(cfg, response=2800, prompt=256, spread=0.6)
    shape.unique, shape.flat, shape.pairs             # of one tree, prompt left out of the first two

Responses are log-normal in length, or as those of a run were, cut at rollout.max_response_len. At depth t a tree has
as many different paths as its branching allows there, and no more than it has trajectories that long: the transfer of
branches from ended paths to living ones keeps it at one of the two. A measured run replaces the means (`calibrate.py`).
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from treepo_mega.config import Config, ConfigError
from treepo_mega.monitor.flops import Work

STRETCHES = 128
"""Depths at which a tree is looked at."""


@dataclass(frozen=True, slots=True)
class TreeShape:
    """Expected tokens of one tree. Lengths are means, tokens."""

    leaves: float
    prompt: float
    response: float
    stretch: float
    """Tokens between two depths."""
    paths: tuple[float, ...]
    """Different paths in each stretch."""
    alive: tuple[float, ...]
    """Trajectories that reach into each stretch."""
    segment: float
    """Tokens between two branching points; the longest response where nothing branches."""

    @classmethod
    def of(cls, cfg: Config, *, response: float, prompt: float, spread: float, tail: Sequence[float] = ()) -> TreeShape:
        """Of the configuration's trees. `tail`: measured lengths, in place of log-normal ones.

        Raises ConfigError for means that its limits exclude.
        """
        longest = cfg.rollout.max_response_len
        for name, mean, most in (("response", response, longest), ("prompt", prompt, cfg.data.max_prompt_len)):
            if not 0 < mean <= most:
                raise ConfigError(f"a mean {name} of {mean:g} tokens: expected more than 0 and at most {most}")
        leaves = float(cfg.rollout.n_samples_per_prompt)
        alive_at = survival(response, spread, longest, tail)
        stretch = longest / STRETCHES
        depths = [(index + 0.5) * stretch for index in range(STRETCHES)]
        alive = tuple(leaves * alive_at(depth) for depth in depths)
        fan = [_fan(cfg, depth) for depth in depths]
        paths = tuple(min(width, living) if living >= 1 else living for width, living in zip(fan, alive, strict=True))
        segment = cfg.rollout.segment_tokens
        return cls(leaves, prompt, sum(alive) * stretch / leaves, stretch, paths, alive, float(segment))

    @property
    def unique(self) -> float:
        """Response tokens, shared ones once."""
        return sum(self.paths) * self.stretch

    @property
    def flat(self) -> float:
        """Response tokens of all trajectories one by one."""
        return sum(self.alive) * self.stretch

    @property
    def requests(self) -> float:
        """Segments: a path asks for one at each of its branching points."""
        borders = range(math.ceil(STRETCHES * self.stretch / self.segment))
        return sum(self.paths[min(STRETCHES - 1, int(each * self.segment / self.stretch))] for each in borders)

    def pairs(self, counts: tuple[float, ...]) -> float:
        """Visible (query, key) pairs of the response tokens in `counts` paths a stretch."""
        return sum(
            count * self.stretch * (self.prompt + (index + 0.5) * self.stretch) for index, count in enumerate(counts)
        )

    def training(self, cfg: Config, trees: float) -> Work:
        """One training pass over so many trees, as train.prefix_sharing lays them out."""
        flat = self.flat + self.leaves * self.prompt
        unique = self.unique + self.prompt
        inside = self.prompt * (self.prompt + 1) / 2
        if cfg.train.prefix_sharing == "none":
            one = Work(flat, self.pairs(self.alive) + self.leaves * inside, self.flat, unique=unique, flat=flat)
        else:
            one = Work(unique, self.pairs(self.paths) + inside, self.unique, unique=unique, flat=flat)
        return trees * one

    def sampling(self, trees: float) -> Work:
        """What an engine computes for so many trees, every prefix once."""
        unique = self.unique + self.prompt
        pairs = self.pairs(self.paths) + self.prompt * (self.prompt + 1) / 2
        return trees * Work(unique, pairs, self.unique, unique=unique, flat=self.flat + self.leaves * self.prompt)


def _fan(cfg: Config, depth: float) -> float:
    """Paths that a tree may have `depth` tokens after its prompt."""
    rollout = cfg.rollout
    leaves = rollout.n_samples_per_prompt
    if rollout.mode == "sequential":
        return leaves
    branching = rollout.branching
    low, high = branching.initial or ((max(1, leaves // 4),) * 2 if rollout.forks else (branching.factor,) * 2)
    # Forks start anywhere: half of what they share is shared, in the mean.
    if rollout.forks:
        return (min(leaves, (low + high) / 2) + leaves) / 2
    level = int(depth // rollout.segment_tokens)
    return min(leaves, (low + high) / 2 * float(branching.factor) ** min(level, 64))


def survival(response: float, spread: float, longest: int, tail: Sequence[float] = ()) -> Callable[[float], float]:
    """Depth in tokens to the share of responses that are longer; `response`: their mean.

    Log-normal, or of the shape of `tail`, whose lengths are stretched to that mean.
    """
    if not tail:
        median = median_of(response, spread, longest)
        return lambda depth: longer(depth, median, spread)
    factor = response * len(tail) / sum(tail)
    ranked = sorted(factor * length for length in tail)
    return lambda depth: 1 - bisect.bisect_right(ranked, depth) / len(ranked)


def longer(depth: float, median: float, spread: float) -> float:
    """Share of responses that are longer than `depth` tokens."""
    return 0.5 * math.erfc((math.log(depth) - math.log(median)) / (spread * math.sqrt(2)))


@functools.lru_cache(maxsize=64)
def median_of(mean: float, spread: float, longest: int) -> float:
    """The median of which the mean, cut at `longest`, is `mean`."""
    low, high = 0.01, 1000.0 * longest
    stretch = longest / STRETCHES
    for _ in range(60):
        middle = math.sqrt(low * high)
        cut = sum(longer((index + 0.5) * stretch, middle, spread) for index in range(STRETCHES)) * stretch
        low, high = (middle, high) if cut < mean else (low, middle)
    return math.sqrt(low * high)


def batches(running: float, most: float) -> Iterator[float]:
    """`running` sequences in as few batches as `most` allows, of one size."""
    count = max(1, math.ceil(running / most))
    for _ in range(count):
        yield running / count
