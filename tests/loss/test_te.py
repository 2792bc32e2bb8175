"""FP8 asked for where it cannot run is an error with the reason, and is never ignored."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from tools.bench.kernel_report import VERSIONS, golden
from treepo_mega.config import Config, ConfigError, LossConfig, ModelConfig, check, parse_config
from treepo_mega.loss import backend, te
from treepo_mega.loss.backend import resolve_backend
from treepo_mega.loss.head import LossHead


def config(**sections: object) -> Config:
    base = {"model": {"hf_checkpoint": "x"}, "data": {"train": [{"path": "x.jsonl"}]}}
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return parse_config(base)


def on_gpu(monkeypatch, capability: tuple[int, int] | None) -> None:
    """As if this machine had a GPU of that compute capability."""
    monkeypatch.setattr(te, "has_cuda", lambda: capability is not None)
    monkeypatch.setattr(backend, "compute_capability", lambda: capability)


def without_te(monkeypatch, error: Exception) -> None:
    def fail(name: str):
        raise error

    monkeypatch.setattr(te, "importlib", SimpleNamespace(import_module=fail))


def te_that_can(monkeypatch, **answers: tuple[bool, str]) -> None:
    """As if Transformer Engine were installed and its probes answered so."""
    module = SimpleNamespace()
    for name, answer in answers.items():
        setattr(module, name, lambda return_reason, answer=answer: answer)
    monkeypatch.setattr(te, "importlib", SimpleNamespace(import_module=lambda name: module))


FP8_LAYERS = ModelConfig(hf_checkpoint="x", params_dtype="bf16", fp8="hybrid", first_last_layers_bf16=True)


def test_fp8_layers_without_a_gpu_are_refused(monkeypatch):
    on_gpu(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"model.fp8=hybrid needs Transformer Engine on a GPU, and torch sees none"):
        te.body_fields(FP8_LAYERS)


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("no module"), FileNotFoundError("torch lib"), OSError("libnccl")]
)
def test_fp8_layers_without_transformer_engine_are_refused(monkeypatch, error):
    on_gpu(monkeypatch, (9, 0))
    without_te(monkeypatch, error)
    with pytest.raises(ConfigError, match=f"does not load .{type(error).__name__}: {error}"):
        te.body_fields(FP8_LAYERS)


def test_fp8_layers_on_a_gpu_without_the_recipe_are_refused(monkeypatch):
    on_gpu(monkeypatch, (9, 0))
    te_that_can(monkeypatch, is_mxfp8_available=(False, "Device compute capability 10.0 or higher required"))
    with pytest.raises(ConfigError, match=r"fp8_recipe=mxfp8 cannot run on this GPU: Device compute capability 10.0"):
        te.body_fields(FP8_LAYERS.model_copy(update={"fp8_recipe": "mxfp8"}))


def test_fp8_layers_become_megatrons_fields(monkeypatch):
    on_gpu(monkeypatch, (9, 0))
    te_that_can(monkeypatch, is_fp8_available=(True, ""))
    assert te.body_fields(FP8_LAYERS) == {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True}
    assert te.body_fields(ModelConfig(hf_checkpoint="x")) == {}


def test_megatron_knows_the_fields_that_it_is_given(monkeypatch):
    """The configuration takes them, with the layers that stay in bf16, and without FP8 nothing changes."""
    on_gpu(monkeypatch, (9, 0))
    te_that_can(monkeypatch, is_fp8_available=(True, ""))
    from treepo_mega.actor.model import TransformerConfig

    fields = te.body_fields(FP8_LAYERS)
    made = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **fields)
    assert (made.fp8, made.fp8_recipe, made.first_last_layers_bf16) == ("hybrid", "tensorwise", True)
    assert made.num_layers_at_start_in_bf16 == made.num_layers_at_end_in_bf16 == 1


def test_packs_of_fp8_layers_are_padded_to_what_they_take():
    assert te.row_multiple(ModelConfig(hf_checkpoint="x")) == 1
    assert te.row_multiple(FP8_LAYERS) == 16
    assert te.row_multiple(FP8_LAYERS.model_copy(update={"fp8_recipe": "mxfp8"})) == 32


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"model": {"fp8": "hybrid"}}, "model.fp8 hybrid needs model.params_dtype bf16, which is fp32"),
        ({"model": {"first_last_layers_bf16": True}}, "model.first_last_layers_bf16 needs model.fp8"),
        (
            {"model": {"fp8": "e4m3", "params_dtype": "bf16", "first_last_layers_bf16": True, "fp8_recipe": "delayed"}},
            "cannot be had with model.fp8_recipe delayed",
        ),
        ({"loss": {"fp8_grads": True}}, "loss.fp8_grads needs loss.precision fp8, which is fp32"),
        (
            {"debug": {"power_of_2_scales": True}, "loss": {"precision": "bf16"}},
            "debug.power_of_2_scales needs loss.precision fp8",
        ),
    ],
)
def test_settings_that_contradict_one_another_are_named(sections, message):
    with pytest.raises(ConfigError, match=message):
        check(config(**sections), 1)


def test_unknown_keys_of_the_head_name_the_nearest():
    with pytest.raises(ConfigError, match=r"loss.precison: unknown key \(did you mean 'precision'"):
        config(loss={"precison": "fp8"})


def test_the_head_follows_the_parameters_unless_told():
    head = config(model={"params_dtype": "bf16"}).loss
    assert (head.precision, head.logprob_precision) == ("bf16", "bf16")
    cfg = config(loss={"precision": "fp8"})
    assert cfg.loss.logprob_precision == "fp8"
    assert cfg.algo.use_tis, "the engine's logprobs are no FP8 ones: the difference is weighed"
    apart = config(loss={"precision": "fp8", "logprob_precision": "bf16"}).loss
    assert (apart.precision, apart.logprob_precision) == ("fp8", "bf16")


@pytest.mark.parametrize(
    "capability, head, want",
    [
        (None, {}, "torch"),
        (None, {"precision": "fp8"}, "torch"),
        ((8, 0), {"precision": "bf16"}, "torch"),
        ((8, 0), {"precision": "fp8", "backend": "torch"}, "torch"),
        ((9, 0), {"precision": "fp8"}, "triton"),
        ((9, 0), {}, "torch"),
        ((10, 0), {"precision": "fp32"}, "torch"),
        ((9, 0), {"precision": "fp8", "logprob_precision": "fp32"}, "triton"),
        ((10, 0), {"backend": "triton", "precision": "bf16"}, "triton"),
        ((9, 0), {"backend": "torch"}, "torch"),
    ],
)
def test_backends(monkeypatch, capability, head, want):
    on_gpu(monkeypatch, capability)
    assert resolve_backend(LossConfig(**head)) == want


@pytest.mark.parametrize(
    "capability, head, message",
    [
        (None, {"backend": "triton"}, "loss.backend=triton cannot run: torch sees no GPU"),
        ((8, 0), {"backend": "triton"}, "compute capability 8.0, they need 9.0"),
        (
            (9, 0),
            {"backend": "triton"},
            "spill 28 KB of registers a thread, and fp32 is in loss.precision and loss.logprob",
        ),
        (
            (9, 0),
            {"backend": "triton", "precision": "fp8", "logprob_precision": "fp32"},
            "fp32 is in loss.logprob_precision. Use loss.backend=torch, or auto",
        ),
        ((8, 0), {"precision": "fp8"}, "loss.precision=fp8 cannot run on this GPU"),
        ((8, 9), {"logprob_precision": "fp8"}, "loss.precision=fp8 cannot run on this GPU"),
    ],
)
def test_backends_that_cannot_run_are_refused(monkeypatch, capability, head, message):
    on_gpu(monkeypatch, capability)
    with pytest.raises(ConfigError, match=message):
        resolve_backend(LossConfig(**head))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_what_auto_runs_in_kernels_spills_nothing(monkeypatch, precision, version):
    """Of each precision the head runs in torch, or its compiled kernels stand in the golden tables without spills."""
    on_gpu(monkeypatch, (9, 0))
    hidden, weight = torch.zeros(2, 8), torch.zeros(16, 8)
    loss = LossConfig(precision="bf16", logprob_precision=precision)
    head = LossHead(lambda: weight, loss, vocab_size=16, temperature=1.0, tile_rows=2)
    used = head.shard(head.guard.numerics(for_update=False)).backend
    kernels = [
        kernel
        for kernel in golden(version)["kernels"]
        if kernel["kernel"].startswith((f"forward-{precision}", f"dlogits-{precision}"))
    ]
    assert head.backend == "triton"
    assert used == ("torch" if precision == "fp32" else "triton")
    if used == "torch":
        assert head.logprobs(hidden, torch.zeros(2, dtype=torch.long))[0].shape == (2,)
        return
    assert {kernel["kernel"].split("-")[0] for kernel in kernels} == {"forward", "dlogits"}
    assert {kernel["arch"] for kernel in kernels} == {"sm_90a", "sm_100a"}
    assert all(kernel["spill_bytes"] == 0 for kernel in kernels)


def test_kernels_without_triton_are_refused(monkeypatch):
    on_gpu(monkeypatch, (9, 0))
    none = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(backend, "importlib", none)
    with pytest.raises(ConfigError, match="the package triton is not installed"):
        resolve_backend(LossConfig(backend="triton", precision="bf16"))


def test_fp8_gradient_products_need_transformer_engine(monkeypatch):
    on_gpu(monkeypatch, (9, 0))
    without_te(monkeypatch, ModuleNotFoundError("transformer_engine"))
    with pytest.raises(ConfigError, match=r"loss.fp8_grads needs Transformer Engine"):
        resolve_backend(LossConfig(precision="fp8", fp8_grads=True))


def test_the_products_of_transformer_engine_are_refused_here():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: test_gpu.py compares the products")
    with pytest.raises(ConfigError, match="torch sees none"):
        te.gradient_products(torch.zeros(2, 16), torch.zeros(16, 8), torch.zeros(2, 8))


def test_nothing_imports_triton_or_transformer_engine_before_it_is_asked_for():
    """The CPU trainer must not depend on either."""
    import subprocess
    import sys

    modules = "treepo_mega.loss.head, treepo_mega.loss.fused, treepo_mega.loss.policy, treepo_mega.loss.te"
    code = f"import sys, {modules}, treepo_mega.loss.guard, treepo_mega.loss.backend; import treepo_mega as t; "
    code += "print([m for m in sys.modules if m.startswith(('treepo_mega.loss.triton', 'transformer_engine'))])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr
    assert importlib.util.find_spec("treepo_mega.loss.triton") is not None
