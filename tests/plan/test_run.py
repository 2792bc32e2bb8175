"""`treepo-mega plan`: memory, time and refusals, without torch."""

import json

import pytest

from treepo_mega.cli import main
from treepo_mega.config import load_config
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.plan.activations import in_flight
from treepo_mega.plan.calibrate import calibrate_rows
from treepo_mega.plan.engine import waves
from treepo_mega.plan.hardware import HardwareError, Rates, gpu_of
from treepo_mega.plan.layout import Layout, held_bytes
from treepo_mega.plan.lengths import Lengths
from treepo_mega.plan.run import plan_run
from treepo_mega.plan.timing import Cluster
from treepo_mega.plan.work import TreeShape

RECIPE = "examples/llama3_70b_16x8.yaml"
SMALL = "examples/qwen25_7b_2x8.yaml"
H100 = Cluster(gpu_of("H100"), 8, Rates())


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def recipe(*overrides):
    cfg = load_config(RECIPE, list(overrides))
    return cfg, ModelSpec.from_hf(cfg.model.hf_checkpoint)


def test_a_rank_of_the_70b_recipe_holds_what_megatron_built():
    """The figures of rank 0 and rank 127, built once with fake tensors."""
    cfg, spec = recipe()
    layout = Layout.of(cfg, 128)
    first, last = (held_bytes(cfg, spec, layout, layout.place(rank)) for rank in (0, 127))
    assert (first.parameters, first.gradients, first.optimizer) == (4543086592, 9086173184, 6814629888)
    assert (last.parameters, last.gradients) == (4543102976, 9086205952)


def test_shards_of_the_optimizer_add_up_to_the_model():
    cfg, spec = recipe("parallel.pipeline_model_parallel_size=1")
    layout = Layout.of(cfg, 64)
    states = sum(held_bytes(cfg, spec, layout, layout.place(rank)).optimizer for rank in range(64))
    norms = (2 * 80 + 1) * 8192
    # Norms are whole on each of eight tensor-parallel ranks; the vocabulary has rows of padding.
    assert states == 12 * (70_553_706_496 + 7 * norms + 2 * 8192 * (129_024 - 128_256))


def test_every_phase_is_there_and_adds_up(capsys):
    assert main(["plan", RECIPE, "--world-size", "128", "--json", "--price", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    seconds = plan["seconds"]
    assert seconds["step"] == pytest.approx(sum(value for name, value in seconds.items() if name != "step"))
    assert plan["gpu_hours"] == pytest.approx(seconds["step"] * 200 * 128 / 3600)
    assert plan["cost"] == pytest.approx(2 * plan["gpu_hours"])
    assert 0 < plan["tokens_per_s_per_gpu"]["unique"] < plan["tokens_per_s_per_gpu"]["flat"]
    assert plan["memory"]["problems"] == [] and 0 < plan["update_mfu"] < 0.5
    assert set(plan["rates"]) == set(plan["rate_sources"])


def test_what_makes_a_phase_faster_makes_its_plan_faster():
    cfg, spec = recipe()
    base = plan_run(cfg, spec, world_size=128, cluster=H100, refit=False).seconds
    b200 = plan_run(cfg, spec, world_size=128, cluster=Cluster(gpu_of("B200"), 8, Rates()), refit=False).seconds
    assert b200["update"] < base["update"] and b200["rollout"] < base["rollout"]
    kept = recipe("parallel.recompute_granularity=null", "parallel.recompute_method=null",
                  "parallel.recompute_num_layers=null")[0]  # fmt: skip
    plan = plan_run(kept, spec, world_size=128, cluster=H100, refit=False)
    assert plan.seconds["update"] < base["update"] and plan.seconds["rollout"] == base["rollout"]


def test_the_pipeline_holds_as_many_passes_as_its_schedule():
    assert [in_flight(Layout(1, 4, 1, 1, 1, 1), stage, 9) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(Layout(1, 4, 1, 1, 1, 1), 0, 2) == 2
    assert [in_flight(Layout(1, 4, 2, 1, 1, 1), stage, 8) for stage in range(4)] == [11, 9, 7, 5]


def test_a_tree_shares_what_its_branching_lets_it():
    cfg, _ = recipe()
    shape = TreeShape.of(cfg, response=2000, prompt=100, spread=0.6)
    assert shape.flat / shape.leaves == pytest.approx(2000, rel=0.01)
    assert shape.unique < shape.flat
    alone = TreeShape.of(cfg.replace({"rollout.mode": "sequential"}), response=2000, prompt=100, spread=0.6)
    assert alone.unique == pytest.approx(alone.flat, rel=0.05) and alone.unique > shape.unique
    assert shape.pairs(shape.paths) < shape.pairs(shape.alive)


def test_what_does_not_fit_is_refused_with_layouts_that_do(capsys):
    kept = [f"parallel.recompute_{name}=null" for name in ("granularity", "method", "num_layers")]
    kept += ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]
    arguments = ["plan", SMALL, "--world-size", "4", *kept]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "this run does not fit:" in said and "phase update, rank 0:" in said and "activations" in said
    assert "what fits on 4 ranks, the fastest first:" in said
    proposal = next(line for line in said.splitlines() if " s a step, " in line)
    overrides = proposal.split(": ", 1)[1].split()
    assert main(["plan", SMALL, "--world-size", "4", *kept, *overrides]) == 0
    # A dry run ends likewise, before anything starts.
    assert main(["train", SMALL, "--dry-run", "--world-size", "4", *kept]) == 2
    assert "what fits on 4 ranks" in capsys.readouterr().err


def test_two_nodes_are_too_few_for_70b_and_what_is_not_is_said(capsys):
    assert main(["plan", RECIPE, "--world-size", "16"]) == 2
    said = capsys.readouterr().err
    assert "world size 16 is not a multiple of TP x PP x CP = 32" in said
    assert "nothing fits on 16 ranks; on 32, the fastest first:" in said or "what fits on 16 ranks" in said
    assert said.count(" s a step, ") >= 3


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--gpu", "H10"], "GPU 'H10' is not known (did you mean 'H100'?)"),
        (["--network-gb-per-s", "900"], "the network link with 900 GB/s is faster than node with 360"),
        (["--response-mean", "9000"], "a mean response of 9000 tokens: expected more than 0 and at most 7168"),
        (["--kept", "1.5"], "--kept 1.5: expected a share"),
        (["--price", "0"], "--price 0.0: expected a positive number"),
        (["--ranks-per-node", "0"], "--ranks-per-node 0: expected a positive number"),
        (["--calibrate", "tests"], "--calibrate tests: there is no metrics.jsonl"),
        (["model.hf_checkpoint=docs"], "docs/config.json"),
        (["--gpu", "CPU", "--price", "-1"], "--price -1.0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments, words, capsys):
    assert main(["plan", RECIPE, "--world-size", "128", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_rates_know_their_sources_and_refuse_nonsense():
    assert all(Rates.sources().values())
    with pytest.raises(HardwareError, match="train 0: expected a positive"):
        Rates().replace(train=0)


def rows_of(cfg, spec, cluster, world):
    """Metrics of two steps that took exactly what the plan says, but for a slow first one."""
    lengths = Lengths(40.0, 20.0, 0.3, 1.0)
    plan = plan_run(cfg, spec, world_size=world, cluster=cluster, lengths=lengths)
    shape = TreeShape.of(cfg, response=40, prompt=20, spread=0.3)
    trees = cfg.rollout.rollout_batch_size
    row = {f"timing_s/{phase}": plan.seconds[phase] for phase in plan.seconds} | {
        "timing_s/step": plan.step_s,
        "perf/packed_tokens": plan.work.tokens,
        "perf/unique_tokens_per_s_per_gpu": plan.work.tokens / plan.step_s / world,
        "rollout/prompts_trained": trees,
        "rollout/prompts_dropped_zero_std": 0,
        "rollout/response_len_mean": 40.0,
        "rollout/response_len_max": 60.0,
        "rollout/generated_tokens": shape.unique * trees,
        "rollout/engine_steps": 66.0 * world,
        "tree/leaves": shape.leaves * trees,
        "tree/prompt_tokens": 20.0 * trees,
    }
    return plan, [{name: 10 * value for name, value in row.items()}, row]


def test_a_calibrated_plan_gives_back_what_was_measured():
    cfg = load_config("examples/tiny_cpu.yaml", [])
    spec = ModelSpec.from_hf(cfg.model.hf_checkpoint)
    slow = Cluster(gpu_of("CPU"), 8, Rates().replace(train=0.1, rollout=3.0, refit=2.0, forward=1.5))
    measured, rows = rows_of(cfg, spec, slow, 2)
    fast = Cluster(gpu_of("CPU"), 8, Rates())
    found = calibrate_rows("run", cfg, spec, rows, fast, clock="timing_s")
    assert found.world == 2 and found.lengths.response == 40.0
    again = plan_run(
        cfg, spec, world_size=2, cluster=Cluster(fast.gpu, 8, found.rates), lengths=found.lengths
    )  # fmt: skip
    for phase in ("rollout", "old_logprobs", "update", "reshard"):
        assert again.seconds[phase] == pytest.approx(measured.seconds[phase], rel=0.05), phase


def test_a_run_tells_what_a_step_costs_from_what_its_tokens_cost():
    """Calibrated by a run of 16 prompts, of which the costs are known: what 48 prompts and two ranks take."""
    cfg = load_config("examples/tiny_cpu.yaml", ["rollout.dynamic_sampling=false", "rollout.oversample=1"])
    spec = ModelSpec.from_hf(cfg.model.hf_checkpoint)
    cluster = Cluster(gpu_of("CPU"), 8, Rates())
    _, rows = rows_of(cfg, spec, cluster, 1)
    step, token, request, beside = 0.02, 0.0004, 0.003, 0.1
    shape = TreeShape.of(cfg, response=40, prompt=20, spread=0.3)
    # 200 requests a rollout and 70 steps, whatever the shape would have let expect.
    tokens = 16 * (shape.unique + shape.prompt)
    costs = {
        "rollout/engine_step_s": step, "rollout/engine_token_s": token, "rollout/engine_request_s": request,
        "rollout/engine_steps": 70.0, "rollout/requests": 200.0,
        "timing_s/rollout": 70 * step + tokens * token + 200 * request + 16 * beside,
        "perf/update_step_s": 0.5, "perf/update_micro_batch_s": 0.2, "perf/update_token_s": 0.001,
        "perf/micro_batches": 4.0,
    }  # fmt: skip
    known = costs | {"timing_s/update": 2 * 0.5 + 4 * 0.2 + rows[1]["perf/packed_tokens"] * 0.001}
    found = calibrate_rows("run", cfg, spec, [row | known for row in rows], cluster, clock="timing_s")
    measured = Cluster(cluster.gpu, 8, found.rates)
    tripled = cfg.replace({"rollout.rollout_batch_size": 48})
    plan = plan_run(tripled, spec, world_size=1, cluster=measured, lengths=found.lengths)
    assert plan.seconds["rollout"] == pytest.approx(
        70 * step + 3 * (tokens * token + 200 * request + 16 * beside), rel=0.1
    )
    halved = plan_run(tripled, spec, world_size=2, cluster=measured, lengths=found.lengths)
    half = 70 * step + 1.5 * (tokens * token + 200 * request + 16 * beside)
    assert halved.seconds["rollout"] == pytest.approx(half, rel=0.1)
    # A plan that has one factor for all would triple what is fixed, too.
    assert plan.seconds["rollout"] < 0.92 * 3 * known["timing_s/rollout"]
    assert plan.seconds["update"] == pytest.approx(2 * 0.5 + 3 * (known["timing_s/update"] - 2 * 0.5), rel=0.05)


def test_prompts_without_signal_begin_again_in_waves():
    cfg, _ = recipe("rollout.rollout_batch_size=64", "rollout.max_refills=9")
    assert list(waves(cfg, 1.0)) == [64]
    # A wave of less than one prompt is the probability of one.
    assert list(waves(cfg, 0.5)) == [64 / 2**number for number in range(11)]
    # No more prompts begin than the refills allow.
    assert sum(waves(cfg.replace({"rollout.max_refills": 1}), 0.25)) == 128
    more = cfg.replace({"rollout.oversample": 2.0})
    assert list(waves(more, 0.5)) == [128]
    # What replaces a prompt is one prompt.
    assert list(waves(more, 0.25))[:2] == [128, 32]
    assert list(waves(more.replace({"rollout.dynamic_sampling": False}), 0.5)) == [128]
    # Trees that are left over train later: in the mean as many begin as are needed.
    carry = more.replace({"rollout.surplus": "carry"})
    assert list(waves(carry, 0.8)) == [80] and list(waves(carry, 0.25))[:2] == [128, 32]
