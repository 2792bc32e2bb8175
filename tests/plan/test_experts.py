"""Plans of models with experts: what a rank holds, sends and computes."""

import dataclasses
import json
import math

import pytest

from treepo_mega.config import load_config
from treepo_mega.modelspec.mcore_layout import hf_shapes
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.flops import Work
from treepo_mega.plan.activations import activation_peak
from treepo_mega.plan.engine import Engine, decode_step_seconds
from treepo_mega.plan.hardware import Rates, gpu_of
from treepo_mega.plan.layout import Layout, held_bytes
from treepo_mega.plan.memory import engine_weights
from treepo_mega.plan.refit import plan_refit
from treepo_mega.plan.timing import Cluster, pass_seconds

MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 2048, "num_experts": 16,
    "num_experts_per_tok": 4, "moe_intermediate_size": 128, "tie_word_embeddings": False,
}  # fmt: skip
H100 = Cluster(gpu_of("H100"), 8, Rates())


@pytest.fixture
def model(tmp_path, request, monkeypatch):
    """(configuration, spec) of a small mixture of experts in bf16."""
    monkeypatch.chdir(request.config.rootpath)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    cfg = load_config("examples/qwen25_7b_2x8.yaml", [f"model.hf_checkpoint={tmp_path}"])
    return cfg, ModelSpec.from_hf(tmp_path)


@pytest.mark.parametrize("ep", [1, 2, 8])
def test_every_parameter_has_its_optimizer_state_once(model, ep):
    cfg, spec = model
    layout = Layout(1, 2, 1, 1, 8, 1, ep)
    held = [held_bytes(cfg, spec, layout, layout.place(rank)) for rank in range(16)]
    shapes = hf_shapes(spec)
    elements = sum(math.prod(shape) for shape in shapes.values())
    assert sum(each.optimizer for each in held) == 12 * elements
    # All ranks of a stage hold all but experts; of those, their share, in buffers padded to whole buckets.
    of_expert = sum(math.prod(shape) for name, shape in shapes.items() if ".experts." in name)
    whole = 2 * (8 * (elements - of_expert) + 8 * of_expert / ep)
    assert sum(each.parameters for each in held) == pytest.approx(whole, rel=0.01)


def test_ranks_that_share_experts_are_neighbours():
    layout = Layout(2, 1, 1, 1, 8, 1, 4)
    places = [layout.place(rank) for rank in range(16)]
    assert [place.ep_rank for place in places] == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    assert [place.expert_shard for place in places] == [0] * 8 + [1] * 8


def test_ranks_that_share_attention_may_hold_whole_experts():
    layout = Layout(2, 1, 1, 1, 8, 1, 4, 1)
    places = [layout.place(rank) for rank in range(16)]
    assert [place.ep_rank for place in places] == [0, 1, 2, 3] * 4
    assert [place.expert_shard for place in places] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert {place.etp_rank for place in places} == {0} and [place.tp_rank for place in places] == [0, 1] * 8
    assert layout.expert_replicas == 4


def test_a_shared_expert_is_split_as_attention_is_and_held_by_all(model):
    cfg, spec = model
    shared = dataclasses.replace(spec, architecture="Qwen2MoeForCausalLM", shared_expert_intermediate_size=512)
    plain = dataclasses.replace(shared, shared_expert_intermediate_size=0)
    layout = Layout(2, 1, 1, 1, 8, 1, 4, 1)
    more, less = (held_bytes(cfg, each, layout, layout.place(5)).parameters for each in (shared, plain))
    # Four layers: half of three matrices, and a gate for each.
    assert more - less == pytest.approx(2 * 4 * (3 * 256 * 512 / 2 + 256), rel=0.01)


def test_sharing_experts_costs_traffic_and_no_products(model):
    cfg, spec = model
    work = Work(1e6, 1e8, 1e6)
    alone, shared = (
        pass_seconds(cfg, spec, Layout(1, 1, 1, 1, 16, 1, ep), H100, work, phase="update", passes=3) for ep in (1, 8)
    )
    # Three times to the experts and back, as the recipe computes layers again: 4 experts a token, 7 of 8 of them
    # elsewhere; in bf16, 4 layers.
    sent = 3 * 2 * 1e6 / 16 * 4 * 256 * 2 * 7 / 8 * 4
    assert shared - alone == pytest.approx(sent / H100.link(8), rel=0.01)


def test_a_decode_step_reads_the_experts_that_its_tokens_take(model):
    cfg, spec = model
    cfg = cfg.replace({"rollout.engine.tensor_parallel_size": 1})
    engine = Engine.of(cfg, spec, 1e9, 100)
    cluster = dataclasses.replace(H100, rates=Rates().replace(launch_s=1e-12))
    one, many = (decode_step_seconds(cfg, spec, cluster, engine, count, 0) for count in (1, 256))
    assert engine.expert_bytes == 2 * 4 * 16 * 3 * 256 * 128
    read = 3350e9 * cluster.rates.decode_hbm
    assert one == pytest.approx((engine.weight_bytes + engine.expert_bytes / 4) / read, rel=0.01)
    assert many == pytest.approx((engine.weight_bytes + engine.expert_bytes) / read, rel=0.01)


def test_an_engine_with_whole_experts_is_as_large_and_is_sent_fewer_bytes(model):
    cfg, spec = model
    layout = {"rollout.engine.tensor_parallel_size": 2, "parallel.expert_model_parallel_size": 2}
    alone = dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size"), 1)
    cfg = cfg.replace(layout | {f"parallel.{name}": size for name, size in alone.items()})
    sliced, whole = (cfg.replace({"rollout.engine.enable_expert_parallel": on}) for on in (False, True))
    assert engine_weights(whole, spec, 2) == engine_weights(sliced, spec, 2)
    plans = [plan_refit(each, spec, world_size=4, ranks_per_node=4) for each in (sliced, whole)]
    # A rank holds half of the experts whole. Of slices it lacks those of the other half; of whole ones nothing.
    assert plans[0].traffic.moved == 4 * 2 * (4 * 16 * 3 * 256 * 128) // 4 and plans[1].traffic.moved == 0
    assert "TP_v 2 with whole experts, bf16" in plans[1].title


def test_activations_hold_a_token_for_each_of_its_experts(model):
    cfg, spec = model
    layout = Layout(1, 1, 1, 1, 8, 1)
    fewer = dataclasses.replace(spec, experts_per_token=2)
    kept = [f"parallel.recompute_{name}" for name in ("granularity", "method", "num_layers")]
    plain = cfg.replace(dict.fromkeys(kept))
    more, less = (activation_peak(plain, each, layout, 0).update for each in (spec, fewer))
    tokens = plain.train.max_tokens_per_gpu
    # Two experts more of each token, in each of four layers: its hidden state, and three times an inside.
    assert more - less >= 4 * tokens * 2 * 2 * (256 + 3 * 128)
