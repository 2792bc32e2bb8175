"""The plan of a rank's memory against the trainer's own model, buffers, optimizer and schedule, as fake tensors."""

import json
import subprocess
import sys

import pytest

# In a process of its own: the fake process groups are those of the whole process.
PROVE = """
import json, os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
from treepo_mega.config import load_config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.prove.command import prove
base, cases = json.load(sys.stdin)
out = {}
for name, (recipe, world, overrides) in cases.items():
    cfg = load_config(f"examples/{recipe}.yaml", base + overrides)
    out[name] = prove(cfg, ModelSpec.from_hf(cfg.model.hf_checkpoint), world_size=world).to_dict()["compared"]
print(json.dumps(out))
"""
SMALL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 3584,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
    "max_position_embeddings": 8192, "hidden_act": "silu",
}  # fmt: skip
EXPERTS = SMALL | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_key_value_heads": 4, "num_experts": 64,
    "num_experts_per_tok": 8, "moe_intermediate_size": 384, "norm_topk_prob": True,
}  # fmt: skip
SHARED = EXPERTS | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "shared_expert_intermediate_size": 2048,
}  # fmt: skip
FEW = EXPERTS | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
    "sliding_window": None,
}  # fmt: skip
MODELS = {
    "untied": SMALL | {"tie_word_embeddings": False}, "tied": SMALL | {"tie_word_embeddings": True},
    "experts": EXPERTS, "shared": SHARED, "few": FEW,
}  # fmt: skip
# Tiles of the loss head are many small operations: short packs keep this in seconds.
SHORT = ["train.max_tokens_per_gpu=2048", "rollout.max_response_len=1024", "rollout.n_samples_per_prompt=4"]
KEPT = [f"parallel.recompute_{name}=null" for name in ("granularity", "method", "num_layers")]
DENSE, SPARSE = "llama3_70b_16x8", "qwen3_30b_a3b_4x8"
CASES = {
    "full recomputation": (DENSE, 32, []),
    "interleaved, all kept": (DENSE, 16, [*KEPT, "parallel.pipeline_model_parallel_size=2",
                                   "parallel.virtual_pipeline_model_parallel_size=2"]),
    "context parallel, one stage": (DENSE, 16, ["parallel.pipeline_model_parallel_size=1",
                                         "parallel.context_parallel_size=2"]),
    "fp32, no distributed optimizer": (DENSE, 16, ["model.params_dtype=fp32", "parallel.pipeline_model_parallel_size=1",
                                            "parallel.use_distributed_optimizer=false",
                                            "parallel.overlap_grad_reduce=false"]),
    "tied on two stages": (DENSE, 16, ["parallel.pipeline_model_parallel_size=2"]),
    "experts, TP2 EP8 ETP1": (SPARSE, 32, []),
    "experts split over TP, all kept": (SPARSE, 32, [*KEPT, "parallel.expert_model_parallel_size=4",
                                                     "parallel.expert_tensor_parallel_size=2"]),
    "a shared expert": (SPARSE, 32, []),
    "one expert a rank, two stages": (SPARSE, 32, [*KEPT, "parallel.pipeline_model_parallel_size=2",
                                                   "model.moe_router_dtype=null"]),
    "all experts on every rank": (SPARSE, 32, ["parallel.expert_model_parallel_size=1",
                                               "parallel.expert_tensor_parallel_size=null"]),
}  # fmt: skip
MODEL_OF = {
    "tied on two stages": "tied", "experts, TP2 EP8 ETP1": "experts", "experts split over TP, all kept": "experts",
    "a shared expert": "shared", "one expert a rank, two stages": "few", "all experts on every rank": "few",
}  # fmt: skip
"""The others are of the model `untied`."""


@pytest.fixture(scope="module")
def proofs(tmp_path_factory, request):
    directory = tmp_path_factory.mktemp("models")
    for name, model in MODELS.items():
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps(model))
    cases = {
        name: (recipe, world, [f"model.hf_checkpoint={directory / MODEL_OF.get(name, 'untied')}", *overrides])
        for name, (recipe, world, overrides) in CASES.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", PROVE],
        input=json.dumps([SHORT, cases]),
        capture_output=True,
        text=True,
        timeout=280,
        cwd=request.config.rootpath,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_a_rank_holds_is_counted_to_the_byte(proofs, case):
    for found in proofs[case]:
        if found["item"] in ("parameters", "gradients", "optimizer"):
            assert found["planned"] == found["proven"], found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_activations_is_planned_within_a_tenth(proofs, case):
    for found in proofs[case]:
        if found["item"] in ("old_logprobs", "update"):
            assert abs(found["ratio"] - 1) < 0.1, found
