"""What is planned for a run's disk, against files that were written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from treepo_mega.config import Config, load_config
from treepo_mega.journal.contents import to_record
from treepo_mega.journal.file import RecordFile
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.plan.disk import expected_journals, plan_disk, record_bytes
from treepo_mega.plan.hardware import Rates
from treepo_mega.plan.lengths import Lengths
from treepo_mega.plan.seconds import tree_shape
from treepo_mega.tree.node import Node, Tree

TINY = "examples/tiny_cpu.yaml"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def configure(*overrides: str) -> tuple[Config, ModelSpec]:
    cfg = load_config(TINY, list(overrides))
    return cfg, ModelSpec.from_hf(cfg.model.hf_checkpoint)


def grown(prompt: int, levels: int, segment: int) -> Tree:
    """A tree of two children a node, graded; logprobs are of an engine's fp32."""
    draw = random.Random(levels)
    nodes = [Node(0, -1, (), [draw.randrange(1 << 17) for _ in range(prompt)])]
    border = [0]
    for level in range(1, levels + 1):
        children = []
        for parent in border:
            for place in range(2):
                number = len(nodes)
                nodes[parent].children.append(number)
                tokens = [draw.randrange(1 << 17) for _ in range(segment)]
                logprobs = [draw.randrange(1 << 20) / -(1 << 18) for _ in tokens]
                path = (*nodes[parent].path, place)
                nodes.append(Node(number, parent, path, tokens, logprobs, level=level, policy_version=300))
                children.append(number)
        border = children
    for leaf in border:
        nodes[leaf].stop = "eos"
    rewards = [float(draw.randrange(2)) for _ in border]
    return Tree("a prompt", nodes, border, rewards, counts={"generated_tokens": 1.0}, verdicts=list(rewards))


@pytest.mark.parametrize(("levels", "segment"), [(2, 8), (4, 64), (7, 16), (5, 512)])
def test_a_record_is_as_long_as_planned(tmp_path: Path, levels: int, segment: int):
    cfg, spec = configure()
    tree = grown(200, levels, segment)
    sampled = sum(len(node.tokens) for node in tree.nodes[1:])
    planned = record_bytes(cfg, spec, tokens=sampled, prompt=200, segments=len(tree.nodes), leaves=len(tree.leaves))
    with RecordFile.create(tmp_path / "rank_00000_0.trees", {}) as file:
        row = {"lost": 0, "numbers": [0.5] * 6, "trains": True, "differs": True}
        size = file.append({"round": 0, "index": 3, "row": row, "tree": to_record(tree)})
    assert 0.75 < size / planned < 1.1, (size, planned)


def test_the_plan_counts_steps_that_no_checkpoint_has_yet(tmp_path: Path):
    def planned(*overrides: str) -> tuple[int, int]:
        cfg, spec = configure(f"logging.run_dir={tmp_path}", "checkpoint.enabled=true", *overrides)
        lengths = Lengths.assumed(cfg, Rates())
        disk = plan_disk(cfg, spec, tree_shape(cfg, lengths), lengths.kept)
        assert expected_journals(cfg, spec) == ({tmp_path / "rollouts": disk.journals} if disk.journals else {})
        return disk.journal_step, disk.journal_steps

    step, together = planned("checkpoint.save_interval=5")
    assert together == 6, "five of them wait for their checkpoint, and the sixth is sampled"
    assert planned("checkpoint.save_interval=5", "checkpoint.async_save=true") == (step, 11)
    assert planned("checkpoint.save_interval=500", "train.num_rollouts=30") == (step, 30)
    assert planned("rollout.durable=false") == (0, 0)
    assert planned("rollout.rollout_batch_size=32", "checkpoint.save_interval=5")[0] == pytest.approx(2 * step, rel=0.2)


def test_entropies_of_tokens_are_counted_where_branches_ask_for_them():
    def of_thousand_tokens(*overrides: str) -> float:
        cfg, spec = configure(*overrides)
        return record_bytes(cfg, spec, tokens=1000, prompt=0, segments=1, leaves=1)

    forks = ["rollout.branching.at=fork", "rollout.branching.initial=[2,2]"]
    by_logprob, by_entropy = (
        of_thousand_tokens(*forks, f"rollout.branching.fork.signal={signal}") for signal in ("logprob", "entropy")
    )
    assert (by_logprob - of_thousand_tokens(), by_entropy - by_logprob) == (0, 4000)
