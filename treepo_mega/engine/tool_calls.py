"""Tool calls in what a policy said, read by vLLM's own parsers: hermes, llama3_json, qwen3_coder, ...

    reader = ToolCallReader("hermes", tokenizer, manifest.tools)
    for call in reader.read(text): ...          # a ToolCall, or a Malformed that says what is wrong with it
    # no call: the turn was the last one

A parser answers `no call` for text that it cannot read as well. What begins like a call and is none is told apart here:
the policy has to hear of it, and must not end its trajectory by it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from treepo_mega.environment.state import ToolCall
from treepo_mega.errors import TreepoError, nearest

MARKS = ("tool_call_start_token", "tool_calls_start_token", "tool_call_begin_token", "bot_token")
"""Attributes by which vLLM's parsers name the text that begins a call."""

MAX_CALLS = 16
"""Calls of one turn that are made; a policy that repeats itself may write hundreds."""


class ToolParserError(TreepoError):
    """The parser is unknown, or does not fit the tokenizer."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """A call that cannot be made, and what is said to the policy instead of an answer."""

    reason: str


class ToolCallReader:
    """One parser for one tokenizer. `tools`: JSON schemas, as `environment.Manifest` has them."""

    def __init__(self, parser: str, tokenizer: Any, tools: Sequence[dict[str, Any]]) -> None:
        """Raises ToolParserError with the nearest name for an unknown parser, and with vLLM's words for a misfit."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tool_parsers import ToolParserManager

        known = sorted({*ToolParserManager.tool_parsers, *ToolParserManager.lazy_parsers})
        if parser not in known:
            raise ToolParserError(
                f"tool parser {parser!r}: vLLM has none of that name{nearest(parser, known)}; it has {', '.join(known)}"
            )
        self._request = ChatCompletionRequest(messages=[{"role": "user", "content": ""}], tools=list(tools))
        # Typed loosely: a request's tools are of fewer kinds than a parser takes, and lists do not vary with them.
        loosely: Any = ToolParserManager.get_tool_parser(parser)
        self._make: Callable[..., Any] = loosely
        self._tokenizer = tokenizer
        try:
            made = self._make(tokenizer, self._request.tools)
        except Exception as error:
            raise ToolParserError(f"tool parser {parser!r} does not fit the tokenizer: {error}") from None
        marks = (getattr(made, name, None) for name in MARKS)
        self._marks = tuple(mark for mark in marks if isinstance(mark, str) and mark)

    def read(self, text: str) -> list[ToolCall | Malformed]:
        """The calls of a turn, in order; none when it holds no call."""
        # A new one each time: parsers keep state between the parts of a stream.
        parser = self._make(self._tokenizer, self._request.tools)
        try:
            with _quiet():
                found = parser.extract_tool_calls(text, self._request)
        # Text of a model: whatever a parser meets in it must not end the run.
        except Exception as error:
            return [Malformed(f"the tool call cannot be read: {type(error).__name__}: {str(error)[:200]}")]
        if not found.tools_called:
            # It begins like a call: the mark, or JSON where that is the whole form.
            begins = any(mark in text for mark in self._marks) or text.lstrip().startswith('{"name"')
            return (
                [Malformed("the tool call cannot be read; expected valid JSON in the form of the tools")]
                if begins
                else []
            )
        calls = [_read_call(call.function.name, call.function.arguments) for call in found.tool_calls]
        over = len(calls) - MAX_CALLS
        if over > 0:
            calls = [*calls[:MAX_CALLS], Malformed(f"{over} more calls were not made: at most {MAX_CALLS} in a turn")]
        return calls


def _read_call(name: str, arguments: str) -> ToolCall | Malformed:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        return Malformed(f"{name}: the arguments are not JSON: {error}")
    if not isinstance(value, dict):
        return Malformed(f"{name}: the arguments are no JSON object but {type(value).__name__}")
    return ToolCall(name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the traceback that vLLM logs for every text that is no call."""
    logger = logging.getLogger("vllm.tool_parsers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
