"""An environment: a count that has to reach a goal."""

from __future__ import annotations


class Counter:
    """The state is one number."""

    def __init__(self) -> None:
        self.value = 0
        self.goal = 0

    def reset(self, goal: int, **row: object) -> str:
        """Begin with the goal of a row."""
        self.goal = goal
        return f"Reach {goal}."

    def add(self, amount: int) -> str:
        """Add to the count.

        Args:
            amount: How much to add; it may be negative.
        """
        self.value += amount
        return str(self.value)

    def get_reward(self) -> float:
        """1 at the goal."""
        return float(self.value == self.goal)
