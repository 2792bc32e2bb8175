"""What a trainer is built from: prompts, policies, engine and hand-over."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_mega.actor.perplexity import describe_references, reference_texts
from treepo_mega.actor.update import Actor, Policy
from treepo_mega.checkpoint.iterations import check_stays
from treepo_mega.checkpoint.megatron_lm import load_initial_weights
from treepo_mega.config import Config
from treepo_mega.data.cursor import PromptCursor
from treepo_mega.data.end_tokens import find_eos_token_ids
from treepo_mega.data.prompts import Prompt, load_prompts
from treepo_mega.data.rewards.weighted import check_truths
from treepo_mega.data.tokenizer import describe_size, load_tokenizer
from treepo_mega.engine.engine import Engine
from treepo_mega.environment.setup import Environment
from treepo_mega.modelspec.mcore_layout import ModelSpec
from treepo_mega.monitor.progress import Progress
from treepo_mega.reshard.sides import engine_side
from treepo_mega.runtime import dist
from treepo_mega.sync.actor_memory import handover_backend
from treepo_mega.sync.handover import DeviceMemory, Handover
from treepo_mega.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Inputs:
    """Tokenizer and prompts. `references`: tokens of the evaluation prompts that have a reference text."""

    tokenizer: Tokenizer
    cursor: PromptCursor
    eval_prompts: list[Prompt]
    references: list[Any]
    examples: list[Prompt]
    """A prompt for each verifier of theirs."""


def load_inputs(cfg: Config, spec: ModelSpec, progress: Progress, environment: Environment | None = None) -> Inputs:
    """Read tokenizer and prompts for the model `spec`; `environment` opens them.

    Raises ConfigError and PromptError for what people get wrong most often.
    """
    hf_dir = cfg.model.hf_checkpoint
    vocab_size = spec.vocab_size
    tokenizer = load_tokenizer(hf_dir, cfg.data)
    find_eos_token_ids(hf_dir, tokenizer, cfg.rollout.stop.eos_token_ids)  # an error here costs no engine
    progress.say(*filter(None, [describe_size(len(tokenizer), vocab_size)]))
    prompts = load_prompts(cfg.data.train, cfg.data, tokenizer, vocab_size=vocab_size, opener=environment)
    progress.say(*prompts.notes)
    eval_prompts: list[Prompt] = []
    dropped = dict(prompts.dropped)
    if cfg.data.eval:
        held_out = load_prompts(cfg.data.eval, cfg.data, tokenizer, vocab_size=vocab_size, opener=environment)
        progress.say(*held_out.notes)
        eval_prompts = list(held_out.prompts)[: cfg.eval.max_prompts]
        dropped |= {f"eval {reason}": count for reason, count in held_out.dropped.items()}
    references = reference_texts(eval_prompts, tokenizer, cfg.rollout.max_response_len, vocab_size)
    cursor = PromptCursor(prompts, seed=cfg.train.seed, shuffle=cfg.data.shuffle)
    losses = "".join(f"; dropped {count} ({reason})" for reason, count in dropped.items() if count)
    progress.say(f"{len(prompts)} prompts to train on, {len(eval_prompts)} to evaluate{losses}")
    if eval_prompts:
        progress.say(describe_references(len(references), len(eval_prompts), cfg.data.reference_key))
    check_truths(cfg.reward.functions, itertools.chain(prompts, eval_prompts))
    examples: dict[str, Prompt] = {}
    for prompt in itertools.chain(prompts, eval_prompts):
        examples.setdefault(prompt.verifier, prompt)
    return Inputs(tokenizer, cursor, eval_prompts, references, list(examples.values()))


def build_actor(cfg: Config) -> Actor:
    """The policy that learns, with the weights of model.load if that is set. Collective over all ranks."""
    actor = Actor(cfg, cfg.model.hf_checkpoint)
    if cfg.model.load:
        load_initial_weights(actor.models, actor.spec, cfg.model.load)
        actor.weights_changed()
        # In bf16 the optimizer holds fp32 copies of the initial weights: its first step would write these back.
        actor.optimizer.reload_model_params()
    return actor


def build_reference(cfg: Config, actor: Actor) -> Policy | None:
    """The frozen policy of the KL term, or None without one. Collective over all ranks."""
    if not cfg.needs_reference:
        return None
    reference = Policy(cfg, cfg.model.hf_checkpoint, actor.guard)
    if cfg.model.load:
        check_stays(Path(cfg.model.load))
        load_initial_weights(reference.models, reference.spec, cfg.model.load)
        reference.weights_changed()
    for model in reference.models:
        model.requires_grad_(False)
    return reference


def build_engine(cfg: Config, actor: Actor) -> tuple[Engine, Handover]:
    """The engine, asleep and without weights, and the hand-over of memory to it. Collective over all ranks.

    Gradients and optimizer state make room for the engine; the canary needs the actor's weights beside it.
    """
    backend = handover_backend(actor, engine_bytes(cfg, actor.spec), cfg.rollout.engine.sleep_level)
    handover = Handover(backend, offload=("grads", "optimizer"))
    with handover.room_for_a_new_engine():
        # The first refit writes every weight: no rank reads the checkpoint for an engine.
        engine = Engine(cfg.model.hf_checkpoint, cfg, seed=cfg.train.seed, weights_follow=True)
        if isinstance(backend, DeviceMemory):
            backend.engine = engine
    return engine, handover


def engine_bytes(cfg: Config, spec: ModelSpec) -> dict[str, int]:
    """Bytes of this rank's part of the engine: "weights" before packing, "kv_cache" as it is on a CPU."""
    wanted = engine_side(cfg, spec, dist.world_size()).of(dist.rank())[0]
    itemsize = 4 if cfg.rollout.engine.dtype == "fp32" else 2
    return {
        "weights": sum(math.prod(param.shape) for param in wanted.values()) * itemsize,
        "kv_cache": cfg.rollout.engine.kv_cache_memory_mb << 20,
    }
