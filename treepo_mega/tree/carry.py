"""What a tree that is carried over to a later step is written down with: its generator, and the rule it grew by."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from treepo_mega.errors import TreepoError


class CarriedTreeError(TreepoError):
    """A carried-over tree cannot go on under the configuration of now; the message says which key differs."""


def generator_state(rng: random.Random) -> list[Any]:
    """The state of a generator, JSON-safe; `set_generator` is its inverse.

    >>> rng, other = random.Random(1), random.Random(2)
    >>> set_generator(other, generator_state(rng))
    >>> rng.random() == other.random()
    True
    """
    # JSON has no tuples: the state goes out as lists and comes back as tuples.
    version, internal, gauss = rng.getstate()
    return [version, list(internal), gauss]


def set_generator(rng: random.Random, state: Sequence[Any]) -> None:
    """The inverse of `generator_state`."""
    version, internal, gauss = state
    rng.setstate((version, tuple(internal), gauss))


def check_rule(prompt_id: str, saved: str, rule: str) -> None:
    """Raise CarriedTreeError when a tree was carried over under another rule (`fork` or a transfer) than now."""
    if saved == rule:
        return
    key = "rollout.branching.at" if "fork" in (saved, rule) else "rollout.branching.transfer"
    raise CarriedTreeError(
        f"prompt {prompt_id!r} was carried over under another {key} ({saved}) than {rule!r}: finish the run with the "
        "old one, or start from a checkpoint without carried-over trees"
    )
