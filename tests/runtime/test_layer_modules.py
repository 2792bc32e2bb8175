"""Which modules `model.transformer_impl=auto` takes, and that the reason is said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from treepo_mega.config import ConfigError, parse_config
from treepo_mega.reshard.sides import grid_of
from treepo_mega.runtime import dist, layer_modules


def machine(monkeypatch, *, gpu: bool, error: Exception | None = None) -> None:
    """As if this machine had a GPU or not, and Transformer Engine unless loading it gives an error."""

    def load(name: str) -> None:
        assert gpu and name == "transformer_engine.pytorch", "nothing is loaded without a GPU"
        if error is not None:
            raise error

    monkeypatch.setattr(layer_modules, "has_cuda", lambda: gpu)
    monkeypatch.setattr(layer_modules, "importlib", SimpleNamespace(import_module=load))


@pytest.mark.parametrize(
    "gpu, error, impl, reason",
    [
        (False, None, "local", "torch sees no GPU"),
        (True, ImportError("no such module"), "local", "does not load (ImportError: no such module)"),
        (True, OSError("undefined symbol"), "local", "does not load (OSError: undefined symbol)"),
        (True, None, "transformer_engine", "Transformer Engine loads"),
    ],
)
def test_auto_is_decided_at_the_start_and_said(monkeypatch, gpu, error, impl, reason):
    machine(monkeypatch, gpu=gpu, error=error)
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [mine])
    base = {"model": {"hf_checkpoint": "x", "transformer_impl": "auto"}, "data": {"train": [{"path": "x.jsonl"}]}}
    cfg = parse_config(base)
    assert grid_of(cfg).naming == "local", "a plan without a process: names move no bytes"
    (note,) = dist.choose_layers(cfg)
    assert note.startswith(f"model.transformer_impl=auto takes {impl}: ") and reason in note
    assert cfg.model.transformer_impl == impl
    assert grid_of(cfg).naming == {"local": "local", "transformer_engine": "te"}[impl]
    assert dist.choose_layers(cfg) == [], "decided once"


def test_ranks_that_would_build_other_layers_are_refused(monkeypatch):
    machine(monkeypatch, gpu=False)
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [mine, "transformer_engine"])
    base = {"model": {"hf_checkpoint": "x", "transformer_impl": "auto"}, "data": {"train": [{"path": "x.jsonl"}]}}
    with pytest.raises(ConfigError, match=r"rank 0 local, rank 1 transformer_engine.*Set it to local"):
        dist.choose_layers(parse_config(base))
