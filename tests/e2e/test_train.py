"""The command people type, on two ranks: train, log, evaluate, save, export; then resume; everything real.

Two starts of the engine in all: the first run (3 steps) under torchrun, and the resumed one (a 4th) in forked ranks.
The 4th step is taken with a plug-in of every kind, and with the KL in the reward.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.plugins.filter import neither_easy_nor_hopeless
from tests.actor.oracle import perplexity
from tests.ranks import CLI, REPO, launch_ranks, run_ranks
from treepo_mega.actor.perplexity import reference_texts
from treepo_mega.checkpoint.mcore import check_complete
from treepo_mega.config import load_config
from treepo_mega.data.prompts import load_prompts
from treepo_mega.data.rewards.verifiers import boxed
from treepo_mega.monitor.metrics import read_metrics
from treepo_mega.monitor.registry import check_known
from treepo_mega.tree.node import Tree

RECIPE = [
    "parallel.tensor_model_parallel_size=2",
    "rollout.rollout_batch_size=4",
    "rollout.n_samples_per_prompt=8",
    # All trees are of the step's weights: what transformers says of them can be compared.
    *("rollout.oversample=1", "rollout.surplus=drop"),
    "train.num_steps_per_rollout=1",
    "train.lr_warmup_iters=0",
    "algo.kl_loss_coef=0.01",
    "algo.rollout_is=sequence",
    "algo.rollout_rs=geometric",
    "train.prefix_sharing=tree",
    "checkpoint.save_interval=2",
    "eval.max_prompts=16",
    "eval.n_samples_per_prompt=2",
    "logging.trees_interval=1",
    "logging.completions=2",
    "logging.trace_steps=[2,2]",
    "logging.progress=true",
]


SINK = """
import csv
from pathlib import Path


def tell(step, metrics):
    with Path(__file__).with_name("told.csv").open("a", newline="") as file:
        csv.writer(file).writerows([step, name, value] for name, value in metrics.items())
"""

PLUGINS = [
    "algo.advantage_estimator=examples/plugins/advantage.py:against_siblings",
    "rollout.filter_metric=examples/plugins/filter.py:neither_easy_nor_hopeless",
    "rollout.branching.budget.kind=examples/plugins/budget.py:most_surprised",
    "reward.functions=[{verifier: boxed}, {verifier: 'examples/plugins/reward.py:form', weight: 0.25}]",
    *("algo.kl_loss_coef=0", "reward.kl_coef=0.5"),
]


def sink_of(run: Path) -> Path:
    """The file of the run's own sink, which writes told.csv beside it."""
    return run.parent / "sink.py"


def arguments(run: Path, *overrides: str) -> tuple[str, ...]:
    """Of the command, for a run in the directory `run`."""
    return (
        "train",
        "examples/tiny_cpu.yaml",
        *RECIPE,
        f"logging.run_dir={run}",
        f"logging.sinks=[{sink_of(run)}:tell]",
        *overrides,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("train") / "run"
    sink_of(directory).write_text(SINK)
    launch_ranks(2, "-m", "treepo_mega.cli", *arguments(directory, "train.num_rollouts=3"), timeout=280)
    return directory


@pytest.fixture(scope="module")
def rows(run) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in read_metrics(run / "metrics.jsonl")}


def test_every_step_has_its_line_and_every_metric_is_documented(rows):
    assert sorted(rows) == [0, 1, 2, 3]
    for row in rows.values():
        for name in set(row) - {"step", "time"}:
            check_known(name)
            assert row[name] is not None, f"{name} was not finite"


def test_answers_are_graded_while_others_are_sampled(rows):
    """How many end early is a matter of the machine; that what ends early is counted once is not."""
    shares = [rows[step]["reward/overlapped_share"] for step in (1, 2, 3)]
    assert all(0 <= share <= 1 for share in shares) and all(rows[step]["reward/lost"] == 0 for step in (1, 2, 3))


def test_throughput_is_stated_with_shared_tokens_once_and_in_every_trajectory(rows):
    for step in (1, 2, 3):
        row = rows[step]
        for phase in ("", "old_logprobs_", "ref_logprobs_", "update_"):
            shared = row[f"perf/{phase}unique_tokens_per_s_per_gpu"] / row[f"perf/{phase}flat_tokens_per_s_per_gpu"]
            assert shared == pytest.approx(row["perf/packed_token_ratio"])
        of_step = row["perf/unique_tokens_per_s_per_gpu"] * row["perf/step_s"]
        assert 2 * of_step == pytest.approx(row["perf/packed_tokens"]), "two ranks"
        # The update computes three times what a pass without gradients does, of the same packs.
        ratio = row["perf/update_tflops_per_gpu"] * row["timing_s/update"]
        ratio /= row["perf/ref_logprobs_tflops_per_gpu"] * row["timing_s/ref_logprobs"]
        assert ratio == pytest.approx(3)
        assert (
            row["perf/rollout_tflops_per_gpu"] > 0 and row["rollout/forwarded_pairs"] > row["rollout/forwarded_tokens"]
        )
        assert not [name for name in row if name.endswith(("_mfu", "_hfu"))], "no peak is known of a CPU"


def test_the_host_is_looked_at_while_it_trains(rows):
    assert sum(rows[step]["host/telemetry_samples"] for step in (1, 2, 3)) >= 1, "one rank of the node samples"
    assert any(rows[step].get("host/rss_gib_max", 0) > 0.1 for step in (1, 2, 3))


def test_the_first_step_starts_from_equal_models(rows):
    first = rows[1]
    assert first["train/ratio_max_diff"] == 0 and first["train/ppo_kl"] == 0
    assert first["train/kl_loss"] == 0, "the reference is the actor at step 0"
    assert rows[2]["train/kl_loss"] > 0, "and stays behind when the actor moves"
    assert all(rows[s]["rollout/logprob_abs_diff_max"] <= 1e-4 for s in (1, 2, 3))
    assert rows[0]["reshard/canary_abs_diff"] <= 1e-4
    # Random tokens, far less probable than sampled ones: rounding shows in the largest difference, not in the mean.
    assert all(rows[s]["reshard/canary_abs_diff"] <= 1e-3 for s in (1, 2, 3))
    assert all(rows[s]["reshard/canary_mean_abs_diff"] <= 2e-5 for s in (0, 1, 2, 3))


def test_engine_and_trainer_agree_so_no_trajectory_is_weighed_or_rejected(rows):
    for step in (1, 2, 3):
        assert rows[step]["rollout/is_weight_mean"] == pytest.approx(1, abs=1e-3)
        assert rows[step]["rollout/is_ratio_min"] != rows[step]["rollout/is_ratio_max"], "both sides were compared"
        assert rows[step]["rollout/leaves_rejected"] == 0


def test_trees_share_tokens_and_have_all_their_leaves(run, rows):
    assert 0 < rows[1]["tree/token_ratio"] < 1
    trees = [json.loads(x) for x in (run / "trees" / "step_000001.jsonl").read_text().splitlines()]
    assert trees and all(len(t["leaves"]) == 8 == len(t["rewards"]) for t in trees)
    assert rows[1]["tree/leaves"] == 8 * len(trees)
    assert all(len(t["advantages"]) == 8 and any(t["advantages"]) for t in trees), "what the step trained with"


def test_tensorboard_shows_the_same_numbers(run, rows):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    seen = {e.step: e.value for e in events.Scalars("grad-norm")}
    assert seen == pytest.approx({s: rows[s]["grad-norm"] for s in (1, 2, 3)}, rel=1e-6)


def test_every_rank_drew_the_phases_of_the_step_that_was_asked_for(run, rows):
    for rank in (0, 1):
        events = json.loads((run / "trace" / f"rank_{rank}.json").read_text())["traceEvents"][1:]
        spans = {event["name"]: event for event in events}
        assert {"step", "rollout", "sampling", "update", "reshard"} <= spans.keys() and {e["pid"] for e in events} == {
            rank
        }
        assert len([event for event in events if event["name"] == "step"]) == 1, "step 2 alone"
        parts = sum(event["dur"] for event in events if event["name"] in ("rollout", "reward"))
        assert parts <= spans["step"]["dur"]
    # The main rank's clock made the metric, too.
    first = json.loads((run / "trace" / "rank_0.json").read_text())["traceEvents"]
    drawn = next(event for event in first if event["name"] == "step")
    assert drawn["dur"] / 1e6 == pytest.approx(rows[2]["timing_s/step"], rel=1e-2)


def test_checkpoints_are_whole_and_the_summary_has_what_people_ask(run):
    saved = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert saved == ["step_000002", "step_000003"]
    assert check_complete(run / "checkpoints" / "step_000003")["step"] == 3
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["token_ratio"] < 1 and summary["mismatch_max"] <= 1e-4
    assert {"accuracy_before", "accuracy_after", "greedy_before", "greedy_after"} <= summary.keys()
    assert load_config(run / "config.yaml").logging.run_dir == str(run)


def test_transformers_loads_the_export_and_finds_the_same_accuracy(run, rows):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg = load_config(run / "config.yaml")
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    model = AutoModelForCausalLM.from_pretrained(run / "hf", dtype=torch.float32)
    prompts = list(load_prompts(cfg.data.eval, cfg.data, tokenizer).prompts)[:16]
    right = 0.0
    for p in prompts:
        out = model.generate(torch.tensor([p.tokens]), max_new_tokens=64, do_sample=False)[0, len(p.tokens) :]
        right += boxed(p.data_source, tokenizer.decode(out, skip_special_tokens=True), p.answer)
    assert right / 16 == pytest.approx(rows[3]["eval/greedy_accuracy"])
    texts = reference_texts(prompts, tokenizer, cfg.rollout.max_response_len)
    assert [tokenizer.decode(t.tokens[t.prompt_len :]) for t in texts] == [p.reference + "<eos>" for p in prompts]
    assert perplexity(model, texts) == pytest.approx(rows[3]["eval/perplexity"], rel=1e-5)
    assert rows[0]["eval/perplexity"] != rows[3]["eval/perplexity"]


@pytest.fixture(scope="module")
def resumed(run, rows) -> str:
    """What the same command says when it goes on for a step, with a plug-in of every kind and a changed sink."""
    # `rows` before: they are the first run's.
    assert len(rows) == 4
    sink_of(run).write_text(SINK + "# another\n")
    return run_ranks(2, CLI, *arguments(run, "train.num_rollouts=4", "checkpoint.save_hf=false", *PLUGINS), timeout=280)


def kl_by_transformers(tree: Tree) -> list[float]:
    """Log pi - log pi_ref over each response: what the engine said of it, and what the untrained model says."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("examples/tiny_reasoner", dtype=torch.float32)
    out = []
    for leaf in tree.leaves:
        response = torch.tensor(tree.response(leaf))
        with torch.no_grad():
            logits = model(torch.tensor([tree.prefix(leaf)])).logits[0, -1 - len(response) : -1]
        reference = logits.log_softmax(-1).gather(1, response[:, None]).sum()
        own = sum(sum(tree.nodes[node].logprobs) for node in tree.ancestry(leaf))
        out.append(own - float(reference))
    return out


def test_the_same_command_goes_on_where_it_stopped(run, rows, resumed):
    assert "resumed from" in resumed and "next step 3" in resumed
    assert "step 4: what the model wrote" in resumed and "advantage" in resumed, "logging.completions"
    after = read_metrics(run / "metrics.jsonl")
    assert after[:4] == list(rows.values()) and after[4]["step"] == 4


def test_plugins_of_every_kind_decide_a_step(run, resumed):
    last = read_metrics(run / "metrics.jsonl")[-1]
    for name in set(last) - {"step", "time"}:
        check_known(name)
    trees = [Tree.from_dict(json.loads(x)) for x in (run / "trees" / "step_000004.jsonl").read_text().splitlines()]
    assert trees and len(trees) == last["rollout/prompts_trained"]
    assert all(neither_easy_nor_hopeless(tree) for tree in trees), "the filter"
    # A right answer is 1, a form without fault 0.25; half of the KL goes off.
    kl_of = {tree.prompt_id: kl_by_transformers(tree) for tree in trees}
    for tree in trees:
        assert set(tree.verdicts) == {0.0, 1.0}
        form = np.add(tree.rewards, 0.5 * np.array(kl_of[tree.prompt_id])) - tree.verdicts
        assert np.abs(form - (form * 8).round() / 8).max() <= 1e-3 and set((form * 8).round()) <= {0, 1, 2}
    every_kl = np.concatenate(list(kl_of.values()))
    assert last["reward/kl"] == pytest.approx(every_kl.mean(), abs=1e-3) and np.abs(every_kl).max() > 0.01
    assert last["reward/kl_penalty"] == -0.5 * last["reward/kl"] and last["train/kl_loss"] == 0
    assert (
        0 < last["reward/form"] <= 1 and last["reward/form.ended"] >= last["reward/boxed"] == last["rollout/accuracy"]
    )
    told = list(csv.reader(sink_of(run).with_name("told.csv").read_text().splitlines()))
    assert {int(step) for step, _, _ in told} == {0, 1, 2, 3, 4}, "the sink, before and after"
    assert ["4", "grad-norm", str(last["grad-norm"])] in told
    assert f"logging.sinks.0: {sink_of(run)}:tell has changed since this run began" in resumed
    kept = json.loads((run / "plugins" / "plugins.json").read_text())
    assert len(kept) == 5 and all((run / "plugins" / entry["copy"]).exists() for entry in kept.values())
    assert {"algo.advantage_estimator", "reward.functions.1.verifier", "logging.sinks.0"} <= kept.keys()


def test_the_report_reads_the_run(run, tmp_path):
    from treepo_mega.monitor.report import write_report

    page, data, _ = write_report([run], tmp_path)
    assert "<html" in Path(page).read_text() and json.loads(Path(data).read_text())
    assert (REPO / "examples" / "tiny_cpu.yaml").exists()
