"""What a plan takes for granted about samples: lengths, what trees share, and how many prompts are kept. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from treepo_mega.config import Config
from treepo_mega.plan.hardware import Rates


@dataclass(frozen=True, slots=True)
class Lengths:
    """Means in tokens. `sampled` and `trained` correct the tokens that branching lets expect by those of a run."""

    response: float
    prompt: float
    spread: float
    """Standard deviation of the logarithm of a response's length."""
    kept: float
    """Share of sampled prompts that are trained on."""
    sampled: float = 1.0
    trained: float = 1.0
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
