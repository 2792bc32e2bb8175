"""Convert a Hugging Face checkpoint (Llama, Qwen2/2.5, Qwen3) to a Megatron distributed checkpoint, verified.

    python tools/convert_hf_to_mcore.py --hf models/qwen --save models/qwen-mcore
    python tools/convert_hf_to_mcore.py --hf models/qwen --verify models/qwen-mcore      # compare, write nothing
    torchrun --nproc-per-node 4 tools/convert_hf_to_mcore.py --hf DIR --save DIR \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

The layout only divides the work of converting: any layout loads the result (`model.load` of a training
configuration). DIR of --save appears when everything is written and verified; see treepo_mega/reshard/convert.py.
"""

from __future__ import annotations

import argparse
import json
import sys

from treepo_mega.reshard.convert import conversion_config, hf_to_mcore, verify_checkpoint
from treepo_mega.reshard.probe import LOGITS_TOLERANCE
from treepo_mega.runtime import dist


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, help="directory with config.json, *.safetensors and the tokenizer")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--save", help="directory to create")
    target.add_argument(
        "--verify",
        metavar="DIR",
        help="only compare this Megatron checkpoint with --hf, layer by layer; names the first layer that diverges",
    )
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="T")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="P")
    parser.add_argument("--virtual-pipeline-model-parallel-size", type=int, default=None, metavar="V")
    parser.add_argument("--params-dtype", choices=["fp32", "bf16"], help="default: the dtype config.json names")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N")
    parser.add_argument("--no-verify", action="store_true", help="skip reading back and the comparison of logits")
    parser.add_argument("--logits-tolerance", type=float, default=LOGITS_TOLERANCE, help="default: %(default)g")
    parser.add_argument(
        "--timeout-s", type=float, default=600, help="deadline of each collective; default: %(default)g"
    )
    return parser.parse_args()


def main() -> None:
    """Convert; on bad input one line on stderr and exit code 1."""
    a = arguments()
    try:
        cfg = conversion_config(
            a.hf,
            tp=a.tensor_model_parallel_size,
            pp=a.pipeline_model_parallel_size,
            vpp=a.virtual_pipeline_model_parallel_size,
            params_dtype=a.params_dtype,
            divisible_by=a.make_vocab_size_divisible_by,
            timeout_s=a.timeout_s,
        )
        if a.verify:
            found = verify_checkpoint(a.hf, a.verify, cfg, tolerance=a.logits_tolerance)
            if dist.is_main():
                print(f"verified: {a.verify} holds the weights of {a.hf}\n{json.dumps(found)}", flush=True)
            return
        note = hf_to_mcore(a.hf, a.save, cfg, verify=not a.no_verify, tolerance=a.logits_tolerance)
    except ValueError as e:  # every error of ours about input is one
        sys.exit(f"error: {e}")
    if dist.is_main():
        if note["verified"]:
            print(
                f"verified: {note['tensors']} tensors, {note['parameters']} parameters bit-equal; largest logit "
                f"difference {note['max_logit_difference']:.2e} (allowed {note['logit_tolerance']:g})"
            )
        print(f"wrote {a.save}\n{json.dumps(note)}", flush=True)


if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file
    main()
