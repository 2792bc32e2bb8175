"""Which fused operations a layer takes by device and modules, and that Megatron and torch have them as assumed."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchgen

from treepo_mega.actor import model
from treepo_mega.actor.fusions import fused_operations
from treepo_mega.actor.layers import RMSNorm
from treepo_mega.config import parse_config
from treepo_mega.modelspec.spec import ModelSpec

# `treepo_mega` comes before Megatron, whose sources it rewrites for a CPU; a sorted list of imports would not do so.
FUSIONS = importlib.import_module("megatron.core.fusions.fused_bias_swiglu")
ROPE = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
CHECKPOINT = "examples/configs/qwen25_7b"


def on(**place) -> set[str]:
    return {name for name, value in fused_operations(**place).items() if value}


@pytest.mark.parametrize(
    "impl, on_gpu, factor, want",
    [
        ("local", False, 1.0, set()),
        ("transformer_engine", False, 1.0, set()),
        ("local", True, 1.0, {"bias_activation_fusion"}),
        ("transformer_engine", True, 1.0, {"bias_activation_fusion", "apply_rope_fusion"}),
        ("transformer_engine", True, 1.1, {"bias_activation_fusion"}),
    ],
)
def test_what_is_on_by_modules_and_device(impl, on_gpu, factor, want):
    assert on(impl=impl, on_gpu=on_gpu, rotation_factor=factor) == want


def test_every_switch_of_megatron_that_concerns_a_layer_is_decided():
    """A new version's switch would be at its default without a word."""
    fields = {field.name for field in dataclasses.fields(model.TransformerConfig)}
    # `layers.gradient_fusion` decides the one, and the loss head that the other fuses is ours.
    elsewhere = {"gradient_accumulation_fusion", "cross_entropy_loss_fusion"}
    switches = {name for name in fields if name.endswith("_fusion") and not name.startswith("moe_")} - elsewhere
    decided = set(fused_operations("local", on_gpu=True))
    assert switches <= decided <= fields


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_megatron_takes_the_switches_of_a_gpu(monkeypatch, impl):
    monkeypatch.setattr(model, "has_cuda", lambda: True)
    monkeypatch.setattr(ROPE, "fused_apply_rotary_pos_emb", lambda *args, **kwargs: None)
    base = {"model": {"hf_checkpoint": CHECKPOINT, "transformer_impl": impl}, "data": {"train": [{"path": "x.jsonl"}]}}
    cfg = parse_config(base)
    config = model.transformer_config(cfg, ModelSpec.from_hf(cfg.model.hf_checkpoint))
    wanted = fused_operations(impl, on_gpu=True)
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_layers_that_nobody_chose_are_not_built():
    base = {"model": {"hf_checkpoint": CHECKPOINT, "transformer_impl": "auto"}, "data": {"train": [{"path": "x"}]}}
    cfg = parse_config(base)
    with pytest.raises(RuntimeError, match="still auto"):
        model.transformer_config(cfg, ModelSpec.from_hf(cfg.model.hf_checkpoint))


def rotated(monkeypatch, factor: float) -> list[tuple]:
    """What Megatron hands to Transformer Engine's rotation, for 5 tokens and 2 heads of 8; nothing when it does not."""
    calls: list[tuple] = []

    def kernel(heads, angles, interleaved):
        calls.append((tuple(heads.shape), tuple(angles.shape), angles.dtype, interleaved))
        return heads

    monkeypatch.setattr(ROPE, "fused_apply_rotary_pos_emb", kernel)
    config = SimpleNamespace(
        apply_rope_fusion=True, mrope_section=None, rotary_interleaved=False, multi_latent_attention=False
    )
    heads, angles = torch.randn(5, 1, 2, 8), torch.randn(5, 1, 1, 8)
    ROPE.apply_rotary_pos_emb(heads, angles, config, mscale=factor, cp_group=SimpleNamespace(size=lambda: 1))
    return calls


def test_the_rotation_kernel_gets_an_angle_for_each_row(monkeypatch):
    assert rotated(monkeypatch, 1.0) == [((5, 1, 2, 8), (5, 1, 1, 8), torch.float32, False)]


def test_the_rotation_kernel_is_not_for_angles_with_a_factor(monkeypatch):
    with pytest.warns(UserWarning, match="not supported by TE's fused RoPE"):
        assert rotated(monkeypatch, 1.1) == []


def test_the_compiled_activation_costs_few_graphs():
    """10 pack lengths, with inputs that want gradients and that do not: a graph a length would pass the limit of 8."""
    graphs = []

    def count(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    forward = torch.compile(FUSIONS.swiglu, backend=count)
    backward = torch.compile(FUSIONS.swiglu_back, backend=count)
    for length in range(512, 512 * 11, 512):
        for wants_gradient in (False, True):
            with torch.no_grad():
                rows = torch.zeros(length, 1, 4).requires_grad_(wants_gradient)
                forward(rows)
                backward(rows[..., :2], rows)
    torch._dynamo.reset()
    assert 2 <= len(graphs) <= 8, "at most 4 a function, and torch allows 8"


def test_megatrons_activation_is_the_same_function():
    rows = torch.randn(6, 1, 8, dtype=torch.float64, requires_grad=True)
    gate, value = rows.chunk(2, -1)
    plain = torch.nn.functional.silu(gate) * value
    fused = FUSIONS.bias_swiglu_impl(rows, None)
    torch.testing.assert_close(fused, plain)
    slope = torch.randn_like(plain)
    torch.testing.assert_close(*(torch.autograd.grad(out, rows, slope)[0] for out in (fused, plain)))


def test_our_norm_is_one_kernel_of_torch_and_apexs_knows_no_rms():
    """torch's table of operators names kernels for CUDA behind what our norm calls; its CPU build has the table too."""
    table = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    assert "CUDA: _fused_rms_norm_cuda\n" in table and "CUDA: _fused_rms_norm_backward_cuda\n" in table
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        norm(torch.randn(3, 8))
    assert "aten::_fused_rms_norm" in {event.key for event in seen.key_averages()}
    apex = importlib.import_module("megatron.core.fusions.fused_layer_norm").FusedLayerNorm
    assert 'normalization == "LayerNorm"' in inspect.getsource(apex)
