"""Templates and tokenizers of people: variables, templates as files, none at all; and what the dry run says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treepo_mega.checkpoint.hf import copy_companions
from treepo_mega.cli import main
from treepo_mega.config import DataConfig, load_config
from treepo_mega.data.chat import check_template_kwargs
from treepo_mega.data.light_tokenizer import read_light_tokenizer
from treepo_mega.data.prompts import load_prompts
from treepo_mega.data.rows import PromptError
from treepo_mega.data.tokenizer import TokenizerError, describe_size, load_tokenizer
from treepo_mega.preflight import preflight

REPO = Path(__file__).resolve().parents[2]
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINKING = """{% for m in messages %}<|im_start|>{{m['role']}}
{{m['content']}}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
CHAT = {"prompt": [{"role": "user", "content": "q"}], "answer": "1"}
RENDERED = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def make_tokenizer(directory: Path, template: str | None = THINKING, *, bos: bool = False, more: int = 0) -> Path:
    """A byte-level tokenizer of 259 + `more` tokens; `bos`: it puts <|endoftext|> before plain text."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from tokenizers.decoders import ByteLevel
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = ByteLevel()
    inner.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    inner.add_tokens([f"<extra_{i}>" for i in range(more)])
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", **({"bos_token": "<|endoftext|>"} if bos else {})
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("base"), None)


def load(folder: Path, hf_dir: Path, *rows: Any, **data: Any) -> Any:
    path = folder / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig(train=[{"path": str(path)}], **data)
    return load_prompts(cfg.train, cfg, load_tokenizer(hf_dir, cfg))


def test_variables_reach_the_template(tmp_path: Path, chat_model: Path) -> None:
    assert load(tmp_path, chat_model, CHAT).prompts[0].text == RENDERED
    quiet = load(tmp_path, chat_model, CHAT, chat_template_kwargs={"enable_thinking": False})
    assert quiet.prompts[0].text == RENDERED + "<think>\n\n</think>\n\n"


def test_variables_come_from_overrides_and_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {hf_checkpoint: m}\ndata: {train: [{path: t}], chat_template_kwargs: {enable_thinking: false}}\n"
    )
    assert load_config(path).data.chat_template_kwargs == {"enable_thinking": False}
    more = load_config(path, ["data.chat_template_kwargs.level=3", "data.chat_template=~/x.jinja"]).data
    assert more.chat_template_kwargs == {"enable_thinking": False, "level": 3}
    assert more.chat_template == str(Path("~/x.jinja").expanduser())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"enable_thinkin": False}, r"never mentions this variable \(did you mean 'enable_thinking'\?\)"),
        ({"zzz": 1}, r"data\.chat_template_kwargs\.zzz: the chat template never mentions"),
        ({"messages": []}, r"data\.chat_template_kwargs\.messages: the trainer sets this itself"),
        ({"tokenize": True}, "the trainer sets this itself"),
    ],
)
def test_variables_without_effect_are_refused(
    tmp_path: Path, chat_model: Path, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        load(tmp_path, chat_model, CHAT, chat_template_kwargs=kwargs)


def test_a_template_may_extend_the_syntax_and_read_its_variables_by_name() -> None:
    template = "{% generation %}{{ x }}{% endgeneration %}{% if kwargs['level'] %}{% break %}{% endif %}"
    check_template_kwargs({"x": 1, "level": 2}, template)
    with pytest.raises(PromptError, match="needs a chat template, and the tokenizer has none"):
        check_template_kwargs({"x": 1}, None)


def test_a_template_file_takes_the_place_of_the_tokenizers(tmp_path: Path, chat_model: Path, base_model: Path) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}<{{ m.role }}:{{ tone }}>{{ m.content }}{% endfor %}")
    for model in (chat_model, base_model):
        got = load(tmp_path, model, CHAT, chat_template=str(mine), chat_template_kwargs={"tone": "dry"})
        assert got.prompts[0].text == "<user:dry>q"
        assert got.notes == []
    with pytest.raises(PromptError, match=r"cannot read .*mine\.jinj: .*did you mean '.*mine\.jinja'"):
        load(tmp_path, chat_model, CHAT, chat_template=str(tmp_path / "mine.jinj"))
    mine.write_text("{% for m in messages %}{{ 'a }}")
    with pytest.raises(PromptError, match=r"data\.chat_template: .*mine\.jinja: not a Jinja template"):
        load(tmp_path, chat_model, CHAT, chat_template=str(mine))
    mine.write_text(" \n")
    with pytest.raises(PromptError, match=r"mine\.jinja is empty"):
        load(tmp_path, chat_model, CHAT, chat_template=str(mine))


def test_a_template_that_nothing_uses_is_said(tmp_path: Path, chat_model: Path) -> None:
    got = load(tmp_path, chat_model, {"prompt": "q", "answer": "1"}, chat_template_kwargs={"enable_thinking": False})
    assert got.notes == [
        "data.chat_template_kwargs has no effect: the prompts are plain text, and data.apply_chat_template is off"
    ]


def test_a_base_model_takes_plain_text_and_says_what_chats_need(tmp_path: Path, base_model: Path) -> None:
    assert load(tmp_path, base_model, {"prompt": "q", "answer": "1"}).prompts[0].text == "q"
    with pytest.raises(
        PromptError, match=r"t\.jsonl, line 1: the tokenizer has no chat template.*data\.chat_template to"
    ):
        load(tmp_path, base_model, CHAT)
    with pytest.raises(PromptError, match=r"leave data\.apply_chat_template out and give prompts as text"):
        load(tmp_path, base_model, {"prompt": "q", "answer": "1"}, apply_chat_template=True)


def test_the_export_carries_the_template_that_was_trained_with(tmp_path: Path, chat_model: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_bytes((chat_model / name).read_bytes())
    (source / "config.json").write_text("{}")
    mine = tmp_path / "mine.jinja"
    mine.write_text("{{ messages[0].content }}")
    target = tmp_path / "target"
    target.mkdir()
    copy_companions(source, target, str(mine))
    tokenizer = load_tokenizer(target, DataConfig(train=[{"path": "t"}]))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_model_without_a_tokenizer_says_which_files_it_lacks(tmp_path: Path) -> None:
    data = DataConfig(train=[{"path": "t"}])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"no tokenizer in this directory \(expected one of tokenizer\.json"):
        load_tokenizer(tmp_path, data)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path, data)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: the tokenizer cannot be loaded"):
        read_light_tokenizer(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_said() -> None:
    assert describe_size(259, 259) is None
    assert "has 261 tokens, the model only 259" in (describe_size(261, 259) or "")


def test_a_second_bos_of_a_real_tokenizer_is_taken_off(tmp_path: Path) -> None:
    model = make_tokenizer(
        tmp_path / "model", "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", bos=True
    )
    rows = [{"prompt": "<|endoftext|>hi", "answer": "1"}, {"prompt": "hi", "answer": "1"}]
    for templated in (False, True):
        got = load(tmp_path, model, *rows, apply_chat_template=templated)
        assert got.prompts[0].tokens == got.prompts[1].tokens
        assert got.prompts[0].tokens[0] == 256 and 256 not in got.prompts[0].tokens[1:]
        assert [note for note in got.notes if note.startswith("1 prompts began with two BOS tokens")]


TEMPLATES = [
    THINKING,
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}",
    "{%- for m in messages -%}\n  {%- if loop.last -%}\n {{ m | tojson }}\n{%- endif -%}\n{%- endfor %}\n",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n"
    "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}{{ eos_token }}",
    "{% if tools %}{{ tools }}{% endif %}{{ messages[0].content }}{{ strftime_now('%Y') }}",
]


@given(
    template=st.sampled_from(TEMPLATES),
    contents=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_light_tokenizer_is_transformers_own(both: Any, template: str, contents: list[str]) -> None:
    light, full = both
    chat = [{"role": "user", "content": content} for content in contents]
    options = {"tokenize": False, "add_generation_prompt": True, "chat_template": template, "enable_thinking": False}
    text = full.apply_chat_template(chat, **options)
    assert light.apply_chat_template(chat, **options) == text
    for special in (True, False):
        assert light([text, "x"], add_special_tokens=special)["input_ids"] == [
            list(ids) for ids in full([text, "x"], add_special_tokens=special)["input_ids"]
        ]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = make_tokenizer(tmp_path_factory.mktemp("both"), bos=True, more=2)
    light = read_light_tokenizer(directory)
    full = load_tokenizer(directory, DataConfig(train=[{"path": "t"}]))
    assert light is not None
    assert len(light) == len(full) == 261
    for name in ("bos_token_id", "eos_token_id", "eos_token", "chat_template"):
        assert getattr(light, name) == getattr(full, name)
    return light, full


@pytest.fixture
def model(tmp_path: Path, chat_model: Path) -> Path:
    """A model of 259 ids with the chat tokenizer, without weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    for path in chat_model.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((REPO / "examples/tiny_reasoner/config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 259}))
    return directory


def problems_of(model: Path, *overrides: str, starting: bool = False) -> tuple[list[str], list[str]]:
    cfg = load_config(REPO / "examples/tiny_cpu.yaml", [f"model.hf_checkpoint={model}", "data.eval=[]", *overrides])
    return preflight(
        cfg.replace({"eval.at_end": False, "eval.interval": 0, "eval.at_start": False}), 1, starting=starting
    )


def test_the_dry_run_tries_the_first_prompts_of_every_file(tmp_path: Path, model: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "larger", more=2)
    for path in tokenizer.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    rows = {
        "good": CHAT,
        "beyond": {"prompt": [{"role": "user", "content": "<extra_0>"}], "answer": "1"},
        "blank": {"prompt": " ", "answer": "1"},
        "sentinel": {"prompt": "q", "answer": "proof"},
        "two": {"question": "q", "problem": "p", "answer": "1"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    paths = ", ".join(f"{{path: {tmp_path}/{name}.jsonl}}" for name in [*rows, "empty"])
    problems, notes = problems_of(
        model, f"data.train=[{paths}]", "data.verifier=math", "data.chat_template_kwargs={enable_thinking: false}"
    )
    for part in (
        r"beyond.jsonl, line 1: the prompt has token 259 ('<extra_0>')",
        "blank.jsonl, line 1: the prompt is empty",
        "sentinel.jsonl, line 1: 'proof' stands for a missing answer",
        "two.jsonl, line 1: 2 columns may hold the prompt",
        "empty.jsonl: no rows",
    ):
        assert [problem for problem in problems if part in problem], (part, problems)
    assert not [problem for problem in problems if "good.jsonl" in problem]
    assert [note for note in notes if "the tokenizer has 261 tokens, the model only 259" in note]


def test_the_dry_run_names_template_and_tokenizer_beside_the_rest(tmp_path: Path, model: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(CHAT) + "\n")
    train = f"data.train=[{{path: {tmp_path}/t.jsonl}}, {{path: {tmp_path}/u.jsonl}}]"
    problems, _ = problems_of(model, train, "data.chat_template_kwargs={enable_thinkin: true}")
    assert [p for p in problems if "did you mean 'enable_thinking'" in p]
    assert [p for p in problems if "u.jsonl: no such file" in p]
    (model / "tokenizer.json").unlink()
    problems, notes = problems_of(model, f"data.train=[{{path: {tmp_path}/t.jsonl}}]")
    assert problems == []
    assert [n for n in notes if "has no tokenizer.json: prompts are read here, but not rendered" in n]
    problems, _ = problems_of(model, train, starting=True)
    assert [p for p in problems if "no tokenizer in this directory" in p]


def test_the_dry_run_of_a_directory_with_a_slice(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture) -> None:
    for i in range(2):
        (tmp_path / f"s{i}.jsonl").write_text(json.dumps(CHAT) + "\n")
    overrides = [f"model.hf_checkpoint={model}", "data.eval=[]", "eval.at_end=false", "eval.at_start=false"]
    overrides.append("eval.interval=0")
    command = ["train", str(REPO / "examples/tiny_cpu.yaml"), *overrides, "--dry-run"]
    assert main([*command, f"data.train=[{{path: '{tmp_path}/s*.jsonl@[1:]'}}]"]) == 0
    assert main([*command, f"data.train=[{{path: {tmp_path}/s0.jsonl@[1:]}}]"]) == 2
    assert "quote a path that has a slice" in capsys.readouterr().err


def test_weights_are_for_all_sources_or_none_and_not_for_evaluation() -> None:
    from treepo_mega.config.surroundings import check_data

    base = ["model.hf_checkpoint=m"]
    some = load_config(None, [*base, "data.train=[{path: a, weight: 2}, {path: b}]"])
    assert check_data(some) == ["data.train.1 has no weight, but other sources have one; set it for all or for none"]
    of_eval = load_config(None, [*base, "data.train=[{path: a}]", "data.eval=[{path: b, weight: 1}]"])
    assert "data.eval.0.weight has no effect" in check_data(of_eval)[0]
    nothing = load_config(None, [*base, "data.train=[{path: []}]"])
    assert check_data(nothing) == ["data.train.0.path: the list is empty; name at least one file"]


@pytest.mark.parametrize(
    "written, read", [("2026-11-26", "2026-11-26"), ("12e4567", "12e4567"), ("[a, 0123]", ["a", "0123"])]
)
def test_paths_keep_what_was_written(tmp_path: Path, written: str, read: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{hf_checkpoint: m}}\ndata:\n  train:\n    - path: {written}\n")
    assert load_config(path).data.train[0].path == read
