"""`logging.completions`: a few leaves of a step as a table on the console, best and worst side by side.

    table(trees, 4, decode, title="step 3/40")

Prompts with differing rewards come first. Such a prompt shows its best leaf, then its worst. `├` stands where a path
branches. What the model wrote is hostile: it is no markup here, and characters that steer a terminal are left out.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence

from rich.table import Table
from rich.text import Text

from treepo_mega.tree.node import ROOT, Tree

Decode = Callable[[list[int]], str]

PROMPT_CHARACTERS = 200
RESPONSE_CHARACTERS = 800
BRANCH = "├"
CUT = " … "
PARTIAL = "\ufffd"
"""What decoders write for a character of which bytes are missing."""
STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of characters that move the cursor, change directions or cannot be printed at all."""


def choose(trees: Sequence[Tree], count: int) -> list[tuple[Tree, int]]:
    """At most `count` leaves as (tree, index into `tree.leaves`); see the module docstring for the order.

    >>> tree = Tree.start("p", [1])
    >>> tree.leaves, tree.rewards = [tree.add_child(0).id for _ in range(3)], [0.0, 1.0, 0.5]
    >>> [index for _, index in choose([tree], 2)]
    [1, 0]
    """
    graded = [tree for tree in trees if tree.leaves and tree.rewards]
    differ = [tree for tree in graded if len(set(tree.rewards)) > 1]
    alike = [tree for tree in graded if len(set(tree.rewards)) == 1]
    return [place for place, _ in zip(_in_order(differ, alike), range(count), strict=False)]


def _in_order(differ: Sequence[Tree], alike: Sequence[Tree]) -> Iterator[tuple[Tree, int]]:
    for tree in differ:
        yield tree, tree.rewards.index(max(tree.rewards))
        yield tree, tree.rewards.index(min(tree.rewards))
    for tree in alike:
        yield tree, 0


def pieces(tree: Tree, leaf: int, decode: Decode) -> list[str]:
    """The response of node `leaf` as text, one piece a segment."""
    out = []
    tokens: list[int] = []
    shown = 0
    for node_id in tree.ancestry(leaf)[1:]:
        # What a template shows in place of a turn was said by nobody.
        tokens += tree.nodes[node_id].tokens[tree.nodes[node_id].restated :]
        # Decoded from the beginning: a segment may end within a character, which then belongs to the next piece.
        text = decode(tokens)
        known = len(text) if node_id == leaf else len(text.rstrip(PARTIAL))
        out.append(text[shown:known])
        shown = max(shown, known)
    return out


def marked_pieces(tree: Tree, leaf: int, decode: Decode) -> list[tuple[bool, str]]:
    """`pieces`, each with whether a branch point of the tree is before it."""
    below = tree.leaves_below()
    out = []
    for node_id, piece in zip(tree.ancestry(leaf)[1:], pieces(tree, leaf, decode), strict=True):
        parent = tree.nodes[node_id].parent
        branches = sum(child in below for child in tree.nodes[parent].children)
        # The prompt's end is a branch point of every tree: a mark there says nothing.
        out.append((branches > 1 and parent != ROOT, piece))
    return out


def printable(text: str) -> str:
    """`text` on one line, `⏎` for line ends, without the characters that steer a terminal.

    >>> printable("a\\x1b[31mb\\n\\tc\\u202e")
    'a[31mb⏎ c'
    """
    text = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
    return "".join(character for character in text if unicodedata.category(character) not in STEERING)


def shorten(text: str, limit: int) -> str:
    """The beginning and the end of a text that is longer than `limit` characters.

    >>> shorten("abcdefghij", 8)
    'abc … ij'
    """
    head, tail = kept(len(text), limit)
    return text if head == len(text) else text[:head] + CUT + text[len(text) - tail :]


def kept(length: int, limit: int) -> tuple[int, int]:
    """Characters that stay at the beginning and at the end of a text of `length`; all at the beginning if it is short.

    >>> kept(10, 8), kept(8, 8)
    ((3, 2), (8, 0))
    """
    if length <= limit:
        return length, 0
    tail = (limit - len(CUT)) // 2
    return limit - len(CUT) - tail, tail


def table(trees: Sequence[Tree], count: int, decode: Decode, *, title: str) -> Table | None:
    """`count` leaves of graded `trees`; None when there is no leaf. `decode` turns token ids into text."""
    chosen = choose(trees, count)
    if not chosen:
        return None
    found = Table(title=Text(title), show_lines=True, title_justify="left")
    found.add_column("prompt", ratio=2)
    found.add_column("response", ratio=5)
    found.add_column("reward", justify="right", no_wrap=True)
    found.add_column("advantage", justify="right", no_wrap=True)
    before = None
    for tree, index in chosen:
        prompt = "" if tree is before else shorten(printable(decode(tree.prompt_tokens)), PROMPT_CHARACTERS)
        before = tree
        # `Text` and not a string: rich would read `[bold]` in a string as its markup.
        found.add_row(Text(prompt), _response(tree, index, decode), f"{tree.rewards[index]:.3g}", credit(tree, index))
    return found


def _response(tree: Tree, index: int, decode: Decode) -> Text:
    leaf = tree.leaves[index]
    text = Text()
    for branches, piece in marked_pieces(tree, leaf, decode):
        # A style of its own tells the mark from one that the model wrote.
        text.append(BRANCH if branches else "", "bold cyan")
        text.append(printable(piece))
    head, tail = kept(len(text), RESPONSE_CHARACTERS)
    if head + tail < len(text):
        text = Text.assemble(text[:head], CUT, text[len(text) - tail :])
    if stop := tree.nodes[leaf].stop:
        text.append(f" ({stop})", "dim")
    return text


def credit(tree: Tree, index: int) -> str:
    """The leaf's advantage; for an estimator with one a node, that of the last segment."""
    if not tree.advantages:
        return "-"
    by_node = len(tree.advantages) != len(tree.leaves)
    return f"{tree.advantages[tree.leaves[index] if by_node else index]:+.3f}"
