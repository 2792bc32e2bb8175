"""The recipes under examples/: every key stands in one, each fits the layout that it names and gives its reasons.

A new configuration key needs a line in the recipe that holds the other keys of its section: the test says which one.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.keys import ALL_KEYS, KEY, is_key, keys_set
from treepo_mega.cli import main
from treepo_mega.config import load_config
from treepo_mega.config.describe import help_config, keys
from treepo_mega.config.everyday import EVERYDAY
from treepo_mega.monitor.registry import known_names

ROOT = Path(__file__).resolve().parents[2]
# Those for other schedulers are jobs, not configurations.
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if path.parent.name != "cluster")
RECIPES = [path for path in EXAMPLES if path.parent.name == "recipes"]
DRY_RUN = re.compile(r"^#   treepo-mega train (\S+) --dry-run --world-size (\d+)$", re.MULTILINE)

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def set_in(path: Path) -> dict[str, list[Any]]:
    """Key -> the values that the file gives it."""
    out: dict[str, list[Any]] = {}
    for name, value in keys_set(yaml.safe_load(path.read_text(encoding="utf-8"))):
        out.setdefault(name, []).append(value)
    return out


def of_a_source(key: str) -> str:
    """data.eval is a list of the same sources as data.train: a key that one of them shows is shown."""
    return key.replace("data.eval.", "data.train.")


def recipe_for(key: str) -> str:
    """The recipe that sets the most keys of the key's sections, the inner and the outer, and then the most alike."""
    sections = {f"{key.rpartition('.')[0]}.", f"{key.partition('.')[0]}."}

    def fitness(path: Path) -> tuple[int, float]:
        names = list(set_in(path))
        alike = max((difflib.SequenceMatcher(None, key, name).ratio() for name in names), default=0.0)
        return sum(name.startswith(section) for name in names for section in sections), alike

    return max(RECIPES, key=fitness).relative_to(ROOT).as_posix()


def missing(shown: set[str]) -> list[str]:
    """What to do about each key that no example shows."""
    found = {of_a_source(key) for key in shown}
    wanted = dict.fromkeys(of_a_source(key) for key in ALL_KEYS)
    return [f"{key}: add it to {recipe_for(key)}, with its reason" for key in wanted if key not in found]


def test_every_key_stands_in_an_example():
    shown = {name for path in EXAMPLES for name in set_in(path)}
    assert missing(shown) == []


def test_a_key_that_no_example_shows_is_sent_to_its_neighbours():
    said = missing(set(ALL_KEYS) - {"reshard.canary.prompts", "data.system_prompt", "rollout.engine.sleep_level"})
    assert said == [
        "data.system_prompt: add it to examples/recipes/data_and_rewards.yaml, with its reason",
        "rollout.engine.sleep_level: add it to examples/recipes/engine.yaml, with its reason",
        "reshard.canary.prompts: add it to examples/recipes/resharding_canary.yaml, with its reason",
    ]


@every_recipe
def test_a_recipe_fits_the_layout_that_it_names(path, capsys, monkeypatch):
    """By the command in its head, which also looks at the model's shape and at the files of prompts."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    # Whether the package that reads the Hub is installed is the machine's matter, not the recipe's.
    monkeypatch.setattr("treepo_mega.data.trial.require_datasets", lambda name: None)
    found = DRY_RUN.search(path.read_text(encoding="utf-8"))
    assert found is not None, "its head shows how to check it: treepo-mega train FILE --dry-run --world-size N"
    assert found[1] == path.relative_to(ROOT).as_posix()
    status = main(["train", found[1], "--dry-run", "--world-size", found[2]])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert f"# world size {found[2]} = TP" in said.out


@every_recipe
def test_a_recipe_says_only_what_differs_from_the_defaults(path):
    defaults = {key.name.replace(".<i>", ""): key.field for key in keys()}
    same = [
        name
        for name, values in set_in(path).items()
        for value in values
        if not defaults[name].is_required() and value == defaults[name].get_default(call_default_factory=True)
    ]
    assert same == []


@every_recipe
def test_each_key_has_its_reason(path):
    """On its line, or in the lines of comment above."""
    lines = path.read_text(encoding="utf-8").splitlines()
    bare = []
    for number, line in enumerate(lines):
        opens_a_section = line.rstrip().endswith(":")
        is_a_key = re.match(r"\s*(- )?[a-z_]+:", line) is not None
        has_reason = " # " in line or lines[number - 1].lstrip().startswith("#")
        if is_a_key and not opens_a_section and not has_reason:
            bare.append(f"{path.name}:{number + 1}: {line.strip()}")
    assert bare == []


@every_recipe
def test_comments_name_no_key_or_metric_that_does_not_exist(path):
    text = path.read_text(encoding="utf-8")
    comments = "\n".join(line.partition("#")[2] for line in text.splitlines())
    files = re.compile(r"\.(py|md|jsonl?|yaml)$")
    assert [key for key in KEY.findall(comments) if not is_key(key) and not files.search(key)] == []
    metrics = known_names()
    prefixes = sorted({name.partition("/")[0] for name in metrics if "/" in name})
    named = re.findall(rf"(?<![\w/.])((?:{'|'.join(prefixes)})/[a-z0-9_]+)", comments)
    assert [name for name in named if name not in metrics] == []


def test_a_wrong_name_in_a_comment_is_seen():
    assert [key for key in KEY.findall("as rollout.segment.lenght says, see train.lr.") if not is_key(key)] == [
        "rollout.segment.lenght"
    ]


def test_recipes_write_to_directories_of_their_own():
    directories = [load_config(path).logging.run_dir for path in RECIPES]
    assert len(set(directories)) == len(RECIPES)


def test_the_published_setting_is_what_was_published():
    """The values of the released training script, by the names that its keys have here."""
    cfg = load_config(ROOT / "examples" / "qwen25_7b_treepo.yaml")
    rollout = cfg.rollout
    assert (rollout.n_samples_per_prompt, rollout.segment.length, rollout.max_depth) == (16, 512, 14)
    assert (rollout.max_response_len, cfg.data.max_prompt_len, rollout.rollout_batch_size) == (7168, 1024, 512)
    assert (rollout.branching.factor, rollout.branching.budget.kind) == (2, "equal")
    assert (rollout.fallback.from_, rollout.fallback.cut, rollout.stop.answer_box) == ("finished", "random", False)
    assert (rollout.filter_metric, rollout.oversample, 1 + rollout.max_refills) == ("acc", 3.0, 10)
    assert not rollout.allow_smaller_batch
    # Rewards are 1 and 0 here and 1 and -1 there: the published factor 1.0 is half of the range.
    assert (cfg.reward.overlong.buffer_len, cfg.reward.overlong.penalty) == (512, 0.5)
    algo = cfg.algo
    assert (algo.advantage_estimator, algo.leaf_weight, algo.whiten_advantages) == ("treepo", "uniform", True)
    assert (algo.eps_clip, algo.eps_clip_high, algo.eps_clip_c, algo.loss_agg_mode) == (0.2, 0.28, 10.0, "token-mean")
    assert (algo.kl_loss_coef, algo.entropy_coef, algo.use_tis) == (0.0, 0.0, False)
    train = cfg.train
    assert (train.lr, train.lr_warmup_iters, train.weight_decay, train.clip_grad) == (1e-6, 10, 0.1, 1.0)
    assert (train.adam_beta1, train.adam_beta2, train.global_batch_size) == (0.9, 0.999, 512)


def test_the_everyday_keys_exist_and_come_first():
    names = [key.name for key in keys()]
    assert [name for name in EVERYDAY if name not in names] == []
    assert 60 <= len(EVERYDAY) <= 80 and len(set(EVERYDAY)) == len(EVERYDAY)
    shown = re.findall(r"^  ([a-z_0-9.<>]+): ", "\n".join(help_config()), re.MULTILINE)
    assert tuple(shown[: len(EVERYDAY)]) == EVERYDAY
    assert sorted(shown) == sorted(names), "each key once"


def test_every_key_of_the_layout_is_explained():
    assert [key.name for key in keys() if key.name.startswith("parallel.") and not key.documentation] == []
