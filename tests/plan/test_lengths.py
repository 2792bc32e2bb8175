"""Response lengths from the trees of a run, in the place of log-normal ones."""

import json

import pytest

from treepo_mega.config import load_config
from treepo_mega.plan.hardware import Rates
from treepo_mega.plan.lengths import Lengths, LengthsError, equal_parts, read_lengths
from treepo_mega.plan.work import TreeShape
from treepo_mega.tree.node import Tree


@pytest.fixture
def run(tmp_path):
    """Two steps of a tree with leaves of 3 and 5 tokens; the first step's are longer."""
    (tmp_path / "trees").mkdir()
    for step, extra in ((1, 100), (20, 0)):
        tree = Tree.start("p", [1, 2, 3, 4])
        trunk = tree.add_child(0)
        trunk.tokens = [5, 6] * (1 + extra)
        for size in (1, 3):
            leaf = tree.add_child(trunk.id)
            leaf.tokens = [7] * size
            tree.leaves.append(leaf.id)
        (tmp_path / "trees" / f"step_{step:06d}.jsonl").write_text(json.dumps(tree.to_dict()) + "\n")
    return tmp_path


def test_leaves_of_later_steps_count_with_what_they_share(run):
    found = read_lengths(run)
    assert (found.leaves, found.tail, found.prompt, found.response) == (2, (3.0, 5.0), 4.0, 4.0)
    assert found.scaled(50).tail == (30.0, 50.0)


def test_parts_hold_equally_many():
    parts = equal_parts(list(range(1000)))
    assert len(parts) == 128 and parts == tuple(sorted(parts))
    assert sum(parts) / 128 == pytest.approx(499.5, abs=1)


def test_paths_of_a_tree_end_where_those_of_the_run_did(run, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    cfg = load_config("examples/tiny_cpu.yaml", ["rollout.mode=sequential"])
    lengths = read_lengths(run).scaled(60).put(Lengths.assumed(cfg, Rates()))
    shape = TreeShape.of(cfg, response=lengths.response, prompt=20, spread=0.6, tail=lengths.tail)
    # Half of the 16 leaves end at 36 tokens, the others at 60.
    assert shape.flat == pytest.approx(8 * 36 + 8 * 60, rel=0.02)
    halves = {round(paths) for paths in shape.paths}
    assert halves == {16, 8, 0}
    # Another mean stretches them.
    assert TreeShape.of(cfg, response=24, prompt=20, spread=0.6, tail=lengths.tail).flat == pytest.approx(
        24 * 16, rel=0.02
    )


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "step_000020.jsonl:1: not a tree"),
        ('{"nodes": [{"tokens": []}, {"parent": 1, "tokens": []}], "leaves": [1]}', "node 1 has the parent 1"),
        ('{"nodes": [{"tokens": []}], "leaves": [7]}', "IndexError"),
        ('{"nodes": [{"tokens": []}], "leaves": []}', "no finished response"),
    ],
)
def test_what_is_no_tree_is_named(run, line, words):
    (run / "trees" / "step_000020.jsonl").write_text(line + "\n")
    with pytest.raises(LengthsError, match=words):
        read_lengths(run)


def test_a_run_without_trees_is_named(tmp_path):
    with pytest.raises(LengthsError, match=r"there is no trees/step_\*.jsonl"):
        read_lengths(tmp_path)
