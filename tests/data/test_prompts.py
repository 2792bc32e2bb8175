"""Reading prompts: both file kinds, slices, keys, templates, ids, drops, and errors that say where."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from treepo_mega.config import DataConfig, PromptSource
from treepo_mega.data.prompts import PromptSet, load_prompts
from treepo_mega.data.rows import PromptError

SYMBOLS = ["<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|system|>", "<|assistant|>"]
SYMBOLS += [chr(c) for c in range(32, 127)] + ["\n"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def make_tokenizer(*, template: str | None = TEMPLATE, single: str = "<bos> $A") -> PreTrainedTokenizerFast:
    """One id per character; plain text gets <bos> in front (and whatever else `single` says)."""
    tok = Tokenizer(models.WordLevel({s: i for i, s in enumerate(SYMBOLS)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tok.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|system|>", "<|assistant|>"]})
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def ids(text: str) -> list[int]:
    return [SYMBOLS.index(c) for c in text]


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def load(path: str, tokenizer: Any, *, source: dict[str, Any] | None = None, **data: Any) -> PromptSet:
    sources = [PromptSource(path=path, **(source or {}))]
    return load_prompts(sources, DataConfig(train=sources, **data), tokenizer)


def test_plain_strings(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "add.jsonl", {"prompt": "1+1", "answer": "2"}, "", {"prompt": "2+2", "answer": 4})
    got = load(path, tokenizer, prompt_suffix="=")
    assert [p.id for p in got] == ["add:0", "add:1"]
    assert [p.text for p in got] == ["1+1=", "2+2="]
    assert [p.tokens for p in got] == [[1, *ids("1+1=")], [1, *ids("2+2=")]]
    assert [p.answer for p in got] == ["2", "4"]
    assert {(p.verifier, p.data_source) for p in got} == {("math", "add")}
    assert got.dropped == {}


def test_messages_go_through_the_template_once(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "hi"}], "answer": "x"},
        {"prompt": [{"role": "system", "content": "old"}, {"role": "user", "content": "yo"}], "answer": "x"},
    ]
    got = load(jsonl(tmp_path / "chat.jsonl", *rows), tokenizer, system_prompt="Be brief.", prompt_suffix="!")
    assert got.prompts[0].text == "<|system|>Be brief.<|user|>hi!<|assistant|>"
    assert got.prompts[0].tokens == [5, *ids("Be brief."), 4, *ids("hi!"), 6], "no <bos> is added to templated text"
    assert got.prompts[1].text == "<|system|>Be brief.<|user|>yo!<|assistant|>"


def test_a_string_is_wrapped_on_request(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "hi", "answer": "x"})
    assert load(path, tokenizer, apply_chat_template=True).prompts[0].text == "<|user|>hi<|assistant|>"


def test_an_eos_that_the_tokenizer_appends_is_taken_off(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "hi", "answer": "x"})
    assert load(path, make_tokenizer(single="<bos> $A <eos>")).prompts[0].tokens == [1, *ids("hi")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "label": "7"},
        {"question": "q", "ground_truth": "7"},
        {"problem": "q", "solution": "7"},
        {"prompt": "q", "reward_model": {"style": "rule", "ground_truth": "7"}},
        {"prompt": "q", "answer": "Three and four make seven.\n#### 7"},
        {"prompt": "q", "answer": "", "label": "7"},
        {"prompt": "q", "answer": 7},
    ],
)
def test_common_names_of_the_keys(tmp_path: Path, tokenizer: Any, row: dict[str, Any]) -> None:
    (prompt,) = load(jsonl(tmp_path / "a.jsonl", row), tokenizer)
    assert (prompt.text, prompt.answer) == ("q", "7")


@pytest.mark.parametrize(
    "row, reference",
    [
        ({"answer": "7", "solution": "3+4=7"}, "3+4=7"),
        ({"answer": "7", "target": "3+4=7"}, "3+4=7"),
        ({"solution": "3+4=7"}, "3+4=7"),
        ({"answer": "Three and four.\n#### 7"}, "Three and four.\n#### 7"),
        ({"answer": "7", "target": 7}, ""),
        ({"answer": "7", "solution": " "}, ""),
        ({"answer": "7"}, ""),
    ],
)
def test_a_row_may_have_a_reference_text(tmp_path: Path, tokenizer: Any, row: dict[str, Any], reference: str) -> None:
    (prompt,) = load(jsonl(tmp_path / "a.jsonl", {"prompt": "q", **row}), tokenizer)
    assert prompt.reference == reference


def test_a_chosen_reference_key_is_not_guessed_around(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "q", "answer": "reasoning\n#### 7", "solution": "trap", "extra_info": {"answer": "3+4=7"}}
    path = jsonl(tmp_path / "a.jsonl", row, {**row, "extra_info": {}})
    assert [p.reference for p in load(path, tokenizer, reference_key="extra_info.answer")] == ["3+4=7", ""]
    path = jsonl(tmp_path / "b.jsonl", {**row, "why": ["3+4=7"]})
    with pytest.raises(PromptError, match=r"b\.jsonl, line 1: why is list, expected a text \(data\.reference_key\)"):
        load(path, tokenizer, reference_key="why")


def test_chosen_keys_reach_inside_and_are_not_guessed_around(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"x": {"q": "deep"}, "y.z": "flat", "answer": "trap"})
    (prompt,) = load(path, tokenizer, input_key="x.q", label_key="y.z")
    assert (prompt.text, prompt.answer) == ("deep", "flat")
    with pytest.raises(PromptError, match=r"line 1: no answer: tried final; keys here: x, x.q, y.z, answer"):
        load(path, tokenizer, input_key="x.q", label_key="final")


def test_verls_columns_in_parquet(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "verl.parquet"
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "reward_model": {"ground_truth": str(i), "style": "rule"},
            "extra_info": {"index": i, "when": datetime.date(2026, 1, 2)},
        }
        for i in range(5)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    got = load(f"{path}@[1:-1]", tokenizer)
    assert [p.id for p in got] == ["verl:1", "verl:2", "verl:3"]
    assert [p.answer for p in got] == ["1", "2", "3"]
    assert got.prompts[0].data_source == "openai/gsm8k"
    assert got.prompts[0].extra == {"index": 1, "when": "2026-01-02"}


@pytest.mark.parametrize("cut, expected", [("[0:2]", [0, 1]), ("[3:]", [3, 4]), ("[:-3]", [0, 1]), ("[-1:]", [4])])
def test_slices_keep_the_rows_names(tmp_path: Path, tokenizer: Any, cut: str, expected: list[int]) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": str(i), "answer": "x"} for i in range(5)))
    assert [p.id for p in load(f"{path}@{cut}", tokenizer)] == [f"a:{i}" for i in expected]


def test_ids_never_repeat(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "b").mkdir()
    row = {"prompt": "q", "answer": "x"}
    first, second = jsonl(tmp_path / "a.jsonl", row, row), jsonl(tmp_path / "b" / "a.jsonl", row)
    sources = [PromptSource(path=p) for p in (first, second, f"{first}@[0:1]")]
    got = load_prompts(sources, DataConfig(train=sources), tokenizer)
    assert [p.id for p in got] == ["a:0", "a:1", "a#2:0", "a#3:0"]


def test_long_prompts_are_dropped_counted_and_reported(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": "x" * n, "answer": "x"} for n in (3, 9, 10, 99)))
    got = load(path, tokenizer, max_prompt_len=10)
    assert [p.id for p in got] == ["a:0", "a:1"]
    assert got.dropped == {"too_long": 2}
    assert got.notes == [
        f"2 of 4 prompts dropped: longer than data.max_prompt_len = 10 tokens; such as {path}, line 3: 11 tokens"
    ]
    with pytest.raises(PromptError, match=r"left of 4: dropped \{'too_long': 4\}.*a.jsonl, line 1: 4 tokens"):
        load(path, tokenizer, max_prompt_len=2)


def test_text_that_the_tokenizer_cannot_spell_is_reported(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "ok", "answer": "x"}, {"prompt": "\u00e9", "answer": "x"})
    assert load(path, tokenizer).notes == [
        "1 of 2 prompts hold text that the tokenizer cannot spell (unknown token), such as a:1"
    ]


def test_each_source_has_its_verifier(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "q", "answer": "x"})
    assert load(path, tokenizer, verifier="boxed").prompts[0].verifier == "boxed"
    assert load(path, tokenizer, verifier="boxed", source={"verifier": "exact"}).prompts[0].verifier == "exact"
    with pytest.raises(PromptError, match=r"a.jsonl: unknown verifier 'maths' \(did you mean 'math'\?\)"):
        load(path, tokenizer, verifier="maths")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "q", "answer": }', r"bad.jsonl, line 3: not valid JSON: Expecting value.*'\{\"prompt\""),
        ("[1, 2]", r"bad.jsonl, line 3: expected a JSON object, got list"),
        ("[" * 100_000, r"bad.jsonl, line 3: not valid JSON"),
        (
            '{"promt": "q", "answer": "x"}',
            r"line 3: no prompt: tried prompt, .*keys here: promt, answer \(did you mean 'promt'\?\)",
        ),
        ('{"prompt": "q", "anwser": "x"}', r"line 3: no answer: .*\(did you mean 'anwser'\?\) \(set data.label_key\)"),
        ('{"prompt": "q", "answer": null}', r"line 3: no answer"),
        ('{"prompt": "", "answer": "x"}', r"line 3: no prompt: 'prompt' is empty \(data.input_key"),
        ('{"prompt": " \\n", "answer": "x"}', r"line 3: the prompt is empty: nothing but white space"),
        ('{"prompt": 3, "answer": "x"}', r"line 3: the prompt is neither a string nor a list of messages"),
        ('{"prompt": [{"role": "user"}], "answer": "x"}', r"line 3: the prompt is neither"),
        ('{"prompt": [{"role": "assistant", "content": "a"}], "answer": "x"}', r"from 'assistant'; expected 'user'"),
        ('{"prompt": "\\ud800", "answer": "x"}', r"line 3: the prompt is not valid Unicode"),
        ('{"prompt": "q", "answer": "x", "extra_info": [1]}', r"line 3: extra_info is list, expected a mapping"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Any, line: str, message: str) -> None:
    path = jsonl(tmp_path / "bad.jsonl", {"prompt": "q", "answer": "x"}, "", line)
    with pytest.raises(PromptError, match=message):
        load(path, tokenizer)
    assert len(load(f"{path}@[0:1]", tokenizer)) == 1, "rows outside the slice are not looked at"


def test_bad_files_are_named(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "train.jsonl", {"prompt": "q", "answer": "x"})
    with pytest.raises(PromptError, match=r"trian.jsonl: no such file \(did you mean 'train.jsonl'\?\)"):
        load(str(tmp_path / "trian.jsonl"), tokenizer)
    with pytest.raises(PromptError, match=r"unknown kind of file; expected .jsonl, .json or .parquet"):
        load(str(tmp_path / "train.csv"), tokenizer)
    with pytest.raises(PromptError, match=r"malformed slice; expected path@\[a:b\]"):
        load(f"{path}@[0-5]", tokenizer)
    with pytest.raises(PromptError, match="the slice has no rows"):
        load(f"{path}@[5:]", tokenizer)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(PromptError, match=r"empty.jsonl: no rows"):
        load(str(tmp_path / "empty.jsonl"), tokenizer)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9", "answer": "x"}\n')
    with pytest.raises(PromptError, match=r"latin.jsonl, line 1: not UTF-8"):
        load(str(tmp_path / "latin.jsonl"), tokenizer)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is not parquet")
    with pytest.raises(PromptError, match=r"bad.parquet: cannot read the parquet file"):
        load(str(tmp_path / "bad.parquet"), tokenizer)


def test_what_needs_a_chat_template_says_so(tmp_path: Path) -> None:
    bare = make_tokenizer(template=None)
    chat = jsonl(tmp_path / "chat.jsonl", {"prompt": [{"role": "user", "content": "q"}], "answer": "x"})
    with pytest.raises(PromptError, match="the tokenizer has no chat template"):
        load(chat, bare)
    plain = jsonl(tmp_path / "plain.jsonl", {"prompt": "q", "answer": "x"})
    with pytest.raises(PromptError, match=r"data.system_prompt needs data.apply_chat_template"):
        load(plain, bare, system_prompt="s")
