"""The HTML file of a step's trees: template, script, style, and one compressed block a tree.

Blocks are base64 of zlib data, which holds no `<`: whatever a model wrote, it cannot end its block. The page's policy
(the meta tag) allows no request and no script but the page's own, whose hash it names.

A tree's block, decompressed: length of the head (4 bytes, little end first), the head (`figures.Outline.head`, JSON),
the token ids of all nodes in order (`vocabulary.py`). Where the page would pass `MAX_BYTES`, trees lose their text;
those whose rewards differ most keep it longest.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from treepo_mega.monitor.tree_page.figures import Outline
from treepo_mega.monitor.tree_page.read import StepTrees
from treepo_mega.monitor.tree_page.vocabulary import pack_ids, pack_table, rank_by_frequency
from treepo_mega.tree.node import ROOT
from treepo_mega.tree.segments import Ints

FOLDER = Path(__file__).parent
SCRIPTS = ("decode.js", "layout.js", "panes.js", "main.js")
"""In this order they are one script: a page that is opened as a file can load no modules."""
MAX_BYTES = 30_000_000
"""Of the page. What is larger opens slowly, and few mail servers take it."""
ROOM_FOR_NOTES = 4_000
TAG_BYTES = 80
LABEL_TOKENS = 64
LABEL_CHARACTERS = 140


def render_page(run: StepTrees, max_bytes: int = MAX_BYTES) -> tuple[str, list[str]]:
    """The page, and a note when trees lost their text to `max_bytes`."""
    ranks = rank_by_frequency(one.tokens for one in run.outlines)
    texts = _texts(run, ranks)
    labels = _labels(run.outlines, dict(zip(ranks.tolist(), texts, strict=True)))
    title = f"step {run.step} of {run.run}"
    whole = [True] * len(run.outlines)
    without_trees = {"index": _index(run, len(ranks), labels, whole, []), "vocabulary": _pack(pack_table(texts))}
    # What the index says of trees without text is yet to come.
    room = max_bytes - len(_page(title, without_trees)) - ROOM_FOR_NOTES - TAG_BYTES * len(run.outlines)
    blocks, whole = _blocks(run.outlines, ranks, room)
    notes = []
    if not all(whole):
        notes.append(
            f"{len(whole) - sum(whole)} of {len(whole)} trees are shown without text, to keep the page below "
            f"{max_bytes / 1e6:g} MB; treepo-mega tree {run.run} --step {run.step} --prompt K shows one with it"
        )
    islands = without_trees | {"index": _index(run, len(ranks), labels, whole, notes)}
    islands |= {f"tree-{place}": block for place, block in enumerate(blocks)}
    return _page(title, islands), notes


def _index(run: StepTrees, tokens: int, labels: list[str], whole: list[bool], notes: list[str]) -> str:
    index = {
        "run": run.run,
        "step": run.step,
        "estimator": run.estimator,
        "tokens": tokens,
        "notes": [*run.notes, *notes],
        "prompts": [
            one.summary | {"number": number, "label": label, "whole": has_text}
            for one, number, label, has_text in zip(run.outlines, run.numbers, labels, whole, strict=True)
        ],
    }
    return _pack(json.dumps(index).encode())


def _page(title: str, islands: dict[str, str]) -> str:
    script = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "title": escape(title),
        "style": (FOLDER / "page.css").read_text(encoding="utf-8"),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": "\n".join(
            f'<script type="application/octet-stream" id="{name}">{block}</script>' for name, block in islands.items()
        ),
    }
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _pack(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _texts(run: StepTrees, ranks: Ints) -> list[bytes]:
    """Text of each id of `ranks`; the id itself where there is no tokenizer."""
    if run.tokenizer is None:
        return [f"{token} ".encode() for token in ranks.tolist()]
    return run.tokenizer.token_bytes(ranks.tolist())


def _blocks(outlines: Sequence[Outline], ranks: Ints, room: int) -> tuple[list[str], list[bool]]:
    """The block of each tree, and whether it has its text; of at most `room` bytes, unless heads alone are more."""
    blocks = [_block(one, b"") for one in outlines]
    room -= sum(map(len, blocks))
    whole = [False] * len(outlines)
    for place in sorted(range(len(outlines)), key=lambda place: -(outlines[place].summary["spread"] or 0.0)):
        one = outlines[place]
        block = _block(one, pack_ids(list(itertools.chain.from_iterable(one.tokens)), ranks))
        more = len(block) - len(blocks[place])
        if more <= room:
            room -= more
            blocks[place] = block
            whole[place] = True
    return blocks, whole


def _block(one: Outline, ids: bytes) -> str:
    head = json.dumps(one.head, separators=(",", ":")).encode()
    return _pack(len(head).to_bytes(4, "little") + head + ids)


def _labels(outlines: Sequence[Outline], text_of: dict[int, bytes]) -> list[str]:
    """What tells each prompt from the others: its text without what all of them begin and end with."""
    prompts = [list(one.tokens[ROOT]) for one in outlines]
    begin = _common(prompts)
    end = _common([prompt[begin:][::-1] for prompt in prompts])
    labels = []
    for prompt in prompts:
        # A prompt alone, or like all others, has nothing to itself.
        own = prompt[begin : len(prompt) - end] or prompt
        text = b"".join(text_of[token] for token in own[:LABEL_TOKENS]).decode(errors="ignore")
        labels.append(" ".join(text.split())[:LABEL_CHARACTERS])
    return labels


def _common(sequences: Sequence[Sequence[Any]]) -> int:
    """How many items all sequences begin with alike."""
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return sum(1 for _ in alike)
