"""`data.environment: guess`: several tries at the answer of a row, each judged at once.

Rows of reasoning-gym are graded by their own task; others by equality with `answer`. The reward is what the best try
was worth, less a tenth of it for each earlier one.
"""

from __future__ import annotations

from typing import Any

from treepo_mega.environment.builtin.gym_rows import GymRow, gym_row

MAX_TRIES = 4
DISCOUNT = 0.1


class Guess:
    """One tool; the state is what has been tried."""

    def __init__(self) -> None:
        self._answer = ""
        self._item: GymRow | None = None
        self._scores: list[float] = []

    def reset(self, **row: Any) -> str:
        """Begin with a row that has an answer, or one of reasoning-gym."""
        if "answer" not in row:
            raise ValueError("the row has no answer")
        self._answer = str(row["answer"]).strip()
        self._item = gym_row(row)
        return f"You have {MAX_TRIES} tries."

    def answer(self, text: str) -> str:
        """Try an answer.

        Args:
            text: The answer alone.
        """
        if len(self._scores) >= MAX_TRIES:
            return "No tries are left."
        if max(self._scores, default=0.0) >= 1.0:
            return "It was right already."
        score = self._score(text.strip())
        self._scores.append(score)
        if score >= 1.0:
            return "Right."
        left = MAX_TRIES - len(self._scores)
        return f"Not right. Tries left: {left}."

    def get_reward(self) -> float:
        """Of the best try, discounted by the number of those before it."""
        worth = [score * (1 - DISCOUNT * number) for number, score in enumerate(self._scores)]
        return max(worth, default=0.0)

    def fork(self) -> Guess:
        """The same row, with tries of its own."""
        other = Guess()
        other._answer = self._answer
        other._item = self._item
        other._scores = list(self._scores)
        return other

    def _score(self, text: str) -> float:
        return float(text == self._answer) if self._item is None else self._item.score(text)
