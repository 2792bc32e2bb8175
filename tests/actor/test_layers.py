"""Which modules a layer is made of and who adds weight gradients: what cannot run is refused with the reason.

That trees train exactly through them: the cells with twins of test_trees.py, and on a GPU the tests below.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.ranks import run_ranks
from treepo_mega.actor import layers
from treepo_mega.config import ConfigError, ModelConfig, parse_config
from treepo_mega.loss import te
from treepo_mega.reshard.sides import grid_of
from treepo_mega.runtime.device import has_cuda


def model(**more) -> ModelConfig:
    return ModelConfig(hf_checkpoint="x", **more)


def machine(monkeypatch, *, gpu: bool, apex: Exception | None = None) -> None:
    """As if this machine had a GPU or not, and Apex's kernel unless loading it gives an error."""

    def load(name: str) -> object:
        if apex is not None:
            raise apex
        return SimpleNamespace(__name__=name)

    monkeypatch.setattr(layers, "has_cuda", lambda: gpu)
    monkeypatch.setattr(te, "has_cuda", lambda: gpu)
    monkeypatch.setattr(layers, "importlib", SimpleNamespace(import_module=load))


NO_APEX = ModuleNotFoundError("No module named 'fused_weight_gradient_mlp_cuda'")
TE = {"transformer_impl": "transformer_engine"}
FP8 = {"fp8": "hybrid", "params_dtype": "bf16"}


@pytest.mark.parametrize(
    "gpu, apex, keys, want",
    [
        (False, None, {}, None),
        (False, None, TE, None),
        (True, None, {}, "apex"),
        (True, NO_APEX, {}, None),
        (True, NO_APEX, TE, "transformer_engine"),
        (True, NO_APEX, FP8, "transformer_engine"),
        (True, NO_APEX, TE | {"gradient_accumulation_fusion": True}, "transformer_engine"),
        (True, None, {"gradient_accumulation_fusion": True}, "apex"),
        (True, None, TE | {"gradient_accumulation_fusion": False}, None),
    ],
)
def test_who_adds_weight_gradients(monkeypatch, gpu, apex, keys, want):
    machine(monkeypatch, gpu=gpu, apex=apex)
    assert layers.gradient_fusion(model(**keys)) == want


@pytest.mark.parametrize(
    "gpu, apex, message",
    [
        (False, None, "gradient_accumulation_fusion=true cannot run: torch sees no GPU here"),
        (True, NO_APEX, "need Apex's kernel fused_weight_gradient_mlp_cuda, which does not load .ModuleNotFoundError"),
        (True, OSError("undefined symbol"), "does not load .OSError: undefined symbol.*build Apex with --cuda_ext"),
    ],
)
def test_fusion_that_is_asked_for_and_cannot_run_is_refused(monkeypatch, gpu, apex, message):
    machine(monkeypatch, gpu=gpu, apex=apex)
    with pytest.raises(ConfigError, match=message):
        layers.gradient_fusion(model(gradient_accumulation_fusion=True))


def test_transformer_engines_layers_are_refused_without_a_gpu(monkeypatch):
    machine(monkeypatch, gpu=False)
    message = r"model.transformer_impl=transformer_engine needs Transformer Engine on a GPU.*On a CPU use model.transf"
    with pytest.raises(ConfigError, match=message):
        layers.layer_spec(SimpleNamespace(qk_layernorm=False), model(**TE), None)


def test_a_transformer_engine_without_the_switch_is_refused():
    from torch import nn

    with pytest.raises(RuntimeError, match="no layer has Transformer Engine's switch fuse_wgrad_accumulation"):
        layers.fuse_weight_gradients(nn.Sequential(nn.Linear(2, 2)))


def test_the_key_leads_to_the_names_of_refits_and_plans():
    base = {"model": {"hf_checkpoint": "x"}, "data": {"train": [{"path": "x.jsonl"}]}}
    assert grid_of(parse_config(base)).naming == "local"
    base["model"] |= TE
    assert grid_of(parse_config(base)).naming == "te"


@pytest.mark.parametrize("value", ["maybe", "automatic"])
def test_values_of_the_fusion_key(value):
    base = {"model": {"hf_checkpoint": "x", "gradient_accumulation_fusion": value}}
    with pytest.raises(ConfigError, match=r"model\.gradient_accumulation_fusion"):
        parse_config(base | {"data": {"train": [{"path": "x.jsonl"}]}})


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="Apex's and Transformer Engine's kernels need a CUDA device")
@pytest.mark.parametrize("overrides", [TE, TE | {"gradient_accumulation_fusion": False}, {}])
def test_trees_on_a_gpu_against_transformers_on_the_cpu(tmp_path, overrides):
    if overrides:
        pytest.importorskip("transformer_engine.pytorch")
    cell = {"layout": {}, "kind": "qwen3", "tied": True, "recompute": True, "depth": 3, "split": True}
    cell["overrides"] = [f"model.{k}={v}" for k, v in overrides.items()]
    (tmp_path / "cells.json").write_text(json.dumps([cell]))
    run_ranks(1, Path(__file__).with_name("trees_worker.py"), tmp_path, tmp_path / "cells.json", timeout=280)
    (got,) = json.loads((tmp_path / "results.json").read_text())
    # TF32 in the compiled attention and in cuBLAS, against fp32.
    assert got["logprob_diff"] <= 1e-2 and got["gradient_diff"] <= 2e-2
