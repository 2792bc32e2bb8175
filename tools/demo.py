"""`make demo`: TreePO on this machine, end to end, in minutes, without a GPU.

    python tools/demo.py [--tp 1] [--pp 1] [--dp 2] [--seed 1] [--run-dir runs/demo] [a.b=c ...]
    python tools/demo.py --model moe [--tp 1] [--dp 2] [--ep 2] [...]              `make demo-moe`

Trains the tiny reasoner that ships under examples/tiny_reasoner with examples/demo_cpu.yaml: real
Megatron-Core over gloo under torchrun, a real vLLM engine in each rank. `--model moe` first makes a mixture of
experts of it (tools/make_tiny_moe.py) and trains that with examples/tiny_moe_cpu.yaml. Then it

- loads the exported Hugging Face checkpoint with plain transformers and measures its greedy accuracy,
  which must be what the engine measured;
- writes the report (report.html, report.json) and summary.json, and prints the reward curve.

summary.json: accuracy_before, accuracy_after (held out, temperature 1), greedy_before, greedy_after,
greedy_export (transformers), seconds_total, seconds_setup, steps, token_ratio, mismatch_max.
An earlier run in the same directory is deleted first. Exit status 0 only if every part worked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
TINY_MOE = "build/tiny_moe"
BARS = " ▁▂▃▄▅▆▇█"
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Demo:
    """What a model is trained with, and on how many ranks if nobody says so."""

    config: str
    run_dir: str
    tp: int
    dp: int
    ep: int


DEMOS = {
    # Of the layouts of two ranks, the fastest: an engine and an actor each, and nothing to agree on within a layer.
    "dense": Demo("examples/demo_cpu.yaml", "runs/demo", tp=1, dp=2, ep=1),
    "moe": Demo("examples/tiny_moe_cpu.yaml", "runs/demo_moe", tp=1, dp=2, ep=2),
}


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Command line: the layout, and any configuration overrides."""
    p = argparse.ArgumentParser(
        description="The treepo_mega demo", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--model", choices=DEMOS, default="dense", help="the tiny reasoner, or one with experts")
    p.add_argument("--tp", type=int, help="tensor-parallel size (default: 1)")
    p.add_argument("--pp", type=int, default=1, help="pipeline-parallel size")
    p.add_argument("--dp", type=int, help="data-parallel size (default: 2; 1 where another size is given)")
    p.add_argument("--ep", type=int, help="expert-parallel size (default with experts: 2)")
    p.add_argument("--seed", type=int, default=1, help="train.seed")
    p.add_argument("--run-dir", help="where the run writes (default: runs/demo; with experts runs/demo_moe)")
    p.add_argument("--timeout", type=float, default=1800, help="deadline of the training, seconds")
    args, overrides = p.parse_known_args(argv)
    if args.dp is None and args.ep is None and (args.tp or 1) * args.pp > 1:
        args.dp = 1
    for name in ("tp", "dp", "ep", "run_dir"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(DEMOS[args.model], name))
    if args.model == "dense" and args.ep > 1:
        p.error(f"--ep {args.ep}: the dense model has no experts (--model moe)")
    return args, overrides


def make_experts() -> None:
    """Make the model with experts, which does not ship, where it is not there yet."""
    if not (ROOT / TINY_MOE / "config.json").exists():
        command = [sys.executable, "tools/make_tiny_moe.py", "--out", TINY_MOE]
        if subprocess.run(command, cwd=ROOT, timeout=300, check=False).returncode:
            raise RuntimeError("the model with experts was not made; the message is above")


def train(args: argparse.Namespace, overrides: list[str]) -> None:
    """Run torchrun and wait for it; RuntimeError when it fails or passes its deadline."""
    ranks = args.tp * args.pp * args.dp
    experts = []
    if args.model == "moe":
        make_experts()
        experts = [f"parallel.expert_model_parallel_size={args.ep}"]
        experts += ["parallel.sequence_parallel=true"] if args.tp > 1 else []
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *("-m", "treepo_mega.cli", "train", DEMOS[args.model].config),
        f"parallel.tensor_model_parallel_size={args.tp}",
        f"parallel.pipeline_model_parallel_size={args.pp}",
        f"logging.run_dir={args.run_dir}",
        f"train.seed={args.seed}",
        *experts,
        *overrides,
    ]
    env = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    shared_out = f", EP {args.ep}" if args.ep > 1 else ""
    layout = f"TP {args.tp} x PP {args.pp} x DP {args.dp}{shared_out}"
    print(f"training on {ranks} ranks ({layout}); this takes a few minutes", flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env})
    try:
        status = process.wait(args.timeout)
    except subprocess.TimeoutExpired:
        # The ranks have sessions of their own: ending torchrun alone would leave them running.
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        raise RuntimeError(f"the training did not end within {args.timeout:.0f} s (--timeout)") from None
    if status:
        raise RuntimeError(f"the training failed with status {status}; its messages are above")


def export_accuracy(run_dir: Path) -> float:
    """Greedy accuracy of the exported checkpoint on the evaluation prompts, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from treepo_mega.config import load_config
    from treepo_mega.data.prompts import load_prompts
    from treepo_mega.data.rewards.verifiers import boxed

    cfg = load_config(run_dir / "config.yaml")
    hf = run_dir / "hf"
    tokenizer = AutoTokenizer.from_pretrained(hf, local_files_only=True, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, local_files_only=True).eval()
    prompts = list(load_prompts(cfg.data.eval, cfg.data, tokenizer).prompts)[: cfg.eval.max_prompts]
    right = 0.0
    for at in range(0, len(prompts), 64):
        batch = prompts[at : at + 64]
        width = max(len(p.tokens) for p in batch)
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p.tokens)) + p.tokens for p in batch])
        mask = torch.tensor([[0] * (width - len(p.tokens)) + [1] * len(p.tokens) for p in batch])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        right += sum(boxed(p.data_source, text, p.answer) for p, text in zip(batch, texts, strict=True))
    return right / len(prompts)


def curve(values: list[float]) -> str:
    """A line of block characters from 0 to 1."""
    return "".join(BARS[min(len(BARS) - 1, max(0, round(v * (len(BARS) - 1))))] for v in values)


def setup_seconds() -> float:
    """What `make setup` took when it built this environment; 0 when it was built by hand."""
    stamp = Path(sys.prefix) / ".treepo_mega_setup.json"
    return float(json.loads(stamp.read_text(encoding="utf-8"))["seconds"]) if stamp.exists() else 0.0


def finish(args: argparse.Namespace, started: float) -> None:
    """Verify the export, complete summary.json, write the report and show it."""
    run = ROOT / args.run_dir
    path = run / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    summary["greedy_export"] = export_accuracy(run)
    summary["seconds_setup"] = setup_seconds()
    summary["seconds_total"] = round(time.time() - started + summary["seconds_setup"], 1)
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "treepo_mega.cli", "report", args.run_dir], cwd=ROOT, check=True, timeout=120)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    accuracy = [r["rollout/accuracy"] for r in rows if "rollout/accuracy" in r]
    print(f"\nsampled accuracy by step   {accuracy[0]:.2f} {curve(accuracy)} {accuracy[-1]:.2f}")
    for what, key in (("held out, temperature 1", "accuracy"), ("held out, greedy", "greedy")):
        print(f"{what:<26} {summary[f'{key}_before']:.3f} -> {summary[f'{key}_after']:.3f}")
    print(f"{'the export, transformers':<26} {summary['greedy_export']:.3f} greedy")
    print(f"{'tokens computed / flat':<26} {summary['token_ratio']:.3f}")
    print(f"{'engine vs trainer logprob':<26} at most {summary['mismatch_max']:.1e} nats apart")
    print(f"{'seconds':<26} {summary['seconds_total']:.0f}, of which set-up {summary['seconds_setup']:.0f}")
    print(f"\n{args.run_dir}: report.html, summary.json, metrics.jsonl, hf/ (the trained model)")
    print(f"what it wrote: treepo-mega tree {args.run_dir}")
    print(f"curves: {os.path.relpath(Path(sys.executable).parent)}/tensorboard --logdir {args.run_dir}")
    drift = abs(summary["greedy_export"] - summary["greedy_after"])
    if drift > 0.01:
        raise RuntimeError(
            f"the export's greedy accuracy is {summary['greedy_export']:.3f} and the engine's "
            f"{summary['greedy_after']:.3f}: the exported weights are not the trained ones"
        )


def main() -> int:
    """Run the demo; returns the exit status."""
    args, overrides = parse()
    started = time.time()
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    run = ROOT / args.run_dir
    if run.exists():
        print(f"deleting the earlier run in {args.run_dir}")
        shutil.rmtree(run)
    try:
        train(args, overrides)
        finish(args, started)
    except RuntimeError as e:
        print(f"demo failed: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
