"""An environment: a hidden number, and a tool that compares. `examples/agent_cpu.yaml` trains on it."""

from __future__ import annotations

COST = 0.05
"""What a question takes off the reward."""


class HiddenNumber:
    """The state is how often it was asked."""

    def __init__(self) -> None:
        self.secret = 0
        self.asked = 0

    def reset(self, secret: int, **row: object) -> None:
        """Begin with the number of a row."""
        self.secret = secret

    def ask(self, number: int) -> str:
        """Compare the hidden number with another one.

        Args:
            number: What to compare with.
        """
        self.asked += 1
        if self.secret == number:
            return "equal"
        return "less" if self.secret < number else "more"

    def get_reward(self) -> float:
        """What the questions cost."""
        return -COST * self.asked
