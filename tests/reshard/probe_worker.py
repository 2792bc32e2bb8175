"""Run as one rank: the probe's logit difference for right weights, and for several kinds of wrong ones.

Arguments: HF_DIR. Prints one JSON object.
"""

import json
import sys

import torch

from treepo_mega.actor.model import build_model
from treepo_mega.config import read_hf_config
from treepo_mega.reshard.convert import conversion_config
from treepo_mega.reshard.gather import load_from_hf, local_params
from treepo_mega.reshard.layout import ModelSpec
from treepo_mega.reshard.probe import compare_with_transformers
from treepo_mega.runtime import dist


def main():
    hf_dir = sys.argv[1]
    cfg, spec = conversion_config(hf_dir), ModelSpec.from_hf(hf_dir)
    dist.initialize(cfg, read_hf_config(hf_dir))
    models = build_model(cfg, hf_dir)
    found, diverging = {}, {}

    def swap_k_and_v(p):
        w = p["decoder.layers.1.self_attention.linear_qkv.weight"]
        w[16:24], w[24:32] = w[24:32].clone(), w[16:24].clone()

    def negate_a_norm(p):
        p["decoder.layers.3.self_attention.k_layernorm.weight"].neg_()

    for name, spoil in {
        "right": lambda p: None,
        "k and v swapped": swap_k_and_v,
        "norm negated": negate_a_norm,
        "not a number": lambda p: p["output_layer.weight"][7].fill_(torch.nan),
    }.items():
        load_from_hf(models, spec, cfg, hf_dir)
        spoil(local_params(models[0]))
        found[name], found["parameters"], diverging[name] = compare_with_transformers(cfg, models, spec, hf_dir)
    load_from_hf(models, spec, cfg, hf_dir)
    models[0].inv_freq = models[0].inv_freq * 0.9
    found["rotary base"], _, diverging["rotary base"] = compare_with_transformers(cfg, models, spec, hf_dir)
    print("\n" + json.dumps([found, diverging]), flush=True)


if __name__ == "__main__":
    main()
