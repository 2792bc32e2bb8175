"""FLOPs against a count by hand and against torch's own counter on a real model; peaks; figures per GPU."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from treepo_mega.config import Config, ParallelConfig
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.flops import (
    PEAKS,
    UPDATE,
    Flops,
    Kinds,
    Work,
    forward_flops,
    mfu,
    peak_flops,
    recomputed_flops,
)
from treepo_mega.monitor.registry import check_known
from treepo_mega.monitor.workload import Workload, kinds_of, rollout_work

TINY = ModelSpec("Qwen3ForCausalLM", 8, 2, 2, 1, 4, 16, 32)
BF16 = Kinds("bf16", "bf16", "bf16")
H100 = "NVIDIA H100 80GB HBM3"


def test_a_forward_pass_counted_by_hand():
    """Hidden 8, 2 layers, 2 heads of 4, one key/value head, MLP 16, vocabulary 32."""
    flops = forward_flops(TINY, Work(tokens=10, pairs=55, rows=3))
    query, key, value, output = 8 * 8, 8 * 4, 8 * 4, 8 * 8
    gate, up, down = 8 * 16, 8 * 16, 16 * 8
    assert flops.layers == 2 * 2 * 10 * (query + key + value + output + gate + up + down) == 23_040
    # Of each pair and head: 4 products for the score, 4 for the value.
    assert flops.attention == 2 * 2 * 55 * 2 * (4 + 4) == 3_520
    assert flops.head == 2 * 3 * 8 * 32 == 1_536
    assert flops.total == 28_096


@pytest.mark.parametrize("tied", [False, True])
def test_a_forward_pass_of_transformers_as_torch_counts_it(tied):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    spec = ModelSpec.from_config({**config.to_dict(), "architectures": ["Qwen3ForCausalLM"]})
    length = 24
    counter = FlopCounterMode(display=False)
    model = Qwen3ForCausalLM(config)
    with counter:
        logits = model(torch.arange(length)[None]).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    # Masked pairs are computed there.
    counted = forward_flops(spec, Work(tokens=length, pairs=length**2, rows=length))
    # Turning positions into angles is a product of matrices too: head_dim / 2 angles a token, once.
    angles = 2 * length * 16 // 2
    assert forward == pytest.approx(counted.total, abs=angles)
    assert counter.get_total_flops() == pytest.approx(UPDATE * counted.total, abs=angles)


def test_of_experts_those_count_that_a_token_takes():
    sizes = {"num_experts": 4, "experts_per_token": 2, "expert_intermediate_size": 12}
    spec = ModelSpec("Qwen3MoeForCausalLM", 8, 3, 2, 1, 4, 16, 32, **sizes)
    # Queries and the output of 2 heads, keys and values of 1, each of 4; the router; 2 of 4 experts.
    layer = 8 * 4 * (2 * 2 + 2 * 1) + 4 * 8 + 2 * 3 * 8 * 12
    assert forward_flops(spec, Work(tokens=5)).layers == 2 * 3 * 5 * layer
    shared = dataclasses.replace(spec, architecture="Qwen2MoeForCausalLM", shared_expert_intermediate_size=20)
    layer += 3 * 8 * 20 + 8
    assert forward_flops(shared, Work(tokens=5)).layers == 2 * 3 * 5 * layer


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({}, Flops(0, 0, 0)),
        ({"recompute_granularity": "selective"}, Flops(0, 40, 0)),
        ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, Flops(80, 40, 0)),
        ({"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}, Flops(40, 20, 0)),
        (
            {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 2,
                "pipeline_model_parallel_size": 2,
            },
            Flops(80, 40, 0),
        ),
    ],
)
def test_recomputation_as_configured(parallel, expected):
    assert recomputed_flops(Flops(80, 40, 5), TINY, ParallelConfig.model_validate(parallel)) == expected


@pytest.mark.parametrize(
    ("device", "bf16"),
    [
        (H100, 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_drivers_names(device, bf16):
    assert peak_flops(device, "bf16") == (None if bf16 is None else bf16 * 1e12)


def test_a_peak_doubles_with_each_halving_of_the_operands():
    for _, table in PEAKS:
        assert table["bf16"] == pytest.approx(2 * table["fp32"], rel=2e-3)
        assert "fp8" not in table or table["fp8"] == pytest.approx(2 * table["bf16"], rel=2e-3)


def test_mfu_by_hand_and_with_parts_of_two_kinds():
    second = Flops(989.5e12, 0, 0)
    assert mfu(second, seconds=4, gpus=2, device=H100, kinds=BF16) == pytest.approx(1 / 8)
    assert mfu(second, seconds=4, gpus=2, device=H100, kinds=Kinds("fp8", "bf16", "bf16")) == pytest.approx(1 / 16)
    assert mfu(second, seconds=4, gpus=2, device="cpu", kinds=BF16) is None
    assert mfu(second, seconds=4, gpus=2, device="NVIDIA A100", kinds=Kinds("fp8", "bf16", "bf16")) is None
    assert mfu(Flops(0, 0, 0), seconds=4, gpus=2, device=H100, kinds=BF16) is None


@given(st.tuples(*[st.floats(1, 1e15)] * 3), st.floats(1, 3), st.integers(1, 64))
def test_a_device_at_its_peak_is_at_most_at_100_percent(parts, slower, gpus):
    """However the work is split over types: the time it takes at least is that at the peak of each."""
    kinds = Kinds("fp8", "bf16", "fp32")
    least = parts[0] / 1979e12 + parts[1] / 989.5e12 + parts[2] / 494.5e12
    share = mfu(Flops(*parts), seconds=slower * least / gpus, gpus=gpus, device=H100, kinds=kinds)
    assert share is not None and math.isclose(share, 1 / slower, rel_tol=1e-9)


def config(**values: object) -> Config:
    needed = {"model": {"hf_checkpoint": "nowhere", "params_dtype": "bf16"}, "data": {"train": [{"path": "nothing"}]}}
    cfg = Config.model_validate({**needed, **values})
    cfg.loss.precision = cfg.loss.logprob_precision = "bf16"
    return cfg


def test_figures_of_a_step_per_gpu():
    work = Workload(config(), gpus=2, device=H100)
    of_pass = Work(tokens=1000, pairs=5000, rows=900, unique=1000, flat=1600)
    work.add("step", TINY, of_pass)
    work.add("old_logprobs", TINY, Work())
    work.add("update", TINY, of_pass, passes=UPDATE)
    figures = work.pop({"timing_s/step": 5.0, "timing_s/update": 2.0, "timing_s/old_logprobs": 1.0})
    for name in figures:
        check_known(name)
    assert figures["perf/unique_tokens_per_s_per_gpu"] == 1000 / 5 / 2
    assert figures["perf/flat_tokens_per_s_per_gpu"] == 1600 / 5 / 2
    assert figures["perf/update_flat_tokens_per_s_per_gpu"] == 1600 / 2 / 2
    flops = 3 * forward_flops(TINY, of_pass).total
    assert figures["perf/update_tflops_per_gpu"] == pytest.approx(flops / 2 / 2 / 1e12)
    assert figures["perf/update_mfu"] == figures["perf/update_hfu"] == pytest.approx(flops / 989.5e12 / 4)
    assert figures["perf/update_recompute_share"] == 0
    assert not [name for name in figures if "old_logprobs" in name], "nothing was computed there"
    assert work.pop({"timing_s/update": 2.0}) == {}, "a step's counts are its own"


def test_recomputation_is_in_hfu_alone():
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    figures = []
    for parallel in ({}, again):
        work = Workload(config(parallel=parallel), gpus=1, device=H100)
        work.add("update", TINY, Work(1000, 5000, 0, 1000, 1000), passes=UPDATE)
        figures.append(work.pop({"timing_s/update": 1.0}))
    plain, recomputing = figures
    assert recomputing["perf/update_mfu"] == plain["perf/update_mfu"]
    assert recomputing["perf/update_hfu"] == pytest.approx(plain["perf/update_hfu"] * 4 / 3)
    assert recomputing["perf/update_recompute_share"] == pytest.approx(1 / 4)


def test_a_cpu_has_throughput_and_no_mfu():
    work = Workload(config(), gpus=1, device="cpu")
    work.add("update", TINY, Work(10, 55, 9, 10, 16), passes=UPDATE)
    figures = work.pop({"timing_s/update": 1.0})
    assert figures["perf/update_tflops_per_gpu"] > 0
    assert not [name for name in figures if name.endswith(("mfu", "hfu"))]


def test_types_by_phase():
    cfg = config(model={"hf_checkpoint": "nowhere", "params_dtype": "bf16", "fp8": "hybrid"})
    cfg.rollout.engine.dtype = "bf16"
    cfg.loss.precision = "fp8"
    cfg.loss.logprob_precision = "bf16"
    assert kinds_of("rollout", cfg) == BF16
    assert kinds_of("update", cfg) == Kinds("fp8", "bf16", "fp8")
    assert kinds_of("old_logprobs", cfg) == Kinds("fp8", "bf16", "bf16")


def test_sampling_counts_prompts_and_computes_what_was_forwarded():
    metrics = {"rollout/forwarded_tokens": 50.0, "rollout/forwarded_pairs": 700.0, "rollout/generated_tokens": 40.0}
    metrics |= {"tree/unique_tokens": 38.0, "tree/flat_tokens": 60.0}
    metrics |= {"tree/prompt_tokens": 10.0, "tree/flat_prompt_tokens": 40.0}
    assert rollout_work(metrics) == Work(tokens=50, pairs=700, rows=40, unique=48, flat=100)
