"""Grows the trees of many prompts at once on one engine: every tree waits for itself only.

    generator = Generator(engine, cfg, tokenizer)
    trees = generator.rollout(prompts, step=7)       # in the order of prompts, rewards still empty
    generator.counts                                 # what that call cost, additive over ranks

The loop is the engine's own: submit what any tree wants, take one engine step, hand the finished segments to their
trees, which may want more at once. There is no barrier over trees or levels, so a tree of short segments does not
wait for another's long ones. Because `tree/search.py` decides nothing by order of arrival and each node has its
own seed, the trees are the same under any schedule, batch or split of prompts over ranks. The one leak is
floating point: a kernel may round differently in another batch, and a token whose draw falls within that rounding
of a boundary may differ.

A tree lives on one engine, whose prefix cache makes resubmitting its prefixes cheap; `cached_tokens` and
`recomputed_tokens` count what was reused and what was not. Segment borders are where the configuration puts them,
they are not moved to KV-block borders (see `rollout/engine.py` for the lengths at which reuse is best).

`counts`, all sums, for the last call: `prompts`, `trees_short` (trees with a shortfall), `leaves`, `stop/<reason>`
(leaves by stop reason), the sums of `tree.counts` (`segments`, `generated_tokens`, `dropped_tokens`, `levels`,
`fallbacks`, `duplicates`, `cached_tokens`, `recomputed_tokens`), `unique_tokens`, `flat_tokens`, `engine_steps`,
`seconds`; and one ratio, `token_ratio` = unique / flat (after adding ranks, divide again).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from treepo_mega.config import Config, RolloutConfig
from treepo_mega.rollout.engine import Engine, EngineError, find_eos_token_ids
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.node import Tree
from treepo_mega.tree.search import Segment, TreeSearch, Want
from treepo_mega.tree.stop import STOP_REASONS, StopRules

if TYPE_CHECKING:
    from treepo_mega.data.prompts import Prompt

Progress = Callable[[int, int], None]
"""Called with (leaves finished, leaves wanted) whenever the first number grows."""


class Generator:
    """Rollouts on one engine. `decode(ids)` is the text that stop rules, graders and people see."""

    def __init__(self, engine: Engine, cfg: Config, tokenizer: Any, *, progress: Progress | None = None) -> None:
        """Raises EngineError when neither the configuration nor the checkpoint names an EOS token."""
        self.engine, self.cfg, self.progress = engine, cfg, progress
        named = cfg.rollout.stop.eos_token_ids
        self.eos_token_ids = find_eos_token_ids(engine.hf_dir, tokenizer) if named is None else list(named)
        self.counts: dict[str, float] = {}
        self._tokenizer = tokenizer

    def decode(self, tokens: Sequence[int]) -> str:
        """Response text without special tokens."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def rollout(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        policy_version: int = 0,
        rollout: RolloutConfig | None = None,
        temperature: float | None = None,
        purpose: str = "train",
    ) -> list[Tree]:
        """One tree a prompt, in their order. No prompts: returns at once.

        `rollout` replaces cfg.rollout (evaluation); `temperature` replaces its temperature, 0 is greedy.
        Seeds come from (train.seed, purpose, step, prompt id), so ids must be unique within a step (those of
        `PromptCursor` are unique within a run): equal ids would give equal trees.

        Raises ValueError for a repeated id or a prompt that does not fit the engine, TimeoutError after
        rollout.timeout_s naming the unfinished segments, EngineError from the engine. After an error the engine is
        idle and usable.
        """
        started = time.monotonic()
        r = rollout or self.cfg.rollout
        searches: dict[str, TreeSearch] = {}
        stop = StopRules.from_config(r, self.eos_token_ids, self.decode)
        for prompt in prompts:
            if prompt.id in searches:
                raise ValueError(f"prompt {prompt.id!r} occurs twice in a rollout: its trees would be equal")
            if len(prompt.tokens) + r.max_response_len > self.engine.max_model_len:
                raise ValueError(
                    f"prompt {prompt.id!r}: {len(prompt.tokens)} tokens + rollout.max_response_len "
                    f"{r.max_response_len} exceed the engine's window of {self.engine.max_model_len}"
                )
            seed = derive_seed(self.cfg.train.seed, purpose, step, prompt.id)
            searches[prompt.id] = TreeSearch(
                prompt.id, prompt.tokens, r, seed=seed, stop=stop, policy_version=policy_version
            )
        steps = self._run(list(searches.values()), r, r.temperature if temperature is None else temperature)
        trees = [s.tree for s in searches.values()]
        self.counts = summarize(trees)
        self.counts |= {"engine_steps": steps, "seconds": time.monotonic() - started}
        return trees

    def _run(self, searches: list[TreeSearch], r: RolloutConfig, temperature: float) -> int:
        """Drive the searches to their end; returns the number of engine steps."""
        deadline = time.monotonic() + r.timeout_s
        running: dict[str, tuple[TreeSearch, Want]] = {}
        steps, leaves = 0, 0
        for search in searches:
            search.tree.counts |= {"cached_tokens": 0, "recomputed_tokens": 0}
        try:
            for k, search in enumerate(searches):
                self._submit(k, search, running, temperature)
            while running:
                if time.monotonic() > deadline:
                    raise TimeoutError(_unfinished(running, r.timeout_s))
                done = self.engine.step()
                steps += 1
                for x in done:
                    search, want = running.pop(x.request_id)
                    if x.finish_reason not in ("stop", "length"):
                        raise EngineError(f"request {x.request_id!r} ended with {x.finish_reason!r}")
                    search.tree.counts["cached_tokens"] += x.num_cached_tokens
                    search.tree.counts["recomputed_tokens"] += len(want.prefix) - x.num_cached_tokens
                    search.take(want.node_id, Segment(x.tokens, x.logprobs, x.finish_reason))
                    self._submit(int(x.request_id.partition(":")[0]), search, running, temperature)
                leaves = self._report(searches, leaves, r) if done else leaves
        except BaseException:
            self.engine.abort()
            raise
        return steps

    def _submit(
        self, k: int, search: TreeSearch, running: dict[str, tuple[TreeSearch, Want]], temperature: float
    ) -> None:
        """Queue what tree number `k` newly wants."""
        for want in search.wants():
            name = f"{k}:{want.node_id}"
            self.engine.submit(name, want.prefix, want.max_tokens, want.seed, temperature, self.eos_token_ids)
            running[name] = (search, want)

    def _report(self, searches: list[TreeSearch], before: int, r: RolloutConfig) -> int:
        now = sum(len(s.tree.leaves) for s in searches)
        if self.progress is not None and now > before:
            self.progress(now, len(searches) * r.n_samples_per_prompt)
        return now


def summarize(trees: Sequence[Tree]) -> dict[str, float]:
    """The additive counts of finished trees (see the module docstring), and token_ratio."""
    counts: dict[str, float] = {"prompts": len(trees), "trees_short": 0, "leaves": 0}
    counts |= {f"stop/{reason}": 0 for reason in STOP_REASONS}
    counts |= {"unique_tokens": 0, "flat_tokens": 0}
    for tree in trees:
        counts["trees_short"] += tree.shortfall is not None
        counts["leaves"] += len(tree.leaves)
        counts["unique_tokens"] += tree.unique_tokens()
        counts["flat_tokens"] += tree.flat_tokens()
        for leaf in tree.leaves:
            counts[f"stop/{tree.nodes[leaf].stop}"] += 1
        for name, value in tree.counts.items():
            counts[name] = counts.get(name, 0) + value
    counts["token_ratio"] = counts["unique_tokens"] / counts["flat_tokens"] if counts["flat_tokens"] else 1.0
    return counts


def _unfinished(running: dict[str, tuple[TreeSearch, Want]], timeout_s: float) -> str:
    some = [f"{s.tree.prompt_id!r} path {s.tree.nodes[w.node_id].path}" for s, w in list(running.values())[:8]]
    return (
        f"generation passed its deadline of {timeout_s} s (rollout.timeout_s) with {len(running)} segments unfinished: "
        + ", ".join(some)
        + (", ..." if len(running) > len(some) else "")
    )
