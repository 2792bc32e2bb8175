"""Between two turns: what templates write, as ids behind the sampled ones, and templates that rewrite history."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.properties import examples
from treepo_mega.config.run import DataConfig
from treepo_mega.data.dialogue import Dialogue, DialogueError

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}]

HEAD = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
LOOP = "{% for m in messages %}"
TOOL = (
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    # As expressions: Jinja drops a line break behind a block.
    "{{ '\\n<tool_response>\\n' }}{{ m.content }}{{ '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
TAIL = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(assistant: str = "{{ m.content }}", tool: str = TOOL, end: str = "<|im_end|>") -> str:
    """A ChatML template; `assistant` is how it shows what the policy said."""
    return (
        f"{HEAD}{LOOP}{{% if m.role == 'user' %}}<|im_start|>user\n{{{{ m.content }}}}<|im_end|>\n"
        f"{{% elif m.role == 'assistant' %}}<|im_start|>assistant\n{assistant}{end}\n{tool}{TAIL}"
    )


def tokenizer(chat_template: str | None) -> Any:
    """Bytes, and three marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>")
    made.chat_template = chat_template
    return made


@cache
def dialogue(chat_template: str | None, **options: Any) -> Dialogue:
    made = tokenizer(chat_template)
    ends = [made.convert_tokens_to_ids(mark) for mark in ("<|im_end|>", "<|endoftext|>")]
    return Dialogue(made, data_config(), TOOLS, ends, **options)


def data_config(**changes: Any) -> DataConfig:
    return DataConfig(train=[{"path": "x.jsonl"}], **changes)


def test_what_stands_between_two_turns() -> None:
    between = dialogue(template())
    said = "\n<|im_start|>user\n<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response><|im_end|>\n"
    assert between.answer_text(["4", "5"]) == f"{said}<|im_start|>assistant\n"
    made = tokenizer(template())
    assert made.decode(between.answer(["4", "5"])) == between.answer_text(["4", "5"])


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=3)


@examples(60)
@given(st.lists(texts, min_size=1, max_size=3))
def test_exact_ids_are_those_of_the_whole_dialogue(rounds: list[list[str]]) -> None:
    """Sampled ids and what stands between them, joined, are what the template makes of the dialogue at once."""
    made = tokenizer(template())
    between = dialogue(template())
    messages: list[dict[str, Any]] = [{"role": "user", "content": "a question"}]
    ids = made(render(made, messages), add_special_tokens=False)["input_ids"]
    for number, answers in enumerate(rounds):
        turn = f"turn {number} <tool_call>{{}}</tool_call>"
        ids += made(turn + "<|im_end|>", add_special_tokens=False)["input_ids"]
        ids += between.answer(answers)
        messages.append({"role": "assistant", "content": turn})
        messages += [{"role": "tool", "content": answer} for answer in answers]
    assert made.decode(ids) == render(made, messages)


def render(made: Any, messages: list[dict[str, Any]]) -> str:
    return str(made.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True))


DROPS_THINKING = (
    "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
)


@pytest.mark.parametrize(
    ("chat_template", "said"),
    [
        (None, "no chat template"),
        (template(assistant=DROPS_THINKING), "rewrites history: after the turn '<think>"),
        (template(assistant="{{ m.content | trim }}"), "rewrites history: after the turn '  with space"),
        (template(assistant="{{ m.content[:0] }}"), "leaves out what the assistant said"),
        (template(tool=""), "does not show what tools return"),
        (template(tool="{% elif m.role == 'tool' %}{{ raise_exception('no tools') }}"), "refuses messages of user"),
        (template(end="</s>"), "ends the assistant's turn with '</s>"),
    ],
)
def test_templates_that_cannot_be_used_say_why(chat_template: str | None, said: str) -> None:
    with pytest.raises(DialogueError) as caught:
        dialogue(chat_template)
    assert said in str(caught.value)


def test_a_rewriting_template_may_be_kept_by_choice() -> None:
    between = dialogue(template(assistant=DROPS_THINKING), history="keep")
    assert "<tool_response>\n4\n</tool_response>" in between.answer_text(["4"])


THINKS = TAIL.replace("assistant\n", "assistant\n<think>\n")
"""A generation prompt that opens a reasoning block, which no history shows."""
REWRITING = {
    "as it was said": template(),
    "drops reasoning": template(assistant=DROPS_THINKING),
    "trims": template(assistant="{{ m.content | trim }}"),
    "opens the reasoning": template(assistant=DROPS_THINKING).replace(TAIL, THINKS),
    "moves it": template(assistant="{{ ' ' ~ m.content }}"),
}
said = st.sampled_from(["", "<think>\nwhy\n</think>\n\n", "  ", "why\n</think>"])
turns = st.tuples(said, st.text(st.characters(exclude_categories=["Cs"]), max_size=12), said).map("".join)


@examples(150)
@given(st.sampled_from(sorted(REWRITING)), st.lists(st.tuples(turns, texts), min_size=1, max_size=4))
def test_a_fork_sees_what_a_server_shows_and_keeps_the_ids_that_it_may(name, rounds) -> None:
    made = tokenizer(REWRITING[name])
    between = dialogue(REWRITING[name], history="fork")
    messages: list[dict[str, Any]] = [{"role": "user", "content": "a question"}]
    context = made(render(made, messages), add_special_tokens=False)["input_ids"]
    for turn, answers in rounds:
        ids = made(turn + "<|im_end|>", add_special_tokens=False)["input_ids"]
        seen = [*context, *ids]
        behind = between.behind(seen, ids, answers)
        context = [*seen[: len(seen) - behind.hidden], *behind.ids]
        messages.append({"role": "assistant", "content": turn})
        messages += [{"role": "tool", "content": answer} for answer in answers]
        assert made.decode(context) == render(made, messages), "what a model behind a server with this template sees"
        assert behind.ids[behind.restated :] == between.answer(answers)
        untouched = name == "as it was said"
        assert behind.hidden == behind.restated == 0 or not untouched
        # No id is given up that could have stayed.
        begin = len(seen) - behind.hidden
        assert not behind.hidden or not behind.ids or behind.ids[0] != seen[begin]


LATER = (
    "{% if loop.index0 < messages | length - 3 and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
)


def test_a_template_that_comes_back_to_a_turn_cannot_be_followed() -> None:
    with pytest.raises(DialogueError, match=r"comes back to the turn '<think>.*keep"):
        dialogue(template(assistant=LATER), history="fork")


def test_a_context_that_does_not_end_as_the_template_says_is_named() -> None:
    between = dialogue(REWRITING["opens the reasoning"], history="fork")
    made = tokenizer(None)
    turn = made("why</think>four<|im_end|>", add_special_tokens=False)["input_ids"]
    other = made("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    with pytest.raises(DialogueError, match=r"rewrites '<think>.*from the generation prompt of a turn on"):
        between.behind([*other, *turn], turn, ["4"])
