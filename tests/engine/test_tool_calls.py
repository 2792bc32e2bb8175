"""Tool calls by vLLM's parsers: those that are read, and text that only looks like one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_dialogue import TOOLS, tokenizer
from tests.properties import examples
from treepo_mega.engine.tool_calls import MAX_CALLS, Malformed, ToolCallReader, ToolParserError
from treepo_mega.environment.state import ToolCall


@pytest.fixture(scope="module")
def hermes() -> ToolCallReader:
    return ToolCallReader("hermes", tokenizer(None), TOOLS)


def call(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_calls_are_read_in_order(hermes: ToolCallReader) -> None:
    text = f"I add.\n{call('add', {'x': 1})}\n{call('look', {})}"
    assert hermes.read(text) == [ToolCall("add", {"x": 1}), ToolCall("look", {})]
    assert hermes.read("The answer is 4.") == []


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{'name': 'add'}</tool_call>",
        "<tool_call>",
        '<tool_call>{"name": "add"}</tool_call>',
        '{"name": "add", "arguments": {}',
        "<tool_call>" * 50,
        "<tool_call>" + "[" * 5000,
    ],
)
def test_what_begins_like_a_call_is_told_apart(hermes: ToolCallReader, text: str) -> None:
    (read,) = hermes.read(text)
    assert isinstance(read, Malformed)
    assert "cannot be read" in read.reason


def test_arguments_have_to_be_an_object(hermes: ToolCallReader) -> None:
    (read,) = hermes.read(call("add", [1, 2]))
    assert read == Malformed("add: the arguments are no JSON object but list")


def test_a_turn_makes_so_many_calls_at_most(hermes: ToolCallReader) -> None:
    read = hermes.read(call("add", {}) * (MAX_CALLS + 3))
    assert len(read) == MAX_CALLS + 1
    assert isinstance(read[-1], Malformed)
    assert read[-1].reason.startswith("3 more calls")


@examples(80)
@given(st.text(st.sampled_from('<tool_call>/{}[]":,\\naddrgumentx1 \u00e9'), max_size=80))
def test_no_text_ends_the_run(text: str) -> None:
    reader = ToolCallReader("hermes", tokenizer(None), TOOLS)
    assert all(isinstance(read, ToolCall | Malformed) for read in reader.read(text))


def test_an_unknown_parser_is_named_with_the_nearest() -> None:
    with pytest.raises(ToolParserError, match="did you mean 'hermes'"):
        ToolCallReader("herms", tokenizer(None), TOOLS)


def test_a_parser_that_does_not_fit_says_why() -> None:
    with pytest.raises(ToolParserError, match="does not fit the tokenizer"):
        ToolCallReader("llama3_json", tokenizer(None), TOOLS)
