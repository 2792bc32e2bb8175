"""Checkpoints as people have them: downloads that stopped, adapters, pickles, damaged numbers, heads that lie.

Each has a message of its own, and what headers can tell is told by the dry run.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from treepo_mega.checkpoint.headers import NoWeightsError, check_against, stored_tensors
from treepo_mega.checkpoint.hf import HfCheckpointError, HfReader
from treepo_mega.cli import main
from treepo_mega.modelspec.mcore_layout import ModelSpec, hf_shapes

REPO = Path(__file__).resolve().parents[2]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"


def edit(directory, change, file="model.safetensors"):
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})


def configure(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def dry_run(capsys, directory) -> tuple[int, str]:
    """Exit status and all output of a dry run of the CPU example with this model and the example's tokenizer."""
    for path in (REPO / "examples/tiny_reasoner").glob("tokenizer*"):
        shutil.copyfile(path, Path(directory) / path.name)
    status = main(["train", str(REPO / "examples/tiny_cpu.yaml"), f"model.hf_checkpoint={directory}", "--dry-run"])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def read_all(directory):
    spec = ModelSpec.from_hf(directory)
    with HfReader(directory, spec) as reader:
        return {name: reader.read(name, tuple((0, n) for n in shape)) for name, shape in hf_shapes(spec).items()}


@pytest.fixture
def shards(tiny_hf):
    """A checkpoint of several shards whose index did not arrive."""
    directory = tiny_hf("qwen2", max_shard_size="20KB")
    (directory / INDEX).unlink()
    return directory


@pytest.fixture(autouse=True)
def _in_repo(monkeypatch):
    monkeypatch.chdir(REPO)


def test_whole_shards_without_an_index_are_the_checkpoint(tiny_hf, shards, capsys):
    whole = read_all(tiny_hf("qwen2", name="single"))
    read = read_all(shards)
    assert all(torch.equal(read[name], tensor) for name, tensor in whole.items())
    status, out = dry_run(capsys, shards)
    assert status == 0
    assert f"{INDEX} is missing (incomplete download?); its" in out


def test_shards_that_are_not_one_whole_series_are_refused(shards, capsys):
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    (shards / names[1]).rename(shards.parent / "kept")
    status, out = dry_run(capsys, shards)
    assert status == 2
    assert f"{INDEX} is missing, and so are 1 of {len(names)} shards: {names[1]} (incomplete download?)" in out
    (shards.parent / "kept").rename(shards / names[1])
    shutil.copy(shards / names[0], shards / "model-00001-of-00002.safetensors")
    with pytest.raises(HfCheckpointError, match=r"shards of model-\*-of-00002 and model-.* lie together"):
        stored_tensors(shards)
    (shards / "model-00001-of-00002.safetensors").unlink()
    other = load_file(shards / names[1])
    edit(shards, lambda tensors: tensors.update(other), names[0])
    with pytest.raises(HfCheckpointError, match=f"lies both in {names[0]} and in {names[1]}"):
        stored_tensors(shards)


def test_whole_shards_of_an_incomplete_model_are_refused(shards, capsys):
    first = min(path.name for path in shards.glob("*.safetensors"))
    edit(shards, lambda tensors: tensors.pop(EMBEDDING), first)
    status, out = dry_run(capsys, shards)
    assert status == 2
    assert f"1 tensors missing: {EMBEDDING}" in out


def test_an_index_that_names_absent_files_lists_them(tiny_hf, capsys):
    directory = tiny_hf("llama", max_shard_size="20KB")
    absent = sorted(directory.glob("*.safetensors"))[1:4]
    for path in absent:
        path.unlink()
    status, out = dry_run(capsys, directory)
    assert status == 2
    assert f"{absent[0]}: no such file, although {INDEX} names it, nor are {absent[1].name}, {absent[2].name}" in out


def test_an_index_of_other_shards_is_named(tiny_hf, capsys):
    directory = tiny_hf("llama", max_shard_size="20KB")
    index = json.loads((directory / INDEX).read_text())
    places = index["weight_map"]
    right = places["model.norm.weight"]
    wrong = next(file for file in sorted(set(places.values())) if file != right)
    places["model.norm.weight"] = wrong
    (directory / INDEX).write_text(json.dumps(index))
    status, out = dry_run(capsys, directory)
    assert status == 2
    assert (
        f"{wrong}: tensor model.norm.weight is missing: {INDEX} says that this file holds it, but {right} does" in out
    )


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_alone_is_called_one(tiny_hf, capsys, with_config):
    directory = tiny_hf("llama")
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}')
    if not with_config:
        (directory / "config.json").unlink()
    status, out = dry_run(capsys, directory)
    assert status == 2
    assert "only an adapter of meta-llama/Llama-3.2-1B lies here (adapter_config.json, adapter_model.safetens" in out
    assert "merge it into its base model" in out
    assert "config.json: No such file" not in out


def test_an_adapter_beside_its_model_is_no_problem(tiny_hf, capsys):
    directory = tiny_hf("llama")
    save_file({"base_model.model.a": torch.zeros(1)}, directory / "adapter_model.safetensors")
    assert dry_run(capsys, directory)[0] == 0


@pytest.mark.parametrize(
    "names, message",
    [
        (["pytorch_model.bin", "training_args.bin"], r"found pytorch_model\.bin \(convert to safetensors first"),
        (["consolidated.00.pth"], r"found consolidated\.00\.pth \(convert"),
        (["model-q4.gguf"], r"model-q4\.gguf; GGUF files cannot be trained"),
        (["weights.safetensors"], r"found weights\.safetensors; rename a single whole file model\.safetensors"),
    ],
)
def test_weights_of_another_kind(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(HfCheckpointError, match=message):
        stored_tensors(tmp_path)


def test_no_weights_are_a_problem_of_the_start_only(tiny_hf, tmp_path, capsys):
    directory = tiny_hf("llama")
    (directory / "model.safetensors").unlink()
    assert dry_run(capsys, directory)[0] == 0, "a plan can be made from config.json alone"
    with pytest.raises(NoWeightsError, match="found no weights"):
        stored_tensors(directory)
    command = ["train", str(REPO / "examples/tiny_cpu.yaml"), f"logging.run_dir={tmp_path}/run"]
    assert main([*command, f"model.hf_checkpoint={directory}"]) == 2
    assert "found no weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda whole: whole[: len(whole) // 2], r"not a readable safetensors file \(truncated\?\): \d+ of \d+ bytes"),
        (lambda whole: whole[:20], "do not hold the header that they announce"),
        (lambda whole: b"", "do not hold the header"),
        (lambda whole: b"<!DOCTYPE html><html>not found</html>", "not a readable safetensors file"),
        (lambda whole: whole + b"more", "4 bytes follow its last tensor"),
        (lambda whole: whole[:8] + b"x" * (len(whole) - 8), "its header is not that of one"),
        (
            lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "a Git LFS pointer of .*lfs pull",
        ),
    ],
)
def test_a_file_that_is_not_whole_is_named(tiny_hf, content, message):
    directory = tiny_hf("llama")
    path = directory / "model.safetensors"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(HfCheckpointError, match=message) as e:
        stored_tensors(directory)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("value, words", [(float("nan"), "2 NaN and 0 inf"), (float("-inf"), "0 NaN and 2 inf")])
def test_numbers_that_are_none_are_named_by_tensor_file_and_place(tiny_hf, value, words):
    directory = tiny_hf("llama", dtype=torch.bfloat16)
    name = "model.layers.2.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name][5, 7] = tensors[name][9, 0] = value

    edit(directory, spoil)
    with pytest.raises(HfCheckpointError, match=rf"model\.safetensors: tensor {name} holds {words}.*first at \[5, 7\]"):
        read_all(directory)
    spec = ModelSpec.from_hf(directory)
    with HfReader(directory, spec) as reader:
        reader.read(name, ((0, 5), (0, 32)))  # a rank whose slice is sound has nothing to say
        with pytest.raises(HfCheckpointError, match=r"first at \[9, 0\]"):
            reader.read(name, ((6, 48), (0, 32)))


def test_an_untied_model_without_a_head_is_told_what_to_set(tiny_hf, capsys):
    directory = tiny_hf("qwen2")
    edit(directory, lambda tensors: tensors.pop(HEAD))
    status, out = dry_run(capsys, directory)
    assert status == 2
    assert f"{HEAD} is missing, but config.json does not say tie_word_embeddings: true; set it if" in out
    configure(directory, tie_word_embeddings=True)
    assert dry_run(capsys, directory)[0] == 0


def test_a_tied_model_whose_head_is_another_matrix_is_told_what_to_set(tiny_hf, capsys):
    directory = tiny_hf("qwen2")
    configure(directory, tie_word_embeddings=True)
    with pytest.raises(HfCheckpointError, match=r"lm_head.*differs from model\.embed.*set it to false if"):
        read_all(directory)
    edit(directory, lambda tensors: tensors.update({HEAD: tensors[HEAD][:300].clone()}))
    status, out = dry_run(capsys, directory)
    assert status == 2
    assert f"{HEAD} [300, 32] is another matrix than {EMBEDDING} [301, 32]; set it to false if" in out
    edit(directory, lambda tensors: tensors.pop(EMBEDDING))
    assert f"only {HEAD} is stored, not {EMBEDDING}" in dry_run(capsys, directory)[1]


def test_wrong_shapes_and_types_are_found_by_the_dry_run(tiny_hf, capsys):
    directory = tiny_hf("qwen3")
    configure(directory, intermediate_size=64)
    status, out = dry_run(capsys, directory)
    assert status == 2
    assert "tensor model.layers.0.mlp.gate_proj.weight has shape [48, 32]; config.json asks for [64, 32]" in out
    configure(directory, intermediate_size=48)
    name = "model.layers.0.mlp.gate_proj.weight"
    edit(directory, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    assert f"{name} has dtype F8_E4M3; expected one of F64, F32, F16, BF16" in dry_run(capsys, directory)[1]


def test_headers_say_what_torch_reads(tiny_hf):
    directory = tiny_hf("qwen3", max_shard_size="20KB")
    spec = ModelSpec.from_hf(directory)
    stored = stored_tensors(directory)
    read = read_all(directory)
    assert {name: place.shape for name, place in stored.items()} == {n: tuple(t.shape) for n, t in read.items()}
    assert check_against(directory, stored, spec) == sum(tensor.nbytes for tensor in read.values())
