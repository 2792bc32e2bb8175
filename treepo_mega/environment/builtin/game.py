"""`data.environment: game`: games of reasoning-gym, move by move: sokoban and tower_of_hanoi.

The board is shown after each move, and a move that the rules forbid changes nothing. The reward is what the task's own
scorer gives for all moves together. Other tasks of reasoning-gym are answered at once: `data.environment: guess`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from treepo_mega.environment.builtin.gym_rows import GymRow, gym_row

MAX_MOVES = 256
"""Of an episode."""


class Board(Protocol):
    """A game that is played; it knows its rules."""

    how: str
    """What a move looks like."""

    def play(self, move: str) -> str | None:
        """Make a move. Says why not, if the rules forbid it; the board is then as before."""

    def show(self) -> str:
        """The board as text."""


class Sokoban:
    """A player pushes boxes onto goals."""

    how = "L, U, R or D"

    def __init__(self, item: GymRow) -> None:
        rows = item.entry["metadata"]["gamestr"].replace(" ", "").strip().split("\n")
        matrix = np.array([list(row) for row in rows])
        self._game = item.task._Game(height=matrix.shape[0], width=matrix.shape[1])
        self._game.load_puzzle_matrix(matrix)

    def play(self, move: str) -> str | None:
        """One step of the player."""
        if move not in ("L", "U", "R", "D"):
            return f"{move!r:.40} is no step; expected {self.how}"
        before = self.show()
        self._game.player.update(key=move)
        return "something is in the way" if self.show() == before else None

    def show(self) -> str:
        """Rows of the board."""
        return "\n".join(" ".join(row) for row in self._game.get_matrix())


class TowerOfHanoi:
    """Disks move from peg to peg, and no disk lies on a smaller one."""

    how = "Move disk 1 from Peg 1 to Peg 3"

    def __init__(self, item: GymRow) -> None:
        facts = item.entry["metadata"]
        self._pegs: dict[int, list[int]] = {peg: [] for peg in range(1, facts["num_pegs"] + 1)}
        self._pegs[facts["start_peg"]] = list(range(facts["num_disks"], 0, -1))

    def play(self, move: str) -> str | None:
        """One disk from the top of a peg to another peg."""
        read = re.fullmatch(r"Move disk (\d{1,3}) from Peg (\d{1,3}) to Peg (\d{1,3})\.?", move)
        if read is None:
            return f"{move!r:.60} is no move; expected such as {self.how}"
        disk, start, end = map(int, read.groups())
        if start not in self._pegs or end not in self._pegs:
            return f"the pegs are {', '.join(map(str, self._pegs))}"
        if not self._pegs[start] or self._pegs[start][-1] != disk:
            return f"disk {disk} is not on top of peg {start}"
        if self._pegs[end] and self._pegs[end][-1] < disk:
            return f"disk {self._pegs[end][-1]} on peg {end} is smaller"
        self._pegs[end].append(self._pegs[start].pop())
        return None

    def show(self) -> str:
        """Disks of each peg, the lowest first."""
        return "\n".join(f"Peg {peg}: {' '.join(map(str, disks)) or '-'}" for peg, disks in self._pegs.items())


GAMES: dict[str, tuple[Callable[[GymRow], Board], str]] = {
    "sokoban": (Sokoban, ""),
    "tower_of_hanoi": (TowerOfHanoi, "\n"),
}
"""By the name of the task: its rules, and what stands between the moves of an answer."""


class Game:
    """One tool; the state is the board, and the moves that led to it."""

    def __init__(self) -> None:
        self._item: GymRow | None = None
        self._board: Board | None = None
        self._moves: list[str] = []

    def reset(self, **row: Any) -> str:
        """Begin a game of a row of reasoning-gym."""
        item = gym_row(row)
        if item is None or item.name not in GAMES:
            found = "a row of something else" if item is None else item.name
            raise ValueError(
                f"expected a row of reasoning-gym's {' or '.join(GAMES)}, found {found}; data.environment guess takes "
                "any row with an answer"
            )
        board = GAMES[item.name][0](item)
        self._item = item
        self._board = board
        self._moves = []
        return f"\n\nMake your moves one by one with the tool `move`. A move is {board.how}."

    def move(self, text: str) -> str:
        """Make a move and see the board.

        Args:
            text: The move, as the game writes it.
        """
        assert self._board is not None
        if len(self._moves) >= MAX_MOVES:
            return f"No moves are left: {MAX_MOVES} were made."
        wrong = self._board.play(text.strip())
        if wrong is not None:
            return f"Not possible: {wrong}.\n{self._board.show()}"
        self._moves.append(text.strip().rstrip("."))
        return ("Solved.\n" if self.get_reward() >= 1.0 else "") + self._board.show()

    def get_reward(self) -> float:
        """What the task's own scorer gives for the moves."""
        assert self._item is not None
        return self._item.score(GAMES[self._item.name][1].join(self._moves)) if self._moves else 0.0

    def fork(self) -> Game:
        """The same game, on a board of its own."""
        other = Game()
        other._item = self._item
        other._board = copy.deepcopy(self._board)
        other._moves = list(self._moves)
        return other
