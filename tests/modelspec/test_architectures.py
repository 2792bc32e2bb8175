"""A new architecture is one small file: maps, plans and conversion follow from it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.reshard.worlds import EXPERTS, carry_out, full_tensors, model, sliced
from tests.whole import module_of
from treepo_mega.checkpoint.export import export_hf
from treepo_mega.checkpoint.hf import HfReader
from treepo_mega.checkpoint.load import fill_local
from treepo_mega.convert.convert import conversion_config
from treepo_mega.modelspec import architectures, spec
from treepo_mega.modelspec.mcore_layout import ModelSpec, chunk_layouts, hf_shapes, mcore_layout
from treepo_mega.modelspec.vllm_layout import vllm_layout
from treepo_mega.reshard.plan import Cluster, plan_reshard
from treepo_mega.reshard.sides import Grid, mcore_side, vllm_side

NEW_FILE = '''
"""A decoder whose tensors have names of their own."""

from treepo_mega.modelspec.architectures import LLAMA_NAMES, Architecture

ARCHITECTURE = Architecture(
    "NovelForCausalLM",
    qkv_bias=True,
    qk_norm=True,
    names=LLAMA_NAMES | {"q": "attn.wq", "k": "attn.wk", "v": "attn.wv", "o": "attn.wo", "attention": "attn"},
)
'''
CONFIG = {
    "architectures": ["NovelForCausalLM"], "hidden_size": 6, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 8, "vocab_size": 29, "head_dim": 2,
}  # fmt: skip


def round_trip_through_files(directory, spec_, tmp_path):
    """HF files -> every rank's Megatron parameters -> HF tensors -> files: the same bits."""
    with HfReader(directory, spec_) as reader:
        layout = mcore_layout(spec_, divisible_by=4)
        params = {n: torch.full(p.shape, torch.nan) for n, p in layout.items()}
        fill_local(params, layout, reader)
    cfg = conversion_config(directory, divisible_by=4)
    export_hf([module_of(params)], spec_, cfg, tmp_path / "back", like=directory, dtype=torch.float32)
    back, there = (load_file(d / "model.safetensors") for d in (tmp_path / "back", directory))
    assert back.keys() == there.keys()
    assert all(torch.equal(back[n], t) for n, t in there.items())


@pytest.fixture
def novel(tmp_path, monkeypatch):
    """The package with one more file in it."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "novel.py").write_text(NEW_FILE)
    monkeypatch.setattr(architectures, "__path__", [*architectures.__path__, str(folder)])
    monkeypatch.setattr(spec, "ARCHITECTURES", architectures.discover())
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    tensors = {n: torch.randn(s) for n, s in hf_shapes(ModelSpec.from_hf(directory)).items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_one_file_adds_an_architecture(novel, tmp_path):
    new = ModelSpec.from_hf(novel)
    assert "model.layers.3.attn.wk.bias" in hf_shapes(new)
    assert "model.layers.0.attn.qkv_proj.bias" in vllm_layout(new)
    source, target = mcore_side(new, Grid(2, 2, 2), 4), vllm_side(new, 2, 4)
    full = full_tensors(new)
    got, _, _ = carry_out(plan_reshard(source, target, Cluster(4, 4), itemsize=4), source, target, full)
    for r in range(4):
        assert all(np.array_equal(got[r][0][n], v) for n, v in sliced(full, target.of(r))[0].items())
    round_trip_through_files(novel, new, tmp_path)


def test_the_same_name_twice_is_refused(tmp_path, monkeypatch):
    (tmp_path / "again.py").write_text(NEW_FILE.replace("NovelForCausalLM", "LlamaForCausalLM"))
    monkeypatch.setattr(architectures, "__path__", [*architectures.__path__, str(tmp_path)])
    with pytest.raises(ImportError, match="LlamaForCausalLM is described twice"):
        architectures.discover()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_from_a_checkpoint_of_transformers_and_back(kind, tmp_path):
    config = AutoConfig.for_model(
        kind, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=20, vocab_size=33, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "hf")
    there = ModelSpec.from_hf(tmp_path / "hf")
    assert (there.num_experts, there.expert_intermediate_size) == (4, 20 if kind == "mixtral" else 12)
    round_trip_through_files(tmp_path / "hf", there, tmp_path)
    text = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key, value in {"mixtral": {"sliding_window": 8}, "qwen3_moe": {"mlp_only_layers": [0]}}[kind].items():
        with pytest.raises(spec.ModelSpecError, match=f"{key} is .*only .* is supported"):
            ModelSpec.from_config({**text, key: value})


@pytest.mark.parametrize("architecture", EXPERTS)
def test_every_expert_is_on_one_expert_parallel_rank(architecture):
    small = model(architecture)
    held = []
    for e in range(2):
        params = chunk_layouts(small, tp=1, pp=1, tp_rank=0, pp_rank=0, ep=2, ep_rank=e)[0]
        held.append({b.hf_name for n, p in params.items() if ".experts." in n for b in p.blocks})
    assert not held[0] & held[1]
    assert held[0] | held[1] == {n for n in hf_shapes(small) if "experts." in n}


def test_names_of_transformer_engine_are_the_same_tensors_under_other_names():
    for architecture in ("LlamaForCausalLM", "Qwen3MoeForCausalLM"):
        small = model(architecture)
        local, te = (mcore_layout(small, tp=2, naming=naming) for naming in ("local", "te"))
        assert sorted(map(repr, local.values())) == sorted(map(repr, te.values()))
        prefix = "decoder.layers.0."
        fused = te.keys() - local.keys()
        assert f"{prefix}self_attention.linear_qkv.layer_norm_weight" in fused
        dense = architecture == "LlamaForCausalLM"
        assert (f"{prefix}mlp.linear_fc1.layer_norm_weight" in fused) == dense
        assert (f"{prefix}mlp.experts.linear_fc1.weight3" in fused) != dense
