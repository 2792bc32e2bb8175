"""One rank of test_fetch.py: plans of ranks that hold what their engines sampled, against plans of ranks that hold all.

`fetch_worker.py`. Rank 0 prints how many tokens were trained and how many trees were shared out.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron.core import parallel_state as ps

from tests.rollout.fakes import everywhere, fake_collector, fake_config
from tests.tree.parts import assert_equal
from treepo_mega.actor.batch import plan_rollout
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.rollout.contents import bring_to_main
from treepo_mega.runtime import dist
from treepo_mega.tree.node import Tree

REPO = Path(__file__).resolve().parents[2]
ESTIMATORS = ("treepo", "segment")


def main() -> None:
    """All ways to share, in this process."""
    spec = ModelSpec.from_hf(REPO / "examples/configs/qwen25_7b")
    counts = {"trained": 0.0, "far": 0.0}
    dist.initialize(fake_config())
    for number, sharing in enumerate(("tree", "content", "none", "prompt")):
        cfg = fake_config(n_samples_per_prompt=4, rollout_batch_size=8)
        cfg.train.prefix_sharing = sharing
        cfg.train.num_steps_per_rollout = 2
        cfg.algo.advantage_estimator = ESTIMATORS[number % 2]
        collector = fake_collector(cfg, seed=dist.rank(), share=0.5)
        trees = collector.collect(number).trees
        far = [tree for tree in trees if tree.home != dist.rank()]
        counts["far"] += len(far)
        # From here on `trees` lack contents, and `whole` do not.
        whole = [Tree.from_dict(stored) for stored in everywhere(trees)]
        plans, metrics = plan_rollout(trees, cfg, spec)
        expected, told = plan_rollout(whole, cfg, spec)
        assert metrics == told and len(plans) == len(expected) == 2
        for got, want in zip(plans, expected, strict=True):
            assert_equal(got, want)
            counts["trained"] += sum(len(pack.target) for pack in got.packs)
        bring_to_main(trees, timeout_s=30)
        if dist.is_main():
            assert json.dumps([tree.to_dict() for tree in trees]) == json.dumps([tree.to_dict() for tree in whole])
    told = dist.sum_over_ranks(counts)
    assert ps.get_data_parallel_world_size() == dist.world_size()
    if dist.is_main():
        print(json.dumps(told))


if __name__ == "__main__":
    main()
    dist.leave()
