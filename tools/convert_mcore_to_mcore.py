"""Rewrite a Megatron distributed checkpoint in another layout (TP, PP, vocabulary padding), verified by bits.

    torchrun --nproc-per-node 4 tools/convert_mcore_to_mcore.py --load models/qwen-mcore --save models/qwen-tp4 \\
        --tensor-model-parallel-size 4

Weights only. Megatron loads any layout from any other, so this is for what has to lie on disk in a certain layout, and
for taking the weights out of a training checkpoint (name the model's directory with --hf). No HF weights are read.
"""

from __future__ import annotations

import argparse
from typing import Any

from treepo_mega.convert.cli import add_padding, converter_parser, layout_config, run_converter, told
from treepo_mega.convert.convert import mcore_to_mcore


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = converter_parser(__doc__, loads=True, verifies=False)
    add_padding(parser)
    return parser.parse_args()


def convert(a: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Convert."""
    note = mcore_to_mcore(a.load, a.save, layout_config(a))
    return [*told(note), f"wrote {a.save}"], note


def main() -> None:
    """The command."""
    a = arguments()
    run_converter(lambda: convert(a))


if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file
    main()
