"""What was set and what was derived can be told apart, in a Config and in the file that a run saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from treepo_mega.config import Config, dump_config, load_config, parse_config
from treepo_mega.config.derive import RULES

BASE = {"model": {"hf_checkpoint": "m"}, "data": {"train": [{"path": "t.jsonl"}]}}
SET = {
    "train.global_batch_size": 64,
    "rollout.engine.dtype": "bf16",
    "reshard.canary.max_abs_diff": 0.5,
    "reshard.canary.mean_abs_diff": 0.25,
    "loss.precision": "bf16",
    "loss.logprob_precision": "fp8",
    "algo.use_tis": True,
    "algo.whiten_advantages": False,
    "checkpoint.save": "elsewhere",
    "distributed.hang_timeout_s": 9000.0,
    "train.lr_decay_iters": 7,
}


def value_of(cfg: Config, key: str) -> object:
    section: object = cfg
    for part in key.split("."):
        section = getattr(section, part)
    return section


def test_every_rule_has_a_value_to_set():
    assert SET.keys() == RULES.keys()
    cfg = parse_config(BASE)
    assert list(cfg.derived) == list(RULES)
    assert all(value_of(cfg, key) == value is not None for key, value in cfg.derived.items())


@pytest.mark.parametrize(("key", "value"), SET.items())
def test_a_set_value_is_kept_and_not_called_derived(tmp_path: Path, key: str, value: object):
    first = tmp_path / "first.yaml"
    first.write_text(yaml.safe_dump(BASE))
    cfg = load_config(first, [f"{key}={value}"])
    assert value_of(cfg, key) == value and key not in cfg.derived
    saved = tmp_path / "config.yaml"
    dump_config(cfg, saved)
    again = load_config(saved)
    assert again == cfg and again.derived == cfg.derived
    assert saved.read_text().count("null  # derived: ") == len(RULES) - 1


def test_what_was_derived_follows_an_override_of_the_saved_file(tmp_path: Path):
    saved = tmp_path / "config.yaml"
    dump_config(parse_config(BASE), saved)
    assert '    dtype: null  # derived: "fp32"\n' in saved.read_text()
    cfg = load_config(saved, ["model.params_dtype=bf16"])
    assert cfg.rollout.engine.dtype == cfg.loss.logprob_precision == "bf16" and cfg.algo.use_tis


def test_a_value_that_looks_like_yaml_survives(tmp_path: Path):
    data = {"train": [{"path": "t.jsonl"}], "prompt_suffix": "\nloss:\n  precision: null # \\boxed{}"}
    cfg = parse_config(BASE | {"data": data})
    dump_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg


def test_sampling_follows_the_switches_and_a_copy_leaves_the_original_alone():
    cfg = parse_config(BASE | {"debug": {"schedule": "level", "continue_paths": "always"}})
    assert cfg.rollout.debug == cfg.debug and cfg.rollout.continues
    other = cfg.rollout.replace({"debug.continue_paths": "never", "branching.factor": 5})
    assert not other.continues and other.branching.factor == 5 and other.debug.schedule == "level"
    assert cfg.rollout.continues and cfg.rollout.branching.factor == 2
    with pytest.raises(KeyError, match="has no key 'factr'"):
        cfg.rollout.replace({"branching.factr": 5})
