"""Rewrite a Megatron distributed checkpoint in another layout (TP, PP, vocabulary padding), verified by bits.

    torchrun --nproc-per-node 4 tools/convert_mcore_to_mcore.py --load models/qwen-mcore --save models/qwen-tp4 \\
        --tensor-model-parallel-size 4

Weights only. Megatron loads any layout from any other, so this is for what has to lie on disk in a certain layout, and
for taking the weights out of a training checkpoint (name the model's directory with --hf). No HF weights are read.
"""

from __future__ import annotations

import argparse
import json
import sys

from treepo_mega.reshard.convert import companions_of, conversion_config, mcore_to_mcore, stored_dtype
from treepo_mega.runtime import dist


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="Megatron checkpoint directory")
    parser.add_argument("--save", required=True, help="directory to create")
    parser.add_argument("--hf", help="directory with config.json and the tokenizer; default: LOAD/hf")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="T")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="P")
    parser.add_argument("--virtual-pipeline-model-parallel-size", type=int, default=None, metavar="V")
    parser.add_argument("--params-dtype", choices=["fp32", "bf16"], help="default: the one it was converted with")
    parser.add_argument(
        "--timeout-s", type=float, default=600, help="deadline of each collective; default: %(default)g"
    )
    return parser.parse_args()


def main() -> None:
    """Convert; on bad input one line on stderr and exit code 1."""
    a = arguments()
    try:
        cfg = conversion_config(
            companions_of(a.load, a.hf),
            tp=a.tensor_model_parallel_size,
            pp=a.pipeline_model_parallel_size,
            vpp=a.virtual_pipeline_model_parallel_size,
            params_dtype=a.params_dtype or stored_dtype(a.load),
            divisible_by=a.make_vocab_size_divisible_by,
            timeout_s=a.timeout_s,
        )
        note = mcore_to_mcore(a.load, a.save, cfg)
    except ValueError as e:  # every error of ours about input is one
        sys.exit(f"error: {e}")
    if dist.is_main():
        print(f"wrote {a.save}\n{json.dumps(note)}", flush=True)


if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file
    main()
