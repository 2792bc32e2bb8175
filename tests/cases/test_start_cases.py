"""Real inputs that failed at the start of a run, or were taken for something else: configuration, paths, restarts."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from treepo_mega.checkpoint.directories import set_aside_others, step_directories
from treepo_mega.cli import main
from treepo_mega.config import Config, ConfigError, DataConfig, PromptSource, load_config
from treepo_mega.data.files import find_parts
from treepo_mega.data.prompts import load_prompts
from treepo_mega.data.rows import PromptError

REPO = Path(__file__).resolve().parents[2]
BASE = "model: {hf_checkpoint: m}\ndata: {train: [{path: t.jsonl}]}\n"


@pytest.fixture
def load(tmp_path):
    """load(more YAML, *overrides) -> Config, read from a file as people write it."""

    def read(more: str = "", *overrides: str) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(BASE + more, encoding="utf-8")
        return load_config(path, overrides)

    return read


@pytest.mark.parametrize("written", ["12e4567", "'12e4567'", '"12e4567"', "0123", "1_000", "on", "2026-11-26"])
def test_a_text_key_in_yaml_keeps_what_was_written(load, written):
    assert load(f"logging: {{run_dir: {written}}}").logging.run_dir == written.strip("'\"")


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20))
@examples(200)
def test_a_text_override_is_kept_blank_for_blank(text):
    stripped = text.strip()
    if stripped[:1] in ("'", '"') or stripped in ("", "~", "null", "Null", "NULL", "None", "none"):
        return  # quoted text and words for null have rules of their own, below
    cfg = load_config(None, ["model.hf_checkpoint=m", "data.train=[{path: t}]", f"data.prompt_suffix={text}"])
    assert cfg.data.prompt_suffix == text


@pytest.mark.parametrize(
    "written, read",
    [
        (" Think step by step", " Think step by step"),
        ("' quoted'", " quoted"),
        ('"a\\nb"', "a\nb"),
        ("a # b: c", "a # b: c"),
        ("12e4567", "12e4567"),
        ("", ""),
    ],
)
def test_overrides_of_text_keys(load, written, read):
    assert load("", f"data.prompt_suffix={written}").data.prompt_suffix == read


@pytest.mark.parametrize("word", ["None", "none", "null", "NULL", "~"])
def test_words_for_null_are_null_where_a_key_can_be_null(load, word):
    cfg = load("", f"data.system_prompt={word}", f"model.fp8={word}")
    assert cfg.data.system_prompt is None
    assert cfg.model.fp8 is None
    assert load("", f"checkpoint.load={word}").checkpoint.load is None
    # `none` is a choice of this key, which cannot be null.
    assert load("", "rollout.fallback.from=none").rollout.fallback.from_ == "none"


@pytest.mark.parametrize("word", ["off", "'off'", "old"])
def test_a_word_that_is_false_to_yaml_is_the_choice_that_it_names(load, word):
    asked = [load("", f"rollout.routing_replay={word}"), load(f"rollout: {{routing_replay: {word}}}")]
    assert [cfg.rollout.routing_replay for cfg in asked] == [word.strip("'")] * 2
    assert load("", "checkpoint.save_hf=off").checkpoint.save_hf is False, "a key that is true or false"


def test_null_for_a_key_that_cannot_be_null_is_refused_and_quotes_mean_the_word(load):
    with pytest.raises(ConfigError, match=r"data\.prompt_suffix cannot be null.*quote it"):
        load("", "data.prompt_suffix=None")
    assert load("", "data.prompt_suffix='None'").data.prompt_suffix == "None"


def test_a_section_or_key_that_stands_twice_is_refused_with_both_lines(load):
    with pytest.raises(ConfigError, match=r"run\.yaml:4: train stands here a second time, after line 3"):
        load("train: {lr: 1e-5}\ntrain: {seed: 3}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:5: train\.lr stands here a second time, after line 4"):
        load("train:\n  lr: 1e-5\n  lr: 1e-6\n")


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.seed=99999999999999999999", r"train\.seed: .*less than 4294967296"),
        ("train.seed=-1", r"train\.seed: .*greater than or equal to 0"),
        ("train.lr=1e999", r"train\.lr: .*finite"),
        ("rollout.temperature=.nan", r"rollout\.temperature: .*(finite|greater)"),
    ],
)
def test_numbers_that_no_generator_or_optimizer_takes(load, override, message):
    with pytest.raises(ConfigError, match=message):
        load("", override)


def test_a_byte_order_mark_is_no_part_of_a_key_and_another_encoding_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_config(path).model.hf_checkpoint == "m"
    path.write_bytes((BASE + "data: # café").encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(path)


def test_home_and_variables_in_paths(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SCRATCH", "/scratch")
    cfg = load("", "logging.run_dir=~/x", "checkpoint.save=$SCRATCH/y", "model.load=${SCRATCH}/z")
    assert cfg.logging.run_dir == "/home/someone/x"
    assert cfg.checkpoint.save == "/scratch/y"
    assert cfg.model.load == "/scratch/z"
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(ConfigError, match="names an environment variable that is not set"):
        load("", "logging.run_dir=$SCRATCH/x")


def dry_run(capsys, *overrides: str) -> tuple[int, str]:
    status = main(["train", str(REPO / "examples/tiny_cpu.yaml"), *overrides, "--dry-run"])
    return status, capsys.readouterr().err


def model_like(directory: Path, **changes: object) -> Path:
    """A directory with the example model's config.json, changed; a key that becomes None is left out."""
    config = {**json.loads((REPO / "examples/tiny_reasoner/config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return directory


@pytest.fixture
def _in_repo(monkeypatch):
    monkeypatch.chdir(REPO)


@pytest.mark.usefixtures("_in_repo")
def test_the_dry_run_names_every_problem_that_needs_no_weights(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    status, err = dry_run(
        capsys,
        "eval.at_end=true",
        "data.eval=[]",
        "data.verifier=nosuch",
        "data.train=[{path: examples/tiny_reasoner/trian.jsonl}]",
        f"logging.run_dir={tmp_path}/file",
    )
    assert status == 2
    for part in (
        "eval.at_end: there are no prompts to evaluate; set data.eval",
        "unknown verifier 'nosuch'",
        "examples/tiny_reasoner/trian.jsonl: no such file (did you mean 'train.jsonl'?)",
        f"logging.run_dir '{tmp_path}/file': {tmp_path}/file is a file",
    ):
        assert part in err


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}


@pytest.mark.usefixtures("_in_repo")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "Mistral"),
        ({"rope_parameters": {"rope_type": "ntk", "factor": 4.0, "rope_theta": 10000.0}}, "rope_type 'ntk'"),
        ({"rope_parameters": YARN}, "exceeds the 16 positions of rope_type 'yarn'"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_the_dry_run_refuses_models_that_the_actor_cannot_compute(capsys, tmp_path, changes, message):
    status, err = dry_run(capsys, f"model.hf_checkpoint={model_like(tmp_path, **changes)}")
    assert status == 2
    assert message in err


@pytest.mark.usefixtures("_in_repo")
def test_the_dry_run_takes_a_yarn_model_in_the_older_spelling(capsys, tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    changes = {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": yarn, "max_position_embeddings": 512}
    assert dry_run(capsys, f"model.hf_checkpoint={model_like(tmp_path, **changes)}")[0] == 0


@pytest.mark.usefixtures("_in_repo")
def test_a_disk_that_cannot_hold_the_checkpoints_is_named(capsys, tmp_path, monkeypatch):
    from treepo_mega.checkpoint import space

    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: disk._replace(free=5 << 20))
    where = [f"logging.run_dir={tmp_path}/run", "checkpoint.keep_last=1", "checkpoint.save_interval=1"]
    status, err = dry_run(capsys, *where, "train.num_rollouts=50")
    assert status == 2
    needs = (
        rf"the run needs \d\.\d MiB in {tmp_path}/run/checkpoints and \d+\.\d KiB in {tmp_path}/run/hf and "
        rf"\d+\.\d KiB in {tmp_path}/run/rollouts; 5\.0 MiB are free there: a checkpoint has \d\.\d MiB"
    )
    assert re.search(needs, err)
    assert dry_run(capsys, *where, "train.num_rollouts=1")[0] == 0, "one checkpoint is all that it writes"
    assert dry_run(capsys, *where, "checkpoint.enabled=false")[0] == 0
    assert dry_run(capsys, *where, "--world-size", "1")[0] == 0, "the plan of another machine's run"


@pytest.mark.usefixtures("_in_repo")
@pytest.mark.parametrize(
    "source, message",
    [
        ("{reasoning_gym: chain_sum, params: {seed: 3}}", "params has seed 3; set seed beside params"),
        ("{reasoning_gym: chain_sum, seed: 4294967295, size: 8}", "seed 4294967295 + size 8 exceeds 4294967295"),
        ("{reasoning_gym: chain_sums}", "unknown task 'chain_sums' (did you mean 'chain_sum'?)"),
    ],
)
def test_reasoning_gym_sources_that_cannot_be_made_are_found_by_the_dry_run(capsys, source, message):
    status, err = dry_run(capsys, f"data.train=[{source}]")
    assert status == 2
    assert message in err


Starts = st.lists(st.tuples(st.sampled_from(["auto", None]), st.integers(1, 5)), min_size=1, max_size=6)


@given(starts=Starts)
@examples(150)
def test_after_any_starts_the_newest_runs_newest_checkpoint_is_the_one_to_resume(tmp_path_factory, starts):
    """Runs as (checkpoint.load, steps) in one directory, by the rules of the trainer; files stand for checkpoints."""
    save = tmp_path_factory.mktemp("save")
    contents: set[str] = set()
    newest = ""
    for run, (load, steps) in enumerate(starts):
        found = step_directories(save)
        resumed = found[-1] if load == "auto" and found else None
        begin = int(resumed.name.removeprefix("step_")) if resumed else 0
        if resumed is not None:
            assert (resumed / "run").read_text() == newest
        if begin >= steps:
            continue
        set_aside_others(save, resumed)
        for step in range(begin + 1, steps + 1):
            directory = save / f"step_{step:06d}"
            directory.mkdir()
            newest = f"{run}:{step}"
            (directory / "run").write_text(newest)
            contents.add(newest)
        assert (step_directories(save)[-1] / "run").read_text() == newest
    # Nothing that was saved is gone: it stands in place or was set aside.
    assert {path.read_text() for path in save.rglob("run")} == contents


def test_home_and_variables_in_prompt_files(tmp_path, monkeypatch):
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "answer": "1"}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path))
    for spec in ("~/t.jsonl", "$DATA/t.jsonl", "${DATA}/t.jsonl@[0:1]"):
        assert [row.values["answer"] for part in find_parts(spec) for row in part.rows()] == ["1"]
    monkeypatch.delenv("DATA")
    with pytest.raises(PromptError, match="environment variable that is not set"):
        find_parts("$DATA/t.jsonl")


def test_a_template_that_refuses_a_message_is_named_with_its_words(tiny_llama, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n')
    data = DataConfig(train=[PromptSource(path=str(path))], apply_chat_template=True, system_prompt="Be brief.")
    with pytest.raises(PromptError, match=r"t\.jsonl.*line 1.*System role not supported; leave data\.system_prompt"):
        load_prompts(data.train, data, tokenizer)
