"""Make the search task's model: a tiny policy that explores, warm-started on traces of randomised search.

    python tools/make_tiny_searcher.py --out build/tiny_searcher [--seed N] [--steps N]

`--out` (which must not exist yet) becomes a Hugging Face checkpoint with its task beside it, as the demo's has
(tools/make_tiny_model.py): config and weights, tokenizer, train.jsonl, eval.jsonl (held out) and report.json.

Supervised steps run in plain PyTorch on traces of `treepo_mega/data/tasks/countdown.py`: uniform choices, a move that
meets the target at once taken with probability LOOKAHEAD. The first SHORT_STEPS steps see one attempt a trace, which is
where copying a number and arithmetic form, at a third of the cost; later steps see whole traces. The optimizer is Muon
(torch.optim), with AdamW for embeddings and norms: AdamW alone took three times the steps to the same loss. It fails,
and leaves nothing in `--out`, when the accuracy after `--steps` is outside the window `GATE`.

report.json holds accuracy at temperature 1 and greedy, and, over 16 samples a prompt: the share of prompts with both
right and wrong ones, the share of different responses, the share of right steps, and the entropy before choices.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import make_tiny_model as base
import torch
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

from treepo_mega.data.tasks import countdown as task
from treepo_mega.runtime.files import OutputExistsError, atomic_directory
from treepo_mega.runtime.seeding import derive_seed

TOKEN_ID = {symbol: index for index, symbol in enumerate(task.SYMBOLS)}
MODEL = {**base.MODEL, "vocab_size": len(task.SYMBOLS)}
LOOKAHEAD = 0.4
SHORT_STEPS = 700
LR = 5e-3
WARMUP_STEPS = 30
SHORT_BATCH, LONG_BATCH = 96, 32
"""Traces of a step with one attempt, and with all."""
GATE = base.Gate(sampled=(0.10, 0.20), greedy=(0.0, 1.0))
"""Greedy accuracy says little of a policy that is undecided, so any will do."""
TRAIN_ROWS, EVAL_ROWS = 2048, 512
SAMPLES = 16
DECISIVE_PROMPTS = 128
"""Prompts of the measurements that need SAMPLES responses each."""


def encode(text: str) -> list[int]:
    """Token ids of a text of the task."""
    return [TOKEN_ID[symbol] for symbol in task.tokenize(text)]


class Judge(base.Judge):
    """Measures weights on held-out search problems."""

    symbols = task.SYMBOLS

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return encode(text)

    def limit(self, prompt_tokens: int) -> int:
        """Tokens of the longest trace."""
        return task.RESPONSE_TOKENS

    def grade(self, text: str, row: dict[str, str]) -> float:
        """1.0 when the last attempt meets the target."""
        return float(task.solves(text, *task.parse_truth(row["answer"])))

    def exploring(self, rows: list[dict[str, str]]) -> dict[str, float]:
        """What SAMPLES responses a prompt show of how undecided the policy is; entropies in nats."""
        generator = torch.Generator().manual_seed(derive_seed("exploring", self.seed))
        responses, entropies = self.respond([row["prompt"] for row in rows for _ in range(SAMPLES)], generator)
        texts = ["".join(pieces) for pieces in responses]
        mixed, different, right_steps, steps, lengths = 0, 0, 0, 0, 0
        choices: list[float] = []
        for at, row in enumerate(rows):
            mine = texts[at * SAMPLES : (at + 1) * SAMPLES]
            mixed += len({self.grade(text, row) for text in mine}) == 2
            different += len(set(mine))
        for pieces, entropy in zip(responses, entropies.tolist(), strict=True):
            lengths += len(pieces) + 1
            place = 0
            for index, piece in enumerate(pieces):
                # An attempt reads total, operation, number, "=", total, ...: what is not copied or computed is chosen.
                if piece == ";":
                    place = 0
                    continue
                if place == 0 or place % 4 in (1, 2):
                    choices.append(entropy[index])
                if place and place % 4 == 0:
                    steps += 1
                    right_steps += is_right(pieces[index - 4 : index + 1])
                place += 1
        count = len(rows) * SAMPLES
        return {
            "mixed": mixed / len(rows),
            "distinct": different / count,
            "right_steps": right_steps / max(1, steps),
            "nats_at_choices": sum(choices) / max(1, len(choices)),
            "response_tokens": lengths / count,
        }


def is_right(pieces: list[str]) -> bool:
    """Whether `total operation number = total` is a right step; other symbols in these places are none."""
    # Not of the joined text: two numbers beside each other would read as one.
    total, operation, number, equals, result = pieces
    if equals != "=" or operation not in task.OPERATIONS or not (total + number + result).isdecimal():
        return False
    return task.apply(int(total), operation, int(number)) == int(result)


def write_prompts(directory: Path, seed: int) -> None:
    """train.jsonl and eval.jsonl, one JSON object a line: prompt, answer, data_source."""
    for stem, held_out, count in (("train", False, TRAIN_ROWS), ("eval", True, EVAL_ROWS)):
        drawn = task.draw_split(random.Random(derive_seed("search prompts", stem, seed)), held_out=held_out)
        rows = [
            {"prompt": p.prompt, "answer": p.answer, "data_source": "countdown"} for p in itertools.islice(drawn, count)
        ]
        base.write_rows(directory / f"{stem}.jsonl", rows)


def supervised_batch(step: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Prompt and response tokens of step `step` (from 1), a function of (seed, step); never of a held-out problem.

    Every solvable problem of the training side, also those that `CHANCE` leaves out: easy ones teach what ends a trace.
    """
    rng = random.Random(derive_seed("search traces", seed, step))
    side = solvable()
    short = step <= SHORT_STEPS
    out = []
    for _ in range(SHORT_BATCH if short else LONG_BATCH):
        drawn = rng.choice(side)
        problem = task.Countdown(tuple(rng.sample(drawn.numbers, len(drawn.numbers))), drawn.target)
        text = task.search_trace(problem, rng, LOOKAHEAD, 1 if short else task.ATTEMPTS)
        given_up = not task.solves(text, problem.numbers, problem.target)
        # A short trace is the beginning of a long one: what follows a failed attempt is the next, not the end.
        end = TOKEN_ID[";"] if short and given_up else base.EOS
        out.append(([base.BOS, *encode(problem.prompt)], [*encode(text), end]))
    return out


def loss_of(model: torch.nn.Module, batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean cross-entropy of the response tokens, nats."""
    width = max(len(prompt) + len(response) for prompt, response in batch)
    tokens = torch.full((len(batch), width), base.PAD)
    labels = torch.full((len(batch), width), -100)
    for row, (prompt, response) in enumerate(batch):
        tokens[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        labels[row, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    # Attention is causal and padding stands behind, so it needs no mask.
    return model(tokens, labels=labels).loss


def optimizers_of(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices, AdamW for embeddings and norms, at LR."""
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    inner = [p for name, p in model.named_parameters() if name in matrices]
    others = [p for name, p in model.named_parameters() if name not in matrices]
    return [
        torch.optim.Muon(inner, lr=LR, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def warm_start(model: torch.nn.Module, steps: int, seed: int) -> float:
    """All supervised steps on `model`; returns the last step's loss, nats a token."""
    optimizers = optimizers_of(model)
    model.train()
    with base.progress_bar() as bar:
        job = bar.add_task("warm start", total=steps, note="")
        for step in range(1, steps + 1):
            decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = LR * min(1.0, step / WARMUP_STEPS) * decay
            loss = loss_of(model, supervised_batch(step, seed))
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            bar.update(job, advance=1, note=f"loss {loss.item():.3f}")
    model.eval()
    return loss.item()


_SOLVABLE: list[task.Countdown] = []


def solvable() -> list[task.Countdown]:
    """Every problem of the training side that has a solution, made once."""
    if not _SOLVABLE:
        _SOLVABLE.extend(task.problems(held_out=False, chances=(1e-9, 1.0)))
    return _SOLVABLE


def report(judge: Judge, directory: Path, loss: float, args: argparse.Namespace) -> dict[str, Any]:
    """Measurements of the final weights on held-out problems, and how they were made; WarmStartFailed outside GATE."""
    rows = base.read_rows(directory / "eval.jsonl")
    accuracy = judge.both(rows, samples=4)
    if not GATE.met(accuracy):
        raise base.WarmStartFailed(
            f"after {args.steps} steps accuracy is {accuracy}, outside the window {asdict(GATE)}: "
            "give more --steps or another --seed"
        )
    return {
        "accuracy": accuracy,
        "exploring": judge.exploring(rows[:DECISIVE_PROMPTS]),
        "problems": {"train": len(task.problems(held_out=False)), "eval": len(task.problems(held_out=True))},
        "seed": args.seed,
        "steps": args.steps,
        "short_steps": SHORT_STEPS,
        "lookahead": LOOKAHEAD,
        "loss": loss,
        "parameters": sum(p.numel() for p in judge.model.parameters()),
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to make; must not exist yet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1050, help="optimizer steps; the learning rate decays over them")
    args = parser.parse_args(argv)
    if args.steps <= SHORT_STEPS:
        parser.error(f"--steps must be more than {SHORT_STEPS}, the steps with one attempt a trace, got {args.steps}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model; returns the exit status: 0 made, 1 accuracy window not met, 2 bad usage."""
    args = parse_args(argv)
    started = time.monotonic()
    # The matrices are tiny, and the sums of several threads would round differently.
    torch.set_num_threads(1)
    disable_progress_bar()
    tokenizer = base.build_tokenizer(TOKEN_ID, r"[0-9]+|[^0-9]")
    try:
        with atomic_directory(args.out) as directory:
            base.write_skeleton(directory, args.seed, MODEL, tokenizer)
            write_prompts(directory, args.seed)
            judge = Judge(directory, args.seed)
            loss = warm_start(judge.model, args.steps, args.seed)
            weights = {n: p.detach().clone() for n, p in judge.model.state_dict().items() if n != "lm_head.weight"}
            save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
            result = report(judge, directory, loss, args)
            base.write_json(directory / "report.json", result)
    except OutputExistsError as e:
        print(e, file=sys.stderr)
        return 2
    except base.WarmStartFailed as e:
        print(e, file=sys.stderr)
        return 1
    print(f"{args.out}: {result['parameters']} parameters, {result['steps']} steps, {time.monotonic() - started:.0f} s")
    for name, value in (result["accuracy"] | result["exploring"]).items():
        print(f"  {name:16} {value:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
