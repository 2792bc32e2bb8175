"""Grows the trees of many prompts at once on one engine: every tree waits for itself only.

    generator = Generator(engine, cfg, tokenizer)
    trees = generator.rollout(prompts, step=7)       # in the order of prompts, rewards still empty
    grown = generator.grow(jobs, queue, step=7)      # prompts from a queue that engines share, carried-over trees
    generator.counts                                 # what that call cost, additive over ranks

The loop is the engine's own. It submits what any tree wants, takes one engine step, and hands the finished segments to
their trees, which may want more at once. There is no barrier over trees or levels, so a tree of short segments does
not wait for another's long ones. `admission.py` decides who runs when.

`rollout/README.md` explains why the trees are the same under any schedule, and lists every key of `counts`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from treepo_mega.config import Config, RolloutConfig
from treepo_mega.data.end_tokens import find_eos_token_ids
from treepo_mega.engine.stream import SegmentEngine
from treepo_mega.environment.setup import Environment
from treepo_mega.plugins import split_of
from treepo_mega.rollout.borders import border_tokens
from treepo_mega.rollout.counts import summarize
from treepo_mega.rollout.dealing import CostModel, LocalQueue, Queue, deal_by_cost
from treepo_mega.rollout.in_flight import TreesInFlight
from treepo_mega.rollout.jobs import Grown, Job, Watcher, check_jobs, grows_in_place, leaves_of, state_of
from treepo_mega.rollout.turns import Agent
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.text.tokenizer import Tokenizer
from treepo_mega.tree.node import Tree
from treepo_mega.tree.search import TreeSearch
from treepo_mega.tree.stop import StopRules

if TYPE_CHECKING:
    from treepo_mega.data.prompts import Prompt


Progress = Callable[[int, int], None]
"""Called with (leaves finished, leaves wanted) whenever the first number grows."""


class Generator:
    """Rollouts on one engine. `decode(ids)` is the text that stop rules, graders and people see."""

    def __init__(
        self,
        engine: SegmentEngine,
        cfg: Config,
        tokenizer: Tokenizer,
        *,
        environment: Environment | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`environment`: what answers turns (data.environment).

        Raises EngineError when neither the configuration nor the checkpoint names an EOS token, DialogueError and
        ToolParserError for a chat template and a tool parser that turns cannot be written with.
        """
        self.engine = engine
        self.cfg = cfg
        self.progress = progress
        self.eos_token_ids = find_eos_token_ids(engine.hf_dir, tokenizer, cfg.rollout.stop.eos_token_ids)
        self.agent = Agent(environment, cfg, tokenizer, self.eos_token_ids) if environment is not None else None
        self.costs = CostModel()
        self.counts: dict[str, float] = {}
        self._tokenizer = tokenizer
        self._borders: dict[str, frozenset[int]] = {}

    def decode(self, tokens: Sequence[int]) -> str:
        """Response text without special tokens."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def borders(self, rollout: RolloutConfig) -> frozenset[int]:
        """Token ids that end a segment under `rollout.segment.end`. Raises EngineError when there are none."""
        if not rollout.ends_at_text:
            return frozenset()
        name = repr(rollout.segment.end)
        # Reading the whole vocabulary takes a while, and training and evaluation may differ in their rule.
        if name not in self._borders:
            self._borders[name] = border_tokens(self._tokenizer, self.engine.vocab_size, rollout.segment.end)
        return self._borders[name]

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
        """One finished tree a prompt, in their order. No prompts: returns at once.

        `rollout` replaces cfg.rollout (evaluation); `temperature` replaces its temperature, 0 is greedy. Raises what
        `grow` raises.
        """
        # No later step would finish what a partial rollout leaves over.
        whole = (rollout or self.cfg.rollout).model_copy(update={"partial_rollout": None})
        (order,) = deal_by_cost([self.costs.expected(prompt) for prompt in prompts], 1)
        grown = self.grow(
            [Job(prompt) for prompt in prompts],
            LocalQueue(order),
            step=step,
            policy_version=policy_version,
            rollout=whole,
            temperature=temperature,
            purpose=purpose,
        )
        return [grown.trees[i] for i in range(len(prompts))]

    def grow(
        self,
        jobs: Sequence[Job],
        queue: Queue,
        *,
        step: int,
        policy_version: int = 0,
        rollout: RolloutConfig | None = None,
        temperature: float | None = None,
        purpose: str = "train",
        watcher: Watcher | None = None,
    ) -> Grown:
        """Grow the trees of the jobs that `queue` hands out, to their end or to the reach of this step.

        The queue may hand out positions beyond the jobs that are known now (`refill.Supply`), in place of trees whose
        graders said that they have no signal.

        Seeds come from (train.seed, purpose, step, prompt id), so ids must be unique within a step (those of
        `PromptCursor` are unique within a run): equal ids would give equal trees. Where trees grow on (`Job.begun`),
        the prefix cache of the call before is kept. `watcher` is told of each tree that is done, and of each step.

        Raises PromptError for a repeated id or a prompt that does not fit the engine, GenerationTimeout after
        rollout.timeout_s naming the unfinished segments, EngineError from the engine. After an error the engine is
        idle and usable.
        """
        started = time.monotonic()
        rollout = rollout or self.cfg.rollout
        budget_temperature = rollout.budget_temperature_at(step / max(1, self.cfg.train.num_rollouts - 1))
        now = rollout.replace({"branching.budget.temperature": budget_temperature})
        longest = now.max_response_len + self.cfg.max_observation_len
        check_jobs(jobs, longest, self.engine.max_model_len)
        # What a step costs, and how its numbers are rounded, must not depend on what ran before. Trees that grow on are
        # part of one step: what they branch from is still there.
        if not any(map(grows_in_place, jobs)):
            self.engine.reset_prefix_cache()
        turns = None if self.agent is None else self.agent.rules
        stop = StopRules.from_config(now, self.eos_token_ids, self.decode, turns)
        known = len(jobs)

        def begin(index: int) -> TreeSearch:
            """A new tree, or a carried-over one that goes on in this step."""
            job = jobs[index]
            if index >= known:
                check_jobs([job], longest, self.engine.max_model_len)
            prompt = job.prompt
            width = leaves_of(job, now)
            of_tree = now if width == now.n_samples_per_prompt else now.replace({"n_samples_per_prompt": width})
            search = TreeSearch(
                prompt.id,
                prompt.tokens,
                of_tree,
                seed=derive_seed(self.cfg.train.seed, purpose, step, prompt.id),
                stop=stop,
                policy_version=policy_version,
                align=now.alignment,
                split=split_of(now, prompt.id),
                begun=job.begun,
                turns=turns,
            )
            if job.carried:
                search.load_state_dict(state_of(job))
                search.resume(policy_version, of_tree)
            return search

        run = TreesInFlight(
            self, jobs, queue, now, now.temperature if temperature is None else temperature, begin, watcher, self.agent
        )
        try:
            run.to_its_end()
        # Also KeyboardInterrupt: requests left behind would be sampled on, and answer the next call.
        except BaseException:
            self.engine.abort()
            if run.turns is not None:
                run.turns.end()
            raise
        grown = run.harvest()
        self.counts = summarize(list(grown.trees.values()))
        self.counts |= run.spent.counts() | {"seconds": time.monotonic() - started}
        if run.turns is not None:
            self.counts |= run.turns.sums()
        return grown
