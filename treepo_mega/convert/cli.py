"""`treepo-mega convert`: checkpoints between Hugging Face and Megatron.

    add_verbs(parser)                       # to-mcore, to-hf, relayout, verify
    status = convert(parser.parse_args())   # prints lines for people and a JSON note

Nothing here imports torch or Megatron before a conversion begins: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_mega.config import Config
from treepo_mega.convert import LOGITS_TOLERANCE
from treepo_mega.monitor.progress import quieten_libraries

Options = argparse.Namespace
Result = tuple[list[str], dict[str, Any]]
"""Lines for people, and the note."""


def add_verbs(parser: argparse.ArgumentParser) -> None:
    """Give `parser` one subcommand for each verb, with its options, its text and its examples."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(VERBS) + "}")
    for name, verb in VERBS.items():
        one = verbs.add_parser(
            name,
            help=verb.summary,
            description=f"{verb.summary[0].upper()}{verb.summary[1:]}.\n\n{verb.text}",
            epilog=f"examples:\n{verb.examples}\n\n{LAUNCH}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_options(one)
        _add_layout(one)


def convert(options: Options) -> int:
    """Carry out a parsed command line; returns 0. Collective over all ranks. Raises TreepoError for bad input."""
    quieten_libraries()  # before the import: most of them warn while being imported
    lines, note = VERBS[options.verb].run(options)
    from treepo_mega.runtime import dist

    if dist.is_main():
        print(*lines, json.dumps(note), sep="\n", flush=True)
    return 0


def _to_mcore_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", required=True, help="directory with config.json, *.safetensors and the tokenizer")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--save", help="directory to create")
    target.add_argument("--verify", metavar="DIR", help="write nothing; the same as `verify --load DIR`")
    _add_padding(parser)
    _add_verification(parser)


def _to_hf_options(parser: argparse.ArgumentParser) -> None:
    _add_load_and_save(parser)
    parser.add_argument(
        "--max-shard-size-mib", type=_positive, default=5120, metavar="MIB", help="default: %(default)g"
    )
    _add_verification(parser)


def _relayout_options(parser: argparse.ArgumentParser) -> None:
    _add_load_and_save(parser)
    _add_padding(parser)


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", required=True, help="directory with config.json and *.safetensors to compare with")
    parser.add_argument("--load", required=True, help="Megatron checkpoint directory to compare")
    _add_padding(parser)
    _add_tolerance(parser)


def _add_load_and_save(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load", required=True, help="Megatron checkpoint directory; also one of Megatron-LM (torch_dist)"
    )
    parser.add_argument("--save", required=True, help="directory to create")
    parser.add_argument("--hf", help="directory with config.json and the tokenizer; default: LOAD/hf")


def _add_padding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="the embedding's rows are padded to a multiple of N times T; default: %(default)s",
    )


def _add_verification(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-verify", action="store_true", help="skip reading back and the comparison of logits")
    _add_tolerance(parser)


def _add_tolerance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--logits-tolerance",
        type=float,
        default=LOGITS_TOLERANCE,
        metavar="X",
        help="largest difference allowed from transformers' logits; default: %(default)g",
    )


def _add_layout(parser: argparse.ArgumentParser) -> None:
    layout = parser.add_argument_group("layout", "T x P ranks share the work; any layout reads any checkpoint")
    layout.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="T", help="default: 1")
    layout.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="P", help="default: 1")
    layout.add_argument(
        "--virtual-pipeline-model-parallel-size", type=int, metavar="V", help="chunks of a pipeline rank; default: one"
    )
    layout.add_argument(
        "--params-dtype",
        choices=["fp32", "bf16"],
        help="default: the one that the checkpoint was converted with, else the one config.json names",
    )
    layout.add_argument(
        "--timeout-s",
        type=_positive,
        default=600,
        metavar="SECONDS",
        help="deadline of each wait for other ranks; default: %(default)g",
    )


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _layout(options: Options, hf_dir: str | Path, load: str | None = None) -> Config:
    """The configuration that the options describe. Raises ConfigError, ModelSpecError and CheckpointError."""
    from treepo_mega.convert.convert import conversion_config, stored_dtype

    return conversion_config(
        hf_dir,
        tp=options.tensor_model_parallel_size,
        pp=options.pipeline_model_parallel_size,
        vpp=options.virtual_pipeline_model_parallel_size,
        params_dtype=options.params_dtype or (stored_dtype(load) if load else None),
        divisible_by=getattr(options, "make_vocab_size_divisible_by", 128),
        timeout_s=options.timeout_s,
    )


def _to_mcore(options: Options) -> Result:
    from treepo_mega.convert.convert import hf_to_mcore

    if options.verify:
        options.load = options.verify
        return _verify(options)
    cfg = _layout(options, options.hf)
    verify = not options.no_verify
    note = hf_to_mcore(options.hf, options.save, cfg, verify=verify, tolerance=options.logits_tolerance)
    return [*_report(note), f"wrote {options.save}"], note


def _to_hf(options: Options) -> Result:
    from treepo_mega.convert.convert import companions_of, mcore_to_hf

    note = mcore_to_hf(
        options.load,
        options.save,
        _layout(options, companions_of(options.load, options.hf), options.load),
        max_shard_bytes=int(options.max_shard_size_mib * 2**20),
        verify=not options.no_verify,
        tolerance=options.logits_tolerance,
    )
    return [*_report(note), f"wrote {options.save}"], note


def _relayout(options: Options) -> Result:
    from treepo_mega.convert.convert import companions_of, mcore_to_mcore

    cfg = _layout(options, companions_of(options.load, options.hf), options.load)
    note = mcore_to_mcore(options.load, options.save, cfg)
    return [*_report(note), f"wrote {options.save}"], note


def _verify(options: Options) -> Result:
    from treepo_mega.convert.verify import verify_checkpoint

    cfg = _layout(options, options.hf, options.load)
    found = verify_checkpoint(options.hf, options.load, cfg, tolerance=options.logits_tolerance)
    return [f"verified: {options.load} holds the weights of {options.hf}"], found


def _report(note: dict[str, Any]) -> list[str]:
    """What a conversion found and cost, in words."""
    lines = []
    if note["verified"]:
        found = f"verified: {note['tensors']} tensors, {note['parameters']} parameters bit-equal"
        if "max_logit_difference" in note:
            found += f"; largest logit difference {note['max_logit_difference']:.2e}"
            found += f" (allowed {note['logit_tolerance']:g})"
        lines.append(found)
    memory = note["memory"]
    read = f"read {memory['read_mib']:.1f} of them, " if "read_mib" in memory else ""
    verifying = f", {memory['verify_peak_mib']:.1f} while verifying" if "verify_peak_mib" in memory else ""
    lines.append(
        f"{memory['of_mib']:.1f} MiB of weights; the busiest rank {read}holds {memory['shard_mib']:.1f}, and took "
        f"{memory['peak_mib']:.1f} MiB of host memory at most{verifying}"
    )
    return lines


LAUNCH = (
    "Alone it is a run of one rank. For more, start it as `torchrun --nproc-per-node N --no-python treepo-mega\n"
    "convert ...`, with N = T x P. Exit status: 0 when done, 2 for bad input and for weights that differ (one message\n"
    "on stderr, nothing is written). torchrun itself then exits with 1."
)


@dataclass(frozen=True)
class Verb:
    """One subcommand: its texts, its own options, and what it does."""

    summary: str
    text: str
    examples: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Options], Result]


VERBS = {
    "to-mcore": Verb(
        "Hugging Face checkpoint to a Megatron distributed checkpoint, verified",
        "Each rank reads its own slices. What was saved is read back and held against the source: by bits, by the\n"
        "number of parameters, and by the logits that transformers computes. The directory of --save appears when\n"
        "everything is written and verified. Name it as model.load of a training configuration.\n\n"
        "A safetensors file carries no checksum: a bit that flipped before the conversion is part of the source. One\n"
        "that flips afterwards is refused when the checkpoint is loaded.",
        "  treepo-mega convert to-mcore --hf models/qwen --save models/qwen-mcore\n"
        "  torchrun --nproc-per-node 4 --no-python treepo-mega convert to-mcore --hf models/qwen \\\n"
        "      --save models/qwen-mcore --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        _to_mcore_options,
        _to_mcore,
    ),
    "to-hf": Verb(
        "Megatron distributed checkpoint to a Hugging Face checkpoint that transformers loads, verified",
        "A checkpoint made by to-mcore carries configuration and tokenizer. For one of a training run name the\n"
        "model's directory with --hf. The directory of --save appears when its tensors and logits are the Megatron\n"
        "model's (--no-verify skips that).",
        "  treepo-mega convert to-hf --load models/qwen-mcore --save models/qwen-back\n"
        "  torchrun --nproc-per-node 2 --no-python treepo-mega convert to-hf --load runs/r/checkpoints/step_000100 \\\n"
        "      --hf models/qwen --save export --tensor-model-parallel-size 2",
        _to_hf_options,
        _to_hf,
    ),
    "relayout": Verb(
        "Megatron distributed checkpoint in another layout (TP, PP, vocabulary padding), verified by bits",
        "Weights only, and no Hugging Face weights are read. Megatron loads any layout from any other, so this is for\n"
        "what has to lie on disk in a certain layout, and for taking the weights out of a training checkpoint (name\n"
        "the model's directory with --hf).",
        "  torchrun --nproc-per-node 4 --no-python treepo-mega convert relayout --load models/qwen-mcore \\\n"
        "      --save models/qwen-tp4 --tensor-model-parallel-size 4",
        _relayout_options,
        _relayout,
    ),
    "verify": Verb(
        "compare a Megatron checkpoint with a Hugging Face one, write nothing",
        "By bits, by the number of parameters and by logits. A failure names the tensors that differ, or the first\n"
        "layer whose output diverges.",
        "  treepo-mega convert verify --load models/qwen-mcore --hf models/qwen",
        _verify_options,
        _verify,
    ),
}
