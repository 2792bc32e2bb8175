"""Inputs of people whose prompts were read wrongly or not at all: chats with solutions, text for messages, paths."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_mega.config import DataConfig, PromptSource
from treepo_mega.data.chat import messages_in
from treepo_mega.data.cursor import PromptCursor, deal
from treepo_mega.data.files import find_parts
from treepo_mega.data.hub import find_hub_parts, hub_id
from treepo_mega.data.prompts import Prompt, PromptSet, load_prompts
from treepo_mega.data.rows import PromptError

USER = {"role": "user", "content": "What is 3+4?"}
SOLVED = [USER, {"role": "assistant", "content": "\\boxed{7}"}]


class Letters:
    """A tokenizer with a token a character, which puts BOS (id 1) before plain text; `<s>` spells BOS."""

    bos_token_id = 1
    eos_token_id = 2
    bos_token = "<s>"
    eos_token = "</s>"
    unk_token_id = None
    chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    calls = 0

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
        self.calls += len(texts)
        return {"input_ids": [[1] * add_special_tokens + self._ids(text) for text in texts]}

    def _ids(self, text: str) -> list[int]:
        return [1 if char == "\0" else ord(char) for char in text.replace("<s>", "\0")]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return "".join(f"[{message['role']}]{message['content']}" for message in messages)


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Any, *, vocab_size: int | None = None, source: dict[str, Any] | None = None, **data: Any) -> PromptSet:
    cfg = DataConfig(train=[{"path": str(path) if isinstance(path, Path) else path, **(source or {})}], **data)
    return load_prompts(cfg.train, cfg, Letters(), vocab_size=vocab_size)


def load_rows(folder: Path, *rows: Any, **options: Any) -> PromptSet:
    return load(jsonl(folder / "t.jsonl", *rows), **options)


# Case 13: a chat that holds its solution.


@pytest.mark.parametrize("name", ["problem", "question", "Problem"])
def test_the_problem_is_used_where_the_messages_hold_its_solution(tmp_path: Path, name: str) -> None:
    row = {name: "What is 3+4?", "solution": "3+4=7, so \\boxed{7}.", "answer": "7", "messages": SOLVED}
    got = load_rows(tmp_path, row, row)
    assert [(p.text, p.answer) for p in got] == [("What is 3+4?", "7")] * 2
    assert got.prompts[0].reference == "3+4=7, so \\boxed{7}."
    said = [note for note in got.notes if "the column with the problem is used" in note]
    assert len(said) == 1 and "t.jsonl, line 1 and 1 more rows" in said[0]


@pytest.mark.parametrize("key", ["prompt", "messages", "conversations"])
def test_a_closing_assistant_turn_is_left_out_where_there_is_no_problem(tmp_path: Path, key: str) -> None:
    got = load_rows(tmp_path, {key: SOLVED, "answer": "7"})
    assert got.prompts[0].text == "[user]What is 3+4?"
    assert [note for note in got.notes if "which holds the solution, is left out of the prompt" in note]
    # A chosen key is not guessed around, and its solution is left out all the same.
    chosen = load_rows(tmp_path, {key: SOLVED, "answer": "7", "problem": "trap"}, input_key=key)
    assert "boxed" not in chosen.prompts[0].text


def test_only_the_closing_turns_are_dropped(tmp_path: Path) -> None:
    chat = [*SOLVED, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    got = load_rows(tmp_path, {"messages": chat, "answer": "7"})
    assert got.prompts[0].text == "[user]What is 3+4?[assistant]\\boxed{7}[user]Sure?"


Turn = st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(st.characters(codec="ascii"), max_size=5))


@given(turns=st.lists(Turn, min_size=1, max_size=6), spelling=st.sampled_from(["list", "json", "python"]))
@settings(max_examples=150, deadline=None)
def test_no_prompt_ends_with_its_solution_however_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[str, str]], spelling: str
) -> None:
    chat = [{"role": role, "content": content} for role, content in turns]
    prompt = {"list": chat, "json": json.dumps(chat), "python": str(chat)}[spelling]
    folder = tmp_path_factory.mktemp("turns")
    kept = list(turns)
    while kept and kept[-1][0] == "assistant":
        kept.pop()
    if not kept or kept[-1][0] != "user":
        with pytest.raises(PromptError, match=r"t\.jsonl, line 1: the last message is from '\w+'; expected 'user'"):
            load_rows(folder, {"prompt": prompt, "answer": "7"})
        return
    (got,) = load_rows(folder, {"prompt": prompt, "answer": "7"})
    assert got.text == "".join(f"[{role}]{content}" for role, content in kept)


# Case 14: messages as text.


@pytest.mark.parametrize("text", [json.dumps([USER]), str([USER]), "  " + json.dumps([USER], indent=1)])
def test_messages_as_json_or_python_text_are_read(tmp_path: Path, text: str) -> None:
    assert load_rows(tmp_path, {"prompt": text, "answer": "7"}).prompts[0].text == "[user]What is 3+4?"


@pytest.mark.parametrize(
    "text", ["[1, 2] + [3] = ?", "[]", '["role", "content"]', "[a, b] is an interval", "{'role': 1}"]
)
def test_other_texts_that_begin_with_a_bracket_stay_text(tmp_path: Path, text: str) -> None:
    got = load_rows(tmp_path, {"prompt": text, "answer": "7"})
    assert got.prompts[0].text == text
    assert got.notes == []


def test_messages_that_are_cut_off_are_named(tmp_path: Path) -> None:
    got = load_rows(tmp_path, {"prompt": json.dumps([USER])[:-3], "answer": "7"})
    assert ["begins like a list of messages" in note for note in got.notes] == [True]


@given(st.text(max_size=40) | st.text("[](){}'\":,0x \\", max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_reader_of_messages(text: str) -> None:
    found = messages_in("[" + text)
    assert found is None or all(isinstance(message["content"], str) for message in found)


def test_names_of_sharegpt_and_parts_of_text(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "answer": "7"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "answer": "7"},
    ]
    assert [p.text for p in load_rows(tmp_path, *rows)] == ["[user]a"] * 2
    with pytest.raises(PromptError, match="neither a string nor a list of messages"):
        load_rows(tmp_path, {"messages": [{"role": "user", "content": [{"type": "image"}]}], "answer": "7"})


# Cases 31 and 37: tokens that the model does not have, and a second BOS.


def test_a_token_beyond_the_vocabulary_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"t\.jsonl, line 2: the prompt has token 122 \('z'\).*ids below 122"):
        load_rows(tmp_path, {"prompt": "a", "answer": "1"}, {"prompt": "xyz", "answer": "1"}, vocab_size=122)
    assert len(load_rows(tmp_path, {"prompt": "xy", "answer": "1"}, vocab_size=122)) == 1


@given(marks=st.integers(0, 2), chat=st.booleans())
@settings(max_examples=12, deadline=None)
def test_no_prompt_begins_with_two_bos(tmp_path_factory: pytest.TempPathFactory, marks: int, chat: bool) -> None:
    folder = tmp_path_factory.mktemp("bos")
    prompt = "<s>" * min(marks, 1) + "hi"
    got = load_rows(folder, {"prompt": prompt, "answer": "1"}, apply_chat_template=chat)
    tokens = got.prompts[0].tokens
    assert tokens[:2] != [1, 1]
    if not chat:
        assert tokens == [1, *map(ord, "hi")]
        assert bool(got.notes) == (marks > 0)


# Case 17: globs, directories, several files, compression, slices, weights.


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A directory with two parquet shards of three rows each."""
    for i in range(2):
        rows = [{"prompt": f"q{3 * i + k}", "answer": "1"} for k in range(3)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"train-{i:05d}-of-00002.parquet")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / ".train-00002.parquet.part").write_text("x")
    return tmp_path


@pytest.mark.parametrize("name", ["", "*.parquet", "*", "train-0000?-of-00002.parquet", "**/*.parquet"])
@pytest.mark.parametrize("cut, wanted", [("", range(6)), ("@[2:4]", [2, 3]), ("@[-1:]", [5]), ("@[:-4]", [0, 1])])
def test_directories_and_globs_of_shards_with_slices(shards: Path, name: str, cut: str, wanted: Any) -> None:
    got = load(f"{shards}/{name}{cut}")
    assert [p.text for p in got] == [f"q{i}" for i in wanted]
    assert [p.id for p in got] == [f"train-{i // 3:05d}-of-00002:{i % 3}" for i in wanted]


def test_a_list_of_files_in_one_source(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS", str(shards))
    got = load(["$SHARDS/train-00001-of-00002.parquet@[0:1]", f"{shards}/train-00000*"])
    assert [p.text for p in got] == ["q3", "q0", "q1", "q2"]


@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    start=st.none() | st.integers(-9, 9),
    stop=st.none() | st.integers(-9, 9),
)
@settings(max_examples=100, deadline=None)
def test_a_slice_of_many_files_is_the_slice_of_their_rows(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], start: int | None, stop: int | None
) -> None:
    folder = tmp_path_factory.mktemp("slices")
    rows = [(f"f{i}", k) for i, count in enumerate(counts) for k in range(count)]
    for i, count in enumerate(counts):
        jsonl(folder / f"f{i}.jsonl", *({"k": k} for k in range(count)))
    spec = f"{folder}@[{'' if start is None else start}:{'' if stop is None else stop}]"
    wanted = rows[start:stop]
    try:
        got = [(part.name, row.index) for part in find_parts(spec) for row in part.rows()]
    except PromptError:  # the slice has no rows, which is sometimes known without reading
        got = []
    assert got == wanted


def test_a_directory_of_one_clone_is_read_and_two_subsets_are_not_mixed(shards: Path, tmp_path: Path) -> None:
    inner = tmp_path / "clone" / "data"
    inner.mkdir(parents=True)
    jsonl(inner / "train.jsonl", {"prompt": "q", "answer": "1"})
    assert [p.id for p in load(str(tmp_path / "clone"))] == ["train:0"]
    (tmp_path / "clone" / "other").mkdir()
    jsonl(tmp_path / "clone" / "other" / "train.jsonl", {"prompt": "q", "answer": "1"})
    with pytest.raises(PromptError, match="its prompt files stand in 2 subdirectories"):
        load(str(tmp_path / "clone"))


@pytest.mark.parametrize("name", ["", "*.parquet"])
def test_test_files_beside_training_files_are_not_trained_on(shards: Path, name: str) -> None:
    (shards / "train-00001-of-00002.parquet").rename(shards / "test-00000-of-00001.parquet")
    with pytest.raises(PromptError, match=r"files of several splits \(test, train\).*name one, such as"):
        load(f"{shards}/{name}")
    assert len(load(f"{shards}/train*.parquet")) == 3


def test_two_kinds_of_file_in_one_directory_are_refused(shards: Path) -> None:
    jsonl(shards / "train.jsonl", {"prompt": "q", "answer": "1"})
    with pytest.raises(PromptError, match=r"several kinds of file .*name one kind, such as .*\*\."):
        load(str(shards))


def test_paths_that_name_nothing(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"no prompt file in this directory; expected \.jsonl"):
        load(str(tmp_path))
    with pytest.raises(PromptError, match="no prompt file matches this pattern"):
        load(f"{tmp_path}/*.parquet")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(PromptError, match=r"matches this pattern; it matches .*a\.txt, expected"):
        load(f"{tmp_path}/*")


def compressed(path: Path, data: bytes) -> None:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
        return
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(data)


@pytest.mark.parametrize("ending", [".gz", ".zst", ".zstd"])
def test_compressed_files_have_the_ids_and_lines_of_the_plain_file(tmp_path: Path, ending: str) -> None:
    data = b'{"prompt": "a", "answer": "1"}\n\n{"prompt": "b", "answer": "1"}\n'
    compressed(tmp_path / f"t.jsonl{ending}", data)
    assert [p.id for p in load(f"{tmp_path}/t.jsonl{ending}")] == ["t:0", "t:1"]
    assert [p.id for p in load(f"{tmp_path}/t.jsonl{ending}@[-1:]")] == ["t:1"]
    compressed(tmp_path / f"a.json{ending}", b'\n [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "1"}]')
    assert [p.id for p in load(f"{tmp_path}/a.json{ending}")] == ["a:0", "a:1"]
    compressed(tmp_path / f"b.jsonl{ending}", data + b"{")
    with pytest.raises(PromptError, match=rf"b\.jsonl{ending}, line 4: not valid JSON"):
        load(f"{tmp_path}/b.jsonl{ending}")
    (tmp_path / f"c.jsonl{ending}").write_bytes((tmp_path / f"t.jsonl{ending}").read_bytes()[:-9])
    with pytest.raises(PromptError, match=rf"c\.jsonl{ending}: cannot be decompressed as"):
        load(f"{tmp_path}/c.jsonl{ending}")
    (tmp_path / f"d.jsonl{ending}").write_bytes(data)
    with pytest.raises(PromptError, match=rf"d\.jsonl{ending}: cannot be decompressed as"):
        load(f"{tmp_path}/d.jsonl{ending}")


def test_zstd_without_its_codec_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed(tmp_path / "t.jsonl.zst", b'{"prompt": "a", "answer": "1"}\n')
    monkeypatch.setattr("pyarrow.Codec", type("Codec", (), {"is_available": staticmethod(lambda name: False)}))
    with pytest.raises(PromptError, match=r"t\.jsonl\.zst: this pyarrow was built without zstd: pip install pyarrow"):
        load(tmp_path / "t.jsonl.zst")


def test_a_json_file_is_an_array_or_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "1"}]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    jsonl(tmp_path / "lines.json", *rows)
    for name in ("array", "lines"):
        assert [p.id for p in load(f"{tmp_path}/{name}.json")] == [f"{name}:0", f"{name}:1"]
    (tmp_path / "array.json").write_text('[{"prompt": "a"}, 3]')
    with pytest.raises(PromptError, match=r"array\.json, item 2: expected a JSON object, got int"):
        load(f"{tmp_path}/array.json", label_key="prompt")


def test_hub_ids_and_what_is_said_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert [
        hub_id(s) for s in ("openai/gsm8k@[0:5]", "hf://datasets/a/b", "hf://gsm8k", "data/trian", "a/b.jsonl")
    ] == [
        "openai/gsm8k",
        "a/b",
        "gsm8k",
        None,
        None,
    ]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        PromptError, match=r"openai/gsm8k: no such file .*pip install datasets.*hf download --repo-type"
    ):
        load("openai/gsm8k")


def test_a_hub_data_set_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Hub:
        @staticmethod
        def load_dataset(name: str, subset: str | None, split: str) -> list[dict[str, str]]:
            asked.append((name, subset, split))
            if subset is None:
                raise ValueError("Config name is missing. Please pick one among: main, socratic")
            return [{"question": f"q{i}", "answer": f"because\n#### {i}"} for i in range(4)]

    monkeypatch.setattr("treepo_mega.data.hub.require_datasets", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "datasets", Hub)
    got = load("openai/gsm8k@[1:-1]", source={"subset": "main", "split": "test"})
    assert asked == [("openai/gsm8k", "main", "test")]
    assert [(p.id, p.text, p.answer) for p in got] == [("gsm8k:1", "q1", "1"), ("gsm8k:2", "q2", "2")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PromptError, match=r"gsm8k \(train\): .*Please pick one among.*HF_HUB_OFFLINE is set"):
        find_hub_parts("openai/gsm8k", "openai/gsm8k", None, "train")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(PromptError, match=r"Please pick one among.*Set subset and split, or download it"):
        find_hub_parts("openai/gsm8k", "openai/gsm8k", None, "train")


def test_subset_and_split_are_of_the_hub(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", {"prompt": "a", "answer": "1"})
    with pytest.raises(PromptError, match="subset and split choose from a Hub data set"):
        load(path, source={"split": "test"})


def weighted(sizes: list[int], weights: list[float]) -> PromptSet:
    prompts = [Prompt(f"s{i}:{k}", "", [i], "1", "exact", "s") for i, n in enumerate(sizes) for k in range(n)]
    return PromptSet(prompts, weights=list(zip(sizes, weights, strict=True)))


@given(
    sources=st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 10)), min_size=1, max_size=4),
    shuffle=st.booleans(),
    before=st.integers(0, 50),
)
@settings(max_examples=100, deadline=None)
def test_weights_share_the_draws_and_no_prompt_is_passed_over(
    sources: list[tuple[int, float]], shuffle: bool, before: int
) -> None:
    sizes = [size for size, _ in sources]
    prompts = weighted(sizes, [weight for _, weight in sources])
    cursor = PromptCursor(prompts, seed=5, shuffle=shuffle)
    epochs = 5
    got = cursor.take(epochs * len(prompts))
    assert len({p.id for p in got}) == len(got), "an id stands for one tree of a run"
    shares = deal(len(prompts), [weight for _, weight in sources])
    assert sum(shares) == len(prompts)
    for i, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        drawn = [p.id.partition("@")[0] for p in got if p.tokens == [i]]
        assert len(drawn) == epochs * share
        for first in range(0, len(drawn) - size + 1, size):
            assert len(set(drawn[first : first + size])) == size, "every prompt comes once a pass"
    resumed = PromptCursor(prompts, seed=5, shuffle=shuffle)
    resumed.take(before)
    other = PromptCursor(prompts, seed=5, shuffle=shuffle)
    other.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    assert [p.id for p in other.take(20)] == [p.id for p in resumed.take(20)]


def test_other_weights_are_another_order_and_no_weights_change_nothing() -> None:
    plain = PromptCursor(weighted([3, 2], [1, 1]).prompts, seed=1, shuffle=True)
    one = PromptCursor(weighted([3, 2], [1, 1]), seed=1, shuffle=True)
    two = PromptCursor(weighted([3, 2], [1, 2]), seed=1, shuffle=True)
    assert len({plain.fingerprint, one.fingerprint, two.fingerprint}) == 3
    with pytest.raises(PromptError, match="the prompts changed since the checkpoint"):
        two.load_state_dict(one.state_dict())


# Layouts of the Hub, duplicates, lists of answers.


@pytest.mark.parametrize(
    "layout, row, want",
    [
        (
            "openr1",
            {"problem": "q", "solution": "so \\boxed{7}", "answer": "7", "messages": SOLVED},
            ("q", "7"),
        ),
        (
            "numinamath",
            {"source": "aops", "problem": "q", "solution": "1, 2\n\\boxed{7}.", "messages": SOLVED},
            ("q", "7"),
        ),
        (
            "math",
            {"problem": "q", "level": "Level 5", "solution": "$\\boxed{1}$ or $\\boxed{\\frac{1}{2}}$"},
            ("q", "\\frac{1}{2}"),
        ),
        (
            "skywork",
            {"prompt": [USER], "reward_model": {"ground_truth": '["7"]', "style": "rule"}},
            ("[user]What is 3+4?", '["7"]'),
        ),
        (
            "dapo",
            {"prompt": [USER], "reward_model": {"ground_truth": "34"}, "ability": "MATH"},
            ("[user]What is 3+4?", "34"),
        ),
        (
            "dapo processed",
            {"prompt": "q", "solution": "34", "source_prompt": [USER], "reward_model": {"ground_truth": "34"}},
            ("q", "34"),
        ),
        (
            "gsm8k",
            {"question": "q", "answer": "3 and 4\n#### 1,007"},
            ("q", "1,007"),
        ),
        (
            "gsm8k bare",
            {"question": "q", "answer": "#### 42"},
            ("q", "42"),
        ),
        (
            "deepscaler",
            {"problem": "q", "answer": "7", "solution": "worked"},
            ("q", "7"),
        ),
        (
            "openmath",
            {"problem": "q", "expected_answer": "7", "generated_solution": "worked"},
            ("q", "7"),
        ),
        (
            "aime",
            {"ID": "1", "Problem": "q", "Solution": "worked", "Answer": 7},
            ("q", "7"),
        ),
        (
            "tulu",
            {"messages": [{"role": "user", "content": "Please: q"}], "question": "q", "ground_truth": "7"},
            ("[user]Please: q", "7"),
        ),
        (
            "list",
            {"prompt": "q", "answer": ["7", 8]},
            ("q", '["7", "8"]'),
        ),
        (
            "csv list",
            {"prompt": "q", "answer": "['7', 'seven']"},
            ("q", '["7", "seven"]'),
        ),
        (
            "equal",
            {"question": "q", "problem": "q", "label": "7", "ground_truth": 7},
            ("q", "7"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layouts_are_read_without_keys(tmp_path: Path, layout: str, row: dict[str, Any], want: tuple[str, str]) -> None:
    (prompt,) = load_rows(tmp_path, row)
    assert (prompt.text, prompt.answer) == want


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "q", "problem": "p", "answer": "7"}, r"2 columns may hold the prompt.*question \('q'\), problem"),
        ({"instruction": "Add.", "input": "3 4", "answer": "7"}, r"set data\.input_key to one of input, instruction"),
        (
            {"messages": [USER], "question": "another", "answer": "7"},
            r"set data\.input_key to one of messages, question",
        ),
        (
            {"prompt": "q", "label": "7", "ground_truth": "8"},
            r"may hold the truth.*set data\.label_key to one of label, g",
        ),
        (
            {"prompt": "q", "answer": "Worked.", "reward_model": {"ground_truth": "8"}},
            r"answer, reward_model\.ground_truth",
        ),
        (
            {"prompt": "q", "solution": "We show\nthat it holds."},
            r"worked solution without a \\boxed\{\}.*data\.label_key",
        ),
    ],
)
def test_ambiguous_columns_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=r"t\.jsonl, line 1: .*" + message):
        load_rows(tmp_path, row)


def test_duplicates_are_named_tokenized_once_and_dropped_on_request(tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "answer": "7"}] * 3 + [{"prompt": "b", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    path = jsonl(tmp_path / "t.jsonl", *rows)
    cfg = DataConfig(train=[PromptSource(path=str(path))])
    letters = Letters()
    got = load_prompts(cfg.train, cfg, letters)
    assert letters.calls == 2
    assert len(got) == 5 and got.prompts[0].tokens is got.prompts[2].tokens
    assert got.notes == [
        f"2 of 5 prompts repeat an earlier one with the same answer, such as {path}, line 2 ({path}, line 1 has it "
        "first): each is trained on as often as it stands there; data.drop_duplicates=true keeps the first of each",
        f"1 of 5 prompts repeat an earlier one with another answer or verifier, such as {path}, line 5 and {path}, "
        "line 4: one of the two is likely wrong",
    ]
    fewer = load(path, drop_duplicates=True)
    assert [p.id for p in fewer] == ["t:0", "t:3", "t:4"]
    assert fewer.dropped == {"duplicate": 2}
