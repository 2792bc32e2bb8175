"""`logging.completions`: which leaves are shown, and that nothing a model writes steers the terminal."""

import io

import pytest
from rich.console import Console

from treepo_mega.monitor.completions import BRANCH, choose, pieces, table
from treepo_mega.monitor.progress import Progress
from treepo_mega.tree.node import Tree

WORDS = {1: "2+2=", 2: "[bold]four[/bold]", 3: "\x1b]0;owned\x07", 4: "five", 5: "\u202eevil\n"}


def decode(tokens: list[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


def tree_of(*rewards: float) -> Tree:
    """Prompt 1; a segment of token 2, below which a leaf for each reward ends with token 3, 4 or 5."""
    tree = Tree.start("p", [1])
    stem = tree.add_child(0)
    stem.tokens = [2]
    for place in range(len(rewards)):
        leaf = tree.add_child(stem.id)
        leaf.tokens, leaf.stop = [3 + place % 3], "eos"
        tree.leaves.append(leaf.id)
    tree.rewards = list(rewards)
    tree.advantages = [reward - 0.5 for reward in rewards]
    return tree


def test_prompts_that_differ_come_first_best_before_worst():
    same = tree_of(1.0, 1.0)
    differs = tree_of(0.25, 1.0, 0.0)
    chosen = [(tree is differs, index) for tree, index in choose([same, differs], 5)]
    assert chosen == [(True, 1), (True, 2), (False, 0)]
    assert choose([Tree.start("p", [1])], 3) == [] and table([], 3, decode, title="none") is None


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_hostile_text_stays_text(encoding):
    progress = Progress(enabled=True)
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    progress.console = Console(file=out, highlight=False, soft_wrap=True)
    shown = table([tree_of(1.0, 0.0, 0.5)], 3, decode, title="step [red]3")
    assert shown is not None
    progress.show_table(shown)
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    assert "[bold]four[/bold]" in text and "step [red]3" in text and "+0.500" in text and "-0.500" in text
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert (BRANCH in text) == (encoding == "utf-8")
    progress.enabled = False
    progress.show_table(shown)
    out.flush()
    assert out.buffer.getvalue().decode(encoding) == text


def test_a_character_in_two_segments_belongs_to_the_second():
    tree = Tree.start("p", [1])
    first = tree.add_child(0)
    second = tree.add_child(first.id)
    first.tokens, second.tokens = [0x61, 0xC3], [0xA9, 0x62]
    found = pieces(tree, second.id, lambda tokens: bytes(tokens).decode(errors="replace"))
    assert found == ["a", "éb"]
