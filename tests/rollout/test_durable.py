"""Durable rollouts: a step that goes on after kills is the step that was never killed, and samples nothing twice."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.rollout.fakes import FakeEngine, fake_collector, fake_config, load, said, state_of
from tests.rollout.test_refill import FORKS
from treepo_mega.config import Config
from treepo_mega.engine.stream import SegmentRequest, SegmentStream
from treepo_mega.journal import folder
from treepo_mega.journal.file import JournalError
from treepo_mega.rollout.collect import Collector
from treepo_mega.rollout.durable import Durable
from treepo_mega.rollout.refill import RefillRule

STEP = 2
"""The step that is killed; those before it leave something over."""

KEYS: list[dict[str, Any]] = [
    {},
    FORKS,
    FORKS | {"leaves": "adaptive", "first_leaves": 2},
    {"oversample": 1.5, "surplus": "carry"},
    {"leaves": "adaptive", "first_leaves": 2},
    {"schedule": "level"},
    # One token a segment: answers of two are carried over.
    {"mode": "tree", "segment": {"length": 1}, "partial_rollout": 1, "branching": {"factor": 2}},
]


def durable(cfg: Config, said: list[str] | None = None, **keys: Any) -> Durable:
    say = print if said is None else said.append
    return Durable(cfg, **{"origin": "", "first_step": STEP, "afresh": False, "say": say, **keys})


class Watched(FakeEngine):
    """Remembers the names of prompts whose segments it was asked for, and samples only as many tokens as are wanted."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.asked: list[tuple[int, ...]] = []

    def submit(self, request: SegmentRequest) -> SegmentStream:
        self.asked.append((request.seed, *request.prefix))
        return super().submit(request)

    def finish(self, request: SegmentRequest) -> Any:
        finished = super().finish(request)
        if len(finished.tokens) <= request.max_tokens:
            return finished
        # An answer has a token and an end, each asked for on its own.
        place = len(request.prefix) - 2
        return replace(
            finished,
            tokens=[finished.tokens[place]],
            logprobs=[finished.logprobs[place]],
            finish_reason="stop" if place else "length",
        )


def made(cfg: Config, seed: int, where: Path, **keys: Any) -> tuple[Collector, Watched, list[str]]:
    """A collector that keeps what it makes under `where`; its engine; and what it says."""
    cfg = cfg.replace({"logging.run_dir": str(where)})
    collector = fake_collector(cfg, seed, 0.5)
    engine = collector.generator.engine = Watched(random.Random(seed))  # type: ignore[assignment]
    lines: list[str] = []
    collector.durable = durable(cfg, lines, **keys)
    return collector, engine, lines


class Killed(Exception):
    """The engine ends amid a step."""


def kill() -> None:
    raise Killed


def killed(collector: Collector, engine: Watched, after: int) -> bool:
    """Whether the step was killed `after` so many engine steps; it may have ended before."""
    engine.at_step = (engine.steps + after, kill)
    try:
        collector.collect(STEP)
    except Killed:
        return True
    return False


def begun_at(cfg: Config, where: Path) -> tuple[str, list[Any], int]:
    """The state before STEP, what STEP says when nobody kills it, and how many segments it asks for."""
    collector, engine, _ = made(cfg, 0, where)
    for step in range(STEP):
        collector.collect(step)
    state = state_of(collector)
    engine.asked.clear()
    return state, said([collector.collect(STEP)]), len(engine.asked)


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_a_step_goes_on_after_kills_and_samples_only_what_was_in_flight(keys: dict[str, Any], tmp_path: Path):
    cfg = fake_config(n_samples_per_prompt=4, **keys)
    state, whole, segments = begun_at(cfg, tmp_path / "whole")
    restored = 0
    for after in (1, 2, 3, 5, 8):
        where = tmp_path / str(after)
        asked: list[tuple[int, ...]] = []
        for seed in (after, 10 + after):
            collector, engine, _ = made(cfg, seed, where)
            load(collector, state)
            if not killed(collector, engine, after):
                break
            asked += engine.asked
        collector, engine, lines = made(cfg, 30, where)
        load(collector, state)
        forest = collector.collect(STEP)
        assert said([forest]) == whole, f"killed twice after {after} engine steps"
        assert not lines
        restored += int(forest.metrics["rollout/trees_restored"])
        if forest.metrics["rollout/trees_restored"]:
            assert forest.metrics["rollout/tokens_restored"] > 0
            assert len(engine.asked) < segments
    assert restored > 0


def test_a_step_that_had_ended_is_trained_again_without_sampling_anything(tmp_path: Path):
    cfg = fake_config(n_samples_per_prompt=4, oversample=1.5, surplus="carry")
    state, whole, _ = begun_at(cfg, tmp_path)
    collector, engine, _ = made(cfg, 9, tmp_path)
    load(collector, state)
    forest = collector.collect(STEP)
    assert said([forest]) == whole and engine.asked == []
    assert forest.metrics["rollout/trees_restored"] == len(forest.trees) + forest.metrics["rollout/prompts_surplus"] + (
        forest.metrics["rollout/prompts_dropped_zero_std"] - forest.metrics["rollout/surplus_trained"]
    )


def test_a_torn_file_costs_its_last_tree(tmp_path: Path):
    cfg = fake_config(n_samples_per_prompt=4, oversample=1.5)
    state, whole, _ = begun_at(cfg, tmp_path / "whole")
    (path,) = folder.files_of(tmp_path / "whole", STEP)
    written = path.read_bytes()
    restored = []
    for seed, size in enumerate(range(0, len(written), len(written) // 7)):
        where = tmp_path / str(size)
        folder.new_file(where, STEP, 0).write_bytes(written[:size])
        collector, _, lines = made(cfg, seed, where)
        load(collector, state)
        forest = collector.collect(STEP)
        assert said([forest]) == whole
        assert all("cut short" in line and str(where) in line for line in lines)
        restored.append(forest.metrics["rollout/trees_restored"])
    assert restored[0] == 0 and restored == sorted(restored) and restored[-1] > restored[1]


def test_a_damaged_file_is_refused_by_name(tmp_path: Path):
    cfg = fake_config(n_samples_per_prompt=4)
    state, _, _ = begun_at(cfg, tmp_path)
    (path,) = folder.files_of(tmp_path, STEP)
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 4
    path.write_bytes(changed)
    collector, _, _ = made(cfg, 1, tmp_path)
    load(collector, state)
    with pytest.raises(JournalError, match=rf"{path}, byte \d+: .* Remove it"):
        collector.collect(STEP)


def test_trees_of_another_configuration_or_other_prompts_are_left_out_with_a_word(tmp_path: Path):
    cfg = fake_config(n_samples_per_prompt=4)
    state, whole, _ = begun_at(cfg, tmp_path)
    collector, _, lines = made(cfg.replace({"train.lr": 3e-5}), 1, tmp_path)
    load(collector, state)
    forest = collector.collect(STEP)
    assert forest.metrics["rollout/trees_restored"] == 0
    assert said([forest]) == whole
    assert len(lines) == 1 and "of another configuration" in lines[0]
    collector, _, lines = made(cfg, 1, tmp_path)
    load(collector, state)
    collector.cursor.take(1)
    assert collector.collect(STEP).metrics["rollout/trees_restored"] == 0
    assert any("stands where the run has" in line for line in lines)


def test_a_new_run_and_a_checkpoint_remove_what_is_past(tmp_path: Path):
    cfg = fake_config(n_samples_per_prompt=4).replace({"logging.run_dir": str(tmp_path)})
    begun_at(cfg, tmp_path)
    assert folder.steps_kept(tmp_path) == list(range(STEP + 1))
    durable(cfg, first_step=1)
    assert folder.steps_kept(tmp_path) == [1, 2], "a checkpoint has the steps before"
    durable(cfg, first_step=1).forget(before=2)
    assert folder.steps_kept(tmp_path) == [2]
    durable(cfg, first_step=0, afresh=True)
    assert folder.steps_kept(tmp_path) == []


def test_a_refused_write_ends_the_keeping_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cfg = fake_config(n_samples_per_prompt=4)
    state, whole, _ = begun_at(cfg, tmp_path / "whole")
    (tmp_path / "refuses").write_text("no directory")
    collector, _, _ = made(cfg, 1, tmp_path / "run")
    load(collector, state)
    assert collector.durable is not None
    collector.durable.root = tmp_path / "refuses"
    with caplog.at_level(logging.WARNING):
        assert said([collector.collect(STEP)]) == whole
    assert sum("refuses what step 2 has sampled" in record.message for record in caplog.records) == 1


@examples(200)
@given(st.data())
def test_a_rule_goes_on_where_a_killed_step_was(data: Any):
    """Against the definition: run the rule, forget a random part of what ended, go on, and come to the same prompts."""
    wanted = data.draw(st.integers(1, 6))
    begin = data.draw(st.integers(wanted, 9))
    rule = RefillRule(begin, wanted, begin + data.draw(st.integers(0, 15)))
    signal = data.draw(st.lists(st.booleans(), min_size=rule.most, max_size=rule.most))

    def prefix(rule: RefillRule, begun: int, ended: set[int]) -> int:
        flying = [position for position in range(begun) if position not in ended]
        empty = 0
        while flying:
            index = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
            if not signal[index]:
                empty += 1
                position = rule.replaces(empty)
                if position is not None:
                    flying.append(position)
                    begun = max(begun, position + 1)
        return begun

    whole = prefix(rule, rule.begin, set())
    kept = {position for position in range(whole) if data.draw(st.booleans())}
    resumed, begun = rule.resumed({position: not signal[position] for position in kept})
    assert begun <= whole
    assert prefix(resumed, begun, {position for position in kept if position < begun}) == whole
