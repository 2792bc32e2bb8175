"""One rank of test_refit.py: the real actor refits a real engine, whose samples must be those of a fresh engine.

    engine_worker.py OLD NEW TP PP TP_V        two checkpoints of the same shape, Megatron's layout, the engine's

The engine is built from OLD and refitted from an actor holding NEW; a second engine is loaded from NEW. Also: damage on
the way is found and named, a failed update leaves an engine that refuses to sample until a complete one.
"""

from __future__ import annotations

import contextlib
import copy
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.ranks import report_found
from tests.reshard.bugs import BUGS
from treepo_mega.actor.forward import padding_multiple
from treepo_mega.actor.update import Policy
from treepo_mega.checkpoint.load import local_params
from treepo_mega.config import parse_config
from treepo_mega.engine import vllm_target
from treepo_mega.engine.engine import Engine
from treepo_mega.engine.stream import EngineError, SegmentRequest
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.reshard.execute import Resharder
from treepo_mega.runtime import dist
from treepo_mega.sync.refit import Refit, RefitError
from treepo_mega.tree.pack import Trajectory, plan_step

PROMPTS = [[7, 3, 9, 30, 4, 5, 6, 8, 12, 11, 40, 2, 33, 21] * 2, [5, 9, 9, 14, 3, 50, 27]]


TRAINED = "examples/tiny_reasoner"
IN_ONE_LAYER = ("K and V swapped", "gate and up swapped", "norms of a layer swapped")
KEEP: list[Engine] = []
"""Deleting an engine takes the process groups of all others with it."""


def configuration(hf_dir: str, tp: int, pp: int, tp_v: int, dtype: str = "fp32", **engine: object):
    return parse_config(
        {
            "model": {"hf_checkpoint": hf_dir, "params_dtype": dtype, "make_vocab_size_divisible_by": 16},
            "parallel": {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp},
            "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 32},
            "rollout": {
                "max_response_len": 32,
                "segment": {"length": 16},
                "engine": {"max_num_batched_tokens": 1024, "tensor_parallel_size": tp_v} | engine,
            },
            "reshard": {"bucket_mb": 1},
        }
    )


def sampled(engine: Engine) -> list[object]:
    """Tokens and logprobs of seeded samples."""
    for k, prompt in enumerate(PROMPTS):
        engine.submit(SegmentRequest(name=f"p{k}", prefix=prompt, max_tokens=16, seed=11 + k))
    done = {}
    while engine.busy:
        done |= {x.request_id: [x.tokens, x.logprobs, x.num_cached_tokens] for x in engine.step()}
    return [done[f"p{k}"] for k in range(len(PROMPTS))]


def score_with(policy: Policy):
    def score(tokens: list[int]):
        one = Trajectory(0, tokens, 1, 0.0, [0.0] * (len(tokens) - 1))
        plan = plan_step([one], dp_size=1, dp_rank=0, max_tokens=len(tokens), multiple=padding_multiple(policy.cfg))
        logprobs = policy.logprobs(plan.packs)
        return logprobs[0] if logprobs else None

    return score


def failure_of(refit: Refit) -> str:
    """The error of a refit, or "" when it passes."""
    try:
        refit()
    except RefitError as e:
        return str(e)
    return ""


def planted(refit: Refit, bug) -> Refit:
    """The same refit with a bug in the map of the trainer's side."""
    right = refit.resharder
    wrong = copy.copy(refit)
    wrong.source = bug(refit.source)
    wrong.resharder = Resharder.between(
        wrong.source,
        refit.wanted,
        source_dtype=right.source_dtype,
        target_dtype=refit.target.dtype,
        bucket_bytes=right.plan.bucket_bytes,
        timeout_s=60,
    )
    assert wrong.resharder.wire_dtype == right.wire_dtype
    return wrong


def stale_head(refit: Refit) -> str:
    """The error when the embedding changes and the packed LM head does not."""
    rows = [
        p
        for m in refit.models
        for n, p in local_params(m).items()
        if n in ("embedding.word_embeddings.weight", "output_layer.weight")
    ]
    repack = vllm_target.repack_tied_head
    vllm_target.repack_tied_head = lambda model: None
    for p in rows:
        p.mul_(2)
    error = failure_of(refit)
    for p in rows:
        p.mul_(0.5)
    vllm_target.repack_tied_head = repack
    return error


@contextlib.contextmanager
def damaged_on_the_way(refit: Refit, hf_name: str, times: int):
    """Parcels with parts of `hf_name` arrive with other values, in the next `times` transfers."""
    transport, left = refit.resharder.transport, [times]
    received, end = transport.received, transport.end

    def spoilt(number):
        for parcel, values in received(number):
            bad = left[0] > 0 and any(c.hf_name == hf_name for c in parcel.copies)
            yield parcel, values * 1.5 if bad else values

    def count():
        left[0] -= 1
        end()

    transport.received, transport.end = spoilt, count
    yield
    del transport.received, transport.end


@contextlib.contextmanager
def damaged_in_the_engine(refit: Refit, param: str):
    """The engine packs other values than it was handed."""
    update = refit.target.update_weight

    def update_weight(chunk, name):
        if name == param:
            refit.target.buffer(chunk, name).mul_(1.5)
        update(chunk, name)

    refit.target.update_weight = update_weight
    yield
    del refit.target.update_weight


def rounding(refit: Refit, hf_dir: str) -> list[float]:
    """Mean distance of the canary's logprobs, in fp32: engine to actor; engine, actor and transformers to fp64."""
    exact = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float64).eval()
    plain = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    apart = []
    for tokens in refit.prompts:
        with torch.no_grad():
            theirs = [
                m(torch.tensor([tokens])).logits[0].log_softmax(-1)[range(len(tokens) - 1), tokens[1:]].double().numpy()
                for m in (exact, plain)
            ]
        known = refit.score(tokens)
        actor = np.array(next(x for x in dist.gather_objects(None if known is None else known.tolist()) if x))
        engine = np.array(refit.engine.score(tokens))
        pairs = [(engine, actor), (engine, theirs[0]), (actor, theirs[0]), (theirs[1], theirs[0])]
        apart.append([float(np.abs(a - b).mean()) for a, b in pairs])
    return np.mean(apart, axis=0).tolist()


def canary_in(tp: int, pp: int, tp_v: int, quantization: str | None) -> dict[str, object]:
    """A trained model, actor in bf16: what the canary measures, and its error for mistakes in single layers.

    With TP_v 2 its 32 token ids all lie on the first rank; the second has padding only.
    """
    cfg = configuration(TRAINED, tp, pp, tp_v, "bf16", quantization=quantization)
    policy, engine = Policy(cfg, TRAINED), Engine(TRAINED, cfg, seed=0)
    refit = Refit(cfg, policy.spec, policy.models, engine, score_with(policy))
    KEEP.append(engine)
    return {"right": refit()} | {name: failure_of(planted(refit, BUGS[name])) for name in IN_ONE_LAYER}


def quantised_as_when_loaded(old: str, new: str, layout: tuple[int, int, int]) -> bool:
    """Whether an FP8 engine built from `old` and refitted samples like one that was built from `new`, bit for bit."""
    cfg = configuration(new, *layout, "bf16", quantization="fp8_per_channel")
    engine, fresh = Engine(old, cfg, seed=0), Engine(new, cfg, seed=0)
    KEEP.extend((engine, fresh))
    policy = Policy(cfg, new)
    refit = Refit(cfg, policy.spec, policy.models, engine, score_with(policy))
    before, expected = sampled(engine), sampled(fresh)
    refit.move()
    assert before != expected, "the two checkpoints must differ"
    first = sampled(engine)
    refit.move()
    return first == expected and [x[:2] for x in sampled(engine)] == [x[:2] for x in first]


def main() -> None:
    """Build, refit, compare, damage."""
    old, new, tp, pp, tp_v = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    cfg = configuration(new, tp, pp, tp_v)
    dist.initialize(cfg, ModelSpec.from_hf(new))
    policy = Policy(cfg, new)
    engine, fresh = Engine(old, cfg, seed=0), Engine(new, cfg, seed=0)
    refit = Refit(cfg, policy.spec, policy.models, engine, score_with(policy))
    before = sampled(engine)
    metrics = refit()
    after, expected = sampled(engine), sampled(fresh)
    assert before != expected, "the two checkpoints must differ"
    assert after == expected, "bitwise equal to a freshly loaded engine"
    assert metrics["reshard/bytes_over_bound"] == 1.0 and metrics["reshard/canary_abs_diff"] <= 1e-4, metrics
    again = refit()
    assert sampled(engine)[0][:2] == expected[0][:2] and again["reshard/canary_abs_diff"] <= 1e-4
    found = {"metrics": metrics}

    with damaged_on_the_way(refit, "model.layers.1.mlp.down_proj.weight", times=9):
        found["every time"] = failure_of(refit)
    with damaged_on_the_way(refit, "model.layers.1.mlp.down_proj.weight", times=1):
        found["once"] = failure_of(refit)
    with damaged_in_the_engine(refit, "model.layers.1.mlp.down_proj.weight"):
        found["in the engine"] = failure_of(refit)
    cfg.reshard.canary.on_failure = "warn"
    with damaged_on_the_way(refit, "model.layers.0.self_attn.q_proj.weight", times=9):
        found["warned"] = refit()["reshard/canary_failures"]
    cfg.reshard.canary.on_failure = "stop"

    if not policy.spec.tie_word_embeddings:
        refit()
        found["rounding"] = rounding(refit, new)
        found["trained"] = canary_in(tp, pp, tp_v, None)
    else:
        found["bugs"] = {name: failure_of(planted(refit, bug)) for name, bug in BUGS.items()}
        found["bugs"]["packed LM head left stale"] = stale_head(refit)
        found["quantised"] = quantised_as_when_loaded(old, new, (tp, pp, tp_v))
        found["trained"] = canary_in(tp, pp, tp_v, "fp8_per_channel")

    def dies(chunk, param):
        raise ValueError("planted")

    refit.target.update_weight = dies
    try:
        refit()
    except ValueError as e:
        found["died"] = str(e)
    del refit.target.update_weight
    try:
        sampled(engine)
    except EngineError as e:
        found["refused"] = str(e)
    refit()
    assert sampled(engine)[0][:2] == expected[0][:2], "usable again after a complete update"
    report_found(found)


if __name__ == "__main__":
    main()
