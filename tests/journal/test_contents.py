"""A tree comes back from its record equal, in the type of every number; and what a run's trees depend on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from tests.tree.forests import forests
from treepo_mega.config import Config, parse_config
from treepo_mega.journal.contents import to_record, to_tree
from treepo_mega.journal.fingerprint import LEFT_OUT, fingerprint
from treepo_mega.runtime.packed import pack, unpack


@examples(60)
@given(forests(), st.data())
def test_a_tree_is_the_same_number_by_number(trees, data):
    for tree in trees:
        for node in tree.nodes[1:]:
            node.entropies = data.draw(st.sampled_from([[], [0.1] * len(node.tokens)]))
            node.peek = data.draw(st.lists(st.floats(-30, 0), max_size=20))
            node.weight = data.draw(st.sampled_from([1.0, 0.1]))
        tree.counts = data.draw(st.dictionaries(st.sampled_from("abc"), st.one_of(st.integers(0, 9), st.floats(0, 9))))
        tree.verdicts = data.draw(st.sampled_from([[], list(tree.rewards)]))
        there = to_tree(unpack(pack(to_record(tree))))
        # As text: 1 and 1.0 are different there, as they are in files that people read.
        assert json.dumps(there.to_dict()) == json.dumps(tree.to_dict())


def config(tmp_path: Path, **keys: object) -> Config:
    return parse_config(
        {"model": {"hf_checkpoint": str(tmp_path)}, "data": {"train": [{"reasoning_gym": "chain_sum"}]}}
    ).replace(keys)


def test_a_fingerprint_knows_what_trees_depend_on_and_nothing_else(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    known = fingerprint(config(tmp_path), {}, "")
    alike = {
        "parallel.tensor_model_parallel_size": 2,
        "rollout.timeout_s": 5.0,
        "rollout.engine.max_num_seqs": 7,
        "reward.num_workers": 3,
        "checkpoint.save_interval": 3,
        "logging.progress": False,
    }
    for key, value in alike.items():
        assert fingerprint(config(tmp_path, **{key: value}), {}, "") == known, key
    others = {"train.seed": 3, "train.lr": 1e-5, "rollout.n_samples_per_prompt": 5, "reward.kl_coef": 0.1}
    seen = {fingerprint(config(tmp_path, **{key: value}), {}, "") for key, value in others.items()}
    seen |= {fingerprint(config(tmp_path), {"data.verifier": "ab"}, ""), fingerprint(config(tmp_path), {}, "/other")}
    assert len(seen) == len(others) + 2 and known not in seen
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert fingerprint(config(tmp_path), {}, "") != known, "other first weights"


def test_keys_that_are_left_out_are_keys(tmp_path: Path):
    values = config(tmp_path).model_dump(by_alias=True)
    for key in LEFT_OUT:
        section = values
        for part in key.split("."):
            assert part in section, key
            section = section[part]
