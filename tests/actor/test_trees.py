"""Training on trees equals transformers with plain autograd on flat sequences, in every layout.

One launch a world size and lane runs all of its cells (trees_worker.py); tests look at what it measured. A cell is a
layout, a model, recompute on or off, a branching depth (0: a single path), and whether trees are cut. In the fast
lane the same launch takes whole optimizer steps (UPDATES): single paths, but weights and perplexity as well.

The slow lane keeps the product of layouts and MATRIX on one and two ranks. On four ranks each layout meets PAIRWISE:
(plain, depth 4, cut), (recompute, depth 2, whole), (plain, depth 0, whole). So every pair (layout, recompute) and
(layout, cut) stays, and depths 0, 2 and 4 of each layout. The other cells of the product have the mark `matrix`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.actor import exact
from tests.actor.oracle import ROTATIONS
from tests.actor.tree_oracle import CLIP_REGIMES
from tests.ranks import launch_once, run_ranks

WORKER = Path(__file__).with_name("trees_worker.py")
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [
        {"tp": 2},
        {"tp": 2, "sp": True},
        {"pp": 2},
        {"pp": 2, "vpp": 2},
        {"cp": 2},
        {},  # two data-parallel ranks
    ],
    4: [
        {"tp": 2, "pp": 2},
        {"tp": 2, "pp": 2, "sp": True},
        {"tp": 2, "pp": 2, "vpp": 2, "sp": True},
        {"tp": 2, "cp": 2},
        {"tp": 2, "cp": 2, "sp": True},
        {"pp": 2, "cp": 2},
        {"pp": 2, "vpp": 2, "cp": 2},
        {"cp": 4},
        {"pp": 4},
        {"cp": 2},  # and two data-parallel ranks
        {"tp": 2, "sp": True},
        {"pp": 2},
        {"pp": 2, "vpp": 2},
    ],
}
EXPERTS: dict[int, list[tuple[dict[str, Any], str, bool, list[str]]]] = {
    1: [({}, "qwen2_moe", False, [])],
    2: [
        ({"ep": 2}, "qwen3_moe", True, []),
        ({"ep": 2}, "mixtral", False, ["model.moe_token_dispatcher_type=allgather"]),
        ({"tp": 2, "sp": True, "ep": 2, "etp": 1}, "qwen2_moe", False, []),
    ],
    4: [({"pp": 2, "ep": 2}, "mixtral", False, []), ({"tp": 2, "sp": True, "ep": 2}, "qwen3_moe", True, [])],
}
"""World size -> (layout, kind, recompute, overrides) in the fast lane; tools/bench/moe.py takes many more."""
MODELS = (("llama", True), ("qwen3", True), ("qwen2", False))
MATRIX = (
    *((False, 0, False), (False, 1, False), (False, 2, True), (False, 3, False), (False, 3, True), (False, 4, True)),
    *((True, 2, False), (True, 4, True)),
)
"""(recompute, depth, cut): the full product takes every layout through these."""
PAIRWISE = ((False, 4, True), (True, 2, False), (False, 0, False))
"""Those of MATRIX that every layout of four ranks meets in the slow lane."""
# kind:tied:TP:PP:VPP:SP[:overrides]
RECOMPUTE = ":parallel.recompute_granularity=full,parallel.recompute_method=uniform,parallel.recompute_num_layers=1"
UPDATES = {
    1: (
        *("llama:tied:1:1:1:0", "qwen2:untied:1:1:1:0", "qwen3:tied:1:1:1:0", "llama:tied:1:1:1:0" + RECOMPUTE),
        *(f"{MODELS[i % 3][0]}+{rotation}:tied:1:1:1:0" for i, rotation in enumerate(ROTATIONS)),
    ),
    2: (
        "llama:tied:2:1:1:0",
        "llama:tied:1:2:1:0",  # the tied embedding lies on both stages
        "llama:tied:1:1:1:0",  # two data-parallel ranks
        "qwen2:untied:2:1:1:1",
        "qwen3:tied:1:2:2:0",  # interleaved with two stages: silently wrong with batched p2p
        "qwen3:tied:2:1:1:1" + RECOMPUTE,
        "llama:tied:1:1:1:0:parallel.use_distributed_optimizer=false",
        "llama:tied:1:1:1:0:parallel.overlap_grad_reduce=true",
        "llama:tied:2:1:1:0:model.make_vocab_size_divisible_by=128",  # rank 1 holds nothing but padding
    ),
    4: ("llama:tied:2:2:1:0", "qwen3:tied:2:2:1:1", "qwen2:untied:2:2:2:1", "llama:tied:1:2:2:0"),
}
CORRECTED = (
    ("algo.leaf_weight=descent", "algo.rollout_is=sequence", "algo.policy_loss=cispo"),
    ("algo.rollout_rs=sequence", "algo.rollout_rs_threshold=30", "algo.loss_agg_mode=seq-mean-token-sum-norm"),
    (
        *("algo.leaf_weight=descent", "algo.rollout_is=geometric", "algo.rollout_rs=geometric"),
        *("algo.rollout_rs_threshold=1.5", "algo.rollout_token_veto_threshold=0.01"),
    ),
)
"""What weighs and rejects trajectories: their tokens lie on several ranks."""
MEET = ((0, 0), (2, 1), (4, 2), (5, 0))
"""(index into LAYOUTS[2], index into CORRECTED): TP, PP, CP and DP."""
OTHER = ("seq-mean-token-mean", "seq-mean-token-sum")


def cells(ranks: int, lane: str) -> list[dict[str, Any]]:
    """All cells of a lane; models and recompute take turns over layouts. `matrix` has what `slow` leaves out."""
    out = []
    slow = lane != "fast"
    pairwise = PAIRWISE if ranks == 4 else MATRIX
    chosen = pairwise if lane == "slow" else [m for m in MATRIX if m not in pairwise]
    for i, layout in enumerate(LAYOUTS[ranks]):
        kind, tied = MODELS[(i + ranks) % len(MODELS)]
        base = {"layout": layout, "kind": kind, "tied": tied}
        if not slow:
            out.append({**base, "recompute": i % 2 == 0, "depth": 3, "split": True})
            continue
        for recompute, depth, split in chosen:
            out.append({**base, "recompute": recompute, "depth": depth, "split": split})
    if not slow:
        for layout, kind, recompute, overrides in EXPERTS[ranks]:
            cell = {"layout": layout, "kind": kind, "tied": False, "recompute": recompute, "depth": 3, "split": True}
            out.append(cell | ({"overrides": overrides} if overrides else {}))
    if not slow and ranks == 1:
        out += [{**out[0], "recompute": False, "twins": impl} for impl in ("local", "transformer_engine")]
        more = {"layout": {}, "kind": "llama", "tied": True, "recompute": False, "depth": 3, "split": True}
        out += [{**more, "sharing": sharing} for sharing in ("prompt", "none")]
        out += [{**more, "overrides": [f"algo.loss_agg_mode={mode}"]} for mode in OTHER]
        out += [{**more, "depth": depth, "split": False} for depth in (0, 1, 2, 4)]
        out.append({**more, "overrides": ["algo.kl_loss_type=k2", "algo.eps_clip_c=null"]})
        gspo = ["algo.ratio_level=sequence", "algo.loss_agg_mode=seq-mean-token-mean"]
        out.append({**more, "sharing": "none", "overrides": gspo})
        out.append({**more, "exact": True})
    if not slow and ranks == 2:
        out.append({**out[1], "twins": "transformer_engine"})
        out += [{**out[layout], "depth": 2, "overrides": list(CORRECTED[which])} for layout, which in MEET]
    return sorted(
        out, key=lambda c: (str(c["layout"]), c["kind"], c["recompute"], c.get("exact", False), c.get("twins", ""))
    )


def name(cell: dict[str, Any]) -> str:
    """For the test's id."""
    layout = "".join(f"{k}{int(v)}" for k, v in cell["layout"].items()) or "dp"
    more = "-".join([*cell.get("overrides", ()), *([cell["sharing"]] if "sharing" in cell else [])])
    more += "-fp64" if cell.get("exact") else f"-{cell['twins']}-twins" if "twins" in cell else ""
    how = f"{'re' if cell['recompute'] else ''}d{cell['depth']}{'s' if cell['split'] else ''}"
    return f"{layout}-{cell['kind']}-{how}-{more}"


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """launched(world_size, lane) -> the directory with what the ranks measured, launched once."""

    @launch_once
    def launch(ranks: int, lane: str) -> Path:
        directory = tmp_path_factory.mktemp(f"trees{ranks}")
        (directory / "cells.json").write_text(json.dumps(cells(ranks, lane)))
        deadline = 1700 if lane == "matrix" else 280
        updates = UPDATES[ranks] if lane == "fast" else ()
        run_ranks(ranks, WORKER, directory, directory / "cells.json", *updates, timeout=deadline)
        return directory

    return launch


@pytest.fixture(scope="module")
def measured(launched):
    """measured(world_size, lane) -> results in the order of `cells`."""
    return lambda ranks, lane: json.loads((launched(ranks, lane) / "results.json").read_text())


def check(got: dict[str, Any], cell: dict[str, Any]) -> None:
    """What must hold of a cell."""
    if cell.get("exact"):
        return check_exact(got)
    assert got["logprob_diff"] <= 1e-5
    assert got["gradient_diff"] <= 1e-5, "of every parameter, relative"
    assert got["loss_diff"] <= 1e-6 * max(1.0, got["loss_scale"])
    assert got["entropy_diff"] <= 1e-6
    assert got["noted"] == 0, "dispatchers of experts would keep hidden states of every layer"
    check_corrections(got, " ".join(cell.get("overrides", ())))
    if cell["depth"] == 0:
        assert got["token_ratio"] == 1
    elif cell["depth"] >= 3 and "sharing" not in cell:
        assert got["token_ratio"] < 0.35
        assert len(set(got["regimes"]) & CLIP_REGIMES) >= 9, "clipped high, low, dual and not, either sign and both"
    if cell["split"] and cell["depth"] >= 3 and "sharing" not in cell:
        assert got["repeated"] > 0, "trees were cut"
    else:
        assert cell["split"] or got["repeated"] == 0
    if "twins" in cell:
        # Four linear modules a layer, of which this rank may have a part; every micro-batch of the update.
        assert got["fused"] > 0 and got["fused"] % (4 * 4) == 0, "weight gradients went straight to their buffers"
        fused_norms = [name for name in got["parameters"] if name.endswith("layer_norm_weight")]
        assert len(fused_norms) == (2 * 4 if cell["twins"] == "transformer_engine" else 0)
    else:
        assert not got.get("fused")


def check_corrections(got: dict[str, Any], overrides: str) -> None:
    """Trajectories were weighed and rejected where that was asked for, and some of them only."""
    said = got["corrections"]
    assert ("rollout/leaves_rejected" in said) == ("rollout_rs" in overrides)
    assert ("rollout/is_weight_mean" in said) == ("rollout_is" in overrides)
    if "rollout_rs" in overrides:
        assert 0 < said["rollout/leaves_rejected"] < got["leaves"]
    if "rollout_is=sequence" in overrides:
        assert said["rollout/is_ratio_min"] < 1 and said["rollout/is_ratio_max"] > 2, "the bound cut some"
        assert 0 < said["rollout/is_weight_mean"] < 2


def check_exact(got: dict[str, Any]) -> None:
    """fp64, one rank: trees, whole and cut, are flat up to rounding; drawn forests were checked when drawn."""
    assert got["transformers"] <= 1e-5, "whose rotary angles are fp32"
    assert sorted(got["shapes"]) == sorted(exact.SHAPES)
    for apart in got["shapes"].values():
        exact.check(apart)
    alike = got["shapes"]["siblings alike"]
    assert alike["merged"] < 0.7 * alike["whole"], "equal tokens were merged"
    weighed, rejected = got["corrected"]["weighed"], got["corrected"]["rejected"]
    exact.check(weighed)
    exact.check(rejected)
    assert weighed["rollout/is_ratio_max"] > 2 and rejected["rollout/leaves_rejected"] > 0
    assert got["drawn"]["examples"] >= exact.EXAMPLES
    for kind in ("cut", "empty_segment", "single_path", "several_trees"):
        assert got["drawn"][kind] > 0, kind


def params(lane: str) -> list[Any]:
    """(ranks, index) of every cell of a lane."""
    return [pytest.param(n, i, id=f"{n}-{name(c)}") for n in LAYOUTS for i, c in enumerate(cells(n, lane))]


@pytest.mark.parametrize("ranks, index", params("fast"))
def test_equals_flat_autograd(measured, ranks, index):
    check(measured(ranks, "fast")[index], cells(ranks, "fast")[index])


@pytest.mark.parametrize("ranks, case", [(ranks, case) for ranks, cases in UPDATES.items() for case in cases])
def test_an_update_equals_transformers(launched, ranks, case):
    got = json.loads((launched(ranks, "fast") / "updates.json").read_text())[case]
    assert got["logprob_diff"] <= 1e-5
    assert got["perplexity_rel"] <= 1e-5, "transformers' own loss, over all data-parallel ranks"
    assert got["one_text_rel"] <= 1e-5, "other data-parallel ranks have nothing but padding"
    assert got["gradient_diff"] <= 1e-5, "of every parameter, relative"
    assert got["grad_norm_rel"] <= 1e-6
    assert got["loss_diff"] <= 1e-6
    assert got["clipped_by"] > 2, "the update below is a clipped one"
    assert got["weight_diff"] <= 1e-3, "after one update, in units of the learning rate"
    # The first step: the policy is the one that sampled, and the reference is the policy.
    assert (got["max_ratio_diff"], got["ppo_kl"], got["kl_loss"], got["skipped_steps"]) == (0, 0, 0, 0)
    assert got["packs"] > 1, "gradients accumulate over micro-batches"
    # Where no other rank takes part in a pass, rank 0 had no memory for its second pack, and began again with halves.
    assert got["ranks_split"] == got["alone"]
    # The second epoch: the same packs at the new weights.
    assert got["second_loss_diff"] <= 1e-5
    assert got["second_ratio_diff"] > 1e-3 and got["second_ratio_rel"] <= 1e-2


def test_checkpoints_do_not_depend_on_what_layers_are_made_of(measured):
    stored = {c.get("twins"): got["stored"] for c, got in zip(cells(1, "fast"), measured(1, "fast"), strict=True)
              if c["kind"] == "qwen3"}  # fmt: skip
    assert stored.keys() == {None, "local", "transformer_engine"}
    assert len(stored[None]) > 10 and stored[None] == stored["local"] == stored["transformer_engine"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks, index", params("slow"))
def test_topology_matrix(measured, ranks, index):
    check(measured(ranks, "slow")[index], cells(ranks, "slow")[index])


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks, index", params("matrix"))
def test_rest_of_the_topology_matrix(measured, ranks, index):
    check(measured(ranks, "matrix")[index], cells(ranks, "matrix")[index])


def test_the_slow_lane_keeps_every_pair_of_four_ranks_and_the_matrix_the_product():
    kept = cells(4, "slow")
    for layout in LAYOUTS[4]:
        mine = [c for c in kept if c["layout"] == layout]
        assert {c["recompute"] for c in mine} == {c["split"] for c in mine} == {True, False}
        assert {c["depth"] for c in mine} == {0, 2, 4}
    everything = {(n, name(c)) for n in LAYOUTS for lane in ("slow", "matrix") for c in cells(n, lane)}
    assert len(everything) == sum(len(LAYOUTS[n]) for n in LAYOUTS) * len(MATRIX) >= 120
