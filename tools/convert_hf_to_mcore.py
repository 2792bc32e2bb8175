"""Convert a Hugging Face checkpoint (Llama, Qwen2/2.5, Qwen3) to a Megatron distributed checkpoint, verified.

    python tools/convert_hf_to_mcore.py --hf models/qwen --save models/qwen-mcore
    python tools/convert_hf_to_mcore.py --hf models/qwen --verify models/qwen-mcore      # compare, write nothing
    torchrun --nproc-per-node 4 tools/convert_hf_to_mcore.py --hf DIR --save DIR \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

The layout only divides the work of converting: any layout loads the result (`model.load` of a training
configuration). DIR of --save appears when everything is written and verified; see treepo_mega/convert/convert.py.

A safetensors file carries no checksum: a bit that flipped before the conversion is part of the source. One that flips
afterwards is refused when the checkpoint is loaded (manifest.json holds SHA-256), and --verify names the tensor.
"""

from __future__ import annotations

import argparse
from typing import Any

from treepo_mega.convert.cli import add_padding, converter_parser, layout_config, run_converter, told
from treepo_mega.convert.convert import hf_to_mcore
from treepo_mega.convert.verify import verify_checkpoint


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = converter_parser(__doc__, loads=False)
    parser.add_argument("--hf", required=True, help="directory with config.json, *.safetensors and the tokenizer")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--save", help="directory to create")
    target.add_argument(
        "--verify",
        metavar="DIR",
        help="only compare this Megatron checkpoint with --hf, layer by layer; names the first layer that diverges",
    )
    add_padding(parser)
    return parser.parse_args()


def convert(a: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Convert or compare."""
    cfg = layout_config(a)
    if a.verify:
        found = verify_checkpoint(a.hf, a.verify, cfg, tolerance=a.logits_tolerance)
        return [f"verified: {a.verify} holds the weights of {a.hf}"], found
    note = hf_to_mcore(a.hf, a.save, cfg, verify=not a.no_verify, tolerance=a.logits_tolerance)
    return [*told(note), f"wrote {a.save}"], note


def main() -> None:
    """The command."""
    a = arguments()
    run_converter(lambda: convert(a))


if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file
    main()
