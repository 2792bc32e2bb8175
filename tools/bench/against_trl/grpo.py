"""One run of TRL's GRPOTrainer on a task of tools/bench/learning.yaml; side_by_side.py starts it.

    build/trl/bin/python tools/bench/against_trl/grpo.py SETTINGS.json OUT

SETTINGS.json is what side_by_side.py made of the recipe: model, prompts, verifier, batch, learning rate, clips, steps.
OUT/steps.jsonl gets a line per rollout: CPU and wall seconds since training began, tokens sampled and trained;
OUT/step_N are checkpoints, OUT/hf the trained model, OUT/versions.json the packages.

A rollout of `prompts * samples` trajectories is followed by `updates` optimizer steps over equal parts of it, which is
what our `train.num_steps_per_rollout` does. Tokens count as in learning.py, without padding: a sampled trajectory is
one forward pass over prompt and response, an update costs three, old logprobs one more.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from treepo_mega.data.rewards.verifiers import load_verifier

PACKAGES = ("trl", "transformers", "accelerate", "datasets", "torch")


class Meter(TrainerCallback):
    """Counts tokens in the reward function and writes a line after each rollout's last update."""

    def __init__(self, path: Path, updates: int) -> None:
        self.path, self.updates = path, updates
        self.trained = self.cpu_s = self.wall_s = 0.0

    def count(self, prompt_tokens: int, response_tokens: int) -> None:
        """One trajectory: sampled, its old logprobs computed, trained once."""
        # One pass to sample, one for old logprobs, three for forward and backward.
        self.trained += 5 * (prompt_tokens + response_tokens)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The clock starts: loading is not counted, as it is not for our steps."""
        self.cpu_s, self.wall_s = time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A line after each whole rollout."""
        if state.global_step % self.updates:
            return
        row = {
            "step": state.global_step // self.updates,
            "tokens": self.trained,
            "cpu_s": time.process_time() - self.cpu_s,
            "wall_s": time.perf_counter() - self.wall_s,
        }
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


class Keep(TrainerCallback):
    """Saves the model every `interval` rollouts, outside the meter's seconds."""

    def __init__(self, out: Path, updates: int, interval: int, meter: Meter, tokenizer: Any) -> None:
        self.out, self.every, self.updates, self.meter = out, updates * interval, updates, meter
        self.tokenizer = tokenizer

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Write OUT/step_N when it is due."""
        if state.global_step % self.every:
            return
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        target = self.out / f"step_{state.global_step // self.updates}"
        model.save_pretrained(target)
        self.tokenizer.save_pretrained(target)
        self.meter.cpu_s += time.process_time() - cpu_s
        self.meter.wall_s += time.perf_counter() - wall_s


def main() -> int:
    """Train; returns the exit status."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # Left padding, as TRL's documentation asks of a tokenizer for generation.
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], local_files_only=True, padding_side="left")
    updates = settings["updates"]
    meter = Meter(out / "steps.jsonl", updates)

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[str],
        verifier: list[str], data_source: list[str], extra: list[str], prompt_tokens: list[int], **_: Any,
    ) -> list[float]:  # fmt: skip
        scores = []
        for index, text in enumerate(completions):
            meter.count(prompt_tokens[index], len(completion_ids[index]))
            grade = load_verifier(verifier[index])
            found = grade(data_source[index], text, answer[index], json.loads(extra[index]))
            scores.append(float(found["score"] if isinstance(found, dict) else found))
        return scores

    batch = settings["prompts"] * settings["samples"] // updates
    # A large vocabulary's logits fill the memory; parts of a batch give the same gradients.
    micro_batch = min(batch, settings["micro_batch"] or batch)
    parts = batch // micro_batch
    config = GRPOConfig(
        output_dir=str(out / "trainer"),
        seed=settings["seed"],
        use_cpu=True,
        # Both are on by default, and both are for GPUs.
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=updates,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=parts,
        steps_per_generation=updates * parts,
        num_iterations=1,
        num_generations=settings["samples"],
        max_completion_length=settings["response_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        learning_rate=settings["lr"],
        lr_scheduler_type="constant_with_warmup",
        # TRL's warm-up counts optimizer steps, as ours does.
        warmup_steps=settings["warmup"],
        adam_beta1=settings["betas"][0],
        adam_beta2=settings["betas"][1],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["clip_grad"],
        epsilon=settings["clip"][0],
        epsilon_high=settings["clip"][1],
        beta=0.0,
        loss_type="dapo",
        scale_rewards="group",
        max_steps=updates * settings["rollouts"],
    )
    trainer = GRPOTrainer(
        model=settings["model"],
        processing_class=tokenizer,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(settings["rows"]),
        callbacks=[meter, Keep(out, updates, settings["interval"], meter, tokenizer)],
    )
    trainer.train()
    trainer.save_model(str(out / "hf"))
    tokenizer.save_pretrained(out / "hf")
    (out / "versions.json").write_text(json.dumps({name: version(name) for name in PACKAGES}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
