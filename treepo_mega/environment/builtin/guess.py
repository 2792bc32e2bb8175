"""`data.environment: guess`: several tries at the answer of a row, each judged at once.

Rows of reasoning-gym are graded by their own task; others by equality with `answer`. The reward is what the best try
was worth, less a tenth of it for each earlier one.
"""

from __future__ import annotations

from typing import Any

MAX_TRIES = 4
DISCOUNT = 0.1


class Guess:
    """One tool; the state is what has been tried."""

    def __init__(self) -> None:
        self._row: dict[str, Any] = {}
        self._scores: list[float] = []

    def reset(self, **row: Any) -> str:
        """Begin with a row that has an answer, or one of reasoning-gym."""
        self._row = row
        if "answer" not in row:
            raise ValueError("the row has no answer")
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

    def _score(self, text: str) -> float:
        source = (self._row.get("metadata") or {}).get("source_dataset")
        if source is None:
            return float(text == str(self._row["answer"]).strip())
        import reasoning_gym

        grade = reasoning_gym.get_score_answer_fn(source)
        return float(grade(text, {"answer": self._row["answer"], "metadata": self._row["metadata"]}))
