"""Four ranks with an engine each (with nothing to do on one of them), two that share one, and one that works alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.ranks import run_ranks


def launch(ranks: int, hf: Path, other: Path, tp: int) -> dict[str, list]:
    out = run_ranks(ranks, Path(__file__).with_name("ranks.py"), hf, other, tp)
    return json.loads(next(line for line in out.splitlines() if line.startswith('{"trees"')))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trees_and_scores_are_the_same_in_either_layout(tiny_llama, make_tiny_llama):
    other = make_tiny_llama(seed=1)
    apart, together = launch(4, tiny_llama, other, 1), launch(2, tiny_llama, other, 2)
    assert len(apart["trees"]) == 3 and apart["trees"] == together["trees"]
    assert len(apart["grown_on"]) == 3 and apart["grown_on"] == together["grown_on"]
    assert len(apart["forked"]) == 6 and apart["forked"] == together["forked"]
    assert apart["refilled"] == together["refilled"] and [apart["forked"], apart["refilled"]] == apart["alone"]
    trained, metrics = apart["refilled"]
    assert len(trained) == 5 and metrics["rollout/refills"] >= 2, "prompts were replaced"
    assert {fork for *_, nodes in apart["forked"] for *_, fork in nodes} == {None, "rank"}
    sizes = [len(leaves) for leaves, *_ in apart["forked"]]
    assert min(sizes) == 3 < max(sizes) and sum(sizes) == 36, "settled prompts leave theirs to mixed ones"
    (whole,) = together["evaluated"]
    assert whole["stolen"] == 0 and whole["metrics"][0]["samples"] == 12 and whole["metrics"][1]["samples"] == 36
    for slow in apart["evaluated"]:
        assert slow["stolen"] > 0, "the fast engine takes prompts that were dealt to the slow one"
        assert slow["metrics"] == whole["metrics"], "the figures do not depend on who sampled what"
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        want = (model(torch.tensor([[3] * 33])).logits[0, :-1] / 0.7).log_softmax(-1)[:, 3].tolist()
    assert apart["scores"] == pytest.approx(want, abs=1e-4)
    assert together["scores"] == pytest.approx(want, abs=1e-4), "the weight update reached both shards"
