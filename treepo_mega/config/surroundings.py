"""The rules that join configuration keys with what a run finds: the model, the sources of prompts, the disk.

As in `rules.py`, each function returns the broken rules as sentences for people.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from treepo_mega.modelspec.spec import ModelSpec

if TYPE_CHECKING:
    from treepo_mega.config import Config

STOP_FILE = "stop"
"""Its name in the run directory: `touch RUN/stop` lets a run save and end (`runtime/signals.py`)."""


def check_model(cfg: Config, spec: ModelSpec) -> list[str]:
    """Parallel sizes divide the model `spec`, and the window holds a trajectory."""
    parallel = cfg.parallel
    bad = []
    tp = parallel.tensor_model_parallel_size
    heads = spec.num_attention_heads
    groups = spec.num_key_value_heads
    for name, count in (("num_attention_heads", heads), ("num_key_value_heads", groups)):
        if count % tp:
            near = max(divisor for divisor in range(1, tp + 1) if count % divisor == 0)
            bad.append(
                f"parallel.tensor_model_parallel_size {tp} does not divide the model's {name} {count} "
                f"(nearest that does: {near})"
            )
    width = "shared_expert_intermediate_size" if spec.num_experts else "intermediate_size"
    if getattr(spec, width) % tp:
        bad.append(f"parallel.tensor_model_parallel_size {tp} does not divide {width} {getattr(spec, width)}")
    bad += _check_experts(cfg, spec)
    if parallel.sequence_parallel and spec.hidden_size % tp:
        bad.append(f"parallel.tensor_model_parallel_size {tp} does not divide hidden_size {spec.hidden_size}")
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    if spec.num_layers % stages:
        bad.append(f"{spec.num_layers} layers cannot be split evenly over {stages} pipeline stages")
    if unknown := [i for i in cfg.rollout.stop.eos_token_ids or [] if not 0 <= i < spec.vocab_size]:
        bad.append(
            f"rollout.stop.eos_token_ids {unknown} are not among the model's {spec.vocab_size} token ids: no path "
            "could end with them"
        )
    window = spec.max_position_embeddings
    if window and cfg.max_model_len > window:
        bad.append(
            f"data.max_prompt_len + rollout.max_response_len = {cfg.max_model_len} exceeds the model's "
            f"{window} positions"
        )
    return bad


def _check_experts(cfg: Config, spec: ModelSpec) -> list[str]:
    """The keys of experts suit the model, which has some or none."""
    parallel = cfg.parallel
    model = cfg.model
    ep = parallel.expert_model_parallel_size
    if not spec.num_experts:
        told = {
            "parallel.expert_model_parallel_size": ep > 1,
            "parallel.expert_tensor_parallel_size": parallel.expert_tensor_parallel_size is not None,
            "model.moe_aux_loss_coeff": model.moe_aux_loss_coeff > 0,
            "model.moe_z_loss_coeff": model.moe_z_loss_coeff is not None,
            "model.moe_router_dtype": model.moe_router_dtype is not None,
            "rollout.routing_replay": cfg.rollout.routing_replay != "off",
            "rollout.engine.enable_expert_parallel": cfg.rollout.engine.enable_expert_parallel,
        }
        return [
            f"{key} is set, but {spec.architecture} has no experts: leave the key out"
            for key, set_ in told.items()
            if set_
        ]
    bad = []
    sizes = (
        ("expert_model_parallel_size", ep, "num_experts"),
        ("expert_tensor_parallel_size", parallel.expert_tensor_size, "expert_intermediate_size"),
    )
    for key, size, name in sizes:
        count = getattr(spec, name)
        if count % size:
            near = max(divisor for divisor in range(1, size + 1) if count % divisor == 0)
            bad.append(f"parallel.{key} {size} does not divide the model's {name} {count} (nearest that does: {near})")
    engine = cfg.rollout.engine
    tp_v = engine.tensor_parallel_size
    if engine.enable_expert_parallel and spec.num_experts % tp_v:
        near = max(divisor for divisor in range(1, tp_v + 1) if spec.num_experts % divisor == 0)
        fix = f"nearest that does: {near}" if near > 1 else "no smaller one does: leave that key out"
        bad.append(
            f"rollout.engine.tensor_parallel_size {tp_v} does not divide the model's num_experts {spec.num_experts}, "
            f"which rollout.engine.enable_expert_parallel shares out ({fix})"
        )
    # Measured with Megatron-Core 0.16.1: gradients of experts are then not summed over the ranks that hold copies.
    if ep == 1 and parallel.expert_tensor_size != parallel.tensor_model_parallel_size:
        bad.append(
            f"parallel.expert_tensor_parallel_size {parallel.expert_tensor_size} other than tensor_model_parallel_size "
            f"{parallel.tensor_model_parallel_size} needs parallel.expert_model_parallel_size > 1: without it Megatron "
            "does not sum the gradients of experts over all ranks that hold copies of them"
        )
    # Megatron refuses it too, in the first step: each TP rank would send the same tokens to the experts.
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        bad.append(
            f"{spec.architecture} has experts, and parallel.tensor_model_parallel_size "
            f"{parallel.tensor_model_parallel_size} then needs parallel.sequence_parallel=true"
        )
    if model.fp8:
        bad.append(f"model.fp8 {model.fp8} cannot be had with {spec.architecture}: its experts are not built in FP8")
    return bad


def check_data(cfg: Config) -> list[str]:
    """Each source says where its prompts come from; weights are set for all training sources or for none."""
    bad = []
    for name, sources in (("train", cfg.data.train), ("eval", cfg.data.eval)):
        for i, source in enumerate(sources):
            if (source.path is None) == (source.reasoning_gym is None):
                bad.append(f"data.{name}.{i}: set exactly one of path and reasoning_gym")
            elif source.path == []:
                bad.append(f"data.{name}.{i}.path: the list is empty; name at least one file")
    if weighted := [i for i, source in enumerate(cfg.data.eval) if source.weight is not None]:
        bad.append(f"data.eval.{weighted[0]}.weight has no effect: evaluation takes every prompt once; leave it out")
    without = [i for i, source in enumerate(cfg.data.train) if source.weight is None]
    if without and len(without) < len(cfg.data.train):
        bad.append(f"data.train.{without[0]} has no weight, but other sources have one; set it for all or for none")
    return bad


def check_evaluation(cfg: Config) -> list[str]:
    """An evaluation that is asked for has prompts: found at the end of a run, this would cost its last step."""
    asked = [name for name in ("at_start", "at_end") if getattr(cfg.eval, name)]
    if cfg.eval.interval:
        asked.insert(0, "interval")
    if not asked or cfg.data.eval:
        return []
    keys = ", ".join(f"eval.{name}" for name in asked)
    return [f"{keys}: there are no prompts to evaluate; set data.eval, or leave the key out"]


def check_directories(cfg: Config) -> list[str]:
    """What the run writes to are directories that can be made and written here."""
    bad = []
    for key, name in (("logging.run_dir", cfg.logging.run_dir), ("checkpoint.save", cfg.checkpoint.save)):
        if not name:
            continue
        place = nearest_existing(name)
        if not place.is_dir():
            bad.append(f"{key} {name!r}: {place} is a file; name a directory")
        elif not os.access(place, os.W_OK | os.X_OK):
            bad.append(f"{key} {name!r}: {place} cannot be written to by this user")
    return bad


def check_stop_file(cfg: Config) -> list[str]:
    """No file asks the run to stop: it would end after one step."""
    file = Path(cfg.logging.run_dir) / STOP_FILE
    return [f"{file} asks this run to stop: remove the file to go on"] if file.exists() else []


def nearest_existing(path: str | Path) -> Path:
    """`path`, or where it is not there yet its nearest ancestor that is, below which it would be made."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
