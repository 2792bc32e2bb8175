"""The benches of tools/bench/gpu: that they run and agree, on a CPU; and on a GPU their figures, for the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.bench import profiles
from tools.bench.gpu import attention, card, every, head
from treepo_mega.runtime.device import has_cuda

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ROOT / "tools" / "bench" / "gpu"
Record = Callable[[str, object], None]
needs_cuda = pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")


def last_line(*command: str, timeout: float = 280) -> dict:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def checked(bench, capsys) -> dict:
    """The last line of `--check` in this process."""
    assert bench.main(["--check"]) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert out["check"] and out["wrong"] == []
    assert all(share > 0 for share in out["shares"].values())
    return out


def test_heads_agree_with_full_logits(capsys):
    out = checked(head, capsys)
    assert {row["way"] for row in out["rows"]} | set(out["absent"]) == {
        *("full", "torch", "liger", "cce", "ours", "ours fp8", "logprobs")
    }


def test_a_head_that_disagrees_is_named():
    row = {"shape": "1x2x3", "way": "ours", "loss_diff": 0.0, "grad_diff": 0.03}
    (sentence,) = head.disagreements([row, row | {"way": "ours fp8"}])
    assert sentence.startswith("ours at 1x2x3 differs from full logits: grad_diff 0.03")
    assert head.disagreements([row | {"grad_diff": float("nan")}]), "NaN is no agreement"


def test_packs_agree_with_flat_trajectories(capsys):
    out = checked(attention, capsys)
    tree, flat, alike = out["rows"]
    # A binary tree of 3 levels of 8 tokens: 7 segments, 4 paths of 24.
    assert (tree["tokens"], flat["tokens"], alike["tokens"]) == (56, 96, 48)
    within = 8 * 9 // 2
    assert tree["pairs"] == 7 * within + (2 * 8 + 4 * 16) * 8
    assert flat["pairs"] == 4 * 24 * 25 // 2


def test_padding_of_a_pack_is_seen_by_nothing_else():
    pack = attention.TreePack.of(attention.CHECK[0], 512)
    assert (len(pack.subtree_end), pack.real, pack.pairs) == (512, 56, 892)
    assert list(pack.subtree_end[56:]) == list(range(57, 513))


@pytest.mark.skipif(has_cuda(), reason="there is a GPU to measure")
def test_without_a_gpu_one_sentence_and_exit_status_2(capsys):
    with pytest.raises(SystemExit) as ended:
        head.main([])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "sees none; --check runs it on the CPU" in said.err


def test_an_unknown_bench_is_answered_with_the_nearest():
    with pytest.raises(every.NameOfBenchError, match=r"atention: expected some of head, attention.*did you mean"):
        every.main(["atention", "--check"])


def test_what_disagrees_is_said_and_counts(capsys):
    assert card.finish("head", card.Size(True, False), {"a": 0.5}, ["a differs"]) == card.DISAGREES
    said = capsys.readouterr()
    assert said.err == "head: a differs\n" and json.loads(said.out)["wrong"] == ["a differs"]


@pytest.mark.slow
def test_all_benches_run_in_one_process():
    out = last_line(str(BENCHES / "every.py"), "--check")
    assert list(out) == list(every.BENCHES)
    assert all(lines["wrong"] == [] and lines["check"] for lines in out.values())
    assert out["refit"]["engine_bytes"] == 2 * out["refit"]["parameters"], "bf16, one rank, nothing padded"
    # Blocks of host memory: three optimizer tensors and the parameters, of which each is a power of two.
    assert out["memory"]["pinned_bytes"] == sum(row["bytes"] for row in out["memory"]["parts"][1:])
    assert [row["level"] for row in out["memory"]["engine"]] == [1, 2]
    tree, independent = out["decode"]["rows"]
    assert tree["sampled_tokens"] < independent["sampled_tokens"]
    assert out["decode"]["ratios"][0]["forwarded_over_unique"] <= 1.02


def measure(name: str, record_property: Record) -> None:
    """The bench as a process of its own; its shares go into the report."""
    out = last_line(str(BENCHES / f"{name}.py"), "--quick", timeout=600)
    for share, value in out["shares"].items():
        record_property(share, f"{value:.3g}")


@pytest.mark.gpu
@needs_cuda
def test_shares_of_the_loss_head(record_property):
    measure("head", record_property)


@pytest.mark.gpu
@needs_cuda
def test_shares_of_attention(record_property):
    measure("attention", record_property)


@pytest.mark.gpu
@needs_cuda
def test_shares_of_a_refit(record_property):
    measure("refit", record_property)


@pytest.mark.gpu
@needs_cuda
def test_seconds_of_the_hand_over(record_property):
    measure("memory", record_property)


@pytest.mark.gpu
@needs_cuda
def test_shares_of_decoding(record_property):
    measure("decode", record_property)


def nodes(*segments: list[int]) -> list[dict]:
    return [{"nodes": [{"tokens": tokens, "logprobs": [-0.5] * len(tokens)} for tokens in segments]}]


def test_the_first_difference_of_two_forests_is_named():
    same = [nodes([1], [2, 3]), nodes([4])]
    assert profiles.first_difference(same, [nodes([1], [2, 3]), nodes([4])]) is None
    found = profiles.first_difference(same, [nodes([1], [2, 9]), nodes([7])])
    assert found == {
        **{"step": 1, "tree": 0, "node": 1, "place": 1, "ours_token": 3, "theirs_token": 9},
        **{"ours_logprob": -0.5, "theirs_logprob": -0.5},
    }
    shorter = profiles.first_difference(same, [nodes([1], [2]), nodes([4])])
    assert (shorter["place"], shorter["ours_token"], shorter["theirs_token"]) == (1, 3, None)
    assert profiles.first_difference(same, [nodes([1]), nodes([4])]) == {"step": 1, "tree": 0, "nodes": [2, 1]}


def test_an_evaluation_is_compared_by_kind():
    ours = {"eval/accuracy": 0.5, "eval/greedy_accuracy": 0.25, "perf/step_s": 1.0}
    theirs = ours | {"eval/accuracy": 0.75}
    assert profiles.eval_difference(ours, theirs, greedy=False) == 0.25
    assert profiles.eval_difference(ours, theirs, greedy=True) == 0.0
    with pytest.raises(RuntimeError, match="the evaluation has no greedy figure"):
        profiles.eval_difference({"eval/accuracy": 0.5}, theirs, greedy=True)
