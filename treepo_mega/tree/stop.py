"""When a path ends, and how much of its last segment is kept.

Rules, tried in this order on every new segment (the released TreePO code's order):

    answer      the response holds a closed answer box: `\\boxed{...}` or `\\fbox{...}`
    eos         the segment holds an end-of-sequence token
    length      the response has max_response_len tokens
    depth       the path has max_depth segments
    repetition  the text goes round in circles

Where an environment answers (`TurnRules`), an end-of-sequence token ends a turn and not the path. There are two more:

    context     what the environment answered does not fit any more
    lost        the environment lost the trajectory: it has no reward

Two of them also *cut* the segment, because nothing after the end of a path may be trained on: after the first EOS,
and after the token that closes an answer box. The box is looked for in the text of the whole response, so a box that
straddles a segment border is seen. The prompt is not looked at: instructions often contain a box. An empty box
(`put it in \\boxed{}`) is talk about an answer, not an answer; text/boxes.py says what a box is.

Model output is data: it is decoded, scanned once from left to right, and never evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treepo_mega.config import RolloutConfig
from treepo_mega.text.boxes import closed_box

STOP_REASONS = ("eos", "answer", "length", "depth", "repetition")
TURN_STOP_REASONS = ("context", "lost")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a segment: its first `keep` tokens stay; `reason` is None while the path may go on."""

    keep: int
    reason: str | None


def repeats(text: str, window: int, count: int) -> bool:
    """True when some `window` characters of `text` occur `count` times, overlaps included. window 0: never."""
    if window == 0 or len(text) - window + 1 < count:
        return False
    seen: dict[str, int] = {}
    for i in range(len(text) - window + 1):
        piece = text[i : i + window]
        seen[piece] = seen.get(piece, 0) + 1
        if seen[piece] >= count:
            return True
    return False


@dataclass(frozen=True, slots=True)
class TurnRules:
    """How long a path with an environment goes on. `max_turns`: turns that it answers; the next one ends the path.

    `max_observation_len`: tokens of all observations of a path. A longer one ends it before it is seen.
    """

    max_turns: int
    max_observation_len: int


@dataclass(frozen=True, slots=True)
class StopRules:
    """The stop rules of a run. `decode` turns response token ids into text (special tokens may be left out)."""

    eos_token_ids: frozenset[int]
    decode: Callable[[list[int]], str]
    max_response_len: int
    max_depth: int
    answer_box: bool = True
    repetition_window: int = 32
    repetition_count: int = 8

    @classmethod
    def from_config(
        cls,
        rollout: RolloutConfig,
        eos_token_ids: Sequence[int],
        decode: Callable[[list[int]], str],
        turns: TurnRules | None = None,
    ) -> StopRules:
        """The rules of a `rollout` section; a path with `turns` has a segment more for each of them.

        `rollout.max_depth` limits a tree's segments all the same. Raises ValueError without any EOS id: no path could
        end by itself.
        """
        if not eos_token_ids:
            raise ValueError("stop rules need at least one EOS token id, got none (rollout.stop.eos_token_ids)")
        stop = rollout.stop
        # Each turn may end in the middle of a segment.
        more = 0 if turns is None or (rollout.mode == "tree" and rollout.max_depth is not None) else turns.max_turns
        return cls(
            frozenset(eos_token_ids),
            decode,
            rollout.max_response_len,
            rollout.depth_limit + more,
            stop.answer_box,
            stop.repetition_window,
            stop.repetition_count,
        )

    def judge(self, before: Sequence[int], segment: Sequence[int], depth: int, earlier: int = 0) -> Verdict:
        """Judge `segment`, sampled after the response tokens `before` (no prompt), at `depth` segments (1 = first).

        `before` belongs to a path that has not ended, and begins with its present turn; `earlier`: tokens sampled in
        the turns before. Raises ValueError for an empty segment.
        """
        if not segment:
            raise ValueError("a segment has at least one token")
        room = self.max_response_len - earlier - len(before)
        end = next((i + 1 for i, token in enumerate(segment) if token in self.eos_token_ids), None)
        kept = list(segment[:end])[:room]
        box = self._closing_token(before, kept) if self.answer_box else None
        if box is not None:
            # EOS right after the box is kept. The model has ended its answer by itself, and without that token EOS
            # would never be reinforced, and be unlearnt. The price is a small bias: EOS gets gradient only where it
            # was sampled, its alternatives after a box never do.
            if box < len(kept) and kept[box] in self.eos_token_ids:
                return Verdict(box + 1, "eos")
            return Verdict(box, "answer")
        return Verdict(len(kept), self._reason(before, kept, depth, room))

    def _reason(self, before: Sequence[int], kept: Sequence[int], depth: int, room: int) -> str | None:
        if kept[-1] in self.eos_token_ids:
            return "eos"
        if len(kept) >= room:
            return "length"
        if depth >= self.max_depth:
            return "depth"
        if self.repetition_window and self._loops(before, kept):
            return "repetition"
        return None

    def _closing_token(self, before: Sequence[int], segment: Sequence[int]) -> int | None:
        """Tokens of `segment` up to and with the one that closes a box; None without a closed box."""
        # A byte-level token can be half a character, so text cannot be searched token by token. Once closed, a box
        # stays closed: the shortest prefix that has one is found by bisection.

        def closed(k: int) -> bool:
            return closed_box(self.decode([*before, *segment[:k]])) is not None

        if not closed(len(segment)):
            return None
        low = 1
        high = len(segment)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if closed(middle) else (middle + 1, high)
        return low

    def _loops(self, before: Sequence[int], segment: Sequence[int]) -> bool:
        # Characters, not tokens: one loop has many tokenisations. The look-back sees a loop that began in the last
        # segment; counting over the whole response would end long derivations for their stock phrases.
        new = self.decode(list(segment))
        # A token is at least one character as a rule, so this many tokens hold the look-back; fewer cost nothing.
        span = self.repetition_window * self.repetition_count
        old = self.decode(list(before[-span:]))[-span:]
        return repeats(old + new, self.repetition_window, self.repetition_count)
