"""The real vLLM engine on a tiny random Llama: one start for the module, transformers as the oracle."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine_weights import write_weights
from treepo_mega.config import Config, parse_config
from treepo_mega.engine import engine as engine_module
from treepo_mega.engine.engine import Engine
from treepo_mega.engine.stream import EngineError, Finished, SegmentRequest
from treepo_mega.engine.vllm_target import VllmTargetError
from treepo_mega.modelspec.mcore_layout import ModelSpec
from treepo_mega.modelspec.vllm_layout import vllm_layout

EOS = 2


def config(hf: Path) -> Config:
    return parse_config(
        {
            "model": {"hf_checkpoint": str(hf)},
            "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 64},
            "rollout": {"max_response_len": 64, "segment": {"length": 16}, "engine": {"max_num_batched_tokens": 1024}},
        }
    )


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, keep_alive: list[object]) -> Engine:
    os.environ["LOCAL_WORLD_SIZE"] = "7"
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.set_num_threads)
    made = Engine(tiny_llama, config(tiny_llama), seed=5)
    keep_alive.append(made)
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.set_num_threads)
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:], "the trainer's state is left alone"
    assert os.environ.pop("LOCAL_WORLD_SIZE") == "7" and "LD_PRELOAD" not in os.environ
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    return made


def run(
    engine: Engine, prefixes: list[list[int]], *, temperature: float = 1.0, n: int = 24, stop: list[int] | None = None
):
    for k, prefix in enumerate(prefixes):
        engine.submit(
            SegmentRequest(
                name=f"r{k}",
                prefix=prefix,
                max_tokens=n,
                seed=100 + k,
                temperature=temperature,
                stop_token_ids=stop or [],
            )
        )
    done: dict[str, Finished] = {}
    while engine.busy:
        done |= {x.request_id: x for x in engine.step()}
    return [done[f"r{k}"] for k in range(len(prefixes))]


def prompts(n: int = 4, length: int = 33) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 54) for _ in range(length)] for _ in range(n)]


def hf_logprobs(model, tokens: list[int], temperature: float) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_transformers_after_temperature(engine, tiny_llama, temperature):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for prefix, x in zip(prompts(), run(engine, prompts(), temperature=temperature), strict=True):
        assert len(x.tokens) == len(x.logprobs) == 24 and x.finish_reason == "length"
        want = hf_logprobs(model, prefix + x.tokens, temperature)
        assert np.abs(np.array(want[len(prefix) - 1 :]) - np.array(x.logprobs)).max() <= 1e-4
        scored = engine.score(prefix + x.tokens, temperature)
        assert np.abs(np.array(want) - np.array(scored)).max() <= 1e-4
    assert engine.score([5, 6, 7]) == pytest.approx(hf_logprobs(model, [5, 6, 7], 1.0), abs=1e-4), "scale is restored"


def test_seeds_decide_and_temperature_zero_is_greedy(engine, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    same = prompts(1) * 3
    a, b = run(engine, same), run(engine, same)
    assert [x.tokens for x in a] == [x.tokens for x in b], "a seed gives the same tokens again"
    assert len({tuple(x.tokens) for x in a}) == 3, "another seed gives others"
    (greedy,) = run(engine, prompts(1), temperature=0.0)
    tokens = prompts(1)[0]
    for t in greedy.tokens:
        with torch.no_grad():
            assert int(model(torch.tensor([tokens])).logits[0, -1].argmax()) == t
        tokens.append(t)


def test_a_stop_token_ends_the_segment_and_is_kept(engine):
    (free,) = run(engine, prompts(1))
    stop = free.tokens[5]
    (x,) = run(engine, prompts(1), stop=[stop])
    assert x.finish_reason == "stop" and x.tokens == free.tokens[: free.tokens.index(stop) + 1]


@pytest.mark.parametrize("ending", ["stop token", "border", "abort"])
def test_steps_in_flight_end_before_the_cache_is_reset_and_before_sleep(engine, ending):
    """With a queue of two the step after a request's end is in flight: vLLM refuses both until it is over."""
    free = run(engine, prompts())
    common = Counter(token for x in free for token in x.tokens).most_common(4)
    ends = [token for token, _ in common]
    for attempt in range(3):
        for k, prefix in enumerate(prompts()):
            more = {"stop_token_ids": ends} if ending == "stop token" else {"borders": frozenset(ends)}
            engine.submit(SegmentRequest(name=f"r{k}", prefix=prefix, max_tokens=24, seed=10 * attempt + k, **more))
        while engine.busy:
            if engine.step() and ending == "abort":
                engine.abort()
        engine.reset_prefix_cache()
    engine.sleep(1)
    engine.wake_up(["weights"])
    engine.wake_up(["kv_cache"])
    assert [x.tokens for x in run(engine, prompts())] == [x.tokens for x in free]


def test_a_resubmitted_prefix_is_reused(engine):
    prefix = [9] * 65
    run(engine, [prefix], n=4)
    (x,) = run(engine, [prefix], n=4)
    assert x.num_cached_tokens == 64


def test_weights_written_in_place_equal_a_freshly_loaded_engine(engine, tiny_llama, make_tiny_llama, keep_alive):
    other = make_tiny_llama(seed=1)
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    old = run(engine, prompts())
    write_weights(engine, other)
    new = run(engine, prompts())
    fresh = Engine(other, config(other), seed=0)
    keep_alive.append(fresh)
    assert new == run(fresh, prompts()), "tokens, logprobs and cache hits: the tied LM head and the cache are new"
    assert new != old
    want = hf_logprobs(model, prompts()[0] + new[0].tokens, 1.0)[32:]
    assert np.abs(np.array(want) - np.array(new[0].logprobs)).max() <= 1e-4
    write_weights(engine, tiny_llama)
    back = run(engine, prompts())  # (the first run reused a cached prefix, this one did not)
    assert [x.tokens for x in back] == [x.tokens for x in old]
    assert np.allclose([x.logprobs for x in back], [x.logprobs for x in old], atol=1e-5)


def contents(engine: Engine) -> dict[str, bytes]:
    """Every parameter and buffer that the model computes with, by name, as bytes."""
    (model,) = engine._llm.apply_model(lambda model: model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors}


def spoil(engine: Engine) -> None:
    """What sleep level 2 leaves of the parameters: memory that anyone may have written. (vLLM keeps the buffers.)"""
    (model,) = engine._llm.apply_model(lambda model: model)
    for parameter in model.parameters():
        torch.empty(0, dtype=torch.uint8).set_(parameter.untyped_storage()).fill_(0xFF)


@pytest.mark.parametrize("quantization", [None, pytest.param("fp8_per_channel", marks=pytest.mark.slow)])
def test_an_engine_that_reads_no_checkpoint_is_the_loaded_one_after_an_update(
    tiny_llama, keep_alive, tmp_path, monkeypatch, quantization
):
    """Without weights at the start, and after a sleep that drops them: padding and FP8 scales are written too."""
    cfg = config(tiny_llama)
    if quantization:
        cfg.rollout.engine.dtype, cfg.rollout.engine.quantization = "bf16", quantization
    loaded = Engine(tiny_llama, cfg, seed=0)
    bare = shutil.copytree(tiny_llama, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(engine_module, "check_files", lambda directory: None)
    empty = Engine(bare, cfg, seed=0, weights_follow=True)
    keep_alive += [loaded, empty]
    with pytest.raises(EngineError, match=r"built without weights: write all weights \(Engine\.update_weights_by\)"):
        empty.score([5, 6])
    expected = run(loaded, prompts())
    for _ in range(2):
        write_weights(empty, tiny_llama)
        assert contents(empty) == contents(loaded)
        assert run(empty, prompts()) == expected
        spoil(empty)


def test_an_untied_head_is_updated_too(make_tiny_llama, keep_alive):
    first, second = (make_tiny_llama(tie_word_embeddings=False, seed=s) for s in (0, 1))
    engine = Engine(first, config(first), seed=0)
    keep_alive.append(engine)
    with pytest.raises(VllmTargetError, match=r"1 parameters missing, such as lm_head\.weight"):
        write_weights(engine, second, without=["lm_head.weight"])
    write_weights(engine, second)
    model = AutoModelForCausalLM.from_pretrained(second, dtype=torch.float32)
    assert np.allclose(engine.score(prompts(1)[0]), hf_logprobs(model, prompts(1)[0], 1.0), atol=1e-4)


def test_an_incomplete_update_is_refused_and_blocks_sampling(engine, tiny_llama):
    with pytest.raises(VllmTargetError, match=r"1 parameters missing, such as .*down_proj"):
        write_weights(engine, tiny_llama, without=["model.layers.0.mlp.down_proj.weight"])
    with pytest.raises(EngineError, match="did not complete: write all weights"):
        engine.submit(SegmentRequest(name="x", prefix=[5], max_tokens=4, seed=0))
    with pytest.raises(EngineError, match="did not complete"):
        engine.score([5, 6])
    write_weights(engine, tiny_llama)
    assert len(run(engine, prompts(1))[0].tokens) == 24


def test_a_map_of_another_model_is_refused_before_a_weight_changes(engine, tiny_llama):
    layout = vllm_layout(ModelSpec.from_hf(tiny_llama), 1, 0)
    name = "model.layers.0.mlp.down_proj.weight"
    other = name.replace("layers.0", "layers.9")
    misshapen = replace(layout[name], shape=(1, 96))
    for wrong, message in (
        ({k: v for k, v in layout.items() if k != name}, r"the engine has .*down_proj.*which the map does not know"),
        ({**layout, other: layout[name]}, r"the map says model\.layers\.9.*the engine has no such parameter"),
        ({**layout, name: misshapen}, r"\[1, 96\]; the engine has \[64, 96\]"),
    ):
        with pytest.raises(VllmTargetError, match=message):
            engine.weight_target().init_weight_transfer(wrong)
    assert len(run(engine, prompts(1))[0].tokens) == 24


def test_impossible_requests_are_refused(engine):
    with pytest.raises(EngineError, match="window of 129"):
        engine.submit(SegmentRequest(name="x", prefix=[5] * 100, max_tokens=30, seed=0))
    with pytest.raises(EngineError, match=r"\[0, 54\)"):
        engine.submit(SegmentRequest(name="x", prefix=[54], max_tokens=4, seed=0))
    with pytest.raises(EngineError, match="at least one token"):
        engine.submit(SegmentRequest(name="x", prefix=[], max_tokens=4, seed=0))
    engine.submit(SegmentRequest(name="x", prefix=[5], max_tokens=4, seed=0))
    with pytest.raises(EngineError, match="already running"):
        engine.submit(SegmentRequest(name="x", prefix=[5], max_tokens=4, seed=0))
    with pytest.raises(EngineError, match="idle"):
        engine.score([5, 6])
    with pytest.raises(EngineError, match="while requests run"):
        engine.update_weights_by(lambda: None)
    assert engine.unfinished == ["x"]
    engine.abort()
    assert not engine.busy and engine.step() == []


def test_a_border_token_ends_the_segment_from_its_shortest_length_on(engine):
    (free,) = run(engine, prompts(1))
    border = free.tokens[7]
    first = next(k for k, t in enumerate(free.tokens) if t == border and k >= 3)
    engine.submit(
        SegmentRequest(
            name="b", prefix=prompts(1)[0], max_tokens=24, seed=100, borders=frozenset([border]), min_tokens=4
        )
    )
    engine.submit(SegmentRequest(name="other", prefix=prompts(1)[0], max_tokens=24, seed=100))
    done = {}
    while engine.busy:
        done |= {x.request_id: x for x in engine.step()}
    assert done["b"].tokens == free.tokens[: first + 1] and done["b"].finish_reason == "border"
    assert done["b"].logprobs == pytest.approx(free.logprobs[: first + 1], abs=1e-5)
    assert done["other"].tokens == free.tokens, "ending one request early does not disturb the others"


def test_a_peek_is_the_distribution_behind_the_segment(engine, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    (free,) = run(engine, prompts(1), temperature=0.7)
    border = free.tokens[6]
    at = free.tokens.index(border) + 1
    asked = {"plain": {}, "border": {"borders": frozenset([border])}}
    for name, more in asked.items():
        engine.submit(
            SegmentRequest(
                name=name,
                prefix=prompts(1)[0],
                max_tokens=10,
                seed=100,
                temperature=0.7,
                stop_token_ids=[free.tokens[10]],
                peek=5,
                **more,
            )
        )
    done = {}
    while engine.busy:
        done |= {x.request_id: x for x in engine.step()}
    ended = free.tokens[: free.tokens.index(free.tokens[10]) + 1]
    for name, n in (("plain", min(10, len(ended))), ("border", min(at, 10, len(ended)))):
        x = done[name]
        assert x.tokens == free.tokens[:n], name
        with torch.no_grad():
            logits = model(torch.tensor([prompts(1)[0] + x.tokens])).logits[0, -1].double() / 0.7
        want = logits.log_softmax(-1).sort(descending=True).values[:5].tolist()
        if x.finish_reason != "stop":
            assert x.peek == pytest.approx(want, abs=1e-4), name
    assert done["border"].finish_reason in ("border", "stop") and done["plain"].finish_reason in ("length", "stop")
    assert any(x.peek for x in done.values())


def test_the_cache_has_room(engine):
    assert engine.kv_blocks > 100
