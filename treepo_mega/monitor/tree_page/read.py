"""Reads what a run left of a step's trees, and what it takes to show them: configuration and tokenizer.

A file without its last line's end is still of use, and so is a run whose model has moved: what is missing is said in
`StepTrees.notes`, and the rest is shown.
"""

from __future__ import annotations

import json
import re
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from treepo_mega.data.light_tokenizer import LightTokenizer, read_light_tokenizer
from treepo_mega.data.tokenizer import TokenizerError
from treepo_mega.errors import TreepoError, nearest
from treepo_mega.monitor.tree_page.figures import Outline, outline
from treepo_mega.tree.node import ROOT, Tree

FOLDER = "trees"
STEPS_NAMED = 12
"""Steps that a message lists at most."""


class TreePageError(TreepoError):
    """There are no trees to show; the message names the file or the step, and what is there."""


@dataclass(frozen=True)
class StepTrees:
    """The trees of a step. `numbers[i]` is the place of `outlines[i]` in the file, from 1."""

    run: str
    path: Path
    step: int
    numbers: list[int]
    outlines: list[Outline]
    tokenizer: LightTokenizer | None
    estimator: str | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """What the page needs of a run's configuration. Another version may have written it: unknown keys do not matter."""

    hf_checkpoint: str | None = None
    estimator: str | None = None
    leaf_weight: str = "uniform"
    trees_interval: int | None = None

    @classmethod
    def read(cls, path: Path, notes: list[str]) -> Settings:
        """Those of the file at `path`; what it does not say is as above, and a file that cannot be read is noted."""
        try:
            stored = yaml.safe_load(path.read_text(encoding="utf-8"))
            sections: dict[str, dict[str, Any]] = {
                name: stored.get(name) or {} for name in ("model", "algo", "logging")
            }
            return cls(
                hf_checkpoint=sections["model"].get("hf_checkpoint"),
                estimator=sections["algo"].get("advantage_estimator"),
                leaf_weight=sections["algo"].get("leaf_weight", "uniform"),
                trees_interval=sections["logging"].get("trees_interval"),
            )
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            said = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
            notes.append(f"{path}: cannot be read, so the model's tokenizer and the estimator are unknown: {said}")
            return cls()


def trees_path(run_dir: Path, step: int) -> Path:
    """Where the trees of a step, counted from 1, are kept."""
    return run_dir / FOLDER / f"step_{step:06d}.jsonl"


def load_run(run_dir: Path, step: int | None) -> StepTrees:
    """The trees of `step` (None: the last that has some). Raises TreePageError when there are none."""
    path = _find(run_dir, step)
    notes: list[str] = []
    settings = Settings.read(run_dir / "config.yaml", notes)
    outlines = _read(path, settings.leaf_weight, notes)
    if not any(one.advantages for one in outlines):
        notes.append(f"{path.name} holds no advantages: an earlier version wrote it")
    return StepTrees(
        run=str(run_dir),
        path=path,
        step=_step_of(path),
        numbers=list(range(1, len(outlines) + 1)),
        outlines=outlines,
        tokenizer=find_tokenizer(run_dir, settings, notes),
        estimator=settings.estimator,
        notes=notes,
    )


def select_prompt(run: StepTrees, prompt: str) -> StepTrees:
    """The same with the trees of one prompt alone: its id, or its number in the file. Raises TreePageError."""
    ids = [one.prompt_id for one in run.outlines]
    chosen = [index for index, prompt_id in enumerate(ids) if prompt_id == prompt]
    if not chosen and prompt.isdecimal() and int(prompt) in run.numbers:
        chosen = [int(prompt) - 1]
    if not chosen:
        raise TreePageError(
            f"{run.path}: no tree of prompt {prompt!r}{nearest(prompt, ids)}; name one of its {len(ids)} prompts, such "
            f"as {ids[0]!r}, or its number in the file, 1 to {len(ids)}"
        )
    return replace(
        run, numbers=[run.numbers[index] for index in chosen], outlines=[run.outlines[index] for index in chosen]
    )


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def steps_with_trees(run_dir: Path) -> list[int]:
    """The steps of which the run has trees, ascending."""
    found = (run_dir / FOLDER).glob("step_*.jsonl")
    return sorted(_step_of(path) for path in found if re.fullmatch(r"step_\d+", path.stem))


def _find(run_dir: Path, step: int | None) -> Path:
    if not run_dir.is_dir():
        siblings = [str(one) for one in run_dir.parent.iterdir()] if run_dir.parent.is_dir() else []
        raise TreePageError(f"{run_dir}: no such run directory{nearest(str(run_dir), siblings, cutoff=0.7)}")
    folder = run_dir / FOLDER
    found = steps_with_trees(run_dir)
    if not found:
        raise TreePageError(
            f"{folder}: holds no trees. A run writes them after step 1 and every logging.trees_interval steps"
            f"{_interval(run_dir)}"
        )
    if step is None:
        return trees_path(run_dir, found[-1])
    if step not in found:
        named = found if len(found) <= STEPS_NAMED else [*found[: STEPS_NAMED - 1], "...", found[-1]]
        raise TreePageError(
            f"{folder}: no trees of step {step}; there are trees of steps {', '.join(map(str, named))}"
            f"{_interval(run_dir)}"
        )
    return trees_path(run_dir, step)


def _interval(run_dir: Path) -> str:
    """What the run says of how often it writes trees; empty when it says nothing."""
    found = Settings.read(run_dir / "config.yaml", []).trees_interval
    return "" if found is None else f" (logging.trees_interval of this run: {found})"


def find_tokenizer(run_dir: Path, settings: Settings, notes: list[str]) -> LightTokenizer | None:
    """The model's tokenizer, else that of the run's own export; None and a note without either."""
    places = [Path(settings.hf_checkpoint or "model.hf_checkpoint"), run_dir / "hf"]
    try:
        found = next(filter(None, map(read_light_tokenizer, places)), None)
    except TokenizerError as error:
        notes.append(f"token ids stand in place of text: {error}")
        return None
    if found is None:
        notes.append(
            f"token ids stand in place of text: no tokenizer.json in {places[0]} (model.hf_checkpoint) "
            f"nor in {places[1]}; a relative path is looked up in the working directory"
        )
    return found


def _read(path: Path, leaf_weight: str, notes: list[str]) -> list[Outline]:
    """Every tree of the file, without what the page does not show. A cut-off last line is noted."""
    outlines = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    stored = json.loads(line)
                except ValueError as error:
                    # Only the last line of a file has no end: a copy that was cut off, or a disk that was full.
                    if line.endswith(b"\n"):
                        raise TreePageError(f"{path}, line {number}: not valid JSON: {error}") from None
                    notes.append(f"{path.name}, line {number}: cut off; the {number - 1} trees before it are shown")
                    break
                outlines.append(_outline(path, number, stored, leaf_weight))
    except OSError as error:
        raise TreePageError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not outlines:
        raise TreePageError(f"{path}: holds no whole tree; expected one JSON tree a line")
    return outlines


def _outline(path: Path, number: int, stored: object, leaf_weight: str) -> Outline:
    try:
        tree = Tree.from_dict(stored)  # type: ignore[arg-type]  # anything else ends as TypeError below
        for place, node in enumerate(tree.nodes):
            # Four bytes a token: as lists of Python's integers, a large step would not fit into memory.
            node.tokens = array("I", node.tokens)  # type: ignore[assignment]
            if node.id != place or not (node.parent < place if place else node.parent == -1):
                raise ValueError(f"node {place} has id {node.id} and parent {node.parent}")
        if any(not ROOT < leaf < len(tree.nodes) for leaf in tree.leaves):
            raise ValueError(f"leaves {tree.leaves} of {len(tree.nodes)} nodes")
        return outline(tree, leaf_weight)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TreePageError(f"{path}, line {number}: not a tree as this version writes it: {error}") from None
