"""What the command lines of the three converters (tools/convert_*.py) share: the layout's options and how they end.

parser = converter_parser(__doc__, loads=True)          # --load, --save, --hf, the layout, dtype, deadline
a = parser.parse_args()
run_converter(lambda: convert(a))                       # lines for people and a JSON note, or one line and exit code 1
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treepo_mega.config import Config
from treepo_mega.convert.convert import companions_of, conversion_config, stored_dtype
from treepo_mega.convert.probe import LOGITS_TOLERANCE
from treepo_mega.errors import TreepoError
from treepo_mega.runtime import dist


def converter_parser(doc: str | None, *, loads: bool, verifies: bool = True) -> argparse.ArgumentParser:
    """Options of every converter; `loads`: with a Megatron checkpoint to read; `verifies`: it compares logits."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    dtype = "default: the dtype config.json names"
    if loads:
        parser.add_argument("--load", required=True, help="Megatron checkpoint directory")
        parser.add_argument("--save", required=True, help="directory to create")
        parser.add_argument("--hf", help="directory with config.json and the tokenizer; default: LOAD/hf")
        dtype = "default: the one it was converted with"
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="T")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="P")
    parser.add_argument("--virtual-pipeline-model-parallel-size", type=int, default=None, metavar="V")
    parser.add_argument("--params-dtype", choices=["fp32", "bf16"], help=dtype)
    if verifies:
        parser.add_argument("--no-verify", action="store_true", help="skip reading back and the comparison of logits")
        parser.add_argument("--logits-tolerance", type=float, default=LOGITS_TOLERANCE, help="default: %(default)g")
    parser.add_argument(
        "--timeout-s", type=float, default=600, help="deadline of each collective; default: %(default)g"
    )
    return parser


def add_padding(parser: argparse.ArgumentParser) -> None:
    """For converters that write Megatron checkpoints."""
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N")


def layout_config(a: argparse.Namespace) -> Config:
    """The configuration that the parsed options describe. Raises ConfigError and CheckpointError."""
    loads = hasattr(a, "load")
    return conversion_config(
        companions_of(a.load, a.hf) if loads else Path(a.hf),
        tp=a.tensor_model_parallel_size,
        pp=a.pipeline_model_parallel_size,
        vpp=a.virtual_pipeline_model_parallel_size,
        params_dtype=a.params_dtype or (stored_dtype(a.load) if loads else None),
        divisible_by=getattr(a, "make_vocab_size_divisible_by", 128),
        timeout_s=a.timeout_s,
    )


def run_converter(convert: Callable[[], tuple[list[str], dict[str, Any]]]) -> None:
    """Print what `convert` returns, lines and note; on bad input one line on stderr and exit code 1."""
    try:
        lines, note = convert()
    except TreepoError as e:
        sys.exit(f"error: {e}")
    if dist.is_main():
        print(*lines, json.dumps(note), sep="\n", flush=True)


def told(note: dict[str, Any]) -> list[str]:
    """What a conversion found and cost, in words."""
    lines = []
    if note.get("verified"):
        found = f"verified: {note['tensors']} tensors, {note['parameters']} parameters bit-equal"
        if "max_logit_difference" in note:
            found += f"; largest logit difference {note['max_logit_difference']:.2e}"
            found += f" (allowed {note['logit_tolerance']:g})"
        lines.append(found)
    m = note["memory"]
    read = f"read {m['read_mib']:.1f} of them, " if "read_mib" in m else ""
    verifying = f", {m['verify_peak_mib']:.1f} while verifying" if "verify_peak_mib" in m else ""
    lines.append(
        f"{m['of_mib']:.1f} MiB of weights; the busiest rank {read}holds {m['shard_mib']:.1f}, and took "
        f"{m['peak_mib']:.1f} MiB of host memory at most{verifying}"
    )
    return lines
