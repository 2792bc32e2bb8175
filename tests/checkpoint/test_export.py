"""Exported checkpoints: bit-equal, as transformers wants them, and whole or not there at all."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.checkpoint.test_hf import everything
from tests.whole import module_of
from treepo_mega.checkpoint import export
from treepo_mega.checkpoint.headers import HfCheckpointError
from treepo_mega.checkpoint.hf import HfReader
from treepo_mega.checkpoint.load import fill_local
from treepo_mega.convert.convert import conversion_config
from treepo_mega.modelspec.mcore_layout import ModelSpec, mcore_layout
from treepo_mega.runtime import dist
from treepo_mega.runtime.files import OutputExistsError


def write(source, target, dtype=torch.float32, inside=lambda partial: None, **options):
    """The checkpoint `source` through Megatron's parameters of one rank into `target`."""
    spec, cfg = ModelSpec.from_hf(source), conversion_config(source)
    layout = mcore_layout(spec, divisible_by=cfg.model.make_vocab_size_divisible_by)
    params = {n: torch.full(p.shape, torch.nan) for n, p in layout.items()}
    with HfReader(source, spec) as reader:
        fill_local(params, layout, reader)
    with dist.shared_directory(target, 60) as partial:
        export.write_hf([module_of(params)], spec, cfg, partial, like=source, dtype=dtype, **options)
        inside(partial)


@pytest.mark.parametrize("limit, shards", [(1 << 30, 1), (20_000, 5)])
def test_written_checkpoint_is_bit_equal_and_loads_in_transformers(tiny_hf, tmp_path, limit, shards):
    source, target = tiny_hf("qwen3"), tmp_path / "out"
    (source / "tokenizer_config.json").write_text("{}")
    tensors = everything(source)

    def not_there_yet(partial):
        assert not target.exists() and partial.exists()

    write(source, target, max_shard_bytes=limit, inside=not_there_yet)
    files = list(target.glob("*.safetensors"))
    assert len(files) >= shards
    assert (target / "model.safetensors.index.json").exists() == (shards > 1)
    back = everything(target)
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (target / "tokenizer_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in tensors.items())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_dtype_of_config_follows_the_weights(tiny_hf, tmp_path):
    source, target = tiny_hf("llama"), tmp_path / "out"
    write(source, target, torch.bfloat16)
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(iter(everything(target).values())).dtype is torch.bfloat16


def test_nothing_partial_looks_whole(tiny_hf, tmp_path, monkeypatch):
    source, target = tiny_hf("llama"), tmp_path / "out"
    collect = export.ShardTarget.update_weight

    def lost(self, chunk, name):
        if name == "lm_head.weight":
            self._open.pop(name)
        else:
            collect(self, chunk, name)

    def twice(self, chunk, name):
        collect(self, chunk, name)
        if name == "model.embed_tokens.weight":
            self._write()
            self.shards.append(self.shards[-1])

    def renamed(self, chunk, name):
        if name == "lm_head.weight":
            self._open["model.other"] = self._open.pop(name)
            name = "model.other"
        collect(self, chunk, name)

    for update_weight, words in [
        (lost, "1 tensors missing: lm_head.weight"),
        (twice, "embed_tokens.weight was written 2 times"),
        (renamed, "1 tensors unexpected: model.other"),
    ]:
        with monkeypatch.context() as planted:
            planted.setattr(export.ShardTarget, "update_weight", update_weight)
            with pytest.raises(HfCheckpointError, match=words):
                write(source, target, max_shard_bytes=20_000)
        assert {p.name for p in tmp_path.iterdir()} == {"hf"}

    def misshapen(tensors, path, **options):
        small = {"model.embed_tokens.weight": torch.zeros(3, 3)} if "model.embed_tokens.weight" in tensors else {}
        save_file(tensors | small, path, **options)

    with monkeypatch.context() as planted:
        planted.setattr(export, "save_file", misshapen)
        with pytest.raises(HfCheckpointError, match=r"has shape \[3, 3\]; config\.json asks for \[301, 32\]"):
            write(source, target, max_shard_bytes=20_000)
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}
    write(source, target, max_shard_bytes=20_000)
    with pytest.raises(OutputExistsError, match="exists already"):
        write(source, target, max_shard_bytes=20_000)
    assert len(everything(target)) == len(everything(source))
