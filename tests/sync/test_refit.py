"""The actor refits a real engine on four ranks: equal to a freshly loaded one; damage is found and named.

And how the engine is built for it: without weights, while the trainer's state is away.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.ranks import found_by, run_ranks
from tests.reshard.models import write_qwen2
from treepo_mega import build
from treepo_mega.config import Config, parse_config
from treepo_mega.sync import refit
from treepo_mega.sync.handover import DeviceMemory, State

WORKER = Path(__file__).with_name("engine_worker.py")


def groups_named_in(message: str) -> list[str]:
    """Layer groups whose checksums differ: what was damaged, and what travelled in the same parcel."""
    return re.findall(r"[\w.]+", message.partition("checksums differ in ")[2])


@pytest.mark.slow
@pytest.mark.parametrize("kind, tp, pp, tp_v", [("qwen2", 2, 2, 2), ("llama", 2, 2, 1)])
def test_a_refitted_engine_equals_a_fresh_one_and_damage_is_named(make_tiny_llama, tmp_path, kind, tp, pp, tp_v):
    if kind == "llama":
        old, new = (make_tiny_llama(tie_word_embeddings=False, seed=seed) for seed in (3, 4))
    else:
        old, new = (write_qwen2(tmp_path / str(seed), seed) for seed in (3, 4))
    out = run_ranks(4, WORKER, old, new, tp, pp, tp_v, timeout=280)
    found = found_by(out)
    assert found["metrics"]["reshard/buffer_bytes"] <= 2 << 20
    assert "model.layers.1" in groups_named_in(found["every time"])
    assert "more than reshard.canary.max_abs_diff = 0.001" in found["every time"]
    assert "a second transfer repaired it" in found["once"]
    assert "every layer group's checksum agrees" in found["in the engine"]
    assert found["warned"] == 1.0
    warning = next(line for line in out.splitlines() if "warning: after the refit" in line)
    assert "model.layers.0" in groups_named_in(warning)
    assert found["died"] == "planted"
    assert "the last weight update did not complete" in found["refused"]
    right = found["trained"].pop("right")
    low, high = {"llama": (1e-3, 0.11), "qwen2": (0.15, 0.3)}[kind]  # bf16; FP8
    assert low < right["reshard/canary_mean_abs_diff"] <= high and right["reshard/canary_failures"] == 0
    for name, error in found["trained"].items():
        assert "more than reshard.canary." in error, f"in low precision the canary did not see: {name}"
    if kind == "llama":
        engine_actor, engine, actor, transformers = found["rounding"]
        assert max(engine_actor, engine, actor) <= 5e-6, "each side rounds; the weights are those of a fresh engine"
        assert engine <= 3 * transformers and actor <= 3 * transformers, "and no worse than transformers does"
    if kind == "qwen2":
        assert found["quantised"], "with scales over TP_v, an FP8 engine is that of a fresh load"
        assert len(found["bugs"]) >= 10
        for name, error in found["bugs"].items():
            assert "more than reshard.canary." in error, f"the canary did not see: {name}"
            assert "every layer group's checksum agrees" in error, name


def settings(dtype: str, **canary: float) -> Config:
    raw = {
        "model": {"hf_checkpoint": "unused", "params_dtype": dtype},
        "data": {"train": [{"path": "x"}]},
        "reshard": {"canary": canary},
        "rollout": {"engine": {"sleep_level": 1}},
    }
    return parse_config(raw)


def test_fp32_on_cuda_needs_limits_of_its_own(monkeypatch):
    refit.check_canary_limits(settings("fp32"))
    monkeypatch.setattr(refit, "has_cuda", lambda: True)
    refit.check_canary_limits(settings("bf16"))
    refit.check_canary_limits(settings("fp32", max_abs_diff=0.05, mean_abs_diff=0.01))
    with pytest.raises(refit.RefitError, match=r"multiplies in TF32.*set reshard\.canary\.mean_abs_diff yourself"):
        refit.check_canary_limits(settings("fp32", max_abs_diff=0.05))


def test_an_engine_is_built_without_weights_while_the_trainers_state_is_away(monkeypatch):
    parts = {"grads": [torch.ones(5)], "optimizer": [torch.ones(3)], "params": [torch.ones(2)]}
    seen: dict[str, Any] = {}

    def make(hf_dir: str, cfg: Config, *, seed: int, weights_follow: bool) -> SimpleNamespace:
        seen["here"] = [tensors[0].untyped_storage().nbytes() for tensors in parts.values()]
        seen["weights_follow"] = weights_follow
        return SimpleNamespace(sleep=lambda level: seen.setdefault("slept", level), wake_up=lambda tags: None)

    monkeypatch.setattr(build, "Engine", make)
    monkeypatch.setattr(build, "engine_bytes", lambda cfg, spec: {})
    monkeypatch.setattr(build, "handover_backend", lambda _, sizes, level: DeviceMemory(parts.__getitem__, level=level))
    engine, handover = build.build_engine(settings("fp32"), SimpleNamespace(spec=None))  # type: ignore[arg-type]
    assert seen == {"here": [0, 0, 8], "weights_follow": True, "slept": 1}, "rollout.engine.sleep_level is passed on"
    assert handover.state is State.TRAIN and engine.sleep is not None
    assert all(tensors[0].untyped_storage().nbytes() for tensors in parts.values())
