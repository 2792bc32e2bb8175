"""A branch inside a KV block copies the block's beginning: what it saves, and that nothing else changes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine_weights import write_weights
from treepo_mega.config import parse_config
from treepo_mega.engine import cuda_profile
from treepo_mega.engine.engine import Engine
from treepo_mega.engine.stream import Finished, SegmentRequest

BLOCK = 32


def config(hf: Path, **engine: object):
    return parse_config(
        {
            "model": {"hf_checkpoint": str(hf)},
            "data": {"train": [{"reasoning_gym": "chain_sum"}], "max_prompt_len": 100},
            "rollout": {
                "max_response_len": 60,
                "segment": {"length": 16},
                # 1 MiB: so few blocks that what ended requests left is given out again and requests are preempted.
                "engine": {"max_num_batched_tokens": 1024, "kv_cache_memory_mb": 1, **engine},
            },
        }
    )


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, keep_alive: list[object]) -> Engine:
    made = Engine(tiny_llama, config(tiny_llama))
    keep_alive.append(made)
    return made


@pytest.fixture(autouse=True)
def fresh(engine: Engine) -> None:
    engine.abort()
    engine.reset_prefix_cache()


@pytest.fixture(scope="module")
def oracle(tiny_llama: Path):
    """oracle(tokens) -> logprobs of tokens[1:], by transformers."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)

    def logprobs(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            table = model(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
        return table.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()

    return logprobs


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 54) for _ in range(length)]


def finish(engine: Engine) -> dict[str, Finished]:
    done: dict[str, Finished] = {}
    while engine.busy:
        done |= {x.request_id: x for x in engine.step()}
    return done


def sample(engine: Engine, prefix: list[int], n: int, seed: int = 1) -> Finished:
    engine.submit(SegmentRequest(name="x", prefix=prefix, max_tokens=n, seed=seed))
    return finish(engine)["x"]


def agrees(oracle, prefix: list[int], x: Finished) -> None:
    want = oracle(prefix + x.tokens)[len(prefix) - 1 :]
    assert np.abs(want - np.array(x.logprobs)).max() <= 1e-4


@pytest.mark.parametrize("length, n", [(40, 10), (40, 40), (20, 5), (33, 31), (32, 33)])
def test_children_of_an_ended_request_compute_one_token(engine, oracle, length, n):
    """At every place of what it sampled, also behind blocks that it filled afterwards."""
    parent = prompt(0, length)
    tokens = parent + sample(engine, parent, n).tokens
    for cut in range(length + 1, len(tokens) + 1, 3):
        child = sample(engine, tokens[:cut], 4, seed=cut)
        assert child.num_cached_tokens == cut - 1
        agrees(oracle, tokens[:cut], child)


def test_children_of_a_running_request(engine, oracle):
    """It goes on in its own block, whose beginning they copied, and none disturbs the other."""
    borders = frozenset(range(54))
    stream = engine.submit(
        SegmentRequest(
            name="run", prefix=(start := prompt(1, 41)), max_tokens=9, seed=3, borders=borders, min_tokens=9, run=40
        )
    )
    delivered: list[Finished] = []
    while not delivered:
        delivered += engine.step()
    (x,) = delivered
    path = start + x.tokens
    stream.extend("rest", 31, min_tokens=31)
    for k in range(3):
        engine.submit(SegmentRequest(name=f"child {k}", prefix=path, max_tokens=12, seed=k))
    done = finish(engine)
    for k in range(3):
        assert done[f"child {k}"].num_cached_tokens == len(path) - 1
        agrees(oracle, path, done[f"child {k}"])
    agrees(oracle, path, done["rest"])
    assert len({tuple(done[f"child {k}"].tokens) for k in range(3)}) == 3


def test_only_what_is_the_same_is_copied(engine, oracle):
    """Behind the same full block the longest common beginning counts; behind another one nothing does."""
    parent = prompt(2, 40)
    tokens = parent + sample(engine, parent, 20).tokens
    fork = [*tokens[:50], (tokens[50] + 1) % 50, *prompt(3, 5)]
    child = sample(engine, fork, 4)
    assert child.num_cached_tokens == 50
    agrees(oracle, fork, child)
    other = [*prompt(4, BLOCK), *tokens[BLOCK:]]
    child = sample(engine, other, 4)
    assert child.num_cached_tokens == 0
    agrees(oracle, other, child)


def test_new_weights_leave_nothing_to_copy(engine, tiny_llama):
    parent = prompt(5, 40)
    tokens = parent + sample(engine, parent, 10).tokens
    write_weights(engine, tiny_llama)
    assert sample(engine, tokens, 4).num_cached_tokens == 0
    assert sample(engine, tokens, 4, seed=2).num_cached_tokens == len(tokens) - 1


def test_aborted_requests_give_their_blocks_back_in_the_order_of_submission(engine):
    """On every rank of an engine alike: what is given out again first is what its caches forget first."""
    core = engine._llm.llm_engine.engine_core.engine_core
    for k in range(6):
        engine.submit(SegmentRequest(name=f"aborted {k}", prefix=prompt(300 + k, 20), max_tokens=20, seed=k))
    for _ in range(3):
        engine.step()
    manager = core.scheduler.kv_cache_manager
    owner = {
        block.block_id: place
        for place, request in enumerate(core.scheduler.running)
        for block in manager.get_blocks(request.request_id).blocks[0]
    }
    assert sorted(set(owner.values())) == list(range(6))
    engine.abort()
    engine._drain()
    free = [block.block_id for block in manager.block_pool.free_block_queue.get_all_free_blocks()]
    given_back = [owner[block] for block in free if block in owner]
    assert given_back == sorted(given_back) and len(given_back) == len(owner)


def test_nobody_is_given_a_block_that_was_given_out_again(engine, oracle, connector, monkeypatch):
    """Random cuts of random paths, more at once than the cache holds, some aborted: transformers agrees with each."""
    rng = random.Random(6)
    known = [prompt(100 + k, rng.randrange(5, 60)) for k in range(6)]
    asked: dict[str, list[int]] = {}
    copied = recomputed = 0
    preempted: list[object] = []
    scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request
    monkeypatch.setattr(scheduler, "_preempt_request", lambda r, *a, **k: (preempted.append(r), preempt(r, *a, **k))[1])
    # An interpreter runs the steps of runner V2: no more there than it takes to see enough of each.
    requests = 80 if cuda_profile.profile() == "cuda" else 240

    def seen_enough() -> bool:
        return copied > requests / 8 and recomputed > requests / 24 and bool(preempted)

    for k in range(240):
        if k >= requests and seen_enough():
            break
        path = rng.choice(known)
        cut = path[: rng.randrange(max(2, len(path) // 2), len(path) + 1)]
        n = min(rng.randrange(1, 40), 160 - len(cut))
        asked[f"r{k}"] = cut
        engine.submit(SegmentRequest(name=f"r{k}", prefix=cut, max_tokens=n, seed=k))
        if k == requests // 2:
            engine.abort()
        for _ in range(rng.randrange(3)):
            for x in engine.step():
                agrees(oracle, asked[x.request_id], x)
                if len(asked[x.request_id]) + len(x.tokens) < 130:
                    known.append(asked[x.request_id] + x.tokens)
                copied += x.num_cached_tokens % BLOCK != 0
                recomputed += len(asked[x.request_id]) - x.num_cached_tokens > BLOCK
    for x in finish(engine).values():
        agrees(oracle, asked[x.request_id], x)
    assert seen_enough(), f"partial blocks found {copied}, gone {recomputed}; preempted {len(preempted)}"


@pytest.fixture
def connector(engine: Engine):
    return engine.branch_cache


def test_a_full_cache_is_left_to_the_request_itself(engine, connector, monkeypatch):
    """A block that is pinned to be copied is one less for the request: with no other free it would wait forever."""
    tokens = prompt(7, 40)
    tokens += sample(engine, tokens, 20).tokens

    class Full:
        get_num_free_blocks = staticmethod(lambda: 2)

        def __getattr__(self, name: str, pool=connector._pool):
            return getattr(pool, name)

    with monkeypatch.context() as m:
        m.setattr(connector, "_pool", Full())
        assert sample(engine, tokens, 4).num_cached_tokens == BLOCK
    assert sample(engine, tokens, 4).num_cached_tokens == len(tokens) - 1


def test_what_a_parent_left_is_found_without_comparing_it_with_others(engine, oracle, connector, monkeypatch):
    tokens = prompt(8, 40)
    tokens += sample(engine, tokens, 20).tokens
    compared: list[object] = []
    monkeypatch.setattr(connector, "_candidates", lambda *asked: compared.append(asked) or iter(()))
    child = sample(engine, tokens, 4)
    assert child.num_cached_tokens == len(tokens) - 1 and not compared
    agrees(oracle, tokens, child)
    # One that begins before the end of what was sampled wants a part of the block.
    assert sample(engine, tokens[:-3], 4).num_cached_tokens == BLOCK and len(compared) == 1


def test_vllm_alone_computes_the_rest_of_the_block_again(engine, connector, monkeypatch):
    """What is saved: the same engine when nothing is found."""
    tokens = prompt(9, 40)
    tokens += sample(engine, tokens, 20).tokens
    monkeypatch.setattr(connector, "enabled", False)
    assert sample(engine, tokens, 4).num_cached_tokens == BLOCK


def test_what_is_remembered_is_bounded_by_the_blocks(engine, connector):
    for k in range(100):
        sample(engine, prompt(200 + k, 30), 5, seed=k)
    assert len(connector._left) == sum(map(len, connector._behind.values())) <= engine.kv_blocks + 1
    assert len(connector._whole) <= len(connector._left)
    assert not connector._running and not connector._found and not connector._pairs
