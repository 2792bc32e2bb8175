"""Convert a Megatron distributed checkpoint back to a Hugging Face checkpoint that transformers loads.

    python tools/convert_mcore_to_hf.py --load models/qwen-mcore --save models/qwen-back
    torchrun --nproc-per-node 2 tools/convert_mcore_to_hf.py --load runs/r/checkpoints/step_000100 --hf models/qwen \\
        --save export --tensor-model-parallel-size 2

Any layout reads any checkpoint. A checkpoint made by convert_hf_to_mcore.py carries configuration and tokenizer; for
one of a training run name the model's directory with --hf. DIR of --save appears when it is complete.
"""

from __future__ import annotations

import argparse
import json
import sys

from treepo_mega.reshard.convert import companions_of, conversion_config, mcore_to_hf, stored_dtype
from treepo_mega.runtime import dist


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="Megatron checkpoint directory")
    parser.add_argument("--save", required=True, help="directory to create")
    parser.add_argument("--hf", help="directory with config.json and the tokenizer; default: LOAD/hf")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="T")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="P")
    parser.add_argument("--virtual-pipeline-model-parallel-size", type=int, default=None, metavar="V")
    parser.add_argument("--params-dtype", choices=["fp32", "bf16"], help="default: the one it was converted with")
    parser.add_argument("--max-shard-size-mib", type=float, default=5120, help="default: %(default)g")
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
            timeout_s=a.timeout_s,
        )
        note = mcore_to_hf(a.load, a.save, cfg, max_shard_bytes=int(a.max_shard_size_mib * 2**20))
    except ValueError as e:  # every error of ours about input is one
        sys.exit(f"error: {e}")
    if dist.is_main():
        print(f"wrote {a.save}\n{json.dumps(note)}", flush=True)


if __name__ == "__main__":
    main()
