"""Presets: what they stand for, that written keys win, and that a run's own configuration file means the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.keys import ALL_KEYS, keys_set
from treepo_mega.config import ConfigError, check, load_config, parse_config
from treepo_mega.config.load import dump_text
from treepo_mega.config.presets import PRESETS, expand_preset
from treepo_mega.config.root import Config

ROOT = Path(__file__).resolve().parents[2]
BASE: dict[str, Any] = {"model": {"hf_checkpoint": "m"}, "data": {"train": [{"path": "t.jsonl"}]}}


def value_of(cfg: Config, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = cfg.model_dump(mode="json", by_alias=True)
    for part in key.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_keys_that_exist_and_fits_by_itself(name):
    assert [key for key, _ in keys_set(PRESETS[name]) if key not in ALL_KEYS] == []
    cfg = parse_config(BASE | {"preset": name})
    for key, value in keys_set(PRESETS[name]):
        assert value_of(cfg, key) == value, key
    # How long a segment may be follows from the responses, which are the run's own.
    check(parse_config(BASE | {"preset": name, "rollout": {"segment": {"length": 64}, "max_depth": 112}}), 1)


def test_the_paper_s_preset_is_the_published_recipe():
    recipe = load_config(ROOT / "examples" / "qwen25_7b_treepo.yaml")
    for key, value in keys_set(PRESETS["treepo_paper"]):
        assert value_of(recipe, key) == value, key


def test_the_preset_of_the_evidence_is_the_arm_that_was_measured():
    arms = yaml.safe_load((ROOT / "tools" / "bench" / "learning.yaml").read_text())["arms"]
    recipe = load_config(ROOT / "examples" / "tiny_cpu.yaml", arms["entropy4-carry24"])
    assert recipe.rollout.rollout_batch_size == 24, "half more prompts than the demo"
    for key, value in keys_set(PRESETS["entropy_trees"]):
        assert value_of(recipe, key) == value, key


def test_written_keys_win_and_the_rest_of_their_section_stays():
    cfg = parse_config(BASE | {"preset": "treepo_paper", "rollout": {"segment": {"length": 128}, "max_depth": 7}})
    assert (cfg.rollout.segment.length, cfg.rollout.max_depth, cfg.rollout.max_refills) == (128, 7, 9)
    assert PRESETS["treepo_paper"]["rollout"]["max_depth"] == 14, "the preset itself is not written to"


def test_an_override_on_the_command_line_names_a_preset_or_wins_over_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    cfg = load_config(path, ["preset=fair_trees", "algo.advantage_estimator=grpo"])
    assert (cfg.preset, cfg.algo.leaf_weight, cfg.algo.advantage_estimator) == ("fair_trees", "descent", "grpo")


def test_the_configuration_that_a_run_writes_reads_back_equal():
    cfg = parse_config(BASE | {"preset": "treepo_paper", "train": {"lr": 3e-6}})
    again = parse_config(yaml.safe_load(dump_text(cfg)))
    assert again == cfg and again.train.global_batch_size == 512


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"preset: .*'treepo_papr'.*did you mean 'treepo_paper'"):
        parse_config(BASE | {"preset": "treepo_papr"})
    assert expand_preset({"preset": 3}) == {"preset": 3}
