"""`treepo-mega plan`: the refit of a recipe in bytes and seconds, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from treepo_mega.cli import main
from treepo_mega.config import load_config
from treepo_mega.modelspec.mcore_layout import ModelSpec
from treepo_mega.plan.refit import LinkSpeeds, plan_refit

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples" / "llama3_70b_16x8.yaml"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def plan(capsys, *arguments):
    code = main(["plan", str(RECIPE), *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_70b_recipe_on_its_cluster(capsys):
    code, text, _ = plan(capsys, "--world-size", "128")
    assert code == 0
    assert "Megatron TP 8 x PP 4 x DP 4 -> 16 engines x TP_v 8, bf16" in text
    assert "moved between ranks / lower bound: 1.00; between nodes / lower bound: 1.00" in text
    code, text, _ = plan(capsys, "--json", "--world-size", "128", "--network-gb-per-s", "25")
    found = json.loads(text)["refit"]
    links = found["traffic"]["by_link"]
    # Each of 16 engines takes the model once; a stage's quarter of it lies on the right rank already.
    model = found["model_bytes"]
    replicated = sum(links.values()) - 16 * model  # norms, on all eight ranks of an engine
    assert model == 2 * 70_553_706_496 and 0 < replicated < 0.001 * model * 16
    assert links["network"] == pytest.approx(0.75 * 16 * model, rel=0.001)
    assert found["seconds"]["network"] == pytest.approx(found["traffic"]["sent_max"]["network"] / 25e9)


def test_seconds_follow_the_busiest_rank_and_the_stated_speed():
    cfg = load_config(RECIPE, [])
    spec = ModelSpec.from_hf(cfg.model.hf_checkpoint)
    slow, fast = (
        plan_refit(cfg, spec, world_size=128, ranks_per_node=8, speeds=LinkSpeeds(network=s)) for s in (10, 40)
    )
    assert slow.seconds("network") == pytest.approx(4 * fast.seconds("network"))
    one_node = plan_refit(cfg, spec, world_size=32, ranks_per_node=32)
    assert one_node.traffic.by_link["network"] == 0


def test_what_does_not_fit_is_named(capsys):
    for arguments, words in [
        (["--world-size", "24"], "world size 24 is not a multiple of"),
        (["--world-size", "128", "--ranks-per-node", "12"], "128 is not a multiple of 12 ranks a node"),
        (["--network-gb-per-s", "0"], "--network-gb-per-s 0.0: expected a positive number"),
        (["rollout.engine.tensor_paralel_size=2"], "did you mean 'tensor_parallel_size'?"),
    ]:
        code, out, err = plan(capsys, *arguments)
        assert (code, out) == (2, "")
        assert words in err


def test_planning_needs_no_torch():
    code = (
        "import sys; from treepo_mega.cli import main; main(['plan', sys.argv[1], '--world-size', '4096']);"
        "print([m for m in ('torch', 'vllm', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, RECIPE], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "4096 ranks" in done.stdout
