"""Sample one tree from a real engine, grade its leaves, and print what every branch earned.

    python examples/python/sample_a_tree.py

One process, no GPU, no torchrun. The model is the tiny reasoner of `make demo`.
"""

from __future__ import annotations

from transformers import AutoTokenizer

from treepo_mega.config import load_config
from treepo_mega.data.prompts import load_prompts
from treepo_mega.data.rewards import RewardItem, RewardPool
from treepo_mega.engine.engine import Engine
from treepo_mega.monitor.progress import quieten_libraries
from treepo_mega.rollout.generator import Generator
from treepo_mega.tree.advantage import leaf_advantages, set_rewards
from treepo_mega.tree.node import ROOT, Tree


def show(tree: Tree, generator: Generator, advantages: dict[int, float], node_id: int = ROOT, indent: str = "") -> None:
    """Print the segments below `node_id`, children indented; a leaf shows why it stopped and its advantage."""
    for child in tree.nodes[node_id].children:
        node = tree.nodes[child]
        line = indent + generator.decode(node.tokens)
        if child in advantages:
            reward = tree.rewards[tree.leaves.index(child)]
            line = f"{line:<56} {node.stop:<7} reward {reward:g}  advantage {advantages[child]:+.3f}"
        print(line)
        show(tree, generator, advantages, child, indent + "    ")


def main() -> None:
    """Sample, grade, print."""
    quieten_libraries()
    cfg = load_config("examples/tiny_cpu.yaml", ["rollout.n_samples_per_prompt=8", "rollout.rollout_batch_size=16"])
    hf_dir = cfg.model.hf_checkpoint
    tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    prompt = load_prompts(cfg.data.train, cfg.data, tokenizer).prompts[0]

    engine = Engine(hf_dir, cfg)
    generator = Generator(engine, cfg, tokenizer)
    (tree,) = generator.rollout([prompt], step=0)

    items = []
    for leaf in tree.leaves:
        text = generator.decode(tree.response(leaf))
        items.append(RewardItem(prompt.verifier, prompt.data_source, text, prompt.answer, prompt.extra))
    with RewardPool(cfg.reward) as pool:
        results = pool.score(items)
    set_rewards(tree, [result.score for result in results])
    advantages = dict(zip(tree.leaves, leaf_advantages(tree, "treepo"), strict=True))

    print(f"\n{prompt.text}   (answer {prompt.answer})")
    show(tree, generator, advantages)
    unique = tree.unique_tokens()
    flat = tree.flat_tokens()
    print(f"\n{len(tree.leaves)} leaves, {unique} tokens sampled instead of {flat}: token_ratio {unique / flat:.3f}")


if __name__ == "__main__":
    main()
