"""The trees in flight of one rollout: what they want goes to the engine, what the engine finished goes to them.

    run = TreesInFlight(generator, jobs, queue, rollout, temperature, begin, watcher)
    run.to_its_end()
    grown = run.harvest()

`generator.py` makes one for each call of `grow`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from treepo_mega.config import RolloutConfig
from treepo_mega.engine.stream import EngineError, Finished, SegmentRequest
from treepo_mega.errors import TreepoError
from treepo_mega.rollout.admission import Admission, Key
from treepo_mega.rollout.counts import PREFIX_COUNTS, TokenCounts
from treepo_mega.rollout.dealing import END, LATE, Queue
from treepo_mega.rollout.engine_costs import EngineCosts
from treepo_mega.rollout.jobs import Grown, Job, Watcher, leaves_of
from treepo_mega.rollout.requests import SegmentRun, request_key, request_name, spans_of
from treepo_mega.rollout.shared_turns import SharedTurns
from treepo_mega.rollout.turns import COUNTS as TURN_COUNTS
from treepo_mega.rollout.turns import Agent, Answered, TurnsInFlight
from treepo_mega.runtime.garbage import collection_rarer
from treepo_mega.tree.regrow import new_leaves
from treepo_mega.tree.search import TreeSearch
from treepo_mega.tree.wants import Segment, Want

if TYPE_CHECKING:
    from treepo_mega.rollout.generator import Generator


class GenerationTimeout(TreepoError):
    """Sampling passed rollout.timeout_s; the message names the segments that are unfinished."""


class TreesInFlight:
    """The trees in flight of one rollout."""

    def __init__(
        self,
        generator: Generator,
        jobs: Sequence[Job],
        queue: Queue,
        rollout: RolloutConfig,
        temperature: float,
        begin: Callable[[int], TreeSearch],
        watcher: Watcher | None,
        agent: Agent | None = None,
    ) -> None:
        self.generator = generator
        self.engine = generator.engine
        self.jobs = jobs
        self.queue = queue
        self.rollout = rollout
        self.temperature = temperature
        self.begin = begin
        self.watcher = watcher
        self.turns: TurnsInFlight | SharedTurns | None = None
        if agent is not None and rollout.engine.tensor_parallel_size > 1:
            self.turns = SharedTurns(agent, queue, forks=rollout.forks)
        elif agent is not None:
            self.turns = TurnsInFlight(agent, forks=rollout.forks)
        self.borders = generator.borders(rollout)
        self.room = Admission(self.engine.kv_blocks, rollout.engine.block_size, rollout.engine.max_num_seqs)
        # By rank: the order in which they were begun. `taken` maps a rank to the index of its job.
        self.searches: list[TreeSearch] = []
        self.taken: list[int] = []
        # Runs end early only by what their text says: only then the driver must look at it while it is sampled.
        self.streams = rollout.stop.answer_box or rollout.stop.repetition_window > 0
        self.wants: dict[Key, Want] = {}
        # By the segment that is being sampled, which moves along the run; `first` keeps the one that was admitted.
        self.runs: dict[Key, SegmentRun] = {}
        self.later: list[tuple[int, Want]] = []  # debug.schedule level: what waits for the end of the present one
        self.reading: set[int] = set()  # trees whose prompt the coming step reads
        self.held: list[Key] = []  # what waits for that
        self.rests: list[int] = []
        self.spent = EngineCosts()
        self.leaves = 0

    # Segments live as long as their tree: a search for cycles among them finds none.
    @collection_rarer()
    def to_its_end(self) -> None:
        """Drive all trees until they are done or paused, those that replace others, too.

        Raises GenerationTimeout naming what is missing.
        """
        deadline = time.monotonic() + self.rollout.timeout_s

        def late() -> bool:
            return time.monotonic() > deadline

        while True:
            self.spent.begin()
            self._fill()
            if not self.room.running:
                if self.turns is not None and self.turns.waiting:
                    self._wait_for_tools(self.turns, late)
                    continue
                # Trees that are done may be replaced, once their graders have spoken.
                news = self.queue.more(self._settle, late)
                if news == LATE:
                    raise GenerationTimeout(self._ungraded())
                if news == END:
                    return
                continue
            # The queue decides, not this rank's clock: ranks that share an engine must leave it at the same step.
            if self.queue.deadline_passed(late()):
                raise GenerationTimeout(self._unfinished())
            finished = self.engine.step()
            self.reading.clear()
            self.spent.stepped(len(self.room.running))
            for segment in finished:
                self._deliver(segment)
            if self.turns is not None:
                self._hear(self.turns, self.turns.poll())
            if finished:
                self._report()
            self.spent.done()
            if self.watcher is not None:
                self.watcher.step_done(self.room.occupancy)

    def harvest(self) -> Grown:
        """The trees by the index of their job."""
        out = Grown()
        for index, search in zip(self.taken, self.searches, strict=True):
            if search.done:
                out.trees[index] = search.tree
            else:
                out.paused[index] = search.state_dict()
        return out

    def _fill(self) -> None:
        """Submit what may run, beginning new trees while there is room for them."""
        # `level` is the published way, for comparison: one blocking call a level over all trees.
        if self.rollout.debug.schedule == "level":
            self._fill_level()
            return
        self._submit()
        # Asked before new trees begin: only an engine with nothing of its own left may take another's prompts.
        dry = not self.room.running
        # Twice: the first None only says that the engine's own list is empty, which others may have emptied.
        for _ in range(2 if dry else 1):
            while self.room.idle and (index := self.queue.take(dry)) is not None:
                self._begin(index)
                self._submit()
            if self.room.running:
                return

    def _fill_level(self) -> None:
        """All trees at once; what they want waits for the last segment of the level, and so do trees that replace."""
        if self.room.idle and not self.room.running:
            while (index := self.queue.take()) is not None:
                self._begin(index)
            for rank, want in self.later:
                self._wait(rank, want)
            self.later = []
        self._submit()

    def _wait_for_tools(self, turns: TurnsInFlight | SharedTurns, late: Callable[[], bool]) -> None:
        """Nothing runs until a tool answers. Raises GenerationTimeout when all the time is gone."""
        begun = time.monotonic()
        answered = turns.wait()
        turns.counts["env_wait_s"] += time.monotonic() - begun
        if self.queue.agree(late(), "say whether the deadline has passed"):
            raise GenerationTimeout(
                f"generation passed its deadline of {self.rollout.timeout_s} s (rollout.timeout_s) while tools ran: "
                "lower environment.timeout_s, raise environment.num_workers, or rollout.timeout_s"
            )
        if self.watcher is not None:
            self.watcher.waited_for_tools()
        self._hear(turns, answered)

    def _hear(self, turns: TurnsInFlight | SharedTurns, answered: Sequence[Answered]) -> None:
        """Hand what tools answered to the trees, and complete trees with their rewards to the watcher."""
        for each in answered:
            self.searches[each.rank].observe(each.node_id, each.observation, lost=each.lost)
            self._ask(each.rank)
        for rank, rewards in turns.take_graded():
            if self.watcher is not None:
                self.watcher.tree_done(self.taken[rank], self.searches[rank].tree, rewards)

    def _end_turns(self, rank: int) -> list[Want]:
        """Ask the environment about turns that have just ended; what the tree wants, where one was the last."""
        if self.turns is None:
            return []
        search = self.searches[rank]
        new = []
        while ended := search.turns_ended():
            for node_id in ended:
                if not self.turns.ask(rank, search.tree, node_id):
                    search.observe(node_id, None)
            new += search.wants()
        return new

    def _settle(self) -> bool:
        """Wait for the graders of trees that are done; False: nothing is with them."""
        return self.watcher is not None and self.watcher.settle()

    def _begin(self, index: int) -> None:
        search = self.begin(index)
        for name in PREFIX_COUNTS:
            # A carried-over tree brings what it cost in earlier steps.
            search.tree.counts.setdefault(name, 0)
        if self.turns is not None:
            search.tree.counts = dict.fromkeys(TURN_COUNTS, 0) | search.tree.counts
            self.turns.begin(len(self.searches), self.jobs[index].prompt, search.seed, search.tree)
        self.searches.append(search)
        self.taken.append(index)
        self.rests.append(0)
        self._ask(len(self.searches) - 1)

    def _ask(self, rank: int, new: Sequence[Want] | None = None) -> None:
        """Queue what tree `rank` newly wants; once that is known, its older prefixes need not be kept."""
        search = self.searches[rank]
        new = search.wants() if new is None else new
        # A tree that wants nothing yet waits for more of its segments: children will need these prefixes.
        if new or search.done or search.paused:
            # Before the new wants: where forks cut segments, they may have the names of those that have arrived.
            self.room.settle(rank)
        if self.rollout.forks and (self.rests[rank] != search.rests or search.done or search.paused):
            self._hold(rank)
        if search.paused and self.turns is not None:
            self.turns.pause(rank)
        if search.done and self.turns is not None:
            begun = self.jobs[self.taken[rank]].begun
            grown = search.tree if begun is None else new_leaves(search.tree, begun)
            self.turns.grade(rank, search.tree, grown.leaves)
        elif search.done and self.watcher is not None:
            self.watcher.tree_done(self.taken[rank], search.tree, None)
        elif search.paused and self.watcher is not None:
            self.watcher.tree_paused(self.taken[rank], search.state_dict())
        if self.rollout.debug.schedule == "level":
            self.later += [(rank, want) for want in new]
        else:
            for want in new:
                self._wait(rank, want)

    def _hold(self, rank: int) -> None:
        """Book what the tree has sampled until its next rest: branches will start anywhere in it."""
        search = self.searches[rank]
        self.rests[rank] = search.rests
        self.room.hold(rank, {} if search.done or search.paused else spans_of(search.tree))

    def _wait(self, rank: int, want: Want) -> None:
        tree = self.searches[rank].tree
        node = tree.nodes[want.node_id]
        lengths = [len(tree.nodes[i].tokens) for i in tree.ancestry(node.parent)]
        # A run that nothing can end early is one request of the engine; it books its whole length at once.
        whole = want.run if want.run and not (self.streams or self.borders) else want.max_tokens + (want.peek > 0)
        # A look behind an observation, of which the engine has nothing yet, is booked under its name.
        self.room.want(rank, node.path, lengths, len(node.tokens) + whole)
        self.wants[rank, node.path] = want

    def _submit(self) -> None:
        """Send what is admitted, but of each prompt that nobody has read only one path: the others copy its block."""
        for key in [] if self.reading else self.held:
            self._send(key)
        self.held = self.held if self.reading else []
        for key in self.room.admit():
            rank, path = key
            # vLLM shares full blocks at once. What a prompt fills of its last one can be copied a step later.
            copies = self.rollout.debug.copy_partial_blocks and (len(self.wants[key].prefix) - 1) % self.room.block_size
            if len(path) == 1 and copies and rank in self.reading:
                self.held.append(key)
            else:
                self.reading |= {rank} if len(path) == 1 else set()
                self._send(key)

    def _send(self, key: Key) -> None:
        want = self.wants[key]
        request = SegmentRequest(
            name=request_name(key),
            prefix=want.prefix,
            max_tokens=want.max_tokens,
            seed=want.seed,
            temperature=self.temperature,
            stop_token_ids=self.generator.eos_token_ids,
            peek=want.peek,
            borders=self.borders,
            min_tokens=want.min_tokens,
            run=want.run,
            reported_by_segment=self.streams,
            entropy=want.entropy,
            top=want.top,
            noted=self._noted(key, want),
        )
        self.runs[key] = SegmentRun(key, self.engine.submit(request))
        self.spent.sent(*key, len(want.prefix))

    def _noted(self, key: Key, want: Want) -> int:
        """First tokens of the prefix whose experts the tree knows; 0 where nobody asks."""
        tree = self.searches[key[0]].tree
        return tree.noted(tree.nodes[want.node_id].parent) if self.rollout.notes_routing else 0

    def _deliver(self, finished: Finished) -> None:
        """Hand a finished segment, or the segments of a finished run, to their tree."""
        if finished.finish_reason not in ("stop", "length", "border"):
            raise EngineError(f"request {finished.request_id!r} ended with {finished.finish_reason!r}")
        key = request_key(finished.request_id)
        rank = key[0]
        search = self.searches[rank]
        run = self.runs.pop(key)
        counts = TokenCounts(search.tree.counts)
        # Later segments of a run have no prefix of their own to compute.
        if not run.delivered_tokens:
            run.prefix_tokens = len(self.wants[key].prefix)
            counts.add_prefix(run.prefix_tokens, finished)
        counts.add_forwarded(run.prefix_tokens + run.delivered_tokens, finished)
        rest = Segment(
            finished.tokens,
            finished.logprobs,
            finished.finish_reason,
            finished.peek,
            finished.entropies,
            finished.top,
            finished.experts,
            finished.experts_from,
        )
        # A run may bring several segments at once. The tree gets one at a time, and says whether it wants the next.
        while True:
            want = self.wants.pop(key)
            size = min(len(rest.tokens), want.max_tokens)
            search.take(want.node_id, rest.part(0, size))
            run.delivered_tokens += size
            rest = rest.part(size, len(rest.tokens))
            new = search.wants()
            following = next((one for one in new if one.after is not None and one.after == want.node_id), None)
            if following is None or not (rest.tokens or finished.more):
                break
            new.remove(following)
            key = (rank, search.tree.nodes[following.node_id].path)
            self.wants[key] = following
            if not rest.tokens:
                self._extend(run, key, following)
                return
        counts.add_void(len(rest.tokens))
        if finished.more:
            run.stream.cancel()
        self.room.finish(*run.first, keep=self.rollout.forks)
        self._ask(rank, [*new, *self._end_turns(rank)])

    def _extend(self, run: SegmentRun, key: Key, want: Want) -> None:
        """The run goes on with the segment that is wanted at `key`."""
        run.stream.extend(request_name(key), want.max_tokens, want.min_tokens)
        self.runs[key] = run
        self.room.grow(*run.first, run.delivered_tokens + want.max_tokens)

    def _report(self) -> None:
        now = sum(len(search.tree.leaves) for search in self.searches)
        if self.generator.progress is not None and now > self.leaves:
            self.generator.progress(now, sum(leaves_of(job, self.rollout) for job in self.jobs))
        self.leaves = now

    def _ungraded(self) -> str:
        return (
            f"generation passed its deadline of {self.rollout.timeout_s} s (rollout.timeout_s) while the engine waited "
            "for graders to say which trees are replaced: look for a slow verifier, lower reward.timeout_s, or raise "
            "reward.num_workers"
        )

    def _unfinished(self) -> str:
        keys = sorted(self.room.running)
        some = [f"{self.searches[rank].tree.prompt_id!r} path {path}" for rank, path in keys[:8]]
        return (
            f"generation passed its deadline of {self.rollout.timeout_s} s (rollout.timeout_s) with {len(keys)} "
            f"segments unfinished: " + ", ".join(some) + (", ..." if len(keys) > len(some) else "")
        )
