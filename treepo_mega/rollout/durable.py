"""Durable rollouts: what a step has sampled and graded survives the run, and is not sampled again.

    durable = Durable(cfg, origin="", first_step=12, say=print)     # 12: where the run goes on
    kept = durable.round(step, jobs, rule)                          # what of this round is on disk already
    kept.tree_graded(index, row)                                    # ... and what comes to it, as it comes
    durable.end_step();  durable.forget(before=20)                  # after the checkpoint that step 20 begins from

The set of a step's trees is a function of seed, step, weights and prompts (`rollout/README.md`). So a tree that was
graded before a kill is the tree that would be sampled now, and the run that goes on equals an uninterrupted one. Steps
between the last checkpoint and the kill are trained again, on the trees that are there. Trees in flight are sampled
again. Paused trees (`rollout.partial_rollout`) are kept in the state in which they wait for the next step.

The first rank of an engine writes a file of its own (`journal/`). Any number of ranks reads: files are dealt to the
engines, whose ranks hold the trees of their files as if they had sampled them. Who holds a tree does not matter for
what is learnt from it. Evaluation is left out.

A refused write (a full disk) ends the run's keeping for that step, with a warning, and not the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treepo_mega.config import Config
from treepo_mega.journal import folder
from treepo_mega.journal.contents import to_record, to_tree
from treepo_mega.journal.file import JournalError, RecordFile, read_records
from treepo_mega.journal.fingerprint import fingerprint
from treepo_mega.plugins.record import source_digests
from treepo_mega.rollout.grading import Row
from treepo_mega.rollout.jobs import Job
from treepo_mega.rollout.refill import RefillRule
from treepo_mega.rollout.report import TREE
from treepo_mega.runtime import dist
from treepo_mega.runtime.seeding import derive_seed
from treepo_mega.tree.node import Tree

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the records; others are left out."""


@dataclass(frozen=True, slots=True)
class Found:
    """What every rank knows of a record: whose job it was, and on which engine it is now."""

    engine: int
    prompt: str
    tokens: str
    """A digest of the prompt's tokens."""
    without_signal: bool


@dataclass(slots=True)
class KeptRound:
    """What of a round is on disk. `rows` and `paused` are here on the ranks of their engine; the rest on all."""

    write: Callable[[dict[str, Any]], None]
    number: int
    begun: int
    """Positions that had begun, ended or not."""
    rule: RefillRule | None
    engines: dict[int, int] = field(default_factory=dict)
    """The engine that has what ended, by the index of its job."""
    rows: dict[int, Row] = field(default_factory=dict)
    paused: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def trees(self) -> dict[int, Tree]:
        """Finished trees of this rank's engine."""
        return {index: row[TREE] for index, row in self.rows.items()}

    def counts(self) -> dict[str, float]:
        """Trees and their sampled tokens, additive over engines."""
        tokens = [tree.counts.get("generated_tokens", 0) for tree in self.trees.values()]
        tokens += [state["tree"]["counts"].get("generated_tokens", 0) for state in self.paused.values()]
        return {"trees_restored": len(tokens), "tokens_restored": sum(tokens)}

    def tree_graded(self, index: int, row: Row) -> None:
        """Keep a finished tree with what its graders said."""
        values = {name: value for name, value in row.items() if name != TREE}
        self.write({"round": self.number, "index": index, "row": values, "tree": to_record(row[TREE])})

    def tree_paused(self, index: int, state: dict[str, Any]) -> None:
        """Keep a tree that goes on in a later step."""
        self.write({"round": self.number, "index": index, "state": state})


class Durable:
    """See the module docstring. Every rank builds one alike and asks it alike."""

    def __init__(self, cfg: Config, *, origin: str, first_step: int, afresh: bool, say: Callable[[str], None]) -> None:
        """`origin`: see `fingerprint`. `afresh`: what is on disk is another run's. Collective over all ranks."""
        self.cfg = cfg
        self.say = say
        self.root = Path(cfg.logging.run_dir)
        self.fingerprint = fingerprint(cfg, source_digests(cfg), origin)
        self._tp = cfg.rollout.engine.tensor_parallel_size
        self._step = -1
        self._rounds = 0
        self._file: RecordFile | None = None
        self._refused = False
        # By round and index: what all ranks know, and the records of this rank's engine.
        self._found: dict[tuple[int, int], Found] = {}
        self._own: dict[tuple[int, int], dict[str, Any]] = {}
        kept = folder.steps_kept(self.root) if dist.is_main() else []
        if dist.is_main():
            folder.forget(self.root, [step for step in kept if afresh or step < first_step])
        self._kept = set(dist.gather_objects([] if afresh else kept)[0])

    def round(self, step: int, jobs: Sequence[Job], rule: RefillRule | None) -> KeptRound:
        """What is on disk of the next round of a step. Collective over all ranks for a step that has records.

        Raises JournalError on every rank when one file is damaged.
        """
        if step != self._step:
            self.end_step()
            self._step = step
            self._rounds = 0
            if step in self._kept:
                self._read(step)
        number = self._rounds
        self._rounds += 1
        found = {index: one for (of_round, index), one in self._found.items() if of_round == number}
        begun = len(jobs)
        anew = KeptRound(self._write, number, begun, rule)
        if rule is not None:
            rule, begun = rule.resumed({index: one.without_signal for index, one in found.items()})
        found = {index: one for index, one in sorted(found.items()) if index < begun}
        for index, one in found.items():
            prompt = jobs[index].prompt
            if (prompt.id, _digest(prompt.tokens)) != (one.prompt, one.tokens):
                self._say_all(
                    f"{folder.step_folder(self.root, step)}: prompt {one.prompt!r} stands where the run has "
                    f"{prompt.id!r} now, or its tokens have changed: the trees there are left out, and sampled again"
                )
                self._found = {}
                self._own = {}
                return anew
        kept = KeptRound(self._write, number, begun, rule, {index: one.engine for index, one in found.items()})
        for index in found:
            record = self._own.get((number, index))
            if record is not None and "state" in record:
                kept.paused[index] = record["state"]
            elif record is not None:
                kept.rows[index] = {**record["row"], TREE: to_tree(record["tree"])}
        return kept

    def end_step(self) -> None:
        """Close this rank's file; nothing more comes to the step."""
        if self._file is not None:
            self._file.close()
        self._file = None
        self._refused = False
        self._found = {}
        self._own = {}

    def forget(self, before: int) -> None:
        """Remove what was kept of the steps before that one, which a checkpoint has now. Rank 0 only acts."""
        if dist.is_main():
            folder.forget(self.root, [step for step in folder.steps_kept(self.root) if step < before])

    def _write(self, record: dict[str, Any]) -> None:
        if self._refused:
            return
        try:
            if self._file is None:
                self._file = RecordFile.create(
                    folder.new_file(self.root, self._step, dist.rank()), self._header(self._step)
                )
            self._file.append(record)
        except OSError as error:
            self._refused = True
            logger.warning(
                "rank %d: %s refuses what step %d has sampled (%s): its trees from here on would be sampled again "
                "after a kill (rollout.durable). Make room there, or set logging.run_dir to another disk",
                *(dist.rank(), self.root / folder.FOLDER, self._step, error),
            )

    def _header(self, step: int) -> dict[str, Any]:
        return {
            "version": VERSION,
            "run": self.cfg.logging.run_name or self.root.resolve().name,
            "step": step,
            "policy_version": step,
            "fingerprint": self.fingerprint,
            "layout": {"ranks": dist.world_size(), "ranks_per_engine": self._tp, "rank": dist.rank()},
        }

    def _read(self, step: int) -> None:
        """Fill `_found` and `_own` from the files of a step. Collective over all ranks."""
        files = dist.gather_objects(list(map(str, folder.files_of(self.root, step))) if dist.is_main() else [])[0]
        engines = max(1, dist.world_size() // self._tp)
        engine, speaker = divmod(dist.rank(), self._tp)
        notes: list[str] = []
        problem = None
        try:
            for path in files[engine::engines]:
                self._read_file(Path(path), step, notes)
        except (JournalError, OSError) as error:
            problem = str(error)
        told = [[*key, *_about(record)] for key, record in self._own.items()]
        says = {"problem": problem, "notes": notes, "told": told} if speaker == 0 or problem else None
        heard = dist.tell_all(says)
        for report in heard.values():
            if report["problem"] is not None:
                raise JournalError(report["problem"])
        for teller, report in sorted(heard.items()):
            for line in report["notes"]:
                self._say_all(line)
            for of_round, index, *about in report["told"]:
                # Two attempts may both have sampled a tree: they are equal, and one is taken.
                self._found.setdefault((of_round, index), Found(teller // self._tp, *about))
        self._own = {key: record for key, record in self._own.items() if self._found[key].engine == engine}

    def _read_file(self, path: Path, step: int, notes: list[str]) -> None:
        read = read_records(path)
        header = read.header or {}
        if read.torn:
            notes.append(f"{path}: its last record was cut short ({read.torn} bytes): left out, and sampled again")
        if read.header is None:
            return
        expected = {"version": VERSION, "step": step, "fingerprint": self.fingerprint}
        if (found := {name: header.get(name) for name in expected}) != expected:
            notes.append(
                f"{path}: its {len(read.records)} trees are left out, and sampled again: they are of another "
                f"configuration, or of other rewards or weights ({_said(found)} there, {_said(expected)} here)"
            )
            return
        for record in read.records:
            self._own.setdefault((record["round"], record["index"]), record)

    def _say_all(self, line: str) -> None:
        if dist.is_main():
            self.say(line)


def _about(record: Mapping[str, Any]) -> tuple[str, str, bool]:
    """Prompt, digest of its tokens, and whether the tree is without signal."""
    if "state" in record:
        tree = record["state"]["tree"]
        return tree["prompt_id"], _digest(tree["nodes"][0]["tokens"]), False
    tokens = record["tree"]["tokens"]
    return record["tree"]["prompt"], _digest(tokens["value"][: int(tokens["size"][0])]), not record["row"]["trains"]


def _said(header: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in header.items())


def _digest(tokens: Sequence[int]) -> str:
    return f"{derive_seed(*tokens):x}"
