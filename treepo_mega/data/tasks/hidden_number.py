"""The agent's task: find a hidden number by asking a tool, and ask only when there is something to find out.

    8-23?        the number lies in 8..23: ask(15) -> less, ask(11) -> more, ask(13) -> equal, answer 13
    8-23=12?     the prompt tells it: answer 12

Four answers of a three-way comparison find any of 16 numbers, if each question halves what is left. A policy that asks
at random finds fewer. Each question costs a little of the reward, so asking for what the prompt tells is unlearnt.

`episode` is the teacher of the warm start: it asks for any number half of the time, gives up early now and then, and
asks needlessly. Held out is a fixed fifth by the bounds and the number. Pure: standard library only.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<tool>")
HIGHEST = 31
"""Numbers are 0..HIGHEST, one token each."""
CALL = '<tool_call>{"name": "ask", "arguments": {"number": '
CALL_END = "}}</tool_call>"
ANSWERS = ("less", "more", "equal")
SYMBOLS = (*SPECIAL, *(str(number) for number in range(HIGHEST + 1)), "-", "=", "?", *ANSWERS, CALL, CALL_END)
"""The whole vocabulary, in order of token id."""
PATTERN = "|".join(map(re.escape, (CALL, CALL_END, *ANSWERS))) + r"|[0-9]+|[^0-9]"
"""Finds the symbols of a text."""
SPANS = range(8, 17)
"""How many numbers a problem leaves open."""
MAX_ASKS = 4
TOLD = 0.25
"""Share of problems whose prompt tells the number."""
ANYWHERE, GIVE_UP, NEEDLESS = 0.5, 0.12, 0.6
"""Of the teacher: chances of a question for any number, of an early guess, and of asking for what is told."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A number `secret` in `low`..`high`; `told`: whether the prompt says it."""

    low: int
    high: int
    secret: int
    told: bool

    @property
    def prompt(self) -> str:
        """What the policy reads.

        >>> Problem(8, 23, 12, told=True).prompt
        '8-23=12?'
        """
        return f"{self.low}-{self.high}{f'={self.secret}' if self.told else ''}?"

    @property
    def held_out(self) -> bool:
        """Whether it is never trained on."""
        return zlib.crc32(f"{self.low}-{self.high}:{self.secret}".encode()) % 5 == 0

    @property
    def row(self) -> dict[str, str | int]:
        """A row of the data: `secret` goes to the environment, `answer` to the verifier."""
        return {
            "prompt": self.prompt, "answer": str(self.secret), "secret": self.secret,
            "data_source": "told" if self.told else "hidden",
        }  # fmt: skip


def compare(secret: int, number: int) -> str:
    """What the tool answers.

    >>> compare(12, 15), compare(12, 12)
    ('less', 'equal')
    """
    return "equal" if secret == number else "less" if secret < number else "more"


def draw(rng: random.Random, *, held_out: bool) -> Iterator[Problem]:
    """Problems without end, of one side."""
    while True:
        span = rng.choice(SPANS)
        low = rng.randint(0, HIGHEST + 1 - span)
        high = low + span - 1
        problem = Problem(low, high, rng.randint(low, high), rng.random() < TOLD)
        if problem.held_out is held_out:
            yield problem


def episode(problem: Problem, rng: random.Random) -> list[tuple[str, str]]:
    """The teacher's turns: (what it says, what the tool answers); the last has no answer."""
    turns: list[tuple[str, str]] = []
    low, high = (problem.secret, problem.secret) if problem.told else (problem.low, problem.high)

    def ask(number: int) -> str:
        turns.append((f"{CALL}{number}{CALL_END}", compare(problem.secret, number)))
        return turns[-1][1]

    if problem.told:
        if rng.random() < NEEDLESS:
            ask(problem.secret)
        return [*turns, (str(problem.secret), "")]
    while len(turns) < MAX_ASKS and rng.random() >= GIVE_UP:
        anywhere = rng.random() < ANYWHERE
        number = rng.randint(problem.low, problem.high) if anywhere else rng.randint(low, high)
        answer = ask(number)
        if answer == "equal":
            low = high = number
            break
        if answer == "less":
            high = min(high, number - 1)
        else:
            low = max(low, number + 1)
    return [*turns, (str(rng.randint(low, high)), "")]
