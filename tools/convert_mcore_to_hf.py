"""Convert a Megatron distributed checkpoint back to a Hugging Face checkpoint that transformers loads, verified.

    python tools/convert_mcore_to_hf.py --load models/qwen-mcore --save models/qwen-back
    torchrun --nproc-per-node 2 tools/convert_mcore_to_hf.py --load runs/r/checkpoints/step_000100 --hf models/qwen \\
        --save export --tensor-model-parallel-size 2

Any layout reads any checkpoint. A checkpoint made by convert_hf_to_mcore.py carries configuration and tokenizer; for
one of a training run name the model's directory with --hf. DIR of --save appears when it is complete, and its tensors
and logits are those of the Megatron model (--no-verify skips that).
"""

from __future__ import annotations

import argparse
from typing import Any

from treepo_mega.convert.cli import converter_parser, layout_config, run_converter, told
from treepo_mega.convert.convert import mcore_to_hf


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = converter_parser(__doc__, loads=True)
    parser.add_argument("--max-shard-size-mib", type=float, default=5120, help="default: %(default)g")
    return parser.parse_args()


def convert(a: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Convert."""
    note = mcore_to_hf(
        a.load,
        a.save,
        layout_config(a),
        max_shard_bytes=int(a.max_shard_size_mib * 2**20),
        verify=not a.no_verify,
        tolerance=a.logits_tolerance,
    )
    return [*told(note), f"wrote {a.save}"], note


def main() -> None:
    """The command."""
    a = arguments()
    run_converter(lambda: convert(a))


if __name__ == "__main__":
    main()
