"""Make the demo's model: a tiny reasoning model with something left to learn, warm-started by our own actor.

    python tools/make_tiny_model.py --out build/tiny_reasoner [--seed N] [--steps N]

`--out` (which must not exist yet) becomes a Hugging Face checkpoint with its task beside it:

    config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json
    train.jsonl          problems with 3 to 5 terms to learn from by reinforcement
    eval.jsonl           held-out problems of the same lengths
    eval_long.jsonl      held-out problems with 6 and 7 terms
    report.json          how it was made, and its accuracy greedy and at temperature 1

What it does. Weights start random. Supervised steps on worked solutions (`treepo_mega/data/tasks/chain.py`:
noisy, with a misconception) run through the Megatron actor, exactly as in training: packs, pipeline
schedule, distributed optimizer. Every `--eval-interval` steps the weights are exported by the resharding map
and measured with transformers, an implementation that shares no code with ours. The warm start ends when
held-out accuracy is inside the window `GATE`: good enough that sampling finds right answers, wrong enough
that reinforcement learning has more to teach than sharpness. It fails, and leaves nothing in `--out`, when
the window was not met within `--steps`.

Lengths. Warm start: 1 to 7 terms, growing over the first `RAMP_STEPS` steps (short chains first: without
the curriculum the lookup of a term by its letter may not form at all), 6 and 7 rarely. Reinforcement: 3 to 5.

Traps. Loss sits on a plateau (about 0.5 per token) for some 500 steps until the lookup has formed, with
accuracy near 0; that is normal. Results depend on the seed and, by rounding, on the torch build and the
number of threads; the window does not. One thread is enough: set OMP_NUM_THREADS=1 when cores are shared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from treepo_mega.actor.losses import SupervisedLoss
from treepo_mega.actor.update import Actor
from treepo_mega.checkpoint.load import local_params
from treepo_mega.config import Config, parse_config
from treepo_mega.data.rewards.verifiers import boxed
from treepo_mega.data.tasks import chain as task
from treepo_mega.modelspec.mcore_layout import ModelSpec, hf_shapes
from treepo_mega.reshard.execute import Resharder, TensorTarget
from treepo_mega.reshard.sides import files_side, grid_of, mcore_side
from treepo_mega.runtime import dist
from treepo_mega.runtime.files import OutputExistsError, atomic_directory
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.pack import Trajectory, plan_step

TOKEN_ID = {s: i for i, s in enumerate(task.SYMBOLS)}
PAD, BOS, EOS = (TOKEN_ID[s] for s in ("<pad>", "<bos>", "<eos>"))

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(task.SYMBOLS),
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "dtype": "float32",
}
"""config.json. head_dim 32 is the smallest the engine takes; four layers split over pipeline and virtual stages."""

TRAIN_TERMS, LONG_TERMS = (3, 4, 5), (6, 7)
TERM_WEIGHTS = {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0, 6: 0.5, 7: 0.5}
"""Odds of the number of terms in the warm start."""
RAMP_STEPS = 300
SLIPS = task.Slips(slip=0.12, forget_carry=0.65)
BATCH_SIZE = 64
PROMPT_FILES = {
    "train": (TRAIN_TERMS, False, 3072),
    "eval": (TRAIN_TERMS, True, 512),
    "eval_long": (LONG_TERMS, True, 256),
}
"""File stem -> (numbers of terms, held out, how many)."""
SOLVED = 256
"""Rows of eval.jsonl that have their worked solution with them: as many as an evaluation of the demo reads."""


@dataclass(frozen=True)
class Gate:
    """Held-out accuracy at which the warm start ends; shares of problems, both bounds included."""

    sampled: tuple[float, float] = (0.38, 0.48)
    greedy: tuple[float, float] = (0.60, 0.80)

    def met(self, accuracy: dict[str, float]) -> bool:
        """Whether both accuracies are inside the window."""
        return all(lo <= accuracy[k] <= hi for k, (lo, hi) in asdict(self).items())


GATE = Gate()


class WarmStartFailed(RuntimeError):
    """The accuracy window was not met within the steps given."""


def encode(text: str) -> list[int]:
    """Token ids of a text of the task."""
    return [TOKEN_ID[s] for s in task.tokenize(text)]


def build_tokenizer(
    token_id: dict[str, int] = TOKEN_ID, pattern: str = r"\\boxed\{|[\s\S]", special: Sequence[str] = task.SPECIAL
) -> Tokenizer:
    """One id per symbol; `<bos>` goes before every text, as with Llama's own tokenizer; others are `<unk>`.

    `pattern` is the regular expression that finds the symbols of a text; `special` ones are no text.
    """
    tokenizer = Tokenizer(models.WordLevel(token_id, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def write_skeleton(
    directory: Path, seed: int, model: dict[str, Any] = MODEL, tokenizer: Tokenizer | None = None
) -> None:
    """A complete checkpoint with random weights: normal(0, 0.02), norms 1; special tokens as in the chain."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", model)
    write_json(directory / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD})
    (tokenizer or build_tokenizer()).save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL["max_position_embeddings"],
    }
    write_json(directory / "tokenizer_config.json", config)
    generator = torch.Generator().manual_seed(derive_seed("tiny model", seed))
    weights = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
        for name, shape in hf_shapes(ModelSpec.from_hf(directory)).items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def write_prompts(directory: Path, seed: int) -> None:
    """The prompt files of PROMPT_FILES, one JSON object a line: prompt, answer, data_source; some also a solution."""
    for stem, (terms, held_out, count) in PROMPT_FILES.items():
        problems = task.draw_split(random.Random(derive_seed("prompts", stem, seed)), terms, held_out=held_out)
        rows = []
        for i, c in enumerate(itertools.islice(problems, count)):
            row = {"prompt": c.prompt, "answer": c.answer, "data_source": f"chain{len(c.terms)}"}
            if stem == "eval" and i < SOLVED:
                row["solution"] = task.worked_solution(c)
            rows.append(row)
        write_rows(directory / f"{stem}.jsonl", rows)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """A jsonl file of `rows`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON with a line break at its end."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def run_config(skeleton: Path, steps: int, seed: int) -> Config:
    """The actor's configuration: fp32, one rank unless started under torchrun, cosine schedule over `steps`."""
    longest = max(TERM_WEIGHTS)
    tokens = [1 + 3 * longest + 4, task.solution_tokens(longest)]
    return parse_config(
        {
            "model": {"hf_checkpoint": str(skeleton), "make_vocab_size_divisible_by": 16},
            "data": {"train": [{"path": str(skeleton / "train.jsonl")}], "max_prompt_len": tokens[0]},
            "rollout": {"max_response_len": tokens[1], "segment": {"length": tokens[1]}},
            "train": {
                "lr": 3e-3,
                "min_lr": 3e-4,
                "lr_decay_style": "cosine",
                "lr_warmup_iters": 50,
                "lr_decay_iters": max(steps, 51),
                "weight_decay": 0.01,
                "adam_beta2": 0.98,
                "max_tokens_per_gpu": BATCH_SIZE * sum(tokens),
                "seed": seed,
            },
        },
        "tools/make_tiny_model.py",
    )


def supervised_batch(step: int, seed: int) -> list[Trajectory]:
    """BATCH_SIZE worked solutions for step `step` (from 1), a function of (seed, step) alone.

    Held-out problems are never drawn. The advantage is unused by the supervised loss.
    """
    rng = random.Random(derive_seed("supervised", seed, step))
    most = min(max(TERM_WEIGHTS), 2 + (max(TERM_WEIGHTS) - 1) * step // RAMP_STEPS)
    terms = [k for k in TERM_WEIGHTS if k <= most]
    out: list[Trajectory] = []
    while len(out) < BATCH_SIZE:
        problem = task.draw_chain(rng, rng.choices(terms, [TERM_WEIGHTS[k] for k in terms])[0])
        if task.is_held_out(problem.prompt):
            continue
        prompt = [BOS, *encode(problem.prompt)]
        response = [*encode(task.worked_solution(problem, rng, SLIPS)), EOS]
        out.append(Trajectory(len(out), prompt + response, len(prompt), 1.0, [0.0] * len(response)))
    return out


class Judge:
    """Measures weights with transformers on fixed held-out problems, by number of terms.

    Another task overrides `symbols`, `encode`, `limit` and `grade`.
    """

    symbols: Sequence[str] = task.SYMBOLS

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return encode(text)

    def limit(self, prompt_tokens: int) -> int:
        """Tokens of the longest response to a prompt of `prompt_tokens` tokens, its `<bos>` included."""
        return task.solution_tokens((prompt_tokens - 5) // 3)

    def grade(self, text: str, row: dict[str, str]) -> float:
        """1.0 when the response `text` is right."""
        return float(boxed("chain", text, row["answer"]))

    def __init__(self, skeleton: Path, seed: int) -> None:
        self.model = LlamaForCausalLM.from_pretrained(skeleton, dtype=torch.float32).eval()
        self.seed = seed

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Take every weight under its Hugging Face name; RuntimeError when a name or shape does not match."""
        left = self.model.load_state_dict(weights, strict=False)
        if left.unexpected_keys or set(left.missing_keys) - {"lm_head.weight"}:
            raise RuntimeError(f"the exported weights do not fit transformers' model: {left}")
        self.model.tie_weights()

    def accuracy(self, rows: list[dict[str, str]], *, greedy: bool, samples: int = 1) -> float:
        """Share of `samples` responses per row whose boxed answer is right, greedy or at temperature 1."""
        generator = torch.Generator().manual_seed(derive_seed("judge", self.seed))
        right = 0.0
        by_length: dict[int, list[dict[str, str]]] = {}
        for row in rows:
            by_length.setdefault(len(self.encode(row["prompt"])), []).extend([row] * samples)
        for same in by_length.values():
            responses, _ = self.respond([r["prompt"] for r in same], None if greedy else generator)
            right += sum(self.grade("".join(said), row) for said, row in zip(responses, same, strict=True))
        return right / (len(rows) * samples)

    def both(self, rows: list[dict[str, str]], *, samples: int) -> dict[str, float]:
        """Accuracy at temperature 1 (`sampled`) and `greedy`."""
        return {
            "sampled": self.accuracy(rows, greedy=False, samples=samples),
            "greedy": self.accuracy(rows, greedy=True),
        }

    @torch.no_grad()
    def respond(self, prompts: list[str], generator: torch.Generator | None) -> tuple[list[list[str]], torch.Tensor]:
        """Responses to prompts of one length as symbols, up to their end mark; greedy without a generator.

        Beside them the entropy before each drawn token, nats, [prompts, limit]; it goes on behind the end mark.
        """
        tokens = torch.tensor([[BOS, *self.encode(p)] for p in prompts])
        limit = self.limit(tokens.shape[1])
        past, drawn, entropies = None, [], []
        for _ in range(limit):
            out = self.model(tokens, past_key_values=past, use_cache=True)
            past, logits = out.past_key_values, out.logits[:, -1]
            if generator is None:
                tokens = logits.argmax(-1, keepdim=True)
            else:
                tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            drawn.append(tokens)
            entropies.append(torch.distributions.Categorical(logits=logits).entropy())
        rows = torch.cat(drawn, 1).tolist()
        said = [[self.symbols[t] for t in itertools.takewhile(lambda t: t != EOS, row)] for row in rows]
        return said, torch.stack(entropies, 1)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def warm_start(cfg: Config, directory: Path, args: argparse.Namespace, judge: Judge) -> list[dict[str, float]]:
    """Supervised steps through the Megatron actor until GATE is met; then `directory` holds the weights.

    Returns one row per measurement and leaves the weights in `judge`. Raises WarmStartFailed when `args.steps` were
    not enough.
    """
    dist.initialize(cfg, ModelSpec.from_hf(directory))
    actor = Actor(cfg, directory)
    resharder = Resharder.between(
        mcore_side(actor.spec, grid_of(cfg), 1),
        files_side(actor.spec, 1),
        source_dtype=torch.float32,
        target_dtype=torch.float32,
        bucket_bytes=cfg.reshard.bucket_mb << 20,
        timeout_s=cfg.distributed.timeout_s,
    )
    problems = read_rows(directory / "eval.jsonl")[: args.eval_prompts]
    history: list[dict[str, float]] = []
    with progress_bar() as bar:
        job = bar.add_task("warm start", total=args.steps, note="")
        for step in range(1, args.steps + 1):
            batch = supervised_batch(step, args.seed)
            plan = plan_step(batch, dp_size=1, dp_rank=0, max_tokens=cfg.train.max_tokens_per_gpu, multiple=1)
            stats = actor.update(plan.packs, SupervisedLoss())
            bar.update(job, advance=1, note=f"loss {stats['loss']:.3f}")
            if step % args.eval_interval and step != args.steps:
                continue
            weights = {name: torch.empty(shape) for name, shape in hf_shapes(actor.spec).items()}
            resharder([local_params(m) for m in actor.models], TensorTarget([weights]))
            judge.load(weights)
            accuracy = judge.both(problems, samples=2)
            history.append({"step": step, "loss": stats["loss"], **accuracy})
            bar.console.print(f"step {step:5d}  loss {stats['loss']:.3f}" + _shares(accuracy))
            if GATE.met(accuracy):
                save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
                return history
    raise WarmStartFailed(
        f"after {args.steps} steps accuracy is {history[-1]}, outside the window {asdict(GATE)}: "
        "give more --steps or another --seed"
    )


def progress_bar() -> Progress:
    """A bar on standard error with a free text column `note`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))


def _shares(accuracy: dict[str, float]) -> str:
    return f"  T=1 {accuracy['sampled']:.3f}  greedy {accuracy['greedy']:.3f}"


def report(judge: Judge, directory: Path, history: list[dict[str, float]], args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of the final weights on all held-out problems, and how they were made."""
    accuracy = {}
    for stem in ("eval", "eval_long"):
        rows = read_rows(directory / f"{stem}.jsonl")
        kinds = {"all": rows} | {kind: [r for r in rows if r["data_source"] == kind] for kind in _kinds(rows)}
        accuracy[stem] = {kind: {"problems": len(v), **judge.both(v, samples=4)} for kind, v in kinds.items()}
    return {
        "accuracy": accuracy,
        "seed": args.seed,
        "steps": int(history[-1]["step"]),
        "of_steps": args.steps,
        "slips": asdict(SLIPS),
        "parameters": sum(p.numel() for p in judge.model.parameters()),
        "history": history,
    }


def _kinds(rows: list[dict[str, str]]) -> list[str]:
    return sorted({r["data_source"] for r in rows})


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to make; must not exist yet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=1600, help="most optimizer steps; the learning rate decays over them"
    )
    parser.add_argument("--eval-interval", type=int, default=50, help="steps between measurements")
    parser.add_argument("--eval-prompts", type=int, default=256, help="held-out problems of a measurement")
    args = parser.parse_args(argv)
    for name in ("steps", "eval_interval", "eval_prompts"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model; returns the exit status: 0 made, 1 accuracy window not met, 2 bad usage."""
    args = parse_args(argv)
    if dist.world_size_from_env() > 1:
        print("make_tiny_model.py is a run of one process: start it without torchrun", file=sys.stderr)
        return 2
    started = time.monotonic()
    disable_progress_bar()  # transformers' own, which would break into ours
    try:
        with atomic_directory(args.out) as directory:
            write_skeleton(directory, args.seed)
            write_prompts(directory, args.seed)
            judge = Judge(directory, args.seed)
            history = warm_start(run_config(directory, args.steps, args.seed), directory, args, judge)
            result = report(judge, directory, history, args)
            write_json(directory / "report.json", result)
    except OutputExistsError as e:
        print(e, file=sys.stderr)
        return 2
    except WarmStartFailed as e:
        print(e, file=sys.stderr)
        return 1
    print(f"{args.out}: {result['parameters']} parameters, {result['steps']} steps, {time.monotonic() - started:.0f} s")
    for stem, kinds in result["accuracy"].items():
        for kind, a in kinds.items():
            print(
                f"  {stem:10} {kind:8} T=1 {a['sampled']:.3f}   greedy {a['greedy']:.3f}   ({a['problems']} problems)"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
