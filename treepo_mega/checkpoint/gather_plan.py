"""Who sends what when the ranks of one model-parallel replica put whole HF tensors together. Pure.

Every rank knows every rank's layout from the configuration alone, so all make the same plan without talking.
A plan is a sequence of rounds. In a round each rank contributes one flat run of elements (its `Piece`s one
after another), runs are padded to the longest and exchanged by one all-gather, and the boxes are then copied
into the HF tensors. `complete` lists the tensors that are whole after the round.

Each HF element is sent once: of equal replicas (norms over TP, the tied output layer) the first rank of the
group sends. A rank sends in the order of its own layers, so pipeline stages progress side by side and the
padding stays small; HF tensors therefore become complete in an order that is not the model's. A block larger
than a round is cut along its rows, so that the buffers stay bounded whatever the vocabulary; only a single
row may exceed the bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from treepo_mega.modelspec.mcore_layout import Block, Box, ParamLayout

ChunkLayouts = Sequence[Mapping[str, ParamLayout]]
"""Layouts of one rank's model chunks."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A block, or some rows of one, of parameter `param` in chunk `chunk` of the sending rank."""

    chunk: int
    param: str
    block: Block


@dataclass(frozen=True, slots=True)
class Round:
    """One exchange: `sends[r]` is what group rank r contributes; `length` elements are moved per rank."""

    sends: tuple[tuple[Piece, ...], ...]
    length: int
    complete: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """All rounds. `elements` is what had to be sent; with the padding, len(ranks) * sum of lengths are."""

    rounds: tuple[Round, ...]
    elements: int

    @property
    def length(self) -> int:
        """The longest round, in elements: the size of a rank's buffer."""
        return max((r.length for r in self.rounds), default=0)


def gather_plan(ranks: Sequence[ChunkLayouts], max_elements: int) -> GatherPlan:
    """Plan for the ranks of a group, given each one's chunk layouts in group order.

    `max_elements` bounds what one rank sends in a round. Raises ValueError when it is not positive.
    """
    if max_elements < 1:
        raise ValueError(f"max_elements is {max_elements}; expected at least 1")
    streams = [_rounds_of(pieces, max_elements) for pieces in _owned(ranks)]
    left: dict[str, int] = {}
    for stream in streams:
        for pieces in stream:
            for piece in pieces:
                left[piece.block.hf_name] = left.get(piece.block.hf_name, 0) + piece.block.numel
    elements = sum(left.values())
    rounds = []
    for i in range(max((len(s) for s in streams), default=0)):
        sends = tuple(s[i] if i < len(s) else () for s in streams)
        complete = []
        for piece in (p for pieces in sends for p in pieces):
            left[piece.block.hf_name] -= piece.block.numel
            if not left[piece.block.hf_name]:
                complete.append(piece.block.hf_name)
        length = max(sum(p.block.numel for p in pieces) for pieces in sends)
        rounds.append(Round(sends, length, tuple(complete)))
    return GatherPlan(tuple(rounds), elements)


def _owned(ranks: Sequence[ChunkLayouts]) -> list[list[Piece]]:
    """Per rank, the blocks it is the first to hold, in the order of its parameters."""
    seen: set[tuple[str, Box]] = set()
    out: list[list[Piece]] = []
    for chunks in ranks:
        mine = []
        for chunk, params in enumerate(chunks):
            for name, param in params.items():
                for block in param.blocks:
                    if (block.hf_name, block.hf_slice) not in seen:
                        seen.add((block.hf_name, block.hf_slice))
                        mine.append(Piece(chunk, name, block))
        out.append(mine)
    return out


def _rounds_of(pieces: Sequence[Piece], max_elements: int) -> list[tuple[Piece, ...]]:
    """A rank's pieces, cut where needed, packed greedily into runs of at most max_elements."""
    rounds: list[list[Piece]] = []
    used = max_elements
    for piece in pieces:
        for part in _cut(piece.block, max_elements):
            if used + part.numel > max_elements:
                rounds.append([])
                used = 0
            rounds[-1].append(Piece(piece.chunk, piece.param, part))
            used += part.numel
    return [tuple(r) for r in rounds]


def _cut(block: Block, max_elements: int) -> Iterator[Block]:
    """The block as runs of whole rows of at most max_elements elements each (at least one row)."""
    if block.numel <= max_elements:
        yield block
        return
    (hf_start, hf_stop), (local_start, _) = block.hf_slice[0], block.local_slice[0]
    rows = max(1, max_elements * (hf_stop - hf_start) // block.numel)
    for a in range(hf_start, hf_stop, rows):
        b, shift = min(a + rows, hf_stop), local_start - hf_start
        yield Block(
            block.hf_name,
            ((a, b), *block.hf_slice[1:]),
            ((a + shift, b + shift), *block.local_slice[1:]),
        )
