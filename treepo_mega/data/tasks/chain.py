"""The demo's task: a chain of running totals, addressed by name.

    problem   a63b-9c-7d+8=          start at 63, then the terms b, c, d, ... in order
    solution  a63;b-9=54;c-7=47;d+8=55;\\boxed{55}

Each step looks its term up by its letter, copies it and applies it to the running total, so the answer
needs every step right: a wrong step ruins all that comes after it, and branching a tree *inside* a solution
separates good steps from bad ones. A prompt is `3 * terms + 4` tokens; a response `7 * terms + 9`: the first
total 4, a step 7, the answer with its end mark 5 (`solution_tokens`).

What makes it a lesson for reinforcement learning rather than an exercise in sharpness is how the worked
solutions of the warm start are wrong (`Slips`):

- *slips*: now and then a total is off by 1, 2 or 10. They are noise: the most likely next token is right.
- *a misconception*: when 8 or 9 is added and the total crosses a ten, most solutions forget to carry
  (63+8=61). The most likely token is wrong, the right one keeps a fair share. A model warm-started on this
  solves a part of the problems greedily, and only reward for the answer can teach it otherwise.

After a wrong step a solution goes on consistently from the wrong total. True totals stay within 10..99;
written totals are two digits, modulo 100.

Labels are consecutive letters of a 12-cycle from a random start, so long chains use no symbol that short
ones do not. `is_held_out` is a fixed tenth of all prompts (a hash of the text): they are never trained on.

The alphabet is `SYMBOLS`, one token each (`\\boxed{` is one). Pure: standard library only.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

LABELS = "abcdefghijkl"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
BOX = "\\boxed{"
SYMBOLS = (*SPECIAL, *"0123456789", "+", "-", "=", ";", BOX, "}", *LABELS)
"""The whole vocabulary, in order of token id."""

LOWEST, HIGHEST = 10, 99
"""True totals stay within these, both included."""
MAX_TERMS = len(LABELS) - 1
SLIP_SHIFTS = (-10, -2, -1, 1, 2, 10)


@dataclass(frozen=True, slots=True)
class Chain:
    """One problem: `start`, then `terms` as signed integers (-9..-1, 1..9), labelled from LABELS[first_label] on."""

    start: int
    terms: tuple[int, ...]
    first_label: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.terms) <= MAX_TERMS:
            raise ValueError(f"a chain has 1 to {MAX_TERMS} terms (a label each), got {len(self.terms)}")
        if any(t == 0 or abs(t) > 9 for t in self.terms):
            raise ValueError(f"terms are -9..-1 or 1..9, got {self.terms}")

    def label(self, i: int) -> str:
        """The letter of the start value (i = 0) or of term i (from 1)."""
        return LABELS[(self.first_label + i) % len(LABELS)]

    @property
    def prompt(self) -> str:
        """The problem as text, `3 * terms + 4` symbols."""
        terms = "".join(f"{self.label(i)}{t:+d}" for i, t in enumerate(self.terms, 1))
        return f"{self.label(0)}{self.start:02d}{terms}="

    @property
    def totals(self) -> list[int]:
        """The running totals after each term."""
        out, total = [], self.start
        for term in self.terms:
            total += term
            out.append(total)
        return out

    @property
    def answer(self) -> str:
        """The last total, two digits: the ground truth."""
        return str(self.totals[-1])


@dataclass(frozen=True, slots=True)
class Slips:
    """How worked solutions go wrong; both are probabilities per step. The default makes no mistake."""

    slip: float = 0.0
    """A total is off by one of SLIP_SHIFTS."""
    forget_carry: float = 0.0
    """The carry is forgotten when 8 or 9 is added across a ten."""

    def apply(self, total: int, term: int, rng: random.Random) -> int:
        """The total written after applying `term` to `total`, modulo 100."""
        result = total + term
        if term >= 8 and total % 10 + term >= 10 and rng.random() < self.forget_carry:
            result -= 10
        elif rng.random() < self.slip:
            result += rng.choice(SLIP_SHIFTS)
        return result % 100


NO_SLIPS = Slips()


def draw_chain(rng: random.Random, n_terms: int) -> Chain:
    """A random problem with `n_terms` terms whose true totals stay within LOWEST..HIGHEST.

    The sign is even odds and the size uniform 1..9, redrawn until the total stays in range.
    """
    total = start = rng.randint(LOWEST, HIGHEST)
    terms: list[int] = []
    while len(terms) < n_terms:
        term = rng.choice((-1, 1)) * rng.randint(1, 9)
        if LOWEST <= total + term <= HIGHEST:
            terms.append(term)
            total += term
    return Chain(start, tuple(terms), rng.randrange(len(LABELS)))


def worked_solution(chain: Chain, rng: random.Random | None = None, slips: Slips = NO_SLIPS) -> str:
    """The solution as text, without the end mark; with `slips` it needs `rng` and may be wrong."""
    rng = rng or random.Random(0)
    total = chain.start
    steps = [f"{chain.label(0)}{total:02d};"]
    for i, term in enumerate(chain.terms, 1):
        total = slips.apply(total, term, rng)
        steps.append(f"{chain.label(i)}{term:+d}={total:02d};")
    return f"{''.join(steps)}{BOX}{total:02d}}}"


def solution_tokens(n_terms: int) -> int:
    """Tokens of a solution with `n_terms` steps, its end mark included (the format fixes it)."""
    return 7 * n_terms + 9


def is_held_out(prompt: str) -> bool:
    """Whether the prompt belongs to the fixed tenth that is never trained on."""
    # Not `hash`: its salt changes with the process, and held-out problems would be trained on after a restart.
    return zlib.crc32(prompt.encode()) % 10 == 0


def draw_split(rng: random.Random, n_terms: tuple[int, ...], *, held_out: bool) -> Iterator[Chain]:
    """Endless distinct problems of one side of the split, the number of terms drawn evenly from `n_terms`."""
    seen: set[str] = set()
    while True:
        chain = draw_chain(rng, rng.choice(n_terms))
        if is_held_out(chain.prompt) == held_out and chain.prompt not in seen:
            seen.add(chain.prompt)
            yield chain


def tokenize(text: str) -> list[str]:
    """Split text into SYMBOLS; ValueError names the first thing that is none."""
    out, i = [], 0
    while i < len(text):
        symbol = next((s for s in (*SPECIAL, BOX) if text.startswith(s, i)), text[i])
        if symbol not in SYMBOLS:
            raise ValueError(f"{symbol!r} at character {i} is not a symbol of the chain task ({text!r})")
        out.append(symbol)
        i += len(symbol)
    return out
