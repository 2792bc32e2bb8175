"""`treepo-mega tree`: figures of a tree, the packed text, bad input, and the page itself in a headless Chromium."""

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.monitor.browser import NAMES, Browser, find_browser
from treepo_mega.cli import main
from treepo_mega.data.light_tokenizer import LightTokenizer
from treepo_mega.monitor.tree_page import TreePageError, write_tree_page
from treepo_mega.monitor.tree_page.figures import outline
from treepo_mega.monitor.tree_page.page import MAX_BYTES, render_page
from treepo_mega.monitor.tree_page.read import load_run, trees_path
from treepo_mega.tree.node import Tree

HOSTILE = "</script><script>window.owned=1</script><img src=x onerror='window.owned=2'>"


def byte_level() -> Tokenizer:
    """A tokenizer of single bytes, as GPT-2 writes them, with a hostile token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={one: place for place, one in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", HOSTILE])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """One that marks spaces and falls back to bytes, as Llama 2 has it."""
    words = ["<unk>", "▁a", "b", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def encode(text: str) -> list[int]:
    return list(byte_level().encode(text, add_special_tokens=False).ids)


def small_tree(prompt: str, number: int) -> Tree:
    """Two branches; the first has leaves with rewards 1 and 0, the second ends in the text of the first's second."""
    tree = Tree.start(f"train:{number}", encode(f"Question: {prompt}? Answer:"))
    # The branches part within the two bytes of é.
    head, tail = encode("caf")[:], encode("é")
    for text in (tail[:1], tail[:1]):
        branch = tree.add_child(0, policy_version=3)
        branch.tokens = head + text
        branch.logprobs = [-0.5] * len(branch.tokens)
    for parent, ending, reward in ((1, " one", 1.0), (1, HOSTILE, 0.0), (2, HOSTILE, 0.5)):
        leaf = tree.add_child(parent, policy_version=4)
        leaf.tokens, leaf.stop = tail[1:] + encode(ending), "eos"
        leaf.logprobs = [-1.0 - reward] * len(leaf.tokens)
        tree.leaves.append(leaf.id)
        tree.rewards.append(reward)
    tree.advantages = [0.75, -0.25, -0.5]
    return tree


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of three prompts at step 20, with the byte-level tokenizer."""
    directory = tmp_path / "run"
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write_run(directory, [small_tree(prompt, place) for place, prompt in enumerate(("red", "green", "blue"))])
    config = {
        "model": {"hf_checkpoint": str(tmp_path)},
        "algo": {"advantage_estimator": "treepo"},
        "logging": {"trees_interval": 20},
        "of_another_version": {"key": 1},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def write_run(directory: Path, trees: list[Tree], step: int = 20) -> None:
    path = trees_path(directory, step)
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(tree.to_dict()) + "\n" for tree in trees))


def islands(page: str) -> dict[str, bytes]:
    found = re.findall(r'<script type="application/octet-stream" id="([\w-]+)">([A-Za-z0-9+/=]*)</script>', page)
    return {name: zlib.decompress(base64.b64decode(data)) for name, data in found}


def numbers(data: bytes) -> list[int]:
    """LEB128, read one byte at a time."""
    out, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            out.append(value)
            value = shift = 0
    return out


def test_figures_of_a_tree():
    tree = small_tree("red", 1)
    tree.nodes[0].peek = [-0.5, -1.0]
    tree.nodes[3].entropies = [0.125] * len(tree.nodes[3].tokens)
    head = outline(tree, "uniform").head
    assert head["value"] == [0.5, 0.5, 0.5, 1, 0, 0.5]
    assert head["credit"] == [0, 0.25, -0.5, 0.75, -0.25, -0.5]
    assert head["alike"] == [None, 0, 0]
    assert head["entropy"][0] == [pytest.approx(0.5 * np.exp(-0.5) + np.exp(-1), rel=1e-3), "likeliest"]
    assert head["entropy"][1] == [0.125, "stored"] and head["entropy"][2:] == [None] * 4
    assert head["surprisal"][1] == 0.5 and head["surprisal"][0] is None
    # A descent takes either branch with 1/2, and the first branch's leaves with 1/4 each.
    assert outline(tree, "descent").head["credit"][:3] == [pytest.approx(-0.125), 0.25, -0.5]
    by_node = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    tree.advantages = by_node
    assert outline(tree, "uniform").head["credit"] == [0, *by_node[1:]]
    tree.nodes[0].peek = []
    assert outline(tree, "uniform").head["entropy"][0] == [0.5, "drawn"]


@pytest.mark.parametrize("make, text", [(byte_level, "héllo ∑<|end|>\n"), (sentence_piece, "b a é b")])
def test_bytes_of_tokens_are_the_text(make, text):
    inner = make()
    tokenizer = LightTokenizer(inner, {}, None)
    ids = inner.encode(text, add_special_tokens=False).ids
    joined = b"".join(tokenizer.token_bytes(ids)).decode()
    assert joined.removeprefix(" ") == tokenizer.decode(ids) == text
    assert tokenizer.token_bytes([10_000]) == [b"<10000?>"]


def test_the_page_holds_every_token_and_no_hostile_byte(run):
    path, notes = write_tree_page(run)
    page = path.read_text()
    assert path == run / "trees" / "step_000020.html" and notes == []
    assert "owned" not in page and page.count("</script>") == 3 + 2 + 1
    found = islands(page)
    index = json.loads(found["index"])
    assert [one["label"] for one in index["prompts"]] == ["red", "green", "blue"]
    lengths = numbers(found["vocabulary"])[: index["tokens"]]
    texts = found["vocabulary"][-sum(lengths) :]
    ends = np.cumsum(lengths).tolist()
    block = found["tree-1"]
    size = int.from_bytes(block[:4], "little")
    head = json.loads(block[4 : 4 + size])
    ids = numbers(block[4 + size :])
    assert len(ids) == sum(head["size"])
    text = b"".join(texts[ends[one] - lengths[one] : ends[one]] for one in ids)
    assert text == b"".join(LightTokenizer(byte_level(), {}, None).token_bytes(sum_tokens(small_tree("green", 1))))


def sum_tokens(tree: Tree) -> list[int]:
    return [token for node in tree.nodes for token in node.tokens]


def test_one_prompt_by_id_and_by_number(run, capsys):
    assert main(["tree", str(run), "--step", "20", "--prompt", "train:2"]) == 0
    assert "step_000020_prompt_3.html" in capsys.readouterr().out
    path, _ = write_tree_page(run, prompt="3", output=run / "elsewhere" / "page.html")
    assert [one["id"] for one in json.loads(islands(path.read_text())["index"])["prompts"]] == ["train:2"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"run_dir": "rnu"}, r"rnu: no such run directory \(did you mean '.*run'\?\)"),
        ({"step": 7}, r"no trees of step 7; there are trees of steps 20 \(logging.trees_interval of this run: 20\)"),
        ({"prompt": "trian:1"}, r"no tree of prompt 'trian:1' \(did you mean 'train:1'\?\)"),
        ({"prompt": "4"}, r"or its number in the file, 1 to 3"),
    ],
)
def test_what_is_not_there_is_named(run, arguments, message):
    directory = run.parent / arguments.get("run_dir", "run")
    with pytest.raises(TreePageError, match=message):
        write_tree_page(directory, arguments.get("step"), prompt=arguments.get("prompt"))


def test_a_run_without_trees_says_what_writes_them(tmp_path):
    with pytest.raises(TreePageError, match=r"holds no trees. A run writes them .* logging.trees_interval"):
        write_tree_page(tmp_path)


def test_what_is_missing_is_said_and_the_rest_is_shown(run):
    path = trees_path(run, 20)
    lines = path.read_text().splitlines(keepends=True)
    older = json.loads(lines[0])
    del older["advantages"]
    path.write_text(json.dumps(older) + "\n" + lines[1][:500])
    (run.parent / "tokenizer.json").unlink()
    page, notes = write_tree_page(run)
    assert [note for note in notes if "line 2: cut off; the 1 trees before it" in note]
    assert [note for note in notes if "holds no advantages" in note]
    assert [note for note in notes if "token ids stand in place of text: no tokenizer.json" in note]
    assert json.loads(islands(page.read_text())["index"])["notes"] == notes
    path.write_text(lines[0] + lines[1][:500] + "\n" + lines[2])
    with pytest.raises(TreePageError, match=r"line 2: not valid JSON"):
        write_tree_page(run)
    path.write_text(lines[0] + '{"prompt_id": "x", "nodes": [], "leafs": []}\n')
    with pytest.raises(TreePageError, match=r"line 2: not a tree as this version writes it: .*leafs"):
        write_tree_page(run)
    path.write_text(lines[0][:500])
    with pytest.raises(TreePageError, match=r"holds no whole tree"):
        write_tree_page(run)


FREQUENCY = 1 / np.arange(1, 100_001) / np.sum(1 / np.arange(1, 100_001))
"""Of ids, by rank, as words have it (Zipf)."""


def large_tree(number: int, draw: np.random.Generator) -> Tree:
    """16 leaves of 4,096 tokens in segments of 512, which double until there are 16; every token drawn by itself."""
    tree = Tree.start(f"train:{number}", [number, 1, 2, 3])
    ends = [0]
    for _ in range(8):
        parents = [one for one in ends for _ in range(2 if len(ends) < 16 else 1)]
        ends = []
        for parent in parents:
            node = tree.add_child(parent)
            node.tokens = draw.choice(len(FREQUENCY), 512, p=FREQUENCY).tolist()
            ends.append(node.id)
    tree.leaves = ends
    tree.rewards = [float(place < number) for place in range(16)]
    return tree


def test_a_large_step_stays_small_and_leaves_out_what_teaches_least(tmp_path):
    draw = np.random.default_rng(1)
    write_run(tmp_path, [large_tree(number, draw) for number in (0, 2, 1)])
    run = load_run(tmp_path, 20)
    tokens = sum(len(nodes) for one in run.outlines for nodes in one.tokens)
    page, notes = render_page(run)
    blocks = re.findall(r'id="tree-\d+">([^<]*)<', page)
    # Nothing takes less than the entropy of the draws; base64 holds six bits a byte.
    entropy = -float(np.sum(FREQUENCY * np.log2(FREQUENCY)))
    assert entropy < 6 * sum(map(len, blocks)) / tokens < 1.15 * entropy
    assert len(page) < MAX_BYTES and notes == []
    limit = len(page) - len(blocks[0]) // 2
    smaller, notes = render_page(run, limit)
    assert len(smaller) < limit and "1 of 3 trees are shown without text" in notes[0]
    shown = json.loads(islands(smaller)["index"])["prompts"]
    assert [one["whole"] for one in shown] == [False, True, True], "the first has no spread of rewards"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    command = find_browser()
    if command is None:
        pytest.skip(f"no browser: install one of {', '.join(NAMES)} to try the tree page in it")
    with Browser(command, tmp_path_factory.mktemp("profile")) as started:
        yield started


def test_the_page_in_a_browser(browser, run):
    """A click opens a path, keys and search work, a response's script does not run, nothing asks for anything."""
    path, _ = write_tree_page(run)
    browser.size(1300, 800)
    browser.open(path)
    assert browser.evaluate("document.querySelectorAll('#list .prompt').length") == 3
    browser.click("#labels .leaf:nth-child(2)")
    words = "[...document.querySelectorAll('#path .words')].map(one => one.textContent)"
    assert browser.evaluate(words) == ["Question: red? Answer:", "caf", f"é{HOSTILE}"]
    head = browser.evaluate("document.querySelector('#path .head').textContent")
    assert "leaf 2 of 3: reward 0" in head and "advantage \u22120.25" in head and "equal to leaf 3" in head
    assert browser.evaluate("document.querySelectorAll('#path script, #path img, #canvas img').length") == 0
    looks = "[...document.querySelectorAll('.node')].map(one => one.style.background).join()"
    seen = set()
    for mode, legend in (("value", "V(node)"), ("surprisal", "nats"), ("version", "1 older"), ("credit", "treepo")):
        browser.evaluate(f"byId('colour').value = '{mode}'; byId('colour').dispatchEvent(new Event('change'))")
        assert legend in browser.evaluate("byId('legend').textContent")
        seen.add(browser.evaluate(looks))
    assert len(seen) == 4, "each figure has its colours"
    browser.press("ArrowLeft")
    assert "segment 1" in browser.evaluate("document.querySelector('#path .head').textContent")
    browser.press("j")
    browser.wait("document.querySelector('#facts h2').textContent === 'green'")
    browser.click("#search")
    for key in "FÉ ONE":
        browser.press(key)
    hits = "[...document.querySelectorAll('.node.hit')].map(one => one.dataset.node)"
    assert browser.evaluate(hits) == ["1", "3"], "in two segments of one path"
    browser.press("Enter")
    browser.wait("document.querySelector('#status').textContent.startsWith('3 prompts of 3')")
    browser.size(390, 800)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390, "no sideways scrolling on a phone"
    assert browser.evaluate("window.owned") is None
    assert browser.problems == []


def forked_tree() -> Tree:
    """A trunk whose tokens 5 and 8 fork; the branch at token 5 begins with the hostile token."""
    tree = Tree.start("train:9", encode("Q"))
    for parent, text, rule in (
        (0, "long", None),
        (1, " wo", None),
        (1, HOSTILE + "!", "rank"),
        (2, "rds<|end|>", None),
        (2, "ods<|end|>", "rank"),
    ):
        node = tree.add_child(parent)
        node.tokens = encode(text)
        node.logprobs = [-0.5] * len(node.tokens)
        node.entropies = [{1: 0.25, 2: 1.25}.get(parent, 0.0), *[0.0] * (len(node.tokens) - 1)]
        node.fork = rule
    for leaf in (3, 4, 5):
        tree.nodes[leaf].stop = "eos"
        tree.leaves.append(leaf)
    tree.rewards = [0.0, 1.0, 0.0]
    return tree


def test_forks_are_marked_at_their_tokens_with_what_is_known_there(browser, tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write_run(tmp_path / "run", [forked_tree()])
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"model": {"hf_checkpoint": str(tmp_path)}}))
    path, _ = write_tree_page(tmp_path / "run")
    browser.size(1300, 800)
    browser.open(path)
    assert "2 forks" in browser.evaluate("byId('facts').textContent")
    told = "[...document.querySelectorAll('#canvas .fork')].map(one => [one.dataset.node, one.title])"
    marks = browser.evaluate(told)
    first = "fork at token 5\nentropy 0.25 nats\nplace 2 of 2 by entropy\nchosen by rank"
    second = "fork at token 8\nentropy 1.25 nats\nplace 1 of 2 by entropy\nchosen by rank"
    assert marks == [["1", first], ["2", second]]
    # The line stands where the branches begin, and crosses them all.
    box = "(one => [one.left, one.top, one.bottom])(document.querySelector('{}').getBoundingClientRect())"
    mark, branch, last = (
        browser.evaluate(box.format(f"#canvas .{name}"))
        for name in ('fork[data-node="2"]', 'node[data-node="4"]', 'node[data-node="5"]')
    )
    assert mark[0] == pytest.approx(branch[0], abs=1) and mark[0] == pytest.approx(last[0], abs=1)
    assert mark[1] <= min(branch[1], last[1]) + 1 and mark[2] >= max(branch[2], last[2]) - 1
    tokens = "[...document.querySelectorAll('#path .at-fork')].map(one => [one.textContent, one.title])"
    browser.evaluate("select(5)")
    assert browser.evaluate(tokens) == [[" ", first], ["o", second]]
    browser.evaluate("select(3)")
    assert browser.evaluate(tokens) == [[HOSTILE, first]]
    words = "[...document.querySelectorAll('#path .words')].map(one => one.textContent)"
    assert browser.evaluate(words) == ["Q", "long", HOSTILE + "!"]
    browser.click("#search")
    browser.evaluate("byId('search').value = 'g<'; byId('search').dispatchEvent(new Event('input'))")
    found = "[...document.querySelectorAll('#path mark')].map(one => [one.textContent, one.parentNode.className])"
    assert browser.evaluate(found) == [["g", "words"], ["<", "at-fork"]], "a hit may end within the token"
    assert browser.evaluate("window.owned") is None and browser.problems == []


def test_a_tree_without_its_text_says_so_in_the_browser(browser, run):
    text, _ = render_page(load_run(run, 20), max_bytes=1)
    page = run / "small.html"
    page.write_text(text)
    browser.open(page, "#prompt=2&node=4")
    assert browser.evaluate("document.querySelector('#facts h2').textContent") == "green"
    assert "text of this tree was left out" in browser.evaluate("document.querySelector('#path').textContent")
    assert "3 of 3 trees are shown without text" in browser.evaluate("document.querySelector('#notes').textContent")
    assert browser.problems == []
