"""A run's environment: what the class offers, its pool of states on this rank, and how its episodes begin.

environment = open_environment(cfg)                     # None without data.environment
prompts = load_prompts(..., opener=environment)         # reset() is called once a row, for its text
state, ticket = environment.open(prompt.row, prompt.id) # the same state whenever it is opened
"""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from typing import Any

from treepo_mega.config import Config, EnvironmentConfig
from treepo_mega.environment.contract import EnvironmentClassError, Manifest, read_manifest
from treepo_mega.environment.pool import EnvironmentPool
from treepo_mega.environment.state import EnvironmentLimits, State
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.text.reward_name import REWARD

OPENED_AT_ONCE = 64
"""Rows whose reset is asked at a time."""


class Environment:
    """See the module docstring. `seed`: of the run."""

    def __init__(self, name: str, settings: EnvironmentConfig, seed: int) -> None:
        """Reads the class in a process of its own. Raises EnvironmentClassError."""
        self.manifest: Manifest = read_manifest(name)
        self.settings = settings
        self.pool = EnvironmentPool(name, limits_of(settings))
        self._seed = seed
        # Workers end with this process in any case; this ends what their tools left behind as well.
        atexit.register(self.pool.close)

    @property
    def tools(self) -> Sequence[dict[str, Any]]:
        """JSON schemas of the tools, for the chat template."""
        return self.manifest.tools

    def open(self, row: Mapping[str, Any], name: str) -> tuple[State, int]:
        """A new state of the prompt `name` with the row `row`, and the ticket of its reply."""
        return self.pool.open(dict(row), seed=derive_seed(self._seed, "environment", name))

    def openings(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str | None]:
        """What reset returns for each (prompt id, row), in order. Raises EnvironmentClassError for one that fails."""
        found: list[str | None] = []
        for first in range(0, len(rows), OPENED_AT_ONCE):
            asked = [(name, *self.open(row, name)) for name, row in rows[first : first + OPENED_AT_ONCE]]
            replies = self.pool.wait()
            for name, state, ticket in asked:
                reply = replies[ticket]
                if reply.lost:
                    raise EnvironmentClassError(f"environment {self.manifest.name!r}, prompt {name}: {reply.error}")
                found.append(reply.text)
                self.pool.free(state)
        self.pool.wait()
        return found

    def close(self) -> None:
        """End the workers; idempotent."""
        self.pool.close()
        atexit.unregister(self.pool.close)


def open_environment(cfg: Config) -> Environment | None:
    """The environment of `data.environment`; None without one.

    Raises EnvironmentClassError for a class that breaks the contract, and for one without get_reward whose reward is
    asked for.
    """
    name = cfg.data.environment
    if name is None:
        return None
    environment = Environment(name, cfg.environment, cfg.train.seed)
    sources = [*cfg.data.train, *cfg.data.eval]
    verifiers = {cfg.data.verifier, *(source.verifier for source in sources)}
    verifiers |= {part.verifier for part in cfg.reward.functions}
    if REWARD in verifiers and not environment.manifest.has_reward:
        environment.close()
        raise EnvironmentClassError(
            f"environment {name!r} has no get_reward, and a verifier is {REWARD!r}: give the class one, or name a "
            "verifier of answers (data.verifier)"
        )
    return environment


def limits_of(settings: EnvironmentConfig) -> EnvironmentLimits:
    """The section's limits, as the pool takes them."""
    return EnvironmentLimits(**{name: getattr(settings, name) for name in EnvironmentLimits.__dataclass_fields__})
