"""Keys that are not here any more, or never were: each is refused with what to use instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from treepo_mega.config import ConfigError, load_config, parse_config
from treepo_mega.config.moved import KNOWN_ELSEWHERE, MOVED
from treepo_mega.config.root import Config


def nested(key: str, value: object) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def base() -> dict[str, Any]:
    return {"model": {"hf_checkpoint": "m"}, "data": {"train": [{"path": "t.jsonl"}]}}


def has_key(key: str) -> bool:
    section: Any = parse_config(base())
    for part in key.split("."):
        if part not in type(section).key_names():
            return False
        section = getattr(section, type(section).attribute_of(part))
    return True


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_key_names_the_new_one_in_a_file_and_in_an_override(tmp_path: Path, old: str, new: str):
    path = tmp_path / "config.yaml"  # as a checkpoint of before holds it
    path.write_text(yaml.safe_dump(base() | nested(old, 1)))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: {old} is now {new}"
    path.write_text(yaml.safe_dump(base()))
    with pytest.raises(ConfigError) as error:
        load_config(path, [f"{old}=1"])
    assert f"{old} is now {new}" in str(error.value)
    assert has_key(new) and (old == "rollout.fallback" or not has_key(old))


def test_every_old_key_of_a_file_is_named_at_once(tmp_path: Path):
    path = tmp_path / "config.yaml"
    old = {"rollout": {"segment_length": 8, "fallback": "none"}, "checkpoint": {"save": ""}}
    path.write_text(yaml.safe_dump(base() | old))
    with pytest.raises(ConfigError) as error:
        load_config(path, ["rollout.fallback.from=any"])
    for sentence in (
        "rollout.segment_length is now rollout.segment.length",
        "rollout.fallback is now rollout.fallback.from",
        'checkpoint.save "" is now checkpoint.enabled false',
    ):
        assert sentence in str(error.value)


@pytest.mark.parametrize(("name", "advice"), KNOWN_ELSEWHERE.items())
def test_a_key_of_another_trainer_names_what_to_set_instead(name: str, advice: str):
    with pytest.raises(ConfigError) as error:
        parse_config(base() | {"rollout": {name: 1}})
    assert f"rollout.{name}: not a key of this trainer: {advice}" in str(error.value)
    named = [
        word.strip(".,;:")
        for word in advice.split()
        if word.split(".")[0] in Config.model_fields and "." in word and "}" not in word
    ]
    assert all(has_key(word) for word in named), advice


def test_the_key_from_is_written_without_its_underscore():
    cfg = parse_config(base() | {"rollout": {"fallback": {"from": "any"}}})
    assert cfg.rollout.fallback.from_ == "any"
    with pytest.raises(ConfigError, match=r"rollout.fallback.from_: unknown key \(did you mean 'from'\?\)"):
        parse_config(base() | {"rollout": {"fallback": {"from_": "any"}}})


def test_a_slip_in_another_trainers_name_gets_that_names_advice() -> None:
    with pytest.raises(ConfigError, match=r"train\.leraning_rate: unknown key, like 'learning_rate'.*: set train\.lr"):
        load_config(None, ["model.hf_checkpoint=m", "data.train=[{path: t.jsonl}]", "train.leraning_rate=1"])
    with pytest.raises(ConfigError, match=r"train\.lrr: unknown key \(did you mean 'lr'\?\)"):
        load_config(None, ["model.hf_checkpoint=m", "data.train=[{path: t.jsonl}]", "train.lrr=1"])
