"""The search task: Countdown. Reach a target from a few small numbers, by trying.

    problem   3,8,5,2>29:            the numbers, then the target
    response  8-3=5*5=25+2=27;3*8=24+5=29      attempts, parted by `;`; the last one is the answer

An attempt starts at one of the numbers and applies others to the running total with `+`, `-` or `*`. Each number is
used at most once in an attempt, not all have to be used, and totals stay within 1..HIGHEST. An attempt that meets the
target ends the response; one that runs out of numbers gives way to the next, up to ATTEMPTS of them.

What it is for: a policy that tries at random meets the target in few attempts, every choice of a number or of an
operation is open, and most problems have several solutions. So exploring pays here, in contrast to the chain task,
whose one solution the model half knows.

`search_trace` is the teacher of the warm start: uniform choices, but for a move that meets the target at once, which it
takes with probability `lookahead`. `chance` is the exact probability that one attempt of the uniform teacher meets the
target; problems are drawn with it inside CHANCE. `solves` is the verifier's rule: any right way counts.

Held out is a fixed fifth by numbers *and* target, whatever the order of the numbers. Numbers are one token each
(SYMBOLS). Pure: standard library only.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
OPERATIONS = "+-*"
HIGHEST = 49
"""Totals and targets stay within 1..HIGHEST."""
SYMBOLS = (*SPECIAL, *(str(number) for number in range(HIGHEST + 1)), *OPERATIONS, "=", ";", ",", ">", ":")
"""The whole vocabulary, in order of token id."""
NUMBERS = range(2, 10)
"""What problems are drawn from: 1 would make `*1` a step that does nothing."""
COUNT = 4
"""How many different numbers a problem has."""
ATTEMPTS = 5
"""Attempts of the teacher before it gives up."""
LOWEST_TARGET = 10
CHANCE = (0.04, 0.2)
"""Bounds, both included, of `chance` for a problem that is drawn."""
RESPONSE_TOKENS = ATTEMPTS * (4 * COUNT - 2)
"""Tokens of the longest trace, its end mark included: an attempt is 4 * COUNT - 3, and a mark follows each."""
PROMPT_TOKENS = 2 * COUNT + 2

_TRUTH = re.compile(r"\s*([0-9]{1,4}(?:\s*,\s*[0-9]{1,4}){1,9})\s*>\s*([0-9]{1,6})\s*")
_PIECES = re.compile(r"[0-9]+|[-+*=]|\S")
_MOST_DIGITS = 7
"""Digits of a number in an answer. int() of a longer text would take quadratic time."""


@dataclass(frozen=True, slots=True)
class Countdown:
    """One problem: different `numbers` in the order shown, and the `target`."""

    numbers: tuple[int, ...]
    target: int

    @property
    def answer(self) -> str:
        """The ground truth: `numbers>target`."""
        return f"{','.join(str(number) for number in self.numbers)}>{self.target}"

    @property
    def prompt(self) -> str:
        """The problem as text, PROMPT_TOKENS symbols."""
        return f"{self.answer}:"


@dataclass(frozen=True, slots=True)
class Move:
    """Apply `number` to the running total with `operation`; `total` is the result."""

    operation: str
    number: int
    total: int


def apply(total: int, operation: str, number: int) -> int:
    """The running total after one step. ValueError for an operation that is none of OPERATIONS."""
    if operation == "+":
        return total + number
    if operation == "-":
        return total - number
    if operation == "*":
        return total * number
    raise ValueError(f"operation {operation!r} is none of {OPERATIONS}")


def moves(total: int, left: tuple[int, ...]) -> list[Move]:
    """Every step from `total` with one of the numbers `left` whose result stays within 1..HIGHEST."""
    found = [Move(op, number, apply(total, op, number)) for number in left for op in OPERATIONS]
    return [move for move in found if 1 <= move.total <= HIGHEST]


def parse_truth(text: str) -> tuple[tuple[int, ...], int]:
    """Numbers and target of `numbers>target`; ValueError for any other text."""
    found = _TRUTH.fullmatch(text)
    if found is None:
        raise ValueError(f"countdown: the ground truth {text[:80]!r} is not of the form 3,8,5,2>29")
    return tuple(int(number) for number in found[1].split(",")), int(found[2])


def solves(text: str, numbers: tuple[int, ...], target: int) -> bool:
    """Whether the last attempt of `text` meets `target` by right steps with each of `numbers` used at most once.

    The last attempt is what follows the last `;` or line break, white space around the text ignored. Every stated
    total must be right. Any sequence of steps counts; steps apply to the running total, from left to right.
    """
    last = re.split(r"[;\n]", text.strip())[-1]
    # An attempt longer than this has more steps than numbers.
    if len(last) > 2 * (_MOST_DIGITS + 2) * (len(numbers) + 1):
        return False
    pieces = _PIECES.findall(last)
    if len(pieces) % 4 != 1 or any(len(piece) > _MOST_DIGITS for piece in pieces):
        return False
    # isdecimal() alone is true of digits that int() reads but no prompt shows.
    if not all(piece.isascii() and piece.isdecimal() for piece in pieces[::2]):
        return False
    total = int(pieces[0])
    left = list(numbers)
    if total not in left:
        return False
    left.remove(total)
    for at in range(1, len(pieces), 4):
        operation, number, equals, result = pieces[at : at + 4]
        if operation not in OPERATIONS or equals != "=" or int(number) not in left:
            return False
        left.remove(int(number))
        total = apply(total, operation, int(number))
        if total != int(result):
            return False
    return total == target


def without(numbers: tuple[int, ...], used: int) -> tuple[int, ...]:
    """`numbers` without one that was used."""
    return tuple(number for number in numbers if number != used)


@lru_cache(maxsize=1 << 16)
def _chance_from(total: int, left: tuple[int, ...], target: int) -> float:
    """Probability that a uniform walk from `total` meets `target`: a number first, then one of its moves."""
    if total == target:
        return 1.0
    by_number = [moves(total, (number,)) for number in left]
    open_ones = [found for found in by_number if found]
    if not open_ones:
        return 0.0
    return sum(
        sum(_chance_from(move.total, without(left, move.number), target) for move in found) / len(found)
        for found in open_ones
    ) / len(open_ones)


def chance(problem: Countdown) -> float:
    """The exact probability that one attempt of the uniform teacher meets the target; 0 for no solution."""
    numbers = tuple(sorted(problem.numbers))
    return sum(_chance_from(first, without(numbers, first), problem.target) for first in numbers) / len(numbers)


def search_trace(problem: Countdown, rng: random.Random, lookahead: float = 0.0, attempts: int = ATTEMPTS) -> str:
    """A response of the teacher, without the end mark: at most `attempts` attempts, the last one right or given up.

    A choice is uniform over the numbers that have a move, then over the moves of that number. A move that meets
    the target at once is taken with probability `lookahead` instead.
    """
    done: list[str] = []
    for _ in range(attempts):
        total = rng.choice(problem.numbers)
        left = without(problem.numbers, total)
        text = str(total)
        while found := moves(total, left):
            hits = [move for move in found if move.total == problem.target]
            if hits and rng.random() < lookahead:
                move = rng.choice(hits)
            else:
                number = rng.choice(sorted({move.number for move in found}))
                move = rng.choice([move for move in found if move.number == number])
            total, left = move.total, without(left, move.number)
            text += f"{move.operation}{move.number}={total}"
            if total == problem.target:
                break
        done.append(text)
        if total == problem.target:
            break
    return ";".join(done)


def is_held_out(problem: Countdown) -> bool:
    """Whether the problem belongs to the fixed fifth that is never trained on, by numbers and target."""
    # Sorted, so that no order of the same numbers is trained on. Not `hash`: its salt changes with the process.
    name = f"{sorted(problem.numbers)}{problem.target}"
    return zlib.crc32(name.encode()) % 5 == 0


def problems(*, held_out: bool, chances: tuple[float, float] = CHANCE) -> list[Countdown]:
    """Every problem of one side of the split whose `chance` is within `chances`, numbers in ascending order."""
    found = (
        Countdown(numbers, target)
        for numbers in itertools.combinations(NUMBERS, COUNT)
        for target in range(LOWEST_TARGET, HIGHEST + 1)
    )
    return [each for each in found if is_held_out(each) == held_out and chances[0] <= chance(each) <= chances[1]]


def draw_split(rng: random.Random, *, held_out: bool) -> Iterator[Countdown]:
    """Endless problems of one side of the split, in passes: each once a pass, its numbers in another order."""
    side = problems(held_out=held_out)
    while True:
        rng.shuffle(side)
        for each in side:
            yield Countdown(tuple(rng.sample(each.numbers, len(each.numbers))), each.target)


def tokenize(text: str) -> list[str]:
    """Split text into SYMBOLS; ValueError names the first thing that is none."""
    pieces = re.findall(r"<[a-z]+>|[0-9]+|[\s\S]", text)
    for piece in pieces:
        if piece not in SYMBOLS:
            raise ValueError(f"{piece!r} is not a symbol of the countdown task ({text!r})")
    return pieces
