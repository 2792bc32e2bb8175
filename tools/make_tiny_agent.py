"""Make the agent task's model: a tiny policy that calls a tool, warm-started on a teacher that asks at random.

    python tools/make_tiny_agent.py --out build/tiny_agent [--seed N] [--steps N]

`--out` (which must not exist yet) becomes a Hugging Face checkpoint with its task beside it, as the demo's has
(tools/make_tiny_model.py): config and weights, tokenizer with a chat template, train.jsonl, eval.jsonl (held out) and
report.json. The teacher and the task are `treepo_mega/data/tasks/hidden_number.py`. What the tool answers is read, and
not learnt: only the policy's own turns have a loss.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import make_tiny_model as base
import torch
from make_tiny_searcher import LR, WARMUP_STEPS, optimizers_of
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from treepo_mega.data.tasks import hidden_number as task
from treepo_mega.runtime.files import OutputExistsError, atomic_directory
from treepo_mega.runtime.seeding import derive_seed

TOKEN_ID = {symbol: index for index, symbol in enumerate(task.SYMBOLS)}
SYMBOL = re.compile("|".join(map(re.escape, task.SPECIAL)) + "|" + task.PATTERN)
MODEL = {**base.MODEL, "vocab_size": len(task.SYMBOLS)}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<assistant>{{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'tool' %}<tool>{{ message.content }}"
    "{% else %}<user>{{ message.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Its tools are what it was warm-started on, so it lists none."""
BATCH = 64
TRAIN_ROWS, EVAL_ROWS = 1024, 512


def tokens_of(problem: task.Problem, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of an episode, and labels: -100 where the policy does not speak."""
    ids: list[int] = []
    labels: list[int] = []

    def add(text: str, *, spoken: bool) -> None:
        new = [TOKEN_ID[symbol] for symbol in SYMBOL.findall(text)]
        ids.extend(new)
        labels.extend(new if spoken else [-100] * len(new))

    add(f"<bos><user>{problem.prompt}<assistant>", spoken=False)
    for said, answer in turns:
        add(f"{said}<eos>", spoken=True)
        if answer:
            add(f"<tool>{answer}<assistant>", spoken=False)
    return ids, labels


def supervised_batch(step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [BATCH, longest] of step `step`, a function of (seed, step); never of a held-out problem."""
    rng = random.Random(derive_seed("agent episodes", seed, step))
    rows = [tokens_of(p, task.episode(p, rng)) for p in itertools.islice(task.draw(rng, held_out=False), BATCH)]
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [base.PAD] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([marks + [-100] * (width - len(marks)) for _, marks in rows])
    return tokens, labels


def warm_start(model: torch.nn.Module, steps: int, seed: int) -> float:
    """All supervised steps on `model`; returns the last step's loss, nats a token."""
    # Copying a number forms in a third of the steps that AdamW alone takes.
    optimizers = optimizers_of(model)
    model.train()
    with base.progress_bar() as bar:
        job = bar.add_task("warm start", total=steps, note="")
        for step in range(1, steps + 1):
            decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
            for group in itertools.chain.from_iterable(each.param_groups for each in optimizers):
                group["lr"] = LR * min(1.0, step / WARMUP_STEPS) * decay
            tokens, labels = supervised_batch(step, seed)
            loss = model(tokens, labels=labels).loss
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            bar.update(job, advance=1, note=f"loss {loss.item():.3f}")
    model.eval()
    return float(loss.item())


def write_prompts(directory: Path, seed: int) -> None:
    """train.jsonl and eval.jsonl, one JSON object a line."""
    for stem, held_out, count in (("train", False, TRAIN_ROWS), ("eval", True, EVAL_ROWS)):
        drawn = task.draw(random.Random(derive_seed("agent prompts", stem, seed)), held_out=held_out)
        base.write_rows(directory / f"{stem}.jsonl", [problem.row for problem in itertools.islice(drawn, count)])


@torch.no_grad()
def play(model: torch.nn.Module, problem: task.Problem, generator: torch.Generator) -> tuple[bool, int]:
    """(whether the answer is right, how often it asked) of one episode at temperature 1."""
    ids, _ = tokens_of(problem, [])
    asked = 0
    while True:
        said: list[int] = []
        while len(said) < 8 and (not said or said[-1] != base.EOS):
            logits = model(torch.tensor([ids + said])).logits[0, -1].float()
            said.append(int(torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)))
        ids += said
        text = "".join(task.SYMBOLS[token] for token in said if token != base.EOS)
        number = text.removeprefix(task.CALL).removesuffix(task.CALL_END)
        if not text.startswith(task.CALL) or not number.isdecimal() or asked == task.MAX_ASKS:
            return text == str(problem.secret), asked
        asked += 1
        answer = task.compare(problem.secret, int(number))
        ids += [TOKEN_ID["<tool>"], TOKEN_ID[answer], TOKEN_ID["<assistant>"]]


def report(model: torch.nn.Module, directory: Path, loss: float, args: argparse.Namespace) -> dict[str, float]:
    """Success and questions of held-out episodes, by whether the prompt tells the number."""
    rows = base.read_rows(directory / "eval.jsonl")[:256]
    generator = torch.Generator().manual_seed(derive_seed("agent report", args.seed))
    found: dict[str, float] = {"seed": args.seed, "steps": args.steps, "loss": loss}
    for kind in ("hidden", "told"):
        mine = [row for row in rows if row["data_source"] == kind]
        played = []
        for row in mine:
            low, high = (int(bound) for bound in row["prompt"].partition("=")[0].rstrip("?").split("-"))
            played.append(play(model, task.Problem(low, high, int(row["secret"]), kind == "told"), generator))
        found[f"success_{kind}"] = sum(right for right, _ in played) / len(played)
        found[f"asked_{kind}"] = sum(asked for _, asked in played) / len(played)
    return found | {"parameters": sum(p.numel() for p in model.parameters())}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to make; must not exist yet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps; the learning rate decays over them")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model; returns the exit status: 0 made, 2 bad usage."""
    args = parse_args(argv)
    started = time.monotonic()
    torch.set_num_threads(1)
    disable_progress_bar()
    tokenizer = base.build_tokenizer(TOKEN_ID, task.PATTERN, task.SPECIAL)
    try:
        with atomic_directory(args.out) as directory:
            base.write_skeleton(directory, args.seed, MODEL, tokenizer)
            settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
            base.write_json(directory / "tokenizer_config.json", settings | {"chat_template": TEMPLATE})
            write_prompts(directory, args.seed)
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            loss = warm_start(model, args.steps, args.seed)
            weights = {n: p.detach().clone() for n, p in model.state_dict().items() if n != "lm_head.weight"}
            save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
            result = report(model, directory, loss, args)
            base.write_json(directory / "report.json", result)
    except OutputExistsError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.out}: {time.monotonic() - started:.0f} s")
    for name, value in result.items():
        print(f"  {name:16} {value:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
