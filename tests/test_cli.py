"""The command line: what it prints, its exit status, and what it does not import."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from treepo_mega.cli import _parser, help_config, main
from treepo_mega.config import Config, parse_config

REPO = Path(__file__).parents[1]
EXAMPLES = {
    "llama3_70b_16x8.yaml": 128,
    "qwen25_7b_2x8.yaml": 16,
    "qwen25_7b_treepo.yaml": 16,
    "qwen3_32b_4x8.yaml": 32,
}


@pytest.fixture(autouse=True)
def in_repo(monkeypatch):
    """Recipes name their model directory relative to the checkout; no launcher's variables leak in."""
    monkeypatch.chdir(REPO)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def dry_run(capsys, name, world, *overrides):
    status = main(["train", f"examples/{name}", *overrides, "--dry-run", "--world-size", str(world)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(("name", "world"), EXAMPLES.items())
def test_dry_run_prints_a_configuration_that_reads_back_equal(capsys, name, world):
    status, out, err = dry_run(capsys, name, world)
    assert (status, err) == (0, "")
    text, notes = out.split("---\n")
    assert parse_config(yaml.safe_load(text)).as_set() == yaml.safe_load(text)
    assert f"# world size {world} = TP" in notes
    assert "# 512 prompts x 16 trajectories = 512 trajectories x 16 optimizer steps per rollout" in notes
    assert "architecture only" in notes


def test_overrides_are_taken_on_either_side_of_the_options(capsys):
    options = ["--dry-run", "--world-size", "64"]
    status = main(["train", "examples/llama3_70b_16x8.yaml", "train.lr=3e-5", *options, "+algo.tis_clip=4"])
    resolved = yaml.safe_load(capsys.readouterr().out.split("---\n")[0])
    assert status == 0
    assert (resolved["train"]["lr"], resolved["algo"]["tis_clip"]) == (3e-5, 4.0)


def test_world_size_comes_from_the_launcher_and_the_option_wins(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "64")
    # Under a launcher this machine is the one that runs, so its disk must hold the checkpoints: 3.6 TiB.
    monkeypatch.setattr("treepo_mega.checkpoint.space.shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 50))
    assert main(["train", "examples/llama3_70b_16x8.yaml", "--dry-run"]) == 0
    assert "# world size 64 = " in capsys.readouterr().out
    assert dry_run(capsys, "llama3_70b_16x8.yaml", 96)[0] == 0


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["train.leraning_rate=1"], 128, "train.leraning_rate: unknown key"),
        (["train.lr"], 128, "expected key=value"),
        ([], 100, "world size 100 is not a multiple of"),
        (["parallel.tensor_model_parallel_size=16"], 128, "does not divide the model's num_key_value_heads 8"),
        (["parallel.pipeline_model_parallel_size=3"], 96, "80 layers cannot be split evenly"),
        (["rollout.max_response_len=8000"], 128, "exceeds the model's 8192 positions"),
        (["train.global_batch_size=100"], 128, "they must be equal"),
        (["model.hf_checkpoint=nowhere"], 128, "cannot read nowhere/config.json"),
    ],
)
def test_bad_input_is_one_message_and_status_2(capsys, overrides, world, message):
    status, out, err = dry_run(capsys, "llama3_70b_16x8.yaml", world, *overrides)
    assert status == 2
    assert out == ""
    assert err.startswith("treepo-mega: error: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.segment.length=0"], "rollout.segment.length: Input should be greater than or equal to 1 (got 0)"),
        (["rollout.branching.initial=[2,32]"], "[2, 32] exceeds rollout.n_samples_per_prompt 16"),
        (["rollout.branching.initial=[3,2]"], "expected [lo, hi] with 1 <= lo <= hi"),
        (
            ["rollout.fallback.from=none", "rollout.branching.factor=1"],
            "rollout.n_samples_per_prompt 16 is out of reach",
        ),
        (["data.max_prompt_len=256"], "data.max_prompt_len + rollout.max_response_len = 320 exceeds the model's 256"),
        (["rollout.stop.eos_token_ids=[]"], "rollout.stop.eos_token_ids: List should have at least 1 item"),
        (["rollout.stop.eos_token_ids=[2,32]"], "rollout.stop.eos_token_ids [32] are not among the model's 32 token"),
    ],
)
def test_a_run_is_refused_by_the_same_rules_before_anything_is_imported(capsys, overrides, message):
    before = set(sys.modules)
    status = main(["train", "examples/tiny_cpu.yaml", *overrides])
    assert status == 2 and "Traceback" not in (err := capsys.readouterr().err)
    assert message in err
    assert not {"vllm", "megatron", "treepo_mega.trainer"} & (set(sys.modules) - before)


def test_a_config_json_without_sizes_is_named(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "architectures": ["LlamaForCausalLM"]}')
    status, _, err = dry_run(capsys, "llama3_70b_16x8.yaml", 128, f"model.hf_checkpoint={tmp_path}")
    assert status == 2
    assert "num_attention_heads, num_hidden_layers" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "name a configuration file"),
        (["train", "nothing.yaml", "--dry-run"], "nothing.yaml: cannot read the configuration"),
        (["train", "examples/llama3_70b_16x8.yaml", "--world-size", "8"], "only goes with --dry-run"),
        (["report", "no/such/run"], "no/such/run"),
        (["tree", "no/such/run"], "no/such/run: no such run directory"),
        (["convert", "to-mcore", "--hf", "no/such", "--save", "x"], "no/such/config.json"),
        (["convert", "to-hf", "--load", "no/such", "--save", "x"], "no/such/hf/config.json: no such file; name"),
        (["convert", "relayout", "--load", "no/such", "--save", "x", "--hf", "examples/tiny_reasoner"], "no/such: no"),
        (["convert", "verify", "--load", "no/such", "--hf", "examples/tiny_reasoner"], "no/such: no manifest.json"),
    ],
)
def test_wrong_use_is_explained(capsys, argv, message):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["tarin"], ["train", "x.yaml", "--dryrun"], ["train", "x", "--world-size", "0"]])
def test_unknown_options_end_with_usage(capsys, argv):
    with pytest.raises(SystemExit) as leave:
        main(argv)
    assert leave.value.code == 2
    assert "usage: treepo-mega" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "known"),
    [
        (["tarin"], "(did you mean 'train'?)"),
        (["convert", "to-mcor"], "(did you mean 'to-mcore'?)"),
        (["eval", "x.yaml", "--sampler", "trees"], "(did you mean 'tree'?)"),
        (["convert", "verify", "--hf", "x"], "the following arguments are required: --load"),
        (["convert", "to-hf", "--load", "x", "--save", "y", "--max-shard-size-mib", "0"], "a positive number, got 0"),
    ],
)
def test_a_word_that_is_no_choice_is_answered_with_the_nearest(capsys, argv, known):
    with pytest.raises(SystemExit) as leave:
        main(argv)
    assert leave.value.code == 2
    assert known in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["to-mcore", "to-hf", "relayout", "verify"])
def test_help_of_a_conversion_has_every_option_and_an_example(capsys, verb):
    with pytest.raises(SystemExit) as leave:
        main(["convert", verb, "--help"])
    assert leave.value.code == 0
    text = capsys.readouterr().out
    options = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", text, re.MULTILINE))
    common = {"--help", "--hf", "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--params-dtype"}
    common |= {"--virtual-pipeline-model-parallel-size", "--timeout-s"}
    own = {
        "to-mcore": {"--save", "--verify", "--no-verify", "--logits-tolerance", "--make-vocab-size-divisible-by"},
        "to-hf": {"--load", "--save", "--no-verify", "--logits-tolerance", "--max-shard-size-mib"},
        "relayout": {"--load", "--save", "--make-vocab-size-divisible-by"},
        "verify": {"--load", "--logits-tolerance", "--make-vocab-size-divisible-by"},
    }
    assert options == common | own[verb]
    example = text.partition("examples:\n")[2].replace("\\\n", " ").splitlines()[0]
    words = example.split()[example.split().index("convert") :]
    parsed, left = _parser().parse_known_args(words)
    assert parsed.verb == verb and not left


def test_help_config_names_every_key():
    text = "\n".join(help_config())

    def keys(section, prefix=""):
        for name, field in section.model_fields.items():
            inner = getattr(field.annotation, "model_fields", None)
            written = f"{prefix}{field.alias or name}"
            yield from keys(field.annotation, f"{written}.") if inner else [written]

    missing = [k for k in keys(Config) if k not in text]
    assert not missing
    assert "model.params_dtype: fp32 | bf16, default 'fp32'" in text
    assert "model.hf_checkpoint: str, required" in text
    assert "data.train.<i>.reasoning_gym: str | null, default None" in text


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "examples/llama3_70b_16x8.yaml", "--dry-run", "--world-size", "128"],
        ["train", "--help-config"],
        ["report", "no/such/run"],
        ["tree", "no/such/run"],
        ["convert", "relayout", "--help"],
    ],
)
def test_nothing_heavy_is_imported(argv):
    code = (
        "import contextlib, sys\n"
        "from treepo_mega.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({argv!r})\n"
        "sys.exit(bool({'torch', 'vllm', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert child.returncode == 0, child.stderr
