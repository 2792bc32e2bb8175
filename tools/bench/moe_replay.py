"""What routing replay does to the mismatch of engine and trainer, in bf16, and whether it replays exactly.

    python tools/bench/moe_replay.py [--quick]

One process, one rank: a random Qwen3-MoE, vLLM samples trees of it, and the actor scores them on the same weights. The
three values of `rollout.routing_replay` are compared on the same trees and packs, so that nothing else differs:

    mismatch          mean |engine - actor| of sampled tokens, nats, of the old logprobs that the setting gives
    routing_differs   share of routings (token and layer) with which the update's forward pass goes another way than
                      the engine. Taken from what the layers' routers returned, not from the replay's own counts

So `old` has the mismatch of `all`, and the update of `off`. A token counts once, and where its experts are noted.

The table is followed by one JSON object: {"off": {"mismatch", "routing_differs"}, "old": {...}, "all": {...}, "factor"
(mismatch of off / of all), "routings" (compared), "tokens" (compared)}. --quick: fewer trees, fewer layers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from treepo_mega.monitor.progress import quieten_libraries

quieten_libraries()  # before the imports below: most libraries warn while being imported

from megatron.core import parallel_state as ps  # noqa: E402

from treepo_mega.actor.forward import compute_logprobs, run_schedule  # noqa: E402
from treepo_mega.actor.losses import PolicyLoss  # noqa: E402
from treepo_mega.actor.moe import routers  # noqa: E402
from treepo_mega.actor.update import Actor  # noqa: E402
from treepo_mega.config import Config, load_config  # noqa: E402
from treepo_mega.engine.engine import Engine  # noqa: E402
from treepo_mega.engine.stream import SegmentRequest  # noqa: E402
from treepo_mega.runtime import dist  # noqa: E402
from treepo_mega.runtime.seeding import derive_seed  # noqa: E402
from treepo_mega.tree.credit import fold, leaf_weights  # noqa: E402
from treepo_mega.tree.history import Observation  # noqa: E402
from treepo_mega.tree.node import Tree  # noqa: E402
from treepo_mega.tree.pack import Batch, Pack, plan_step  # noqa: E402
from treepo_mega.tree.routing import unnoted  # noqa: E402
from treepo_mega.tree.search import TreeSearch  # noqa: E402
from treepo_mega.tree.segments import Segments  # noqa: E402
from treepo_mega.tree.stop import StopRules, TurnRules  # noqa: E402
from treepo_mega.tree.wants import Segment  # noqa: E402

EOS = 2
PROMPT = 24
MODES = ("off", "old", "all")


def write_model(directory: Path, *, layers: int, experts: int, top_k: int, seed: int = 0) -> Path:
    """A random Qwen3-MoE whose router is not sure: logits of experts of order 1."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=256, hidden_size=128, intermediate_size=128, moe_intermediate_size=64,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=experts,
        num_experts_per_tok=top_k, norm_topk_prob=True, max_position_embeddings=512, tie_word_embeddings=False,
        initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def configuration(hf_dir: Path, dtype: str, *overrides: str) -> Config:
    """One rank, trees of eight leaves, the engine's experts noted."""
    return load_config(
        None,
        [
            f"model.hf_checkpoint={hf_dir}",
            f"model.params_dtype={dtype}",
            "data.train=[{path: unused.jsonl}]",
            f"data.max_prompt_len={PROMPT + 8}",
            "rollout.max_response_len=48",
            "rollout.segment.length=12",
            "rollout.n_samples_per_prompt=8",
            f"rollout.stop.eos_token_ids=[{EOS}]",
            "rollout.routing_replay=all",
            "rollout.engine.kv_cache_memory_mb=64",
            *overrides,
        ],
    )


def sample(
    engine: Engine,
    cfg: Config,
    count: int,
    *,
    ends: Sequence[int] = (EOS,),
    turns: TurnRules | None = None,
    answer: Callable[[Tree, int], list[int]] | None = None,
) -> list[Tree]:
    """`count` whole trees of random prompts, as a generator samples them, one after the other.

    `ends`: ids that end a path; with `turns` a turn, to which `answer` says the tokens of the observation.
    """
    rollout = cfg.rollout
    stop = StopRules(
        frozenset(ends), lambda tokens: "", rollout.max_response_len, rollout.depth_limit, repetition_window=0
    )
    trees = []
    for number in range(count):
        prompt = np.random.default_rng(number).integers(3, engine.vocab_size, PROMPT).tolist()
        search = TreeSearch(f"p{number}", prompt, rollout, seed=derive_seed(number), stop=stop, turns=turns)
        while not search.done:
            asked = {}
            for want in search.wants():
                asked[f"{want.node_id}"] = want.node_id
                noted = search.tree.noted(search.tree.nodes[want.node_id].parent)
                engine.submit(
                    SegmentRequest(
                        name=f"{want.node_id}", prefix=want.prefix, max_tokens=want.max_tokens, seed=want.seed,
                        temperature=rollout.temperature, stop_token_ids=list(ends), noted=noted,
                    )
                )  # fmt: skip
            arrived = []
            while engine.busy:
                arrived += engine.step()
            for done in arrived:
                segment = Segment(
                    done.tokens, done.logprobs, done.finish_reason, experts=done.experts, experts_from=done.experts_from
                )
                search.take(asked[done.request_id], segment)
            for node_id in search.turns_ended():
                search.observe(node_id, None if answer is None else Observation(answer(search.tree, node_id)))
        trees.append(search.tree)
    return trees


def batch_of(trees: Sequence[Tree]) -> Batch:
    """The trajectories of `trees` with random advantages."""
    segments = Segments.from_trees(trees, range(len(trees)))
    values = np.random.default_rng(1).normal(size=len(segments.leaf_number))
    return Batch(segments, fold(segments, values, leaf_weights("token-mean", segments.flat_lengths())))


class Call(NamedTuple):
    """One call of a router."""

    gradients: bool
    """Recomputed layers are called twice, the first time without."""
    chosen: np.ndarray
    """[t, E] bool."""


@contextlib.contextmanager
def routed(actor: Actor) -> Iterator[list[list[Call]]]:
    """By layer, what its router returned in each call."""
    seen: list[list[Call]] = []
    watched = routers(actor.models)
    for router in watched:
        of_layer: list[Call] = []
        seen.append(of_layer)

        def watching(*given: Any, routing: Any, into: list[Call], **named: Any) -> Any:
            weights, chosen = routing(*given, **named)
            into.append(Call(torch.is_grad_enabled(), chosen.detach().cpu().numpy().astype(bool)))
            return weights, chosen

        router.routing = partial(watching, routing=router.routing, into=of_layer)
    try:
        yield seen
    finally:
        for router in watched:
            del router.routing


def other_ways(packs: Sequence[Pack], seen: Sequence[Sequence[Call]]) -> tuple[int, int]:
    """(routings that are not the engine's, routings compared) of one pass over `packs`."""
    differs = compared = 0
    for number, pack in enumerate(packs):
        assert pack.experts is not None, "the trees carry experts"
        known = pack.experts[:, 0, 0] != unnoted(pack.experts.dtype)
        for layer, calls in enumerate(seen):
            actor = calls[number].chosen[known]
            engine = np.zeros_like(actor)
            np.put_along_axis(engine, pack.experts[known, layer].astype(np.int64), True, axis=1)
            differs += int((engine != actor).any(1).sum())
            compared += len(engine)
    return differs, compared


def mismatch(packs: Sequence[Pack], known: Sequence[np.ndarray]) -> tuple[float, int]:
    """(sum of |engine - actor| over sampled tokens, nats; how many)."""
    apart = [np.abs(pack.rollout_logprobs - logprobs) for pack, logprobs in zip(packs, known, strict=True)]
    return float(sum(each.sum() for each in apart)), sum(len(each) for each in apart)


def measure(trees: Sequence[Tree], actor: Actor, cfg: Config) -> dict[str, Any]:
    """The three modes on the packs of `trees`, which all ranks hold; the weights stay as they are. Collective."""
    packs = plan_step(
        batch_of(trees),
        dp_size=ps.get_data_parallel_world_size(),
        dp_rank=ps.get_data_parallel_rank(),
        max_tokens=cfg.train.max_tokens_per_gpu,
    ).packs
    found: dict[str, Any] = {}
    for mode in MODES:
        known = compute_logprobs(actor.chunks, packs, actor.head, replay=mode != "off")
        assert known is not None, "one rank has all stages"
        total, tokens = mismatch(packs, known)
        for pack, logprobs in zip(packs, known, strict=True):
            pack.old_logprobs = logprobs
        for chunk in actor.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        with routed(actor) as seen:
            run_schedule(actor.chunks, packs, actor.head, loss=PolicyLoss(cfg.algo), replay=mode == "all")
        differs, compared = other_ways(packs, seen)
        counted = {"total": total, "tokens": tokens, "differs": differs, "routings": compared}
        sums = dist.sum_over_ranks({name: float(value) for name, value in counted.items()})
        found[mode] = {
            "mismatch": sums["total"] / max(1.0, sums["tokens"]),
            "routing_differs": sums["differs"] / max(1.0, sums["routings"]),
        }
        found |= {name: int(sums[name]) for name in ("routings", "tokens")}
    return found | {"factor": found["off"]["mismatch"] / max(found["all"]["mismatch"], 1e-12)}


def measure_replay(quick: bool) -> dict[str, Any]:
    """As the last line says. Builds an engine: in this process no other model's may have been built before."""
    with tempfile.TemporaryDirectory() as directory:
        hf_dir = write_model(Path(directory) / "model", layers=4 if quick else 8, experts=16, top_k=4)
        cfg = configuration(hf_dir, "bf16")
        dist.initialize(cfg)
        engine = Engine(hf_dir, cfg, seed=0)
        trees = sample(engine, cfg, 4 if quick else 16)
        return measure(trees, Actor(cfg, hf_dir), cfg)


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer trees, fewer layers")
    found = measure_replay(parser.parse_args().quick)
    print(f"{'replay':8}{'mismatch, nats':>16}{'routing differs':>17}")
    for mode in MODES:
        print(f"{mode:8}{found[mode]['mismatch']:16.2e}{found[mode]['routing_differs']:17.3%}")
    print(f"{found['tokens']} tokens, {found['routings']} routings; the mismatch falls by {found['factor']:.1f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
