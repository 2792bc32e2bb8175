r"""Which columns of a row hold the prompt, the truth and the reference text.

A key that somebody chose (`data.input_key`, `data.label_key`) is taken and never guessed around. With the default keys
common names are tried, and the layouts of verl, OpenR1, NuminaMath, Skywork, DAPO, GSM8K and MATH are read without a
key. `prompt` and `answer` come first. Where other columns hold different texts, the error names the candidates.

Traps. (1) A chat that closes with the assistant's turn holds the solution: a column with the problem is preferred to
it. (2) `answer` beside another `reward_model.ground_truth` is a worked solution as often as a truth: it is refused.
(3) A worked solution as truth is cut to its last box, as graders of MATH do.
"""

from __future__ import annotations

from typing import Any

from treepo_mega.data.chat import closes_with_assistant, messages_in
from treepo_mega.data.rows import MISSING, PromptError, Row, describe_missing, lookup
from treepo_mega.data.truths import cut_solution, truth_text

PROMPT_KEYS = ("prompt", "messages", "question", "problem", "input", "instruction", "query", "conversations")
CHAT_KEYS = ("messages", "conversations")
ANSWER_KEYS = ("answer", "label", "ground_truth", "reward_model.ground_truth", "final_answer", "expected_answer")
SOLUTION_KEY = "solution"
REFERENCE_KEYS = ("solution", "target", "completion")

PROBLEM_USED = "the column with the problem is used, because the messages beside it close with a solution"
"""What is said, once, when a chat with its solution stands beside the problem."""


class Columns:
    """Finds prompt and truth in rows, by the keys of the configuration. Remembers spellings between rows."""

    def __init__(self, input_key: str, label_key: str) -> None:
        self.input_key = input_key
        self.label_key = label_key
        self._present: dict[tuple[tuple[str, ...], tuple[str, ...]], list[tuple[str, str]]] = {}

    def prompt(self, row: Row) -> tuple[Any, str | None]:
        """(text or list of messages, what to say about the choice). Raises PromptError without one, or with several."""
        if self.input_key != PROMPT_KEYS[0]:
            value = self._chosen(row, "prompt", self.input_key)
            return messages_in(value) or value, None
        value = row.values.get("prompt")
        if isinstance(value, str) and value and value.lstrip()[:1] != "[":
            return value, None
        found = self._filled(row, PROMPT_KEYS)
        if not found:
            raise PromptError(describe_missing(row, "prompt", self.input_key, PROMPT_KEYS))
        chats = {key: chat for key, value in found.items() if (chat := messages_in(value)) is not None}
        texts = {key: value for key, value in found.items() if key not in chats and isinstance(value, str)}
        values = {key: chats.get(key, value) for key, value in found.items()}
        first = next(iter(values))
        if first == "prompt" and not (first in chats and closes_with_assistant(chats[first])):
            return values[first], None
        solved = [key for key, chat in chats.items() if closes_with_assistant(chat)]
        texts.pop("prompt", None)
        if solved and texts:
            return _same(row, texts, "prompt", "data.input_key"), PROBLEM_USED
        open_chats = {key: chat for key, chat in chats.items() if key not in solved}
        for chat in open_chats.values():
            said = "\n".join(message["content"] for message in chat if isinstance(message.get("content"), str))
            if all(text.strip() in said for text in texts.values()):
                return chat, None
        return _same(row, values, "prompt", "data.input_key"), None

    def truth(self, row: Row, verifier: str) -> Any:
        """The truth as the row has it. Raises PromptError without one, or with several that differ."""
        if self.label_key != ANSWER_KEYS[0]:
            return cut_solution(self._chosen(row, "answer", self.label_key), verifier, row.where, is_solution=False)
        found = self._filled(row, ANSWER_KEYS)
        if "answer" in found:
            found = {key: found[key] for key in ("answer", "reward_model.ground_truth") if key in found}
        if not found:
            found = self._filled(row, (SOLUTION_KEY,))
            if not found:
                raise PromptError(describe_missing(row, "answer", self.label_key, (*ANSWER_KEYS, SOLUTION_KEY)))
            return cut_solution(found[SOLUTION_KEY], verifier, row.where, is_solution=True)
        if len(found) == 1:
            (value,) = found.values()
            return cut_solution(value, verifier, row.where, is_solution=False)
        texts = {key: truth_text(value, verifier, row.where).strip() for key, value in found.items()}
        if len(set(texts.values())) > 1:
            raise PromptError(_ambiguous(row, texts, "truth", "data.label_key"))
        return next(iter(found.values()))

    def _chosen(self, row: Row, what: str, key: str) -> Any:
        value = lookup(row.values, key)
        if _is_empty(value):
            raise PromptError(describe_missing(row, what, key, ()))
        return value

    def _filled(self, row: Row, keys: tuple[str, ...]) -> dict[str, Any]:
        """The non-empty values under `keys`, whatever the case of a column's letters, in the order of `keys`."""
        names = tuple(row.values)
        present = self._present.get((names, keys))
        if present is None:
            present = self._present[names, keys] = _present(names, keys)
        return {key: value for key, name in present if not _is_empty(value := lookup(row.values, name))}


def reference(row: Row, key: str, truth: Any) -> str:
    """The row's reference text, or nothing. A value that is no text is refused only under a key that was chosen."""
    chosen = key != REFERENCE_KEYS[0]
    for k in (key,) if chosen else REFERENCE_KEYS:
        value = lookup(row.values, k)
        if isinstance(value, str) and value.strip():
            return value
        if chosen and value is not MISSING and value is not None and not isinstance(value, str):
            raise PromptError(f"{row.where}: {k} is {type(value).__name__}, expected a text (data.reference_key)")
    has_reasoning = isinstance(truth, str) and "#### " in truth and truth_text(truth, "", row.where) != truth
    return truth if has_reasoning and not chosen else ""


def _present(names: tuple[str, ...], keys: tuple[str, ...]) -> list[tuple[str, str]]:
    """(key, column or dotted path) of the keys that a row with these columns may have a value for."""
    spelling = {name.casefold(): name for name in reversed(names)}
    out = []
    for key in keys:
        if key in names:
            out.append((key, key))
        elif key in spelling:
            out.append((key, spelling[key]))
        elif key.partition(".")[0] in names and "." in key:
            out.append((key, key))
    return out


def _is_empty(value: Any) -> bool:
    # Not `not value`: 0 and false are truths.
    return value is MISSING or value is None or value in ("", [])


def _same(row: Row, found: dict[str, Any], what: str, option: str) -> Any:
    """The first of the values, which have to be one text. Raises PromptError naming the columns when they differ."""
    texts = {key: value.strip() if isinstance(value, str) else str(value) for key, value in found.items()}
    if len(set(texts.values())) > 1:
        raise PromptError(_ambiguous(row, texts, what, option))
    return next(iter(found.values()))


def _ambiguous(row: Row, texts: dict[str, str], what: str, option: str) -> str:
    shown = ", ".join(f"{key} ({text[:40]!r})" for key, text in texts.items())
    return (
        f"{row.where}: {len(texts)} columns may hold the {what}, and they differ: {shown}; set {option} to one of "
        f"{', '.join(texts)}"
    )
