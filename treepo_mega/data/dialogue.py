"""What a chat template writes between two turns of the policy, as ids behind the exact ids that were sampled.

    dialogue = Dialogue(tokenizer, data, tools, eos_token_ids)      # proves that history stays as it was sampled
    ids = dialogue.answer(["4", "Error: ..."])                      # one text a tool call

Sampled ids are never decoded and encoded again: another spelling of the same text would be other tokens, whose logprobs
the engine never gave. A turn ends with an end-of-sequence token of the policy. What the template writes after that
token, up to where the policy goes on, depends on the answers alone, so it is rendered behind a stand-in for the turn.

Some templates rewrite history: they drop a reasoning block from earlier turns, or trim text. Then a model that is
served by the template sees another history than it was trained on. That is found at the start and refused, unless
`history` says what to do: "keep" goes on from what was sampled, "fork" from what the template makes of it:

    dialogue.behind(context, turn, ["4"])       # ids, and how many of the context they hide (`tree/history.py`)

A fork keeps the ids of all that the template leaves alone, and encodes what it writes anew. The template may rewrite
the turn that tools have just answered, and the generation prompt before it (`<think>`). One that goes further back, or
comes back to a turn later, is refused.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from treepo_mega.config import DataConfig
from treepo_mega.data.chat import read_template, template_text
from treepo_mega.errors import TreepoError
from treepo_mega.text.tokenizer import PromptTokenizer

History = Literal["refuse", "keep", "fork"]

# Stand-ins for a turn. No template has a rule for them.
FIRST = "STAND-IN ONE"
SECOND = "STAND-IN TWO"

PROBES = (
    "a plain answer",
    "  with space at both ends \n",
    "<think>\nsome reasoning\n</think>\n\nand an answer",
    'a call <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
)
"""Turns that templates are known to treat in ways of their own."""


class DialogueError(TreepoError):
    """The chat template cannot be used for several turns; the message says what it does and what to do instead."""


class Behind(NamedTuple):
    """What comes behind a turn."""

    ids: list[int]
    hidden: int
    """Last tokens of the context that are not shown any more."""
    restated: int
    """First ones of `ids`, which are shown in their place."""


class Dialogue:
    """The words round a turn, of one tokenizer and template. `tools`: JSON schemas for the template."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        data: DataConfig,
        tools: Sequence[dict[str, Any]],
        eos_token_ids: Sequence[int],
        *,
        history: History = "refuse",
    ) -> None:
        """Raises DialogueError for a missing template, one without a role for tools, and one that rewrites history."""
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = dict(data.chat_template_kwargs)
        if data.chat_template is not None:
            self._options["chat_template"] = read_template(data.chat_template)
        if tools:
            self._options["tools"] = list(tools)
        self._ends = tuple(text for token in eos_token_ids if (text := tokenizer.decode([token])))
        if data.chat_template is None and template_text(tokenizer) is None:
            raise DialogueError(
                "the tokenizer has no chat template, which turns need: set data.chat_template to a Jinja file, or give "
                "the model directory a chat_template.jinja"
            )
        if FIRST not in self._render([_said(FIRST), *_answered(["x"])]):
            raise DialogueError(
                "the chat template leaves out what the assistant said: it cannot be used for several turns"
            )
        self._end = self._end_of_turn()
        self._check_answers()
        self.rewrites = history == "fork"
        """Whether what comes behind a turn may hide something of it (`behind`)."""
        if history == "refuse":
            for probe in PROBES:
                self._check_history(probe)
        if history == "fork":
            for first in PROBES:
                for second in PROBES:
                    self._check_rewriting(first, second)

    def answer(self, texts: Sequence[str]) -> list[int]:
        """Ids from the end of a turn to where the policy goes on; `texts`: what its tool calls returned, in order."""
        return list(self._tokenizer([self.answer_text(texts)], add_special_tokens=False)["input_ids"][0])

    def answer_text(self, texts: Sequence[str]) -> str:
        """The same as text."""
        rendered = self._render([_said(FIRST), *_answered(texts)])
        # The first one is the stand-in's own: an answer may hold anything, and comes behind it.
        behind = rendered[rendered.index(FIRST) + len(FIRST) :]
        return behind.removeprefix(self._end)

    def behind(self, context: Sequence[int], turn: Sequence[int], texts: Sequence[str]) -> Behind:
        """What comes behind `turn`, the end of `context`, whose tools answered `texts`, if history may be rewritten.

        Raises DialogueError where the template shows the turn in a way that this cannot follow.
        """
        written = self._decode(context)
        kept, restated = self._rewritten(written, self._decode(turn), texts)
        answer = self.answer(texts)
        if len(kept) == len(written) and not restated:
            return Behind(answer, 0, 0)
        ids = list(context)
        # The most ids whose text is kept whole. What is kept of the next one is written anew.
        seen = bisect_right(range(len(ids) + 1), len(kept), key=lambda count: len(self._decode(ids[:count]))) - 1
        while not kept.startswith(text := self._decode(ids[:seen])):
            seen -= 1
        anew = kept[len(text) :] + restated
        stands_in = list(self._tokenizer([anew], add_special_tokens=False)["input_ids"][0]) if anew else []
        return Behind([*stands_in, *answer], len(ids) - seen, len(stands_in))

    def _rewritten(self, written: str, turn: str, texts: Sequence[str]) -> tuple[str, str]:
        """What is left of the text `written`, which ends with `turn`, and what is shown in place of the rest."""
        begun = self._render([])
        end = next((end for end in self._ends if turn.endswith(end)), "")
        rendered = self._render([_said(turn.removesuffix(end)), *_answered(texts)])
        answer = self.answer_text(texts)
        if not rendered.endswith(answer):
            raise DialogueError(f"the chat template writes {rendered[-40:]!r} behind a turn, expected {answer[-40:]!r}")
        shown = rendered.removesuffix(answer)
        expected = begun + turn
        same = _common_length(shown, expected)
        dropped = expected[same:]
        if not written.endswith(dropped):
            raise DialogueError(
                f"the chat template rewrites {dropped[:40]!r}, and what was sampled ends with {written[-40:]!r}: "
                "history can be rewritten from the generation prompt of a turn on, not before it"
            )
        return written.removesuffix(dropped), shown[same:]

    def _check_rewriting(self, first: str, second: str) -> None:
        """Two turns, each rewritten as soon as it is answered: the template has to show just that, and no more."""
        text = self._render([])
        said: list[dict[str, Any]] = []
        for turn, answer in ((first, "one"), (second, "two")):
            said += [_said(turn), *_answered([answer])]
            kept, restated = self._rewritten(text + turn + self._end, turn + self._end, [answer])
            text = kept + restated + self.answer_text([answer])
            rendered = self._render(said)
            if rendered != text:
                at = _common_length(rendered, text)
                raise DialogueError(
                    f"the chat template comes back to the turn {first!r} after {second!r}: it shows "
                    f"{rendered[at : at + 40]!r} where {text[at : at + 40]!r} was expected. A fork can follow a "
                    "template that rewrites the turn just answered and leaves earlier ones alone; use another one, or "
                    'have what was sampled kept (environment.history="keep")'
                )

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def _check_answers(self) -> None:
        """What tools return has to appear as it is, each once, and in order."""
        texts = ["ANSWER ONE", "ANSWER TWO"]
        shown = self.answer_text(texts)
        places = [shown.find(text) for text in texts]
        if min(places) < 0 or places != sorted(places):
            raise DialogueError(
                "the chat template does not show what tools return (messages of the role 'tool'): use one that does "
                "(data.chat_template)"
            )

    def _check_history(self, probe: str) -> None:
        """Two turns: the second rendering has to begin with the first, and with what was sampled after it."""
        begun = self._render([])
        once = f"{begun}{probe}{self._end}{self.answer_text(['one'])}"
        twice = f"{once}{SECOND}{self._end}{self.answer_text(['two'])}"
        for said, expected in (
            ([_said(probe), *_answered(["one"])], once),
            ([_said(probe), *_answered(["one"]), _said(SECOND), *_answered(["two"])], twice),
        ):
            rendered = self._render(said)
            if rendered != expected:
                at = _common_length(rendered, expected)
                raise DialogueError(
                    f"the chat template rewrites history: after the turn {probe!r} it shows "
                    f"{rendered[at : at + 40]!r} where {expected[at : at + 40]!r} was sampled. A model served by "
                    "it would see another history than in training. Use a template that keeps turns as they are, have "
                    'trajectories go on from the rewritten history (environment.history="fork"), or from what was '
                    'sampled ("keep")'
                )

    def _end_of_turn(self) -> str:
        """The end-of-sequence token that the template writes behind a turn. Raises DialogueError for another mark."""
        rendered = self._render([_said(FIRST), *_answered(["x"])])
        behind = rendered[rendered.index(FIRST) + len(FIRST) :]
        for end in self._ends:
            if behind.startswith(end):
                return end
        raise DialogueError(
            f"the chat template ends the assistant's turn with {behind[:20]!r}; expected one of the end-of-sequence "
            f"tokens {', '.join(map(repr, self._ends))}: name the right one in rollout.stop.eos_token_ids"
        )

    def _render(self, later: list[dict[str, Any]]) -> str:
        messages = [{"role": "user", "content": "a question"}, *later]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **self._options
                )
            )
        except Exception as error:  # a template is a program: it fails in any way it likes
            roles = ", ".join(message["role"] for message in messages)
            raise DialogueError(f"the chat template refuses messages of {roles}: {error}") from None


def _common_length(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (here, there) in pairs if here != there), min(len(one), len(other)))


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _answered(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": "tool", "content": text} for text in texts]
